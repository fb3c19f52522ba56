//! The flow table: where in maps `flows4` and `flows6` a flow is.
//!
//! A set-associative table of our own in an array: the kernel's LRU hash reads a bucket, a chain of
//! elements and a list for each lookup, each a wait for memory when flows are many. Here a flow is
//! most often found where it is looked for first, in one cache line, or two adjacent ones.
//!
//! A set has [`WAYS`] entries, and in maps `flow_sets4` and `flow_sets6` a word of [`Tags`], which tells where in
//! it a key may be without a look at the entries. Every key has two sets ([`Home`]); a flow goes into the second
//! one only when the first is [`CROWDED`] and the second is less so (two choices fill a table evenly: Azar et al.,
//! "Balanced Allocations", 1994). When both are full, that flow of the first goes that will be missed
//! least ([`expendable`]), with both of its entries.
//!
//! Nobody locks anything. A free entry belongs to whoever has written a tag for it. It is filled, and its
//! word of ports and protocol ([`FlowKey`]'s last eight bytes) is written last: without it the entry has no key.
//! Whoever has added a key looks whether another CPU has added it too, and then takes its own away. To
//! remove an entry is to exchange that word for zero; then its tag goes. One that shall be used again at once
//! has [`CLAIMED`] there in between.

use crate::{
    addr::Address,
    flow::{DIRECTION_BACKEND, Flow, FlowKey, state},
    hash::{self, FACTOR, pair},
};
use bytemuck::{Pod, Zeroable};
use core::num::NonZeroU64;

/// Entries of a set.
pub const WAYS: u32 = 8;
/// Entries in use from which on a set is crowded.
pub const CROWDED: u32 = 6;
/// Places for every two flows that the table is made for: filled to two thirds, hardly any set is full.
const PLACES_FOR_TWO: u64 = 3;
/// In place of an entry's word of ports and protocol: somebody is writing this entry.
pub const CLAIMED: u64 = u64::MAX;

/// An element of maps `flows4` and `flows6`: one cache line in IPv4, two in IPv6.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Entry<A>
where
    A: Address,
{
    /// The packets it is for; all zero where there is no flow.
    pub key: FlowKey<A>,
    /// What becomes of them.
    pub flow: Flow<A>,
    /// Zero; fills the lines in IPv6.
    pub reserved: A::EntryRest,
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for Entry<u32> {}
// SAFETY: as above.
unsafe impl Pod for Entry<[u32; 4]> {}
const _: () = assert!(size_of::<Entry<u32>>() == 64);
const _: () = assert!(size_of::<Entry<[u32; 4]>>() == 128);

/// Offset of the word of ports and protocol in a key.
#[must_use]
pub const fn ports_offset<A: Address>() -> usize {
    size_of::<FlowKey<A>>() - 8
}

/// An element of maps `flow_sets4` and `flow_sets6`: for each entry of a set a byte, of which seven bits are the tag
/// of its key ([`Home::tag`]), or zero if it is free. The highest bit of the first byte is [`DISPLACED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tags(pub u64);

/// Flag in [`Tags`]: a flow that belongs into this set may be in its second one.
pub const DISPLACED: u64 = 0x80;

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = ONES << 7;

impl Tags {
    /// A mark for each byte with this tag; free entries have tag 0.
    #[inline(always)]
    #[must_use]
    pub const fn marks(self, tag: u64) -> u64 {
        // No byte is above 0x7f, so none carries into the next.
        !(((self.0 & !HIGH) ^ tag.wrapping_mul(ONES)) + !HIGH) & HIGH
    }

    /// How many entries are free.
    #[inline(always)]
    #[must_use]
    pub const fn free(self) -> u32 {
        ((self.marks(0) >> 7).wrapping_mul(ONES) >> 56) as u32
    }

    /// Whether no entry is in use.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 & !HIGH == 0
    }

    /// The entry of the first mark; there must be one.
    #[inline(always)]
    #[must_use]
    pub const fn first(marks: u64) -> u32 {
        let lowest = (marks & marks.wrapping_neg()) >> 7;
        (lowest.wrapping_mul(0x0001_0203_0405_0607) >> 56) as u32 % WAYS
    }

    /// The tag of an entry.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, way: u32) -> u64 {
        self.0 >> (8 * way) & 0x7f
    }

    /// A tag where it stands for an entry.
    #[inline(always)]
    #[must_use]
    pub const fn at(way: u32, tag: u64) -> u64 {
        tag << (8 * way)
    }
}

