//! Packets for a VIP whose headers contradict each other, and fragments: dropped and counted.

use lb_common::stats::DropReason;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, CLIENT, DESTINATION_OPTIONS, Family, HOP_BY_HOP, Packet, ROUTING, STRANGER, VIP,
        tcp, udp,
    },
};

fn balancer(family: Family) -> Balancer {
    Balancer::new(vec![
        service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
        service(family, UDP, VIP, 80).backend(BACKEND_1, 8080, 1),
    ])
}

fn segment(family: Family) -> Packet {
    tcp(family).from(CLIENT, 40000).to(VIP, 80).syn()
}

fn datagram(family: Family) -> Packet {
    udp(family)
        .from(CLIENT, 40000)
        .to(VIP, 80)
        .payload(*b"datagram")
}

/// A frame with bytes overwritten.
fn damaged(packet: &Packet, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = packet.build();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;
/// Where the transport header begins without tags, options and extension headers.
const V4_TRANSPORT: usize = 34;
const V6_TRANSPORT: usize = 54;

#[test]
fn contradicting_headers_are_dropped_and_counted() {
    let cases: Vec<(&str, Family, Vec<u8>)> = vec![
        (
            "header of four words",
            V4,
            damaged(&segment(V4), 14, &[0x44]),
        ),
        ("header of no words", V4, damaged(&segment(V4), 14, &[0x40])),
        (
            "version 6 in an IPv4 frame",
            V4,
            damaged(&segment(V4), 14, &[0x65]),
        ),
        (
            "header longer than the packet",
            V4,
            damaged(&datagram(V4), 14, &[0x4f]),
        ),
        (
            "total length beyond the frame",
            V4,
            damaged(&segment(V4), 16, &[0xff, 0xff]),
        ),
        // The frame goes on behind the packet, with what would be a fragment header.
        (
            "fragment header behind the packet",
            V6,
            damaged(&datagram(V6).fragment(9, false), 18, &[0, 7]),
        ),
        ("total length one beyond the frame", V4, {
            let len = segment(V4).ip_len() as u16 + 1;
            damaged(&segment(V4), 16, &len.to_be_bytes())
        }),
        (
            "total length shorter than the header",
            V4,
            damaged(&segment(V4), 16, &[0, 19]),
        ),
        (
            "total length that cuts TCP",
            V4,
            damaged(&segment(V4), 16, &[0, 39]),
        ),
        (
            "total length that cuts UDP",
            V4,
            damaged(&datagram(V4), 16, &[0, 27]),
        ),
        (
            "total length of the header alone",
            V4,
            damaged(&segment(V4), 16, &[0, 20]),
        ),
        (
            "TCP header of four words",
            V4,
            damaged(&segment(V4), V4_TRANSPORT + 12, &[0x40]),
        ),
        (
            "TCP header of no words",
            V4,
            damaged(&segment(V4), V4_TRANSPORT + 12, &[0]),
        ),
        (
            "TCP header longer than the packet",
            V4,
            damaged(&segment(V4), V4_TRANSPORT + 12, &[0xf0]),
        ),
        (
            "UDP length below its header",
            V4,
            damaged(&datagram(V4), V4_TRANSPORT + 4, &[0, 7]),
        ),
        (
            "UDP length beyond the packet",
            V4,
            damaged(&datagram(V4), V4_TRANSPORT + 4, &[0, 17]),
        ),
        (
            "version 4 in an IPv6 frame",
            V6,
            damaged(&segment(V6), 14, &[0x45]),
        ),
        (
            "payload length beyond the frame",
            V6,
            damaged(&segment(V6), 18, &[0xff, 0xff]),
        ),
        (
            "payload length of zero",
            V6,
            damaged(&segment(V6), 18, &[0, 0]),
        ),
        (
            "payload length that cuts TCP",
            V6,
            damaged(&segment(V6), 18, &[0, 19]),
        ),
        (
            "payload length that cuts UDP",
            V6,
            damaged(&datagram(V6), 18, &[0, 7]),
        ),
        (
            "TCP header of four words",
            V6,
            damaged(&segment(V6), V6_TRANSPORT + 12, &[0x40]),
        ),
        (
            "TCP header longer than the packet",
            V6,
            damaged(&segment(V6), V6_TRANSPORT + 12, &[0xf0]),
        ),
        (
            "UDP length below its header",
            V6,
            damaged(&datagram(V6), V6_TRANSPORT + 4, &[0, 7]),
        ),
        (
            "UDP length beyond the packet",
            V6,
            damaged(&datagram(V6), V6_TRANSPORT + 4, &[0, 17]),
        ),
        ("extension header longer than the packet", V6, {
            let packet = segment(V6).extension(HOP_BY_HOP, 8);
            damaged(&packet, V6_TRANSPORT + 1, &[200])
        }),
        ("extension headers without end", V6, {
            (0..8)
                .fold(segment(V6), |p, _| p.extension(DESTINATION_OPTIONS, 8))
                .build()
        }),
    ];
    for (what, family, frame) in cases {
        balancer(family).check(
            what,
            &frame,
            &Expected::Dropped,
            &Counts::default().drop(DropReason::Malformed, 0),
        );
    }
}

#[test]
fn every_truncation_is_passed_or_counted_as_malformed() {
    for packet in [
        segment(V4),
        datagram(V4),
        segment(V6),
        datagram(V6),
        segment(V4).vlan(0x8100, 7),
        segment(V6).vlan(0x88a8, 7).vlan(0x8100, 8),
        segment(V4).options(&[1; 20]),
        segment(V6).extension(HOP_BY_HOP, 8).extension(ROUTING, 16),
    ] {
        let mut balancer = balancer(packet.family);
        let whole = packet.build();
        let addresses_end = packet.l2_len() + if packet.family == V4 { 20 } else { 40 };
        // The kernel takes no frame below 14 bytes.
        for len in 14..whole.len() {
            let frame = whole[..len].to_vec();
            let what = format!("the first {len} of {} bytes", whole.len());
            // A frame that does not tell its destination is the kernel's to judge.
            if len < addresses_end {
                balancer.check(&what, &frame, &Expected::Passed, &Counts::default());
            } else {
                balancer.check(
                    &what,
                    &frame,
                    &Expected::Dropped,
                    &Counts::default().drop(DropReason::Malformed, 0),
                );
            }
        }
        assert_eq!(
            balancer.send(&packet).verdict,
            Verdict::Tx,
            "the whole packet"
        );
    }
}

#[test]
fn the_same_damage_in_a_packet_for_somebody_else_passes() {
    for family in Family::BOTH {
        let mut balancer = balancer(family);
        let at = if family == V4 {
            V4_TRANSPORT
        } else {
            V6_TRANSPORT
        };
        let frame = damaged(&segment(family).to(STRANGER, 80), at + 12, &[0x40]);
        balancer.check(
            "for somebody else",
            &frame,
            &Expected::Passed,
            &Counts::default(),
        );
    }
}

/// A reserved bit that some senders set makes no fragment, and neither does "don't fragment".
#[test]
fn flags_that_make_no_fragment() {
    let mut balancer = balancer(V4);
    let mut packet = datagram(V4);
    packet.dont_fragment = false;
    assert_eq!(balancer.send(&packet).verdict, Verdict::Tx);
    packet.dont_fragment = true;
    assert_eq!(balancer.send(&packet).verdict, Verdict::Tx);
}
