//! The forward modes that keep the client's address, with real servers set up as
//! `docs/forward-modes.md` says.

use crate::support::{KeptConnection, QUICK_HEALTH, UdpEcho, echoes, get, vips};
use sluice_tests::{
    backends::{decapsulate, hold_the_vips, ip, route_through_the_balancer},
    topology::{Options, Topology, url, wait_until},
};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

const BACKENDS: [&str; 2] = ["b1", "b2"];
/// Where nginx listens on the backends.
const SERVER_PORT: u16 = 8080;

/// The port of the VIPs: not every mode can rewrite it.
fn vip_port(mode: &str) -> u16 {
    match mode {
        "nat" | "dnat" => 80,
        _ => SERVER_PORT,
    }
}

fn config(net: &Topology, mode: &str) -> String {
    let mut text = net.daemon_section();
    for (n, listen) in vips(vip_port(mode)).into_iter().enumerate() {
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nlisten = \"{listen}\"\nforward = \"{mode}\"\n\
             scheduler = \"round-robin\"\n{QUICK_HEALTH}"
        );
        for host in BACKENDS {
            let address = SocketAddr::new(address(net, host, listen.ip()), SERVER_PORT);
            let _ = write!(text, "[[service.backend]]\naddress = \"{address}\"\n");
        }
    }
    text
}

/// The address of a host in the family of `vip`.
fn address(net: &Topology, host: &str, vip: IpAddr) -> IpAddr {
    match vip {
        IpAddr::V4(_) => net.v4(host).into(),
        IpAddr::V6(_) => net.v6(host).into(),
    }
}

/// The client in a network of its own, behind the balancer's segment.
const FAR_CLIENT: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(198, 19, 5, 2),
    Ipv6Addr::new(0x2001, 0xdb8, 0x195, 0, 0, 0, 0, 2),
);

fn move_the_client_away(net: &Topology) {
    let (v4, v6) = (FAR_CLIENT.0.to_string(), FAR_CLIENT.1.to_string());
    let (with4, with6) = (format!("{v4}/24"), format!("{v6}/64"));
    ip(net, "client", &["addr", "add", &with4, "dev", "eth0"]);
    let own = ["addr", "add", &with6, "dev", "eth0", "nodad"];
    ip(net, "client", &own);
    for (vips, source) in [("203.0.113.0/24", v4), ("2001:db8:80::/64", v6)] {
        let route = ["route", "replace", vips, "dev", "eth0", "src", &source];
        ip(net, "client", &route);
    }
}

/// A network in which `mode` serves, and the client's addresses.
fn serve(mode: &str, options: Options) -> (Topology, [IpAddr; 2]) {
    let net = Topology::new(options);
    let mut client = [net.v4("client").into(), net.v6("client").into()];
    for host in BACKENDS {
        net.nginx(host);
        if !matches!(mode, "nat" | "dnat") {
            hold_the_vips(&net, host);
        }
        if mode == "ipip" || mode == "gue" {
            decapsulate(&net, host);
        }
    }
    if mode == "dnat" && options.two_armed {
        // The balancer's address on the backends' segment ends as on the other.
        let balancer = (
            Ipv4Addr::new(198, 18, 1, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
        );
        for host in BACKENDS {
            route_through_the_balancer(&net, host, balancer);
        }
    } else if mode == "dnat" {
        move_the_client_away(&net);
        client = [FAR_CLIENT.0.into(), FAR_CLIENT.1.into()];
        for host in BACKENDS {
            route_through_the_balancer(&net, host, (net.v4("lb"), net.v6("lb")));
        }
    }
    net.daemon(&net.config("sluice.toml", &config(&net, mode)));
    net.wait_backends_up(None, 2 * BACKENDS.len());
    (net, client)
}

/// Bytes that no protocol layer repeats.
pub fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x1234_5678_9abc_def0_u64;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        })
        .collect()
}

fn requests_spread_and_servers_see_the_client(net: &Topology, mode: &str, client: [IpAddr; 2]) {
    for (vip, client) in vips(vip_port(mode)).into_iter().zip(client) {
        let mut answers: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..10 {
            let page = url(vip.ip(), vip.port(), "/");
            let body = net.curl("client", &[&page]).ok();
            *answers.entry(body).or_default() += 1;
        }
        let shares: Vec<u32> = answers.into_values().collect();
        assert_eq!(shares, [5, 5], "{mode}, {vip}: round robin over two");
        let page = url(vip.ip(), vip.port(), "/client");
        let seen = net.curl("client", &[&page]).ok();
        assert_eq!(
            seen.trim(),
            client.to_string(),
            "{mode}, {vip}: whom the server takes for its client"
        );
    }
}

