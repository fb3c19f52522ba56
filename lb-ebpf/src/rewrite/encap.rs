//! `ipip` and `gue`: the client's packet travels inside another to the backend, which takes it
//! out and answers the client itself.
//!
//! IP in IP follows RFC 2003 (4in4), RFC 2473 (in IPv6) and RFC 4213 (6in4). GUE is variant 1 of
//! draft-ietf-intarea-gue: the inner IP header stands directly behind UDP, and its version field
//! tells the variant.
//!
//! The source of the outer packet can carry a hash of the flow ([`Settings::encap_mask4`]), and
//! the source port of GUE always does: a backend that spreads packets over its receive queues by
//! outer addresses and ports keeps flows apart (RFC 6438 gives the argument for routers).

use super::update_checksum;
use crate::{
    checksum,
    family::{Family, V4, V6},
    frame::{Cursor, Frame},
    lookup, maps,
    parse::{self, Packet, protocol},
    verdict::Verdict,
};
use aya_ebpf::{bindings::xdp_md, helpers::bpf_xdp_adjust_head};
use core::mem::offset_of;
use lb_common::{abi::Settings, addr::FAMILY_V4, backend::Backend, csum, stats::DropReason};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr, vlan::VlanHdr};

/// Puts the packet, whose flow has this hash, into another one for a backend.
#[inline(always)]
pub fn encap<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    service: u32,
    backend: u32,
    gue: bool,
    flow_hash: u32,
) -> Result<(), Verdict> {
    update_checksum(frame, packet, service, None)?;
    match F::encapsulate(frame.ctx, backend, flow_hash, u32::from(gue)) {
        0 => Ok(()),
        reason => Err(Verdict::refused(reason as u8, false, service)),
    }
}

/// As [`encap`] for a packet without VLAN tags, options and extension headers, whose checksum is
/// complete and covers all that follows the network header; `pseudo` is the sum of its
/// pseudo-header.
#[inline(always)]
pub fn encap_usual<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    service: u32,
    backend: &Backend,
    gue: bool,
    flow_hash: u32,
    pseudo: u64,
) -> Result<(), Verdict> {
    let Some(settings) = maps::SETTINGS.get(0) else {
        return Err(Verdict::PASS);
    };
    let header = packet.network.header;
    F::age(header);
    let mut inner = Inner {
        len: packet.packet_len,
        class: F::class(header),
        protocol: F::INSIDE,
        sum: 0,
    };
    let grown = if backend.family == FAMILY_V4 {
        surround::<V4>(frame.ctx, backend, settings, flow_hash, gue, &inner)
    } else {
        if gue {
            inner.sum = F::header_sum(header) + u64::from(!csum::fold(pseudo));
        }
        surround::<V6>(frame.ctx, backend, settings, flow_hash, gue, &inner)
    };
    grown.ok_or(Verdict::drop(DropReason::AdjustFailed, service))
}

/// Puts Ethernet and outer headers in front of the packet.
#[inline(always)]
fn surround<G: Family>(
    ctx: *mut xdp_md,
    backend: &Backend,
    settings: &Settings,
    hash: u32,
    gue: bool,
    inner: &Inner,
) -> Option<()> {
    let udp_len = if gue { UdpHdr::LEN } else { 0 };
    let growth = (G::HEADER_LEN + udp_len) as i32;
    // SAFETY: a valid context; the frame is taken anew below.
    if unsafe { bpf_xdp_adjust_head(ctx, -growth) } != 0 {
        return None;
    }
    let frame = Frame::new(ctx);
    let link = frame.start(EthHdr::LEN + G::HEADER_LEN + UdpHdr::LEN)?;
    link.write_words(0, &backend.l2);
    link.write(offset_of!(EthHdr, ether_type), G::ETHERTYPE);
    let outer = link.skip(EthHdr::LEN);
    write_headers::<G>(outer, backend, settings, hash, gue, inner);
    Some(())
}

/// [`push`] for a client's packet in IPv4: 0, or the number of a drop reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn encapsulate4(ctx: *mut xdp_md, backend: u32, hash: u32, gue: u32) -> u32 {
    push::<V4>(ctx, backend, hash, gue != 0)
}

/// [`push`] for a client's packet in IPv6: 0, or the number of a drop reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn encapsulate6(ctx: *mut xdp_md, backend: u32, hash: u32, gue: u32) -> u32 {
    push::<V6>(ctx, backend, hash, gue != 0)
}

