//! VLAN tags: a packet leaves with those of its next hop, whichever it came with.

use crate::{
    frame::{Cursor, Frame},
    parse::{self, Link, ethernet},
    verdict::Verdict,
};
use aya_ebpf::{bindings::xdp_md, helpers::bpf_xdp_adjust_head};
use core::mem::offset_of;
use lb_common::{stats::DropReason, vlan};
use network_types::{eth::EthHdr, vlan::VlanHdr};

/// Where the first tag begins, with its own ethertype.
const FIRST: usize = offset_of!(EthHdr, ether_type);

/// Gives the packet the tags `wanted`; `link` is how it came. Every cursor is stale behind this.
#[inline(always)]
pub fn tag(frame: &Frame, link: &Link, wanted: u32, service: u32) -> Result<(), Verdict> {
    if link.tags == wanted {
        return Ok(());
    }
    match retag(frame.ctx, wanted) {
        0 => Ok(()),
        reason => Err(Verdict::refused(reason as u8, false, service)),
    }
}

/// Replaces the tags of the packet: 0, or the number of a drop reason. As a function of its own,
/// the kernel verifies it once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn retag(ctx: *mut xdp_md, wanted: u32) -> u32 {
    const MALFORMED: u32 = DropReason::Malformed as u32;
    let frame = Frame::new(ctx);
    let Ok(link) = parse::ethernet(&frame) else {
        return MALFORMED;
    };
    // An IP header follows whatever tags there are.
    let Some(old) = frame.start(EthHdr::LEN + 2 * VlanHdr::LEN) else {
        return MALFORMED;
    };
    let macs: [u32; 3] = [old.read(0), old.read(4), old.read(8)];
    let ethertype = link.ethertype;
    let had = vlan::count(link.tags);
    let priority = |at: usize, there: bool| {
        let tci: u16 = old.read(at);
        if there { tci & PRIORITY } else { 0 }
    };
    let outer_priority = priority(FIRST + 2, had > 0);
    let inner_priority = priority(FIRST + 2 + VlanHdr::LEN, had > 1);

    let fewer = (had as i32 - vlan::count(wanted) as i32) * VlanHdr::LEN as i32;
    // SAFETY: a valid context; the frame is taken anew below.
    if fewer != 0 && unsafe { bpf_xdp_adjust_head(ctx, fewer) } != 0 {
        return DropReason::AdjustFailed as u32;
    }
    let frame = Frame::new(ctx);
    let Some(start) = frame.start(EthHdr::LEN + 2 * VlanHdr::LEN) else {
        return MALFORMED;
    };
    start.write_words(0, &macs);
    let (outer, inner) = vlan::halves(wanted);
    let mut at = start.skip(FIRST);
    if outer != 0 {
        write(at, outer, outer_priority);
        at = at.skip(VlanHdr::LEN);
    }
    if inner != 0 {
        write(at, inner, inner_priority);
        at = at.skip(VlanHdr::LEN);
    }
    at.write(0, ethertype);
    0
}

/// Bits of a tag beside the VLAN, as they stand in the frame: they stay with the tag's place.
const PRIORITY: u16 = (!vlan::ID).to_be();

#[inline(always)]
fn write(at: Cursor, tag: u16, priority: u16) {
    let ethertype = if tag & vlan::SERVICE != 0 {
        ethernet::SERVICE_VLAN
    } else {
        ethernet::VLAN
    };
    at.write(0, ethertype);
    at.write(2, (tag & vlan::ID).to_be() | priority);
}
