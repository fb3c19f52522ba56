//! Builds packets, on `etherparse` and nothing of Sluice's own code.
//!
//! A test states the packet it sends and the packet it expects; both come from here, so checksums
//! are always computed from scratch by a library that knows nothing of the data plane.
//!
//! ```
//! use sluice_tests::packet::{BACKEND_1, BALANCER, CLIENT, Family::V4, VIP, tcp};
//! let sent = tcp(V4).from(CLIENT, 40000).to(VIP, 80).syn();
//! let expected = sent.clone().from(BALANCER, 20000).to(BACKEND_1, 8080).ttl(63);
//! assert_ne!(sent.build(), expected.build());
//! ```

use etherparse::{
    EtherType, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header,
    TcpHeader, UdpHeader,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// IP family of a test case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, for loops over families.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The one this is not.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    /// The family of an address.
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A named host of the test network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
    /// Ethernet address.
    pub mac: Mac,
}

impl Host {
    const fn new(net: u8, host: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(198, 18, net, host),
            v6: Ipv6Addr::new(0x2001, 0xdb8, net as u16, 0, 0, 0, 0, host as u16),
            mac: [0x02, 0, 0, 0, net, host],
        }
    }

    /// The address of `family`.
    #[must_use]
    pub const fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }
}

/// A client far away: its packets arrive from [`GATEWAY`].
pub const CLIENT: Host = Host::new(1, 10);
/// Another client.
pub const CLIENT_2: Host = Host::new(1, 11);
/// The router towards the clients.
pub const GATEWAY: Host = Host::new(2, 254);
/// The balancer: its interface's MAC address, and the address `nat` sends from.
pub const BALANCER: Host = Host::new(2, 1);
/// The address services listen at.
pub const VIP: Host = Host::new(80, 80);
/// A second VIP.
pub const VIP_2: Host = Host::new(80, 81);
/// A backend on the balancer's segment.
pub const BACKEND_1: Host = Host::new(2, 11);
/// A backend on the balancer's segment.
pub const BACKEND_2: Host = Host::new(2, 12);
/// A backend on the balancer's segment.
pub const BACKEND_3: Host = Host::new(2, 13);
/// A host that has nothing to do with the balancer.
pub const STRANGER: Host = Host::new(9, 99);

/// An address given by a name or by itself.
pub trait Address {
    /// The address for a packet of `family`.
    fn ip(&self, family: Family) -> IpAddr;
}

impl Address for Host {
    fn ip(&self, family: Family) -> IpAddr {
        Host::ip(self, family)
    }
}

impl Address for IpAddr {
    fn ip(&self, family: Family) -> IpAddr {
        assert_eq!(
            self.is_ipv4(),
            family == Family::V4,
            "{self} in a packet of family {family:?}"
        );
        *self
    }
}

/// What stands in the transport checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The right checksum.
    Right,
    /// The folded sum of the pseudo-header, not complemented: what a local sender leaves for the
    /// hardware to complete (Linux `CHECKSUM_PARTIAL`).
    Partial,
    /// The right sum plus this, in ones' complement: damaged on the way, and damaged by the same
    /// amount after any correct incremental update.
    Wrong(u16),
    /// No checksum (UDP over IPv4).
    Zero,
}

/// What follows the IP header.
#[derive(Clone, Debug, PartialEq)]
pub enum Transport {
    /// TCP; ports are [`Packet::sport`] and [`Packet::dport`].
    Tcp(Box<TcpHeader>),
    /// UDP.
    Udp,
    /// ICMP or ICMPv6, by family: type, code and the four bytes after the checksum.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Bytes 4 to 7 of the header.
        rest: [u8; 4],
    },
    /// Another protocol: only the payload.
    Other(u8),
}

/// Place of a fragment in its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Offset in units of eight bytes.
    pub offset: u16,
    /// Whether more follow.
    pub more: bool,
}

