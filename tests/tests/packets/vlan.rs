//! VLAN tags: a packet leaves with those of its next hop, an answer with those its client has.

use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, service},
    packet::{BACKEND_1, CLIENT, Family, Packet, STRANGER, VIP, icmp_error, reply, transport, udp},
};

/// Tags of a frame: ethertype and TCI, the outer one first.
type Tags = &'static [(u16, u16)];

/// None, one and two; with and without priority bits; other VLANs and other ethertypes.
pub const TAGS: [Tags; 9] = [
    &[],
    &[(0x8100, 100)],
    &[(0x8100, 0x6064)],
    &[(0x8100, 0xf0c8)],
    &[(0x8100, 0)],
    &[(0x88a8, 100)],
    &[(0x88a8, 0x8064), (0x8100, 0xe0c8)],
    &[(0x8100, 100), (0x8100, 200)],
    &[(0x8100, 100), (0x8100, 0x2001)],
];

/// What a packet has that came with `from` and whose next hop has `to`: priority bits keep their
/// place.
pub fn rewritten(from: &[(u16, u16)], to: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let priority = |place: usize| from.get(place).map_or(0, |(_, tci)| tci & 0xf000);
    to.iter()
        .enumerate()
        .map(|(place, (ether_type, tci))| (*ether_type, tci & 0xfff | priority(place)))
        .collect()
}

/// A balancer whose backend is behind the tags `to`.
fn balancer(family: Family, protocol: u8, to: Tags) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80)
            .backend(BACKEND_1, 8080, 1)
            .last(|b| b.tags = udp(family).tagged(to).tags()),
    ])
}

fn load(protocol: u8) -> Counts {
    let (active, inactive) = if protocol == TCP { (0, 1) } else { (1, 0) };
    Counts::default().load(1, active, inactive)
}

fn request(family: Family, protocol: u8, from: Tags) -> Packet {
    let packet = transport(family, protocol)
        .from(CLIENT, 40000)
        .to(VIP, 80)
        .tagged(from);
    if protocol == TCP {
        packet.syn()
    } else {
        packet.payload(*b"question")
    }
}

/// Opens a flow and returns its port.
fn open(balancer: &mut Balancer, what: &str, sent: &Packet, to: Tags) -> u16 {
    let right = sent.clone().tagged(&rewritten(&sent.vlans, to));
    balancer.check_new(
        what,
        sent,
        |port| Expected::sent(&right.nat_to(BACKEND_1, 8080, port)),
        &load(sent.protocol())
            .packet_in(1, 1, sent.ip_len())
            .connection(1, 1),
    )
}

#[test]
fn tags_are_those_of_the_next_hop_in_both_directions() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            for (from, to) in TAGS.iter().flat_map(|f| TAGS.iter().map(move |t| (*f, *t))) {
                let what = format!("{family:?} protocol {protocol}, {from:x?} to {to:x?}");
                let mut balancer = balancer(family, protocol, to);
                let sent = request(family, protocol, from);
                let port = open(&mut balancer, &what, &sent, to);
                let later = transport(family, protocol)
                    .from(CLIENT, 40000)
                    .to(VIP, 80)
                    .payload(vec![9; 77])
                    .tagged(from);
                let right = later.clone().tagged(&rewritten(from, to));
                balancer.check(
                    &format!("{what}, a later packet"),
                    &later,
                    &Expected::sent(&right.nat_to(BACKEND_1, 8080, port)),
                    &load(protocol).packet_in(1, 1, later.ip_len()),
                );
                let back = reply(family, protocol, BACKEND_1, 8080, port)
                    .payload(vec![5; 200])
                    .tagged(to);
                let right = back.clone().tagged(&rewritten(to, from));
                balancer.check(
                    &format!("{what}, on the way back"),
                    &back,
                    &Expected::sent(&right.nat_back(VIP, 80, CLIENT, 40000)),
                    &load(protocol).packet_out(1, 1, back.ip_len()),
                );
            }
        }
    }
}

#[test]
fn later_fragments_have_the_tags_of_the_first() {
    for family in Family::BOTH {
        for (from, to) in [
            (TAGS[0], TAGS[6]),
            (TAGS[1], TAGS[0]),
            (TAGS[6], TAGS[3]),
            (TAGS[1], TAGS[5]),
        ] {
            let mut balancer = balancer(family, UDP, to);
            let sent = request(family, UDP, from);
            let port = open(&mut balancer, "the question", &sent, to);
            let mut whole = request(family, UDP, from).payload(vec![3; 3000]);
            let mut answer = reply(family, UDP, BACKEND_1, 8080, port)
                .payload(vec![5; 3000])
                .tagged(to);
            (whole.dont_fragment, answer.dont_fragment) = (false, false);
            let there = whole.nat_to(BACKEND_1, 8080, port);
            let there = there.tagged(&rewritten(from, to)).fragments(1000);
            let back = answer.nat_back(VIP, 80, CLIENT, 40000);
            let back = back.tagged(&rewritten(to, from)).fragments(1000);
            for (n, fragment) in whole.fragments(1000).iter().enumerate() {
                balancer.check(
                    &format!("{family:?}, {from:x?} to {to:x?}, fragment {n}"),
                    fragment,
                    &Expected::sent(&there[n]),
                    &load(UDP).packet_in(1, 1, fragment.ip_len()),
                );
            }
            for (n, fragment) in answer.fragments(1000).iter().enumerate() {
                balancer.check(
                    &format!("{family:?}, {to:x?} to {from:x?}, fragment {n} of the answer"),
                    fragment,
                    &Expected::sent(&back[n]),
                    &load(UDP).packet_out(1, 1, fragment.ip_len()),
                );
            }
        }
    }
}

/// A router's error may come by another VLAN than the flow.
#[test]
fn an_error_has_the_tags_of_the_end_it_is_for() {
    for family in Family::BOTH {
        for (from, to, router) in [
            (TAGS[0], TAGS[1], TAGS[0]),
            (TAGS[6], TAGS[0], TAGS[6]),
            (TAGS[1], TAGS[7], TAGS[3]),
        ] {
            let mut balancer = balancer(family, UDP, to);
            let sent = request(family, UDP, from);
            let port = open(&mut balancer, "the question", &sent, to);
            let answered = reply(family, UDP, BACKEND_1, 8080, port).payload([7; 300]);
            let answered_out = answered.nat_back(VIP, 80, CLIENT, 40000);
            let unreachable = match family {
                Family::V4 => (3, 3, [0; 4]),
                Family::V6 => (1, 4, [0; 4]),
            };
            let quoting = |quoted: &Packet| {
                icmp_error(family, unreachable, &quoted.clone().ttl(50), usize::MAX)
            };
            let error = quoting(&answered_out)
                .from(STRANGER, 0)
                .to(VIP, 0)
                .tagged(router);
            let right = quoting(&answered)
                .nat_to(BACKEND_1, 0, 0)
                .tagged(&rewritten(router, to));
            balancer.check(
                &format!("{family:?}, {router:x?} to {to:x?}"),
                &error,
                &Expected::sent(&right),
                &load(UDP).packet_in(1, 1, error.ip_len()),
            );
        }
    }
}
