//! The hashes that place a flow in a selection table, and a backend in Maglev's permutations.
//!
//! Flows and clients are hashed with multiplications, on the way of every packet; all else with Bob
//! Jenkins' lookup3 (`jhash` in the kernel, `include/linux/jhash.h`). The seed is fixed: two
//! balancers with the same configuration must place the same flow in the same slot.

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

/// 2^64 divided by the golden ratio, which is odd (Knuth, TAOCP 6.4).
pub(crate) const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Takes a word into the state of a hash.
///
/// A product's high bits depend on all bits of the factors, its low bits on the low ones only; so the
/// high half goes into the low one before the next product. `jhash` would be better than it has to
/// be: a rotation is three instructions to BPF, and it has a dozen for a word.
#[inline(always)]
const fn absorb(state: u64, word: u64) -> u64 {
    let product = (state ^ word).wrapping_mul(FACTOR);
    product ^ product >> 32
}

/// The hash whose state this is.
#[inline(always)]
const fn squeeze(state: u64) -> u32 {
    (state.wrapping_mul(FACTOR) >> 32) as u32
}

/// Two words as one. Of words that stand in memory one after the other, it is one load.
#[inline(always)]
#[must_use]
pub const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// The hash of a flow for `maglev`: client address, both ports and the protocol.
///
/// The VIP is left out: every service has a table of its own.
#[inline(always)]
#[must_use]
pub fn flow_hash<A: Address>(key: &FlowKey<A>) -> u32 {
    let ports = pair(u32::from(key.sport) | u32::from(key.dport) << 16, 0);
    squeeze(absorb(client(key.src, key.protocol), ports))
}

/// The hash of a client for `source-hash`: its address alone.
#[inline(always)]
#[must_use]
pub fn source_hash<A: Address>(src: A) -> u32 {
    squeeze(client(src, 0))
}

/// The state of a hash that has taken in a client.
#[inline(always)]
fn client<A: Address>(src: A, first: u32) -> u64 {
    let src = src.widen();
    // Words an address does not have are zero.
    let state = absorb(pair(first, SEED), pair(src[0], src[1]));
    if A::WORDS > 2 {
        return absorb(state, pair(src[2], src[3]));
    }
    state
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

    /// Chi-squared of how the hashes fall into slots, less what is expected, in standard deviations.
    fn unevenness(hashes: impl Iterator<Item = u32>) -> f64 {
        const SLOTS: u32 = 1021;
        let mut counts = [0_u32; SLOTS as usize];
        for hash in hashes {
            counts[slot_of(hash, SLOTS) as usize] += 1;
        }
        let mean = f64::from(counts.iter().sum::<u32>()) / f64::from(SLOTS);
        let squares = counts.iter().map(|n| (f64::from(*n) - mean).powi(2));
        let degrees = f64::from(SLOTS - 1);
        (squares.sum::<f64>() / mean - degrees) / (2.0 * degrees).sqrt()
    }

    const V4: FlowKey<u32> = FlowKey {
        src: u32::from_ne_bytes([192, 0, 2, 1]),
        dst: 0,
        sport: 40000_u16.to_be(),
        dport: 443_u16.to_be(),
        protocol: 6,
    };

    fn v6(high: u32, low: u32, sport: u16) -> u32 {
        flow_hash(&FlowKey {
            src: [0x2001_0db8_u32.to_be(), high.to_be(), 0, low.to_be()],
            dst: [0; 4],
            sport: sport.to_be(),
            dport: V4.dport,
            protocol: 6,
        })
    }

    /// As clients have them: ports and addresses that follow one another, or lie far apart.
    #[test]
    fn flows_that_resemble_each_other_spread_evenly() {
        let port = |sport: u16| {
            let sport = sport.to_be();
            flow_hash(&FlowKey { sport, ..V4 })
        };
        let client = |host: u32| {
            let src = host.to_be();
            flow_hash(&FlowKey { src, ..V4 })
        };
        let both = |n: u32| {
            let (src, sport) = ((n / 64).to_be(), (n as u16 % 64 + 1024).to_be());
            flow_hash(&FlowKey { src, sport, ..V4 })
        };
        for (name, unevenness) in [
            ("ports", unevenness((0..=u16::MAX).map(port))),
            ("even ports", unevenness((0..1 << 15).map(|n| port(2 * n)))),
            ("hosts", unevenness((0..100_000).map(client))),
            (
                "networks",
                unevenness((0..1 << 16).map(|n| client(n << 16))),
            ),
            (
                "every 256th host",
                unevenness((0..1 << 16).map(|n| client(n << 8))),
            ),
            ("hosts and ports", unevenness((0..1 << 18).map(both))),
            (
                "IPv6 ports",
                unevenness((0..=u16::MAX).map(|n| v6(1, 1, n))),
            ),
            (
                "IPv6 hosts",
                unevenness((0..100_000).map(|n| v6(1, n, 1024))),
            ),
            (
                "IPv6 networks",
                unevenness((0..100_000).map(|n| v6(n, 1, 1024))),
            ),
            (
                "clients",
                unevenness((0..100_000_u32).map(|n| source_hash(n.to_be()))),
            ),
        ] {
            // More even than by chance does no harm.
            assert!(unevenness < 4.0, "{name}: {unevenness}");
        }
    }

    /// Each bit of a flow changes each bit of the hash about every other time.
    #[test]
    fn every_bit_counts() {
        let mut state = 1_u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 32) as u32
        };
        const ROUNDS: u32 = 2000;
        for bit in 0..160 {
            let mut changed = [0_u32; 32];
            for _ in 0..ROUNDS {
                let key = FlowKey {
                    src: [random(), random(), random(), random()],
                    dst: [0; 4],
                    sport: random() as u16,
                    dport: random() as u16,
                    protocol: 6,
                };
                let mut other = key;
                match bit {
                    0..128 => other.src[bit / 32] ^= 1 << (bit % 32),
                    128..144 => other.sport ^= 1 << (bit - 128),
                    _ => other.dport ^= 1 << (bit - 144),
                }
                let four = |key: &FlowKey<[u32; 4]>| {
                    flow_hash(&FlowKey {
                        src: key.src[0],
                        dst: 0,
                        sport: key.sport,
                        dport: key.dport,
                        protocol: 6,
                    })
                };
                let mut difference = flow_hash(&key) ^ flow_hash(&other);
                if !(32..128).contains(&bit) && random() & 1 == 0 {
                    difference = four(&key) ^ four(&other);
                }
                for (place, changed) in changed.iter_mut().enumerate() {
                    *changed += difference >> place & 1;
                }
            }
            for (place, changed) in changed.iter().enumerate() {
                let share = f64::from(*changed) / f64::from(ROUNDS);
                assert!((0.4..0.6).contains(&share), "bit {bit} on {place}: {share}");
            }
        }
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
