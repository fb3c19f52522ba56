//! Who may begin a flow, how fast, and where a client returns to.

use lb_common::{
    backend::NO_BACKEND,
    service::{forward, scheduler},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, Service, TCP, UDP, Verdict, service, v4, v6},
    packet::{BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, CLIENT_2, Family, Packet, VIP, transport},
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Far more than a test takes, in ticks.
const LONG: u32 = 100_000;

fn from(family: Family, protocol: u8, client: IpAddr, port: u16) -> Packet {
    let packet = transport(family, protocol).from(client, port).to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet
    }
}

fn client(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => v4(net, host),
        Family::V6 => v6(net.into(), host.into()),
    }
}

/// The number of the backend that a packet went to; none if it was dropped.
fn place(balancer: &mut Balancer, packet: &Packet) -> u32 {
    let outcome = balancer.send(packet);
    let mut backends = outcome.counts.backends.keys();
    backends.next().copied().unwrap_or(NO_BACKEND)
}

fn three_backends(family: Family, protocol: u8) -> Service {
    service(family, protocol, VIP, 80)
        .backend(BACKEND_1, 8080, 1)
        .backend(BACKEND_2, 8080, 1)
        .backend(BACKEND_3, 8080, 1)
}

#[test]
fn a_client_returns_until_its_time_has_passed() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let one = three_backends(family, protocol).affinity(LONG, 128);
            let mut balancer = Balancer::new(vec![one]);
            let mut port = 1000;
            let mut next = |balancer: &mut Balancer, host| {
                port += 1;
                let packet = from(family, protocol, client(family, 3, host), port);
                place(balancer, &packet)
            };
            // In turn, since the scheduler is round robin.
            assert_eq!(
                (1..=3).map(|h| next(&mut balancer, h)).collect::<Vec<_>>(),
                [1, 2, 3]
            );
            for host in [3, 1, 2, 2, 1, 3] {
                assert_eq!(next(&mut balancer, host), u32::from(host), "it returns");
            }
            // Every flow begins the time anew.
            balancer.age_clients(LONG / 2);
            assert_eq!(next(&mut balancer, 2), 2);
            balancer.age_clients(LONG / 2);
            assert_eq!(next(&mut balancer, 2), 2);
            assert_eq!(
                next(&mut balancer, 3),
                1,
                "its time has passed, and it is this one's turn"
            );
            assert_eq!(next(&mut balancer, 3), 1, "there it stays");
        }
    }
}

#[test]
fn clients_behind_one_prefix_are_one_client() {
    for (family, mask, same, other) in [
        (Family::V4, 24, [(3, 1), (3, 254)], (4, 1)),
        (Family::V6, 64, [(3, 1), (3, 254)], (4, 1)),
    ] {
        let one = three_backends(family, UDP).affinity(LONG, mask);
        let mut balancer = Balancer::new(vec![one]);
        for (net, host) in same {
            let packet = from(family, UDP, client(family, net, host), 1);
            assert_eq!(place(&mut balancer, &packet), 1);
        }
        let packet = from(family, UDP, client(family, other.0, other.1), 1);
        assert_eq!(place(&mut balancer, &packet), 2, "another network");
    }
}

#[test]
fn a_client_whose_backend_takes_no_new_flows_gets_another_and_stays_there() {
    type Change = fn(&mut Service);
    let changes: [(&str, Change); 4] = [
        ("died", |s| s.backends[0].alive = false),
        ("drains", |s| s.backends[0].weight = 0),
        ("cannot be reached", |s| s.backends[0].resolved = false),
        ("is full", |s| s.backends[0].max_connections = 1),
    ];
    for (what, change) in changes {
        let one = three_backends(Family::V4, UDP).affinity(LONG, 32);
        let mut balancer = Balancer::new(vec![one]);
        let packet = |port| from(Family::V4, UDP, CLIENT.ip(Family::V4), port);
        assert_eq!(place(&mut balancer, &packet(1)), 1);
        balancer.change(1, change);
        let second = place(&mut balancer, &packet(2));
        assert!([2, 3].contains(&second), "the first one {what}: {second}");
        assert_eq!(
            place(&mut balancer, &packet(3)),
            second,
            "the first one {what}"
        );
    }
    // Its number is given to another backend.
    let one = three_backends(Family::V4, UDP).affinity(LONG, 32);
    let mut balancer = Balancer::new(vec![one]);
    let packet = |port| from(Family::V4, UDP, CLIENT.ip(Family::V4), port);
    assert_eq!(place(&mut balancer, &packet(1)), 1);
    balancer.replace_backend(1, 0);
    assert_eq!(place(&mut balancer, &packet(2)), 2, "the turn of the next");
}