/// Sets of a table for so many flows.
#[must_use]
pub const fn sets(flows: u32) -> u32 {
    (flows as u64 * PLACES_FOR_TWO).div_ceil(2 * WAYS as u64) as u32
}

/// Flows that a table of so many sets is made for.
#[must_use]
pub const fn flows(sets: u32) -> u32 {
    (sets as u64 * WAYS as u64 * 2 / PLACES_FOR_TWO) as u32
}

/// Where the flow of a key may be.
///
/// All but the destination port is hashed for a set to count from, and the port leads from there through all sets. So whoever
/// is free to choose a port can choose the set ([`Home::port_to`]): in `nat` a backend's answers are recorded beside the
/// client's packets, where memory is at hand already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// Of all but the destination port.
    start: u32,
    /// The port's steps of [`ROUND`].
    steps: u32,
    /// Of all.
    hash: u64,
}

/// Ports in a row that lead once through all sets.
pub const ROUND: u32 = 1 << 14;

/// A port's place in a round: another one for each port, and those of ports in a row are strewn as if by chance.
#[inline(always)]
const fn strewn(port: u32) -> u32 {
    let even = port * STRIDE % ROUND;
    even ^ even >> 7
}

/// The port that has a place.
#[inline(always)]
const fn gathered(place: u32) -> u32 {
    (place ^ place >> 7) * UNSTRIDE % ROUND
}

