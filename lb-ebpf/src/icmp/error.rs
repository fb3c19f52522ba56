//! An error that quotes a packet of a flow goes to the end of the flow that must hear of it.
//!
//! `docs/icmp.md` derives the translation. In short: an error quotes a packet as it left the
//! balancer, so the quoted addresses and ports the other way round are the key of the entry that
//! carries packets *towards* whoever sent it, and that entry says all there is to write.

use crate::{
    checksum,
    family::{Family, V4, V6},
    flow::{FOLLOW, Way, table},
    frame::{Cursor, Frame},
    lookup, maps, parse,
    parse::protocol,
    rewrite, stats,
    verdict::Verdict,
};
use aya_ebpf::bindings::xdp_md;
use core::mem::offset_of;
use lb_common::{
    addr::Address,
    backend::BACKEND_RESOLVED,
    csum,
    flow::{DIRECTION_BACKEND, DIRECTION_CLIENT, Flow, FlowKey, THROUGH_GATEWAY},
    hash,
    service::forward,
    stats::DropReason,
};
use network_types::{icmp::Icmpv4Hdr, tcp::TcpHdr, udp::UdpHdr};

/// The header of a quoted packet.
pub struct Quoted<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes to the transport header.
    pub header_len: u32,
}

/// Bytes of the transport header that every quote holds (RFC 792): the ports, and UDP's checksum.
const QUOTED_TRANSPORT: u32 = 8;

/// Carries the error in `frame` to the end of the flow that it quotes; what is no error or quotes
/// no flow is the kernel's.
#[inline(always)]
pub fn carry_on<F: Family>(frame: &Frame, link: &parse::Link) -> Verdict {
    // One after the other: the stack has no room for a subprogram that calls one that calls another.
    if F::read_quote(frame.ctx) == 0 {
        return Verdict::PASS;
    }
    let Some(work) = F::work() else {
        return Verdict::PASS;
    };
    work.number = F::find(table::ARRIVAL);
    // What it is about was small enough, and had come as far as it should.
    (work.arrival.packet_len, work.arrival.can_travel) = (1, 1);
    if work.number == table::NONE {
        if F::describe() == 0 && F::answer() != FOLLOW {
            return Verdict::PASS;
        }
    } else if leaves_through_gateway::<F>(work.number) {
        if F::through_gateway() != FOLLOW {
            return Verdict::PASS;
        }
        work.number = table::NONE;
    }
    rewrite::finish::<F>(frame, link, F::carry_error(frame.ctx))
}

/// Whether a flow's packets go to the gateway of its service.
#[inline(always)]
fn leaves_through_gateway<F: Family>(number: table::Number) -> bool {
    table::flow::<F>(number)
        .is_some_and(|flow| flow.direction == DIRECTION_BACKEND && flow.link == THROUGH_GATEWAY)
}

/// An ICMP error and what it quotes.
struct Report<F: Family> {
    link: parse::Link,
    network: parse::Network<F>,
    located: parse::Located,
    /// The first byte of the quoted packet's transport header.
    transport: Cursor,
    quoted: Quoted<F::Addr>,
}

#[inline(always)]
fn report<F: Family>(frame: &Frame) -> Option<Report<F>> {
    let link = parse::ethernet(frame).ok()?;
    let network = parse::network::<F>(frame, &link).ok()?;
    let located = F::locate(frame, &network).ok()?;
    let icmp = located.header;
    let quote = icmp.skip(Icmpv4Hdr::LEN);
    let quoted = F::quoted(frame, quote)?;
    // An error goes to the source of what it quotes.
    if located.protocol != F::ICMP || !F::is_icmp_error(icmp.read(0)) || network.dst != quoted.src {
        return None;
    }
    let to_transport = Icmpv4Hdr::LEN as u32 + quoted.header_len;
    if located.transport_len < to_transport + QUOTED_TRANSPORT {
        return None;
    }
    let transport = quote.skip(quoted.header_len as usize);
    let transport = frame.check(transport, QUOTED_TRANSPORT as usize)?;
    Some(Report {
        link,
        network,
        located,
        transport,
        quoted,
    })
}

/// Leaves the key of the flow that an error quotes in `work.arrival.key`; 0 if it is none.
#[inline(always)]
fn read<F: Family>(ctx: *mut xdp_md) -> u64 {
    let frame = Frame::new(ctx);
    let Some(work) = F::work() else {
        return 0;
    };
    let Some(Report {
        quoted, transport, ..
    }) = report::<F>(&frame)
    else {
        return 0;
    };
    work.arrival.key = FlowKey {
        src: quoted.dst,
        dst: quoted.src,
        sport: transport.read(2),
        dport: transport.read(0),
        protocol: u32::from(quoted.protocol),
    };
    1
}

