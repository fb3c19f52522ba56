//! Traffic through the balancer, with real servers behind it and real clients before it.

use crate::support::{UdpEcho, echoes, get, ping, service, vips, web_topology};
use sluice_tests::topology::{Options, Topology, VIP4, VIP6, url};
use std::{collections::BTreeMap, fs, net::IpAddr};

/// Senders that leave checksums to their hardware, and senders that do not.
const OFFLOADS: [bool; 2] = [true, false];

fn options(backends: u8, tx_offload: bool) -> Options {
    Options {
        backends,
        tx_offload,
        ..Options::default()
    }
}

#[test]
fn requests_spread_over_all_backends_and_are_counted() {
    let (topology, _) = web_topology(options(3, true), "");
    for (service, vip) in [("web", IpAddr::V4(VIP4)), ("web6", IpAddr::V6(VIP6))] {
        let mut answers: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..30 {
            let body = topology.curl("client", &[&url(vip, 80, "/")]).ok();
            *answers.entry(body).or_default() += 1;
        }
        assert_eq!(
            answers.into_values().collect::<Vec<_>>(),
            [10, 10, 10],
            "round robin gives each of three backends a third"
        );
        let list = topology.json(&["backend", "list", service]);
        for backend in list.as_array().expect("a listing is an array") {
            assert_eq!(backend["connections_total"], 10, "{backend:#}");
            // SYN, ACK, request, ACK of the answer, FIN, ACK, give or take.
            let packets = backend["packets_in"].as_u64().expect("a number");
            assert!((40..=80).contains(&packets), "{backend:#}");
            let bytes = backend["bytes_out"].as_u64().expect("a number");
            assert!(bytes > 10 * 150, "{backend:#}");
        }
        let stats = topology.json(&["service", "show", service]);
        let total = if stats.is_array() { &stats[0] } else { &stats };
        assert_eq!(total["connections_total"], 30, "{stats:#}");
        assert_eq!(total["drops"], 0, "{stats:#}");
    }
}