/// What the outer packet takes from the inner one.
struct Inner {
    /// Bytes of the IP packet.
    len: u32,
    /// DSCP and ECN.
    class: u8,
    /// IP protocol number of its family.
    protocol: u8,
    /// The sum of all its 16-bit words, for a UDP checksum around it.
    sum: u64,
}

#[inline(always)]
fn push<F: Family>(ctx: *mut xdp_md, number: u32, hash: u32, gue: bool) -> u32 {
    let (Some(backend), Some(settings)) = (maps::BACKENDS.get(number), maps::SETTINGS.get(0))
    else {
        return DropReason::NoBackend as u32;
    };
    if backend.family == FAMILY_V4 {
        push_outer::<F, V4>(ctx, backend, settings, hash, gue)
    } else {
        push_outer::<F, V6>(ctx, backend, settings, hash, gue)
    }
}

/// Reads the packet again from its start, since it is another function's; the frame that it was
/// read from is stale anyway once the packet has grown.
#[inline(always)]
fn push_outer<F: Family, G: Family>(
    ctx: *mut xdp_md,
    backend: &Backend,
    settings: &Settings,
    hash: u32,
    gue: bool,
) -> u32 {
    const MALFORMED: u32 = DropReason::Malformed as u32;
    let frame = Frame::new(ctx);
    let Ok(link) = parse::ethernet(&frame) else {
        return MALFORMED;
    };
    let Some(header) = frame.check(link.payload, F::HEADER_LEN) else {
        return MALFORMED;
    };
    let udp_len = if gue { UdpHdr::LEN as u32 } else { 0 };
    let growth = G::HEADER_LEN as u32 + udp_len;
    let class = F::class(header);
    let len = F::packet_len(header);
    // One hop is ours (RFC 2003 section 3.1).
    F::age(header);
    let mut inner = Inner {
        len,
        class,
        protocol: F::INSIDE,
        sum: 0,
    };
    if gue && G::UDP_NEEDS_CHECKSUM {
        match inner_sum::<F>(&frame, &link, header, len) {
            Some(sum) => inner.sum = sum,
            None => return DropReason::AdjustFailed as u32,
        }
    }
    let ((tag1, tag2), tags) = vlan_tags(&frame, &link);

    // SAFETY: a valid context; the frame is taken anew below.
    if unsafe { bpf_xdp_adjust_head(ctx, -(growth as i32)) } != 0 {
        return DropReason::AdjustFailed as u32;
    }
    let frame = Frame::new(ctx);
    let Some(link) = frame.start(EthHdr::LEN + 2 * VlanHdr::LEN) else {
        return MALFORMED;
    };
    link.write_words(0, &backend.l2);
    let mut at = link.skip(offset_of!(EthHdr, ether_type));
    if tags > 0 {
        at.write(0, tag1);
        at = at.skip(VlanHdr::LEN);
    }
    if tags > 1 {
        at.write(0, tag2);
        at = at.skip(VlanHdr::LEN);
    }
    at.write(0, G::ETHERTYPE);
    let Some(outer) = frame.check(at.skip(2), G::HEADER_LEN + UdpHdr::LEN) else {
        return MALFORMED;
    };
    write_headers::<G>(outer, backend, settings, hash, gue, &inner);
    0
}

/// Writes the outer headers.
#[inline(always)]
fn write_headers<G: Family>(
    outer: Cursor,
    backend: &Backend,
    settings: &Settings,
    hash: u32,
    gue: bool,
    inner: &Inner,
) {
    let source = G::encap_source(settings, backend, hash);
    let destination = lookup::address(&backend.addr);
    if gue {
        G::write_header(
            outer,
            source,
            destination,
            protocol::UDP,
            inner.class,
            // It fits: the inner packet does, and the MTU is far below.
            (inner.len + UdpHdr::LEN as u32) as u16,
        );
        write_udp::<G>(
            outer.skip(G::HEADER_LEN),
            source,
            destination,
            settings.gue_port,
            hash,
            inner,
        );
    } else {
        G::write_header(
            outer,
            source,
            destination,
            inner.protocol,
            inner.class,
            inner.len as u16,
        );
    }
}

