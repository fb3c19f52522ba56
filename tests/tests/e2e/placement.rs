//! Which backend a real connection gets.

use crate::support::{KeptConnection, get, vips, web};
use sluice_tests::topology::{Options, Topology, wait_until};

/// The daemon with services `web` and `web6` on three nginx, whose configuration is changed first;
/// the process numbers of the servers.
fn started(change: impl FnOnce(String) -> String) -> (Topology, Vec<u32>) {
    let topology = Topology::new(Options::default());
    let servers = ["b1", "b2", "b3"].map(|host| topology.nginx(host)).to_vec();
    let text = change(web(&topology, 3, ""));
    topology.daemon(&topology.config("sluice.toml", &text));
    topology.wait_backends_up(None, 6);
    (topology, servers)
}

/// Names of the backends that connections were made to, one connection held to each.
fn hold(
    topology: &Topology,
    address: std::net::SocketAddr,
    count: usize,
) -> Vec<(String, KeptConnection)> {
    topology.on("client", move || {
        (0..count)
            .map(|n| {
                let mut connection =
                    KeptConnection::open(address).unwrap_or_else(|e| panic!("connection {n}: {e}"));
                let name = connection
                    .get()
                    .unwrap_or_else(|e| panic!("request {n}: {e}"));
                (name.trim().to_owned(), connection)
            })
            .collect()
    })
}

fn shares(connections: &[(String, KeptConnection)]) -> [usize; 3] {
    ["b1", "b2", "b3"].map(|host| connections.iter().filter(|(name, _)| name == host).count())
}

/// Active connections of each backend of a service, as `backend list` shows them.
fn active(topology: &Topology, service: &str) -> Vec<u64> {
    let list = topology.json(&["backend", "list", service]);
    let list = list.as_array().expect("a listing is an array");
    list.iter()
        .map(|b| b["active_connections"].as_u64().expect("a count"))
        .collect()
}

#[test]
fn least_connections_evens_out_connections_that_are_held() {
    let (topology, _) = started(|text| text.replace("round-robin", "least-connections"));
    for (vip, service) in vips(80).into_iter().zip(["web", "web6"]) {
        let mut held = hold(&topology, vip, 9);
        assert_eq!(shares(&held), [3, 3, 3], "{service}");
        // The connections of one backend end, and it gets what comes next.
        held.retain(|(name, _)| name != "b2");
        wait_until("the ends of three connections to be counted", || {
            active(&topology, service) == [3, 0, 3]
        });
        held.extend(hold(&topology, vip, 3));
        assert_eq!(shares(&held), [3, 3, 3], "{service}");
    }
}

#[test]
fn full_backends_are_passed_over_and_backups_wait() {
    let (topology, servers) = started(|text| {
        text.replace("name = \"b1\"\n", "name = \"b1\"\nmax_connections = 2\n")
            .replace("name = \"b3\"\n", "name = \"b3\"\nbackup = true\n")
    });
    for vip in vips(80) {
        let held = hold(&topology, vip, 8);
        assert_eq!(shares(&held), [2, 6, 0]);
    }
    topology.kill(servers[0]);
    topology.kill(servers[1]);
    topology.wait_backends_up(None, 2);
    for vip in vips(80) {
        let body = topology
            .on("client", move || get(vip, "/"))
            .expect("the backup answers");
        assert_eq!(body.trim(), "b3");
    }
    let list = topology.json(&["backend", "list", "web"]);
    let weights: Vec<_> = list
        .as_array()
        .expect("a listing")
        .iter()
        .map(|b| b["effective_weight"].clone())
        .collect();
    assert_eq!(weights, [0, 0, 1]);
}
