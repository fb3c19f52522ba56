//! Builds selection tables: which backend each slot of a service names.
//!
//! Pure functions of a pool of weights. Building a table is apart from picking in it: the data
//! plane takes the slot that a hash or a counter points to, and knows nothing of weights.

mod maglev;
mod round_robin;
mod smooth;

use lb_common::{names::SCHEDULER, service::scheduler};
use std::net::SocketAddr;

/// Most slots of one `round-robin` table.
pub const ROUND_ROBIN_SLOTS_MAX: u32 = 1 << 20;
/// Most slots of one Maglev table.
pub const MAGLEV_SLOTS_MAX: u32 = maglev::LARGEST;

/// A backend as it takes part in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What stands for the backend in the hash, equal on every balancer: its address and port.
    pub identity: SocketAddr,
    /// The number that its slots carry.
    pub backend: u32,
    /// The weight in force: 0 while it takes no new flows.
    pub weight: u32,
    /// The weight it has when nothing is wrong with it. The size of a Maglev table follows from
    /// these, so that the table keeps its size, and most flows their slots, while backends come
    /// and go.
    pub configured_weight: u32,
}

/// Why there is no table for a pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The sequence of `round-robin` would be too long.
    #[error(
        "the weights make a round-robin sequence of {0} slots, more than {ROUND_ROBIN_SLOTS_MAX}; \
         use smaller weights, or weights with a common divisor"
    )]
    SequenceTooLong(u64),
    /// The smallest weight is less than one slot's worth.
    #[error(
        "weight {smallest} is too small a share of {total} for a table of {MAGLEV_SLOTS_MAX} slots; \
         raise it to at least {needed}, or lower the others"
    )]
    WeightTooSmall {
        /// The smallest weight above zero.
        smallest: u32,
        /// Sum of all weights.
        total: u64,
        /// What the smallest would have to be.
        needed: u64,
    },
    /// There are more backends than slots.
    #[error("{0} backends are more than a table's {MAGLEV_SLOTS_MAX} slots; use fewer")]
    TooManyMembers(usize),
    /// The number stands for no scheduler.
    #[error("scheduler number {0} is unknown; one of {names} is meant", names = names())]
    Unknown(u8),
}

fn names() -> String {
    let words: Vec<&str> = SCHEDULER.iter().map(|(_, word)| *word).collect();
    words.join(", ")
}

/// The backend number of every slot, for one of [`lb_common::service::scheduler`]; empty if no
/// member has a weight in force.
///
/// `pool` holds every backend of the service, also those with no weight in force, in the order of
/// the configuration.
///
/// A table of `maglev` or `source-hash` has at least `table_size` slots.
pub fn build(scheduler: u8, pool: &[Member], table_size: u32) -> Result<Vec<u32>, Error> {
    match scheduler {
        scheduler::ROUND_ROBIN | scheduler::RANDOM => round_robin::build(pool),
        scheduler::LEAST_CONNECTIONS => Ok(members(pool)),
        scheduler::MAGLEV | scheduler::SOURCE_HASH => maglev::build(pool, table_size),
        unknown => Err(Error::Unknown(unknown)),
    }
}

/// One slot for each member with a weight in force, whatever the weight: what `least-connections`
/// looks at, and every scheduler when the backend it picked is full.
pub fn members(pool: &[Member]) -> Vec<u32> {
    let with_weight = pool.iter().filter(|member| member.weight > 0);
    with_weight.map(|member| member.backend).collect()
}

/// The slots that a table of backends with these configured weights may come to, or why there is
/// no such table.
///
/// Whatever part of the pool is in force, its table has no more slots than this.
pub fn slots(scheduler: u8, configured_weights: &[u32], table_size: u32) -> Result<u32, Error> {
    match scheduler {
        scheduler::ROUND_ROBIN | scheduler::RANDOM => round_robin::slots(configured_weights),
        scheduler::LEAST_CONNECTIONS => u32::try_from(configured_weights.len())
            .map_err(|_| Error::TooManyMembers(configured_weights.len())),
        scheduler::MAGLEV | scheduler::SOURCE_HASH => maglev::slots(configured_weights, table_size),
        unknown => Err(Error::Unknown(unknown)),
    }
}

/// The greatest number that divides both; the other if one is 0.
#[must_use]
pub const fn common_divisor(mut a: u32, mut b: u32) -> u32 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_unknown_scheduler_is_an_error() {
        let error = Error::Unknown(77);
        assert_eq!(build(77, &[], 0), Err(error.clone()));
        assert_eq!(
            error.to_string(),
            "scheduler number 77 is unknown; one of maglev, round-robin, source-hash, least-connections, random is meant"
        );
    }

    proptest! {
        #[test]
        fn a_part_of_a_pool_never_takes_more_slots(
            weights in prop::collection::vec((0_u32..200, any::<bool>()), 0..40),
        ) {
            let configured: Vec<u32> = weights.iter().map(|(weight, _)| *weight).collect();
            let pool: Vec<Member> = (0_u32..)
                .zip(&weights)
                .map(|(number, (weight, up))| Member {
                    identity: SocketAddr::from(([10, 0, 0, 1], number as u16 + 1)),
                    backend: number + 1,
                    weight: if *up { *weight } else { 0 },
                    configured_weight: *weight,
                })
                .collect();
            for (scheduler, _) in SCHEDULER {
                let most = slots(*scheduler, &configured, 0).unwrap();
                let table = build(*scheduler, &pool, 0).unwrap();
                prop_assert!(table.len() <= most as usize);
                let total: u32 = pool.iter().map(|member| member.weight).sum();
                prop_assert_eq!(table.is_empty(), total == 0);
                for member in &pool {
                    let used = table.contains(&member.backend);
                    prop_assert_eq!(used, member.weight > 0);
                }
            }
        }
    }
}
