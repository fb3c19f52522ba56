//! Decapsulation on a backend: what comes off, what stays, and what is counted.

use lb_common::decap::{Counter, GUE_PORT, HELD, Outcome, VIP as INNER};
use sluice::dataplane::Decap;
use sluice_tests::{
    oracle,
    packet::{
        BACKEND_1, BACKEND_2, BALANCER, CLIENT, Checksum, DESTINATION_OPTIONS, Family, HOP_BY_HOP,
        Packet, STRANGER, VIP, VIP_2, other, ping, tcp, transport, udp,
    },
};
use std::{collections::BTreeMap, net::IpAddr, panic::Location};

const V4: Family = Family::V4;
const V6: Family = Family::V6;
const PASS: u32 = 2;

/// A backend that holds its own address, and the VIP on its loopback interface.
pub struct Backend(Decap);

impl Backend {
    pub fn new() -> Self {
        Self::with(&[
            (BACKEND_1.ip(V4), HELD | INNER),
            (BACKEND_1.ip(V6), HELD | INNER),
            (VIP.ip(V4), HELD | INNER),
            (VIP.ip(V6), HELD | INNER),
        ])
    }

    fn with(addresses: &[(IpAddr, u32)]) -> Self {
        let decap = Decap::load(GUE_PORT, addresses.len()).expect("the program loads");
        let addresses = BTreeMap::from_iter(addresses.iter().copied());
        decap.set_addresses(&addresses).expect("room in the maps");
        Self(decap)
    }

    pub fn counters(&self) -> BTreeMap<&'static str, (u64, u64)> {
        let counters = self.0.counters().expect("counters can be read");
        counters
            .into_iter()
            .filter(|(_, c)| *c != Counter::default())
            .map(|(outcome, c)| (outcome.name(), (c.packets, c.bytes)))
            .collect()
    }

    /// What the kernel gets of a frame.
    pub fn run(&self, frame: &[u8]) -> Vec<u8> {
        let run = self.0.test_run(frame).expect("the program runs");
        assert_eq!(run.verdict, PASS, "the kernel gets every packet");
        run.data
    }

    /// Sends a frame, and expects it to reach the kernel as `expected` with one outcome counted, or
    /// none.
    #[track_caller]
    fn check(&self, what: &str, sent: &[u8], expected: &[u8], counted: Option<(Outcome, u64)>) {
        let before = self.counters();
        let got = self.run(sent);
        oracle::assert_frame(&format!("{what} ({})", Location::caller()), expected, &got);
        let mut wanted = before;
        if let Some((outcome, bytes)) = counted {
            let counter = wanted.entry(outcome.name()).or_default();
            counter.0 += 1;
            counter.1 += bytes;
        }
        assert_eq!(self.counters(), wanted, "{what}: the counters");
    }

    /// Expects `inner` to come out of `sent`.
    #[track_caller]
    fn taken(&self, what: &str, sent: &Packet, how: Outcome, inner: &Packet) {
        let counted = Some((how, inner.ip_len()));
        self.check(what, &sent.build(), &inner.build(), counted);
    }

    #[track_caller]
    fn refused(&self, what: &str, sent: &[u8], why: Outcome, bytes: u64) {
        self.check(what, sent, sent, Some((why, bytes)));
    }

    #[track_caller]
    fn untouched(&self, what: &str, sent: &[u8]) {
        self.check(what, sent, sent, None);
    }
}

/// How a packet is carried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    Ipip,
    /// The IP header follows UDP at once.
    Gue1,
    /// A GUE header of four bytes comes between.
    Gue0,
}

impl How {
    pub const ALL: [Self; 3] = [Self::Ipip, Self::Gue1, Self::Gue0];

    fn outcome(self) -> Outcome {
        match self {
            Self::Ipip => Outcome::Ipip,
            _ => Outcome::Gue,
        }
    }
}

fn number(inner: Family) -> u8 {
    match inner {
        Family::V4 => 4,
        Family::V6 => 41,
    }
}

