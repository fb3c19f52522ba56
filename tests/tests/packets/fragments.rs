//! Fragments: the first opens a way that the others follow.

use lb_common::stats::DropReason;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, service},
    packet::{
        BACKEND_1, BACKEND_2, BALANCER, CLIENT, CLIENT_2, Checksum, DESTINATION_OPTIONS, Family,
        HOP_BY_HOP, Packet, STRANGER, Transport, VIP, error_for, ping, reply, tcp, time_exceeded,
        too_big, transport, udp,
    },
};

fn balancer(family: Family, protocol: u8) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80)
            .backend(BACKEND_1, 8080, 1)
            .backend(BACKEND_2, 8080, 1),
    ])
}

/// A datagram or segment that no link takes in one piece.
fn large(family: Family, protocol: u8) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
    let packet = if protocol == TCP {
        packet.syn()
    } else {
        packet
    };
    let mut packet = packet.payload((0..3999u32).map(|i| (i * 7) as u8).collect::<Vec<_>>());
    packet.dont_fragment = false;
    packet
}

/// What a fragmented packet must have become: the fragments of the whole packet rewritten.
type Rewrite = Box<dyn Fn(&Packet) -> Packet>;

/// A balancer that has placed the first fragment of `whole`, the other fragments, and what is to
/// become of each.
fn opened(family: Family, whole: &Packet, size: usize) -> (Balancer, Vec<Packet>, Rewrite, Counts) {
    let protocol = whole.protocol();
    let mut balancer = balancer(family, protocol);
    balancer.change(1, |s| {
        s.backends.iter_mut().for_each(|b| b.tags = whole.tags());
    });
    let fragments = whole.fragments(size);
    let load = if protocol == TCP { (0, 1) } else { (1, 0) };
    let here = whole.clone();
    let port = balancer.check_new(
        &format!("{family:?} protocol {protocol}, first fragment"),
        &fragments[0],
        |port| Expected::sent(&here.nat_to(BACKEND_1, 8080, port).fragments(size)[0]),
        &Counts::default()
            .packet_in(1, 1, fragments[0].ip_len())
            .connection(1, 1)
            .load(1, load.0, load.1),
    );
    let rewrite: Rewrite = Box::new(move |packet| packet.nat_to(BACKEND_1, 8080, port));
    let rest = fragments[1..].to_vec();
    (
        balancer,
        rest,
        rewrite,
        Counts::default().load(1, load.0, load.1),
    )
}

#[test]
fn all_fragments_go_to_the_backend_of_the_first() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            for size in [48, 1000, 1448] {
                let whole = large(family, protocol);
                let (mut balancer, rest, rewrite, counts) = opened(family, &whole, size);
                let expected = rewrite(&whole).fragments(size);
                for (n, fragment) in rest.iter().enumerate().rev() {
                    balancer.check(
                        &format!("{family:?} protocol {protocol}, {size} bytes each, later {n}"),
                        fragment,
                        &Expected::sent(&expected[n + 1]),
                        &counts.clone().packet_in(1, 1, fragment.ip_len()),
                    );
                }
            }
        }
    }
}

#[test]
fn fragments_of_an_answer_go_to_the_client() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        let asked = udp(family).from(CLIENT, 40000).to(VIP, 80);
        let port = balancer.check_new(
            "the question",
            &asked,
            |port| Expected::sent(&asked.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, asked.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        let mut answer = reply(family, UDP, BACKEND_1, 8080, port).payload(vec![5; 3000]);
        answer.dont_fragment = false;
        let expected = answer.nat_back(VIP, 80, CLIENT, 40000).fragments(1000);
        for (n, fragment) in answer.fragments(1000).iter().enumerate() {
            balancer.check(
                &format!("{family:?}, fragment {n} of the answer"),
                fragment,
                &Expected::sent(&expected[n]),
                &Counts::default()
                    .packet_out(1, 1, fragment.ip_len())
                    .load(1, 1, 0),
            );
        }
    }
}

#[test]
fn tags_options_and_extension_headers_stay() {
    for family in Family::BOTH {
        let whole = large(family, UDP).vlan(0x88a8, 7).vlan(0x8100, 8);
        let whole = match family {
            Family::V4 => whole.options(&[1, 1, 1, 0]),
            Family::V6 => whole
                .extension(HOP_BY_HOP, 8)
                .extension(DESTINATION_OPTIONS, 16),
        };
        let (mut balancer, rest, rewrite, counts) = opened(family, &whole, 800);
        let expected = rewrite(&whole).fragments(800);
        for (n, fragment) in rest.iter().enumerate() {
            balancer.check(
                &format!("{family:?}, later {n}"),
                &fragment.clone().trailer([0; 5]),
                &Expected::sent(&expected[n + 1].clone().trailer([0; 5])),
                &counts.clone().packet_in(1, 1, fragment.ip_len()),
            );
        }
    }
}

