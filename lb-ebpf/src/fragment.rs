//! Fragments: the first one carries the ports and goes the way of any packet; the others follow it.
//!
//! A first fragment leaves an entry under what all fragments of its datagram have in common. Later
//! ones find it, and get the same addresses and next hop; ports and checksum are in the first one
//! alone. One that comes before the first, or after the entry has gone, cannot be placed.
//!
//! All of this is in subprograms: a packet that is no fragment pays for one comparison.

use crate::{
    family::{Family, V4, V6},
    flow::{self, Outgoing},
    frame::Frame,
    lookup, maps,
    parse::{self, Fault, Link, Packet},
    rewrite, stats,
    verdict::Verdict,
};
use aya_ebpf::bindings::xdp_md;
use lb_common::{
    backend::BACKEND_RESOLVED, flow::DIRECTION_BACKEND, fragment::FragmentKey, hash,
    service::forward, stats::DropReason,
};

/// Remembers where a first fragment goes. It is still as it came.
#[inline(always)]
pub fn open<F: Family>(frame: &Frame, packet: &Packet<F>, outgoing: &Outgoing<F::Addr>) {
    let Some(work) = F::work() else {
        return;
    };
    let flow = outgoing.flow;
    let datagram = &mut work.datagram;
    datagram.src = lookup::load(&flow.src);
    datagram.dst = lookup::load(&flow.dst);
    datagram.backend = flow.backend;
    datagram.generation = flow.generation.into();
    datagram.service = flow.service;
    rewrite::copy_link(&mut datagram.l2, outgoing.l2);
    datagram.ifindex = outgoing.ifindex;
    datagram.tags = outgoing.tags;
    datagram.l3_delta = flow.l3_delta;
    datagram.direction = flow.direction;
    datagram.forward = flow.forward;
    work.arrival.key = packet.key();
    F::open_fragment(frame.ctx);
}

/// Sends a later fragment after the first.
#[inline(always)]
pub fn follow<F: Family>(frame: &Frame, link: &Link) -> Verdict {
    rewrite::finish::<F>(frame, link, F::follow_fragment(frame.ctx))
}

/// What all fragments of the datagram have in common goes to the CPU's desk.
#[inline(always)]
fn identify<F: Family>(frame: &Frame, network: &parse::Network<F>) -> Option<()> {
    let (id, protocol) = F::identification(frame, network)?;
    F::work()?.fragment = FragmentKey {
        src: network.src,
        dst: network.dst,
        id,
        protocol,
    };
    Some(())
}

#[inline(always)]
fn record<F: Family>(ctx: *mut xdp_md) -> Option<()> {
    let frame = Frame::new(ctx);
    let link = parse::ethernet(&frame).ok()?;
    let network = F::network(&frame, &link)?;
    identify::<F>(&frame, &network)?;
    let work = F::work()?;
    work.datagram.created = flow::now();
    work.datagram.hash = hash::flow_hash(&work.arrival.key);
    // Without an entry the rest of the datagram is dropped and counted.
    F::fragments()
        .insert(&work.fragment, &work.datagram, 0)
        .ok()
}

#[inline(always)]
fn place<F: Family>(ctx: *mut xdp_md) -> Result<Verdict, Verdict> {
    let frame = Frame::new(ctx);
    let link = parse::ethernet(&frame)?;
    let network = parse::network::<F>(&frame, &link)?;
    let work = F::work().ok_or(Verdict::PASS)?;
    let known = match identify::<F>(&frame, &network) {
        Some(()) => F::fragments().get_ptr_mut(&work.fragment),
        None => None,
    };
    let Some(datagram) = known else {
        return Err(parse::unsound(&network, Fault::Fragment));
    };
    // SAFETY: a live map value, as in `flow::follow`.
    let datagram = unsafe { &*datagram };
    if datagram.is_over(flow::now()) {
        return Err(parse::unsound(&network, Fault::Fragment));
    }
    let (service, mode) = (datagram.service, datagram.forward);
    // Nobody is told of a later fragment's end (RFC 1122 section 3.2.2).
    let hops = F::hops(network.header);
    if hops <= 1 && mode != forward::DSR {
        return Err(Verdict::drop(DropReason::TtlExceeded, service));
    }
    let bytes = F::packet_len(network.header);
    let (mut l2, mut ifindex) = (&datagram.l2, datagram.ifindex);
    (work.service, work.tags) = (service, datagram.tags);
    if datagram.direction == DIRECTION_BACKEND {
        stats::count_out(service, datagram.backend, u64::from(bytes));
    } else {
        let backend = maps::BACKENDS
            .get(datagram.backend)
            .filter(|b| u32::from(b.generation) == datagram.generation)
            .ok_or(Verdict::drop(DropReason::BackendDown, service))?;
        if backend.flags & BACKEND_RESOLVED == 0 {
            return Err(Verdict::drop(DropReason::NoNeighbour, service));
        }
        if flow::exceeds(bytes, backend.mtu.into(), frame.ingress()) {
            return Err(Verdict::drop(DropReason::TooBig, service));
        }
        (l2, ifindex) = (&backend.l2, backend.ifindex);
        work.tags = backend.tags;
        stats::count_in(service, datagram.backend, u64::from(bytes));
    }
    if forward::encapsulates(mode) {
        work.backend = datagram.backend;
        work.gue = u32::from(mode == forward::GUE);
        work.hash = datagram.hash;
        return Ok(Verdict::ENCAPSULATE);
    }
    if forward::translates(mode) {
        let (src, dst) = (lookup::load(&datagram.src), lookup::load(&datagram.dst));
        F::readdress(network.header, src, dst, datagram.l3_delta, hops - 1);
    }
    rewrite::write_link(&link, l2, ifindex);
    Ok(Verdict::leave(&frame, ifindex))
}

/// [`record`] for IPv4, as a function the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_fragment4(ctx: *mut xdp_md) -> u64 {
    u64::from(record::<V4>(ctx).is_some())
}

/// [`record`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_fragment6(ctx: *mut xdp_md) -> u64 {
    u64::from(record::<V6>(ctx).is_some())
}

/// [`place`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow_fragment4(ctx: *mut xdp_md) -> u64 {
    Verdict::of(place::<V4>(ctx)).bits()
}

/// [`place`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn follow_fragment6(ctx: *mut xdp_md) -> u64 {
    Verdict::of(place::<V6>(ctx)).bits()
}
