//! Servers on the balancer's own host, set up as `docs/local-host.md` says.

use crate::support::{QUICK_HEALTH, vips};
use sluice_tests::topology::{Options, Topology, url, wait_until};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A network whose balancer is its own worker, and where its servers listen.
fn serve(mode: &str, tx_offload: bool) -> (Topology, [Vec<SocketAddr>; 2]) {
    let net = Topology::new(Options {
        backends: 1,
        tx_offload,
        ..Options::default()
    });
    let (own4, own6): (IpAddr, IpAddr) = (net.v4("lb").into(), net.v6("lb").into());
    let loopback = Ipv4Addr::LOCALHOST.into();
    let at = |ip, port| SocketAddr::new(ip, port);
    let servers = [
        vec![at(loopback, 3001), at(loopback, 3002), at(own4, 3003)],
        vec![at(own6, 3004), at(own6, 3005)],
    ];
    let dir = net.dir().join("lb-nginx");
    let www = net.www("lb");
    for dir in [&dir, &www] {
        fs::create_dir_all(dir).expect("a directory of our own");
    }
    let mut text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {0}/pid;\nerror_log {0}/error.log;\n\
         events {{ worker_connections 1024; }}\nhttp {{\n access_log off;\n\
         client_body_temp_path {0}/body;\n proxy_temp_path {0}/proxy;\n\
         fastcgi_temp_path {0}/fastcgi;\n uwsgi_temp_path {0}/uwsgi;\n scgi_temp_path {0}/scgi;\n",
        dir.display()
    );
    for address in servers.iter().flatten() {
        let _ = write!(
            text,
            "server {{\n listen {address};\n root {};\n\
             location = / {{ return 200 \"{address}\"; }}\n\
             location /health {{ return 200 ok; }}\n\
             location = /client {{ return 200 \"$remote_addr\"; }}\n }}\n",
            www.display()
        );
    }
    text.push_str("}\n");
    let conf = net.config("lb-nginx.conf", &text);
    let mut command = net.command("lb", "nginx");
    command.arg("-c").arg(conf);
    let pid = net.spawn("nginx-lb", command);
    wait_until("nginx to answer", || {
        assert_eq!(net.exit_code(pid), None, "{}", net.log("nginx-lb"));
        net.curl("lb", &["http://127.0.0.1:3001/health"]).code == 0
    });
    let mut text = net.daemon_section();
    for (listen, backends) in vips(80).into_iter().zip(&servers) {
        let _ = write!(
            text,
            "[[service]]\nname = \"{}\"\nlisten = \"{listen}\"\nforward = \"{mode}\"\n\
             scheduler = \"round-robin\"\n{QUICK_HEALTH}",
            if listen.is_ipv4() { "web4" } else { "web6" }
        );
        for address in backends {
            let _ = write!(text, "[[service.backend]]\naddress = \"{address}\"\n");
        }
    }
    net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 5);
    (net, servers)
}

fn answers_alternate(net: &Topology, servers: &[Vec<SocketAddr>; 2]) {
    let clients: [IpAddr; 2] = [net.v4("client").into(), net.v6("client").into()];
    for ((vip, backends), client) in vips(80).into_iter().zip(servers).zip(clients) {
        let mut answers: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..3 * backends.len() {
            let page = url(vip.ip(), vip.port(), "/");
            *answers
                .entry(net.curl("client", &[&page]).ok())
                .or_default() += 1;
        }
        let expected: BTreeMap<_, _> = backends.iter().map(|a| (a.to_string(), 3)).collect();
        assert_eq!(answers, expected, "{vip}: round robin");
        for _ in backends {
            let page = url(vip.ip(), vip.port(), "/client");
            let seen = net.curl("client", &[&page]).ok();
            assert_eq!(seen, client.to_string(), "{vip}: whom the server sees");
        }
    }
}