/// Nothing says whose it is, and nothing is held back until something does.
#[test]
fn a_fragment_before_the_first_is_counted() {
    for family in Family::BOTH {
        let whole = large(family, UDP);
        let fragments = whole.fragments(1000);
        for (n, fragment) in fragments[1..].iter().enumerate() {
            let mut balancer = balancer(family, UDP);
            balancer.check(
                &format!("{family:?}, later {n}"),
                fragment,
                &Expected::Dropped,
                &Counts::default().drop(DropReason::Fragment, 0),
            );
            balancer.check(
                &format!("{family:?}, later {n}, for the NAT source"),
                &fragment.clone().to(BALANCER, 0),
                &Expected::Passed,
                &Counts::default(),
            );
            balancer.check(
                &format!("{family:?}, later {n}, for somebody else"),
                &fragment.clone().to(STRANGER, 0),
                &Expected::Passed,
                &Counts::default(),
            );
        }
    }
}

/// The host's own traffic for an address that is a VIP too comes in fragments as any other does.
#[test]
fn fragments_for_a_vip_that_the_host_has_are_its_own_until_a_first_one_is_placed() {
    use lb_common::service::VIP_HELD;
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        balancer.set_vip_flags(VIP.ip(family), VIP_HELD);
        let own = udp(family).from(CLIENT, 53).to(VIP, 50000);
        for (n, fragment) in own.payload([1; 3000]).fragments(1000).iter().enumerate() {
            balancer.check(
                &format!("{family:?}, fragment {n}"),
                fragment,
                &Expected::Passed,
                &Counts::default(),
            );
        }
    }
}

#[test]
fn datagrams_are_told_apart() {
    for family in Family::BOTH {
        let whole = large(family, UDP);
        let (mut balancer, rest, _, counts) = opened(family, &whole, 1000);
        let mut other_id = rest[0].clone();
        other_id.id ^= 1;
        let mut cases = vec![
            ("another identification", other_id),
            ("another client", rest[0].clone().from(CLIENT_2, 0)),
        ];
        if family == Family::V4 {
            let mut other = rest[0].clone();
            other.transport = Transport::Other(TCP);
            cases.push(("another protocol", other));
        }
        for (what, fragment) in cases {
            balancer.check(
                &format!("{family:?}, {what}"),
                &fragment,
                &Expected::Dropped,
                &counts.clone().drop(DropReason::Fragment, 0),
            );
        }
        // The next datagram of that client, with the same identification, takes its place.
        let next = large(family, UDP).from(CLIENT, 40001);
        let first = &next.fragments(1000)[0];
        let port = balancer.check_new(
            "the next datagram",
            first,
            |port| Expected::sent(&next.nat_to(BACKEND_2, 8080, port).fragments(1000)[0]),
            &counts
                .clone()
                .packet_in(1, 2, first.ip_len())
                .connection(1, 2)
                .load(2, 1, 0),
        );
        balancer.check(
            &format!("{family:?}, its second fragment"),
            &rest[0],
            &Expected::sent(&next.nat_to(BACKEND_2, 8080, port).fragments(1000)[1]),
            &counts.packet_in(1, 2, rest[0].ip_len()).load(2, 1, 0),
        );
    }
}

#[test]
fn a_datagram_is_forgotten_after_half_a_minute() {
    for family in Family::BOTH {
        let whole = large(family, UDP);
        let (mut balancer, rest, rewrite, counts) = opened(family, &whole, 1000);
        balancer.age_fragments(29 * 953);
        balancer.check(
            &format!("{family:?}, after 29 seconds"),
            &rest[0],
            &Expected::sent(&rewrite(&whole).fragments(1000)[1]),
            &counts.clone().packet_in(1, 1, rest[0].ip_len()),
        );
        balancer.age_fragments(953);
        balancer.check(
            &format!("{family:?}, after 30 seconds"),
            &rest[0],
            &Expected::Dropped,
            &counts.drop(DropReason::Fragment, 0),
        );
    }
}