/// A packet to be built. Fields may be set directly, or by the methods in a chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet {
    /// IP family.
    pub family: Family,
    /// Ethernet source.
    pub src_mac: Mac,
    /// Ethernet destination.
    pub dst_mac: Mac,
    /// VLAN tags, outermost first: EtherType and tag control information.
    pub vlans: Vec<(u16, u16)>,
    /// IP source.
    pub src: IpAddr,
    /// IP destination.
    pub dst: IpAddr,
    /// Source port (TCP, UDP).
    pub sport: u16,
    /// Destination port (TCP, UDP).
    pub dport: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4: don't fragment.
    pub dont_fragment: bool,
    /// IPv6 flow label.
    pub flow_label: u32,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: number and the whole header, whose first byte is overwritten with
    /// the number of the next.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// If it is a fragment.
    pub fragment: Option<Fragment>,
    /// Transport header.
    pub transport: Transport,
    /// Transport checksum.
    pub checksum: Checksum,
    /// Payload behind the transport header.
    pub payload: Vec<u8>,
    /// Bytes after the IP packet, as a link that pads short frames leaves them.
    pub trailer: Vec<u8>,
}

/// Number of the hop-by-hop extension header (RFC 8200).
pub const HOP_BY_HOP: u8 = 0;
/// Number of the routing extension header.
pub const ROUTING: u8 = 43;
/// Number of the fragment extension header.
pub const FRAGMENT: u8 = 44;
/// Number of the destination options extension header.
pub const DESTINATION_OPTIONS: u8 = 60;

fn packet(family: Family, transport: Transport) -> Packet {
    Packet {
        family,
        src_mac: GATEWAY.mac,
        dst_mac: BALANCER.mac,
        vlans: Vec::new(),
        src: CLIENT.ip(family),
        dst: VIP.ip(family),
        sport: 0,
        dport: 0,
        ttl: 64,
        tos: 0,
        id: 0x1234,
        dont_fragment: true,
        flow_label: if family == Family::V6 { 0xabcde } else { 0 },
        options: Vec::new(),
        extensions: Vec::new(),
        fragment: None,
        transport,
        checksum: Checksum::Right,
        payload: Vec::new(),
        trailer: Vec::new(),
    }
}

/// A TCP segment without flags, from the gateway's MAC address to the balancer's.
#[must_use]
pub fn tcp(family: Family) -> Packet {
    packet(
        family,
        Transport::Tcp(Box::new(TcpHeader {
            sequence_number: 0x1111_2222,
            window_size: 64240,
            ..TcpHeader::default()
        })),
    )
}

/// A TCP segment or UDP datagram, by protocol number.
#[must_use]
pub fn transport(family: Family, protocol: u8) -> Packet {
    match protocol {
        6 => tcp(family),
        17 => udp(family),
        other => panic!("protocol {other} has no ports"),
    }
}

/// What a backend sends back: `transport` from it to the balancer's port.
#[must_use]
pub fn reply(family: Family, protocol: u8, backend: Host, port: u16, nat_port: u16) -> Packet {
    transport(family, protocol)
        .macs(backend.mac, BALANCER.mac)
        .from(backend, port)
        .to(BALANCER, nat_port)
}

/// The RST that answers a TCP segment nobody takes (RFC 9293 section 3.10.7.1), sent back the way
/// it came.
#[must_use]
pub fn reset_for(segment: &Packet) -> Packet {
    let Transport::Tcp(received) = &segment.transport else {
        panic!("only TCP is answered with RST");
    };
    let mut packet = tcp(segment.family)
        .macs(segment.dst_mac, segment.src_mac)
        .rst();
    (packet.src, packet.sport) = (segment.dst, segment.dport);
    (packet.dst, packet.dport) = (segment.src, segment.sport);
    packet.vlans.clone_from(&segment.vlans);
    (packet.id, packet.flow_label) = (0, 0);
    let answer = packet.tcp_mut();
    answer.window_size = 0;
    if received.ack {
        answer.sequence_number = received.acknowledgment_number;
    } else {
        let consumed =
            segment.payload.len() as u32 + u32::from(received.syn) + u32::from(received.fin);
        answer.sequence_number = 0;
        answer.ack = true;
        answer.acknowledgment_number = received.sequence_number.wrapping_add(consumed);
    }
    packet
}