/// The VLAN tags, each with the ethertype in front of it, and how many there are. They travel with
/// the packet.
#[inline(always)]
fn vlan_tags(frame: &Frame, link: &parse::Link) -> ((u32, u32), u32) {
    let mut tags = ((0, 0), 0);
    let len = frame.offset(link.payload);
    if len >= EthHdr::LEN + VlanHdr::LEN
        && let Some(start) = frame.start(EthHdr::LEN + VlanHdr::LEN)
    {
        tags = ((start.read(offset_of!(EthHdr, ether_type)), 0), 1);
    }
    if len >= EthHdr::LEN + 2 * VlanHdr::LEN
        && let Some(start) = frame.start(EthHdr::LEN + 2 * VlanHdr::LEN)
    {
        let second = start.read(offset_of!(EthHdr, ether_type) + VlanHdr::LEN);
        tags = ((tags.0.0, second), 2);
    }
    tags
}

/// Dynamic ports (RFC 6335 section 6): where the source port of GUE begins, and how many bits of
/// the hash fit above.
const DYNAMIC_PORTS: u16 = 49152;
const DYNAMIC_PORT_BITS: u32 = 14;

/// The source port of GUE for a flow with this hash, network order.
#[inline(always)]
pub const fn source_port(hash: u32) -> u16 {
    (DYNAMIC_PORTS | (hash >> (32 - DYNAMIC_PORT_BITS)) as u16).to_be()
}

#[inline(always)]
fn write_udp<G: Family>(
    udp: Cursor,
    source: G::Addr,
    destination: G::Addr,
    port: u16,
    hash: u32,
    inner: &Inner,
) {
    let sport = source_port(hash);
    let len = inner.len + UdpHdr::LEN as u32;
    let wire_len = (len as u16).to_be();
    let mut check = 0;
    // Over IPv4 none is needed: the inner packet has its own (RFC 768).
    if G::UDP_NEEDS_CHECKSUM {
        let pseudo = checksum::pseudo_header(source, destination, protocol::UDP, len);
        let sum = u64::from(pseudo)
            + u64::from(sport)
            + u64::from(port)
            + u64::from(wire_len)
            + inner.sum;
        check = csum::udp(!csum::fold(sum));
    }
    udp.write(0, u32::from(sport) | u32::from(port) << 16);
    udp.write(
        offset_of!(UdpHdr, len),
        u32::from(wire_len) | u32::from(check) << 16,
    );
}

/// The sum of all words of the inner packet.
///
/// A transport checksum makes the sum of the transport part a known one: the complement of its
/// pseudo-header's. Only a packet without one has to be read.
#[inline(always)]
fn inner_sum<F: Family>(
    frame: &Frame,
    link: &parse::Link,
    header: Cursor,
    len: u32,
) -> Option<u64> {
    let network = F::network(frame, link)?;
    let Ok(located) = F::locate(frame, &network) else {
        // A fragment: the transport checksum covers more than is here.
        let all = checksum::complete(frame.ctx, frame.offset(header) as u32, len)?;
        return Some(u64::from(!all));
    };
    let plain = located.transport_len + F::HEADER_LEN as u32 == len;
    let summed = match located.protocol {
        protocol::TCP => frame.check(located.header, TcpHdr::LEN).is_some(),
        // Bytes behind the datagram (RFC 9868) are not in its checksum.
        protocol::UDP => frame.check(located.header, UdpHdr::LEN).is_some_and(|udp| {
            let len = u16::from_be(udp.read(offset_of!(UdpHdr, len)));
            udp.read::<u16>(offset_of!(UdpHdr, check)) != 0
                && u32::from(len) == located.transport_len
        }),
        _ => false,
    };
    if plain && summed {
        let pseudo = checksum::pseudo_header(
            network.src,
            network.dst,
            located.protocol,
            located.transport_len,
        );
        return Some(F::header_sum(header) + u64::from(!pseudo));
    }
    let all = checksum::complete(frame.ctx, frame.offset(header) as u32, len)?;
    Some(u64::from(!all))
}

/// A source for the outer packet: the configured prefix with the hash in its host bits, or else
/// the balancer's own address.
#[inline(always)]
pub fn source4(settings: &Settings, backend: &Backend, hash: u32) -> u32 {
    if settings.encap_mask4 == 0 {
        return backend.source[0];
    }
    settings.encap_source4 | (hash.to_be() & settings.encap_mask4)
}

/// As [`source4`].
#[inline(always)]
pub fn source6(settings: &Settings, backend: &Backend, hash: u32) -> [u32; 4] {
    if settings.encap_mask6 == 0 {
        return lookup::address(&backend.source);
    }
    let [a, b, c, d] = settings.encap_source6;
    [a, b, c, d | (hash.to_be() & settings.encap_mask6)]
}
