//! `maglev` and `source-hash`: a table in which a hash finds its backend, and which changes little
//! when the pool does.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4: every backend has a permutation of all slots, and the backends take turns in
//! claiming the next free slot of theirs. With weights, the number of turns of each follows its
//! weight.

use super::{Error, Member, smooth};
use lb_common::hash::{jhash_3words, jhash_4words};
use std::net::{IpAddr, SocketAddr};

/// The sizes a table may have: the largest prime below each power of two. A prime, because only
/// then every step width visits all slots; few of them and far apart, because with another size
/// nearly all flows change their slot.
const SIZES: [u32; 14] = [
    251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131_071, 262_139, 524_287, 1_048_573,
    2_097_143,
];

/// The largest of [`SIZES`].
pub(super) const LARGEST: u32 = SIZES[SIZES.len() - 1];

/// Slots for each backend: by the paper (section 5.3) this keeps shares even and changes few.
const SLOTS_PER_MEMBER: u64 = 100;

/// Slots for each backend of a pool of more than [`FEW`], as long as they are no more than [`MANY_SLOTS`]:
/// the more slots, the fewer of the others move when one backend goes. In a small pool one backend
/// is so much of it that they hardly count.
const SLOTS_PER_ONE_OF_MANY: u64 = 600;
const FEW: usize = 50;
const MANY_SLOTS: u64 = 131_071;

/// Seeds of the two hashes that make a permutation. As all that decides a table they are the same
/// on every balancer, and in every version.
const OFFSET_SEED: u32 = 0x6f66_6673;
const SKIP_SEED: u32 = 0x736b_6970;

/// The table for `pool`, of no fewer slots than `table_size`.
pub(super) fn build(pool: &[Member], table_size: u32) -> Result<Vec<u32>, Error> {
    let configured: Vec<u32> = pool.iter().map(|member| member.configured_weight).collect();
    let size = slots(&configured, table_size)?;
    // In the order of identity, so that the order of the configuration does not matter.
    let mut members: Vec<&Member> = pool.iter().filter(|member| member.weight > 0).collect();
    members.sort_by_key(|member| (member.identity, member.backend));
    let weights: Vec<u32> = members.iter().map(|member| member.weight).collect();
    let quotas = quotas(&weights, size);

    let mut permutations: Vec<Permutation> = members
        .iter()
        .map(|member| Permutation::new(member.identity, size))
        .collect();
    const FREE: u32 = u32::MAX;
    let mut owners = vec![FREE; if members.is_empty() { 0 } else { size as usize }];
    for turn in smooth::turns(&quotas) {
        let permutation = &mut permutations[turn as usize];
        while owners[permutation.slot as usize] != FREE {
            permutation.advance(size);
        }
        owners[permutation.slot as usize] = turn;
    }
    Ok(owners
        .into_iter()
        .map(|owner| members[owner as usize].backend)
        .collect())
}

/// The size of the table for backends with these configured weights.
pub(super) fn slots(configured_weights: &[u32], table_size: u32) -> Result<u32, Error> {
    let count = configured_weights.len();
    if count > LARGEST as usize {
        return Err(Error::TooManyMembers(count));
    }
    let total: u64 = configured_weights.iter().map(|&w| u64::from(w)).sum();
    let smallest = configured_weights.iter().copied().filter(|w| *w > 0).min();
    // The smallest weight must be worth a slot.
    let at_least = smallest.map_or(0, |smallest| total.div_ceil(u64::from(smallest)));
    let most = u64::from(LARGEST);
    if let Some(smallest) = smallest
        && at_least > most
    {
        return Err(Error::WeightTooSmall {
            smallest,
            total,
            needed: total.div_ceil(most),
        });
    }
    let mut wanted = SLOTS_PER_MEMBER * count as u64;
    if count > FEW {
        wanted = wanted.max((SLOTS_PER_ONE_OF_MANY * count as u64).min(MANY_SLOTS));
    }
    let wanted = wanted.max(table_size.into()).min(most).max(at_least);
    let size = SIZES.iter().find(|&&size| u64::from(size) >= wanted);
    Ok(size.copied().unwrap_or(LARGEST))
}

/// How many of `size` slots each weight gets: its exact share, rounded so that the sum is `size`
/// (largest remainders, the first of several).
fn quotas(weights: &[u32], size: u32) -> Vec<u32> {
    let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
    if total == 0 {
        return Vec::new();
    }
    let share = |weight: u32| u64::from(weight) * u64::from(size);
    let mut quotas: Vec<u32> = weights
        .iter()
        .map(|&weight| u32::try_from(share(weight) / total).unwrap_or(size))
        .collect();
    let left = size - quotas.iter().sum::<u32>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&position| std::cmp::Reverse(share(weights[position]) % total));
    for &position in order.iter().take(left as usize) {
        quotas[position] += 1;
    }
    quotas
}

/// The slots in the order in which one backend wants them.
struct Permutation {
    slot: u32,
    skip: u32,
}

impl Permutation {
    fn new(identity: SocketAddr, size: u32) -> Self {
        Self {
            slot: hash(identity, OFFSET_SEED) % size,
            skip: hash(identity, SKIP_SEED) % (size - 1) + 1,
        }
    }

    fn advance(&mut self, size: u32) {
        self.slot += self.skip;
        if self.slot >= size {
            self.slot -= size;
        }
    }
}

