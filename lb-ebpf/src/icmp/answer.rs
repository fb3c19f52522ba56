//! Tells the sender of a packet why it went no further: it was too large, or it had no hop left.
//!
//! The answer quotes as much of the packet as may be quoted and comes from the address the packet
//! was for: to its sender that is the peer, and often the only address of ours it has a route to.

use crate::{
    checksum,
    family::{Family, V4, V6},
    flow,
    frame::Frame,
    maps,
    parse::{self, ethernet},
};
use aya_ebpf::{
    bindings::xdp_md,
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, generated::bpf_xdp_get_buff_len},
};
use core::mem::offset_of;
use lb_common::{addr::Address, stats::DropReason};
use network_types::{eth::EthHdr, icmp::Icmpv4Hdr, vlan::VlanHdr};

/// Answers that may be sent in one go, by each CPU.
const BURST: u32 = 256;

/// What is left of a CPU's allowance of answers.
///
/// A router must limit the errors it originates (RFC 1812 section 4.3.2.8, RFC 4443 section
/// 2.4 (f)). One for each tick, 953 a second, is what Linux grants itself on all CPUs together
/// (`icmp_msgs_per_sec`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Allowance {
    /// Tick of the last answer.
    last: u32,
    /// Answers that were left then.
    left: u32,
}

/// Turns the packet in `ctx` into an error for its sender: 1 if it is to be sent, 0 if there is
/// none to be sent. `reason` is the drop reason's number, `mtu` the bytes of the largest IP packet
/// that would have gone through.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn answer_error(ctx: *mut xdp_md, reason: u32, mtu: u32) -> u32 {
    let Ok(link) = parse::ethernet(&Frame::new(ctx)) else {
        return 0;
    };
    let answered = match link.ethertype {
        ethernet::IPV4 => answer::<V4>(ctx, reason, mtu),
        ethernet::IPV6 => answer::<V6>(ctx, reason, mtu),
        _ => None,
    };
    u32::from(answered.is_some())
}

#[inline(always)]
fn answer<F: Family>(ctx: *mut xdp_md, reason: u32, mtu: u32) -> Option<()> {
    let frame = Frame::new(ctx);
    let link = parse::ethernet(&frame).ok()?;
    let network = F::network(&frame, &link)?;
    let located = F::locate_first(&frame, &network).ok()?;
    let (src, dst) = (network.dst, network.src);
    if !F::is_host(dst) || !is_allowed() {
        return None;
    }
    let link_len = frame.offset(network.header) as u32;
    let quote_len = located.packet_len.min(F::QUOTE);
    // SAFETY: a valid context.
    let present = unsafe { bpf_xdp_get_buff_len(ctx) };
    let excess = (present as u32).wrapping_sub(link_len + quote_len) as i32;
    // SAFETY: as above; the frame is taken anew below.
    if excess != 0 && unsafe { bpf_xdp_adjust_tail(ctx, excess.wrapping_neg()) } != 0 {
        return None;
    }
    let growth = F::HEADER_LEN + Icmpv4Hdr::LEN;
    // SAFETY: as above.
    if unsafe { bpf_xdp_adjust_head(ctx, -(growth as i32)) } != 0 {
        return None;
    }

    let frame = Frame::new(ctx);
    // The Ethernet header moves to the front; two tags are the most there are.
    let start = frame.start(growth + EthHdr::LEN + 2 * VlanHdr::LEN)?;
    let old = start.skip(growth);
    start.write_mac(
        offset_of!(EthHdr, dst_addr),
        old.read_mac(offset_of!(EthHdr, src_addr)),
    );
    start.write_mac(
        offset_of!(EthHdr, src_addr),
        old.read_mac(offset_of!(EthHdr, dst_addr)),
    );
    let mut at = offset_of!(EthHdr, ether_type);
    start.write(at, old.read::<u16>(at));
    for _ in 0..2 {
        at += size_of::<u16>();
        // Without a tag these are bytes that the new header overwrites.
        start.write(at, old.read::<u16>(at));
        at += size_of::<u16>();
        start.write(at, old.read::<u16>(at));
    }
    let header = start.skip((link_len & 0x1f) as usize);
    let header = frame.check(header, growth)?;
    let message_len = Icmpv4Hdr::LEN as u32 + quote_len;
    F::write_header(header, src, dst, F::ICMP, 0, message_len as u16);
    let icmp = header.skip(F::HEADER_LEN);
    let (kind, rest) = if reason == DropReason::TooBig as u32 {
        (F::TOO_BIG, F::mtu_word(mtu))
    } else {
        (F::TIME_EXCEEDED, 0)
    };
    // ICMPv6 sums the pseudo-header too (RFC 4443 section 2.3).
    let pseudo = if F::Addr::FAMILY == lb_common::addr::FAMILY_V6 {
        checksum::pseudo_header(src, dst, F::ICMP, message_len)
    } else {
        0
    };
    icmp.write(0, kind);
    icmp.write(offset_of!(Icmpv4Hdr, check), pseudo);
    icmp.write(4, rest);
    let offset = frame.offset(icmp) as u32;
    let check = checksum::complete(ctx, offset, message_len)?;
    icmp.write(offset_of!(Icmpv4Hdr, check), check);
    Some(())
}

/// Takes one answer from this CPU's allowance.
#[inline(always)]
fn is_allowed() -> bool {
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
    let allowance = unsafe { &mut (*scratch).allowance };
    let now = flow::now();
    let earned = now.wrapping_sub(allowance.last);
    let left = if earned > BURST {
        BURST
    } else {
        (allowance.left + earned).min(BURST)
    };
    allowance.last = now;
    allowance.left = left.saturating_sub(1);
    left > 0
}
