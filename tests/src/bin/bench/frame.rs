//! The packets that are measured: small ones, without data worth reading.

use lb_common::bench::{Case, FIRST_PORT, HEADER_WORDS, Tuple, stamp};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// `v4` or `v6`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// Bytes of an IP header.
    pub const fn ip_header(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// Address number `n` of a network of the measurement.
    pub fn address(self, network: Network, n: u32) -> IpAddr {
        let (v4, v6) = match network {
            Network::Clients => (Ipv4Addr::new(10, 0, 0, 1), 0xc),
            Network::Vips => (Ipv4Addr::new(198, 19, 0, 1), 0x5),
            Network::Hosts => (Ipv4Addr::new(198, 18, 0, 1), 0xb),
        };
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::from_bits(u32::from(v4) + n)),
            Self::V6 => {
                let first = Ipv6Addr::new(0x2001, 0xdb8, v6, 0, 0, 0, 0, 1);
                IpAddr::V6(Ipv6Addr::from_bits(first.to_bits() + u128::from(n)))
            }
        }
    }
}

/// Where addresses are from. Nothing is ever sent to any of them outside a network namespace.
#[derive(Clone, Copy)]
pub enum Network {
    /// Clients.
    Clients,
    /// VIPs.
    Vips,
    /// The balancer (number 0) and the backends.
    Hosts,
}

/// TCP flags (RFC 9293 section 3.1).
pub const SYN: u8 = 0x02;
/// See [`SYN`].
pub const ACK: u8 = 0x10;

/// What follows the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP.
    Udp,
}

/// The port that services listen on, and their backends.
pub const PORT: u16 = 80;

/// Ethernet address of the balancer.
pub const BALANCER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Ethernet address of every client.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Ethernet address of every backend.
pub const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// Bytes behind the IP header: those of a TCP header, and enough that no frame is below Ethernet's least.
const SEGMENT: usize = 30;

/// A frame of the balancer's side of the wire.
#[derive(Clone)]
pub struct Frame {
    /// Its bytes.
    pub bytes: Vec<u8>,
    family: Family,
    transport: Transport,
}

impl Frame {
    /// A packet of the first client for VIP number `vip`, or for the address given.
    pub fn to_vip(family: Family, transport: Transport, vip: u32) -> Self {
        let client = family.address(Network::Clients, 0);
        let vip = family.address(Network::Vips, vip);
        Self::new(family, transport, (client, FIRST_PORT), (vip, PORT))
    }