/// A UDP datagram.
#[must_use]
pub fn udp(family: Family) -> Packet {
    packet(family, Transport::Udp)
}

/// An ICMP or ICMPv6 message.
#[must_use]
pub fn icmp(family: Family, kind: u8, code: u8, rest: [u8; 4]) -> Packet {
    packet(family, Transport::Icmp { kind, code, rest })
}

/// An ICMP or ICMPv6 error (type, code, bytes 4 to 7) that quotes at most `keep` bytes of
/// `quoted`, from its IP header on.
#[must_use]
pub fn icmp_error(
    family: Family,
    (kind, code, rest): (u8, u8, [u8; 4]),
    quoted: &Packet,
    keep: usize,
) -> Packet {
    let mut quote = quoted.build().split_off(14 + 4 * quoted.vlans.len());
    quote.truncate(keep);
    icmp(family, kind, code, rest).payload(quote)
}

/// Type, code and bytes 4 to 7 of the error about a packet without a hop left.
#[must_use]
pub fn time_exceeded(family: Family) -> (u8, u8, [u8; 4]) {
    match family {
        Family::V4 => (11, 0, [0; 4]),
        Family::V6 => (3, 0, [0; 4]),
    }
}

/// Type, code and bytes 4 to 7 of the error about a packet larger than `mtu`.
#[must_use]
pub fn too_big(family: Family, mtu: u16) -> (u8, u8, [u8; 4]) {
    let [high, low] = mtu.to_be_bytes();
    match family {
        Family::V4 => (3, 4, [0, 0, high, low]),
        Family::V6 => (2, 0, [0, 0, high, low]),
    }
}

/// The error with which a router answers `packet`, from the address it was for, sent back the way
/// it came. It quotes as much as fits into 576 bytes (RFC 1812) or 1280 (RFC 4443).
#[must_use]
pub fn error_for(packet: &Packet, error: (u8, u8, [u8; 4])) -> Packet {
    let most = match packet.family {
        Family::V4 => 576 - 28,
        Family::V6 => 1280 - 48,
    };
    let keep = most.min(packet.ip_len() as usize);
    let mut answer = icmp_error(packet.family, error, packet, keep)
        .macs(packet.dst_mac, packet.src_mac)
        .from(packet.dst, 0)
        .to(packet.src, 0);
    answer.vlans.clone_from(&packet.vlans);
    (answer.id, answer.flow_label) = (0, 0);
    answer
}

/// An echo request.
#[must_use]
pub fn ping(family: Family, id: u16, sequence: u16) -> Packet {
    let kind = if family == Family::V4 { 8 } else { 128 };
    icmp(family, kind, 0, echo(id, sequence))
}

/// An echo reply.
#[must_use]
pub fn pong(family: Family, id: u16, sequence: u16) -> Packet {
    let kind = if family == Family::V4 { 0 } else { 129 };
    icmp(family, kind, 0, echo(id, sequence))
}

fn echo(id: u16, sequence: u16) -> [u8; 4] {
    let [a, b] = id.to_be_bytes();
    let [c, d] = sequence.to_be_bytes();
    [a, b, c, d]
}

/// A packet of another IP protocol.
#[must_use]
pub fn other(family: Family, protocol: u8) -> Packet {
    packet(family, Transport::Other(protocol))
}

impl Packet {
    /// Sets source address and port.
    #[must_use]
    pub fn from(mut self, host: impl Address, port: u16) -> Self {
        self.src = host.ip(self.family);
        self.sport = port;
        self
    }

    /// Sets destination address and port.
    #[must_use]
    pub fn to(mut self, host: impl Address, port: u16) -> Self {
        self.dst = host.ip(self.family);
        self.dport = port;
        self
    }

    /// Sets Ethernet source and destination.
    #[must_use]
    pub fn macs(mut self, src: Mac, dst: Mac) -> Self {
        (self.src_mac, self.dst_mac) = (src, dst);
        self
    }

