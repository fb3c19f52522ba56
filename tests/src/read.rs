//! Reads packets back from frames, on `etherparse`.

use crate::packet::{Checksum, Fragment, Packet, Transport, tcp, udp};
use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice, TcpHeader};
use std::net::IpAddr;

/// Headers of IPv6 that another may follow, but for the fragment header.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
const FRAGMENT: u8 = 44;

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

impl Packet {
    /// The packet that builds to this frame, if it is one of TCP or UDP and says nothing but what a
    /// [`Packet`] can say.
    #[must_use]
    pub fn read(frame: &[u8]) -> Option<Self> {
        let mut at = 14;
        let mut vlans = Vec::new();
        while let Some(tag @ (0x8100 | 0x88a8)) = be16(frame, at - 2) {
            vlans.push((tag, be16(frame, at)?));
            at += 4;
        }
        let mut packet = match be16(frame, at - 2)? {
            0x0800 => Self::read_ipv4(frame.get(at..)?)?,
            0x86dd => Self::read_ipv6(frame.get(at..)?)?,
            _ => return None,
        };
        packet.vlans = vlans;
        packet.dst_mac = frame[..6].try_into().ok()?;
        packet.src_mac = frame[6..12].try_into().ok()?;
        packet.with_checksum_of(frame)
    }

    /// The same with the kind of checksum that makes it this frame.
    fn with_checksum_of(mut self, frame: &[u8]) -> Option<Self> {
        let at = match self.transport {
            Transport::Tcp(_) => 16,
            Transport::Udp => 6,
            _ => return (self.build() == frame).then_some(self),
        };
        let built = self.build();
        let field = built.len() - self.trailer.len() - self.payload.len() - self.header_len() + at;
        let (right, found) = (be16(&built, field)?, be16(frame, field)?);
        // The difference in ones' complement.
        let by = u32::from(found) + u32::from(!right);
        let by = (by % 0x1_0000 + by / 0x1_0000) as u16;
        [
            Checksum::Right,
            Checksum::Partial,
            Checksum::Zero,
            Checksum::Wrong(by),
        ]
        .into_iter()
        .find_map(|checksum| {
            self.checksum = checksum;
            (self.build() == frame).then(|| self.clone())
        })
    }

    /// Bytes of the transport header.
    fn header_len(&self) -> usize {
        match &self.transport {
            Transport::Tcp(header) => header.header_len(),
            Transport::Udp => 8,
            _ => 0,
        }
    }

    fn read_ipv4(bytes: &[u8]) -> Option<Self> {
        let header = Ipv4HeaderSlice::from_slice(bytes).ok()?.to_header();
        let (start, len) = (header.header_len(), usize::from(header.total_len));
        let fragment = Fragment {
            offset: header.fragment_offset.value(),
            more: header.more_fragments,
        };
        let is_fragment = fragment.more || fragment.offset != 0;
        let fragment = is_fragment.then_some(fragment);
        let segment = bytes.get(start..len)?;
        let mut packet = Self::read_transport(header.protocol.0, segment, fragment, true)?;
        packet.src = IpAddr::from(header.source);
        packet.dst = IpAddr::from(header.destination);
        packet.ttl = header.time_to_live;
        packet.tos = header.dscp.value() << 2 | header.ecn.value();
        packet.id = header.identification;
        packet.dont_fragment = header.dont_fragment;
        packet.options = header.options.to_vec();
        packet.trailer = bytes[len..].to_vec();
        Some(packet)
    }

