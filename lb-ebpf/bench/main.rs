//! Prepares packets for `cargo xtask bench`; not part of the balancer.
//!
//! The kernel's `BPF_PROG_TEST_RUN` runs a program many times on one packet and restores neither the packet nor its length in between, so
//! that from the second time on another packet would be measured. The programs here run in front: each restores the packet, gives it to
//! another flow, and tail-calls what is measured. `docs/performance.md` describes the method.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
// The attribute `xdp` makes undocumented functions of documented ones.
#![allow(missing_docs)]

#[expect(dead_code, reason = "the balancer uses the rest")]
#[path = "../src/bounds.rs"]
mod bounds;

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    btf_maps::{Array, PerCpuArray},
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    macros::{btf_map, map, xdp},
    maps::ProgramArray,
    programs::XdpContext,
};
use core::mem::size_of;
use lb_common::bench::{Case, FIRST_PORT, HEADER_WORDS, PORT_BITS, Tuple, stamp};

#[btf_map(name = "case")]
static CASE: Array<Case, 1, MMAPABLE> = Array::new();
#[btf_map(name = "tuples")]
static TUPLES: Array<Tuple, 1, MMAPABLE> = Array::new();
/// What is measured: the balancer, then the floors.
#[map(name = "programs")]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(5, 0);

/// Packets that have reached [`sink`].
#[btf_map(name = "sunk")]
static SUNK: PerCpuArray<u64, 1> = PerCpuArray::new();

/// `BPF_F_MMAPABLE`.
const MMAPABLE: usize = 1 << 10;

const BALANCER: u32 = 0;
const FLOOR_TX: u32 = 1;
const FLOOR_SWAP: u32 = 2;
const PASS: u32 = 3;
const FLOOR_GROW: u32 = 4;

/// Where things are in a packet of one family.
trait Family {
    /// Words to restore: all headers.
    const WORDS: usize;
    /// Words of an address.
    const ADDRESS_WORDS: usize;
    /// The source address; the destination follows it.
    const SRC: usize;
    /// The transport header.
    const TRANSPORT: usize;
    /// The IP header's checksum.
    const CHECKSUM: Option<usize>;
}

struct V4;
struct V6;

const ETHERNET: usize = 14;

impl Family for V4 {
    const WORDS: usize = 7;
    const ADDRESS_WORDS: usize = 1;
    const SRC: usize = ETHERNET + 12;
    const TRANSPORT: usize = ETHERNET + 20;
    const CHECKSUM: Option<usize> = Some(ETHERNET + 10);
}

impl Family for V6 {
    const WORDS: usize = HEADER_WORDS;
    const ADDRESS_WORDS: usize = 4;
    const SRC: usize = ETHERNET + 8;
    const TRANSPORT: usize = ETHERNET + 40;
    const CHECKSUM: Option<usize> = None;
}

// A program for each family and target: a branch, or an index that varies, would be measured along.
#[xdp(frags)]
pub fn balancer4(ctx: XdpContext) -> u32 {
    run::<V4, BALANCER>(&ctx)
}

#[xdp(frags)]
pub fn balancer6(ctx: XdpContext) -> u32 {
    run::<V6, BALANCER>(&ctx)
}

#[xdp(frags)]
pub fn tx4(ctx: XdpContext) -> u32 {
    run::<V4, FLOOR_TX>(&ctx)
}

#[xdp(frags)]
pub fn tx6(ctx: XdpContext) -> u32 {
    run::<V6, FLOOR_TX>(&ctx)
}

#[xdp(frags)]
pub fn swap4(ctx: XdpContext) -> u32 {
    run::<V4, FLOOR_SWAP>(&ctx)
}

#[xdp(frags)]
pub fn swap6(ctx: XdpContext) -> u32 {
    run::<V6, FLOOR_SWAP>(&ctx)
}

#[xdp(frags)]
pub fn grow4(ctx: XdpContext) -> u32 {
    run::<V4, FLOOR_GROW>(&ctx)
}

#[xdp(frags)]
pub fn grow6(ctx: XdpContext) -> u32 {
    run::<V6, FLOOR_GROW>(&ctx)
}

#[xdp(frags)]
pub fn pass4(ctx: XdpContext) -> u32 {
    run::<V4, PASS>(&ctx)
}

#[xdp(frags)]
pub fn pass6(ctx: XdpContext) -> u32 {
    run::<V6, PASS>(&ctx)
}

/// Leaves the packet to the kernel.
#[xdp(frags)]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Where packets end that have gone through everything: counts them.
#[xdp(frags)]
pub fn sink(_ctx: XdpContext) -> u32 {
    if let Some(count) = SUNK.get_ptr_mut(0) {
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        unsafe { *count += 1 };
    }
    xdp_action::XDP_DROP
}

/// The least that a program can do.
#[xdp(frags)]
pub fn floor_tx(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// The least that a program can do to send a packet back.
#[xdp(frags)]
pub fn floor_swap(ctx: XdpContext) -> u32 {
    let (data, end) = ends(ctx.ctx);
    if data + ETHERNET > end {
        return xdp_action::XDP_ABORTED;
    }
    let (to, to_tail): (u32, u16) = (read(data), read(data + 4));
    let (from, from_tail): (u32, u16) = (read(data + 6), read(data + 10));
    write(data, from);
    write(data + 4, from_tail);
    write(data + 6, to);
    write(data + 10, to_tail);
    xdp_action::XDP_TX
}

/// The least that a program can do to make room for an outer header.
#[xdp(frags)]
pub fn floor_grow(ctx: XdpContext) -> u32 {
    // SAFETY: the context is valid.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -20) } != 0 {
        return xdp_action::XDP_ABORTED;
    }
    xdp_action::XDP_TX
}

