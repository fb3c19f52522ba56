//! TCP (RFC 9293) and UDP (RFC 768).

use super::{Fault, Located, Network, protocol};
use crate::{
    family::Family,
    fragment,
    frame::{Cursor, Frame},
    icmp, lookup,
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{flow::FlowKey, service::VIP_HELD, stats::DropReason};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

/// Offset of the data offset (high four bits) in the TCP header; the flags follow.
const TCP_DATA_OFFSET: usize = 12;

/// The flags of a TCP header; 0 for UDP.
#[derive(Clone, Copy)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    pub const FIN: u8 = 1 << 0;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const ACK: u8 = 1 << 4;
    /// Those that may change the state of a connection.
    pub const CHANGES: u8 = Self::FIN | Self::SYN | Self::RST;

    /// Whether any of `flags` is set.
    #[inline(always)]
    pub const fn any(self, flags: u8) -> bool {
        self.0 & flags != 0
    }

    /// Whether the packet asks for a connection: SYN and none of ACK, FIN, RST.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::FIN | Self::RST) == Self::SYN
    }
}

/// A TCP or UDP packet whose headers are sound.
pub struct Packet<F: Family> {
    /// Network header.
    pub network: Network<F>,
    /// Transport header: 20 bytes are checked for TCP, 8 for UDP.
    pub transport: Cursor,
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// TCP flags.
    pub flags: TcpFlags,
    /// Source port, network order.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
    /// Bytes of the IP packet.
    pub packet_len: u32,
    /// Bytes of transport header and payload.
    pub transport_len: u32,
    /// Whether later fragments bring more of it.
    pub first_fragment: bool,
}

impl<F: Family> Packet<F> {
    /// The same packet, with addresses and ports read again.
    ///
    /// What is kept across the lookup of a map lies on the stack: written there, and read from there.
    /// In the packet it can be read just as well.
    #[inline(always)]
    pub fn afresh(&self) -> Self {
        let header = self.network.header;
        Self {
            network: Network {
                header,
                src: F::src(header),
                dst: F::dst(header),
            },
            sport: self.transport.read(0),
            dport: self.transport.read(2),
            ..*self
        }
    }

    /// The transport checksum; always `Some`.
    #[inline(always)]
    pub fn checksum(&self, frame: &Frame) -> Option<u16> {
        Some(if self.protocol == protocol::UDP {
            self.transport.read(offset_of!(UdpHdr, check))
        } else {
            self.tcp(frame)?.read(offset_of!(TcpHdr, check))
        })
    }

    /// The TCP header of a packet that has one: always `Some`.
    ///
    /// It was there when it was parsed, but older verifiers (Linux 6.1) have forgotten by now that the
    /// packet is TCP, and want to be shown again.
    #[inline(always)]
    pub fn tcp(&self, frame: &Frame) -> Option<Cursor> {
        frame.check(self.transport, TcpHdr::LEN)
    }

    /// The packet's key in the flow table.
    #[inline(always)]
    pub fn key(&self) -> FlowKey<F::Addr> {
        FlowKey {
            src: self.network.src,
            dst: self.network.dst,
            sport: self.sport,
            dport: self.dport,
            protocol: u32::from(self.protocol),
        }
    }
}

/// Judges the headers of a packet whose destination passed the filter.
///
/// ICMP is answered or passed here. What is unsound is dropped if it was for a VIP, and the
/// kernel's to judge otherwise.
#[inline(always)]
pub fn transport<F: Family>(
    frame: &Frame,
    link: &super::Link,
    network: Network<F>,
) -> Result<Packet<F>, Verdict> {
    let located = match F::locate_first(frame, &network) {
        Ok(located) => located,
        Err(Fault::Fragment) => return Err(fragment::follow::<F>(frame, link)),
        Err(fault) => return Err(unsound(&network, fault)),
    };
    let Located {
        header: transport,
        protocol,
        packet_len,
        transport_len,
        first_fragment,
    } = located;
    let flags = match protocol {
        protocol::TCP => {
            if transport_len < TcpHdr::LEN as u32 || frame.check(transport, TcpHdr::LEN).is_none() {
                return Err(unsound(&network, Fault::Malformed));
            }
            let header_len = u32::from(transport.read::<u8>(TCP_DATA_OFFSET) >> 4) * 4;
            if header_len < TcpHdr::LEN as u32 || header_len > transport_len {
                return Err(unsound(&network, Fault::Malformed));
            }
            TcpFlags(transport.read(TCP_DATA_OFFSET + 1))
        }
        protocol::UDP => {
            if transport_len < UdpHdr::LEN as u32 || frame.check(transport, UdpHdr::LEN).is_none() {
                return Err(unsound(&network, Fault::Malformed));
            }
            let len = u32::from(u16::from_be(transport.read(offset_of!(UdpHdr, len))));
            if len < UdpHdr::LEN as u32 || (len > transport_len && !first_fragment) {
                return Err(unsound(&network, Fault::Malformed));
            }
            TcpFlags(0)
        }
        _ if protocol == F::ICMP => return Err(icmp::answer(frame, link, &network, &located)),
        _ => return Err(Verdict::PASS),
    };
    // Both protocols begin with source and destination port.
    Ok(Packet {
        sport: transport.read(0),
        dport: transport.read(2),
        network,
        transport,
        protocol,
        flags,
        packet_len,
        transport_len,
        first_fragment,
    })
}

/// What becomes of a packet that cannot be balanced.
#[inline(always)]
pub fn unsound<F: Family>(network: &Network<F>, fault: Fault) -> Verdict {
    let Some(vip) = lookup::vip::<F>(&network.dst) else {
        return Verdict::PASS;
    };
    // The first one may have gone to the host itself.
    if matches!(fault, Fault::Fragment) && vip.flags & VIP_HELD != 0 {
        return Verdict::PASS;
    }
    let reason = match fault {
        Fault::Malformed => DropReason::Malformed,
        Fault::Fragment => DropReason::Fragment,
    };
    Verdict::drop(reason, 0)
}
