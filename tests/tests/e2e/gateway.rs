//! `dnat` with a gateway: real servers and connections, none of which is recorded.

use crate::failover::all_are_answered;
use crate::support::{KeptConnection, QUICK_HEALTH, UdpEcho, echoes, get, vips};
use sluice_tests::{
    backends::{ip, route_through_the_balancer},
    topology::{Options, Topology, url, wait_until},
};
use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

const BACKENDS: [&str; 2] = ["b1", "b2"];
const PORT: u16 = 8080;

/// Backends behind a second interface, whose way to everybody leads through the balancer.
fn network() -> Topology {
    let net = Topology::new(Options {
        backends: 2,
        two_armed: true,
        ..Options::default()
    });
    // The balancer's address on the backends' segment ends as on the other.
    let balancer = (
        Ipv4Addr::new(198, 18, 1, 1),
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
    );
    for host in BACKENDS {
        route_through_the_balancer(&net, host, balancer);
    }
    net
}

fn config(net: &Topology, protocol: &str, vip_port: u16, port: u16, keys: &str) -> String {
    let mut text = net.daemon_section();
    for (n, listen) in vips(vip_port).into_iter().enumerate() {
        let of = |host: &str| -> IpAddr {
            match listen.ip() {
                IpAddr::V4(_) => net.v4(host).into(),
                IpAddr::V6(_) => net.v6(host).into(),
            }
        };
        let gateway = of("client");
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nlisten = \"{listen}\"\nprotocol = \"{protocol}\"\nforward = \"dnat\"\n\
             scheduler = \"maglev\"\ngateway = \"{gateway}\"\n{keys}"
        );
        for host in BACKENDS {
            let address = SocketAddr::new(of(host), port);
            let _ = write!(
                text,
                "[[service.backend]]\nname = \"{host}\"\naddress = \"{address}\"\n"
            );
        }
    }
    text
}

fn serve() -> (Topology, u32) {
    let net = network();
    for host in BACKENDS {
        net.nginx(host);
    }
    let text = config(&net, "tcp", 80, PORT, QUICK_HEALTH);
    let daemon = net.daemon(&net.config("sluice.toml", &text));
    net.wait_backends_up(None, 2 * BACKENDS.len());
    (net, daemon)
}

fn recorded(net: &Topology) -> usize {
    net.json(&["conn", "list"])
        .as_array()
        .expect("a listing")
        .len()
}

/// Connections to a VIP that are kept open, each with the backend it is with.
fn open(net: &Topology, vip: SocketAddr, count: usize) -> Vec<(KeptConnection, String)> {
    net.on("client", move || {
        let one = |_| {
            let mut connection = KeptConnection::open(vip).unwrap_or_else(|e| panic!("{vip}: {e}"));
            let host = connection.get().unwrap_or_else(|e| panic!("{vip}: {e}"));
            (connection, host)
        };
        (0..count).map(one).collect()
    })
}

fn all_go_on(kept: &mut [(KeptConnection, String)], what: &str) {
    for (connection, host) in kept {
        let again = connection.get().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(again, *host, "{what}");
    }
}

#[test]
fn servers_see_their_clients_and_nothing_is_recorded() {
    let (net, _) = serve();
    for (vip, client) in vips(80)
        .into_iter()
        .zip([net.v4("client").into(), net.v6("client").into()])
    {
        let client: IpAddr = client;
        let seen = net
            .curl("client", &[&url(vip.ip(), vip.port(), "/client")])
            .ok();
        assert_eq!(seen.trim(), client.to_string());
        let hosts: BTreeSet<String> = net.on("client", move || {
            (0..60)
                .map(|n| get(vip, "/").unwrap_or_else(|e| panic!("request {n} to {vip}: {e}")))
                .collect()
        });
        assert_eq!(hosts.len(), 2, "{vip}: both serve");
        let big = vec![7; 4 << 20];
        for host in BACKENDS {
            fs::write(net.www(host).join("big"), &big).expect("a file of our own");
        }
        let got = net.dir().join("got");
        let target = got.to_str().expect("UTF-8");
        net.curl(
            "client",
            &["-o", target, &url(vip.ip(), vip.port(), "/big")],
        )
        .ok();
        assert!(
            fs::read(&got).expect("curl has written it") == big,
            "{vip}: damaged"
        );
        // What the balancer's host asks the backends itself is no client's.
        for host in BACKENDS {
            let own: IpAddr = match vip.ip() {
                IpAddr::V4(_) => net.v4(host).into(),
                IpAddr::V6(_) => net.v6(host).into(),
            };
            for _ in 0..8 {
                net.curl("lb", &[&url(own, PORT, "/")]).ok();
            }
        }
    }
    assert_eq!(recorded(&net), 0);
    let list = net.json(&["service", "list"]);
    for service in list.as_array().expect("a listing") {
        assert_eq!(service["drops"], 0, "{service:#}");
    }
}

