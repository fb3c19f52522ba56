//! Backends that die and return.

use crate::support::{get, vips, web_topology};
use sluice_tests::topology::{Options, wait_until};

#[test]
fn a_dead_backend_leaves_and_a_healed_one_returns() {
    let topology = sluice_tests::topology::Topology::new(Options::default());
    let mut servers = vec![];
    for host in ["b1", "b2", "b3"] {
        servers.push(topology.nginx(host));
    }
    let config = topology.config("sluice.toml", &crate::support::web(&topology, 3, ""));
    topology.daemon(&config);
    topology.wait_backends_up(None, 6);

    topology.kill(servers[1]);
    topology.wait_backends_up(None, 4);
    let list = topology.json(&["backend", "list", "web"]);
    let down = list
        .as_array()
        .and_then(|l| l.iter().find(|b| b["name"] == "b2"))
        .expect("b2 is listed");
    assert_eq!(down["state"], "down", "{down:#}");
    assert_eq!(down["effective_weight"], 0, "{down:#}");
    assert_eq!(
        down["reason"].as_str().map(|r| r.starts_with("L4CON")),
        Some(true),
        "{down:#}"
    );
    for vip in vips(80) {
        let answers = topology.on("client", move || -> Vec<String> {
            (0..30)
                .map(|n| get(vip, "/").unwrap_or_else(|e| panic!("request {n} to {vip}: {e}")))
                .collect()
        });
        let from = |host: &str| answers.iter().filter(|a| a.trim() == host).count();
        assert_eq!((from("b1"), from("b2"), from("b3")), (15, 0, 15));
    }

    topology.nginx("b2");
    topology.wait_backends_up(None, 6);
    for vip in vips(80) {
        let answers = topology.on("client", move || -> Vec<String> {
            (0..30)
                .map(|n| get(vip, "/").unwrap_or_else(|e| panic!("request {n} to {vip}: {e}")))
                .collect()
        });
        let from = |host: &str| answers.iter().filter(|a| a.trim() == host).count();
        assert_eq!((from("b1"), from("b2"), from("b3")), (10, 10, 10));
    }
}

#[test]
fn without_any_backend_a_client_hears_at_once() {
    let topology = sluice_tests::topology::Topology::new(Options {
        backends: 1,
        ..Options::default()
    });
    let server = topology.nginx("b1");
    let config = topology.config(
        "sluice.toml",
        &crate::support::web(&topology, 1, "on_no_backend = \"reset\""),
    );
    topology.daemon(&config);
    topology.wait_backends_up(None, 2);
    topology.kill(server);
    topology.wait_backends_up(None, 0);
    for vip in vips(80) {
        let error = topology
            .on("client", move || get(vip, "/"))
            .expect_err("there is no backend");
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{error}"
        );
    }
}

#[test]
fn a_backend_whose_host_disappears_is_noticed() {
    let (topology, _) = web_topology(
        Options {
            backends: 2,
            ..Options::default()
        },
        "",
    );
    // The cable is pulled: nothing answers, not even with RST.
    topology
        .run("b1", "ip", &["link", "set", "eth0", "down"])
        .ok();
    topology.wait_backends_up(None, 2);
    for vip in vips(80) {
        topology.on("client", move || {
            for n in 0..10 {
                let body = get(vip, "/").unwrap_or_else(|e| panic!("request {n} to {vip}: {e}"));
                assert_eq!(body.trim(), "b2");
            }
        });
    }
    topology
        .run("b1", "ip", &["link", "set", "eth0", "up"])
        .ok();
    // An interface that goes down loses its IPv6 addresses.
    let address = format!("{}/64", topology.v6("b1"));
    topology
        .run(
            "b1",
            "ip",
            &["addr", "add", &address, "dev", "eth0", "nodad"],
        )
        .ok();
    topology.wait_backends_up(None, 4);
    wait_until("b1 to answer again", || {
        topology.on("client", move || {
            get(vips(80)[0], "/").is_ok_and(|b| b.trim() == "b1")
        })
    });
}
