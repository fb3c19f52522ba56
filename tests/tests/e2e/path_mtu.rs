//! Links that are narrower than those of the balancer, before it and behind it, and packets that
//! do not travel in one piece or do not travel far enough.

use crate::{
    modes::noise,
    support::{QUICK_HEALTH, UdpEcho, service, vips},
};
use sluice_tests::topology::{Options, Topology, url, wait_until};
use std::{
    fmt::Write as _,
    fs, io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

/// ```text
/// client ─ b2 ═ b1 ─┬─ b3 ═ b4 ─ b5
///                   lb
/// ```
/// The hosts in the middle are routers, the links between two of them may be narrow, and the
/// server is the last one.
const LINKS: [(&str, &str, u8); 4] = [
    ("client", "b2", 1),
    ("b2", "b1", 2),
    ("b3", "b4", 3),
    ("b4", "b5", 4),
];
const SERVER: &str = "b5";

fn address4(link: u8, end: u8) -> String {
    format!("198.19.{link}.{end}")
}

fn address6(link: u8, end: u8) -> String {
    format!("2001:db8:19{link}::{end}")
}

fn ip(net: &Topology, host: &str, line: &str) {
    let args: Vec<&str> = line.split(' ').collect();
    net.run(host, "ip", &args).ok();
}

/// Narrowest packets: of the client's side, of the server's side, and of the balancer's route.
#[derive(Clone, Copy, Debug)]
struct Narrow {
    client: u16,
    server: u16,
    route: u16,
}

fn build(narrow: Narrow) -> Topology {
    let net = Topology::new(Options {
        backends: 5,
        ..Options::default()
    });
    for host in ["client", "b2", "b4", SERVER] {
        ip(&net, host, "link set eth0 down");
    }
    for (left, right, n) in LINKS {
        let peer = net.namespace(right);
        let line = format!("link add right type veth peer name left netns {peer}");
        ip(&net, left, &line);
        let mtu = match n {
            2 => narrow.client,
            3 => narrow.server,
            _ => 1500,
        };
        for (host, name, end) in [(left, "right", 1), (right, "left", 2)] {
            ip(&net, host, &format!("link set {name} mtu {mtu} up"));
            let (v4, v6) = (address4(n, end), address6(n, end));
            ip(&net, host, &format!("addr add {v4}/24 dev {name}"));
            ip(&net, host, &format!("addr add {v6}/64 dev {name} nodad"));
        }
    }
    for host in ["b1", "b2", "b3", "b4"] {
        for setting in ["ipv4.ip_forward=1", "ipv6.conf.all.forwarding=1"] {
            let setting = format!("net.{setting}");
            net.run(host, "sysctl", &["-w", &setting]).ok();
        }
    }
    // A server that believes no source it has no route to.
    net.run(SERVER, "sysctl", &["-w", "net.ipv4.conf.all.rp_filter=1"])
        .ok();
    for (host, link, end) in [("client", 1, 2), ("b2", 2, 2), ("b4", 3, 1), (SERVER, 4, 1)] {
        for gateway in [address4(link, end), address6(link, end)] {
            ip(&net, host, &format!("route add default via {gateway}"));
        }
    }
    let mut routes: Vec<(&str, String, String)> = ["203.0.113.0/24", "2001:db8:80::/64"]
        .map(|vips| ("b1", vips.to_owned(), "dev eth0".to_owned()))
        .into();
    for (host, link, via4, via6) in [
        ("b1", 1, address4(2, 1), address6(2, 1)),
        ("b3", 4, address4(3, 2), address6(3, 2)),
        ("lb", 4, net.v4("b3").to_string(), net.v6("b3").to_string()),
    ] {
        let mtu = match host {
            "lb" => format!(" mtu {}", narrow.route),
            _ => String::new(),
        };
        let net4 = format!("198.19.{link}.0/24");
        let net6 = format!("2001:db8:19{link}::/64");
        routes.push((host, net4, format!("via {via4}{mtu}")));
        routes.push((host, net6, format!("via {via6}{mtu}")));
    }
    for (host, to, how) in routes {
        ip(&net, host, &format!("route add {to} {how}"));
    }
    net.nginx(SERVER);
    let mut config = net.daemon_section();
    let servers = [address4(4, 2), format!("[{}]", address6(4, 2))];
    for (n, (vip, server)) in vips(80).iter().zip(servers).enumerate() {
        let _ = write!(
            config,
            "[[service]]\nname = \"far{n}\"\nlisten = \"{vip}\"\nforward = \"nat\"\n\
             {QUICK_HEALTH}[[service.backend]]\naddress = \"{server}:8080\"\n"
        );
    }
    net.daemon(&net.config("sluice.toml", &config));
    net.wait_backends_up(None, 2);
    net
}

/// What a host has learned of the path to `to`.
fn path_mtu(net: &Topology, host: &str, to: IpAddr) -> Option<u16> {
    let route = net.run(host, "ip", &["route", "get", &to.to_string()]).ok();
    let (_, rest) = route.split_once(" mtu ")?;
    rest.split_whitespace().next()?.parse().ok()
}

const MIB: usize = 1 << 20;

fn upload(net: &Topology, vip: SocketAddr) {
    let (sent, body) = (net.dir().join("sent"), noise(8 * MIB));
    fs::write(&sent, &body).expect("a file of our own");
    let page = url(vip.ip(), vip.port(), "/upload/it");
    let source = sent.to_str().expect("UTF-8");
    net.curl("client", &["-T", source, &page]).ok();
    let stored = fs::read(net.www(SERVER).join("upload/it")).expect("it was stored");
    assert!(
        stored == body,
        "to {vip}: {} bytes, or damaged",
        stored.len()
    );
    fs::remove_file(net.www(SERVER).join("upload/it")).expect("it was stored");
}

fn download(net: &Topology, vip: SocketAddr) {
    let (got, body) = (net.dir().join("got"), noise(8 * MIB));
    fs::write(net.www(SERVER).join("big"), &body).expect("a file of our own");
    let page = url(vip.ip(), vip.port(), "/big");
    let target = got.to_str().expect("UTF-8");
    net.curl("client", &["-o", target, &page]).ok();
    let got = fs::read(&got).expect("curl has written it");
    assert!(got == body, "from {vip}: {} bytes, or damaged", got.len());
}

/// The server's packets are too large for a link behind the router on the client's side: its
/// error goes to the VIP, and must come to the server.
#[test]
fn a_server_learns_of_a_narrow_link_at_its_client() {
    let net = build(Narrow {
        client: 1400,
        server: 1500,
        route: 1500,
    });
    // In this order: what a host has learned becomes the MSS it announces.
    for vip in vips(80) {
        download(&net, vip);
        upload(&net, vip);
    }
    for balancer in [IpAddr::from(net.v4("lb")), IpAddr::from(net.v6("lb"))] {
        let learned = path_mtu(&net, SERVER, balancer);
        assert_eq!(learned, Some(1400), "what the server knows of {balancer}");
    }
}

/// The client's packets are too large for a link at the server: the error goes to the balancer's
/// address, and must come to the client.
#[test]
fn a_client_learns_of_a_narrow_link_at_its_server() {
    let net = build(Narrow {
        client: 1400,
        server: 1300,
        route: 1500,
    });
    for vip in vips(80) {
        upload(&net, vip);
        download(&net, vip);
    }
    for vip in vips(80) {
        let learned = path_mtu(&net, "client", vip.ip());
        assert_eq!(learned, Some(1300), "what the client knows of {vip}");
    }
}

/// The balancer knows of a narrow way itself and says so.
#[test]
fn a_client_learns_of_the_mtu_of_the_balancers_route() {
    let net = build(Narrow {
        client: 1500,
        server: 1500,
        route: 1350,
    });
    for vip in vips(80) {
        upload(&net, vip);
        download(&net, vip);
    }
    for vip in vips(80) {
        let learned = path_mtu(&net, "client", vip.ip());
        assert_eq!(learned, Some(1350), "what the client knows of {vip}");
    }
    let drops = net.json(&["stats", "--drops"]).to_string();
    assert!(drops.contains("too_big"), "{drops}");
}

fn echo(options: Options) -> (Topology, Vec<UdpEcho>) {
    let net = Topology::new(options);
    let mut config = net.daemon_section();
    for (n, vip) in vips(5300).into_iter().enumerate() {
        let name = format!("echo{n}");
        let health = "[service.health]\ntype = \"none\"\n";
        config += &service(&net, &name, "udp", vip, (2, 5301), "", health);
    }
    let echoes = ["b1", "b2"]
        .iter()
        .map(|host| UdpEcho::start(&net, host, 5301))
        .collect();
    net.daemon(&net.config("sluice.toml", &config));
    for vip in vips(5300) {
        wait_until("both servers to answer", || {
            net.on("client", move || {
                (0..2).all(|_| {
                    let socket = client_of(vip);
                    let answer = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 16]));
                    answer.is_ok()
                })
            })
        });
    }
    (net, echoes)
}

