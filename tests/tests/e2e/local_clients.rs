//! Clients on the balancer's own host, as `docs/local-host.md` says.

use crate::support::{UdpEcho, get, service, vips, web, web_topology};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

const TWO: Options = Options {
    backends: 2,
    tx_offload: true,
    two_armed: false,
};

/// `address` as a socket of IPv6 names it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// One connection from a host, and whom the socket says it is connected to.
fn connect(net: &Topology, host: &str, to: SocketAddr) -> io::Result<SocketAddr> {
    net.on(host, move || {
        TcpStream::connect_timeout(&to, Duration::from_secs(5))?.peer_addr()
    })
}

/// What a host without a route says of a VIP that nobody put a backend in the place of.
#[track_caller]
fn is_left_alone(net: &Topology, host: &str, to: SocketAddr) {
    let error = connect(net, host, to).expect_err("nobody has this address");
    assert_eq!(
        error.kind(),
        io::ErrorKind::NetworkUnreachable,
        "{to} from {host}: {error}"
    );
}

/// Has the daemon read `text`.
#[track_caller]
fn reload(net: &Topology, daemon: u32, text: &str) {
    let reloads = || net.log("sluice").matches("configuration reloaded").count();
    let before = reloads();
    net.config("sluice.toml", text);
    net.signal(daemon, libc::SIGHUP);
    wait_until("the reload", || reloads() > before);
}

fn stop(net: &Topology) {
    assert_eq!(net.sluice(&["stop"]).code, 0);
    wait_until("the daemon to end", || net.sluice(&["status"]).code != 0);
}

#[test]
fn connections_are_spread_and_the_application_sees_the_vip() {
    for mode in ["nat", "dnat"] {
        let net = Topology::new(TWO);
        let _servers = ["b1", "b2"].map(|host| net.nginx(host));
        let text = web(&net, 2, "").replace("\"nat\"", &format!("\"{mode}\""));
        net.daemon(&net.config("sluice.toml", &text));
        net.wait_backends_up(None, 4);
        let [v4, v6] = vips(80);
        for vip in [v4, v6, mapped(v4)] {
            let mut answers: BTreeMap<String, u32> = BTreeMap::new();
            for _ in 0..6 {
                let answer = net.on("lb", move || get(vip, "/")).expect("an answer");
                *answers.entry(answer).or_default() += 1;
            }
            let even = BTreeMap::from([("b1\n".to_owned(), 3), ("b2\n".to_owned(), 3)]);
            assert_eq!(answers, even, "{mode}, {vip}: round robin");
            let peer = connect(&net, "lb", vip).expect("a connection");
            assert_eq!(peer, vip, "{mode}: whom the socket is connected to");
            let seen = net
                .on("lb", move || get(vip, "/client"))
                .expect("an answer");
            let own: IpAddr = match vip.ip().to_canonical() {
                IpAddr::V4(_) => net.v4("lb").into(),
                IpAddr::V6(_) => net.v6("lb").into(),
            };
            assert_eq!(seen.trim(), own.to_string(), "{mode}, {vip}: the client");
        }
        let services = net.json(&["stats"]);
        let lines = services.as_array().expect("a listing").iter();
        let services: Vec<_> = lines.filter(|s| s["backend"].is_null()).collect();
        let connections: Vec<_> = services.iter().map(|s| &s["connections_total"]).collect();
        // IPv4 was asked twice, by sockets of both families.
        assert_eq!(connections, [16, 8], "{mode}: {services:#?}");
        for service in services {
            assert_eq!(service["packets_in"], 0, "{mode}: they do not pass XDP");
            assert_eq!(service["drops"], 0, "{mode}");
        }
    }
}

#[test]
fn datagrams_of_a_socket_stay_with_a_backend_and_come_from_the_vip() {
    let net = Topology::new(TWO);
    let _servers = ["b1", "b2"].map(|host| UdpEcho::start(&net, host, 9000));
    let mut text = net.daemon_section();
    for (name, vip) in ["echo4", "echo6"].into_iter().zip(vips(7)) {
        text += &service(&net, name, "udp", vip, (2, 9000), "", "");
    }
    net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 4);
    let [v4, v6] = vips(7);
    let any4 = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let any6 = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    for (own, vip) in [(any4, v4), (any6, v6), (any6, mapped(v4))] {
        for connected in [false, true] {
            let mut hosts: Vec<String> = Vec::new();
            for _ in 0..2 {
                let answers = net.on("lb", move || {
                    let socket = UdpSocket::bind((own, 0)).expect("a socket");
                    let patience = Some(Duration::from_secs(10));
                    socket.set_read_timeout(patience).expect("a timeout");
                    if connected {
                        socket.connect(vip).expect("a backend");
                        assert_eq!(socket.peer_addr().expect("it is connected"), vip);
                    }
                    let mut buffer = [0; 64];
                    [b"one", b"two"].map(|word| {
                        let sent = match connected {
                            true => socket.send(word),
                            false => socket.send_to(word, vip),
                        };
                        sent.expect("it leaves");
                        let (n, from) = socket.recv_from(&mut buffer).expect("an answer");
                        assert_eq!(from, vip, "whom the answer comes from");
                        String::from_utf8_lossy(&buffer[..n]).into_owned()
                    })
                });
                let (host, word) = answers[0].split_once(' ').expect("host and datagram");
                assert_eq!(word, "one");
                assert_eq!(answers[1], format!("{host} two"), "the same backend");
                hosts.push(host.to_owned());
            }
            hosts.sort();
            assert_eq!(hosts, ["b1", "b2"], "{vip}, connected: {connected}");
        }
    }
}

