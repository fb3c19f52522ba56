//! Room for selection tables in map `slots`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How long a table that was replaced stays untouched: a packet that read its place just before
/// may still be on its way, for microseconds.
const QUARANTINE: Duration = Duration::from_millis(20);

/// A run of slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First slot.
    pub first: u32,
    /// Number of slots.
    pub len: u32,
}

/// Which slots are free.
#[derive(Debug)]
pub struct SlotSpace {
    total: u32,
    /// Length of each free run by its first slot; neighbours are always joined.
    free: BTreeMap<u32, u32>,
    quarantine: Vec<(Instant, Region)>,
}

impl SlotSpace {
    /// All of `total` slots are free.
    pub fn new(total: u32) -> Self {
        let mut space = Self {
            total,
            free: BTreeMap::new(),
            quarantine: Vec::new(),
        };
        space.put_back(Region {
            first: 0,
            len: total,
        });
        space
    }

    /// How many slots there are.
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Takes the first free run that has room; `None` if none has.
    pub fn take(&mut self, len: u32, now: Instant) -> Option<Region> {
        if len == 0 {
            return Some(Region::default());
        }
        let over = |(since, _): &mut (Instant, Region)| now.duration_since(*since) >= QUARANTINE;
        for (_, region) in self.quarantine.extract_if(.., over).collect::<Vec<_>>() {
            self.put_back(region);
        }
        let (&first, &room) = self.free.iter().find(|(_, room)| **room >= len)?;
        self.free.remove(&first);
        if room > len {
            self.free.insert(first + len, room - len);
        }
        Some(Region { first, len })
    }

    /// Marks a run as used that was found in adopted maps; `false` if it is not free.
    pub fn claim(&mut self, region: Region) -> bool {
        if region.len == 0 {
            return true;
        }
        let Some((&first, &room)) = self.free.range(..=region.first).next_back() else {
            return false;
        };
        let Some(end) = region.first.checked_add(region.len) else {
            return false;
        };
        if end > first + room {
            return false;
        }
        self.free.remove(&first);
        if region.first > first {
            self.free.insert(first, region.first - first);
        }
        if first + room > end {
            self.free.insert(end, first + room - end);
        }
        true
    }

    /// Gives back a run that packets may still be reading.
    pub fn release(&mut self, region: Region, now: Instant) {
        if region.len > 0 {
            self.quarantine.push((now, region));
        }
    }

    /// Gives back a run that was never in use.
    pub fn put_back(&mut self, region: Region) {
        if region.len == 0 {
            return;
        }
        let mut region = region;
        if let Some(len) = self.free.remove(&(region.first + region.len)) {
            region.len += len;
        }
        if let Some((&first, &len)) = self.free.range(..region.first).next_back()
            && first + len == region.first
        {
            self.free.remove(&first);
            region = Region {
                first,
                len: len + region.len,
            };
        }
        self.free.insert(region.first, region.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_released_run_rests_before_it_is_used_again() {
        let start = Instant::now();
        let mut space = SlotSpace::new(10);
        let region = space.take(10, start).unwrap();
        space.release(region, start);
        assert_eq!(space.take(1, start), None);
        assert_eq!(
            space.take(1, start + QUARANTINE),
            Some(Region { first: 0, len: 1 })
        );
    }

    #[test]
    fn claims_overlap_neither_each_other_nor_the_end() {
        let mut space = SlotSpace::new(10);
        assert!(space.claim(Region { first: 3, len: 4 }));
        assert!(!space.claim(Region { first: 6, len: 2 }));
        assert!(!space.claim(Region { first: 8, len: 3 }));
        assert!(!space.claim(Region {
            first: 8,
            len: u32::MAX
        }));
        assert!(space.claim(Region { first: 7, len: 3 }));
        assert!(space.claim(Region { first: 0, len: 3 }));
        assert_eq!(space.take(1, Instant::now()), None);
    }

    proptest! {
        #[test]
        fn runs_never_overlap_and_nothing_is_lost(
            steps in proptest::collection::vec((any::<bool>(), 1u32..40, any::<prop::sample::Index>()), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut space = SlotSpace::new(200);
            let mut used: Vec<Region> = Vec::new();
            for (take, len, which) in steps {
                now += QUARANTINE;
                if take {
                    if let Some(region) = space.take(len, now) {
                        prop_assert!(region.first + region.len <= 200);
                        for other in &used {
                            prop_assert!(
                                region.first >= other.first + other.len
                                    || other.first >= region.first + region.len
                            );
                        }
                        used.push(region);
                    }
                } else if !used.is_empty() {
                    let region = used.swap_remove(which.index(used.len()));
                    space.release(region, now);
                }
            }
            for region in used.drain(..) {
                space.release(region, now);
            }
            let whole = Region { first: 0, len: 200 };
            prop_assert_eq!(space.take(200, now + QUARANTINE), Some(whole));
        }
    }
}
