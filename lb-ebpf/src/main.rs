//! Sluice's kernel side: an XDP program that balances packets at layer 4.
//!
//! A packet goes one way through the stages, each a module:
//!
//! parse → lookup → flow → select → rewrite → forward
//!
//! Most packets take the short way through them that [`usual`] has.
//!
//! A stage returns what the next one needs, or ends the packet's way with a
//! [`verdict::Verdict`] carried by `?`. [`verdict::conclude`] is the only place that counts
//! drops and speaks XDP codes.
//!
//! The programs are inlined into what their attribute makes of them: a call less, whose return a
//! kernel may guard at the price of a mispredicted branch.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
// The attribute `xdp` makes undocumented functions of documented ones.
#![allow(missing_docs)]
// A key that is passed by value is copied to the stack once more.
#![allow(clippy::needless_borrows_for_generic_args)]

mod admit;
mod atomic;
mod bounds;
mod checksum;
mod decap;
mod egress;
mod family;
mod flow;
mod forward;
mod fragment;
mod frame;
mod icmp;
mod local;
mod lookup;
mod maps;
mod neighbour;
mod parse;
mod pressure;
mod probe;
mod reset;
mod rewrite;
mod select;
mod stateless;
mod stats;
mod usual;
mod verdict;

use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use family::{Family, V4, V6};
use frame::Frame;
use lb_common::{backend::LOCAL, stats::DropReason};
use parse::ethernet;
use verdict::Verdict;

/// The balancer. It says that it knows packets of several pages, so that drivers let it onto
/// interfaces with a large MTU.
#[xdp(frags)]
#[inline(always)]
pub fn sluice_xdp(ctx: XdpContext) -> u32 {
    let usual = usual::balance(&Frame::new(ctx.ctx)).unwrap_or(Verdict::UNDECIDED);
    // Hidden from the compiler, which would otherwise have each of the many places where a packet
    // turns out to be unusual prepare for the long way, before it is known to go there.
    let verdict = Verdict::from_bits(bounds::whole(usual.bits() as usize) as u64);
    let frame = Frame::new(ctx.ctx);
    let verdict = if verdict.is_undecided() {
        Verdict::of(pipeline(&frame))
    } else {
        verdict
    };
    verdict::conclude(&frame, verdict)
}

/// Decapsulation on a backend, where no balancer runs.
#[xdp(frags)]
#[inline(always)]
pub fn sluice_decap(ctx: XdpContext) -> u32 {
    decap::take_off(ctx.ctx);
    xdp_action::XDP_PASS
}

/// The host's own packets on their way out: answers of backends on it, and health checks.
#[classifier]
#[inline(always)]
pub fn sluice_egress(ctx: TcContext) -> i32 {
    let verdict = probe::send(ctx.skb.skb);
    if verdict == TC_ACT_UNSPEC {
        egress::restore(ctx.skb.skb);
    }
    // Whatever else is there may look at it too.
    verdict
}

/// Packets for the host itself: what answers health checks.
#[classifier]
#[inline(always)]
pub fn sluice_ingress(ctx: TcContext) -> i32 {
    probe::receive(ctx.skb.skb);
    TC_ACT_UNSPEC
}

/// The way of a packet.
#[inline(always)]
fn pipeline(frame: &Frame) -> Result<Verdict, Verdict> {
    let link = parse::ethernet(frame)?;
    match link.ethertype {
        ethernet::IPV4 => balance::<V4>(frame, &link),
        ethernet::IPV6 => balance::<V6>(frame, &link),
        ethernet::ARP => neighbour::answer_arp(frame, &link),
        _ => Err(Verdict::PASS),
    }
}

/// The way of an IP packet, the same for both families.
#[inline(always)]
fn balance<F: Family>(frame: &Frame, link: &parse::Link) -> Result<Verdict, Verdict> {
    let network = parse::network::<F>(frame, link)?;
    // Where servers on 127.0.0.1 are balanced, the kernel has been told to deliver these.
    if F::is_loopback(network.dst) {
        return Err(Verdict::drop(DropReason::Martian, 0));
    }
    let lane = lookup::lane::<F>(network.dst, || network.src);
    if lane == 0 {
        return F::not_for_us(frame, link, &network);
    }
    let packet = parse::transport::<F>(frame, link, network)?;
    let outgoing = flow::follow(frame, link, &packet, lane)?;
    if packet.first_fragment {
        fragment::open(frame, &packet, &outgoing);
    }
    rewrite::rewrite(frame, link, &packet, &outgoing)?;
    // What the kernel delivers keeps its tags: they say which of its interfaces it came by.
    if outgoing.ifindex != LOCAL {
        rewrite::tags::tag(frame, link, outgoing.tags, outgoing.flow.service)?;
    }
    forward::send(frame, &packet, &outgoing)
}

/// What the kernel is told when the program is loaded; see `lb-ebpf/README.md`.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(all(not(test), target_arch = "bpf"))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the verifier refuses a program with an endless loop, so a panic that survives
    // optimisation is found when the program is loaded.
    loop {}
}