/// Prepares the packet and goes on with a program, which does not return.
#[inline(always)]
fn run<F: Family, const PROGRAM: u32>(ctx: &XdpContext) -> u32 {
    let Some(case) = CASE.get_ptr_mut(0) else {
        return xdp_action::XDP_ABORTED;
    };
    // SAFETY: the one element; one thread at a time measures.
    let case = unsafe { &mut *case };
    if restore::<F>(ctx.ctx, case).is_some() {
        // SAFETY: this program holds nothing that would have to be dropped.
        unsafe { PROGRAMS.tail_call(ctx, PROGRAM) };
    }
    case.failures += 1;
    xdp_action::XDP_ABORTED
}

/// Makes of what the last run left the packet of the next flow.
#[inline(always)]
fn restore<F: Family>(ctx: *mut xdp_md, case: &mut Case) -> Option<()> {
    let (data, end) = ends(ctx);
    let growth = bounds::whole(end - data) as i32 - case.length as i32;
    if growth != 0 {
        // SAFETY: the context is valid; pointers into the packet are taken anew below.
        let failed = unsafe {
            if growth > 0 && case.grows_at_head != 0 {
                bpf_xdp_adjust_head(ctx, growth)
            } else {
                bpf_xdp_adjust_tail(ctx, -growth)
            }
        };
        if failed != 0 {
            return None;
        }
    }
    let (data, end) = ends(ctx);
    if data + 8 * F::WORDS > end {
        return None;
    }
    let headers = case.headers.as_ptr();
    for i in 0..F::WORDS {
        // SAFETY: no family has more words than the template. Volatile, or the compiler would call `memcpy`.
        write::<u64>(data + 8 * i, unsafe { headers.add(i).read_volatile() });
    }
    let n = case.first + (case.next.wrapping_mul(case.stride) & case.mask);
    let visit = case.next & case.mask;
    case.next += 1;
    match case.stamp {
        stamp::NONE => Some(()),
        stamp::TUPLE => tuple::<F>(data, visit as u32),
        kind => {
            client::<F>(data, case, n, kind == stamp::UDP);
            Some(())
        }
    }
}

/// Gives the packet to client number `n`.
#[inline(always)]
fn client<F: Family>(data: usize, case: &Case, n: u64, udp: bool) {
    let port = (FIRST_PORT + (n as u16 & ((1 << PORT_BITS) - 1))).to_be();
    let src = (case.client + (n >> PORT_BITS) as u32).to_be();
    let dst = (case.vip + (n as u32 & case.vip_mask)).to_be();
    let last = 4 * (F::ADDRESS_WORDS - 1);
    write(data + F::SRC + last, src);
    write(data + F::SRC + 4 * F::ADDRESS_WORDS + last, dst);
    write(data + F::TRANSPORT, port);
    let addresses = u64::from(src) + u64::from(dst);
    if let Some(checksum) = F::CHECKSUM {
        write(data + checksum, !fold(addresses + u64::from(case.ip_sum)));
    }
    let sum = !fold(addresses + u64::from(case.transport_sum) + u64::from(port));
    // RFC 768: a UDP checksum of zero says that there is none.
    let sum = if sum == 0 { 0xffff } else { sum };
    write(data + F::TRANSPORT + if udp { 6 } else { 16 }, sum);
}

/// Gives the packet the addresses and ports of an element of map `tuples`.
#[inline(always)]
fn tuple<F: Family>(data: usize, element: u32) -> Option<()> {
    let tuple = TUPLES.get(element)?;
    for i in 0..F::ADDRESS_WORDS {
        write(data + F::SRC + 4 * i, tuple.src[i]);
        write(data + F::SRC + 4 * (F::ADDRESS_WORDS + i), tuple.dst[i]);
    }
    write(data + F::TRANSPORT, tuple.sport);
    write(data + F::TRANSPORT + 2, tuple.dport);
    write(data + F::TRANSPORT + 16, tuple.transport_checksum);
    if let Some(checksum) = F::CHECKSUM {
        write(data + checksum, tuple.ip_checksum);
    }
    Some(())
}

/// The ones' complement sum in 16 bits (RFC 1071).
#[inline(always)]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[inline(always)]
fn ends(ctx: *mut xdp_md) -> (usize, usize) {
    // SAFETY: the kernel passes a valid context for as long as the program runs.
    unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) }
}

#[inline(always)]
fn read<T: Copy>(place: usize) -> T {
    const { assert!(size_of::<T>() <= 8) };
    // SAFETY: the verifier proves that the bytes lie in the packet, or refuses the program.
    unsafe { (place as *const T).read_unaligned() }
}

#[inline(always)]
fn write<T: Copy>(place: usize, value: T) {
    // SAFETY: as in `read`.
    unsafe { (place as *mut T).write_unaligned(value) }
}

/// What the kernel is told when the programs are loaded.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(all(not(test), target_arch = "bpf"))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the verifier refuses a program with an endless loop.
    loop {}
}
