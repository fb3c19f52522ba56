//! Rewrite: the packet becomes what the next hop shall see. One module for each way to do that.

pub mod encap;
pub mod l2;
pub mod nat;
pub mod tags;

use crate::{
    checksum,
    family::Family,
    flow::{Outgoing, Work},
    frame::Frame,
    maps,
    parse::{Link, Packet, protocol},
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{backend::LOCAL, csum, hash, service::forward, stats::DropReason};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr};

/// Rewrites the packet as the flow's forward mode says.
#[inline(always)]
pub fn rewrite<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
) -> Result<(), Verdict> {
    let flow = outgoing.flow;
    if forward::translates(flow.forward) {
        return nat::nat(frame, link, packet, outgoing);
    }
    let flow_hash = hash::flow_hash(&packet.key());
    redirect(
        frame,
        link,
        packet,
        flow.service,
        flow.forward,
        flow.backend,
        outgoing.l2,
        flow_hash,
    )
}

/// Sends the packet to a backend that knows the VIP, with its own addresses: `dsr`, `ipip`, `gue`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn redirect<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    service: u32,
    mode: u8,
    backend: u32,
    l2: &[u32; 3],
    flow_hash: u32,
) -> Result<(), Verdict> {
    if mode == forward::DSR {
        return l2::l2(frame, link, packet, service, l2);
    }
    let gue = mode == forward::GUE;
    encap::encap(frame, packet, service, backend, gue, flow_hash)
}

/// Writes the transport checksum after `delta` has been added to its words; one that the sender
/// left to its hardware is completed first.
#[inline(always)]
fn update_checksum<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    service: u32,
    delta: Option<u16>,
) -> Result<(), Verdict> {
    if packet.protocol == protocol::UDP {
        let offset = offset_of!(UdpHdr, check);
        let check: u16 = packet.transport.read(offset);
        // Zero: the sender chose to send none (RFC 768).
        if check != 0
            && let Some(check) = new_checksum(frame, packet, check, service, delta)?
        {
            packet.transport.write(offset, csum::udp(check));
        }
    } else {
        let malformed = Verdict::drop(DropReason::Malformed, service);
        let tcp = packet.tcp(frame).ok_or(malformed)?;
        let offset = offset_of!(TcpHdr, check);
        let check: u16 = tcp.read(offset);
        if let Some(check) = new_checksum(frame, packet, check, service, delta)? {
            tcp.write(offset, check);
        }
    }
    Ok(())
}

/// The checksum that `check` becomes, if it changes.
#[inline(always)]
fn new_checksum<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    check: u16,
    service: u32,
    delta: Option<u16>,
) -> Result<Option<u16>, Verdict> {
    let pseudo = checksum::pseudo_header(
        packet.network.src,
        packet.network.dst,
        packet.protocol,
        packet.transport_len,
    );
    let mut check = check;
    // A sender that cuts up a datagram itself has computed its checksum before.
    if check == pseudo && !packet.first_fragment {
        check = checksum::complete(
            frame.ctx,
            frame.offset(packet.transport) as u32,
            packet.transport_len,
        )
        .ok_or(Verdict::drop(DropReason::AdjustFailed, service))?;
    } else if delta.is_none() {
        return Ok(None);
    }
    Ok(Some(match delta {
        Some(delta) => csum::update(check, delta),
        None => check,
    }))
}

/// The verdict of a subprogram, after the encapsulation and the VLAN tags, which it leaves over:
/// the stack has no room for a subprogram that calls one that calls another.
#[inline(always)]
pub fn finish<F: Family>(frame: &Frame, link: &Link, bits: u64) -> Verdict {
    let Some(work) = F::work() else {
        return Verdict::PASS;
    };
    let verdict = encapsulated::<F>(frame, work, bits);
    if verdict.leaves()
        && let Err(dropped) = tags::tag(frame, link, work.tags, work.service)
    {
        return dropped;
    }
    verdict
}

#[inline(always)]
fn encapsulated<F: Family>(frame: &Frame, work: &Work<F::Addr>, bits: u64) -> Verdict {
    if bits != Verdict::ENCAPSULATE.bits() {
        return Verdict::from_bits(bits);
    }
    let Some(backend) = maps::BACKENDS.get(work.backend) else {
        return Verdict::PASS;
    };
    let ifindex = backend.ifindex;
    match F::encapsulate(frame.ctx, work.backend, work.hash, work.gue) {
        0 => Verdict::leave(frame, ifindex),
        reason => Verdict::refused(reason as u8, false, work.service),
    }
}

/// Copies the Ethernet addresses of a next hop, word by word like [`lookup::load`].
///
/// [`lookup::load`]: crate::lookup::load
#[inline(always)]
pub fn copy_link(to: &mut [u32; 3], from: &[u32; 3]) {
    let first = from.as_ptr();
    for (i, word) in to.iter_mut().enumerate() {
        // SAFETY: one of the three words.
        *word = unsafe { first.add(i).read_volatile() };
    }
}

/// Writes the Ethernet addresses of a next hop; what this host delivers itself keeps its own.
#[inline(always)]
pub fn write_link(link: &Link, l2: &[u32; 3], ifindex: u32) {
    if ifindex != LOCAL {
        link.header.write_words(0, l2);
    }
}

/// Sends an answer back the way the packet came.
#[inline(always)]
pub fn exchange_link(link: &Link) {
    let destination = link.header.read_mac(offset_of!(EthHdr, dst_addr));
    let source = link.header.read_mac(offset_of!(EthHdr, src_addr));
    link.header.write_mac(offset_of!(EthHdr, dst_addr), source);
    link.header
        .write_mac(offset_of!(EthHdr, src_addr), destination);
}
