//! Backends that die and return.

use crate::support::{get, service, vips, web_topology};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::thread;

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

/// A service whose backends are asked once a minute, so that whatever is noticed is noticed from traffic.
fn rarely_checked(topology: &Topology) -> u32 {
    topology.nginx("b1");
    topology.nginx("b3");
    let server = topology.nginx("b2");
    let health = "[service.health]\ntype = \"tcp\"\ninterval = \"60s\"\ntimeout = \"500ms\"\n\
                  rise = 1\nfall = 2\neject_after = 3\n";
    let [v4, v6] = vips(80);
    let text = topology.daemon_section()
        + &service(topology, "web", "tcp", v4, (3, 8080), "", health)
        + &service(topology, "web6", "tcp", v6, (3, 8080), "", health);
    let config = topology.config("sluice.toml", &text);
    topology.daemon(&config);
    topology.wait_backends_up(None, 6);
    server
}

/// Thirty requests at once to each VIP, none of which may fail.
pub fn all_are_answered(topology: &Topology, by: &'static [&'static str]) {
    for vip in vips(80) {
        topology.on("client", move || {
            let clients: Vec<_> = (0..30)
                .map(|n| (n, thread::spawn(move || get(vip, "/"))))
                .collect();
            for (n, client) in clients {
                let answer = client.join().expect("no panic");
                let body = answer.unwrap_or_else(|e| panic!("request {n} to {vip}: {e}"));
                assert!(by.contains(&body.trim()), "{body} answered");
            }
        });
    }
}

/// The backend is down, for what its clients met.
fn is_ejected(topology: &Topology, name: &str) {
    for service in ["web", "web6"] {
        wait_until("the backend to be ejected", || {
            let list = topology.json(&["backend", "list", service]);
            let backends = list.as_array().expect("a list");
            let down = backends
                .iter()
                .find(|b| b["name"] == name)
                .expect("it is listed");
            let reason = down["reason"].as_str().unwrap_or_default();
            down["state"] == "down" && (reason.contains("ejected") || reason.starts_with("L4"))
        });
    }
}

#[test]
fn no_request_fails_when_a_process_dies_between_two_checks() {
    let topology = Topology::new(Options::default());
    let server = rarely_checked(&topology);
    topology.kill(server);
    all_are_answered(&topology, &["b1", "b3"]);
    is_ejected(&topology, "b2");
}

#[test]
fn no_request_fails_when_a_host_dies_between_two_checks() {
    let topology = Topology::new(Options::default());
    rarely_checked(&topology);
    topology
        .run("b2", "ip", &["link", "set", "eth0", "down"])
        .ok();
    all_are_answered(&topology, &["b1", "b3"]);
    is_ejected(&topology, "b2");
}