fn client_of(vip: SocketAddr) -> UdpSocket {
    let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).expect("a socket");
    let patience = Some(Duration::from_secs(10));
    socket.set_read_timeout(patience).expect("a timeout");
    socket.connect(vip).expect("a route");
    socket
}

#[test]
fn datagrams_in_pieces_arrive_whole_both_ways() {
    for tx_offload in [true, false] {
        let options = Options {
            backends: 2,
            tx_offload,
            ..Options::default()
        };
        let (net, _echoes) = echo(options);
        for vip in vips(5300) {
            net.on("client", move || {
                for len in [1, 1472, 1473, 4000, 20_000, 60_000] {
                    let sent = noise(len);
                    // Each from a port of its own, so that both servers have some.
                    let socket = client_of(vip);
                    let mut got = vec![0; 65536];
                    let result = socket.send(&sent).and_then(|_| socket.recv(&mut got));
                    let n = result.unwrap_or_else(|e| panic!("{len} bytes to {vip}: {e}"));
                    // The server's name and a space come first.
                    assert!(got[3..n] == sent, "{len} bytes to {vip}: {n} came back");
                }
            });
        }
    }
}

/// A probe as `traceroute` sends it: the balancer is a hop that answers.
#[test]
fn a_probe_that_ends_at_the_balancer_is_answered() {
    let (net, _echoes) = echo(Options {
        backends: 2,
        ..Options::default()
    });
    for vip in vips(5300) {
        let error = net.on("client", move || {
            let socket = client_of(vip);
            let set = |level, name| {
                let one: libc::c_int = 1;
                // SAFETY: the pointer is to a value of the length that is passed.
                let result = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        level,
                        name,
                        (&raw const one).cast(),
                        size_of::<libc::c_int>() as u32,
                    )
                };
                assert_eq!(result, 0, "{}", io::Error::last_os_error());
            };
            if vip.is_ipv4() {
                set(libc::IPPROTO_IP, libc::IP_TTL);
                set(libc::IPPROTO_IP, libc::IP_RECVERR);
            } else {
                set(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS);
                set(libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
            }
            socket.send(b"how far?").expect("it leaves");
            socket.recv(&mut [0; 16]).map_err(|e| e.raw_os_error())
        });
        // "No route to host" is what the kernel calls a time exceeded.
        assert_eq!(error, Err(Some(libc::EHOSTUNREACH)), "{vip}");
    }
    wait_until("the drops to be counted", || {
        let drops = net.json(&["stats", "--drops"]).to_string();
        drops.contains("ttl_exceeded")
    });
}
