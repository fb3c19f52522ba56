//! Every kind of check, against real servers across the network.

use crate::support::{UdpEcho, service, vips};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::{
    fmt::Write as _,
    fs,
    net::UdpSocket,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// How quickly the checks of these tests go.
const QUICK: &str = "interval = \"200ms\"\ntimeout = \"200ms\"\nrise = 1\nfall = 2\n";

fn one_backend() -> Topology {
    Topology::new(Options {
        backends: 1,
        ..Options::default()
    })
}

/// State and reason of the only backend of a service.
fn stands(topology: &Topology, service: &str) -> (String, String) {
    let list = topology.json(&["backend", "list", service]);
    let text = |key: &str| list[0][key].as_str().unwrap_or_default().to_owned();
    (text("state"), text("reason"))
}

/// Waits until the only backend of a service is in this state, with a reason that begins so.
#[track_caller]
fn wait_for(topology: &Topology, service: &str, state: &str, reason: &str) {
    wait_until(&format!("{service} to be {state}: {reason}"), || {
        let (is, why) = stands(topology, service);
        is == state && why.starts_with(reason)
    });
}

/// A certificate for `app.example` and its key, signed by itself.
fn certificate(topology: &Topology) -> (PathBuf, PathBuf) {
    let file = |name: &str| topology.dir().join(name);
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    let (out, keyout) = (cert.display().to_string(), key.display().to_string());
    let (name, leaf) = (
        "subjectAltName=DNS:app.example",
        "basicConstraints=CA:FALSE",
    );
    #[rustfmt::skip]
    let args = [
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "2", "-subj", "/CN=app.example", "-addext", name, "-addext", leaf, "-out", &out, "-keyout", &keyout,
    ];
    topology.run("b1", "openssl", &args).ok();
    (cert, key)
}

/// nginx with TLS at port 8443 of `b1`.
fn nginx_tls(topology: &Topology, cert: &str, key: &str) -> u32 {
    let dir = topology.dir().join("tls-nginx");
    fs::create_dir_all(&dir).expect("a directory in our own");
    let text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {dir}/pid;\nerror_log {dir}/error.log;\n\
         events {{ }}\nhttp {{\n access_log off;\n client_body_temp_path {dir}/body;\n\
         proxy_temp_path {dir}/proxy;\n fastcgi_temp_path {dir}/fastcgi;\n\
         uwsgi_temp_path {dir}/uwsgi;\n scgi_temp_path {dir}/scgi;\n\
         server {{\n listen 8443 ssl;\n ssl_certificate {cert};\n ssl_certificate_key {key};\n\
         location / {{ return 200 \"$ssl_server_name\\n\"; }}\n }}\n}}\n",
        dir = dir.display(),
    );
    let conf = topology.config("tls.conf", &text);
    let mut command = topology.command("b1", "nginx");
    command.arg("-c").arg(&conf);
    topology.spawn("nginx-tls", command)
}

#[test]
fn tls_is_spoken_and_certificates_are_verified() {
    let topology = one_backend();
    let (cert, key) = certificate(&topology);
    let (cert, key) = (cert.display().to_string(), key.display().to_string());
    let nginx = nginx_tls(&topology, &cert, &key);
    let [v4, v6] = vips(443);
    let mut other = v4;
    other.set_port(444);
    let health = |lines: &str| format!("[service.health]\n{lines}\n{QUICK}");
    let verified = health(&format!(
        "type = \"https\"\nca = \"{cert}\"\nsni = \"app.example\"\nexpect_body = \"^app\\\\.example$\""
    ));
    let wrong = health(&format!(
        "type = \"https\"\nca = \"{cert}\"\nsni = \"other.example\""
    ));
    let handshake = health("type = \"tls\"");
    // nginx listens there on IPv4 alone.
    let text = topology.daemon_section()
        + &service(&topology, "verified", "tcp", v4, (1, 8443), "", &verified)
        + &service(&topology, "wrong", "tcp", other, (1, 8443), "", &wrong)
        + &service(&topology, "handshake", "tcp", v6, (1, 8443), "", &handshake);
    topology.daemon(&topology.config("sluice.toml", &text));
    wait_for(&topology, "verified", "up", "L7OK 200 OK");
    wait_for(
        &topology,
        "wrong",
        "down",
        "L6RSP the certificate is for another name than sni",
    );
    wait_for(&topology, "handshake", "down", "L4CON connection refused");
    topology.kill(nginx);
    wait_for(&topology, "verified", "down", "L4CON connection refused");
}

/// A name server on `b1` that answers every question with this response code and no records.
struct NameServer {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl NameServer {
    fn start(topology: &Topology, rcode: u8) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = topology.background("b1", move || {
            let socket = UdpSocket::bind("0.0.0.0:53").expect("a free port in a namespace");
            socket
                .set_read_timeout(Some(Duration::from_millis(50)))
                .expect("a timeout on a socket");
            let mut buffer = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut buffer) {
                    // RFC 1035, section 4.1.1: QR, then RCODE.
                    buffer[2] |= 0x80;
                    buffer[3] = rcode;
                    let _ = socket.send_to(&buffer[..n], from);
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn datagrams_are_answered_or_refused() {
    let topology = one_backend();
    let echo = UdpEcho::start(&topology, "b1", 9000);
    let names = NameServer::start(&topology, 0);
    let [v4, v6] = vips(53);
    let udp = format!(
        "[service.health]\ntype = \"udp\"\npayload = \"ping\"\nexpect_body = \"^b1 ping$\"\n{QUICK}"
    );
    let dns = format!(
        "[service.health]\ntype = \"dns\"\nname = \"app.example\"\nrecord = \"A\"\n{QUICK}"
    );
    let text = topology.daemon_section()
        + &service(&topology, "echo", "udp", v6, (1, 9000), "", &udp)
        + &service(&topology, "names", "udp", v4, (1, 53), "", &dns);
    topology.daemon(&topology.config("sluice.toml", &text));
    wait_for(&topology, "echo", "up", "L7OK 7 bytes");
    wait_for(&topology, "names", "up", "L7OK NOERROR, 0 records");

    // A name server that cannot answer is one that fails.
    drop(names);
    wait_for(&topology, "names", "down", "L4CON port unreachable");
    let failing = NameServer::start(&topology, 2);
    wait_for(&topology, "names", "down", "L7STS SERVFAIL");
    drop(failing);

    drop(echo);
    wait_for(&topology, "echo", "down", "L4CON port unreachable");
    let silent =
        "table inet t { chain c { type filter hook input priority 0; udp dport 9000 drop; }; }";
    let rules = topology.config("silent.nft", silent);
    let rules = rules.display().to_string();
    topology.run("b1", "nft", &["-f", &rules]).ok();
    wait_for(&topology, "echo", "down", "L7TOUT no answer within 200ms");
}

#[test]
fn a_command_decides_as_nobody_and_is_killed_when_it_hangs() {
    let topology = one_backend();
    topology.nginx("b1");
    // Where anybody may read and write.
    let dir = topology.dir().join("shared");
    fs::create_dir_all(&dir).expect("a directory in our own");
    topology
        .run("b1", "chmod", &["777", &dir.display().to_string()])
        .ok();
    let file = |name: &str| dir.join(name);
    let script = format!(
        "if test -e {hang}; then sleep 1000 & echo $$ $! > {pids}; wait; fi\n\
         echo $(id -un) $SLUICE_SERVICE $SLUICE_BACKEND $SLUICE_ADDRESS:$SLUICE_PORT; test -e {good}",
        hang = file("hang").display(),
        pids = file("pids").display(),
        good = file("good").display(),
    );
    let mut health = String::new();
    let _ = write!(
        health,
        "[service.health]\ntype = \"exec\"\ncommand = \"/bin/sh\"\nargs = [\"-c\", '''{script}''']\n\
         interval = \"500ms\"\ntimeout = \"500ms\"\nrise = 1\nfall = 1\n"
    );
    let [v4, _] = vips(80);
    let text =
        topology.daemon_section() + &service(&topology, "web", "tcp", v4, (1, 8080), "", &health);
    topology.daemon(&topology.config("sluice.toml", &text));
    let line = format!("nobody web b1 {}:8080", topology.v4("b1"));
    wait_for(&topology, "web", "down", &format!("L7STS exit 1: {line}"));
    fs::write(file("good"), "").expect("a file in our own directory");
    wait_for(&topology, "web", "up", &format!("L7OK {line}"));

    fs::write(file("hang"), "").expect("a file in our own directory");
    wait_for(&topology, "web", "down", "L7TOUT killed after 500ms");
    let numbers = fs::read_to_string(file("pids")).expect("the script wrote it");
    fs::remove_file(file("hang")).expect("it was there");
    wait_for(&topology, "web", "up", &format!("L7OK {line}"));
    for number in numbers.split_whitespace() {
        wait_until(&format!("process {number} to be gone"), || {
            fs::read(format!("/proc/{number}/cmdline")).map_or(true, |line| line.is_empty())
        });
    }
}
