//! Full NAT: packets to the backend and back, whole and counted.

use lb_common::stats::DropReason;
use std::collections::BTreeSet;

use sluice_tests::{
    harness::{
        Balancer, Counts, Expected, OTHER_INTERFACE, TCP, UDP, UNKNOWN_INTERFACE, Verdict, service,
        v4, v6,
    },
    oracle::assert_frame,
    packet::{
        BACKEND_1, BALANCER, CLIENT, Checksum, DESTINATION_OPTIONS, Family, GATEWAY, HOP_BY_HOP,
        Packet, ROUTING, VIP, error_for, reply, tcp, time_exceeded, transport, udp,
    },
};

/// One service at port 80 with [`BACKEND_1`] at port 8080.
fn balancer(family: Family, protocol: u8) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80).backend(BACKEND_1, 8080, 1),
    ])
}

fn request(family: Family, protocol: u8) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet.payload(*b"question")
    }
}

fn load(counts: Counts, protocol: u8) -> Counts {
    if protocol == TCP {
        counts.load(1, 0, 1)
    } else {
        counts.load(1, 1, 0)
    }
}

#[test]
fn a_new_flow_goes_to_the_backend_and_its_reply_comes_back() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let what = format!("{family:?} protocol {protocol}");
            let mut balancer = balancer(family, protocol);
            let sent = request(family, protocol);
            let port = balancer.check_new(
                &format!("{what}: first packet"),
                &sent,
                |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
                &load(
                    Counts::default()
                        .packet_in(1, 1, sent.ip_len())
                        .connection(1, 1),
                    protocol,
                ),
            );
            let mut answer = reply(family, protocol, BACKEND_1, 8080, port);
            if protocol == TCP {
                answer = answer.syn().ack();
            } else {
                answer = answer.payload(*b"an answer");
            }
            balancer.check(
                &format!("{what}: reply"),
                &answer,
                &Expected::sent(&answer.nat_back(VIP, 80, CLIENT, 40000)),
                &load(
                    Counts::default().packet_out(1, 1, answer.ip_len()),
                    protocol,
                ),
            );
        }
    }
}

#[test]
fn the_first_packet_makes_an_entry_for_each_direction() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(family, protocol);
            let sent = request(family, protocol);
            let port = balancer.check_new(
                "first packet",
                &sent,
                |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
                &load(
                    Counts::default()
                        .packet_in(1, 1, sent.ip_len())
                        .connection(1, 1),
                    protocol,
                ),
            );
            let flows = balancer.flows(family);
            assert_eq!(flows.len(), 2, "a flow has two entries: {flows:?}");
            let client = flows.iter().find(|f| !f.from_backend).expect("client's");
            let backend = flows.iter().find(|f| f.from_backend).expect("backend's");
            assert_eq!(client.src, (CLIENT.ip(family), 40000));
            assert_eq!(client.dst, (VIP.ip(family), 80));
            assert_eq!(client.out_src, (BALANCER.ip(family), port));
            assert_eq!(client.out_dst, (BACKEND_1.ip(family), 8080));
            assert_eq!((backend.src, backend.dst), (client.out_dst, client.out_src));
            assert_eq!((backend.out_src, backend.out_dst), (client.dst, client.src));
            assert_eq!((client.service, client.backend), (1, 1));
            let other = match family {
                Family::V4 => Family::V6,
                Family::V6 => Family::V4,
            };
            assert!(balancer.flows(other).is_empty(), "one family's table only");
        }
    }
}

#[test]
fn packets_of_a_flow_keep_backend_and_port() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        let first = request(family, UDP);
        let port = balancer.check_new(
            "first datagram",
            &first,
            |port| Expected::sent(&first.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, first.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        for len in [0, 1, 8, 1200] {
            let next = request(family, UDP).payload(vec![7; len]);
            balancer.check(
                "later datagram",
                &next,
                &Expected::sent(&next.nat_to(BACKEND_1, 8080, port)),
                &Counts::default()
                    .packet_in(1, 1, next.ip_len())
                    .load(1, 1, 0),
            );
        }
    }
}