/// All of [`carry_on`] but the encapsulation and the VLAN tags, for the flow that was found.
#[inline(always)]
fn carry<F: Family>(ctx: *mut xdp_md) -> Result<Verdict, Verdict> {
    let frame = Frame::new(ctx);
    let Report {
        link,
        network,
        located,
        transport,
        quoted,
    } = report::<F>(&frame).ok_or(Verdict::PASS)?;
    let icmp = located.header;
    let quote = icmp.skip(Icmpv4Hdr::LEN);
    let to_transport = Icmpv4Hdr::LEN as u32 + quoted.header_len;
    let work = F::work().ok_or(Verdict::PASS)?;
    let flow = match table::flow::<F>(work.number) {
        Some(flow) => &*flow,
        None => {
            // What `carry_on` has found.
            // SAFETY: per-CPU memory, which nothing changes before the error has left.
            unsafe { &*core::ptr::from_ref(&work.client) }
        }
    };
    let service = flow.service;
    // RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 (e): no error about an error.
    let hops = F::hops(network.header);
    if hops <= 1 && flow.forward != forward::DSR {
        return Err(Verdict::drop(DropReason::TtlExceeded, service));
    }
    // The way to a client has been found with an answer that is not recorded, or leaves through a gateway.
    if work.number != table::NONE || flow.direction == DIRECTION_CLIENT {
        next_hop(&mut work.way, flow)?;
    }
    let (l2, ifindex, tags) = (&work.way.l2, work.way.ifindex, work.way.tags);
    (work.service, work.tags) = (service, tags);
    let bytes = u64::from(located.packet_len);
    if flow.direction == DIRECTION_BACKEND {
        stats::count_out(service, flow.backend, bytes);
    } else {
        stats::count_in(service, flow.backend, bytes);
    }
    if !forward::translates(flow.forward) {
        // The backend answered the client itself: the quote is what it sent.
        if forward::encapsulates(flow.forward) {
            work.backend = flow.backend;
            work.gue = u32::from(flow.forward == forward::GUE);
            work.hash = hash::flow_hash(&work.arrival.key);
            return Ok(Verdict::ENCAPSULATE);
        }
        rewrite::write_link(&link, l2, ifindex);
        return Ok(Verdict::leave(&frame, ifindex));
    }

    let tcp_check = to_transport + offset_of!(TcpHdr, check) as u32 + 2 <= located.transport_len;
    let protocol = quoted.protocol;
    translate_quote::<F>(&frame, icmp, quote, transport, flow, protocol, tcp_check);
    // In `dnat` the backend sees the addresses of clients, and of their routers as well.
    let source = if flow.forward == forward::DNAT && flow.direction == DIRECTION_CLIENT {
        network.src
    } else {
        lookup::load(&flow.src)
    };
    let destination = lookup::load(&flow.dst);
    let outer = csum::fold(
        checksum::replaced(network.src, source) + checksum::replaced(network.dst, destination),
    );
    if F::ICMP == protocol::ICMPV6 {
        // The pseudo-header has the addresses (RFC 4443 section 2.3).
        add_to_check(icmp, outer);
    }
    F::readdress(network.header, source, destination, outer, hops - 1);
    rewrite::write_link(&link, l2, ifindex);
    Ok(Verdict::leave(&frame, ifindex))
}

/// MAC addresses, interface and VLAN tags towards the end of the flow.
#[inline(always)]
fn next_hop<A: Address>(way: &mut Way, flow: &Flow<A>) -> Result<(), Verdict> {
    if flow.direction == DIRECTION_BACKEND {
        return way.set_back(flow).ok_or(Verdict::PASS);
    }
    let backend = maps::BACKENDS
        .get(flow.backend)
        .filter(|b| b.generation == flow.generation)
        .ok_or(Verdict::drop(DropReason::BackendDown, flow.service))?;
    if backend.flags & BACKEND_RESOLVED == 0 {
        return Err(Verdict::drop(DropReason::NoNeighbour, flow.service));
    }
    way.set(&backend.l2, backend.ifindex, backend.tags);
    Ok(())
}

/// Makes the quoted packet the one its sender knows, and mends the ICMP checksum.
///
/// The quote is the flow's tuple the other way round, so what the flow adds to the sums of its
/// own packets is also what the translation adds to those of the quote.
#[inline(always)]
fn translate_quote<F: Family>(
    frame: &Frame,
    icmp: Cursor,
    quote: Cursor,
    transport: Cursor,
    flow: &Flow<F::Addr>,
    protocol: u8,
    tcp_check: bool,
) {
    let mut delta = u64::from(flow.l4_delta)
        + u64::from(F::readdress_quoted(
            quote,
            flow.dst,
            flow.src,
            flow.l3_delta,
        ));
    transport.write(0, flow.dport);
    transport.write(2, flow.sport);
    if protocol == protocol::UDP {
        let check: u16 = transport.read(offset_of!(UdpHdr, check));
        // Zero: the sender sent none (RFC 768).
        if check != 0 {
            let mended = csum::udp(csum::update(check, flow.l4_delta));
            transport.write(offset_of!(UdpHdr, check), mended);
            delta += u64::from(!check) + u64::from(mended);
        }
    } else if tcp_check {
        // A router may quote no more than the first eight bytes, which end before this field.
        const FIELD: usize = offset_of!(TcpHdr, check);
        if let Some(tcp) = frame.check(transport, FIELD + 2) {
            let check: u16 = tcp.read(FIELD);
            let mended = csum::update(check, flow.l4_delta);
            tcp.write(FIELD, mended);
            delta += u64::from(!check) + u64::from(mended);
        }
    }
    add_to_check(icmp, csum::fold(delta));
}

#[inline(always)]
fn add_to_check(icmp: Cursor, delta: u16) {
    let check: u16 = icmp.read(offset_of!(Icmpv4Hdr, check));
    icmp.write(offset_of!(Icmpv4Hdr, check), csum::update(check, delta));
}

/// [`read`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn read_quote4(ctx: *mut xdp_md) -> u64 {
    read::<V4>(ctx)
}

/// [`read`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn read_quote6(ctx: *mut xdp_md) -> u64 {
    read::<V6>(ctx)
}

/// [`carry`] for IPv4, as a function the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn carry_error4(ctx: *mut xdp_md) -> u64 {
    Verdict::of(carry::<V4>(ctx)).bits()
}

/// [`carry`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn carry_error6(ctx: *mut xdp_md) -> u64 {
    Verdict::of(carry::<V6>(ctx)).bits()
}
