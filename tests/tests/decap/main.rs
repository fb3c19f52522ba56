//! `sluice decap` with real connections: a client whose packets reach the backend encapsulated, and
//! a backend that answers it directly.

mod balanced;
mod client;

use client::{Encapsulation, encapsulate};
use sluice::dataplane::attach_stub;
use sluice_tests::{
    packet::Family,
    topology::{Options, Ran, Topology, VIP4, VIP6, finish, sluice_bin, url, wait_until},
};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::Duration,
};

const BACKEND: &str = "b1";
const MIB: usize = 1 << 20;

fn vip(family: Family) -> IpAddr {
    match family {
        Family::V4 => VIP4.into(),
        Family::V6 => VIP6.into(),
    }
}

fn hold_vips(net: &Topology) {
    for vip in [VIP4.to_string() + "/32", VIP6.to_string() + "/128"] {
        net.run(BACKEND, "ip", &["addr", "add", &vip, "dev", "lo"])
            .ok();
    }
}

/// Runs `sluice decap` on the backend to its end.
#[track_caller]
fn decap(net: &Topology, args: &[&str]) -> Ran {
    let mut command = net.command(BACKEND, sluice_bin());
    command
        .args(["decap", "--pin-path"])
        .arg(net.pin_path())
        .args(args);
    finish(&mut command)
}

#[track_caller]
fn status(net: &Topology) -> serde_json::Value {
    let text = decap(net, &["eth0", "--status", "-o", "json"]).ok();
    serde_json::from_str(&text).expect("status is JSON")
}

fn packets(net: &Topology, outcome: &str) -> u64 {
    let status = status(net);
    let counters = status["counters"].as_array().expect("counters");
    let counter = counters.iter().find(|c| c["outcome"] == outcome);
    counter.expect(outcome)["packets"]
        .as_u64()
        .expect("a number")
}

fn has_xdp(net: &Topology, host: &str) -> bool {
    let text = net.run(host, "ip", &["link", "show", "eth0"]).ok();
    text.contains("xdp")
}

/// Starts `sluice decap` in the foreground on a host and waits until it is attached.
fn start(net: &Topology, host: &str, args: &[&str]) -> u32 {
    let label = format!("decap-{host}");
    let mut command = net.command(host, sluice_bin());
    command
        .args(["decap", "eth0", "--pin-path"])
        .arg(net.pin_path())
        .args(args);
    let pid = net.spawn(&label, command);
    wait_until("decap to be attached", || {
        assert_eq!(net.exit_code(pid), None, "{}", net.log(&label));
        has_xdp(net, host)
    });
    pid
}

/// One connection that shows who the server takes the client for.
fn peer_seen_by_backend(net: &Topology, vip: IpAddr) -> IpAddr {
    let address = SocketAddr::new(vip, 9000);
    let (sender, listening) = std::sync::mpsc::channel();
    let server = net.background(BACKEND, move || {
        let listener = TcpListener::bind(address).expect("the backend holds the VIP");
        sender.send(()).expect("the test waits");
        let (mut stream, peer) = listener.accept().expect("a connection");
        stream.write_all(b"hello").expect("the client listens");
        peer.ip()
    });
    listening.recv().expect("the server listens");
    net.on("client", move || {
        let mut stream =
            TcpStream::connect_timeout(&address, Duration::from_secs(10)).expect("a connection");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        assert_eq!(text, "hello");
    });
    server.join().expect("the server ends")
}

/// Bodies up and down, whole.
fn transfer(net: &Topology, vip: IpAddr) {
    let name = vip.to_string().replace(':', "-");
    let body = |len: usize| -> Vec<u8> { (0..len).map(|i| (i * 7 + i / 4096) as u8).collect() };
    let sent = body(3 * MIB);
    let file = net.dir().join("body");
    fs::write(&file, &sent).expect("a file in our own directory");
    let file = file.display().to_string();
    let target = url(vip, 8080, &format!("/upload/{name}"));
    net.curl("client", &["--upload-file", &file, &target]).ok();
    let stored = ["b1", "b2"].map(|host| fs::read(net.www(host).join("upload").join(&name)).ok());
    let stored = stored.into_iter().flatten().next();
    assert!(
        stored.expect("one backend stored it") == sent,
        "{vip}: the body arrived damaged"
    );
    let large = body(8 * MIB);
    for host in ["b1", "b2"] {
        let _ = fs::create_dir(net.www(host));
        fs::write(net.www(host).join("large"), &large).expect("a file in our own directory");
    }
    let down = net.dir().join("down").display().to_string();
    let target = url(vip, 8080, "/large");
    net.curl("client", &["-o", &down, &target]).ok();
    let got = fs::read(&down).expect("curl wrote it");
    assert!(got == large, "{vip}: the body came back damaged");
}

/// The client's own address.
fn client_address(net: &Topology, vip: IpAddr) -> IpAddr {
    match vip {
        IpAddr::V4(_) => net.v4("client").into(),
        IpAddr::V6(_) => net.v6("client").into(),
    }
}