/// A round divided by the golden ratio (Knuth, The Art of Computer Programming, volume 3, section 6.4).
const STRIDE: u32 = 10_125;
/// What undoes a multiplication by it.
const UNSTRIDE: u32 = {
    let mut inverse = STRIDE;
    // Newton: each time twice as many bits are right, three at first.
    let mut bits = 3;
    while bits < 14 {
        inverse = inverse.wrapping_mul(2_u32.wrapping_sub(STRIDE.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse % ROUND
};

impl Home {
    /// Of a key. The seed is drawn at load, so nobody outside can aim at a set; whose keys differ in the destination port alone can have some of
    /// them meet in the same first set, but not in the second.
    #[inline(always)]
    #[must_use]
    pub const fn of<A: Address>(words: KeyWords, seed: u32) -> Self {
        let seed = (seed as u64).wrapping_mul(FACTOR);
        let mut x = (words.0[0] ^ seed).wrapping_mul(FACTOR);
        if A::WORDS > 1 {
            // One word after the other: hosts differ in the highest bits of a word, which a product leaves
            // there. Only a fold and the next product keep them from meeting those of another word.
            x = (x ^ x >> 32 ^ words.0[1]).wrapping_mul(FACTOR_2);
            x = (x ^ x >> 32 ^ words.0[2]).wrapping_mul(FACTOR_3);
            x = (x ^ x >> 32 ^ words.0[3]).wrapping_mul(FACTOR);
        }
        let port = words.0[4] & DPORT;
        x = (x ^ x >> 32 ^ words.0[4] ^ port).wrapping_mul(FACTOR_2);
        x = (x ^ x >> 29).wrapping_mul(FACTOR_3);
        Self {
            start: (x >> 32) as u32,
            steps: strewn(u16::from_be((port >> 16) as u16) as u32),
            hash: (x ^ port).wrapping_mul(FACTOR),
        }
    }

    /// The entry of a set that is looked at first.
    #[inline(always)]
    #[must_use]
    pub const fn way(self) -> u32 {
        (self.hash >> 56) as u32 % WAYS
    }

    /// What it is known by in its set: 1 to 127.
    #[inline(always)]
    #[must_use]
    pub const fn tag(self) -> u64 {
        (((self.hash >> 48 & 0x7f) * 0x7f) >> 7) + 1
    }

    /// The set it belongs into, of `sets`.
    #[inline(always)]
    #[must_use]
    pub const fn first(self, sets: u32) -> u32 {
        let set = hash::slot_of(self.start, sets) + step(self.steps, sets);
        if set < sets { set } else { set - sets }
    }

    /// The destination port, but for multiples of [`ROUND`], with which this key, whatever port it has, belongs into set `to` or one as near as
    /// a port leads.
    #[inline(always)]
    #[must_use]
    pub fn port_to(self, to: u32, sets: u32) -> u32 {
        let start = hash::slot_of(self.start, sets);
        let way = if to < start {
            to + sets - start
        } else {
            to - start
        };
        // Never 0, and the compiler shall not think of it.
        let Some(divisor) = NonZeroU64::new(sets.into()) else {
            return 0;
        };
        let places = (u64::from(way) * u64::from(ROUND) + u64::from(sets / 2)) / divisor;
        gathered(places as u32 % ROUND)
    }

    /// The set it goes into when the first is full.
    #[inline(always)]
    #[must_use]
    pub const fn second(self, sets: u32) -> u32 {
        let again = (self.hash ^ self.hash >> 31).wrapping_mul(FACTOR_2);
        hash::slot_of((again >> 32) as u32, sets)
    }
}

/// Sets that so many steps lead further.
#[inline(always)]
const fn step(steps: u32, sets: u32) -> u32 {
    (steps as u64 * sets as u64 / ROUND as u64) as u32
}

/// The destination port in a word of ports and protocol.
const DPORT: u64 = 0xffff << 16;

/// The factors of splitmix64 (Steele et al., 2014).
const FACTOR_2: u64 = 0xbf58_476d_1ce4_e5b9;
const FACTOR_3: u64 = 0x94d0_49bb_1331_11eb;

/// A key in double words: the addresses, in IPv4 in the first word alone, and in the last one
/// ports and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyWords(pub [u64; 5]);

impl KeyWords {
    /// Of a key.
    #[inline(always)]
    #[must_use]
    pub fn of<A: Address>(key: &FlowKey<A>) -> Self {
        let (src, dst) = (key.src.widen(), key.dst.widen());
        let ports =
            u64::from(key.sport) | u64::from(key.dport) << 16 | u64::from(key.protocol) << 32;
        if A::WORDS == 1 {
            return Self([pair(src[0], dst[0]), 0, 0, 0, ports]);
        }
        Self([
            pair(src[0], src[1]),
            pair(src[2], src[3]),
            pair(dst[0], dst[1]),
            pair(dst[2], dst[3]),
            ports,
        ])
    }

    /// Whether both are the same key.
    #[inline(always)]
    #[must_use]
    pub const fn is(self, other: Self) -> bool {
        let (a, b) = (self.0, other.0);
        let differs = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]);
        differs == 0
    }

    /// The word of ports and protocol.
    #[inline(always)]
    #[must_use]
    pub const fn ports(self) -> u64 {
        self.0[4]
    }
}

/// How little a flow will be missed that has been silent for `age` ticks: when there is no room, the
/// one with the most goes. What is over, or half open, counts as silent for many times as long.
#[inline(always)]
#[must_use]
pub const fn expendable<A>(flow: &Flow<A>, age: u32) -> u64 {
    // The backend's entry follows no states.
    let of_backend = (flow.direction == DIRECTION_BACKEND) as u32;
    let as_backend =
        state::SYN_SENT as u32 + flow.proven as u32 * (state::ESTABLISHED - state::SYN_SENT) as u32;
    let state = (flow.state as u32) * (1 - of_backend) + as_backend * of_backend;
    (age as u64 + 1) << (2 * (SHIFTS >> (4 * (state & 7)) & 15))
}

/// Whether somebody will miss the flow of an entry: an established connection, or a UDP flow.
#[inline(always)]
#[must_use]
pub const fn is_live<A>(flow: &Flow<A>) -> bool {
    if flow.direction == DIRECTION_BACKEND {
        flow.proven != 0
    } else {
        state::is_active(flow.state)
    }
}

/// Half the powers of two for [`expendable`], by state, four bits each: half open 2^20, half closed
/// 2^12, closed 2^24.
const SHIFTS: u32 = {
    let mut shifts = 0;
    shifts |= 10 << (4 * state::SYN_SENT);
    shifts |= 10 << (4 * state::SYN_RECEIVED);
    shifts |= 6 << (4 * state::FIN_CLIENT);
    shifts |= 6 << (4 * state::FIN_BACKEND);
    shifts |= 12 << (4 * state::TIME_WAIT);
    shifts |= 12 << (4 * state::CLOSED);
    shifts
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_holds_what_it_is_made_for() {
        assert_eq!(flows(sets(1 << 20)), 1 << 20);
        for wanted in [1, 2, 1000, 1024, 65_536, 1_000_000, 1 << 28] {
            let sets = sets(wanted);
            assert!(flows(sets) >= wanted, "{wanted} flows in {sets} sets");
            assert_eq!(super::sets(flows(sets)), sets, "{wanted} flows");
        }
    }

    #[test]
    fn tags_tell_where_a_key_may_be() {
        let tags = Tags(0x7f_01_00_05_00_05_7e_05 | DISPLACED);
        assert_eq!(tags.marks(5), 0x00_00_00_80_00_80_00_80);
        assert_eq!(tags.marks(0), 0x00_00_80_00_80_00_00_00);
        assert_eq!(tags.marks(9), 0);
        assert_eq!(
            (tags.free(), Tags(DISPLACED).free(), Tags(!0).free()),
            (2, 8, 0)
        );
        assert!(Tags(DISPLACED).is_empty() && !tags.is_empty());
        for way in 0..WAYS {
            assert_eq!(Tags::first(Tags::at(way, 0x80)), way);
            assert_eq!(Tags::first(Tags::at(way, 0x80) | HIGH << (8 * way)), way);
            assert_eq!(Tags(Tags::at(way, 0x7f)).of(way), 0x7f);
        }
    }

    /// Share of keys that find both of their sets full, and of those that are where they are looked
    /// for first.
    fn fill(keys: impl Iterator<Item = [u64; 5]>, sets: u32, six: bool) -> (f64, f64) {
        let mut used = std::vec![Tags(0); sets as usize];
        let (mut all, mut lost, mut at_home) = (0.0, 0.0, 0.0);
        for words in keys {
            let home = if six {
                Home::of::<[u32; 4]>(KeyWords(words), 0x5eed)
            } else {
                Home::of::<u32>(KeyWords(words), 0x5eed)
            };
            assert!((1..=127).contains(&home.tag()));
            all += 1.0;
            let (first, second) = (home.first(sets) as usize, home.second(sets) as usize);
            let crowded = used[first].free() <= WAYS - CROWDED;
            let set = if crowded && used[second].free() > used[first].free() {
                second
            } else {
                first
            };
            let free = used[set].marks(0);
            if free == 0 {
                lost += 1.0;
                continue;
            }
            let at = Tags::at(home.way(), 0x80);
            let way = if free & at == 0 {
                Tags::first(free)
            } else {
                home.way()
            };
            used[set].0 |= Tags::at(way, home.tag());
            at_home += f64::from(u8::from(set == first && way == home.way()));
        }
        (lost / all, at_home / all)
    }

    #[test]
    fn a_port_leads_beside_any_set() {
        assert!((0..1 << 16).all(|port| gathered(strewn(port)) == port % ROUND));
        let words = |dport: u16| {
            let ports = 80 | u64::from(dport.to_be()) << 16 | 6 << 32;
            KeyWords([0x0102_c612_0302_c612, 0, 0, 0, ports])
        };
        let any = Home::of::<u32>(words(4711), 0x5eed);
        for sets in [1, 2, 3, 1000, 12_288, 16_384, 196_608, 3_000_001] {
            for to in (0..50).map(|i| hash::slot_of(i * 85_899_345, sets)) {
                let port = any.port_to(to, sets);
                for round in 0..4 {
                    let home = Home::of::<u32>(words((port + round * ROUND) as u16), 0x5eed);
                    let first = home.first(sets);
                    let away = first.abs_diff(to).min(sets - first.abs_diff(to));
                    assert!(away <= sets / ROUND / 2 + 1, "{away} sets away of {sets}");
                }
            }
        }
    }

    #[test]
    fn clients_answers_and_ports_in_a_row_fill_it_evenly() {
        let flows: u32 = 60_000;
        const fn ports(sport: u32, dport: u32) -> u64 {
            let [sport, dport] = [(sport as u16).to_be(), (dport as u16).to_be()];
            sport as u64 | (dport as u64) << 16 | 6 << 32
        }
        let client = |i: u32| {
            [
                u64::from(i / 4) << 8 | 0xc612 << 40,
                0,
                0,
                0,
                ports(1024 + (i & 3), 80),
            ]
        };
        let one_client = |i: u32| [0x0102_c612_0302_c612, 0, 0, 0, ports(1000 + i, 80)];
        let answers = |i: u32| {
            [
                0x0102_c612_0302_c612 + u64::from(i & 15),
                0,
                0,
                0,
                ports(80, 1024 + (i >> 4)),
            ]
        };
        let six = |i: u32| {
            [
                0x00b8_0120,
                u64::from(i) << 32,
                0x00b8_0120,
                1 << 56,
                ports(40_000, 443),
            ]
        };
        // Hosts by their last byte, as in most networks.
        const fn host(n: u32) -> u64 {
            (n as u64 & 0xff) << 56 | (n as u64 >> 8 & 0xff) << 48
        }
        const NET: u64 = 0x00b8_0120;
        let six_answers = |i: u32| [NET, host(i % 100), NET, host(1), ports(80, 1024 + i / 100)];
        let six_one = |i: u32| [NET, host(7), NET, host(1), ports(1000 + i, 80)];
        let six_hosts = |i: u32| [NET, host(i), NET, host(1), ports(40_000 + (i >> 16), 80)];
        let six_to_hosts = |i: u32| [NET, host(i % 100), NET, host(i / 100), ports(80, 40_000)];
        type Keys = fn(u32) -> [u64; 5];
        let all: [(&str, Keys, bool); 8] = [
            ("clients", client, false),
            ("one client", one_client, false),
            ("answers", answers, false),
            ("IPv6", six, true),
            ("IPv6, answers", six_answers, true),
            ("IPv6, one client", six_one, true),
            ("IPv6, hosts", six_hosts, true),
            ("IPv6, answers to hosts", six_to_hosts, true),
        ];
        for (what, key, six) in all {
            let (lost, at_home) = fill((0..flows).map(key), sets(flows), six);
            assert!(lost < 0.000_2, "{what}: {lost} of a full table is lost");
            assert!(at_home > 0.6, "{what}: {at_home} at home");
            let (lost, at_home) = fill((0..flows / 2).map(key), sets(flows), six);
            assert!(lost == 0.0, "{what}: {lost} of a half full table is lost");
            assert!(at_home > 0.8, "{what}: {at_home} at home, half full");
        }
    }

    #[test]
    fn clients_and_their_answers_in_nat_fill_it_evenly() {
        const FIRST: u32 = 32_768;
        const LAST: u32 = 60_999;
        let flows: u32 = 60_000;
        for backends in [2, 16, 100] {
            let sets = sets(flows);
            let mut taken = std::collections::HashSet::new();
            let mut keys = std::vec::Vec::new();
            for i in 0..flows / 2 {
                let port = |p: u32| u64::from((p as u16).to_be());
                let client = [u64::from(i / 4) << 8 | 0xc612 << 40, 0, 0, 0, {
                    port(1024 + (i & 3)) | port(80) << 16 | 6 << 32
                }];
                let backend = 0x0102_c612_0302_c612 + u64::from(i % backends);
                let answer = |p: u32| [backend, 0, 0, 0, port(80) | port(p) << 16 | 6 << 32];
                let set = Home::of::<u32>(KeyWords(client), 0x5eed).first(sets) + 1;
                let near = Home::of::<u32>(KeyWords(answer(0)), 0x5eed).port_to(set % sets, sets);
                let mut offset = near.wrapping_sub(FIRST) % ROUND;
                while !taken.insert((i % backends, offset)) {
                    offset = (offset + 97) % (LAST - FIRST + 1);
                }
                keys.extend([client, answer(FIRST + offset)]);
            }
            let (lost, at_home) = fill(keys.into_iter(), sets, false);
            assert!(lost < 0.000_2, "{backends}: {lost} of a full table is lost");
            assert!(at_home > 0.6, "{backends}: {at_home} at home");
        }
    }

    #[test]
    fn what_is_over_or_half_open_goes_first() {
        let client = |state| Flow::<u32> {
            state,
            ..Flow::zeroed()
        };
        let reply = |proven| Flow::<u32> {
            direction: DIRECTION_BACKEND,
            state: state::SYN_SENT,
            proven,
            ..Flow::zeroed()
        };
        let established = expendable(&client(state::ESTABLISHED), 1000);
        assert!(established > expendable(&client(state::ESTABLISHED), 999));
        assert_eq!(established, expendable(&reply(1), 1000));
        assert!(is_live(&reply(1)) && !is_live(&reply(0)));
        assert!(is_live(&client(state::ESTABLISHED)) && is_live(&client(state::UDP)));
        assert!(!is_live(&client(state::SYN_RECEIVED)) && !is_live(&client(state::TIME_WAIT)));
        assert_eq!(established, expendable(&client(state::UDP), 1000));
        for half_open in [
            client(state::SYN_SENT),
            client(state::SYN_RECEIVED),
            reply(0),
        ] {
            assert!(expendable(&half_open, 0) > established);
            assert!(expendable(&half_open, 0) > expendable(&client(state::FIN_CLIENT), 200));
            assert!(expendable(&half_open, 10) < expendable(&client(state::CLOSED), 0));
        }
        assert!(expendable(&client(state::CLOSED), 1) > established);
        assert!(expendable(&client(state::FIN_CLIENT), 0) > established);
    }
}