#[test]
fn the_longest_prefix_decides_and_nothing_else_of_a_flow_is_asked() {
    for family in Family::BOTH {
        let (all, bits): (IpAddr, [u8; 3]) = match family {
            Family::V4 => (Ipv4Addr::UNSPECIFIED.into(), [0, 24, 32]),
            Family::V6 => (Ipv6Addr::UNSPECIFIED.into(), [0, 64, 128]),
        };
        let net = match family {
            Family::V4 => v4(3, 0),
            Family::V6 => v6(3, 0),
        };
        for protocol in [TCP, UDP] {
            let mut balancer = Balancer::new(vec![
                three_backends(family, protocol)
                    .access(all, bits[0], false)
                    .access(net, bits[1], true)
                    .access(client(family, 3, 7), bits[2], false),
                // No list of its own.
                service(family, protocol, VIP, 81).backend(BACKEND_1, 8080, 1),
            ]);
            for (net, host, allowed) in [(3, 1, true), (3, 7, false), (4, 1, false)] {
                let packet = from(family, protocol, client(family, net, host), 1);
                if allowed {
                    assert_ne!(place(&mut balancer, &packet), NO_BACKEND, "{net}.{host}");
                    continue;
                }
                let counts = Counts {
                    load: balancer.counts().load,
                    ..Counts::default()
                };
                let counts = counts.drop(DropReason::Denied, 1);
                balancer.check("a denied client", &packet, &Expected::Dropped, &counts);
                let elsewhere = packet.to(VIP, 81);
                assert_ne!(
                    place(&mut balancer, &elsewhere),
                    NO_BACKEND,
                    "another service"
                );
            }
        }
    }
}

#[test]
fn thousands_of_prefixes_each_find_their_clients() {
    const MANY: u16 = 4000;
    let mut one = three_backends(Family::V4, UDP);
    for n in 0..MANY {
        let [high, low] = n.to_be_bytes();
        one = one.access(Ipv4Addr::new(10, high, low, 0).into(), 24, n % 2 == 0);
    }
    one = one.access(Ipv4Addr::new(10, 0, 0, 0).into(), 8, false);
    let mut balancer = Balancer::new(vec![one]);
    for n in (0..MANY).step_by(97).chain([MANY - 1]) {
        let [high, low] = n.to_be_bytes();
        let packet = from(Family::V4, UDP, Ipv4Addr::new(10, high, low, 9).into(), 1);
        let allowed = balancer.send(&packet).verdict == Verdict::Tx;
        assert_eq!(allowed, n % 2 == 0, "10.{high}.{low}.9");
    }
    let packet = from(Family::V4, UDP, Ipv4Addr::new(10, 200, 0, 1).into(), 1);
    assert_eq!(
        balancer.send(&packet).verdict,
        Verdict::Drop,
        "only the shortest holds it"
    );
}

#[test]
fn a_client_begins_no_more_than_its_rate() {
    const RATE: u16 = 20;
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let one = three_backends(family, protocol).source_rate(RATE.into());
            let mut balancer = Balancer::new(vec![one]);
            let started = std::time::Instant::now();
            let mut placed = 0;
            let mut limited = 0;
            for port in 0..3 * RATE {
                let packet = from(family, protocol, CLIENT.ip(family), 1000 + port);
                let outcome = balancer.send(&packet);
                if outcome.verdict == Verdict::Tx {
                    placed += 1;
                } else {
                    assert_eq!(outcome.counts.drops.get("rate_limited"), Some(&1));
                    limited += 1;
                }
            }
            // A burst of one second's worth, and what the time since has added.
            let most = u128::from(RATE) * (1000 + started.elapsed().as_millis() + 20) / 1000;
            assert!(
                (u128::from(RATE)..=most).contains(&placed),
                "{placed} of at most {most}"
            );
            assert!(limited > 0);
            let packet = from(family, protocol, CLIENT_2.ip(family), 1);
            assert_ne!(place(&mut balancer, &packet), NO_BACKEND, "another client");
            // A flow that is there goes on.
            let packet = from(family, protocol, CLIENT.ip(family), 1000);
            assert_ne!(place(&mut balancer, &packet), NO_BACKEND);
            // Time lets it begin more.
            let deadline = started + std::time::Duration::from_secs(10);
            let mut port = 5000;
            while place(
                &mut balancer,
                &from(family, protocol, CLIENT.ip(family), port),
            ) == NO_BACKEND
            {
                assert!(std::time::Instant::now() < deadline, "limited for ever");
                port += 1;
            }
        }
    }
}

/// Where no flow is recorded there is nothing to tell a new one by but its SYN.
#[test]
fn a_stateless_service_asks_for_each_syn_and_each_datagram() {
    for mode in [forward::DSR, forward::IPIP, forward::GUE] {
        for family in Family::BOTH {
            let denied = CLIENT_2.ip(family);
            let bits = if family == Family::V4 { 32 } else { 128 };
            let one = |protocol| {
                service(family, protocol, VIP, 80)
                    .forward(mode)
                    .scheduler(scheduler::MAGLEV)
                    .stateless()
                    .backend(BACKEND_1, 80, 1)
                    .access(denied, bits, false)
            };
            let mut balancer = Balancer::new(vec![one(TCP), one(UDP)]);
            for protocol in [TCP, UDP] {
                let number = if protocol == TCP { 1 } else { 2 };
                let good = from(family, protocol, CLIENT.ip(family), 1);
                assert_eq!(place(&mut balancer, &good), number);
                let bad = from(family, protocol, denied, 1);
                let counts = Counts::default().drop(DropReason::Denied, number);
                balancer.check("a denied client", &bad, &Expected::Dropped, &counts);
            }
            let later = transport(family, TCP).from(denied, 1).to(VIP, 80).ack();
            assert_eq!(
                place(&mut balancer, &later),
                1,
                "what is no SYN belongs to a flow"
            );
        }
    }
}
