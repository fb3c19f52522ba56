//! Packets that cannot be forwarded: dropped, refused with RST or passed, always counted.

use lb_common::{
    service::{forward, on_no_backend},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, BACKEND_2, CLIENT, CLIENT_2, DESTINATION_OPTIONS, Family, Packet, VIP,
        reset_for, tcp, udp,
    },
};

fn to_vip(family: Family) -> Packet {
    tcp(family).from(CLIENT, 40000).to(VIP, 80)
}

#[test]
fn a_segment_of_no_known_flow_is_answered_with_rst() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
        ]);
        let data = || to_vip(family).ack().psh().payload(*b"in the middle");
        let cases: Vec<(&str, Packet)> = vec![
            ("ACK", to_vip(family).ack()),
            ("data", data()),
            ("FIN and ACK", to_vip(family).fin().ack()),
            ("SYN and ACK", to_vip(family).syn().ack()),
            ("FIN without ACK", to_vip(family).fin().payload(*b"abc")),
            ("SYN and FIN", to_vip(family).syn().fin()),
            ("no flags", to_vip(family).payload(*b"null scan")),
            (
                "sequence numbers wrap",
                to_vip(family).seq(0xffff_fffe).fin().payload(*b"abcd"),
            ),
            ("padding", to_vip(family).ack().trailer([0; 6])),
            ("VLAN", data().vlan(0x8100, 7)),
            ("two VLANs", data().vlan(0x88a8, 7).vlan(0x8100, 9)),
            ("1460 bytes", to_vip(family).ack().payload(vec![1; 1460])),
        ];
        for (what, sent) in cases {
            balancer.check(
                &format!("{family:?}: {what}"),
                &sent,
                &Expected::sent(&reset_for(&sent)),
                &Counts::default().drop(DropReason::NoFlow, 1),
            );
        }
        assert!(balancer.flows(family).is_empty());
    }
}

#[test]
fn the_rst_has_no_options_or_extension_headers() {
    let mut v4 = Balancer::new(vec![
        service(Family::V4, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
    ]);
    let sent = to_vip(Family::V4).ack().options(&[1; 12]);
    v4.check(
        "IPv4 options",
        &sent,
        &Expected::sent(&reset_for(&sent)),
        &Counts::default().drop(DropReason::NoFlow, 1),
    );
    let mut v6 = Balancer::new(vec![
        service(Family::V6, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
    ]);
    let sent = to_vip(Family::V6).ack().extension(DESTINATION_OPTIONS, 16);
    v6.check(
        "IPv6 extension header",
        &sent,
        &Expected::sent(&reset_for(&sent)),
        &Counts::default().drop(DropReason::NoFlow, 1),
    );
}

#[test]
fn a_rst_is_never_answered() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
        ]);
        for sent in [to_vip(family).rst(), to_vip(family).rst().ack()] {
            balancer.check(
                "RST of no known flow",
                &sent,
                &Expected::Dropped,
                &Counts::default().drop(DropReason::NoFlow, 1),
            );
        }
    }
}

#[test]
fn a_backend_is_not_led_to_itself_in_dnat() {
    for family in Family::BOTH {
        for (protocol, mode, led) in [
            (TCP, forward::DNAT, false),
            (UDP, forward::DNAT, false),
            (TCP, forward::NAT, true),
        ] {
            let service = service(family, protocol, VIP, 80).forward(mode);
            let mut balancer = Balancer::new(vec![service.backend(BACKEND_1, 8080, 1)]);
            let sent = match protocol {
                TCP => tcp(family).syn(),
                _ => udp(family),
            };
            let sent = sent.from(BACKEND_1, 40000).to(VIP, 80);
            if led {
                let verdict = balancer.send(&sent).verdict;
                assert_eq!(verdict, Verdict::Tx, "nat hides who asks");
                continue;
            }
            let expected = match protocol {
                TCP => Expected::sent(&reset_for(&sent)),
                _ => Expected::Dropped,
            };
            let counts = Counts::default().drop(DropReason::Hairpin, 1);
            balancer.check("from the backend itself", &sent, &expected, &counts);
            assert!(balancer.flows(family).is_empty());
        }
    }
}

