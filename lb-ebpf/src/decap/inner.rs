//! The inner packet: whether it is for us, and what it needs before the kernel gets it.

use super::{CONGESTION, Layer, ecn, role};
use crate::{
    bounds, checksum,
    family::{V4, V6},
    frame::Frame,
    parse::{Fault, Link, Located, Network, protocol},
};
use aya_ebpf::bindings::xdp_md;
use core::mem::offset_of;
use lb_common::{
    csum,
    decap::{Outcome, VIP},
};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr};

/// Judges the IPv4 packet `offset` bytes into the frame, for which the outer packet has `room`
/// bytes, and makes it ready if it is admitted. `congestion`: the outer header is marked.
///
/// Exported, which makes it a global function to the kernel: it is verified once, and not for each
/// way that leads to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn admit4(ctx: *mut xdp_md, offset: u32, room: u32, congestion: u32) -> u64 {
    admit::<V4>(ctx, offset, room, congestion)
}

/// [`admit4`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn admit6(ctx: *mut xdp_md, offset: u32, room: u32, congestion: u32) -> u64 {
    admit::<V6>(ctx, offset, room, congestion)
}

/// What [`admit4`] found: the number of the [`Outcome`] that refuses the packet, 0 for none, and the
/// bytes of an admitted one.
#[inline(always)]
pub const fn verdict(judged: u64) -> (u32, u32) {
    (judged as u8 as u32, (judged >> 32) as u32)
}

#[inline(always)]
fn admit<I: Layer>(ctx: *mut xdp_md, offset: u32, room: u32, congestion: u32) -> u64 {
    match prepare::<I>(ctx, offset, room, congestion != 0) {
        Ok(len) => u64::from(len) << 32,
        Err(outcome) => outcome as u64,
    }
}

#[inline(always)]
fn prepare<I: Layer>(
    ctx: *mut xdp_md,
    offset: u32,
    room: u32,
    congestion: bool,
) -> Result<u32, Outcome> {
    let frame = Frame::new(ctx);
    let offset =
        bounds::within(offset, EthHdr::LEN as u32, super::MAX_OFFSET).ok_or(Outcome::Malformed)?;
    let start = frame.start(EthHdr::LEN).ok_or(Outcome::Malformed)?;
    let link = Link {
        header: start,
        ethertype: I::ETHERTYPE,
        payload: start.skip(offset as usize),
        tags: 0,
    };
    let network = I::network(&frame, &link).ok_or(Outcome::Malformed)?;
    let located = match I::locate(&frame, &network) {
        Ok(located) => Some(located),
        // The kernel puts it together.
        Err(Fault::Fragment) => None,
        Err(Fault::Malformed) => return Err(Outcome::Malformed),
    };
    let len = I::packet_len(network.header);
    if len > room {
        return Err(Outcome::Malformed);
    }
    if role::<I>(&network.dst) & VIP == 0 {
        return Err(Outcome::NotVip);
    }
    if congestion {
        match ecn::<I>(network.header) {
            0 => return Err(Outcome::Congestion),
            CONGESTION => {}
            _ => I::mark_congestion(network.header),
        }
    }
    if let Some(located) = located {
        complete_checksum(&frame, &network, &located);
    }
    Ok(len)
}

/// Completes a checksum that the sender left to its hardware, or the kernel's GRO in front of
/// generic XDP.
///
/// What the socket buffer says of the checksum is lost on the way through XDP, so the kernel would
/// find it wrong. Damaged packets are the kernel's to find.
#[inline(always)]
fn complete_checksum<I: Layer>(frame: &Frame, network: &Network<I>, located: &Located) {
    let (at, header_len) = match located.protocol {
        protocol::TCP => (offset_of!(TcpHdr, check), TcpHdr::LEN),
        protocol::UDP => (offset_of!(UdpHdr, check), UdpHdr::LEN),
        _ => return,
    };
    if located.transport_len < header_len as u32 {
        return;
    }
    let Some(field) = frame.check(located.header.skip(at), 2) else {
        return;
    };
    let udp = located.protocol == protocol::UDP;
    let check: u16 = field.read(0);
    if udp && check == 0 {
        return;
    }
    let pseudo = checksum::pseudo_header(
        network.src,
        network.dst,
        located.protocol,
        located.transport_len,
    );
    if check != pseudo {
        return;
    }
    let offset = frame.offset(located.header) as u32;
    if let Some(check) = checksum::complete(frame.ctx, offset, located.transport_len) {
        field.write(0, if udp { csum::udp(check) } else { check });
    }
}
