//! The table of a stateless service, and what of it changed lately.
//!
//! `docs/flow-state.md` has the argument; `lb_common::backend::Slot` the encoding.

use super::slots::Region;
use lb_common::backend::{NO_BACKEND, Slot};
use std::{collections::HashMap, time::Instant};

/// Slots that become something else, by their place in the table.
pub type Changes = Vec<(u32, Slot)>;

/// The selection table of a stateless service.
#[derive(Debug, Default)]
pub struct Delta {
    slots: Vec<Slot>,
    /// Until when a flow of the former owner may yet be seen for the first time, by slot; `None`
    /// for those found in adopted maps, of which it is not known yet.
    open: HashMap<u32, Option<Instant>>,
    /// The table of another size that this one replaced, and until when likewise.
    replaced: Option<(Region, Option<Instant>)>,
    /// Raised with every change of an owner: what was seen of the table before is not true of it.
    version: u64,
}

impl Delta {
    /// Of a table that no packet has met yet.
    pub fn settled(owners: &[u32]) -> Self {
        Self {
            slots: owners.iter().copied().map(Slot::settled).collect(),
            ..Self::default()
        }
    }

    /// Of a table some of whose flows are recorded, nobody knows which.
    pub fn closing(owners: &[u32]) -> Self {
        Self {
            slots: owners.iter().copied().map(closing).collect(),
            ..Self::default()
        }
    }

    /// Of a table that was found in adopted maps.
    pub fn adopt(slots: Vec<Slot>, replaced: Region) -> Self {
        let is_open = |slot: &Slot| !slot.is_settled() && slot.previous != NO_BACKEND;
        Self {
            open: (0..)
                .zip(&slots)
                .filter(|(_, slot)| is_open(slot))
                .map(|(place, _)| (place, None))
                .collect(),
            slots,
            replaced: (replaced.len > 0).then_some((replaced, None)),
            version: 0,
        }
    }

    /// The slots as they shall stand in the map.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Raised with every change of an owner.
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// The table of another size that flows may still belong to.
    pub fn replaced(&self) -> Region {
        self.replaced
            .map_or(Region::default(), |(region, _)| region)
    }

    /// Whether a packet of a flow that is not recorded may belong to this backend although its
    /// slot does not.
    pub fn remembers(&self, backend: u32) -> bool {
        self.replaced.is_some()
            || self
                .open
                .keys()
                .any(|place| self.slots[*place as usize].previous == backend)
    }

    /// The table gets these owners, as many as it has slots. Flows of the former ones may be seen
    /// for the first time until `until`.
    pub fn change(&mut self, owners: &[u32], until: Instant) -> Changes {
        let mut changes = Vec::new();
        for (place, (&owner, slot)) in (0_u32..).zip(owners.iter().zip(&mut self.slots)) {
            if slot.backend == owner {
                continue;
            }
            let before = slot.unrecorded();
            *slot = if self.replaced.is_some() || before == owner || before == NO_BACKEND {
                // In a table that replaced another, `previous` is not looked at.
                self.open.remove(&place);
                closing(owner)
            } else {
                self.open.entry(place).or_insert(Some(until));
                Slot {
                    backend: owner,
                    previous: before,
                }
            };
            changes.push((place, *slot));
        }
        self.version += 1;
        if let Some((_, end)) = &mut self.replaced
            && !changes.is_empty()
        {
            *end = Some(until);
        }
        changes
    }

    /// Replaces the table, which stands at `region`, by one of another size. The former one stays
    /// as it is for as long as flows may belong to it.
    pub fn replace(&mut self, owners: &[u32], region: Region, until: Instant) {
        let oldest = self.replaced.map_or(region, |(oldest, _)| oldest);
        *self = Self {
            replaced: Some((oldest, Some(until))),
            version: self.version + 1,
            ..Self::closing(owners)
        };
    }

    /// Ends what is over by `now`; what is not known to end does so at `until`. Returns the slots
    /// that change, and the table that no flow belongs to any more.
    pub fn expire(&mut self, now: Instant, until: Instant) -> (Changes, Option<Region>) {
        let mut changes = Vec::new();
        let slots = &mut self.slots;
        self.open.retain(|place, end| {
            let is_over = *end.get_or_insert(until) <= now;
            if is_over {
                let slot = &mut slots[*place as usize];
                *slot = closing(slot.backend);
                changes.push((*place, *slot));
            }
            !is_over
        });
        let mut free = None;
        if let Some((region, end)) = &mut self.replaced
            && *end.get_or_insert(until) <= now
        {
            free = Some(*region);
            self.replaced = None;
            changes = self.reopen(0..self.slots.len() as u32);
        }
        (changes, free)
    }

    /// Some flows of these slots may be recorded, whatever was known of them.
    pub fn reopen(&mut self, places: impl IntoIterator<Item = u32>) -> Changes {
        let mut changes = Vec::new();
        for place in places {
            if let Some(slot) = self.slots.get_mut(place as usize)
                && !self.open.contains_key(&place)
            {
                *slot = closing(slot.backend);
                changes.push((place, *slot));
            }
        }
        changes
    }

