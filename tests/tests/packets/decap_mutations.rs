//! Encapsulated packets with random bytes changed, judged by a second decapsulator that reads the
//! documents and not the program: same packet, same outcome.

use crate::decap::{Backend, How, carry, segment};
use lb_common::decap::{GUE_PORT, Outcome};
use proptest::prelude::*;
use sluice_tests::{
    oracle,
    packet::{
        BACKEND_1, CLIENT, Checksum, DESTINATION_OPTIONS, Family, HOP_BY_HOP, Packet, VIP,
        ones_complement_sum, pseudo_header_sum, udp,
    },
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP header as far as it can be read.
struct Ip {
    src: IpAddr,
    dst: IpAddr,
    /// Bytes of header and payload.
    len: usize,
    class: u8,
    content: Content,
}

/// What is behind an IP header.
enum Content {
    /// Protocol, and where it begins.
    Payload(u8, usize),
    /// Protocol, and where it begins if this is the first one.
    Fragment(u8, Option<usize>),
    /// The header contradicts itself; protocol and place as it claims.
    Malformed(u8, Option<usize>),
}

fn be16(bytes: &[u8]) -> usize {
    usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// `None` if not even the addresses are there.
fn ip(bytes: &[u8], family: Family) -> Option<Ip> {
    match family {
        Family::V4 => ipv4(bytes),
        Family::V6 => ipv6(bytes),
    }
}

fn ipv4(bytes: &[u8]) -> Option<Ip> {
    let header: [u8; 20] = *bytes.first_chunk()?;
    let address = |at: usize| {
        let octets: [u8; 4] = header[at..at + 4].try_into().expect("four bytes");
        IpAddr::V4(Ipv4Addr::from(octets))
    };
    let header_len = usize::from(header[0] & 15) * 4;
    let len = be16(&header[2..]);
    let fragment = be16(&header[6..]) & 0x3fff;
    let first = (fragment & 0x1fff == 0).then_some(header_len);
    let sound = header[0] >> 4 == 4 && header_len >= 20 && len >= header_len && len <= bytes.len();
    let content = match (sound, fragment) {
        (false, _) => Content::Malformed(header[9], first),
        (true, 0) => Content::Payload(header[9], header_len),
        (true, _) => Content::Fragment(header[9], first),
    };
    Some(Ip {
        src: address(12),
        dst: address(16),
        len,
        class: header[1],
        content,
    })
}

fn ipv6(bytes: &[u8]) -> Option<Ip> {
    let header: [u8; 40] = *bytes.first_chunk()?;
    let address = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen bytes");
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    let len = 40 + be16(&header[4..]);
    // What a fragment header directly behind the first one says, for those that are not taken.
    let claim = match (header[6], bytes.get(40..48)) {
        (44, Some(f)) => (f[0], (be16(&f[2..]) & 0xfff8 == 0).then_some(48)),
        (44, None) => (44, None),
        (next, _) => (next, Some(40)),
    };
    let malformed = || Content::Malformed(claim.0, claim.1);
    let content = if header[0] >> 4 != 6 || len > bytes.len() {
        malformed()
    } else {
        let (mut next, mut at, mut seen) = (header[6], 40, 0);
        loop {
            match next {
                44 => break Content::Fragment(claim.0, claim.1),
                0 | 43 | 60 if seen == 4 => break malformed(),
                0 | 43 | 60 => {
                    let Some(extension) = bytes.get(at..at + 8) else {
                        break malformed();
                    };
                    let extension_len = (usize::from(extension[1]) + 1) * 8;
                    if at + extension_len > len {
                        break malformed();
                    }
                    (next, at, seen) = (extension[0], at + extension_len, seen + 1);
                }
                _ => break Content::Payload(next, at),
            }
        }
    };
    Some(Ip {
        src: address(8),
        dst: address(24),
        len,
        class: (be16(&header) >> 4) as u8,
        content,
    })
}

/// What a backend that holds [`BACKEND_1`]'s addresses and the VIP's does with a frame.
fn model(frame: &[u8]) -> (Vec<u8>, Option<Outcome>) {
    match judge(frame) {
        Ok((frame, how)) => (frame, Some(how)),
        Err(outcome) => (frame.to_vec(), outcome),
    }
}

fn family_of(ether_type: usize) -> Option<Family> {
    match ether_type {
        0x0800 => Some(Family::V4),
        0x86dd => Some(Family::V6),
        _ => None,
    }
}

fn judge(frame: &[u8]) -> Result<(Vec<u8>, Outcome), Option<Outcome>> {
    let mut link = 12;
    for _ in 0..2 {
        let ether_type = frame.get(link..link + 2).ok_or(None)?;
        if ![0x8100, 0x88a8].contains(&be16(ether_type)) {
            break;
        }
        link += 4;
    }
    let ether_type = frame.get(link..link + 2).ok_or(None)?;
    let family = family_of(be16(ether_type)).ok_or(None)?;
    let outside = &frame[link + 2..];
    let outer = ip(outside, family).ok_or(None)?;
    let held = [BACKEND_1.ip(family), VIP.ip(family)].contains(&outer.dst);
    let is_gue = |at: usize| {
        let udp = outside.get(at..at + 8);
        udp.is_some_and(|udp| be16(&udp[2..]) == usize::from(GUE_PORT))
    };
    let carries = |protocol: u8, at: Option<usize>| match protocol {
        4 | 41 => held,
        17 => held && at.is_some_and(is_gue),
        _ => false,
    };
    let (protocol, at) = match outer.content {
        Content::Payload(protocol, at) => (protocol, at),
        Content::Fragment(protocol, at) => {
            return Err(carries(protocol, at).then_some(Outcome::Fragment));
        }
        Content::Malformed(protocol, at) => {
            return Err(carries(protocol, at).then_some(Outcome::Malformed));
        }
    };
    if !carries(protocol, Some(at)) {
        return Err(None);
    }
    let of_number = |number| match number {
        4 => Some(Family::V4),
        41 => Some(Family::V6),
        _ => None,
    };
    let (how, inside, at, end) = if protocol == 17 {
        let udp_len = be16(&outside[at + 4..]);
        if udp_len < 12 || at + udp_len > outer.len {
            return Err(Some(Outcome::Malformed));
        }
        let gue = &outside[at + 8..at + 12];
        let (inside, skip) = match gue {
            [first, ..] if first >> 4 == 4 => (Family::V4, 8),
            [first, ..] if first >> 4 == 6 => (Family::V6, 8),
            [0, number, 0, 0] => (of_number(*number).ok_or(Some(Outcome::Unsupported))?, 12),
            _ => return Err(Some(Outcome::Unsupported)),
        };
        (Outcome::Gue, inside, at + skip, at + udp_len)
    } else {
        let inside = of_number(protocol).expect("4 or 41");
        (Outcome::Ipip, inside, at, outer.len)
    };
    let malformed = Some(Outcome::Malformed);
    let inner = ip(&outside[at..], inside).ok_or(malformed)?;
    if matches!(inner.content, Content::Malformed(..)) || at + inner.len > end {
        return Err(malformed);
    }
    if ![BACKEND_1.ip(inside), VIP.ip(inside)].contains(&inner.dst) {
        return Err(Some(Outcome::NotVip));
    }
    let mut packet = outside[at..].to_vec();
    if outer.class & 3 == 3 {
        match inner.class & 3 {
            0 => return Err(Some(Outcome::Congestion)),
            3 => {}
            _ => mark(&mut packet, inside),
        }
    }
    if let Content::Payload(protocol, at) = inner.content {
        complete(&mut packet, &inner, protocol, at);
    }
    let mut out = frame[..link].to_vec();
    out.extend(match inside {
        Family::V4 => [0x08, 0x00],
        Family::V6 => [0x86, 0xdd],
    });
    out.extend(packet);
    Ok((out, how))
}

/// Sets both bits of ECN.
fn mark(packet: &mut [u8], family: Family) {
    if family == Family::V6 {
        packet[1] |= 0x30;
        return;
    }
    // RFC 1624, equation 3: a checksum that was wrong stays wrong by the same amount.
    let before = be16(packet) as u16;
    packet[1] |= 3;
    let words = [!(be16(&packet[10..]) as u16), !before, be16(packet) as u16];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let check = !ones_complement_sum(0, &bytes);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
}

/// Completes a checksum that holds the sum of the pseudo-header.
fn complete(packet: &mut [u8], inner: &Ip, protocol: u8, at: usize) {
    let (field, least) = match protocol {
        6 => (at + 16, 20),
        17 => (at + 6, 8),
        _ => return,
    };
    let len = inner.len - at;
    if len < least {
        return;
    }
    let check = be16(&packet[field..]) as u16;
    let partial = pseudo_header_sum(inner.src, inner.dst, protocol, len);
    if check != partial || (protocol == 17 && check == 0) {
        return;
    }
    let mut check = !ones_complement_sum(0, &packet[at..inner.len]);
    if protocol == 17 && check == 0 {
        check = 0xffff;
    }
    packet[field..field + 2].copy_from_slice(&check.to_be_bytes());
}

fn originals() -> Vec<Packet> {
    let mut packets = Vec::new();
    for family in Family::BOTH {
        let marked = {
            let mut packet = segment(family);
            packet.tos = 2;
            packet
        };
        let inners = [
            segment(family),
            segment(family).checksum(Checksum::Partial),
            segment(family).vlan(0x88a8, 7).vlan(0x8100, 8),
            marked,
            udp(family)
                .from(CLIENT, 5000)
                .to(VIP, 53)
                .payload(*b"question")
                .checksum(Checksum::Partial),
            match family {
                Family::V4 => segment(family).options(&[1; 12]),
                Family::V6 => segment(family).extension(HOP_BY_HOP, 16),
            },
        ];
        for outer in Family::BOTH {
            for how in How::ALL {
                for inner in &inners {
                    let mut sent = carry(outer, how, inner);
                    sent.tos = inner.tos | u8::from(inner.tos != 0);
                    packets.push(sent.clone());
                    packets.push(match outer {
                        Family::V4 => sent.options(&[1; 8]),
                        Family::V6 => sent.extension(DESTINATION_OPTIONS, 8),
                    });
                }
            }
        }
    }
    packets
}

thread_local! {
    static BACKEND: Backend = Backend::new();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 6000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn program_and_model_agree(
        original in prop::sample::select(originals()),
        changes in prop::collection::vec((0..130_usize, any::<u8>(), any::<bool>()), 0..4),
        cut in prop::option::weighted(0.1, 14..160_usize),
    ) {
        let mut frame = original.build();
        for (at, value, is_mask) in changes {
            let len = frame.len();
            let byte = &mut frame[at % len];
            // One bit of it, or all.
            *byte = if is_mask { *byte ^ (1 << (value % 8)) } else { value };
        }
        if let Some(len) = cut {
            frame.truncate(len);
        }
        let (expected, outcome) = model(&frame);
        BACKEND.with(|backend| {
            let before = backend.counters();
            let out = backend.run(&frame);
            let what = format!("{outcome:?} of {frame:02x?}");
            oracle::assert_frame(&what, &expected, &out);
            let after = backend.counters();
            let moved: Vec<_> = after
                .iter()
                .filter(|(name, (packets, _))| {
                    before.get(*name).map_or(0, |(packets, _)| *packets) != *packets
                })
                .map(|(name, _)| *name)
                .collect();
            let wanted: Vec<_> = outcome.iter().map(|outcome| outcome.name()).collect();
            assert_eq!(moved, wanted, "{what}");
        });
    }
}

#[test]
fn unchanged_originals_are_taken() {
    for original in originals() {
        let (_, outcome) = model(&original.build());
        assert!(
            outcome.is_some_and(Outcome::taken),
            "{outcome:?}: {original:?}"
        );
    }
}