/// RFC 1122 section 3.2.2: of all fragments, the first is answered.
#[test]
fn only_the_first_fragment_is_answered() {
    for family in Family::BOTH {
        let whole = large(family, UDP);
        let fragments = whole.fragments(1400);
        let (mut balancer, rest, _, counts) = opened(family, &whole, 1400);
        let first = fragments[0].clone().ttl(1);
        let expired = counts.clone().drop(DropReason::TtlExceeded, 1);
        balancer.check(
            &format!("{family:?}, first without a hop left"),
            &first,
            &Expected::sent(&error_for(&first, time_exceeded(family))),
            &expired,
        );
        balancer.check(
            &format!("{family:?}, later without a hop left"),
            &rest[0].clone().ttl(1),
            &Expected::Dropped,
            &expired,
        );
        balancer.change(1, |s| s.backends[0].mtu = 1300);
        let refused = counts.drop(DropReason::TooBig, 1);
        balancer.check(
            &format!("{family:?}, first too large"),
            &fragments[0],
            &Expected::sent(&error_for(&fragments[0], too_big(family, 1300))),
            &refused,
        );
        balancer.check(
            &format!("{family:?}, later too large"),
            &rest[0],
            &Expected::Dropped,
            &refused,
        );
    }
}

#[test]
fn a_fragment_for_a_backend_out_of_reach_is_counted() {
    for family in Family::BOTH {
        let whole = large(family, UDP);
        let (mut balancer, rest, _, counts) = opened(family, &whole, 1000);
        balancer.change(1, |s| s.backends[0].resolved = false);
        balancer.check(
            &format!("{family:?}, next hop unknown"),
            &rest[0],
            &Expected::Dropped,
            &counts.drop(DropReason::NoNeighbour, 1),
        );
        balancer.replace_backend(1, 0);
        balancer.check(
            &format!("{family:?}, backend replaced"),
            &rest[0],
            &Expected::Dropped,
            &Counts::default().drop(DropReason::BackendDown, 1),
        );
    }
}

/// The bytes that a checksum covers are not all there, so what looks like one left to the hardware
/// is not: it is updated like any other.
#[test]
fn the_checksum_of_a_first_fragment_is_never_completed() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let whole = transport(family, protocol)
                .from(CLIENT, 40000)
                .to(VIP, 80)
                .payload([3; 100]);
            let whole = if protocol == TCP { whole.syn() } else { whole };
            let first = whole.clone().fragment(0, true);
            let off = first.partial_error();
            let sent = first.clone().checksum(Checksum::Partial);
            let load = if protocol == TCP { (0, 1) } else { (1, 0) };
            balancer(family, protocol).check_new(
                &format!("{family:?} protocol {protocol}"),
                &sent,
                |port| {
                    let out = first.nat_to(BACKEND_1, 8080, port);
                    Expected::sent(&out.checksum(Checksum::Wrong(off)))
                },
                &Counts::default()
                    .packet_in(1, 1, sent.ip_len())
                    .connection(1, 1)
                    .load(1, load.0, load.1),
            );
        }
    }
}

/// RFC 6946: a fragment header that says it is the only one.
#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    for checksum in [Checksum::Right, Checksum::Partial] {
        let sent = udp(Family::V6)
            .from(CLIENT, 40000)
            .to(VIP, 80)
            .payload(*b"whole")
            .fragment(0, false);
        balancer(Family::V6, UDP).check_new(
            &format!("{checksum:?}"),
            &sent.clone().checksum(checksum),
            |port| Expected::sent(&sent.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
    }
}

#[test]
fn a_fragmented_ping_is_not_answered_in_part() {
    for family in Family::BOTH {
        let mut whole = ping(family, 1, 1).payload(vec![1; 2000]);
        whole.dont_fragment = false;
        let mut balancer = balancer(family, UDP);
        for (n, fragment) in whole.fragments(1400).iter().enumerate() {
            balancer.check(
                &format!("{family:?}, fragment {n}"),
                fragment,
                &Expected::Dropped,
                &Counts::default().drop(DropReason::Fragment, 0),
            );
        }
    }
}

/// RFC 1858: a first fragment too small for its transport header is an attack on filters.
#[test]
fn a_first_fragment_without_its_transport_header_is_malformed() {
    for family in Family::BOTH {
        let whole = tcp(family).from(CLIENT, 40000).to(VIP, 80).syn();
        balancer(family, TCP).check(
            &format!("{family:?}"),
            &whole.fragments(16)[0],
            &Expected::Dropped,
            &Counts::default().drop(DropReason::Malformed, 0),
        );
    }
}