fn bodies_arrive_whole(net: &Topology, mode: &str) {
    const MIB: usize = 1 << 20;
    let (down, up) = (noise(8 * MIB), noise(3 * MIB));
    for host in BACKENDS {
        fs::write(net.www(host).join("big"), &down).expect("a file of our own");
    }
    let sent = net.dir().join("sent");
    fs::write(&sent, &up).expect("a file of our own");
    let sent = sent.to_str().expect("UTF-8").to_owned();
    let got = net.dir().join("got");
    for (n, vip) in vips(vip_port(mode)).into_iter().enumerate() {
        let page = url(vip.ip(), vip.port(), "/big");
        let target = got.to_str().expect("UTF-8");
        net.curl("client", &["-o", target, &page]).ok();
        let got = fs::read(&got).expect("curl has written it");
        assert!(
            got == down,
            "{mode}: download from {vip}: {} bytes, or damaged",
            got.len()
        );
        let name = format!("/upload/{n}");
        let page = url(vip.ip(), vip.port(), &name);
        net.curl("client", &["-T", &sent, &page]).ok();
        let stored: Vec<_> = BACKENDS
            .iter()
            .filter_map(|host| fs::read(net.www(host).join(&name[1..])).ok())
            .collect();
        assert_eq!(stored.len(), 1, "{mode}: one backend has the upload");
        assert!(
            stored[0] == up,
            "{mode}: upload to {vip}: {} bytes, or damaged",
            stored[0].len()
        );
    }
}