/// A packet's IP part.
fn ip_part(packet: &Packet) -> Vec<u8> {
    packet.build()[packet.l2_len()..].to_vec()
}

/// `inner` as the balancer sends it to [`BACKEND_1`], in the same link header.
pub fn carry(outer: Family, how: How, inner: &Packet) -> Packet {
    let number = number(inner.family);
    let mut bytes = ip_part(inner);
    let mut packet = match how {
        How::Ipip => other(outer, number),
        How::Gue1 => udp(outer).from(BALANCER, 50000),
        How::Gue0 => {
            bytes.splice(0..0, [0, number, 0, 0]);
            udp(outer).from(BALANCER, 50000)
        }
    };
    packet = match how {
        How::Ipip => packet.from(BALANCER, 0).to(BACKEND_1, 0),
        _ => packet.to(BACKEND_1, GUE_PORT),
    };
    packet.vlans.clone_from(&inner.vlans);
    packet
        .macs(inner.src_mac, inner.dst_mac)
        .payload(bytes)
        .checksum(match outer {
            V4 => Checksum::Zero,
            V6 => Checksum::Right,
        })
}

/// What a client sends to the VIP, on the backend's segment.
pub fn segment(family: Family) -> Packet {
    tcp(family)
        .macs(BALANCER.mac, BACKEND_1.mac)
        .from(CLIENT, 40000)
        .to(VIP, 80)
        .ack()
        .payload(*b"GET / HTTP/1.1\r\n\r\n")
        .ttl(57)
}

fn every_way(mut f: impl FnMut(Family, How, Family)) {
    for outer in Family::BOTH {
        for how in How::ALL {
            for inner in Family::BOTH {
                f(outer, how, inner);
            }
        }
    }
}

#[test]
fn every_encapsulation_comes_off() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let inners = [
            ("TCP", segment(family)),
            ("SYN", segment(family).syn().payload([])),
            (
                "UDP",
                udp(family)
                    .macs(BALANCER.mac, BACKEND_1.mac)
                    .from(CLIENT, 40000)
                    .to(VIP, 53)
                    .payload(*b"question"),
            ),
            (
                "ping",
                ping(family, 1, 2)
                    .macs(BALANCER.mac, BACKEND_1.mac)
                    .from(CLIENT, 0)
                    .to(VIP, 0),
            ),
            ("1400 bytes", segment(family).payload([7; 1400])),
            (
                "another protocol",
                other(family, 132).to(VIP, 0).payload([1; 40]),
            ),
            ("no payload", other(family, 132).to(VIP, 0)),
        ];
        for (what, inner) in inners {
            let what = format!("{family:?} in {outer:?}, {how:?}: {what}");
            backend.taken(&what, &carry(outer, how, &inner), how.outcome(), &inner);
        }
    });
}

#[test]
fn tags_stay() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        for inner in [
            segment(family).vlan(0x8100, 7),
            segment(family).vlan(0x88a8, 0x6007).vlan(0x8100, 8),
        ] {
            let what = format!("{family:?} in {outer:?}, {how:?}, {:?}", inner.vlans);
            backend.taken(&what, &carry(outer, how, &inner), how.outcome(), &inner);
        }
    });
}

#[test]
fn headers_of_every_length_are_walked_over() {
    let backend = Backend::new();
    for how in How::ALL {
        for family in Family::BOTH {
            for words in 1..=10 {
                let inner = segment(family);
                let sent = carry(V4, how, &inner).options(&vec![1; 4 * words]);
                let what = format!("{family:?} in IPv4 with {words} words of options, {how:?}");
                backend.taken(&what, &sent, how.outcome(), &inner);
            }
            let inner = segment(family);
            // The Linux tunnel sends its encapsulation limit in such a header (RFC 2473).
            let sent = carry(V6, how, &inner).extension(DESTINATION_OPTIONS, 8);
            backend.taken("destination options", &sent, how.outcome(), &inner);
            let sent = sent.extension(HOP_BY_HOP, 24);
            backend.taken("two extension headers", &sent, how.outcome(), &inner);
        }
        for outer in Family::BOTH {
            let inner = segment(V4).options(&[1; 40]);
            let sent = carry(outer, how, &inner);
            backend.taken("options inside", &sent, how.outcome(), &inner);
            let inner = segment(V6).extension(HOP_BY_HOP, 8);
            let sent = carry(outer, how, &inner);
            backend.taken("extension inside", &sent, how.outcome(), &inner);
        }
    }
}

