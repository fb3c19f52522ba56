//! Completes a checksum the sender left to its hardware.
//!
//! A packet from a container or namespace on this machine has not seen a wire. Its transport
//! checksum field holds the folded sum of the pseudo-header and nothing more
//! (`CHECKSUM_PARTIAL`, `Documentation/networking/checksum-offloads.rst` in the kernel), and XDP
//! cannot see the flag that says so. The field itself tells: it equals the pseudo-header's sum. A
//! finished checksum has that value in one packet of 65535, and completing such a one yields the
//! value it already had.

use crate::{
    bounds,
    maps::{self, CHUNK},
};
use aya_ebpf::{
    bindings::xdp_md,
    helpers::{bpf_csum_diff, bpf_xdp_load_bytes},
};
use lb_common::{addr::Address, csum};

/// The folded sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
pub fn pseudo_header<A: Address>(src: A, dst: A, protocol: u8, transport_len: u32) -> u16 {
    csum::fold(pseudo_sum(src, dst, protocol, transport_len))
}

/// The sum of the pseudo-header.
#[inline(always)]
pub fn pseudo_sum<A: Address>(src: A, dst: A, protocol: u8, transport_len: u32) -> u64 {
    let (src, dst) = (src.widen(), dst.widen());
    let mut sum = u64::from(u16::from(protocol).to_be()) + csum::word(transport_len.to_be());
    let mut i = 0;
    while i < A::WORDS {
        sum += csum::word(src[i]) + csum::word(dst[i]);
        i += 1;
    }
    sum
}

/// What replacing an address adds to a sum.
#[inline(always)]
pub fn replaced<A: Address>(old: A, new: A) -> u64 {
    let (old, new) = (old.widen(), new.widen());
    let mut sum = 0;
    let mut i = 0;
    while i < A::WORDS {
        sum += csum::minus(old[i]) + csum::word(new[i]);
        i += 1;
    }
    sum
}

/// Whole chunks in the largest IP packet.
const MAX_CHUNKS: u32 = 65536 / CHUNK as u32;

/// The checksum of `len` bytes from `offset` in the frame, whose checksum field holds the sum of
/// the pseudo-header; `None` if they cannot be read.
#[inline(always)]
pub fn complete(ctx: *mut xdp_md, offset: u32, len: u32) -> Option<u16> {
    u16::try_from(sum_packet(ctx, offset, len)).ok()
}

/// What [`complete`] does, with a value above `u16::MAX` for failure: a subprogram returns one
/// register.
///
/// Exported, which makes it a global function to the kernel: its loop is verified once, and not
/// again for each state in which it may be called.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sum_packet(ctx: *mut xdp_md, offset: u32, len: u32) -> u32 {
    let Some(scratch) = maps::SCRATCH.get_ptr_mut(0) else {
        return u32::MAX;
    };
    // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
    let bytes = unsafe { &raw mut (*scratch).bytes }.cast::<u8>();
    let mut done = 0_u32;
    let mut sum = 0_u32;
    for _ in 0..MAX_CHUNKS {
        if len.wrapping_sub(done) < CHUNK as u32 {
            break;
        }
        match add_chunk(ctx, offset + done, bytes, CHUNK as u32, sum) {
            Some(total) => sum = total,
            None => return u32::MAX,
        }
        done += CHUNK as u32;
    }
    if len > done {
        let Some(rest) = bounds::within(len - done, 1, CHUNK as u32 - 1) else {
            return u32::MAX;
        };
        match add_chunk(ctx, offset + done, bytes, rest, sum) {
            Some(total) => sum = total,
            None => return u32::MAX,
        }
    }
    u32::from(!csum::fold(u64::from(sum)))
}

/// Adds `n` bytes of the packet, at least 1 and at most [`CHUNK`], to `sum`.
#[inline(always)]
fn add_chunk(ctx: *mut xdp_md, offset: u32, bytes: *mut u8, n: u32, sum: u32) -> Option<u32> {
    // SAFETY: `bytes` has room for a chunk and a word of padding; the helper checks that the
    // packet has the bytes. Zeroes behind an odd end come first, and the load overwrites what is
    // not padding.
    let total = unsafe {
        bytes.add((n & !3) as usize).cast::<u32>().write(0);
        if bpf_xdp_load_bytes(ctx, offset, bytes.cast(), n) != 0 {
            return None;
        }
        bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast(), (n + 3) & !3, sum)
    };
    (total >= 0).then_some(total as u32)
}