#[test]
fn headers_beside_the_addresses_stay() {
    let cases: Vec<(&str, Packet)> = vec![
        ("one VLAN tag", tcp(Family::V4).vlan(0x8100, 0x6064)),
        (
            "two VLAN tags",
            tcp(Family::V4).vlan(0x88a8, 100).vlan(0x8100, 200),
        ),
        ("IPv6 in a VLAN", tcp(Family::V6).vlan(0x8100, 5)),
        (
            "IPv6 in two VLANs",
            tcp(Family::V6).vlan(0x88a8, 5).vlan(0x8100, 6),
        ),
        (
            "four bytes of IPv4 options",
            tcp(Family::V4).options(&[1, 1, 1, 0]),
        ),
        (
            "forty bytes of IPv4 options",
            tcp(Family::V4).options(&[1; 40]),
        ),
        (
            "hop-by-hop options",
            tcp(Family::V6).extension(HOP_BY_HOP, 8),
        ),
        (
            "three extension headers",
            tcp(Family::V6)
                .extension(HOP_BY_HOP, 16)
                .extension(DESTINATION_OPTIONS, 8)
                .extension(DESTINATION_OPTIONS, 24),
        ),
        (
            "a routing header at its end",
            tcp(Family::V6).extension(ROUTING, 8),
        ),
        ("a traffic class", {
            let mut packet = tcp(Family::V6);
            packet.tos = 0xb9;
            packet
        }),
        ("a type of service", {
            let mut packet = tcp(Family::V4);
            packet.tos = 0xb9;
            packet.dont_fragment = false;
            packet
        }),
        ("padding behind the packet", tcp(Family::V4).trailer([0; 6])),
        (
            "a link-layer trailer of odd length",
            tcp(Family::V6).trailer([0xee; 5]),
        ),
    ];
    for (what, packet) in cases {
        let sent = packet.from(CLIENT, 40000).to(VIP, 80).syn();
        let mut balancer = balancer(sent.family, TCP);
        balancer.change(1, |s| s.backends[0].tags = sent.tags());
        let port = balancer.check_new(
            what,
            &sent,
            |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 0, 1),
        );
        let mut back = sent
            .clone()
            .macs(BACKEND_1.mac, BALANCER.mac)
            .from(BACKEND_1, 8080)
            .to(BALANCER, port)
            .ack();
        back.tcp_mut().syn = true;
        balancer.check(
            &format!("{what}, on the way back"),
            &back,
            &Expected::sent(&back.nat_back(VIP, 80, CLIENT, 40000)),
            &Counts::default()
                .packet_out(1, 1, back.ip_len())
                .load(1, 0, 1),
        );
    }
}

#[test]
fn a_hop_is_taken_and_the_last_hop_ends_the_way() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        let last = request(family, UDP).ttl(1);
        balancer.check(
            "no hop left on a new flow",
            &last,
            &Expected::sent(&error_for(&last, time_exceeded(family))),
            &Counts::default().drop(DropReason::TtlExceeded, 1),
        );
        assert!(
            balancer.flows(family).is_empty(),
            "a packet that cannot travel makes no flow"
        );
        let sent = request(family, UDP).ttl(2);
        let port = balancer.check_new(
            "one hop left",
            &sent,
            |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port).ttl(1)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        for ttl in [0, 1] {
            let request = request(family, UDP).ttl(ttl);
            balancer.check(
                "no hop left on a known flow",
                &request,
                &Expected::sent(&error_for(&request, time_exceeded(family))),
                &Counts::default()
                    .drop(DropReason::TtlExceeded, 1)
                    .load(1, 1, 0),
            );
            let reply = reply(family, UDP, BACKEND_1, 8080, port).ttl(ttl);
            balancer.check(
                "no hop left on the way back",
                &reply,
                &Expected::sent(&error_for(&reply, time_exceeded(family))),
                &Counts::default()
                    .drop(DropReason::TtlExceeded, 1)
                    .load(1, 1, 0),
            );
        }
    }
}

#[test]
fn a_backend_behind_another_interface_is_reached_by_redirect() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, UDP, VIP, 80)
                .backend(BACKEND_1, 8080, 1)
                .last(|b| b.ifindex = OTHER_INTERFACE),
        ]);
        let sent = request(family, UDP);
        let port = balancer.check_new(
            "to the backend",
            &sent,
            |port| Expected::redirected(&sent.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        // The harness can receive on one interface only, which is the client's: back by XDP_TX.
        let answer = reply(family, UDP, BACKEND_1, 8080, port);
        balancer.check(
            "to the client",
            &answer,
            &Expected::sent(&answer.nat_back(VIP, 80, CLIENT, 40000)),
            &Counts::default()
                .packet_out(1, 1, answer.ip_len())
                .load(1, 1, 0),
        );
    }
}

#[test]
fn an_interface_that_is_not_ours_is_never_sent_to() {
    let mut balancer = Balancer::new(vec![
        service(Family::V4, UDP, VIP, 80)
            .backend(BACKEND_1, 8080, 1)
            .last(|b| b.ifindex = UNKNOWN_INTERFACE),
    ]);
    let outcome = balancer.send(&request(Family::V4, UDP));
    assert_eq!(outcome.verdict, sluice_tests::harness::Verdict::Drop);
    assert_eq!(outcome.counts.drops.get("no_interface"), Some(&1));
    assert_eq!(
        outcome.counts.drops.len(),
        1,
        "one reason for one packet: {:?}",
        outcome.counts
    );
}