#[test]
fn a_service_without_backends_refuses_drops_or_passes() {
    for family in Family::BOTH {
        let syn = to_vip(family).syn();
        let datagram = udp(family).from(CLIENT, 40000).to(VIP, 80);
        let dropped = Counts::default().drop(DropReason::NoBackend, 1);
        let cases = [
            (
                TCP,
                on_no_backend::RESET,
                &syn,
                Expected::sent(&reset_for(&syn)),
                &dropped,
            ),
            (TCP, on_no_backend::DROP, &syn, Expected::Dropped, &dropped),
            (
                TCP,
                on_no_backend::PASS,
                &syn,
                Expected::Passed,
                &Counts::default(),
            ),
            (
                UDP,
                on_no_backend::RESET,
                &datagram,
                Expected::Dropped,
                &dropped,
            ),
            (
                UDP,
                on_no_backend::DROP,
                &datagram,
                Expected::Dropped,
                &dropped,
            ),
            (
                UDP,
                on_no_backend::PASS,
                &datagram,
                Expected::Passed,
                &Counts::default(),
            ),
        ];
        for (protocol, policy, sent, expected, counts) in cases {
            let what = format!("{family:?} protocol {protocol} policy {policy}");
            let empty = service(family, protocol, VIP, 80).on_no_backend(policy);
            Balancer::new(vec![empty.clone()]).check(&what, sent, &expected, counts);
            // The same when there are backends and none of them takes new flows.
            let drained = empty.backend(BACKEND_1, 8080, 0);
            Balancer::new(vec![drained]).check(&what, sent, &expected, counts);
        }
    }
}

#[test]
fn a_backend_without_neighbour_drops() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, UDP, VIP, 80)
                .backend(BACKEND_1, 8080, 1)
                .last(|b| b.resolved = false),
        ]);
        let sent = udp(family).from(CLIENT, 40000).to(VIP, 80);
        balancer.check(
            "new flow",
            &sent,
            &Expected::Dropped,
            &Counts::default().drop(DropReason::NoNeighbour, 1),
        );
        assert!(balancer.flows(family).is_empty());
        balancer.change(1, |s| s.backends[0].resolved = true);
        balancer.check_new(
            "once it is known",
            &sent,
            |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        balancer.change(1, |s| s.backends[0].resolved = false);
        balancer.check(
            "a known flow",
            &sent,
            &Expected::Dropped,
            &Counts::default()
                .drop(DropReason::NoNeighbour, 1)
                .load(1, 1, 0),
        );
    }
}

#[test]
fn source_ports_never_collide_and_their_end_is_counted() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = Balancer::with_ports(
                vec![
                    service(family, protocol, VIP, 80)
                        .backend(BACKEND_1, 8080, 1)
                        .backend(BACKEND_2, 8080, 1),
                ],
                (30000, 30019),
            );
            let first = |client, port| {
                let packet = match protocol {
                    TCP => tcp(family).syn(),
                    _ => udp(family),
                };
                packet.from(client, port).to(VIP, 80)
            };
            // Both backends have all twenty ports to themselves.
            let mut taken = std::collections::BTreeSet::new();
            for n in 0..40 {
                let client = if n % 3 == 0 { CLIENT } else { CLIENT_2 };
                let outcome = balancer.send(&first(client, 1000 + n));
                let (port, _) = sluice_tests::oracle::ports(&outcome.frame).expect("forwarded");
                assert!((30000..=30019).contains(&port), "port {port}");
                let backend = *outcome.counts.backends.keys().next().expect("one backend");
                assert!(
                    taken.insert((backend, port)),
                    "port {port} of {backend} twice"
                );
            }
            assert_eq!(taken.len(), 40);
            let load = if protocol == TCP { (0, 20) } else { (20, 0) };
            balancer.check(
                "the twenty-first for one backend",
                &first(CLIENT, 2000),
                &Expected::Dropped,
                &Counts::default()
                    .drop(DropReason::PortExhausted, 1)
                    .load(1, load.0, load.1)
                    .load(2, load.0, load.1),
            );
            assert_eq!(balancer.flows(family).len(), 80);
        }
    }
}
