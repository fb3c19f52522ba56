//! Next hops: backends behind routers, routes that change, addresses that move to other hardware.

use crate::support::{QUICK_HEALTH, get, vips};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::fmt::Write as _;

/// A server in a network of its own behind a router; here every router is the server too.
const REMOTE4: &str = "198.19.200.1";
const REMOTE6: &str = "2001:db8:200::1";

fn route(topology: &Topology, via: &str) {
    let (v4, v6) = (topology.v4(via).to_string(), topology.v6(via).to_string());
    for args in [
        ["route", "replace", "198.19.200.0/24", "via", &v4],
        ["route", "replace", "2001:db8:200::/64", "via", &v6],
    ] {
        topology.run("lb", "ip", &args).ok();
    }
}

fn answer(topology: &Topology, which: usize) -> std::io::Result<String> {
    let vip = vips(80)[which];
    topology.on("client", move || get(vip, "/").map(|b| b.trim().to_owned()))
}

#[test]
fn a_backend_behind_a_router_is_reached_and_its_route_followed() {
    let topology = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        for address in [format!("{REMOTE4}/32"), format!("{REMOTE6}/128")] {
            topology
                .run(host, "ip", &["addr", "add", &address, "dev", "lo"])
                .ok();
        }
        topology.nginx(host);
    }
    route(&topology, "b1");
    let mut config = topology.daemon_section();
    let backends = [format!("{REMOTE4}:8080"), format!("[{REMOTE6}]:8080")];
    for (n, (vip, backend)) in vips(80).iter().zip(backends).enumerate() {
        let _ = write!(
            config,
            "[[service]]\nname = \"remote{n}\"\nlisten = \"{vip}\"\nprotocol = \"tcp\"\n\
             forward = \"nat\"\n{QUICK_HEALTH}[[service.backend]]\naddress = \"{backend}\"\n"
        );
    }
    topology.daemon(&topology.config("sluice.toml", &config));
    topology.wait_backends_up(None, 2);
    for which in 0..2 {
        assert_eq!(answer(&topology, which).expect("an answer"), "b1");
    }
    route(&topology, "b2");
    for which in 0..2 {
        wait_until("traffic to follow the route", || {
            answer(&topology, which).is_ok_and(|host| host == "b2")
        });
    }
}

#[test]
fn a_backend_that_changes_its_hardware_is_followed() {
    let (topology, _) = crate::support::web_topology(
        Options {
            backends: 1,
            ..Options::default()
        },
        "",
    );
    for which in 0..2 {
        assert_eq!(answer(&topology, which).expect("an answer"), "b1");
    }
    // A host that takes over an address announces it.
    topology.on("b1", || {
        for name in ["ipv4/conf/eth0/arp_notify", "ipv6/conf/eth0/ndisc_notify"] {
            std::fs::write(format!("/proc/sys/net/{name}"), "1").expect("a setting of the kernel");
        }
    });
    let change = ["link", "set", "eth0", "address", "02:51:1c:e0:77:77"];
    topology.run("b1", "ip", &change).ok();
    for which in 0..2 {
        wait_until("traffic to reach the new MAC address", || {
            answer(&topology, which).is_ok()
        });
    }
}
