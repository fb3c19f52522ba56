//! The flow table when there are more flows than it has room for.

use crate::support::{UdpEcho, service, vips};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::{net::UdpSocket, time::Duration};

#[test]
fn counts_stay_true_when_the_flow_table_overflows() {
    let topology = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    let _servers = ["b1", "b2"].map(|host| UdpEcho::start(&topology, host, 9000));
    let none = "[service.health]\ntype = \"none\"\n";
    let [v4, _] = vips(7);
    let config = topology
        .daemon_section()
        .replace("flows = 65536", "flows = 2048")
        + &service(&topology, "echo", "udp", v4, (2, 9000), "", none);
    topology.daemon(&topology.config("sluice.toml", &config));
    topology.wait_backends_up(None, 2);

    // Each flow takes two entries: four times what fits.
    topology.on("client", move || {
        for n in 0..4096_u16 {
            let socket = UdpSocket::bind(("0.0.0.0", 20000 + n)).expect("a socket");
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .expect("a timeout");
            socket.connect(v4).expect("a route to the VIP");
            socket.send(b"x").expect("the datagram leaves");
            let mut buffer = [0; 16];
            socket
                .recv(&mut buffer)
                .unwrap_or_else(|e| panic!("flow {n}: a full table still takes new flows: {e}"));
        }
    });
    let counted = || {
        let list = topology.json(&["backend", "list"]);
        let sum = |key: &str| -> u64 {
            list.as_array()
                .into_iter()
                .flatten()
                .filter_map(|b| b[key].as_u64())
                .sum()
        };
        (sum("active_connections"), sum("connections_total"))
    };
    assert_eq!(counted().1, 4096, "every flow was placed");
    // Whoever pushes a flow out counts its end. The list and the counts are asked for one after the other.
    let mut seen = (0, 0);
    wait_until("the counts to agree with the table", || {
        let listed = topology.json(&["conn", "list"]);
        let listed = listed.as_array().map_or(0, |l| l.len() as u64);
        seen = (counted().0, listed);
        seen.0 == seen.1
    });
    assert!(
        seen.1 > 0 && seen.1 <= 1536,
        "half of the 3072 entries of a table for 2048: {seen:?}"
    );
}
