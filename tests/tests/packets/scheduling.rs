//! Which backend a new flow gets.

use lb_common::{
    addr::from_ip,
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend, Load, Slot},
    filter,
    service::{Service, ServiceKey, forward, on_no_backend, scheduler},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service, v4, v6},
    packet::{
        BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, Family, Host, Packet, VIP, reset_for, tcp, udp,
    },
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

/// A connection from a client of its own; the number of the backend it went to.
fn connect(balancer: &mut Balancer, family: Family, n: u16) -> u32 {
    let from = client(family, n);
    place(
        balancer,
        &tcp(family).from(from, 1000 + n).to(VIP, 80).syn(),
    )
}

fn held(balancer: &Balancer, backends: u32) -> Vec<u64> {
    let load = |n| balancer.counts().load.get(&n).copied().unwrap_or((0, 0));
    (1..=backends).map(|n| load(n).0 + load(n).1).collect()
}

#[test]
fn least_connections_evens_out_what_backends_hold() {
    for family in Family::BOTH {
        let backends = [(BACKEND_1, 1), (BACKEND_2, 1), (BACKEND_3, 1)];
        let mut balancer = balancer(family, TCP, scheduler::LEAST_CONNECTIONS, &backends);
        for n in 0..9 {
            connect(&mut balancer, family, n);
        }
        assert_eq!(held(&balancer, 3), [3, 3, 3], "nine over three");

        // The connections of the first backend end: it gets the next ones until it is even again.
        for flow in balancer.flows(family) {
            if flow.backend == 1 && !flow.from_backend {
                balancer.send(&tcp(family).from(flow.src.0, flow.src.1).to(VIP, 80).rst());
            }
        }
        for n in 100..103 {
            assert_eq!(connect(&mut balancer, family, n), 1, "it holds none");
        }
        let next: std::collections::BTreeSet<u32> = (103..106)
            .map(|n| connect(&mut balancer, family, n))
            .collect();
        assert_eq!(next.len(), 3, "among equals each has its turn");
    }
}

#[test]
fn least_connections_follows_the_weights() {
    let backends = [(BACKEND_1, 6), (BACKEND_2, 4)];
    let mut balancer = balancer(Family::V4, TCP, scheduler::LEAST_CONNECTIONS, &backends);
    for n in 0..100 {
        connect(&mut balancer, Family::V4, n);
    }
    assert_eq!(held(&balancer, 2), [60, 40]);
}

/// A look at each of a thousand, and more: no step is left out.
#[test]
fn least_connections_looks_at_a_thousand_backends() {
    const MANY: u32 = 1200;
    let limits = sluice::config::Limits {
        flows: 4096,
        services: 4,
        backends: MANY,
        slots: 4096,
        ..sluice::config::Limits::DEFAULT
    };
    let settings = lb_common::abi::Settings {
        nat_port_first: 20000,
        nat_port_last: 29999,
        ..bytemuck::Zeroable::zeroed()
    };
    let dataplane = sluice::dataplane::Dataplane::load_unpinned(&limits, settings).unwrap();
    let maps = &dataplane.maps;
    let vip = from_ip(VIP.ip(Family::V4))[0];
    let (element, shift) = filter::place(filter::lane_of(vip));
    maps.address_filter.atomic_u64(element, 0).store(
        u64::from(filter::LANE_VIP) << shift,
        std::sync::atomic::Ordering::Relaxed,
    );
    let mut slots = Vec::new();
    for number in 1..=MANY {
        let [_, _, high, low] = number.to_be_bytes();
        let backend = Backend {
            addr: from_ip(IpAddr::from([198, 18, high, low])),
            service: 1,
            generation: 1,
            port: 80_u16.to_be(),
            ifindex: 1,
            family: lb_common::addr::FAMILY_V4,
            flags: BACKEND_ALIVE | BACKEND_RESOLVED,
            ..bytemuck::Zeroable::zeroed()
        };
        maps.backends.store(number, backend);
        let load = Load {
            begun: 5,
            weight: 1,
            ..bytemuck::Zeroable::zeroed()
        };
        maps.backend_load.store(number, load);
        slots.push(Slot::settled(number));
    }
    maps.slots.write_slice(0, &slots);
    let members = Service::pack_table(0, MANY);
    let service = Service {
        table: members,
        members,
        forward: forward::DSR,
        scheduler: scheduler::LEAST_CONNECTIONS,
        ..bytemuck::Zeroable::zeroed()
    };
    maps.services.store(1, service);
    maps.services4
        .insert(&ServiceKey::new(vip, 80_u16.to_be(), TCP), 1)
        .unwrap();
    for lonely in [1, 2, 600, MANY - 1, MANY] {
        let begun = maps
            .backend_load
            .atomic_u64(lonely, std::mem::offset_of!(Load, begun));
        begun.store(4, std::sync::atomic::Ordering::Relaxed);
        let packet = tcp(Family::V4)
            .from(CLIENT, lonely as u16)
            .to(VIP, 80)
            .syn();
        dataplane.test_run(&packet.build(), 1, 1).unwrap();
        assert_eq!(
            maps.backend_load.read(lonely).begun,
            5,
            "backend {lonely} held one less than the others"
        );
    }
}