#[test]
fn padding_stays_behind_the_inner_packet() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let inner = segment(family).payload([]);
        let sent = carry(outer, how, &inner).trailer([0xaa; 9]);
        let expected = inner.clone().trailer([0xaa; 9]);
        let counted = Some((how.outcome(), inner.ip_len()));
        backend.check("padding", &sent.build(), &expected.build(), counted);
    });
}

#[test]
fn inner_fragments_are_the_kernels_to_put_together() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        for inner in [
            udp(family).to(VIP, 53).payload([3; 64]).fragment(0, true),
            other(family, 17)
                .to(VIP, 0)
                .payload([3; 64])
                .fragment(9, false),
        ] {
            let sent = carry(outer, how, &inner);
            backend.taken("inner fragment", &sent, how.outcome(), &inner);
        }
    });
}

#[test]
fn partial_checksums_are_completed_at_every_length() {
    let backend = Backend::new();
    for family in Family::BOTH {
        for protocol in [6, 17] {
            for len in (0..=130).chain([511, 512, 513, 1023, 1024, 1025, 1399, 1400]) {
                let payload: Vec<u8> = (0..len).map(|i| (i * 31 + i / 256 + 1) as u8).collect();
                let inner = transport(family, protocol)
                    .from(CLIENT, 40000)
                    .to(VIP, 80)
                    .payload(payload);
                let partial = inner.clone().checksum(Checksum::Partial);
                let what = format!("{family:?}, protocol {protocol}, {len} bytes");
                let how = How::ALL[len % 3];
                backend.taken(&what, &carry(V4, how, &partial), how.outcome(), &inner);
                backend.taken(&what, &carry(V6, how, &partial), how.outcome(), &inner);
            }
        }
    }
}

#[test]
fn other_checksums_stay_as_they_are() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let damaged = segment(family).checksum(Checksum::Wrong(5));
        let sent = carry(outer, how, &damaged);
        backend.taken("damaged", &sent, how.outcome(), &damaged);
        let none = udp(family).to(VIP, 53).checksum(Checksum::Zero);
        backend.taken("none", &carry(outer, how, &none), how.outcome(), &none);
    });
}

#[test]
fn a_congestion_mark_moves_inwards() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let packet = |tos| {
            let mut packet = segment(family);
            packet.tos = tos;
            packet
        };
        let carried = |inner: &Packet, tos| {
            let mut sent = carry(outer, how, inner);
            sent.tos = tos;
            sent
        };
        // DSCP 10 and each of the four values of ECN.
        for (inside, outside, result) in [
            (0x28, 0x28, 0x28),
            (0x28, 0x29, 0x28),
            (0x28, 0x2a, 0x28),
            (0x29, 0x29, 0x29),
            (0x2a, 0x28, 0x2a),
            (0x29, 0x2b, 0x2b),
            (0x2a, 0x2b, 0x2b),
            (0x2b, 0x2b, 0x2b),
            (0x2b, 0x28, 0x2b),
        ] {
            let what = format!("{inside:#x} in {outside:#x}, {family:?} in {outer:?}, {how:?}");
            let sent = carried(&packet(inside), outside);
            backend.taken(&what, &sent, how.outcome(), &packet(result));
        }
        let sent = carried(&packet(0x28), 0x2b);
        let why = Outcome::Congestion;
        backend.refused("no room for the mark", &sent.build(), why, sent.ip_len());
    });
}