    fn read_ipv6(bytes: &[u8]) -> Option<Self> {
        let header = Ipv6HeaderSlice::from_slice(bytes).ok()?.to_header();
        let len = 40 + usize::from(header.payload_length);
        let (mut next, mut rest) = (header.next_header.0, bytes.get(40..len)?);
        let mut extensions = Vec::new();
        while EXTENSIONS.contains(&next) {
            let length = (usize::from(*rest.get(1)?) + 1) * 8;
            let mut extension = rest.get(..length)?.to_vec();
            extensions.push((next, extension.clone()));
            next = std::mem::take(&mut extension[0]);
            rest = &rest[length..];
        }
        let mut fragment = None;
        let mut id = 0;
        if next == FRAGMENT {
            let place = be16(rest, 2)?;
            fragment = Some(Fragment {
                offset: place >> 3,
                more: place & 1 != 0,
            });
            id = be16(rest, 6)?;
            next = rest[0];
            rest = rest.get(8..)?;
        }
        let mut packet = Self::read_transport(next, rest, fragment, false)?;
        packet.src = IpAddr::from(header.source);
        packet.dst = IpAddr::from(header.destination);
        packet.ttl = header.hop_limit;
        packet.tos = header.traffic_class;
        packet.flow_label = header.flow_label.value();
        packet.id = id;
        packet.extensions = extensions;
        packet.trailer = bytes[len..].to_vec();
        Some(packet)
    }

    fn read_transport(
        protocol: u8,
        segment: &[u8],
        fragment: Option<Fragment>,
        v4: bool,
    ) -> Option<Self> {
        use crate::packet::Family::{V4, V6};
        let family = if v4 { V4 } else { V6 };
        let mut packet = match protocol {
            6 => tcp(family),
            17 => udp(family),
            _ => return None,
        };
        if fragment.is_some_and(|f| f.offset != 0) {
            packet.transport = Transport::Other(protocol);
            packet.payload = segment.to_vec();
        } else if protocol == 6 {
            let (header, payload) = TcpHeader::from_slice(segment).ok()?;
            (packet.sport, packet.dport) = (header.source_port, header.destination_port);
            packet.transport = Transport::Tcp(Box::new(header));
            packet.payload = payload.to_vec();
        } else {
            (packet.sport, packet.dport) = (be16(segment, 0)?, be16(segment, 2)?);
            packet.payload = segment.get(8..)?.to_vec();
        }
        packet.fragment = fragment;
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use crate::packet::{
        CLIENT, Checksum, DESTINATION_OPTIONS, Family, HOP_BY_HOP, Packet, VIP, ping, transport,
    };

    #[test]
    fn what_was_built_is_read_back() {
        for family in Family::BOTH {
            for protocol in [6, 17] {
                let plain = transport(family, protocol)
                    .from(CLIENT, 40000)
                    .to(VIP, 80)
                    .payload([1, 2, 3]);
                let mut packets = vec![
                    plain.clone(),
                    plain.clone().vlan(0x88a8, 100).vlan(0x8100, 0x2064),
                    plain.clone().checksum(Checksum::Partial),
                    plain.clone().checksum(Checksum::Wrong(0x0101)),
                    plain.clone().trailer([0; 6]),
                    plain.clone().fragment(0, true),
                    plain.clone().ttl(1),
                ];
                packets.push(match family {
                    Family::V4 => plain.clone().options(&[1, 1, 1, 0]),
                    Family::V6 => plain
                        .clone()
                        .extension(HOP_BY_HOP, 8)
                        .extension(DESTINATION_OPTIONS, 16),
                });
                for packet in packets {
                    let frame = packet.build();
                    let read = Packet::read(&frame).unwrap_or_else(|| panic!("{packet:?}"));
                    assert_eq!(read.build(), frame);
                    assert_eq!((read.src, read.sport), (packet.src, packet.sport));
                    assert_eq!((read.dst, read.dport), (packet.dst, packet.dport));
                    assert_eq!(read.checksum, packet.checksum);
                    assert_eq!(read.fragment, packet.fragment);
                    assert_eq!(read.vlans, packet.vlans);
                }
                let later = plain.fragment(9, false);
                let read = Packet::read(&later.build()).expect("a later fragment");
                assert_eq!(read.piece(), Some(false));
            }
            assert_eq!(Packet::read(&ping(family, 1, 1).build()), None);
        }
        assert_eq!(Packet::read(&[0; 14]), None);
    }
}
