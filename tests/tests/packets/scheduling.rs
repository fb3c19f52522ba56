//! Which backend a new flow gets.

use lb_common::service::scheduler;
use sluice_tests::{
    harness::{Balancer, TCP, UDP, Verdict, service, v4, v6},
    packet::{BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, Family, Host, Packet, VIP, tcp, udp},
};
use std::{collections::BTreeMap, net::IpAddr};

fn balancer(family: Family, protocol: u8, scheduler: u8, backends: &[(Host, u32)]) -> Balancer {
    let service = backends.iter().fold(
        service(family, protocol, VIP, 80).scheduler(scheduler),
        |s, (host, weight)| s.backend(*host, 8080, *weight),
    );
    Balancer::new(vec![service])
}

/// The backend a packet was sent to.
#[track_caller]
fn place(balancer: &mut Balancer, packet: &Packet) -> u32 {
    let outcome = balancer.send(packet);
    assert_eq!(outcome.verdict, Verdict::Tx, "{:?}", outcome.counts);
    assert_eq!(
        outcome.counts.backends.len(),
        1,
        "one backend for one packet"
    );
    *outcome.counts.backends.keys().next().expect("one backend")
}

fn client(family: Family, n: u16) -> IpAddr {
    match family {
        Family::V4 => v4(3 + (n / 250) as u8, (n % 250) as u8 + 1),
        Family::V6 => v6(3, n + 1),
    }
}

#[test]
fn round_robin_is_exact_and_smooth() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(
                family,
                protocol,
                scheduler::ROUND_ROBIN,
                &[(BACKEND_1, 6), (BACKEND_2, 4)],
            );
            let mut sequence = Vec::new();
            for n in 0..100 {
                let packet = if protocol == TCP {
                    tcp(family).syn()
                } else {
                    udp(family)
                };
                sequence.push(place(
                    &mut balancer,
                    &packet.from(CLIENT, 1000 + n).to(VIP, 80),
                ));
            }
            let to_first = sequence.iter().filter(|b| **b == 1).count();
            assert_eq!(to_first, 60, "60 of 100 for weight 6 of 10: {sequence:?}");
            // In every stretch of ten each backend has its share, and nobody waits for long.
            for ten in sequence.chunks(10) {
                assert_eq!(ten.iter().filter(|b| **b == 1).count(), 6, "{ten:?}");
            }
            assert!(
                !sequence
                    .windows(3)
                    .any(|w| w == [1, 1, 1] || w == [2, 2, 2]),
                "nobody three times in a row: {sequence:?}"
            );
        }
    }
}

#[test]
fn packets_of_a_flow_do_not_take_a_turn() {
    let mut balancer = balancer(
        Family::V4,
        UDP,
        scheduler::ROUND_ROBIN,
        &[(BACKEND_1, 1), (BACKEND_2, 1)],
    );
    let flow = |port| udp(Family::V4).from(CLIENT, port).to(VIP, 80);
    assert_eq!(place(&mut balancer, &flow(1)), 1);
    for _ in 0..5 {
        assert_eq!(place(&mut balancer, &flow(1)), 1);
    }
    assert_eq!(place(&mut balancer, &flow(2)), 2);
    assert_eq!(place(&mut balancer, &flow(3)), 1);
}

#[test]
fn maglev_places_a_flow_always_the_same_and_spreads_by_weight() {
    for family in Family::BOTH {
        let backends = [(BACKEND_1, 1), (BACKEND_2, 1), (BACKEND_3, 2)];
        let mut balancer = balancer(family, TCP, scheduler::MAGLEV, &backends);
        let flow = |n: u16| {
            tcp(family)
                .from(client(family, n / 10), 1024 + n * 7)
                .to(VIP, 80)
                .syn()
        };
        let mut first = Vec::new();
        let mut share: BTreeMap<u32, u32> = BTreeMap::new();
        for n in 0..2000 {
            let backend = place(&mut balancer, &flow(n));
            *share.entry(backend).or_default() += 1;
            first.push(backend);
        }
        // The expected shares are 500, 500 and 1000; their standard deviation is about 20.
        for (backend, expected) in [(1, 500), (2, 500), (3, 1000)] {
            let got = share[&backend];
            assert!(
                got.abs_diff(expected) < 110,
                "{family:?}: backend {backend} has {got} flows, about {expected} expected"
            );
        }
        // Flows forgotten, and another balancer with the same configuration: the same places.
        let mut twin = Balancer::new(balancer.services.clone());
        balancer.reset();
        for n in 0..2000 {
            assert_eq!(place(&mut balancer, &flow(n)), first[usize::from(n)]);
            if n % 10 == 0 {
                assert_eq!(place(&mut twin, &flow(n)), first[usize::from(n)]);
            }
        }
    }
}

#[test]
fn maglev_tells_ports_and_protocols_apart() {
    let mut balancer = balancer(
        Family::V4,
        UDP,
        scheduler::MAGLEV,
        &[(BACKEND_1, 1), (BACKEND_2, 1)],
    );
    let seen: std::collections::BTreeSet<u32> = (0..64)
        .map(|n| {
            place(
                &mut balancer,
                &udp(Family::V4).from(CLIENT, 5000 + n).to(VIP, 80),
            )
        })
        .collect();
    assert_eq!(
        seen.len(),
        2,
        "one client's flows spread over both backends"
    );
}

#[test]
fn source_hash_keeps_a_client_and_spreads_clients() {
    for family in Family::BOTH {
        let mut balancer = balancer(
            family,
            TCP,
            scheduler::SOURCE_HASH,
            &[(BACKEND_1, 1), (BACKEND_2, 3)],
        );
        let mut share: BTreeMap<u32, u32> = BTreeMap::new();
        for n in 0..800 {
            let from = |port| tcp(family).from(client(family, n), port).to(VIP, 80).syn();
            let backend = place(&mut balancer, &from(1));
            *share.entry(backend).or_default() += 1;
            if n % 10 == 0 {
                for port in [2, 40000, 65535] {
                    assert_eq!(place(&mut balancer, &from(port)), backend, "client {n}");
                }
            }
        }
        // 200 and 600 expected, with a standard deviation of 12.
        assert!(
            share[&1].abs_diff(200) < 70,
            "{family:?}: a quarter of the weight has {share:?} of 800 clients"
        );
    }
}

#[test]
fn a_backend_of_weight_zero_keeps_its_flows_and_gets_no_new_ones() {
    for scheduler in [
        scheduler::ROUND_ROBIN,
        scheduler::MAGLEV,
        scheduler::SOURCE_HASH,
    ] {
        let mut balancer = balancer(
            Family::V4,
            UDP,
            scheduler,
            &[(BACKEND_1, 1), (BACKEND_2, 1)],
        );
        let flow = |port| {
            udp(Family::V4)
                .from(client(Family::V4, port % 40), port)
                .to(VIP, 80)
        };
        let kept = (1..100)
            .find(|port| place(&mut balancer, &flow(*port)) == 1)
            .expect("some flow goes to the first backend");
        balancer.change(1, |s| s.backends[0].weight = 0);
        assert_eq!(place(&mut balancer, &flow(kept)), 1, "the flow is kept");
        for port in 200..260 {
            assert_eq!(
                place(&mut balancer, &flow(port)),
                2,
                "new flows go elsewhere"
            );
        }
    }
}