fn topology(tx_offload: bool) -> Topology {
    Topology::new(Options {
        backends: 1,
        tx_offload,
        ..Options::default()
    })
}

/// A whole conversation in each inner family, through `outer`.
fn converse(outer: Family, how: Encapsulation, partial: bool, mode: &str) {
    let net = topology(partial);
    hold_vips(&net);
    net.nginx(BACKEND);
    let to: IpAddr = match outer {
        Family::V4 => net.v4(BACKEND).into(),
        Family::V6 => net.v6(BACKEND).into(),
    };
    encapsulate(&net, to, how, partial);
    let mut args = vec!["--mode", mode];
    let port = match how {
        Encapsulation::Gue(port) => port.to_string(),
        Encapsulation::Ipip => "6080".to_owned(),
    };
    args.extend(["--port", &port]);
    start(&net, BACKEND, &args);
    assert_eq!(status(&net)["mode"], mode);
    for inner in Family::BOTH {
        let vip = vip(inner);
        transfer(&net, vip);
        assert_eq!(peer_seen_by_backend(&net, vip), client_address(&net, vip));
    }
    let (used, unused) = match how {
        Encapsulation::Ipip => ("ipip", "gue"),
        Encapsulation::Gue(_) => ("gue", "ipip"),
    };
    // 3 MiB in each family in segments of less than 1400 bytes.
    assert!(packets(&net, used) > 4400, "{}", status(&net));
    for nothing in [unused, "malformed", "unsupported", "congestion"] {
        assert_eq!(packets(&net, nothing), 0, "{nothing}: {}", status(&net));
    }
}

#[test]
fn ipip_over_ipv4_with_partial_checksums() {
    converse(Family::V4, Encapsulation::Ipip, true, "driver");
}

#[test]
fn ipip_over_ipv4_with_finished_checksums() {
    converse(Family::V4, Encapsulation::Ipip, false, "driver");
}

#[test]
fn ipip_over_ipv6_with_partial_checksums() {
    converse(Family::V6, Encapsulation::Ipip, true, "driver");
}

#[test]
fn ipip_in_generic_mode() {
    converse(Family::V4, Encapsulation::Ipip, true, "generic");
}

#[test]
fn gue_over_ipv4_with_partial_checksums() {
    converse(Family::V4, Encapsulation::Gue(6080), true, "driver");
}

#[test]
fn gue_over_ipv6_on_another_port() {
    converse(Family::V6, Encapsulation::Gue(5555), false, "driver");
}

#[test]
fn gue_in_generic_mode() {
    converse(Family::V6, Encapsulation::Gue(6080), true, "generic");
}

#[test]
fn the_foreground_follows_addresses_and_detaches() {
    let net = topology(true);
    net.nginx(BACKEND);
    encapsulate(&net, net.v4(BACKEND).into(), Encapsulation::Ipip, true);
    let pid = start(&net, BACKEND, &[]);
    let own: Vec<String> = [net.v4(BACKEND).to_string(), net.v6(BACKEND).to_string()].into();
    let vips = || -> Vec<String> {
        let status = status(&net);
        let vips = status["vips"].as_array().expect("VIPs").iter();
        vips.map(|v| v.as_str().expect("an address").to_owned())
            .collect()
    };
    assert_eq!(vips(), own);
    assert_eq!(status(&net)["background"], false);

    hold_vips(&net);
    wait_until("the VIPs to be taken", || vips().len() == 4);
    let page = url(VIP4, 8080, "/");
    assert_eq!(net.curl("client", &[&page]).ok(), "b1\n");
    let text = decap(&net, &["eth0", "--status"]).ok();
    assert!(text.contains("arp_ignore=1"), "{text}");
    assert!(text.contains("arp_announce=2"), "{text}");
    for (key, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        let setting = format!("net.ipv4.conf.all.{key}={value}");
        net.run(BACKEND, "sysctl", &["-w", &setting]).ok();
    }
    let text = decap(&net, &["eth0", "--status"]).ok();
    assert!(!text.contains("Warning"), "{text}");

    let second = decap(&net, &["eth0"]);
    assert_eq!(second.code, 1, "{}", second.report());
    assert!(
        second.stderr.contains("runs there already"),
        "{}",
        second.report()
    );

    let vip = VIP4.to_string() + "/32";
    net.run(BACKEND, "ip", &["addr", "del", &vip, "dev", "lo"])
        .ok();
    wait_until("the VIP to be given up", || vips().len() == 3);

    net.signal(pid, libc::SIGTERM);
    assert_eq!(net.wait_exit(pid), 0, "{}", net.log("decap-b1"));
    assert!(!has_xdp(&net, BACKEND), "the program is still attached");
    assert!(!net.pin_path().exists(), "a pin was left");
    let gone = decap(&net, &["eth0", "--status"]);
    assert_eq!(gone.code, 1, "{}", gone.report());
    assert!(
        gone.stderr.contains("no decapsulation runs there"),
        "{}",
        gone.report()
    );
}