/// The hash of address and port, the same on machines of any byte order.
fn hash(identity: SocketAddr, seed: u32) -> u32 {
    let octets = match identity.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let bits = u128::from_be_bytes(octets);
    let words = [96, 64, 32, 0].map(|shift| (bits >> shift) as u32);
    let address = jhash_4words(&words, seed);
    jhash_3words(address, u32::from(identity.port()), 0, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(pool: &[Member]) -> Result<Vec<u32>, Error> {
        super::build(pool, 0)
    }

    fn slots(configured_weights: &[u32]) -> Result<u32, Error> {
        super::slots(configured_weights, 0)
    }

    #[test]
    fn a_size_that_is_asked_for_is_the_least() {
        for (asked, size) in [(0, 509), (509, 509), (510, 1021), (65_521, 65_521)] {
            assert_eq!(super::slots(&[1; 3], asked), Ok(size));
            assert_eq!(super::build(&pool(3), asked).unwrap().len(), size as usize);
        }
    }
    use proptest::prelude::*;

    fn member(number: u32, weight: u32) -> Member {
        let [_, _, high, low] = number.to_be_bytes();
        Member {
            identity: SocketAddr::from(([10, 0, high, low], 80)),
            backend: number + 1,
            weight,
            configured_weight: weight,
        }
    }

    fn pool(count: u32) -> Vec<Member> {
        (0..count).map(|number| member(number, 1)).collect()
    }

    /// FNV-1a over the slots, to pin a whole table in one number.
    fn fingerprint(table: &[u32]) -> u64 {
        table
            .iter()
            .flat_map(|slot| slot.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
    }

    #[test]
    fn sizes_are_the_largest_primes_below_powers_of_two() {
        let prime = |n: u32| {
            (2..)
                .take_while(|d| d * d <= n)
                .all(|d| !n.is_multiple_of(d))
        };
        for (size, bits) in SIZES.into_iter().zip(8..) {
            let largest = (2..1_u32 << bits).rev().find(|n| prime(*n));
            assert_eq!(Some(size), largest);
        }
    }

    #[test]
    fn every_machine_and_version_builds_the_same_table() {
        let mut pool = pool(10);
        pool[3].weight = 5;
        pool[3].configured_weight = 5;
        pool[7].identity = "[2001:db8::7]:443".parse().unwrap();
        let table = build(&pool).unwrap();
        assert_eq!(table.len(), 1021);
        // Computed by another implementation of the paper, in another language.
        assert_eq!(fingerprint(&table), 0x504c_8cfd_d4ae_ad2a);
    }

    #[test]
    fn removing_one_of_a_hundred_moves_little_else() {
        let mut pool = pool(100);
        let before = build(&pool).unwrap();
        pool[42].weight = 0;
        let after = build(&pool).unwrap();
        assert_eq!(before.len(), after.len());
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| **before != 43 && before != after)
            .count();
        assert!(!after.contains(&43));
        println!("{moved} of {} slots of the others", before.len());
        // 0.6 %.
        assert!(
            moved * 1000 <= 6 * before.len(),
            "{moved} of {}",
            before.len()
        );
    }

    #[test]
    fn a_death_does_not_change_the_size() {
        let mut pool = pool(41);
        let before = build(&pool).unwrap().len();
        for member in &mut pool[1..] {
            member.weight = 0;
        }
        assert_eq!(build(&pool), Ok(vec![1; before]));
    }

    #[test]
    fn no_weight_no_slot() {
        assert_eq!(build(&[]), Ok(vec![]));
        assert_eq!(build(&[member(0, 0)]), Ok(vec![]));
        assert_eq!(build(&[member(0, 0), member(1, 3)]), Ok(vec![2; 251]));
    }

    #[test]
    fn the_smallest_weight_is_worth_a_slot_or_refused() {
        let uneven = [member(0, 1), member(1, 60_000)];
        let table = build(&uneven).unwrap();
        assert_eq!(table.len(), 65_521);
        assert_eq!(table.iter().filter(|slot| **slot == 1).count(), 1);

        let mut hopeless = vec![65_535; 40];
        hopeless[0] = 1;
        assert_eq!(
            slots(&hopeless).unwrap_err().to_string(),
            "weight 1 is too small a share of 2555866 for a table of 2097143 slots; raise it to \
             at least 2, or lower the others"
        );
    }

    #[test]
    fn very_large_pools_have_a_table() {
        assert_eq!(slots(&vec![1; 16_384]), Ok(2_097_143));
        assert_eq!(slots(&vec![1; 100_000]), Ok(2_097_143));
        assert_eq!(
            slots(&vec![1; 3_000_000]),
            Err(Error::TooManyMembers(3_000_000))
        );
    }

    #[test]
    fn a_thousand_backends_share_evenly() {
        let table = build(&pool(1000)).unwrap();
        let mut counts = vec![0; 1000];
        for slot in table {
            counts[slot as usize - 1] += 1;
        }
        assert_eq!(counts.iter().min(), Some(&131));
        assert_eq!(counts.iter().max(), Some(&132));
    }

    proptest! {
        #[test]
        fn shares_are_exact_within_a_slot(
            weights in prop::collection::vec(0_u32..300, 1..60),
        ) {
            let pool: Vec<Member> =
                (0..).zip(&weights).map(|(number, &weight)| member(number, weight)).collect();
            let table = build(&pool).unwrap();
            let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
            for member in &pool {
                let count = table.iter().filter(|slot| **slot == member.backend).count() as u64;
                let size = table.len() as u64;
                let share = u64::from(member.weight) * size;
                prop_assert!(count * total < share + total && share < (count + 1) * total || total == 0);
            }
        }

        #[test]
        fn the_order_of_the_configuration_does_not_matter(
            pool in prop::collection::vec(1_u32..20, 1..30).prop_flat_map(|weights| {
                let pool: Vec<Member> =
                    (0..).zip(weights).map(|(number, weight)| member(number, weight)).collect();
                Just(pool).prop_shuffle()
            }),
        ) {
            let mut sorted = pool.clone();
            sorted.sort_by_key(|member| member.identity);
            prop_assert_eq!(build(&pool), build(&sorted));
        }
    }
}