    /// Sets TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets the payload.
    #[must_use]
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = payload.into();
        self
    }

    /// Sets what stands in the checksum field.
    #[must_use]
    pub fn checksum(mut self, checksum: Checksum) -> Self {
        self.checksum = checksum;
        self
    }

    /// Adds a VLAN tag behind those that are there: 0x8100 (802.1Q) or 0x88a8 (802.1ad).
    #[must_use]
    pub fn vlan(mut self, ether_type: u16, tci: u16) -> Self {
        self.vlans.push((ether_type, tci));
        self
    }

    /// Sets IPv4 options.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Adds an IPv6 extension header of `len` bytes (a multiple of eight) filled with a PadN option.
    #[must_use]
    pub fn extension(mut self, number: u8, len: usize) -> Self {
        assert!(
            len >= 8 && len.is_multiple_of(8),
            "extension headers come in units of eight bytes"
        );
        let mut header = vec![0; len];
        header[1] = (len / 8 - 1) as u8;
        header[2] = 1;
        header[3] = (len - 4) as u8;
        self.extensions.push((number, header));
        self
    }

    /// Makes it a fragment.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { offset, more });
        self.dont_fragment = false;
        self
    }

    /// The fragments in which a host or router sends it on, each with at most `size` bytes (a
    /// multiple of eight) of what follows the IP header.
    ///
    /// # Panics
    /// If `size` is no multiple of eight.
    #[must_use]
    pub fn fragments(&self, size: usize) -> Vec<Self> {
        assert!(
            size > 0 && size.is_multiple_of(8),
            "offsets count in units of eight bytes"
        );
        let opaque = self.opaque();
        let count = opaque.payload.len().div_ceil(size);
        opaque
            .payload
            .chunks(size)
            .enumerate()
            .map(|(n, chunk)| {
                let fragment = opaque.clone().payload(chunk);
                fragment.fragment((n * size / 8) as u16, n + 1 < count)
            })
            .collect()
    }

    /// The same packet with all that follows the IP header as bytes, which stay as they are whatever
    /// becomes of addresses and ports.
    #[must_use]
    pub fn opaque(&self) -> Self {
        Self {
            transport: Transport::Other(self.protocol()),
            payload: self.segment(),
            ..self.clone()
        }
    }

    /// Whether it is one of several pieces, and the first of them.
    #[must_use]
    pub fn piece(&self) -> Option<bool> {
        self.fragment
            .filter(|f| f.more || f.offset != 0)
            .map(|f| f.offset == 0)
    }

    /// By how much, in ones' complement, the checksum of a sender that leaves it to its hardware
    /// differs from the right one.
    #[must_use]
    pub fn partial_error(&self) -> u16 {
        let at = match self.protocol() {
            6 => 16,
            17 => 6,
            other => panic!("protocol {other} leaves nothing to the hardware"),
        };
        let field = |checksum| {
            let segment = self.clone().checksum(checksum).segment();
            u16::from_be_bytes([segment[at], segment[at + 1]])
        };
        add_ones_complement(field(Checksum::Partial), !field(Checksum::Right))
    }

    /// Adds bytes after the IP packet.
    #[must_use]
    pub fn trailer(mut self, trailer: impl Into<Vec<u8>>) -> Self {
        self.trailer = trailer.into();
        self
    }

    /// The TCP header.
    ///
    /// # Panics
    /// If it is not TCP.
    pub fn tcp_mut(&mut self) -> &mut TcpHeader {
        match &mut self.transport {
            Transport::Tcp(header) => header,
            other => panic!("{other:?} has no TCP header"),
        }
    }

    /// As it leaves the balancer for a backend on the ingress interface after `nat`.
    #[must_use]
    pub fn nat_to(&self, backend: Host, port: u16, nat_port: u16) -> Self {
        self.clone()
            .macs(BALANCER.mac, backend.mac)
            .from(BALANCER, nat_port)
            .to(backend, port)
            .ttl(self.ttl - 1)
    }

    /// As it leaves the balancer for the client, whose packets come from [`GATEWAY`].
    #[must_use]
    pub fn nat_back(&self, vip: Host, port: u16, client: Host, client_port: u16) -> Self {
        self.clone()
            .macs(BALANCER.mac, GATEWAY.mac)
            .from(vip, port)
            .to(client, client_port)
            .ttl(self.ttl - 1)
    }

    /// As it leaves the balancer for a backend on the ingress interface after `dnat`.
    #[must_use]
    pub fn dnat_to(&self, backend: Host, port: u16) -> Self {
        self.clone()
            .macs(BALANCER.mac, backend.mac)
            .to(backend, port)
            .ttl(self.ttl - 1)
    }

    /// Its VLAN tags, as [`lb_common::vlan`] packs them; worked out independently.
    #[must_use]
    pub fn tags(&self) -> u32 {
        self.vlans.iter().rev().fold(0, |tags, (ether_type, tci)| {
            let service = if *ether_type == 0x88a8 { 0x2000 } else { 0 };
            tags << 16 | service | 0x1000 | u32::from(tci & 0xfff)
        })
    }

    /// With the tags that [`Packet::tags`] of another packet tells of, and its own priority bits in
    /// their place.
    #[must_use]
    pub fn retagged(mut self, tags: u32) -> Self {
        let had = std::mem::take(&mut self.vlans);
        for (place, half) in [tags & 0xffff, tags >> 16].into_iter().enumerate() {
            if half != 0 {
                let priority = had.get(place).map_or(0, |(_, tci)| tci & 0xf000);
                let ether_type = if half & 0x2000 == 0 { 0x8100 } else { 0x88a8 };
                self.vlans
                    .push((ether_type, half as u16 & 0xfff | priority));
            }
        }
        self
    }

    /// With these VLAN tags instead of its own, ethertype and TCI each, the outer one first.
    #[must_use]
    pub fn tagged(mut self, vlans: &[(u16, u16)]) -> Self {
        self.vlans = vlans.to_vec();
        self
    }

    /// As it leaves the balancer for a backend after `dsr`.
    #[must_use]
    pub fn dsr_to(&self, mac: Mac) -> Self {
        self.clone().macs(BALANCER.mac, mac)
    }

    /// As it leaves the balancer inside an IP packet from `src` to `dst`, for the next hop `mac`.
    #[must_use]
    pub fn ipip_to(&self, src: IpAddr, dst: IpAddr, mac: Mac) -> Self {
        let protocol = match self.family {
            Family::V4 => 4,
            Family::V6 => 41,
        };
        self.inside(other(Family::of(dst), protocol), src, dst, mac)
    }

    /// As it leaves the balancer inside UDP (GUE variant 1: the IP packet is all the payload), with
    /// these outer ports.
    #[must_use]
    pub fn gue_to(&self, src: IpAddr, dst: IpAddr, mac: Mac, ports: (u16, u16)) -> Self {
        let mut outer = udp(Family::of(dst));
        (outer.sport, outer.dport) = ports;
        if outer.family == Family::V4 {
            outer.checksum = Checksum::Zero;
        }
        self.inside(outer, src, dst, mac)
    }

    /// The outer packet: the inner one is a hop older, the class and the VLAN tags are its own.
    fn inside(&self, outer: Self, src: IpAddr, dst: IpAddr, mac: Mac) -> Self {
        let mut inner = self.clone().ttl(self.ttl - 1);
        inner.trailer.clear();
        inner.vlans.clear();
        let mut outer = outer
            .macs(BALANCER.mac, mac)
            .payload(inner.build().split_off(14));
        (outer.src, outer.dst) = (src, dst);
        outer.vlans.clone_from(&self.vlans);
        outer.trailer.clone_from(&self.trailer);
        (outer.tos, outer.id, outer.flow_label) = (self.tos, 0, 0);
        outer
    }

    fn with_tcp(mut self, change: impl FnOnce(&mut TcpHeader)) -> Self {
        change(self.tcp_mut());
        self
    }

    /// Sets SYN, with the options every real SYN carries.
    #[must_use]
    pub fn syn(self) -> Self {
        self.with_tcp(|t| {
            t.syn = true;
            let options = [2, 4, 5, 180, 4, 2, 1, 1];
            t.set_options_raw(&options)
                .expect("eight bytes of options fit");
        })
    }

    /// Sets ACK.
    #[must_use]
    pub fn ack(self) -> Self {
        self.with_tcp(|t| {
            t.ack = true;
            t.acknowledgment_number = 0x3333_4444;
        })
    }

    /// Sets FIN.
    #[must_use]
    pub fn fin(self) -> Self {
        self.with_tcp(|t| t.fin = true)
    }

    /// Sets RST.
    #[must_use]
    pub fn rst(self) -> Self {
        self.with_tcp(|t| t.rst = true)
    }

    /// Sets PSH.
    #[must_use]
    pub fn psh(self) -> Self {
        self.with_tcp(|t| t.psh = true)
    }

    /// Sets the sequence number.
    #[must_use]
    pub fn seq(self, number: u32) -> Self {
        self.with_tcp(|t| t.sequence_number = number)
    }

    /// Sets the acknowledgment number, not the flag.
    #[must_use]
    pub fn ack_number(self, number: u32) -> Self {
        self.with_tcp(|t| t.acknowledgment_number = number)
    }

    /// IP protocol number of the transport.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        match (&self.transport, self.family) {
            (Transport::Tcp(_), _) => 6,
            (Transport::Udp, _) => 17,
            (Transport::Icmp { .. }, Family::V4) => 1,
            (Transport::Icmp { .. }, Family::V6) => 58,
            (Transport::Other(n), _) => *n,
        }
    }

    /// Whether the checksum field, right or wrong, happens to hold what a sender that leaves the
    /// checksum to its hardware would write.
    #[must_use]
    pub fn reads_as_partial(&self) -> bool {
        let field = |checksum| {
            let packet = Self {
                checksum,
                ..self.clone()
            };
            packet.segment()
        };
        field(self.checksum) == field(Checksum::Partial)
    }

    /// Length of the IP packet: what the byte counters count.
    #[must_use]
    pub fn ip_len(&self) -> u64 {
        (self.build().len() - self.l2_len() - self.trailer.len()) as u64
    }

    /// Length of the Ethernet header with its tags.
    #[must_use]
    pub fn l2_len(&self) -> usize {
        14 + 4 * self.vlans.len()
    }

    /// The frame.
    ///
    /// # Panics
    /// If the fields cannot stand in a packet (an address of the other family, options that are
    /// too long).
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.dst_mac);
        frame.extend(self.src_mac);
        for (ether_type, tci) in &self.vlans {
            frame.extend(ether_type.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        let segment = self.segment();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                frame.extend(EtherType::IPV4.0.to_be_bytes());
                frame.extend(self.ipv4(src, dst, segment.len()));
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                frame.extend(EtherType::IPV6.0.to_be_bytes());
                frame.extend(self.ipv6(src, dst, segment.len()));
            }
            (src, dst) => panic!("{src} and {dst} cannot stand in one packet"),
        }
        frame.extend(segment);
        frame.extend(&self.trailer);
        frame
    }

    fn ipv4(&self, src: Ipv4Addr, dst: Ipv4Addr, payload_len: usize) -> Vec<u8> {
        let fragment = self.fragment.unwrap_or(Fragment {
            offset: 0,
            more: false,
        });
        let mut header = Ipv4Header {
            dscp: (self.tos >> 2).try_into().expect("six bits"),
            ecn: (self.tos & 3).try_into().expect("two bits"),
            identification: self.id,
            dont_fragment: self.dont_fragment,
            more_fragments: fragment.more,
            fragment_offset: IpFragOffset::try_new(fragment.offset).expect("13 bits of offset"),
            time_to_live: self.ttl,
            protocol: IpNumber(self.protocol()),
            source: src.octets(),
            destination: dst.octets(),
            options: Ipv4Options::try_from(self.options.as_slice())
                .expect("at most 40 bytes of options in words of four"),
            ..Ipv4Header::default()
        };
        header
            .set_payload_len(payload_len)
            .expect("payload fits IPv4");
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    fn ipv6(&self, src: Ipv6Addr, dst: Ipv6Addr, payload_len: usize) -> Vec<u8> {
        let mut extensions = self.extensions.clone();
        if let Some(fragment) = self.fragment {
            let mut header = vec![0; 8];
            let field = fragment.offset << 3 | u16::from(fragment.more);
            header[2..4].copy_from_slice(&field.to_be_bytes());
            header[4..8].copy_from_slice(&u32::from(self.id).to_be_bytes());
            extensions.push((FRAGMENT, header));
        }
        let mut chain = Vec::new();
        for (i, (_, header)) in extensions.iter().enumerate() {
            let next = extensions.get(i + 1).map_or(self.protocol(), |(n, _)| *n);
            chain.push(next);
            chain.extend(&header[1..]);
        }
        let mut header = Ipv6Header {
            traffic_class: self.tos,
            flow_label: Ipv6FlowLabel::try_new(self.flow_label).expect("20 bits of label"),
            next_header: IpNumber(extensions.first().map_or(self.protocol(), |(n, _)| *n)),
            hop_limit: self.ttl,
            source: src.octets(),
            destination: dst.octets(),
            ..Ipv6Header::default()
        };
        header
            .set_payload_length(chain.len() + payload_len)
            .expect("payload fits IPv6");
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(chain);
        bytes
    }

    /// Transport header and payload.
    fn segment(&self) -> Vec<u8> {
        let (mut bytes, field) = match &self.transport {
            Transport::Tcp(header) => {
                let mut header = (**header).clone();
                (header.source_port, header.destination_port) = (self.sport, self.dport);
                header.checksum = 0;
                (header.to_bytes().to_vec(), Some(16))
            }
            Transport::Udp => {
                let header = UdpHeader {
                    source_port: self.sport,
                    destination_port: self.dport,
                    length: u16::try_from(UdpHeader::LEN + self.payload.len())
                        .expect("payload fits UDP"),
                    checksum: 0,
                };
                (header.to_bytes().to_vec(), Some(6))
            }
            Transport::Icmp { kind, code, rest } => {
                let mut bytes = vec![*kind, *code, 0, 0];
                bytes.extend(rest);
                (bytes, Some(2))
            }
            Transport::Other(_) => (Vec::new(), None),
        };
        bytes.extend(&self.payload);
        if let Some(at) = field {
            let pseudo = match (&self.transport, self.family) {
                // ICMP for IPv4 has no pseudo-header (RFC 792).
                (Transport::Icmp { .. }, Family::V4) => 0,
                _ => pseudo_header_sum(self.src, self.dst, self.protocol(), bytes.len()),
            };
            let right = !ones_complement_sum(pseudo, &bytes);
            // A sum of zero has two forms. UDP sends all ones, since zero means "none" (RFC 768);
            // elsewhere arithmetic only ever yields zero.
            let canonical = |value: u16| match (&self.transport, value) {
                (Transport::Udp, 0) => 0xffff,
                (Transport::Udp, value) => value,
                (_, 0xffff) => 0,
                (_, value) => value,
            };
            let value = match self.checksum {
                Checksum::Right => canonical(right),
                Checksum::Partial => pseudo,
                Checksum::Wrong(by) => canonical(add_ones_complement(right, by)),
                Checksum::Zero => 0,
            };
            bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
        }
        bytes
    }
}