#[test]
fn the_background_needs_no_process() {
    let net = topology(true);
    hold_vips(&net);
    net.nginx(BACKEND);
    encapsulate(&net, net.v4(BACKEND).into(), Encapsulation::Ipip, true);
    let page = url(VIP4, 8080, "/");
    let refused = net.run("client", "curl", &["-sS", "--max-time", "1", &page]);
    assert_ne!(refused.code, 0, "nothing takes the encapsulation off yet");

    let vip = VIP4.to_string();
    decap(&net, &["eth0", "--background", "--vip", &vip]).ok();
    assert_eq!(net.curl("client", &[&page]).ok(), "b1\n");
    let first = status(&net);
    assert_eq!(first["background"], true);
    assert_eq!(first["vips"], serde_json::json!([vip]));
    assert_eq!(packets(&net, "not_vip"), 0);

    // Once more takes the place of the first, with what is asked for now, in the other mode as well.
    decap(&net, &["eth0", "--background", "--port", "7000"]).ok();
    assert_eq!(net.curl("client", &[&page]).ok(), "b1\n");
    assert_eq!(status(&net)["port"], 7000);
    decap(&net, &["eth0", "--background", "--mode", "generic"]).ok();
    assert_eq!(net.curl("client", &[&page]).ok(), "b1\n");
    assert_eq!(status(&net)["mode"], "generic");

    // A process may take over, and then it ends with the process.
    let mut command = net.command(BACKEND, sluice_bin());
    command
        .args(["decap", "eth0", "--pin-path"])
        .arg(net.pin_path());
    let pid = net.spawn("decap-b1", command);
    wait_until("the process to take over", || {
        let ran = decap(&net, &["eth0", "--status", "-o", "json"]);
        ran.stdout.contains("\"background\": false")
    });
    assert_eq!(net.curl("client", &[&page]).ok(), "b1\n");
    net.kill(pid);
    assert!(!has_xdp(&net, BACKEND), "the program outlived its process");

    decap(&net, &["eth0", "--background"]).ok();
    let text = decap(&net, &["eth0", "--detach"]).ok();
    assert_eq!(text, "detached from eth0\n");
    assert!(!has_xdp(&net, BACKEND), "the program is still attached");
    assert!(!net.pin_path().exists(), "a pin was left");
    let text = decap(&net, &["eth0", "--detach"]).ok();
    assert_eq!(text, "nothing to detach from eth0\n");
}

#[test]
fn a_process_whose_program_was_taken_off_ends() {
    let net = topology(true);
    let pid = start(&net, BACKEND, &[]);
    decap(&net, &["eth0", "--detach"]).ok();
    assert_eq!(net.wait_exit(pid), 1);
    assert!(
        net.log("decap-b1").contains("took decapsulation off"),
        "{}",
        net.log("decap-b1")
    );
}

#[test]
fn refusals_name_the_object_and_the_remedy() {
    let net = topology(true);
    let check = |ran: Ran, code: i32, words: &[&str]| {
        assert_eq!(ran.code, code, "{}", ran.report());
        for word in words {
            assert!(ran.stderr.contains(word), "{word}: {}", ran.report());
        }
        if code == 1 {
            assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.report());
        }
    };
    check(
        decap(&net, &["eth7"]),
        1,
        &["interface eth7: no such interface"],
    );
    check(
        decap(&net, &["eth7", "--status"]),
        1,
        &["interface eth7: no such interface"],
    );
    check(
        decap(&net, &["eth7", "--detach"]),
        1,
        &["interface eth7: no such interface"],
    );
    check(decap(&net, &["eth0", "--vip", "::1"]), 1, &["--vip ::1: "]);
    check(decap(&net, &["eth0", "--vip", "web"]), 2, &["--vip"]);
    check(decap(&net, &["eth0", "--port", "0"]), 2, &["--port"]);
    check(
        decap(&net, &["eth0", "--detach", "--status"]),
        2,
        &["--detach"],
    );
    check(
        decap(&net, &["eth0", "--background", "--vip", "127.0.0.1"]),
        1,
        &["--vip 127.0.0.1: "],
    );
    let _stub = net.on(BACKEND, || attach_stub("eth0").expect("a stub program"));
    check(
        decap(&net, &["eth0", "--background"]),
        1,
        &["interface eth0: XDP program", "(stub_pass)", "takes it off"],
    );
    check(
        decap(&net, &["eth0", "--status"]),
        1,
        &["no decapsulation runs there"],
    );
    assert_eq!(
        decap(&net, &["eth0", "--detach"]).ok(),
        "nothing to detach from eth0\n"
    );
    assert!(has_xdp(&net, BACKEND), "the stub is somebody else's");
    if Path::new("/usr/bin/setpriv").exists() {
        let mut command = net.command(BACKEND, "setpriv");
        command
            .args(["--inh-caps=-all", "--bounding-set=-all"])
            .arg(sluice_bin())
            .args(["decap", "eth0"]);
        check(finish(&mut command), 1, &["CAP_BPF", "run as root"]);
    }
}