#[test]
fn nothing_else_is_touched() {
    let (net, daemon) = web_topology(TWO, "");
    let [v4, v6] = vips(80);
    for vip in [v4, v6] {
        // Another namespace on the same host, in the same cgroup.
        is_left_alone(&net, "b1", vip);
        // A port and a protocol without a service.
        is_left_alone(&net, "lb", SocketAddr::new(vip.ip(), 81));
        let udp = net.on("lb", move || {
            let any: IpAddr = match vip {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).expect("a socket");
            socket.send_to(b"x", vip).map_err(|error| error.kind())
        });
        assert_eq!(udp, Err(io::ErrorKind::NetworkUnreachable), "{vip}");
    }
    // Whoever connects to a backend is told so.
    let backend = SocketAddr::new(net.v4("b1").into(), 8080);
    assert_eq!(connect(&net, "lb", backend).expect("nginx"), backend);
    // What comes in by the interface goes the way of packets.
    net.on("client", move || get(v4, "/")).expect("an answer");
    let services = net.json(&["stats"]);
    assert_ne!(services[0]["packets_in"], 0, "{services:#}");
    // In `dsr` a backend takes nothing that is not addressed to the VIP.
    let text = web(&net, 2, "").replace(
        "[[service]]\nname = \"web\"",
        "[[service]]\nname = \"direct\"\nlisten = \"203.0.113.81:80\"\nforward = \"dsr\"\n\
         [[service.backend]]\naddress = \"198.18.0.11\"\n[[service]]\nname = \"web\"",
    );
    reload(&net, daemon, &text);
    is_left_alone(&net, "lb", "203.0.113.81:80".parse().expect("an address"));
    assert_eq!(connect(&net, "lb", v4).expect("nat goes on"), v4);
}

#[test]
fn without_a_backend_the_connection_is_refused_at_once() {
    let net = Topology::new(TWO);
    let nobody = |name: &str, last: u8, policy: &str| {
        format!(
            "[[service]]\nname = \"{name}\"\nlisten = \"203.0.113.{last}:80\"\n\
             on_no_backend = \"{policy}\"\n"
        )
    };
    let text = net.daemon_section()
        + &nobody("resets", 81, "reset")
        + &nobody("drops", 82, "drop")
        + &nobody("passes", 83, "pass");
    net.daemon(&net.config("sluice.toml", &text));
    for (last, expected) in [
        (81, io::ErrorKind::ConnectionRefused),
        (82, io::ErrorKind::ConnectionRefused),
        (83, io::ErrorKind::NetworkUnreachable),
    ] {
        let to = SocketAddr::new(Ipv4Addr::new(203, 0, 113, last).into(), 80);
        let error = connect(&net, "lb", to).expect_err("there is no backend");
        assert_eq!(error.kind(), expected, "{to}: {error}");
    }
    let drops = net.json(&["stats", "--drops"]);
    let counted = drops.as_array().expect("a listing").iter();
    let counted: Vec<_> = counted
        .filter(|drop| drop["packets"] != 0)
        .map(|drop| (drop["reason"].as_str(), drop["packets"].as_u64()))
        .collect();
    assert_eq!(counted, [(Some("no_backend"), Some(2))], "{drops:#}");
}

#[test]
fn backends_that_die_are_left_out() {
    let net = Topology::new(TWO);
    let servers = ["b1", "b2"].map(|host| net.nginx(host));
    net.daemon(&net.config("sluice.toml", &web(&net, 2, "")));
    net.wait_backends_up(None, 4);
    let vip = vips(80)[0];
    net.kill(servers[0]);
    net.wait_backends_up(None, 2);
    for _ in 0..4 {
        let answer = net.on("lb", move || get(vip, "/")).expect("an answer");
        assert_eq!(answer, "b2\n");
    }
}

#[test]
fn the_programs_outlive_the_daemon_until_they_are_detached() {
    let (net, _) = web_topology(TWO, "");
    let vip = vips(80)[0];
    let log = net.log("sluice");
    assert!(log.contains("programs attached to cgroup"), "{log}");
    let held = net.on("lb", move || TcpStream::connect(vip).expect("a connection"));
    stop(&net);
    assert_eq!(connect(&net, "lb", vip).expect("it runs on"), vip);
    let daemon = net.daemon(&net.dir().join("sluice.toml"));
    net.wait_backends_up(None, 4);
    let attached = net.log("sluice").matches("programs attached").count();
    assert_eq!(attached, 1, "the second daemon took them over");
    assert_eq!(connect(&net, "lb", vip).expect("and on"), vip);
    assert_eq!(held.peer_addr().expect("it is connected"), vip);

    let off = web(&net, 2, "").replace("[daemon]\n", "[daemon]\nlocal_clients = false\n");
    reload(&net, daemon, &off);
    is_left_alone(&net, "lb", vip);
    reload(&net, daemon, &web(&net, 2, ""));
    assert_eq!(connect(&net, "lb", vip).expect("on again"), vip);

    stop(&net);
    let dir = net.pin_path().display().to_string();
    let ran = net.sluice(&["detach", "--pin-path", &dir]);
    let said = ran.report();
    assert!(ran.ok().contains("cgroup link at connect4"), "{said}");
    is_left_alone(&net, "lb", vip);
}

#[test]
fn what_is_asked_for_and_cannot_be_had_is_refused() {
    let net = Topology::new(Options { backends: 1, ..TWO });
    let text = web(&net, 1, "").replace("[daemon]\n", "[daemon]\ncgroup = \"/tmp\"\n");
    let pid = net.start_daemon("sluice", &net.config("sluice.toml", &text));
    assert_eq!(net.wait_exit(pid), 1);
    let log = net.log("sluice");
    assert!(
        log.contains("cgroup /tmp is not in a cgroup2 file system"),
        "{log}"
    );
    assert!(!net.pin_path().exists(), "nothing is left behind");
}
