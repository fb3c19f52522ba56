//! The flow table when it is full: whom it gives up, and that nothing is left of them.

use lb_common::service::{forward, scheduler};
use sluice_tests::{
    harness::{Balancer, FlowEntry, Service, TCP, UDP, Verdict, service, v4, v6},
    oracle,
    packet::{BACKEND_1, BACKEND_2, Family, Packet, VIP, reply, transport},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Entries of a table of two sets.
const PLACES: usize = 16;

fn client(family: Family, n: u16) -> IpAddr {
    match family {
        Family::V4 => v4(5 + (n / 250) as u8, (n % 250) as u8 + 1),
        Family::V6 => v6(5, n + 1),
    }
}

fn from_client(family: Family, protocol: u8, n: u16) -> Packet {
    transport(family, protocol)
        .from(client(family, n), 10_000 + n)
        .to(VIP, 80)
}

/// A balancer with a table of so many sets.
fn balancer(family: Family, protocol: u8, mode: u8, sets: u32) -> Balancer {
    let mut balancer = Balancer::new(services(family, protocol, mode));
    balancer.set_flow_sets(sets);
    balancer
}

fn services(family: Family, protocol: u8, mode: u8) -> Vec<Service> {
    let port = if forward::translates(mode) { 8080 } else { 80 };
    vec![
        service(family, protocol, VIP, 80)
            .forward(mode)
            .scheduler(scheduler::ROUND_ROBIN)
            .backend(BACKEND_1, port, 1)
            .backend(BACKEND_2, port, 1),
    ]
}

/// The handshake of connection `n` in `nat`; the backend's port on the balancer, and the backend's MAC address.
fn connect(balancer: &mut Balancer, family: Family, n: u16) -> (u16, Vec<u8>) {
    let (verdict, frame) = balancer.run_uncounted(&from_client(family, TCP, n).syn().build());
    assert_eq!(verdict, Verdict::Tx, "SYN {n}");
    let (port, _) = oracle::ports(&frame).expect("ports");
    let mac = frame[..6].to_vec();
    let answer = answer(family, port, &mac);
    let (verdict, _) = balancer.run_uncounted(&answer.syn().ack().build());
    assert_eq!(verdict, Verdict::Tx, "SYN-ACK {n}");
    let (verdict, _) = balancer.run_uncounted(&from_client(family, TCP, n).ack().build());
    assert_eq!(verdict, Verdict::Tx, "ACK {n}");
    (port, mac)
}

fn answer(family: Family, port: u16, mac: &[u8]) -> Packet {
    let backends = [BACKEND_1, BACKEND_2];
    let backend = backends.into_iter().find(|b| mac == b.mac);
    reply(family, TCP, backend.expect("a backend"), 8080, port)
}

/// Number of clients' entries, and the sum of connections that the backends count.
fn counted(balancer: &Balancer, family: Family) -> (u64, u64) {
    let flows = balancer.flows(family);
    let clients = flows.iter().filter(|flow| !flow.from_backend).count();
    let load = [1, 2].map(|n| balancer.load_of(n));
    let sum = load.iter().map(|load| load.recorded()).sum();
    (clients as u64, sum)
}

/// Both directions of every flow are there.
fn assert_whole(flows: &[FlowEntry]) {
    let keys: BTreeMap<_, _> = flows
        .iter()
        .map(|flow| ((flow.src, flow.dst), (flow.out_dst, flow.out_src)))
        .collect();
    assert_eq!(keys.len(), flows.len(), "no key is there twice");
    for (key, opposite) in &keys {
        assert_eq!(keys.get(opposite), Some(key), "{key:?} has both directions");
    }
}

#[test]
fn a_flood_of_syns_pushes_out_its_own_and_no_connection() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, TCP, forward::NAT, 2);
        let before = balancer.displaced();
        // Six entries, so that even if all are in one set that has room for two more.
        let connections: Vec<_> = (0..3).map(|n| connect(&mut balancer, family, n)).collect();
        // Ten minutes ago.
        balancer.age_flows(600_000);
        let mut sent = 0;
        for n in 100..600 {
            let (verdict, _) = balancer.run_uncounted(&from_client(family, TCP, n).syn().build());
            sent += u64::from(verdict == Verdict::Tx);
        }
        assert_eq!(sent, 500, "every SYN finds room");
        for (n, (port, mac)) in (0..).zip(&connections) {
            let ask = from_client(family, TCP, n).ack().build();
            let (verdict, frame) = balancer.run_uncounted(&ask);
            assert_eq!(verdict, Verdict::Tx, "connection {n} lives");
            assert_eq!(oracle::ports(&frame).expect("ports").0, *port);
            let answer = answer(family, *port, mac).ack().build();
            assert_eq!(balancer.run_uncounted(&answer).0, Verdict::Tx, "answer {n}");
        }
        let flows = balancer.flows(family);
        assert!(flows.len() <= PLACES, "{}", flows.len());
        assert!(flows.len() > PLACES / 2, "{}", flows.len());
        assert_whole(&flows);
        assert_eq!(balancer.displaced(), before, "nobody misses who had to go");
        let (clients, counted) = counted(&balancer, family);
        assert_eq!(clients, counted, "who had to go is not counted any more");
    }
}