#[test]
fn random_prefers_the_backend_that_holds_less_and_follows_the_weights() {
    let backends = [(BACKEND_1, 1), (BACKEND_2, 2), (BACKEND_3, 1)];
    let mut balancer = balancer(Family::V4, TCP, scheduler::RANDOM, &backends);
    for n in 0..800 {
        connect(&mut balancer, Family::V4, n);
    }
    let held = held(&balancer, 3);
    // Two choices keep the difference at a few connections, where one would leave a standard
    // deviation of 13.
    for (held, expected) in held.iter().zip([200, 400, 200]) {
        assert!(held.abs_diff(expected) < 20, "{held:?} of {expected}");
    }
}

#[test]
fn a_full_backend_is_passed_over() {
    for scheduler in [
        scheduler::ROUND_ROBIN,
        scheduler::MAGLEV,
        scheduler::SOURCE_HASH,
        scheduler::LEAST_CONNECTIONS,
        scheduler::RANDOM,
    ] {
        for family in Family::BOTH {
            let backends = [(BACKEND_1, 5), (BACKEND_2, 1), (BACKEND_3, 1)];
            let mut balancer = balancer(family, TCP, scheduler, &backends);
            balancer.change(1, |s| {
                for (backend, most) in s.backends.iter_mut().zip([2, 3, 4]) {
                    backend.max_connections = most;
                }
            });
            for n in 0..9 {
                connect(&mut balancer, family, n);
            }
            assert_eq!(held(&balancer, 3), [2, 3, 4], "scheduler {scheduler}");
            let packet = tcp(family).from(CLIENT, 9).to(VIP, 80).syn();
            let counts = Counts {
                load: balancer.counts().load,
                ..Counts::default()
            };
            balancer.check(
                "with all of them full",
                &packet,
                &Expected::sent(&reset_for(&packet)),
                &counts.drop(DropReason::BackendFull, 1),
            );
            // One ends, and its place is taken.
            let flows = balancer.flows(family);
            let one = flows
                .iter()
                .find(|f| f.backend == 2 && !f.from_backend)
                .expect("the second backend has flows");
            balancer.send(&tcp(family).from(one.src.0, one.src.1).to(VIP, 80).rst());
            assert_eq!(
                connect(&mut balancer, family, 300),
                2,
                "the only one with room"
            );
        }
    }
}

#[test]
fn what_meets_only_full_backends_is_treated_as_on_no_backend_says() {
    for (what, expected) in [
        (on_no_backend::DROP, Expected::Dropped),
        (on_no_backend::PASS, Expected::Passed),
    ] {
        let mut balancer = balancer(Family::V4, UDP, scheduler::MAGLEV, &[(BACKEND_1, 1)]);
        balancer.change(1, |s| {
            s.on_no_backend = what;
            s.backends[0].max_connections = 1;
        });
        place(&mut balancer, &udp(Family::V4).from(CLIENT, 1).to(VIP, 80));
        let packet = udp(Family::V4).from(CLIENT, 2).to(VIP, 80);
        let counts = Counts::default().load(1, 1, 0);
        let counts = match what {
            on_no_backend::PASS => counts,
            _ => counts.drop(DropReason::BackendFull, 1),
        };
        balancer.check("a second flow", &packet, &expected, &counts);
    }
}
