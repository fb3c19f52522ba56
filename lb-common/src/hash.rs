//! The hashes that place a flow in a selection table.
//!
//! Bob Jenkins' lookup3 (`jhash` in the kernel, `include/linux/jhash.h`) over the words of the
//! tuple. The seed is fixed: two balancers with the same configuration must place the same flow
//! in the same slot.

use crate::{addr::Address, flow::FlowKey};

/// Seed of every placement hash.
pub const SEED: u32 = 0x51_1c_e0_01;

const JHASH_INITVAL: u32 = 0xdead_beef;

#[inline(always)]
const fn mix(mut a: u32, mut b: u32, mut c: u32) -> (u32, u32, u32) {
    a = a.wrapping_sub(c) ^ c.rotate_left(4);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(6);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(8);
    b = b.wrapping_add(a);
    a = a.wrapping_sub(c) ^ c.rotate_left(16);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(19);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(4);
    b = b.wrapping_add(a);
    (a, b, c)
}

#[inline(always)]
const fn finish(mut a: u32, mut b: u32, mut c: u32) -> u32 {
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}

/// `jhash_3words` of the kernel.
#[inline(always)]
#[must_use]
pub const fn jhash_3words(a: u32, b: u32, c: u32, seed: u32) -> u32 {
    let init = JHASH_INITVAL.wrapping_add(3 << 2).wrapping_add(seed);
    finish(
        a.wrapping_add(init),
        b.wrapping_add(init),
        c.wrapping_add(init),
    )
}

/// `jhash2` of the kernel for four words.
#[inline(always)]
#[must_use]
pub const fn jhash_4words(words: &[u32; 4], seed: u32) -> u32 {
    let init = JHASH_INITVAL.wrapping_add(4 << 2).wrapping_add(seed);
    let (a, b, c) = mix(
        init.wrapping_add(words[0]),
        init.wrapping_add(words[1]),
        init.wrapping_add(words[2]),
    );
    finish(a.wrapping_add(words[3]), b, c)
}

/// An address reduced to one word: itself for IPv4, `jhash2` of it for IPv6.
#[inline(always)]
#[must_use]
pub fn address_word<A: Address>(address: A) -> u32 {
    let words = address.widen();
    if A::WORDS == 1 {
        words[0]
    } else {
        jhash_4words(&words, SEED)
    }
}

/// The hash of a flow for `maglev`: client address, both ports and the protocol.
///
/// The VIP is left out: every service has a table of its own.
#[inline(always)]
#[must_use]
pub fn flow_hash<A: Address>(key: &FlowKey<A>) -> u32 {
    jhash_3words(
        address_word(key.src),
        u32::from(key.sport) << 16 | u32::from(key.dport),
        key.protocol,
        SEED,
    )
}

/// The hash of a client for `source-hash`: its address alone.
#[inline(always)]
#[must_use]
pub fn source_hash<A: Address>(src: A) -> u32 {
    jhash_3words(address_word(src), 0, 0, SEED)
}

/// The slot of a table of `slots` slots that `hash` falls into: below `slots`, or 0 for an empty
/// table.
///
/// The high half of the product instead of a remainder (Lemire, "Fast random integer generation
/// in an interval", 2019): equally fair, and no division on the way of a packet.
#[inline(always)]
#[must_use]
pub const fn slot_of(hash: u32, slots: u32) -> u32 {
    ((hash as u64 * slots as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values computed with the kernel's own `jhash.h`, compiled as C.
    #[test]
    fn equals_the_kernel() {
        assert_eq!(jhash_3words(1, 2, 3, 0), 0xa461_58f5);
        assert_eq!(jhash_3words(0x0a00_0001, 0x1234_5678, 6, SEED), 0x2905_ce38);
        assert_eq!(jhash_4words(&[1, 2, 3, 4], 0), 0x6649_1246);
        assert_eq!(
            jhash_4words(&[0xffff_ffff, 0, 0xdead_beef, 7], SEED),
            0x2812_23a4
        );
    }

    #[test]
    fn ports_and_addresses_change_the_hash() {
        let key = FlowKey {
            src: 1u32,
            dst: 2,
            sport: 3,
            dport: 4,
            protocol: 6,
        };
        let base = flow_hash(&key);
        assert_ne!(base, flow_hash(&FlowKey { src: 9, ..key }));
        assert_ne!(base, flow_hash(&FlowKey { sport: 9, ..key }));
        assert_ne!(base, flow_hash(&FlowKey { dport: 9, ..key }));
        assert_ne!(
            base,
            flow_hash(&FlowKey {
                protocol: 17,
                ..key
            })
        );
        assert_eq!(base, flow_hash(&FlowKey { dst: 9, ..key }));
    }
}