#[test]
fn of_equals_the_one_that_was_silent_longest_goes() {
    for family in Family::BOTH {
        // One entry for each flow, and one set.
        let mut balancer = balancer(family, UDP, forward::DSR, 1);
        let before = balancer.displaced();
        for n in 0..8 {
            balancer.run_uncounted(&from_client(family, UDP, n).build());
            balancer.age_flows(200);
        }
        // The first one speaks again, so the second is the oldest.
        balancer.run_uncounted(&from_client(family, UDP, 0).build());
        for (n, gone) in [(8, 1), (9, 2)] {
            balancer.run_uncounted(&from_client(family, UDP, n).build());
            assert_eq!(balancer.displaced() - before, u64::from(n) - 7);
            let sources: BTreeSet<_> = balancer.flows(family).iter().map(|f| f.src.0).collect();
            assert_eq!(sources.len(), 8);
            assert!(!sources.contains(&client(family, gone)), "{gone} had to go");
            assert!(sources.contains(&client(family, 0)));
            assert!(sources.contains(&client(family, n)));
        }
    }
}

#[test]
fn a_full_table_keeps_its_counts_true_with_several_cpus() {
    for (family, protocol, mode) in [
        (Family::V4, TCP, forward::NAT),
        (Family::V6, TCP, forward::NAT),
        (Family::V4, UDP, forward::DNAT),
        (Family::V6, UDP, forward::DSR),
    ] {
        // So few entries that the CPUs meet in them all the time.
        let mut balancer = balancer(family, protocol, mode, 3);
        crowd(&mut balancer, family, protocol);
    }
}

/// The program is another one there, in how entries are filled.
#[test]
fn so_it_does_where_stores_are_seen_in_any_order() {
    for family in Family::BOTH {
        let services = services(family, TCP, forward::NAT);
        let mut balancer = Balancer::with_stores_in_any_order(services);
        balancer.set_flow_sets(3);
        crowd(&mut balancer, family, TCP);
        balancer.discard();
    }
}

/// Several CPUs begin flows at once, many of them the same, in a table of three sets.
fn crowd(balancer: &mut Balancer, family: Family, protocol: u8) {
    let lists: Vec<Vec<_>> = (0..4_u16)
        .map(|cpu| {
            let packet = |n: u16| from_client(family, protocol, (cpu % 2) * 200 + n % 300);
            (0..3000)
                .map(|n| {
                    if protocol == TCP {
                        packet(n).syn()
                    } else {
                        packet(n)
                    }
                })
                .map(|packet| packet.build())
                .collect()
        })
        .collect();
    let results = balancer.run_parallel(&lists);
    let sent = results.iter().flatten().filter(|r| r.0 == Verdict::Tx);
    assert!(sent.count() > 6000, "most find room");
    let flows = balancer.flows(family);
    let keys: BTreeSet<_> = flows.iter().map(|f| (f.src, f.dst)).collect();
    assert_eq!(keys.len(), flows.len(), "no key is there twice");
    let (clients, counted) = counted(balancer, family);
    assert_eq!(clients, counted, "what is counted is what is there");
    // Nothing is lost of the table itself: it takes as many new flows as it has entries. Both entries
    // of a flow that has to go are removed, so it is not always full.
    balancer.reset();
    let mut most = 0;
    for n in 1000..1100 {
        let packet = from_client(family, protocol, n);
        let packet = if protocol == TCP {
            packet.syn()
        } else {
            packet
        };
        assert_eq!(balancer.run_uncounted(&packet.build()).0, Verdict::Tx);
        most = most.max(balancer.flows(family).len());
    }
    assert!(most > 3 * 8 - 3, "{most} of 24 entries");
}

#[test]
fn in_nat_answers_are_recorded_beside_their_clients() {
    const SETS: u32 = 512;
    for family in Family::BOTH {
        let services = vec![service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1)];
        // What the daemon takes if it is not told.
        let mut balancer = Balancer::with_ports(services, (1024, 32767));
        balancer.set_flow_sets(SETS);
        for n in 0..200 {
            let syn = from_client(family, TCP, n).syn().build();
            assert_eq!(balancer.run_uncounted(&syn).0, Verdict::Tx);
        }
        let placed = balancer.placed(family);
        let set_of: BTreeMap<_, _> = placed.iter().map(|(s, f)| ((f.src, f.dst), *s)).collect();
        let clients = placed.iter().filter(|(_, flow)| !flow.from_backend);
        let beside = clients
            .filter(|(set, flow)| set_of[&(flow.out_dst, flow.out_src)] == (set + 1) % SETS)
            .count();
        // But for those whose port another has, or that find their set crowded.
        assert!(beside > 180, "{beside} of 200");
    }
}