#[test]
fn connections_outlive_a_drain_a_restart_and_a_new_router() {
    let (net, daemon) = serve();
    let mut kept: Vec<_> = vips(80)
        .iter()
        .flat_map(|vip| open(&net, *vip, 12))
        .collect();
    assert_eq!(recorded(&net), 0);

    for service in ["s0", "s1"] {
        net.sluice(&["backend", "drain", service, "b1"]).ok();
    }
    all_go_on(&mut kept, "b1 drains");
    // Those of b1, whose slots have changed hands.
    let of_b1 = kept.iter().filter(|(_, host)| host.contains("b1")).count();
    assert!(of_b1 > 0 && recorded(&net) >= of_b1);
    for vip in vips(80) {
        let hosts: BTreeSet<String> = open(&net, vip, 10)
            .into_iter()
            .map(|(_, host)| host)
            .collect();
        assert!(
            hosts.iter().all(|host| host.contains("b2")),
            "{vip}: {hosts:?}"
        );
    }
    for service in ["s0", "s1"] {
        net.sluice(&["backend", "ready", service, "b1"]).ok();
    }
    all_go_on(&mut kept, "b1 is back");
    net.kill(daemon);
    all_go_on(&mut kept, "without a daemon");
    net.daemon(&net.dir().join("sluice.toml"));
    net.wait_backends_up(None, 2 * BACKENDS.len());
    all_go_on(&mut kept, "with another daemon");

    // The router is another: its address has another Ethernet address, which it announces.
    for setting in [
        "net.ipv4.conf.eth0.arp_notify=1",
        "net.ipv6.conf.eth0.ndisc_notify=1",
    ] {
        net.run("client", "sysctl", &["-w", setting]).ok();
    }
    ip(
        &net,
        "client",
        &["link", "set", "eth0", "address", "02:00:00:00:77:77"],
    );
    all_go_on(&mut kept, "by another router");
    wait_until("the new router is the gateway", || {
        let map = net.json(&["map", "dump", "gateways"]);
        let map = map.as_array().expect("a listing");
        map.len() == 2 && map.iter().all(|g| g["next_hop"] == "02:00:00:00:77:77")
    });
    all_go_on(&mut kept, "by the other router, which is known");
}

#[test]
fn no_request_fails_when_a_process_dies_between_two_checks() {
    let net = network();
    let servers = BACKENDS.map(|host| net.nginx(host));
    let rarely = "[service.health]\ntype = \"tcp\"\ninterval = \"60s\"\ntimeout = \"500ms\"\nrise = 1\nfall = 2\neject_after = 3\n";
    net.daemon(&net.config("sluice.toml", &config(&net, "tcp", 80, PORT, rarely)));
    net.wait_backends_up(None, 2 * BACKENDS.len());
    net.kill(servers[0]);
    all_are_answered(&net, &["b2"]);
    for service in ["s0", "s1"] {
        wait_until("the backend to be ejected", || {
            let list = net.json(&["backend", "list", service]);
            let backends = list.as_array().expect("a list").iter();
            backends.filter(|b| b["state"] == "down").count() == 1
        });
    }
}

#[test]
fn datagrams_are_answered() {
    let net = network();
    let _servers = BACKENDS.map(|host| UdpEcho::start(&net, host, 9000));
    net.daemon(&net.config("sluice.toml", &config(&net, "udp", 7, 9000, "")));
    net.wait_backends_up(None, 4);
    for vip in vips(7) {
        // The last one comes in fragments, and so does its answer.
        let seen = net.on("client", move || echoes(vip, 20, &[0, 1, 511, 1400, 4000]));
        assert_eq!(seen.len(), 2, "{vip}: both serve: {seen:?}");
    }
    assert_eq!(recorded(&net), 0);
}
