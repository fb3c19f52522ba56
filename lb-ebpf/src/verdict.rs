//! What becomes of a packet, and the one place where that is counted and told to the kernel.

use crate::{frame::Frame, icmp, maps, reset, stats};
use aya_ebpf::bindings::{xdp_action, xdp_md};
use lb_common::{backend::LOCAL, stats::DropReason};

/// What becomes of a packet: an action, a drop reason, and a service or interface.
///
/// One word rather than an enum with fields: the compiler may leave the unused fields of an enum
/// undefined where it joins two paths, and the verifier refuses to copy what was never written.
#[derive(Clone, Copy)]
pub struct Verdict(u64);

// Actions, in the low byte.
const PASS: u8 = 0;
const TRANSMIT: u8 = 1;
const REDIRECT: u8 = 2;
const DROP: u8 = 3;
const REFUSE: u8 = 4;

impl Verdict {
    /// Not ours: the kernel gets it, untouched.
    pub const PASS: Self = Self::new(PASS, 0, 0);
    /// Leaves by the interface it came from.
    pub const TRANSMIT: Self = Self::new(TRANSMIT, 0, 0);

    #[inline(always)]
    const fn new(action: u8, reason: u8, object: u32) -> Self {
        Self((object as u64) << 32 | (reason as u64) << 8 | action as u64)
    }

    /// Not yet decided: what a subprogram leaves to [`crate::rewrite::finish`].
    pub const ENCAPSULATE: Self = Self(u64::MAX);

    /// Not yet decided: the short way leaves the packet to the long one.
    pub const UNDECIDED: Self = Self::ENCAPSULATE;

    /// Whether it is [`Self::UNDECIDED`].
    #[inline(always)]
    pub const fn is_undecided(self) -> bool {
        self.0 == Self::UNDECIDED.0
    }

    /// The verdict, wherever the packet's way ended.
    #[inline(always)]
    pub fn of(way: Result<Self, Self>) -> Self {
        let (Ok(verdict) | Err(verdict)) = way;
        verdict
    }

    /// The verdict as a subprogram returns it.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The inverse of [`Verdict::bits`].
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Leaves by interface `ifindex`, whichever it came from, or is delivered by the kernel.
    #[inline(always)]
    pub fn leave(frame: &Frame, ifindex: u32) -> Self {
        if ifindex == LOCAL {
            Self::PASS
        } else if ifindex == frame.ingress() {
            Self::TRANSMIT
        } else {
            Self::redirect(ifindex)
        }
    }

    /// Whether the packet leaves as it is now.
    #[inline(always)]
    pub const fn leaves(self) -> bool {
        matches!(self.0 as u8, TRANSMIT | REDIRECT)
    }

    /// Leaves by another interface.
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self::new(REDIRECT, 0, ifindex)
    }

    /// Dropped and counted, for the service or for none if that is 0.
    #[inline(always)]
    pub const fn drop(reason: DropReason, service: u32) -> Self {
        Self::new(DROP, reason as u8, service)
    }

    /// What a subprogram decided: a drop reason's number, and whether the sender is told.
    #[inline(always)]
    pub const fn refused(reason: u8, tell: bool, service: u32) -> Self {
        // Counted like a drop; the sender is told with RST or an ICMP error.
        Self::new(if tell { REFUSE } else { DROP }, reason, service)
    }

    /// Dropped and counted, and the sender is told to send no more than `mtu` bytes.
    #[inline(always)]
    pub const fn too_big(mtu: u16, service: u32) -> Self {
        let refused = Self::refused(DropReason::TooBig as u8, true, service);
        Self(refused.0 | (mtu as u64) << 16)
    }
}

/// Counts the verdict and turns it into the code XDP returns.
#[inline(always)]
pub fn conclude(frame: &Frame, verdict: Verdict) -> u32 {
    let (action, reason, object) = (
        verdict.0 as u8,
        (verdict.0 >> 8) as u8,
        (verdict.0 >> 32) as u32,
    );
    match action {
        PASS => xdp_action::XDP_PASS,
        TRANSMIT => xdp_action::XDP_TX,
        REDIRECT => maps::REDIRECTS.redirect(object, 0).unwrap_or_else(|_| {
            stats::count_drop(DropReason::NoInterface as u8, 0);
            xdp_action::XDP_DROP
        }),
        _ => {
            stats::count_drop(reason, object);
            if action == REFUSE && tell(frame.ctx, reason, (verdict.0 >> 16) as u16) {
                xdp_action::XDP_TX
            } else {
                xdp_action::XDP_DROP
            }
        }
    }
}

/// Makes of the packet what its sender is told; `false` if there is nothing to tell.
#[inline(always)]
fn tell(ctx: *mut xdp_md, reason: u8, mtu: u16) -> bool {
    if reason == DropReason::TtlExceeded as u8 || reason == DropReason::TooBig as u8 {
        icmp::answer::answer_error(ctx, reason.into(), mtu.into()) != 0
    } else {
        reset::answer(ctx)
    }
}