fn thousands_of_connections_succeed(net: &Topology, mode: &str) {
    const CLIENTS: usize = 4;
    const EACH: usize = 500;
    let port = vip_port(mode);
    let threads: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (vip, mode) = (vips(port)[n % 2], mode.to_owned());
            net.background("client", move || {
                for i in 0..EACH {
                    get(vip, "/").unwrap_or_else(|e| {
                        panic!("{mode}: request {i} of client {n} to {vip}: {e}")
                    });
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no request fails");
    }
    let flows = net.json(&["conn", "list"]);
    let flows = flows.as_array().expect("a listing");
    assert!(!flows.is_empty(), "{mode}: flows are listed");
}

/// Dropped packets of each service.
fn drops(net: &Topology) -> Vec<u64> {
    let list = net.json(&["service", "list"]);
    let list = list.as_array().expect("a listing").iter();
    list.map(|s| s["drops"].as_u64().expect("a number"))
        .collect()
}

/// Everything, with checksums as a veth leaves them and as a NIC needs them.
fn serves(mode: &str, two_armed: bool) {
    for tx_offload in [true, false] {
        let options = Options {
            backends: 2,
            tx_offload,
            two_armed,
        };
        let (net, client) = serve(mode, options);
        requests_spread_and_servers_see_the_client(&net, mode, client);
        if tx_offload {
            thousands_of_connections_succeed(&net, mode);
        }
        assert_eq!(
            drops(&net),
            [0, 0],
            "{mode}: of services with short requests"
        );
        bodies_arrive_whole(&net, mode);
        // Every link has 1500 bytes, and the outer header needs some: the client has to learn.
        let learns = mode == "ipip" || mode == "gue";
        for dropped in drops(&net) {
            assert_eq!(
                dropped > 0,
                learns,
                "{mode}: {dropped} packets were too big"
            );
            assert!(
                dropped < 200,
                "{mode}: {dropped} packets, and the client has not learned"
            );
        }
    }
}

#[test]
fn dnat_between_two_networks() {
    serves("dnat", true);
}

#[test]
fn dnat_on_one_segment_for_clients_beyond_it() {
    serves("dnat", false);
}

#[test]
fn dsr_on_one_segment() {
    serves("dsr", false);
}

#[test]
fn ipip_with_sluice_decap() {
    serves("ipip", false);
}

#[test]
fn gue_with_sluice_decap() {
    serves("gue", false);
}

/// Connections keep the mode they began in, whatever a reload says.
#[test]
fn open_connections_survive_a_change_of_the_mode() {
    let net = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    move_the_client_away(&net);
    for host in BACKENDS {
        net.nginx(host);
        hold_the_vips(&net, host);
        decapsulate(&net, host);
        route_through_the_balancer(&net, host, (net.v4("lb"), net.v6("lb")));
    }
    // Answers that do not belong to the balancer take the same way, and its kernel sends them on.
    for setting in [
        "net.ipv4.conf.all.send_redirects=0",
        "net.ipv4.conf.eth0.send_redirects=0",
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
    ] {
        net.run("lb", "sysctl", &["-w", setting]).ok();
    }
    for network in ["198.19.5.0/24", "2001:db8:195::/64"] {
        ip(&net, "lb", &["route", "add", network, "dev", "eth0"]);
    }
    // The port that all modes can do.
    let text = |mode: &str| config(&net, "dsr").replace("\"dsr\"", &format!("\"{mode}\""));
    let file = net.config("sluice.toml", &text("nat"));
    let daemon = net.daemon(&file);
    net.wait_backends_up(None, 2 * BACKENDS.len());
    let mut kept = Vec::new();
    for mode in ["nat", "dnat", "dsr", "ipip", "gue", "nat"] {
        fs::write(&file, text(mode)).expect("our own file");
        net.signal(daemon, libc::SIGHUP);
        wait_until(&format!("services in {mode}"), || {
            let list = net.json(&["service", "list"]);
            let list = list.as_array().expect("a listing");
            list.iter().all(|s| s["forward"] == mode)
        });
        for vip in vips(SERVER_PORT) {
            let mut connection = net.on("client", move || {
                KeptConnection::open(vip).unwrap_or_else(|e| panic!("{vip}: {e}"))
            });
            let host = connection
                .get()
                .unwrap_or_else(|e| panic!("{mode}, {vip}: {e}"));
            kept.push((mode, vip, connection, host));
        }
        for (began, vip, connection, host) in &mut kept {
            let again = connection
                .get()
                .unwrap_or_else(|e| panic!("{vip}, begun in {began}, now {mode}: {e}"));
            assert_eq!(again, *host, "{vip}, begun in {began}, now {mode}");
        }
    }
    // Nor does it matter that the daemon is another.
    net.kill(daemon);
    net.daemon(&file);
    net.wait_backends_up(None, 2 * BACKENDS.len());
    for (began, vip, connection, host) in &mut kept {
        let again = connection
            .get()
            .unwrap_or_else(|e| panic!("{vip}, begun in {began}, after a restart: {e}"));
        assert_eq!(again, *host, "{vip}, begun in {began}, after a restart");
    }
}

/// A backend that is a client of its own service: in `nat` it is balanced like any other, in `dsr`
/// the VIP is its own address.
#[test]
fn a_backend_reaches_the_vip() {
    for mode in ["nat", "dsr"] {
        let (net, _) = serve(
            mode,
            Options {
                backends: 2,
                ..Options::default()
            },
        );
        for vips in ["203.0.113.0/24", "2001:db8:80::/64"] {
            ip(&net, "b1", &["route", "add", vips, "dev", "eth0"]);
        }
        for vip in vips(vip_port(mode)) {
            let mut answers: BTreeMap<String, u32> = BTreeMap::new();
            for _ in 0..4 {
                let page = url(vip.ip(), vip.port(), "/");
                *answers.entry(net.curl("b1", &[&page]).ok()).or_default() += 1;
            }
            let answers: Vec<_> = answers.iter().map(|(h, n)| (h.trim(), *n)).collect();
            let expected = match mode {
                "nat" => vec![("b1", 2), ("b2", 2)],
                _ => vec![("b1", 4)],
            };
            assert_eq!(answers, expected, "{mode}, {vip}");
        }
    }
}

/// Backends answer datagrams through the balancer, and see the client's own address.
#[test]
fn dnat_balances_udp() {
    let net = Topology::new(Options {
        backends: 2,
        two_armed: true,
        ..Options::default()
    });
    let _servers = BACKENDS.map(|host| {
        let balancer = (
            Ipv4Addr::new(198, 18, 1, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
        );
        route_through_the_balancer(&net, host, balancer);
        UdpEcho::start(&net, host, 9000)
    });
    let mut text = net.daemon_section();
    for (n, listen) in vips(7).into_iter().enumerate() {
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nlisten = \"{listen}\"\nprotocol = \"udp\"\n\
             forward = \"dnat\"\nscheduler = \"round-robin\"\n"
        );
        for host in BACKENDS {
            let address = SocketAddr::new(address(&net, host, listen.ip()), 9000);
            let _ = write!(text, "[[service.backend]]\naddress = \"{address}\"\n");
        }
    }
    net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 4);
    for vip in vips(7) {
        let seen = net.on("client", move || echoes(vip, 10, &[0, 1, 511, 1400]));
        assert_eq!(seen.into_values().collect::<Vec<_>>(), [5, 5], "{vip}");
    }
}

#[test]
fn a_backend_in_dnat_is_not_led_to_itself_and_the_daemon_warns_of_short_cuts() {
    let net = Topology::new(Options {
        backends: 1,
        ..Options::default()
    });
    net.nginx("b1");
    // On the segment of the backend and of the client.
    let vip = SocketAddr::new(Ipv4Addr::new(198, 18, 0, 80).into(), 80);
    let text = net.daemon_section()
        + &format!(
            "[[service]]\nname = \"short\"\nlisten = \"{vip}\"\nforward = \"dnat\"\n\
             [[service.backend]]\nname = \"own\"\naddress = \"{}:8080\"\n",
            net.v4("b1")
        );
    net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 1);
    let log = net.log("sluice");
    let warning = "service short: backend own and the VIP are both in 198.18.0.0/24";
    assert!(log.contains(warning), "{log}");
    let asked = net.curl("b1", &["-m", "5", &url(vip.ip(), 80, "/")]);
    assert_eq!(asked.code, 7, "refused at once: {}", asked.report());
    let drops = net.json(&["stats", "--drops"]);
    let counted = drops.as_array().expect("a listing").iter();
    let counted: Vec<_> = counted.filter(|d| d["reason"] == "hairpin").collect();
    assert!(
        counted.len() == 1 && counted[0]["packets"].as_u64() > Some(0),
        "{drops:#}"
    );
}