#[test]
fn the_reply_goes_to_where_the_client_packet_came_from() {
    let mut balancer = balancer(Family::V4, UDP);
    let router = [0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
    let sent = request(Family::V4, UDP).macs(router, BALANCER.mac);
    let port = balancer.check_new(
        "from another router",
        &sent,
        |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
        &Counts::default()
            .packet_in(1, 1, sent.ip_len())
            .connection(1, 1)
            .load(1, 1, 0),
    );
    assert_ne!(router, GATEWAY.mac);
    let answer = reply(Family::V4, UDP, BACKEND_1, 8080, port);
    balancer.check(
        "back to that router",
        &answer,
        &Expected::sent(
            &answer
                .nat_back(VIP, 80, CLIENT, 40000)
                .macs(BALANCER.mac, router),
        ),
        &Counts::default()
            .packet_out(1, 1, answer.ip_len())
            .load(1, 1, 0),
    );
}

#[test]
fn services_are_told_apart_by_address_port_and_protocol() {
    use sluice_tests::packet::{BACKEND_2, BACKEND_3, VIP_2};
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, UDP, VIP, 80).backend(BACKEND_1, 8080, 1),
            service(family, UDP, VIP, 81).backend(BACKEND_2, 8081, 1),
            service(family, UDP, VIP_2, 80).backend(BACKEND_3, 8082, 1),
            service(family, TCP, VIP, 80).backend(BACKEND_2, 8083, 1),
        ]);
        for (number, packet, backend, port) in [
            (1, udp(family).to(VIP, 80), BACKEND_1, 8080),
            (2, udp(family).to(VIP, 81), BACKEND_2, 8081),
            (3, udp(family).to(VIP_2, 80), BACKEND_3, 8082),
            (4, tcp(family).to(VIP, 80).syn(), BACKEND_2, 8083),
        ] {
            balancer.reset();
            let sent = packet.from(CLIENT, 40000);
            let counts = Counts::default()
                .packet_in(number, number, sent.ip_len())
                .connection(number, number);
            let counts = if sent.protocol() == TCP {
                counts.load(number, 0, 1)
            } else {
                counts.load(number, 1, 0)
            };
            balancer.check_new(
                &format!("service {number}"),
                &sent,
                |nat| Expected::sent(&sent.nat_to(backend, port, nat)),
                &counts,
            );
        }
        balancer.reset();
        for (what, packet) in [
            ("another port", udp(family).to(VIP, 82)),
            ("another VIP's port", udp(family).to(VIP_2, 81)),
            ("another protocol", tcp(family).to(VIP, 81).syn()),
        ] {
            balancer.check(
                what,
                &packet.from(CLIENT, 40000),
                &Expected::Passed,
                &Counts::default(),
            );
        }
    }
}

/// Direct access ends with the first page; what has to be read or summed behind it is all the same.
#[test]
fn a_packet_of_several_pages_is_rewritten_whole() {
    for family in Family::BOTH {
        for checksum in [Checksum::Right, Checksum::Partial] {
            let mut balancer = balancer(family, UDP);
            let sent = request(family, UDP)
                .payload((0..8001).map(|i| (i % 251) as u8).collect::<Vec<u8>>())
                .checksum(checksum);
            balancer.check_new(
                &format!("{family:?}, {checksum:?}"),
                &sent,
                |port| {
                    let rewritten = sent.nat_to(BACKEND_1, 8080, port);
                    Expected::sent(&rewritten.checksum(Checksum::Right))
                },
                &load(
                    Counts::default()
                        .packet_in(1, 1, sent.ip_len())
                        .connection(1, 1),
                    UDP,
                ),
            );
        }
    }
}

/// Each source address has the whole range of ports towards a backend, and its replies come back.
#[test]
fn several_source_addresses_have_a_port_range_each() {
    for family in Family::BOTH {
        let mut balancer = Balancer::with_ports(
            vec![service(family, UDP, VIP, 80).backend(BACKEND_1, 8080, 1)],
            (30000, 30003),
        );
        let sources = match family {
            Family::V4 => [v4(77, 1), v4(77, 2)],
            Family::V6 => [v6(77, 1), v6(77, 2)],
        };
        balancer.nat_sources(&sources);
        let mut used = BTreeSet::new();
        for client_port in 40000..40064 {
            let sent = udp(family).from(CLIENT, client_port).to(VIP, 80);
            balancer.send(&sent);
        }
        for flow in balancer.flows(family).iter().filter(|f| !f.from_backend) {
            assert!(sources.contains(&flow.out_src.0), "{flow:?}");
            assert!((30000..=30003).contains(&flow.out_src.1), "{flow:?}");
            assert!(used.insert(flow.out_src), "{flow:?} shares its source");
        }
        assert_eq!(used.len(), 8, "four ports of two addresses: {used:?}");
        let flows = balancer.flows(family);
        let flow = flows.iter().find(|f| f.from_backend).expect("a reply's");
        let answer = udp(family)
            .macs(BACKEND_1.mac, BALANCER.mac)
            .from(flow.src.0, flow.src.1)
            .to(flow.dst.0, flow.dst.1);
        let outcome = balancer.send(&answer);
        assert_eq!(outcome.verdict, Verdict::Tx);
        let back = answer.nat_back(VIP, 80, CLIENT, flow.out_dst.1);
        assert_frame("the reply", &back.build(), &outcome.frame);
    }
}