fn bodies_arrive_whole(net: &Topology, servers: &[Vec<SocketAddr>; 2]) {
    let sent: Vec<u8> = (0..8_u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(net.www("lb").join("big"), &sent).expect("a file of our own");
    let got = net.dir().join("got");
    for (vip, backends) in vips(80).into_iter().zip(servers) {
        for _ in backends {
            let page = url(vip.ip(), vip.port(), "/big");
            let target = got.to_str().expect("UTF-8");
            net.curl("client", &["-o", target, &page]).ok();
            let got = fs::read(&got).expect("curl has written it");
            assert!(got == sent, "{vip}: {} bytes, or damaged", got.len());
        }
    }
}

#[test]
fn servers_on_the_balancer_are_balanced() {
    for (mode, tx_offload) in [("nat", true), ("dnat", false)] {
        let (net, servers) = serve(mode, tx_offload);
        answers_alternate(&net, &servers);
        bodies_arrive_whole(&net, &servers);
        let flows = net.json(&["conn", "list"]);
        let flows = flows.as_array().expect("a listing");
        assert!(!flows.is_empty());
        for flow in flows {
            assert_eq!(flow["state"], "TIME_WAIT", "{mode}: both ends seen: {flow}");
        }
        for line in net.json(&["stats"]).as_array().expect("a listing") {
            assert_eq!(line["drops"], 0, "{mode}: {line:#}");
            assert_ne!(line["packets_out"], 0, "{mode}: {line:#}");
        }
    }
}

#[test]
fn a_restarted_daemon_takes_the_egress_program_over_and_detach_removes_it() {
    let (net, servers) = serve("nat", true);
    let pin = net.pin_path().join("egress_eth0");
    let stop = || {
        assert_eq!(net.sluice(&["stop"]).code, 0);
        wait_until("the daemon to end", || net.sluice(&["status"]).code != 0);
    };
    let page = url(vips(80)[0].ip(), 80, "/");
    stop();
    assert!(pin.exists(), "it stays in the kernel");
    net.curl("client", &[&page]).ok();
    net.daemon(&net.dir().join("sluice.toml"));
    net.wait_backends_up(None, 5);
    answers_alternate(&net, &servers);
    stop();
    let dir = net.pin_path().display().to_string();
    let ran = net.sluice(&["detach", "--pin-path", &dir]);
    assert_eq!(ran.code, 0, "{}", ran.report());
    assert!(
        ran.stdout.contains("egress link on eth0"),
        "{}",
        ran.report()
    );
    assert!(!pin.exists());
}

#[test]
fn nobody_reaches_the_loopback_address_from_outside() {
    let (net, _) = serve("nat", true);
    let balancer = net.v4("lb").to_string();
    // The client's own 127.0.0.1 is in the way.
    for args in [
        ["route", "del", "local", "127.0.0.1", "table", "local"].as_slice(),
        &["route", "del", "local", "127.0.0.0/8", "table", "local"],
        &["route", "add", "127.0.0.0/8", "via", &balancer],
    ] {
        net.run("client", "ip", args).ok();
    }
    let setting = "net.ipv4.conf.eth0.route_localnet=1";
    net.run("client", "sysctl", &["-w", setting]).ok();
    let from = net.v4("client").to_string();
    let page = "http://127.0.0.1:3001/";
    let ran = net.curl("client", &["--interface", &from, "-m", "2", page]);
    assert_ne!(ran.code, 0, "{}", ran.report());
    let drops = net.json(&["stats", "--drops"]);
    let counted = drops.as_array().expect("a listing").iter();
    let counted: Vec<_> = counted.filter(|d| d["reason"] == "martian").collect();
    assert!(
        counted.len() == 1 && counted[0]["packets"].as_u64() > Some(0),
        "the packets came, and were dropped: {drops:#}"
    );
}

const LENGTHS: [usize; 4] = [0, 1, 511, 1400];

#[test]
fn datagrams_are_answered_by_the_vip() {
    let net = Topology::new(Options {
        backends: 1,
        ..Options::default()
    });
    let backends = [
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9000),
        SocketAddr::new(net.v6("lb").into(), 9000),
    ];
    let stop = Arc::new(AtomicBool::new(false));
    let servers = backends.map(|address| {
        let socket = net.on("lb", move || UdpSocket::bind(address).expect("a socket"));
        let pause = Some(Duration::from_millis(50));
        socket.set_read_timeout(pause).expect("a timeout");
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((got, client)) = socket.recv_from(&mut buffer) {
                    socket.send_to(&buffer[..got], client).expect("it leaves");
                }
            }
        })
    });
    let mut text = net.daemon_section();
    for (listen, backend) in vips(7).into_iter().zip(backends) {
        let _ = write!(
            text,
            "[[service]]\nname = \"echo{}\"\nlisten = \"{listen}\"\nprotocol = \"udp\"\n\
             [[service.backend]]\naddress = \"{backend}\"\n",
            if listen.is_ipv4() { 4 } else { 6 }
        );
    }
    net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 2);
    for (vip, own) in vips(7).into_iter().zip([
        IpAddr::from(net.v4("client")),
        IpAddr::from(net.v6("client")),
    ]) {
        net.on("client", move || {
            let socket = UdpSocket::bind((own, 20000)).expect("a socket");
            // Takes datagrams of the VIP only.
            socket.connect(vip).expect("a route to the VIP");
            let patience = Some(Duration::from_secs(1));
            socket.set_read_timeout(patience).expect("a timeout");
            for len in LENGTHS {
                let sent: Vec<u8> = (0..len).map(|i| i as u8).collect();
                // One may get lost, as anywhere; an answer that is late is to an earlier one.
                wait_until(&format!("the echo of {len} bytes by {vip}"), || {
                    socket.send(&sent).expect("the datagram leaves");
                    let mut buffer = [0; 2048];
                    let got = socket.recv(&mut buffer);
                    got.is_ok_and(|got| buffer[..got] == sent)
                });
            }
        });
    }
    stop.store(true, Ordering::Relaxed);
    for server in servers {
        server.join().expect("it ends");
    }
}