#[test]
fn only_packets_for_this_hosts_vips_are_taken() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let inner = segment(family);
        let sent = carry(outer, how, &inner.clone().to(VIP_2, 80));
        backend.refused(
            "no VIP of ours",
            &sent.build(),
            Outcome::NotVip,
            sent.ip_len(),
        );
        let mut sent = carry(outer, how, &inner);
        sent.dst = BACKEND_2.ip(outer);
        backend.untouched("for another backend", &sent.build());
    });
    // With chosen VIPs, the backend's own address is none.
    let backend = Backend::with(&[
        (BACKEND_1.ip(V4), HELD),
        (BACKEND_1.ip(V6), HELD),
        (VIP.ip(V4), INNER),
        (VIP.ip(V6), INNER),
    ]);
    every_way(|outer, how, family| {
        let inner = segment(family);
        let sent = carry(outer, how, &inner);
        backend.taken("chosen", &sent, how.outcome(), &inner);
        let sent = carry(outer, how, &inner.clone().to(BACKEND_1, 80));
        let why = Outcome::NotVip;
        backend.refused("its own address", &sent.build(), why, sent.ip_len());
        let mut sent = carry(outer, how, &inner);
        sent.dst = VIP.ip(outer);
        backend.untouched("sent to an address it does not hold", &sent.build());
    });
}

#[test]
fn addresses_that_go_are_no_vips_any_more() {
    let backend = Backend::new();
    let inner = segment(V4);
    let sent = carry(V4, How::Ipip, &inner);
    backend.taken("before", &sent, Outcome::Ipip, &inner);
    let left = BTreeMap::from([(BACKEND_1.ip(V4), HELD | INNER)]);
    assert!(backend.0.set_addresses(&left).expect("the maps change"));
    assert!(!backend.0.set_addresses(&left).expect("nothing changes"));
    assert_eq!(backend.0.addresses().expect("readable"), left);
    let why = Outcome::NotVip;
    backend.refused("after", &sent.build(), why, sent.ip_len());
}

#[test]
fn ordinary_packets_pass_uncounted() {
    let backend = Backend::new();
    for family in Family::BOTH {
        for (what, packet) in [
            ("TCP for the VIP", segment(family)),
            ("UDP", udp(family).to(BACKEND_1, 53).payload(*b"hello")),
            (
                "the reply of a GUE port",
                udp(family).from(STRANGER, GUE_PORT).to(BACKEND_1, 5000),
            ),
            ("ping", ping(family, 1, 1).to(BACKEND_1, 0)),
            ("GRE", other(family, 47).to(BACKEND_1, 0).payload([0; 60])),
            (
                "a fragment of UDP",
                udp(family)
                    .to(BACKEND_1, 2049)
                    .payload([1; 64])
                    .fragment(0, true),
            ),
            (
                "a later fragment of UDP",
                other(family, 17)
                    .to(BACKEND_1, 0)
                    .payload([1; 64])
                    .fragment(9, true),
            ),
        ] {
            backend.untouched(what, &packet.build());
        }
    }
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6]);
    arp.extend([0; 46]);
    backend.untouched("ARP", &arp);
}

#[test]
fn outer_fragments_are_counted() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let sent = carry(outer, how, &segment(family)).fragment(0, true);
        let why = Outcome::Fragment;
        backend.refused("first fragment", &sent.build(), why, sent.ip_len());
        if how == How::Ipip {
            let sent = sent.fragment(16, false);
            backend.refused("last fragment", &sent.build(), why, sent.ip_len());
        }
        let mut sent = carry(outer, how, &segment(family)).fragment(0, true);
        sent.dst = BACKEND_2.ip(outer);
        backend.untouched("for another backend", &sent.build());
    });
}