fn add_ones_complement(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    (sum % 0x1_0000 + sum / 0x1_0000) as u16
}

/// RFC 1071: the ones' complement sum of 16-bit big-endian words, an odd byte padded with zero.
#[must_use]
pub fn ones_complement_sum(start: u16, bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(start, |sum, pair| {
        add_ones_complement(
            sum,
            u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]),
        )
    })
}

/// The folded, uncomplemented sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section
/// 8.1).
#[must_use]
pub fn pseudo_header_sum(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u16 {
    let mut header = Vec::new();
    for ip in [src, dst] {
        match ip {
            IpAddr::V4(ip) => header.extend(ip.octets()),
            IpAddr::V6(ip) => header.extend(ip.octets()),
        }
    }
    header.extend((len as u32).to_be_bytes());
    header.extend([0, protocol]);
    ones_complement_sum(0, &header)
}

/// An ARP request (`operation` 1) or reply (2) in an Ethernet frame.
#[must_use]
pub fn arp(
    eth: (Mac, Mac),
    operation: u16,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(eth.1);
    frame.extend(eth.0);
    frame.extend(EtherType::ARP.0.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    for (mac, ip) in [sender, target] {
        frame.extend(mac);
        frame.extend(ip.octets());
    }
    frame
}

/// An ARP request broadcast by `sender` for `ip`.
#[must_use]
pub fn arp_request(sender: Host, ip: Ipv4Addr) -> Vec<u8> {
    arp(
        (sender.mac, [0xff; 6]),
        1,
        (sender.mac, sender.v4),
        ([0; 6], ip),
    )
}

/// A neighbour solicitation by `sender` for `target` (RFC 4861 section 4.3), sent to the
/// solicited-node multicast address, with the source link-layer address option.
#[must_use]
pub fn neighbour_solicitation(sender: Host, target: Ipv6Addr) -> Packet {
    let octets = target.octets();
    let low = [octets[13], octets[14], octets[15]];
    let group = Ipv6Addr::from([
        0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, low[0], low[1], low[2],
    ]);
    let mut body = octets.to_vec();
    body.extend([1, 1]);
    body.extend(sender.mac);
    let mut packet = icmp(Family::V6, 135, 0, [0; 4])
        .macs(sender.mac, [0x33, 0x33, 0xff, low[0], low[1], low[2]])
        .from(sender, 0)
        .to(IpAddr::V6(group), 0)
        .ttl(255)
        .payload(body);
    packet.flow_label = 0;
    packet
}

/// The neighbour advertisement that answers: solicited and override set, with the target
/// link-layer address option (RFC 4861 section 4.4).
#[must_use]
pub fn neighbour_advertisement(mac: Mac, target: Ipv6Addr, to: Host) -> Packet {
    let mut body = target.octets().to_vec();
    body.extend([2, 1]);
    body.extend(mac);
    let mut packet = icmp(Family::V6, 136, 0, [0x60, 0, 0, 0])
        .macs(mac, to.mac)
        .from(IpAddr::V6(target), 0)
        .to(to, 0)
        .ttl(255)
        .payload(body);
    packet.flow_label = 0;
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle;

    #[test]
    fn built_packets_have_right_checksums_by_etherparse() {
        for family in Family::BOTH {
            for len in [0, 1, 2, 3, 7, 64, 1399, 1400] {
                let payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
                for packet in [
                    tcp(family).from(CLIENT, 40000).to(VIP, 80).syn(),
                    udp(family).from(CLIENT, 40000).to(VIP, 53),
                    ping(family, 1, 2),
                ] {
                    oracle::verify_checksums(&packet.payload(payload.clone()).build())
                        .expect("checksums");
                }
            }
        }
    }

    #[test]
    fn a_partial_checksum_completes_to_the_right_one() {
        let right = udp(Family::V4).payload(*b"abc").build();
        let partial = udp(Family::V4)
            .payload(*b"abc")
            .checksum(Checksum::Partial)
            .build();
        assert_eq!(right[..40], partial[..40]);
        // Summing the segment as it stands and complementing completes it.
        assert_eq!(
            right[40..42],
            (!ones_complement_sum(0, &partial[34..])).to_be_bytes()
        );
    }

    #[test]
    fn extension_headers_form_a_chain() {
        let frame = tcp(Family::V6)
            .extension(HOP_BY_HOP, 8)
            .extension(DESTINATION_OPTIONS, 16)
            .build();
        assert_eq!((frame[20], frame[54], frame[62]), (0, 60, 6));
        assert_eq!(
            u16::from_be_bytes([frame[18], frame[19]]) as usize,
            frame.len() - 54
        );
        oracle::verify_checksums(&frame).expect("checksums");
    }
}
