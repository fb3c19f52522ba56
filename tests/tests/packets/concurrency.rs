//! Several CPUs at once: what is shared between them stays true.

use lb_common::service::scheduler;
use sluice_tests::{
    harness::{Balancer, TCP, UDP, Verdict, service, v4, v6},
    oracle,
    packet::{BACKEND_1, BACKEND_2, Family, Packet, VIP, reply, transport},
};
use std::{collections::BTreeSet, net::IpAddr};

const CPUS: usize = 4;
const EACH: usize = 400;

fn client(family: Family, cpu: usize) -> IpAddr {
    match family {
        Family::V4 => v4(5, cpu as u8 + 1),
        Family::V6 => v6(5, cpu as u16 + 1),
    }
}

fn first_packet(family: Family, protocol: u8, cpu: usize, n: usize) -> Packet {
    let packet = transport(family, protocol)
        .from(client(family, cpu), 1024 + n as u16)
        .to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet
    }
}

fn lists(make: impl Fn(usize, usize) -> Packet) -> Vec<Vec<Vec<u8>>> {
    (0..CPUS)
        .map(|cpu| (0..EACH).map(|n| make(cpu, n).build()).collect())
        .collect()
}

#[test]
fn round_robin_ports_and_counters_are_exact_across_cpus() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = Balancer::new(vec![
                service(family, protocol, VIP, 80)
                    .backend(BACKEND_1, 8080, 3)
                    .backend(BACKEND_2, 8080, 1),
            ]);
            let before = balancer.counts();
            let results =
                balancer.run_parallel(&lists(|cpu, n| first_packet(family, protocol, cpu, n)));
            let mut taken = BTreeSet::new();
            for (verdict, frame) in results.iter().flatten() {
                assert_eq!(*verdict, Verdict::Tx);
                // Bytes 0 to 5 are the backend's MAC address.
                let ports = oracle::ports(frame).expect("ports");
                assert!(
                    taken.insert((frame[..6].to_vec(), ports)),
                    "{ports:?} twice"
                );
            }
            let counts = balancer.counts().since(&before);
            let total = (CPUS * EACH) as u64;
            assert_eq!(counts.services[&1].connections, total);
            assert_eq!(counts.services[&1].packets_in, total);
            assert_eq!(
                counts.backends[&1].connections,
                total * 3 / 4,
                "weight 3 of 4"
            );
            assert_eq!(counts.backends[&2].connections, total / 4, "weight 1 of 4");
            let load = |n: u64| if protocol == TCP { (0, n) } else { (n, 0) };
            assert_eq!(counts.load[&1], load(total * 3 / 4));
            assert_eq!(counts.load[&2], load(total / 4));
            assert_eq!(balancer.flows(family).len() as u64, 2 * total);
            assert!(counts.drops.is_empty(), "{:?}", counts.drops);
        }
    }
}

/// All CPUs see every packet of the same flows, as after a change of receive queues.
#[test]
fn the_same_flows_on_all_cpus_are_counted_once() {
    const FLOWS: usize = 100;
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, TCP, VIP, 80)
                .scheduler(scheduler::MAGLEV)
                .backend(BACKEND_1, 8080, 1),
        ]);
        let before = balancer.counts();
        let syn = |_: usize, n: usize| first_packet(family, TCP, 0, n % FLOWS);
        let results = balancer.run_parallel(&lists(syn));
        let mut ports = vec![BTreeSet::new(); FLOWS];
        let mut refused = 0;
        for list in &results {
            for (n, (verdict, frame)) in list.iter().enumerate() {
                if *verdict == Verdict::Drop {
                    refused += 1;
                    continue;
                }
                assert_eq!(*verdict, Verdict::Tx);
                ports[n % FLOWS].insert(oracle::ports(frame).expect("ports").0);
            }
        }
        for (n, ports) in ports.iter().enumerate() {
            assert_eq!(ports.len(), 1, "flow {n} has one source port: {ports:?}");
        }
        let counts = balancer.counts().since(&before);
        // Of two CPUs that begin the same flow at once one wins; the loser's packet is dropped and
        // counted, and its sender repeats it.
        assert_eq!(
            counts.drops.get("table_full").copied().unwrap_or(0),
            refused
        );
        assert_eq!(counts.services[&1].connections, FLOWS as u64);
        assert_eq!(counts.load[&1], (0, FLOWS as u64));
        assert_eq!(
            balancer.flows(family).len(),
            2 * FLOWS,
            "nothing is left over"
        );

        // Every CPU sees the same handshake, data and end: one connection each.
        let of = |n: usize| *ports[n].first().expect("a port");
        type Step<'a> = (&'a str, Box<dyn Fn(usize) -> Packet + 'a>, (u64, u64));
        let answer = |n: usize| reply(family, TCP, BACKEND_1, 8080, of(n));
        let ask = |n: usize| {
            transport(family, TCP)
                .from(client(family, 0), 1024 + n as u16)
                .to(VIP, 80)
        };
        let all = FLOWS as u64;
        let steps: Vec<Step> = vec![
            ("SYN-ACK", Box::new(|n| answer(n).syn().ack()), (0, all)),
            ("ACK", Box::new(|n| ask(n).ack()), (all, 0)),
            ("FIN", Box::new(|n| answer(n).fin().ack()), (0, all)),
            ("RST", Box::new(|n| ask(n).rst()), (0, all)),
        ];
        for (what, make, load) in steps {
            for (verdict, _) in balancer
                .run_parallel(&lists(|_, n| make(n % FLOWS)))
                .iter()
                .flatten()
            {
                assert_eq!(*verdict, Verdict::Tx, "{what}");
            }
            assert_eq!(balancer.counts().load[&1], load, "{what}");
        }
    }
}

/// Two CPUs that look at the same time may pick the same backend, so each may be off by one.
#[test]
fn least_connections_and_limits_hold_for_all_cpus_together() {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let syns = || lists(|cpu, n| first_packet(Family::V4, TCP, cpu, n));
    let total = (CPUS * EACH) as u64;

    let mut balancer = Balancer::new(vec![
        service(Family::V4, TCP, VIP, 80)
            .scheduler(scheduler::LEAST_CONNECTIONS)
            .backend(BACKEND_1, 8080, 3)
            .backend(BACKEND_2, 8080, 1),
    ]);
    balancer.run_parallel(&syns());
    let load = balancer.counts().load;
    assert_eq!(load[&1].1 + load[&2].1, total);
    assert!(load[&1].1.abs_diff(total * 3 / 4) <= cpus, "{load:?}");

    let most = 100;
    let mut balancer = Balancer::new(vec![
        service(Family::V4, TCP, VIP, 80)
            .backend(BACKEND_1, 8080, 1)
            .last(|b| b.max_connections = most)
            .backend(BACKEND_2, 8080, 1)
            .last(|b| b.max_connections = most),
    ]);
    let before = balancer.counts();
    balancer.run_parallel(&syns());
    let counts = balancer.counts().since(&before);
    let held = counts.load[&1].1 + counts.load[&2].1;
    let most = u64::from(most);
    for load in counts.load.values() {
        assert!((most..most + cpus).contains(&load.1), "{:?}", counts.load);
    }
    assert_eq!(counts.drops["backend_full"], total - held);
}