#[test]
fn gue_that_is_not_understood_is_counted() {
    let backend = Backend::new();
    for outer in Family::BOTH {
        let inner = ip_part(&segment(V4));
        let header = |bytes: [u8; 4]| [bytes.to_vec(), inner.clone()].concat();
        for (what, payload) in [
            ("a control message", header([0x20, 4, 0, 0])),
            ("options", header([0x01, 4, 0, 0])),
            ("flags", header([0, 4, 0x80, 0])),
            ("another protocol", header([0, 47, 0, 0])),
            ("version 2", header([0x80, 4, 0, 0])),
            ("version 1 without IP", header([0x50, 4, 0, 0])),
        ] {
            let sent = udp(outer).to(BACKEND_1, GUE_PORT).payload(payload);
            let why = Outcome::Unsupported;
            backend.refused(what, &sent.build(), why, sent.ip_len());
        }
    }
}

/// A frame with bytes overwritten.
fn damaged(packet: &Packet, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = packet.build();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

#[test]
fn contradicting_headers_are_counted() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        let sent = carry(outer, how, &segment(family));
        let inside = sent.build().len() - ip_part(&segment(family)).len();
        let len = (ip_part(&segment(family)).len() + 1) as u16;
        let cases: Vec<(&str, usize, Vec<u8>)> = match family {
            V4 => vec![
                ("header of four words", inside, vec![0x44]),
                (
                    "longer than the outer packet",
                    inside + 2,
                    len.to_be_bytes().into(),
                ),
                ("shorter than its header", inside + 2, vec![0, 19]),
            ],
            V6 => vec![(
                "longer than the outer packet",
                inside + 4,
                (len - 40).to_be_bytes().into(),
            )],
        };
        for (what, at, bytes) in cases {
            let what = format!("{what}, {family:?} in {outer:?}, {how:?}");
            let why = Outcome::Malformed;
            // Padding gives the frame the bytes that the outer packet does not have.
            let sent = sent.clone().trailer([0; 8]);
            backend.refused(&what, &damaged(&sent, at, &bytes), why, sent.ip_len());
        }
    });
    for outer in Family::BOTH {
        for inner in Family::BOTH {
            // The other version than the outer header announces.
            let mut sent = other(outer, number(inner)).to(BACKEND_1, 0);
            let family = if inner == V4 { V6 } else { V4 };
            sent = sent.payload(ip_part(&segment(family)));
            let why = Outcome::Malformed;
            backend.refused("another version", &sent.build(), why, sent.ip_len());
        }
        let sent = carry(outer, How::Gue1, &segment(V4));
        let at = if outer == V4 { 34 + 4 } else { 54 + 4 };
        let why = Outcome::Malformed;
        for len in [0_u16, 7, 11, 40_000] {
            let frame = damaged(&sent, at, &len.to_be_bytes());
            backend.refused(&format!("UDP length {len}"), &frame, why, sent.ip_len());
        }
    }
}

#[test]
fn every_truncation_passes_unchanged() {
    let backend = Backend::new();
    every_way(|outer, how, family| {
        for sent in [
            carry(outer, how, &segment(family)),
            carry(outer, how, &segment(family).vlan(0x88a8, 7).vlan(0x8100, 8)),
        ] {
            let whole = sent.build();
            let addresses_end = sent.l2_len() + if outer == V4 { 20 } else { 40 };
            for len in 14..whole.len() {
                let frame = &whole[..len];
                let what = format!("the first {len} of {} bytes", whole.len());
                oracle::assert_frame(&what, frame, &backend.run(frame));
                if how == How::Ipip && len >= addresses_end {
                    let bytes = (len - sent.l2_len()) as u64;
                    backend.refused(&what, frame, Outcome::Malformed, bytes);
                }
            }
        }
    });
}

/// The verifier gives up at a million; a jump of this number is a warning.
#[test]
fn the_verifier_has_little_to_do() {
    const BUDGET: u32 = 50_000;
    let backend = Backend::new();
    let info = backend.0.program_info().expect("the kernel tells");
    assert_eq!(info.name, "sluice_decap");
    assert!(
        info.verified_instructions <= BUDGET,
        "{} instructions were verified, {BUDGET} are allowed",
        info.verified_instructions
    );
}
