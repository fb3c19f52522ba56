//! Judges packets: parses with `etherparse`, checks every checksum from scratch, and says in
//! sentences what is wrong.

use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice};
use std::{fmt::Write as _, net::IpAddr};

/// Checks all checksums of a frame.
///
/// # Errors
/// Says which layer cannot be parsed or which checksum is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<(), String> {
    let packet = SlicedPacket::from_ethernet(frame).map_err(|e| format!("does not parse: {e}"))?;
    let (src, dst) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            let right = header.calc_header_checksum();
            if header.header_checksum != right {
                return Err(format!(
                    "the IPv4 header checksum is {:#06x}, right would be {right:#06x}",
                    header.header_checksum
                ));
            }
            (header.source.into(), header.destination.into())
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            (
                IpAddr::V6(header.source_addr()),
                IpAddr::V6(header.destination_addr()),
            )
        }
        _ => return Ok(()),
    };
    let check = |name: &str, field: u16, right: Result<u16, String>| match right {
        Ok(right) if right == field => Ok(()),
        Ok(right) => Err(format!(
            "the {name} checksum is {field:#06x}, right would be {right:#06x}"
        )),
        Err(e) => Err(format!("the {name} checksum cannot be computed: {e}")),
    };
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let header = tcp.to_header();
            let right = match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    header.calc_checksum_ipv4_raw(s.octets(), d.octets(), tcp.payload())
                }
                (IpAddr::V6(s), IpAddr::V6(d)) => {
                    header.calc_checksum_ipv6_raw(s.octets(), d.octets(), tcp.payload())
                }
                _ => unreachable!("both addresses come from one header"),
            };
            check("TCP", header.checksum, right.map_err(|e| e.to_string()))
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            if header.checksum == 0 && src.is_ipv4() {
                return Ok(());
            }
            let right = match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    header.calc_checksum_ipv4_raw(s.octets(), d.octets(), udp.payload())
                }
                (IpAddr::V6(s), IpAddr::V6(d)) => {
                    header.calc_checksum_ipv6_raw(s.octets(), d.octets(), udp.payload())
                }
                _ => unreachable!("both addresses come from one header"),
            };
            check("UDP", header.checksum, right.map_err(|e| e.to_string()))
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            let right = icmp.icmp_type().calc_checksum(icmp.payload());
            check("ICMP", icmp.checksum(), Ok(right))
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            if let (IpAddr::V6(s), IpAddr::V6(d)) = (src, dst)
                && !icmp.is_checksum_valid(s.octets(), d.octets())
            {
                return Err(format!(
                    "the ICMPv6 checksum {:#06x} is wrong",
                    icmp.checksum()
                ));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The fields of a frame in the order they stand, named as people name them. What cannot be parsed
/// is left out; the bytes at the end are always there.
#[must_use]
pub fn fields(frame: &[u8]) -> Vec<(&'static str, String)> {
    let mut out = vec![("length", frame.len().to_string())];
    let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else {
        return out;
    };
    if frame.len() >= 14 {
        out.push(("MAC destination", mac(&frame[..6])));
        out.push(("MAC source", mac(&frame[6..12])));
    }
    for id in packet.vlan_ids() {
        out.push(("VLAN", id.value().to_string()));
    }
    match &packet.net {
        Some(etherparse::LaxNetSlice::Ipv4(ip)) => {
            let h = ip.header();
            out.push(("IP source", h.source_addr().to_string()));
            out.push(("IP destination", h.destination_addr().to_string()));
            out.push(("TTL", h.ttl().to_string()));
            out.push(("IP length", h.total_len().to_string()));
            out.push(("IP identification", h.identification().to_string()));
            out.push(("don't fragment", h.dont_fragment().to_string()));
            out.push(("IP checksum", format!("{:#06x}", h.header_checksum())));
            out.push(("IP options", format!("{:02x?}", h.options())));
            out.push(("IP protocol", h.protocol().0.to_string()));
        }
        Some(etherparse::LaxNetSlice::Ipv6(ip)) => {
            let h = ip.header();
            out.push(("IP source", h.source_addr().to_string()));
            out.push(("IP destination", h.destination_addr().to_string()));
            out.push(("hop limit", h.hop_limit().to_string()));
            out.push(("IP payload length", h.payload_length().to_string()));
            out.push(("flow label", h.flow_label().value().to_string()));
            out.push(("next header", h.next_header().0.to_string()));
        }
        Some(etherparse::LaxNetSlice::Arp(a)) => {
            out.push(("ARP operation", a.operation().0.to_string()));
            out.push(("ARP sender MAC", mac(a.sender_hw_addr())));
            out.push((
                "ARP sender address",
                format!("{:?}", a.sender_protocol_addr()),
            ));
            out.push(("ARP target MAC", mac(a.target_hw_addr())));
            out.push((
                "ARP target address",
                format!("{:?}", a.target_protocol_addr()),
            ));
        }
        None => {}
    }
    match &packet.transport {
        Some(TransportSlice::Tcp(t)) => {
            out.push(("source port", t.source_port().to_string()));
            out.push(("destination port", t.destination_port().to_string()));
            out.push(("TCP sequence", t.sequence_number().to_string()));
            out.push(("TCP acknowledgment", t.acknowledgment_number().to_string()));
            let flags = [
                (t.syn(), 'S'),
                (t.ack(), 'A'),
                (t.fin(), 'F'),
                (t.rst(), 'R'),
                (t.psh(), 'P'),
                (t.urg(), 'U'),
            ];
            let flags = flags
                .iter()
                .filter(|(on, _)| *on)
                .map(|(_, c)| *c)
                .collect();
            out.push(("TCP flags", flags));
            out.push(("TCP header length", (t.data_offset() * 4).to_string()));
            out.push(("TCP window", t.window_size().to_string()));
            out.push(("TCP checksum", format!("{:#06x}", t.checksum())));
            out.push(("TCP options", format!("{:02x?}", t.options())));
            out.push(("payload", bytes(t.payload())));
        }
        Some(TransportSlice::Udp(u)) => {
            out.push(("source port", u.source_port().to_string()));
            out.push(("destination port", u.destination_port().to_string()));
            out.push(("UDP length", u.length().to_string()));
            out.push(("UDP checksum", format!("{:#06x}", u.checksum())));
            out.push(("payload", bytes(u.payload())));
        }
        Some(TransportSlice::Icmpv4(i)) => {
            out.push((
                "ICMP type and code",
                format!("{} {}", i.type_u8(), i.code_u8()),
            ));
            out.push(("ICMP checksum", format!("{:#06x}", i.checksum())));
            out.push(("payload", bytes(i.payload())));
        }
        Some(TransportSlice::Icmpv6(i)) => {
            out.push((
                "ICMPv6 type and code",
                format!("{} {}", i.type_u8(), i.code_u8()),
            ));
            out.push(("ICMPv6 checksum", format!("{:#06x}", i.checksum())));
            out.push(("payload", bytes(i.payload())));
        }
        _ => {}
    }
    out
}

/// Source and destination port of a TCP or UDP packet, or of the first fragment of one.
#[must_use]
pub fn ports(frame: &[u8]) -> Option<(u16, u16)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    match packet.transport {
        Some(TransportSlice::Tcp(t)) => return Some((t.source_port(), t.destination_port())),
        Some(TransportSlice::Udp(u)) => return Some((u.source_port(), u.destination_port())),
        Some(_) => return None,
        None => {}
    }
    let payload = packet.ip_payload()?;
    let segment = payload.payload;
    if !payload.fragmented || ![6, 17].contains(&payload.ip_number.0) || segment.len() < 4 {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    Some((port(0), port(2)))
}

fn mac(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

fn bytes(bytes: &[u8]) -> String {
    if bytes.len() <= 40 {
        format!("{} bytes {bytes:02x?}", bytes.len())
    } else {
        format!("{} bytes {:02x?}…", bytes.len(), &bytes[..40])
    }
}

/// What differs between two frames, one sentence a line; empty if they are equal.
#[must_use]
pub fn difference(expected: &[u8], got: &[u8]) -> String {
    if expected == got {
        return String::new();
    }
    let (want, have) = (fields(expected), fields(got));
    let mut out = String::new();
    for (name, value) in &want {
        match have.iter().find(|(n, _)| n == name) {
            Some((_, v)) if v == value => {}
            Some((_, v)) => {
                let _ = writeln!(out, "the {name} is {v}, expected {value}");
            }
            None => {
                let _ = writeln!(out, "there is no {name}, expected {value}");
            }
        }
    }
    for (name, value) in &have {
        if !want.iter().any(|(n, _)| n == name) {
            let _ = writeln!(out, "there is a {name} of {value}, expected none");
        }
    }
    let at = expected
        .iter()
        .zip(got)
        .position(|(a, b)| a != b)
        .unwrap_or_else(|| expected.len().min(got.len()));
    let _ = writeln!(out, "the first byte that differs is at {at}");
    let _ = writeln!(out, "expected {expected:02x?}");
    let _ = write!(out, "     got {got:02x?}");
    out
}

/// Asserts that two frames are equal, byte for byte.
///
/// # Panics
/// With a sentence for each field that differs.
#[track_caller]
pub fn assert_frame(context: &str, expected: &[u8], got: &[u8]) {
    let difference = difference(expected, got);
    assert!(difference.is_empty(), "{context}:\n{difference}");
}

/// Asserts that all checksums of a frame are right.
///
/// # Panics
/// Naming the checksum that is wrong.
#[track_caller]
pub fn assert_checksums(context: &str, frame: &[u8]) {
    if let Err(e) = verify_checksums(frame) {
        panic!("{context}: {e}\n{:?}", fields(frame));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{CLIENT, Checksum, Family, VIP, tcp, udp};

    #[test]
    fn a_wrong_checksum_is_found() {
        for family in Family::BOTH {
            for packet in [tcp(family), udp(family)] {
                let frame = packet.checksum(Checksum::Wrong(5)).build();
                let error = verify_checksums(&frame).expect_err("checksum is wrong");
                assert!(error.contains("checksum is"), "{error}");
            }
        }
    }

    #[test]
    fn a_difference_names_the_field() {
        let a = tcp(Family::V4).from(CLIENT, 40000).to(VIP, 80);
        let b = a.clone().to(VIP, 81);
        let text = difference(&a.build(), &b.build());
        assert!(
            text.contains("the destination port is 81, expected 80"),
            "{text}"
        );
        assert!(!text.contains("source port"), "{text}");
        assert_eq!(difference(&a.build(), &a.build()), "");
    }
}
