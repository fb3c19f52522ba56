//! Handshakes that take too long, and connections that say nothing for too long.

use crate::support::{KeptConnection, QUICK_HEALTH, get, service, vips};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::time::{Duration, Instant};

fn options() -> Options {
    Options {
        backends: 1,
        ..Options::default()
    }
}

#[test]
fn a_connection_that_takes_too_long_to_establish_fails_clearly() {
    let topology = Topology::new(options());
    topology.nginx("b1");
    // The server's host loses every SYN to port 9999 silently.
    topology
        .run(
            "b1",
            "nft",
            &[
                "add table inet t; add chain inet t c { type filter hook input priority 0; }; \
               add rule inet t c tcp dport 9999 drop",
            ],
        )
        .ok();
    // Checked at the port that answers, so the backend counts as up.
    let health = "[service.health]\ntype = \"http\"\nport = 8080\npath = \"/health\"\n\
                  interval = \"200ms\"\ntimeout = \"200ms\"\nrise = 1\n";
    let [v4, v6] = vips(80);
    let timeout = "connect_timeout = \"1s\"";
    let config = topology.daemon_section()
        + &service(&topology, "slow", "tcp", v4, (1, 9999), timeout, health)
        + &service(&topology, "slow6", "tcp", v6, (1, 9999), timeout, health);
    topology.daemon(&topology.config("sluice.toml", &config));
    topology.wait_backends_up(None, 2);
    for vip in vips(80) {
        let start = Instant::now();
        let error = topology
            .on("client", move || get(vip, "/"))
            .expect_err("nobody answers");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{vip} after {:?}: {error}",
            start.elapsed()
        );
        // The client repeats its SYN after 1 s, then after 2 s more.
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn idle_connections_end_after_the_configured_time() {
    let topology = Topology::new(options());
    topology.nginx("b1");
    let [v4, v6] = vips(80);
    let idle = "idle_timeout = \"2s\"";
    let config = topology.daemon_section()
        + &service(&topology, "web", "tcp", v4, (1, 8080), idle, QUICK_HEALTH)
        + &service(&topology, "web6", "tcp", v6, (1, 8080), idle, QUICK_HEALTH);
    topology.daemon(&topology.config("sluice.toml", &config));
    topology.wait_backends_up(None, 2);
    for vip in vips(80) {
        let mut connection =
            topology.on("client", move || KeptConnection::open(vip).expect("open"));
        connection.get().expect("an answer");
        let list = topology.json(&["conn", "list", "--state", "ESTABLISHED"]);
        let list = list.as_array().expect("a listing is an array");
        assert_eq!(list.len(), 1, "{list:#?}");
        for key in [
            "protocol",
            "state",
            "source",
            "virtual_address",
            "destination",
            "nat_source",
        ] {
            assert!(list[0][key].is_string(), "{key}: {:#}", list[0]);
        }
        // Used now and then it stays, far longer than the time.
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            connection.get().expect("an answer");
            std::thread::sleep(Duration::from_millis(500));
        }
        wait_until("the idle connection to end", || {
            topology
                .json(&["conn", "list", "--state", "ESTABLISHED"])
                .as_array()
                .is_some_and(Vec::is_empty)
        });
        let error = connection.get().expect_err("the connection has ended");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        let loads = topology.json(&["backend", "list"]);
        for backend in loads.as_array().into_iter().flatten() {
            assert_eq!(backend["active_connections"], 0, "{backend:#}");
        }
    }
}