    /// A packet from one socket to another.
    pub fn new(
        family: Family,
        transport: Transport,
        src: (IpAddr, u16),
        dst: (IpAddr, u16),
    ) -> Self {
        let mut bytes = [BALANCER_MAC, CLIENT_MAC].concat();
        let protocol = match transport {
            Transport::Tcp(_) => 6,
            Transport::Udp => 17,
        };
        let length = SEGMENT as u16;
        match family {
            Family::V4 => {
                bytes.extend([0x08, 0x00, 0x45, 0]);
                bytes.extend((20 + length).to_be_bytes());
                bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            }
            Family::V6 => {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([protocol, 64]);
            }
        }
        for (address, _) in [src, dst] {
            match address {
                IpAddr::V4(address) => bytes.extend(address.octets()),
                IpAddr::V6(address) => bytes.extend(address.octets()),
            }
        }
        bytes.extend(src.1.to_be_bytes());
        bytes.extend(dst.1.to_be_bytes());
        match transport {
            // Sequence and acknowledgement number, data offset, flags, window.
            Transport::Tcp(flags) => bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0xff, 0]),
            Transport::Udp => bytes.extend(length.to_be_bytes()),
        }
        bytes.resize(14 + family.ip_header() + SEGMENT, 0);
        let mut frame = Self {
            bytes,
            family,
            transport,
        };
        let (ip, segment) = (!fold(frame.ip_sum()), !fold(frame.segment_sum()));
        if family == Family::V4 {
            frame.put(24, ip);
        }
        frame.put(frame.checksum(), segment);
        frame
    }

    /// Where the transport header begins.
    fn transport(&self) -> usize {
        14 + self.family.ip_header()
    }

    /// Where the transport checksum is.
    fn checksum(&self) -> usize {
        self.transport()
            + match self.transport {
                Transport::Tcp(_) => 16,
                Transport::Udp => 6,
            }
    }

    /// Where the addresses begin.
    fn addresses(&self) -> usize {
        match self.family {
            Family::V4 => 26,
            Family::V6 => 22,
        }
    }

    /// Writes a half word as it stands in the packet.
    fn put(&mut self, place: usize, value: u16) {
        self.bytes[place..place + 2].copy_from_slice(&value.to_ne_bytes());
    }

    /// The sum of the IPv4 header.
    fn ip_sum(&self) -> u64 {
        match self.family {
            Family::V4 => sum(&self.bytes[14..34]),
            Family::V6 => 0,
        }
    }

    /// The sum of pseudo-header and segment (RFC 9293 section 3.1, RFC 8200 section 8.1).
    fn segment_sum(&self) -> u64 {
        let protocol = match self.transport {
            Transport::Tcp(_) => 6_u16,
            Transport::Udp => 17,
        };
        let length = (self.bytes.len() - self.transport()) as u16;
        sum(&self.bytes[self.addresses()..])
            + u64::from(protocol.to_be())
            + u64::from(length.to_be())
    }

    /// The record that lets the program in front make packets of many clients out of this one.
    pub fn case(&self, stamped: bool) -> Case {
        let transport = self.transport();
        let last = |place: usize| {
            let bytes = &self.bytes[place..place + 4];
            u32::from_be_bytes(bytes.try_into().expect("four bytes"))
        };
        let (client, vip) = match self.family {
            Family::V4 => (26, 30),
            Family::V6 => (34, 50),
        };
        let mut bare = self.clone();
        for (place, length) in [(client, 4), (vip, 4), (transport, 2), (self.checksum(), 2)] {
            bare.bytes[place..place + length].fill(0);
        }
        if self.family == Family::V4 {
            bare.bytes[24..26].fill(0);
        }
        let mut headers = [0u64; HEADER_WORDS];
        let whole = bytemuck::cast_slice_mut::<u64, u8>(&mut headers);
        let length = whole.len().min(self.bytes.len());
        whole[..length].copy_from_slice(&self.bytes[..length]);
        Case {
            next: 0,
            stride: 1,
            mask: 0,
            first: 0,
            vip_mask: 0,
            length: self.bytes.len() as u32,
            client: last(client),
            vip: last(vip),
            ip_sum: bare.ip_sum() as u32,
            transport_sum: bare.segment_sum() as u32,
            grows_at_head: 0,
            stamp: match (stamped, self.transport) {
                (false, _) => stamp::NONE,
                (true, Transport::Tcp(_)) => stamp::TCP,
                (true, Transport::Udp) => stamp::UDP,
            },
            headers,
            failures: 0,
        }
    }

    /// This packet with other addresses and ports.
    pub fn tuple(&self, src: [u32; 4], dst: [u32; 4], sport: u16, dport: u16) -> Tuple {
        let words = match self.family {
            Family::V4 => 1,
            Family::V6 => 4,
        };
        let mut frame = self.clone();
        let (start, transport) = (self.addresses(), self.transport());
        for (i, word) in src[..words].iter().chain(&dst[..words]).enumerate() {
            frame.bytes[start + 4 * i..start + 4 * i + 4].copy_from_slice(&word.to_ne_bytes());
        }
        frame.put(transport, sport);
        frame.put(transport + 2, dport);
        frame.put(frame.checksum(), 0);
        if self.family == Family::V4 {
            frame.put(24, 0);
        }
        Tuple {
            src,
            dst,
            sport,
            dport,
            ip_checksum: !fold(frame.ip_sum()),
            transport_checksum: !fold(frame.segment_sum()),
        }
    }
}

/// The sum of half words as they stand in memory.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks_exact(2)
        .map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])))
        .sum()
}

/// The ones' complement sum in 16 bits (RFC 1071).
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_oracle() {
        for family in Family::BOTH {
            for transport in [Transport::Tcp(SYN), Transport::Udp] {
                let frame = Frame::to_vip(family, transport, 3);
                sluice_tests::oracle::assert_frame("a packet", &frame.bytes, &frame.bytes);
            }
        }
    }

    #[test]
    fn a_tuple_of_the_same_addresses_has_the_same_checksums() {
        let frame = Frame::to_vip(Family::V4, Transport::Tcp(ACK), 0);
        let word = |place: usize| {
            u32::from_ne_bytes(
                frame.bytes[place..place + 4]
                    .try_into()
                    .expect("four bytes"),
            )
        };
        let half = |place: usize| u16::from_ne_bytes([frame.bytes[place], frame.bytes[place + 1]]);
        let tuple = frame.tuple([word(26), 0, 0, 0], [word(30), 0, 0, 0], half(34), half(36));
        assert_eq!(tuple.ip_checksum, half(24));
        assert_eq!(tuple.transport_checksum, half(50));
    }
}