    /// No flow of these slots is recorded that is not with the slot's backend.
    pub fn settle(&mut self, places: impl IntoIterator<Item = u32>) -> Changes {
        let mut changes = Vec::new();
        if self.replaced.is_some() {
            return changes;
        }
        for place in places {
            if let Some(slot) = self.slots.get_mut(place as usize)
                && !self.open.contains_key(&place)
            {
                *slot = Slot::settled(slot.backend);
                changes.push((place, *slot));
            }
        }
        changes
    }

    /// Forgets a backend that is going away: its flows that are not recorded are over.
    pub fn forget(&mut self, backend: u32) -> Changes {
        let mut changes = Vec::new();
        let slots = &mut self.slots;
        self.open.retain(|place, _| {
            let slot = &mut slots[*place as usize];
            let is_its = slot.previous == backend;
            if is_its {
                *slot = closing(slot.backend);
                changes.push((*place, *slot));
            }
            !is_its
        });
        changes
    }
}

/// A slot some of whose flows are recorded; all others are with its backend.
const fn closing(backend: u32) -> Slot {
    Slot {
        backend,
        previous: NO_BACKEND,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const A: u32 = 1;
    const B: u32 = 2;
    const C: u32 = 3;

    fn slot(backend: u32, previous: u32) -> Slot {
        Slot { backend, previous }
    }

    #[test]
    fn a_changed_slot_remembers_who_had_it_until_the_window_ends() {
        let start = Instant::now();
        let until = start + Duration::from_secs(60);
        let mut delta = Delta::settled(&[A, B]);
        assert_eq!(delta.change(&[B, B], until), [(0, slot(B, A))]);
        assert!(delta.remembers(A));
        assert_eq!(delta.expire(start, until), (vec![], None));
        assert_eq!(delta.settle([0]), [], "its window is open");
        assert_eq!(delta.expire(until, until), (vec![(0, slot(B, 0))], None));
        assert!(!delta.remembers(A));
        assert_eq!(delta.settle([0]), [(0, slot(B, B))]);
    }

    #[test]
    fn two_changes_in_one_window_keep_the_first_owner() {
        let until = Instant::now() + Duration::from_secs(60);
        let mut delta = Delta::settled(&[A]);
        delta.change(&[B], until);
        // Flows that began at B are recorded; all others are A's.
        assert_eq!(delta.change(&[C], until), [(0, slot(C, A))]);
        assert_eq!(delta.change(&[A], until), [(0, slot(A, 0))]);
        // What is not recorded is A's, whether it began before or after.
        assert_eq!(delta.change(&[B], until), [(0, slot(B, A))]);
    }

    #[test]
    fn a_pool_that_was_empty_owed_nobody_anything() {
        let until = Instant::now() + Duration::from_secs(60);
        let mut delta = Delta::settled(&[A]);
        assert_eq!(delta.change(&[0], until), [(0, slot(0, A))]);
        assert_eq!(delta.change(&[A], until), [(0, slot(A, 0))]);
        let mut delta = Delta::settled(&[0]);
        assert_eq!(delta.change(&[A], until), [(0, slot(A, 0))]);
    }

    #[test]
    fn a_table_of_another_size_keeps_the_first_one_of_all() {
        let start = Instant::now();
        let until = start + Duration::from_secs(60);
        let (first, second) = (Region { first: 0, len: 1 }, Region { first: 7, len: 2 });
        let mut delta = Delta::settled(&[A]);
        delta.replace(&[A, B], first, until);
        assert_eq!(delta.replaced(), first);
        delta.replace(&[A, B, C], second, until);
        assert_eq!(
            delta.replaced(),
            first,
            "what is not recorded is found there"
        );
        assert_eq!(delta.settle([0, 1, 2]), []);
        let (changes, free) = delta.expire(until, until);
        assert_eq!(free, Some(first));
        assert_eq!(changes.len(), 3);
        assert_eq!(delta.settle([1]), [(1, slot(B, B))]);
    }

    #[test]
    fn adopted_windows_begin_anew() {
        let start = Instant::now();
        let until = start + Duration::from_secs(60);
        let found = vec![slot(A, A), slot(B, A), slot(C, 0)];
        let mut delta = Delta::adopt(found, Region::default());
        assert_eq!(delta.expire(start, until), (vec![], None));
        assert_eq!(delta.expire(until, until).0, [(1, slot(B, 0))]);
    }

    #[test]
    fn a_backend_that_goes_is_forgotten() {
        let until = Instant::now() + Duration::from_secs(60);
        let mut delta = Delta::settled(&[A, A, B]);
        delta.change(&[B, C, C], until);
        let mut changes = delta.forget(A);
        changes.sort_by_key(|(place, _)| *place);
        assert_eq!(changes, [(0, slot(B, 0)), (1, slot(C, 0))]);
        assert!(!delta.remembers(A) && delta.remembers(B));
    }
}
