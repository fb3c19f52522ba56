//! Checksums: updated, completed where a local sender left them partial, and never invented.

use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service},
    oracle,
    packet::{
        BACKEND_1, CLIENT, Checksum, DESTINATION_OPTIONS, Family, Packet, VIP, reply, tcp,
        transport, udp,
    },
};

fn balancer(family: Family, protocol: u8) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80).backend(BACKEND_1, 8080, 1),
    ])
}

fn open(balancer: &mut Balancer, family: Family, protocol: u8) -> u16 {
    open_with(balancer, transport(family, protocol))
}

fn open_with(balancer: &mut Balancer, packet: Packet) -> u16 {
    let mut packet = packet.from(CLIENT, 40000).to(VIP, 80);
    if packet.protocol() == TCP {
        packet = packet.syn();
    }
    let outcome = balancer.send(&packet);
    assert_eq!(outcome.verdict, Verdict::Tx);
    oracle::ports(&outcome.frame).expect("ports").0
}

/// A payload in which every byte matters.
fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256 + 1) as u8).collect()
}

fn established(family: Family, protocol: u8, len: usize) -> Packet {
    let packet = transport(family, protocol)
        .from(CLIENT, 40000)
        .to(VIP, 80)
        .payload(payload(len));
    if protocol == TCP {
        packet.ack().psh()
    } else {
        packet
    }
}

fn check_both_ways(
    balancer: &mut Balancer,
    port: u16,
    sent: &Packet,
    expected: &Packet,
    what: &str,
) {
    let (verdict, frame) = balancer.run_uncounted(&sent.build());
    assert_eq!(verdict, Verdict::Tx, "{what}");
    oracle::assert_frame(
        what,
        &expected.nat_to(BACKEND_1, 8080, port).build(),
        &frame,
    );
    let answer = |packet: &Packet| {
        let mut p = packet.clone();
        let base = reply(p.family, p.protocol(), BACKEND_1, 8080, port);
        (p.src_mac, p.dst_mac) = (base.src_mac, base.dst_mac);
        (p.src, p.dst, p.sport, p.dport) = (base.src, base.dst, base.sport, base.dport);
        p
    };
    let what = format!("{what}, on the way back");
    let (verdict, frame) = balancer.run_uncounted(&answer(sent).build());
    assert_eq!(verdict, Verdict::Tx, "{what}");
    oracle::assert_frame(
        &what,
        &answer(expected).nat_back(VIP, 80, CLIENT, 40000).build(),
        &frame,
    );
}

#[test]
fn partial_checksums_are_completed_at_every_length() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(family, protocol);
            let port = open(&mut balancer, family, protocol);
            for len in 0..=1460 {
                let right = established(family, protocol, len);
                let partial = right.clone().checksum(Checksum::Partial);
                let what = format!("{family:?} protocol {protocol}, {len} bytes, partial");
                check_both_ways(&mut balancer, port, &partial, &right, &what);
            }
        }
    }
}

#[test]
fn right_checksums_stay_right_at_every_length() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(family, protocol);
            let port = open(&mut balancer, family, protocol);
            for len in 0..=1460 {
                let right = established(family, protocol, len);
                let what = format!("{family:?} protocol {protocol}, {len} bytes");
                check_both_ways(&mut balancer, port, &right, &right, &what);
            }
        }
    }
}

#[test]
fn a_partial_checksum_is_completed_on_the_first_packet_too() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(family, protocol);
            let mut right = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
            if protocol == TCP {
                right = right.syn();
            }
            let sent = right.clone().checksum(Checksum::Partial);
            let counts = Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1);
            let counts = match protocol {
                TCP => counts.load(1, 0, 1),
                _ => counts.load(1, 1, 0),
            };
            balancer.check_new(
                &format!("{family:?} protocol {protocol}: partial first packet"),
                &sent,
                |port| Expected::sent(&right.nat_to(BACKEND_1, 8080, port)),
                &counts,
            );
        }
    }
}

#[test]
fn a_partial_checksum_covers_the_packet_and_not_its_surroundings() {
    let cases = [
        ("padding", tcp(Family::V4).trailer([0xaa; 7])),
        ("IPv4 options", tcp(Family::V4).options(&[1; 8])),
        ("VLAN tags", tcp(Family::V4).vlan(0x88a8, 7).vlan(0x8100, 8)),
        (
            "extension headers",
            tcp(Family::V6).extension(DESTINATION_OPTIONS, 24),
        ),
    ];
    for (what, packet) in cases {
        let mut balancer = balancer(packet.family, TCP);
        balancer.change(1, |s| s.backends[0].tags = packet.tags());
        let port = open_with(&mut balancer, packet.clone());
        for len in [0, 1, 2, 511, 512, 513, 1023, 1025] {
            let right = packet
                .clone()
                .from(CLIENT, 40000)
                .to(VIP, 80)
                .ack()
                .payload(payload(len));
            let partial = right.clone().checksum(Checksum::Partial);
            check_both_ways(
                &mut balancer,
                port,
                &partial,
                &right,
                &format!("{what}, {len} bytes"),
            );
        }
    }
}

#[test]
fn a_missing_udp_checksum_stays_missing() {
    let mut balancer = balancer(Family::V4, UDP);
    let port = open(&mut balancer, Family::V4, UDP);
    for len in [0, 1, 100] {
        let sent = established(Family::V4, UDP, len).checksum(Checksum::Zero);
        check_both_ways(&mut balancer, port, &sent, &sent, "no checksum");
    }
}

#[test]
fn a_wrong_checksum_stays_exactly_as_wrong() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut balancer = balancer(family, protocol);
            let port = open(&mut balancer, family, protocol);
            for by in [1, 0x100, 0x7fff, 0xfffe] {
                let sent = established(family, protocol, 33).checksum(Checksum::Wrong(by));
                check_both_ways(
                    &mut balancer,
                    port,
                    &sent,
                    &sent,
                    &format!("{family:?} protocol {protocol}, wrong by {by:#x}"),
                );
            }
        }
    }
}

/// The sum of all ones has two forms; in UDP zero means "none" and must never be written.
#[test]
fn a_udp_checksum_never_becomes_zero() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        let port = open(&mut balancer, family, UDP);
        // The last two bytes run through all values, so every checksum occurs, also zero's.
        for tail in 0..=u16::MAX {
            let sent = udp(family)
                .from(CLIENT, 40000)
                .to(VIP, 80)
                .payload(tail.to_be_bytes());
            let (_, frame) = balancer.run_uncounted(&sent.build());
            let expected = sent.nat_to(BACKEND_1, 8080, port).build();
            if frame != expected {
                oracle::assert_frame(&format!("tail {tail:#06x}"), &expected, &frame);
            }
        }
    }
}
