//! Which backend a real connection gets.

use crate::support::{KeptConnection, get, vips, web};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

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

/// A client whose connection goes on keeps its place, however long that is; once it has none left
/// and the time has passed, it is nobody's.
#[test]
fn a_client_returns_while_it_has_connections_and_for_the_time_after() {
    let (topology, _) =
        started(|text| text.replace("scheduler = ", "affinity = \"2s\"\nscheduler = "));
    for (vip, map) in vips(80).into_iter().zip(["affinity4", "affinity6"]) {
        let held = hold(&topology, vip, 1);
        let first = held[0].0.clone();
        let noted = |map: &str| {
            let dump = topology.json(&["map", "dump", map]);
            dump[0]["last_seen"].as_u64().expect("one client is known")
        };
        let begun = noted(map);
        // More than its time, in ticks, during which nothing begins.
        wait_until("the sweeps to have noted the connection", || {
            noted(map) > begun + 3 * 953
        });
        let again = hold(&topology, vip, 4);
        assert!(again.iter().all(|(name, _)| *name == first), "{first}");
        drop((held, again));
        wait_until("the last connection to be noted for the last time", || {
            let before = noted(map);
            std::thread::sleep(std::time::Duration::from_millis(2500));
            noted(map) == before
        });
        assert_ne!(hold(&topology, vip, 1)[0].0, first, "the turn of another");
    }
}

/// While lists of thousands are exchanged for others, whoever both allow is never refused.
#[test]
fn lists_change_without_a_gap() {
    let topology = Topology::new(Options::default());
    for host in ["b1", "b2", "b3"] {
        topology.nginx(host);
    }
    let [client4, client6] = [
        topology.v4("client").to_string(),
        topology.v6("client").to_string(),
    ];
    let text = |turn: usize| {
        let net = 10 + turn % 2;
        let mut v4: Vec<String> = (0..2000)
            .map(|n| format!("\"{net}.{}.{}.0/24\"", n / 256, n % 256))
            .collect();
        let mut v6: Vec<String> = (0..2000)
            .map(|n| format!("\"2001:db8:{net}:{n:x}::/64\""))
            .collect();
        // The client by itself, or by a prefix that holds the whole network of the test.
        v4.push(["\"198.18.0.0/15\"".to_owned(), format!("\"{client4}\"")][turn % 2].clone());
        v6.push(["\"2001:db8::/40\"".to_owned(), format!("\"{client6}\"")][turn % 2].clone());
        web(
            &topology,
            3,
            &format!("allow = [{}, {}]", v4.join(", "), v6.join(", ")),
        )
    };
    let config = topology.config("sluice.toml", &text(0));
    let daemon = topology.daemon(&config);
    topology.wait_backends_up(None, 6);

    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let requests = topology.background("client", move || {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            for vip in vips(80) {
                get(vip, "/").unwrap_or_else(|e| panic!("request {count} to {vip}: {e}"));
                count += 1;
            }
        }
        count
    });
    for turn in 1..6 {
        topology.config("sluice.toml", &text(turn));
        topology.signal(daemon, libc::SIGHUP);
        wait_until("the configuration to be in force", || {
            topology
                .log("sluice")
                .matches("configuration reloaded")
                .count()
                == turn
        });
    }
    done.store(true, Ordering::Relaxed);
    assert!(requests.join().expect("every request is answered") > 10);

    let denied = web(
        &topology,
        3,
        &format!("deny = [\"{client4}\", \"{client6}\"]"),
    );
    topology.config("sluice.toml", &denied);
    topology.signal(daemon, libc::SIGHUP);
    wait_until("the client to be refused", || {
        topology.on("client", move || {
            vips(80).iter().all(|vip| {
                let patience = std::time::Duration::from_millis(300);
                std::net::TcpStream::connect_timeout(vip, patience).is_err()
            })
        })
    });
    let drops = topology.json(&["stats", "--drops"]);
    assert!(
        drops
            .as_array()
            .expect("a listing")
            .iter()
            .any(|d| d["reason"] == "denied"),
        "{drops:#}"
    );
}