/// Bytes that no protocol layer repeats.
fn noise(len: usize) -> Vec<u8> {
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

#[test]
fn large_bodies_arrive_whole_both_ways() {
    const LEN: usize = 8 << 20;
    for tx_offload in OFFLOADS {
        let (topology, _) = web_topology(options(2, tx_offload), "");
        let body = noise(LEN);
        for host in ["b1", "b2"] {
            fs::write(topology.www(host).join("big"), &body).expect("a file of our own");
        }
        let sent = topology.dir().join("sent");
        fs::write(&sent, &body).expect("a file of our own");
        for (n, vip) in [IpAddr::V4(VIP4), IpAddr::V6(VIP6)].into_iter().enumerate() {
            let got = topology.dir().join("got");
            topology
                .curl(
                    "client",
                    &["-o", got.to_str().expect("UTF-8"), &url(vip, 80, "/big")],
                )
                .ok();
            let got = fs::read(got).expect("curl has written it");
            assert!(
                got == body,
                "download from {vip}: {} of {LEN} bytes, or damaged",
                got.len()
            );

            let name = format!("/upload/{n}");
            topology
                .curl(
                    "client",
                    &["-T", sent.to_str().expect("UTF-8"), &url(vip, 80, &name)],
                )
                .ok();
            let stored: Vec<_> = ["b1", "b2"]
                .iter()
                .filter_map(|host| fs::read(topology.www(host).join(&name[1..])).ok())
                .collect();
            assert_eq!(stored.len(), 1, "one backend has the upload");
            assert!(
                stored[0] == body,
                "upload to {vip}: {} bytes, or damaged",
                stored[0].len()
            );
        }
    }
}

/// Clients on one interface, backends behind another: packets are redirected between them.
#[test]
fn a_balancer_with_two_interfaces_redirects_between_them() {
    for tx_offload in OFFLOADS {
        let (topology, _) = web_topology(
            Options {
                two_armed: true,
                ..options(2, tx_offload)
            },
            "",
        );
        let body = noise(1 << 20);
        for host in ["b1", "b2"] {
            fs::write(topology.www(host).join("big"), &body).expect("a file of our own");
        }
        for vip in [IpAddr::V4(VIP4), IpAddr::V6(VIP6)] {
            let mut answers: BTreeMap<String, u32> = BTreeMap::new();
            for _ in 0..10 {
                let body = topology.curl("client", &[&url(vip, 80, "/")]).ok();
                *answers.entry(body).or_default() += 1;
            }
            assert_eq!(answers.into_values().collect::<Vec<_>>(), [5, 5]);
            let got = topology.dir().join("got");
            let path = got.to_str().expect("UTF-8");
            topology
                .curl("client", &["-o", path, &url(vip, 80, "/big")])
                .ok();
            assert!(fs::read(&got).expect("curl has written it") == body);
        }
        let status = topology.json(&["status"]);
        assert_eq!(status["interfaces"][1]["name"], "eth1", "{status:#}");
        // The pools of both families are on the other segment, which the client cannot reach.
        let direct = topology.v4("b1");
        topology
            .curl("client", &["--max-time", "1", &url(direct, 8080, "/")])
            .code
            .eq(&0)
            .then(|| panic!("the client reaches {direct} past the balancer"));
    }
}

#[test]
fn thousands_of_connections_without_an_error() {
    const CLIENTS: usize = 4;
    const EACH: usize = 1250;
    for tx_offload in OFFLOADS {
        let (topology, _) = web_topology(options(3, tx_offload), "");
        let threads: Vec<_> = (0..CLIENTS)
            .map(|n| {
                let vip = vips(80)[n % 2];
                topology.background("client", move || {
                    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
                    for i in 0..EACH {
                        let body = get(vip, "/")
                            .unwrap_or_else(|e| panic!("request {i} of client {n} to {vip}: {e}"));
                        *answers.entry(body).or_default() += 1;
                    }
                    answers
                })
            })
            .collect();
        let mut answers: BTreeMap<String, usize> = BTreeMap::new();
        for thread in threads {
            for (host, n) in thread.join().expect("no request fails") {
                *answers.entry(host).or_default() += n;
            }
        }
        assert_eq!(answers.values().sum::<usize>(), CLIENTS * EACH);
        for (host, n) in &answers {
            // Each of two services gives each backend a third, exactly.
            assert!(
                n.abs_diff(CLIENTS * EACH / 3) <= 2,
                "{host:?} answered {n}: {answers:?}"
            );
        }
        let drops = topology.json(&["stats"]);
        for line in drops.as_array().into_iter().flatten() {
            assert_eq!(line["drops"].as_u64().unwrap_or(0), 0, "{drops:#}");
        }
    }
}

#[test]
fn udp_is_balanced_and_a_client_keeps_its_backend() {
    for tx_offload in OFFLOADS {
        let topology = Topology::new(options(2, tx_offload));
        let _servers = ["b1", "b2"].map(|host| UdpEcho::start(&topology, host, 9000));
        let none = "[service.health]\ntype = \"none\"\n";
        let [v4, v6] = vips(7);
        let config = topology.daemon_section()
            + &service(&topology, "echo", "udp", v4, (2, 9000), "", none)
            + &service(&topology, "echo6", "udp", v6, (2, 9000), "", none);
        topology.daemon(&topology.config("sluice.toml", &config));
        topology.wait_backends_up(None, 4);
        for vip in vips(7) {
            // Odd and even lengths, up to a full packet.
            let lengths = &[0, 1, 2, 511, 1400, 1439];
            let seen = topology.on("client", move || echoes(vip, 40, lengths));
            assert_eq!(
                seen.into_values().collect::<Vec<_>>(),
                [20, 20],
                "round robin over clients"
            );
        }
    }
}

#[test]
fn a_vip_answers_arp_neighbour_discovery_and_ping() {
    let (topology, _) = web_topology(options(1, true), "");
    for vip in [IpAddr::V4(VIP4), IpAddr::V6(VIP6)] {
        let answered = topology.on("client", move || ping(vip).expect("a socket for ICMP"));
        assert!(answered, "nobody answers ping at {vip}");
        let neighbours = topology
            .run("client", "ip", &["neigh", "show", "to", &vip.to_string()])
            .ok();
        let mac = topology.mac("lb").map(|b| format!("{b:02x}")).join(":");
        assert!(
            neighbours.contains(&mac),
            "{vip} should be at {mac}: {neighbours:?}"
        );
    }
    // The balancer's own address is the kernel's, and still works.
    let own = topology.v4("lb");
    assert!(topology.on("client", move || {
        ping(own.into()).expect("a socket for ICMP")
    }));
}
