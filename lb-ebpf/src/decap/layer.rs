//! What differs between IPv4 and IPv6 where an IP packet is carried, or carries another.

use super::maps::{self, Addresses};
use crate::{
    family::{Family, V4, V6},
    frame::{Cursor, Frame},
    parse::Network,
};
use core::mem::offset_of;
use lb_common::csum;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

/// Congestion experienced, in the two bits of ECN (RFC 3168 section 5).
pub const CONGESTION: u8 = 0b11;

/// Next header of a fragment (RFC 8200 section 4.5).
const FRAGMENT: u8 = 44;

/// An IP header on the outside or on the inside of an encapsulation.
pub trait Layer: Family {
    /// The addresses of this host.
    fn addresses() -> &'static Addresses<Self::Addr>;
    /// Sets both bits of ECN.
    fn mark_congestion(header: Cursor);
    /// What a header that was found unsound, or that of a fragment, claims to carry: protocol, and
    /// where it begins if it does in this packet.
    fn claim(frame: &Frame, network: &Network<Self>) -> (u8, Option<Cursor>);
}

/// The two bits of ECN.
#[inline(always)]
pub fn ecn<L: Layer>(header: Cursor) -> u8 {
    L::class(header) & CONGESTION
}

impl Layer for V4 {
    #[inline(always)]
    fn addresses() -> &'static Addresses<u32> {
        &maps::ADDRESSES4
    }

    #[inline(always)]
    fn mark_congestion(header: Cursor) {
        let before: u16 = header.read(0);
        let after = before | u16::from_ne_bytes([0, CONGESTION]);
        let delta = csum::fold(u64::from(!before) + u64::from(after));
        let check: u16 = header.read(offset_of!(Ipv4Hdr, check));
        header.write(0, after);
        header.write(offset_of!(Ipv4Hdr, check), csum::update(check, delta));
    }

    #[inline(always)]
    fn claim(_: &Frame, network: &Network<Self>) -> (u8, Option<Cursor>) {
        const OFFSET: u16 = 0x1fff_u16.to_be();
        let header = network.header;
        let first = header.read::<u16>(offset_of!(Ipv4Hdr, frags)) & OFFSET == 0;
        let len = usize::from(header.read::<u8>(0) & 0xf) * 4;
        let payload = first.then_some(header.skip(len));
        (header.read(offset_of!(Ipv4Hdr, proto)), payload)
    }
}

impl Layer for V6 {
    #[inline(always)]
    fn addresses() -> &'static Addresses<[u32; 4]> {
        &maps::ADDRESSES6
    }

    // The traffic class lies across the first two bytes, ECN in its low bits.
    #[inline(always)]
    fn mark_congestion(header: Cursor) {
        header.write(1, header.read::<u8>(1) | CONGESTION << 4);
    }

    /// A fragment header behind others is not looked for: senders put it first.
    #[inline(always)]
    fn claim(frame: &Frame, network: &Network<Self>) -> (u8, Option<Cursor>) {
        const OFFSET: u16 = 0xfff8_u16.to_be();
        let payload = network.header.skip(Ipv6Hdr::LEN);
        let next: u8 = network.header.read(offset_of!(Ipv6Hdr, next_hdr));
        if next != FRAGMENT {
            return (next, Some(payload));
        }
        let Some(fragment) = frame.check(payload, 8) else {
            return (next, None);
        };
        let first = fragment.read::<u16>(2) & OFFSET == 0;
        (fragment.read(0), first.then_some(fragment.skip(8)))
    }
}
