//! Which service each port of each VIP leads to.
//!
//! Maps `services4` and `services6` have a key for every port; here they are kept as runs of
//! neighbouring ports, so that a change of a range is the ports that come and the ports that go.

use crate::{
    config::{Listen, Ports, Protocol},
    model::ServiceKey,
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

/// A VIP and a protocol.
type Place = (IpAddr, Protocol);

/// Runs of neighbouring ports that lead to the same service, by their first port: the last port,
/// and the service's number.
type Runs = BTreeMap<u16, (u16, u32)>;

/// First port, last port, and the number they shall lead to.
type Claim = (u16, u16, u32);

/// The keys that are in the maps.
#[derive(Debug, Default)]
pub struct Keys {
    places: HashMap<Place, Runs>,
    /// How many keys lead to each service.
    counts: HashMap<u32, u32>,
}

/// What has to be done to the keys.
#[derive(Debug, Default, PartialEq)]
pub struct Change {
    /// Ports that lead nowhere any more.
    pub withdrawn: Vec<ServiceKey>,
    /// Ports that lead to a service, and its number.
    pub published: Vec<(ServiceKey, u32)>,
}

fn place(id: &ServiceKey) -> Place {
    (id.listen.ip, id.protocol)
}

fn key((ip, protocol): Place, first: u16, last: u16) -> ServiceKey {
    let ports = Ports::span(first, last);
    ServiceKey {
        listen: Listen { ip, ports },
        protocol,
    }
}

impl Keys {
    /// Takes note of keys that were found in the maps.
    pub fn adopt(&mut self, id: &ServiceKey, number: u32) {
        let (first, last) = id.listen.ports.keys();
        let runs = self.places.entry(place(id)).or_default();
        runs.insert(first, (last, number));
        *self.counts.entry(number).or_default() += id.listen.ports.count();
    }

    /// Makes the ports of each of `owners` lead to its number and to that alone, and no port to
    /// the number of one that is `leaving`. Returns what that changes.
    pub fn change(
        &mut self,
        owners: &[(ServiceKey, u32)],
        leaving: &[(ServiceKey, u32)],
    ) -> Change {
        let is_new = |(id, number): &&(ServiceKey, u32)| {
            let (first, last) = id.listen.ports.keys();
            let run = self
                .places
                .get(&place(id))
                .and_then(|runs| runs.get(&first));
            let count = self.counts.get(number).copied().unwrap_or(0);
            run != Some(&(last, *number)) || count != id.listen.ports.count()
        };
        let affected = owners.iter().filter(is_new).chain(leaving);
        let mut claims: HashMap<Place, Vec<Claim>> =
            affected.map(|(id, _)| (place(id), Vec::new())).collect();
        for (id, number) in owners {
            if let Some(claims) = claims.get_mut(&place(id)) {
                let (first, last) = id.listen.ports.keys();
                claims.push((first, last, *number));
            }
        }
        let spoken: HashSet<u32> = owners.iter().chain(leaving).map(|(_, n)| *n).collect();
        let mut change = Change::default();
        for (place, mut claims) in claims {
            claims.sort_unstable();
            let before = self.places.remove(&place).unwrap_or_default();
            let after = wanted(&before, &claims, &spoken);
            self.note(place, &before, &after, &mut change);
            if !after.is_empty() {
                self.places.insert(place, after);
            }
        }
        change
    }

    /// Compares two states of a place port by port, a run at a time.
    fn note(&mut self, place: Place, before: &Runs, after: &Runs, change: &mut Change) {
        let mut edges: Vec<u32> = [before, after]
            .into_iter()
            .flatten()
            .flat_map(|(first, (last, _))| [u32::from(*first), u32::from(*last) + 1])
            .collect();
        edges.sort_unstable();
        edges.dedup();
        for pair in edges.windows(2) {
            // Between two edges all ports lead to the same service, before and after.
            let (Ok(first), Ok(last)) = (u16::try_from(pair[0]), u16::try_from(pair[1] - 1)) else {
                continue;
            };
            let (was, is) = (leads_to(before, first), leads_to(after, first));
            if was == is {
                continue;
            }
            let id = key(place, first, last);
            let ports = id.listen.ports.count();
            if let Some(number) = was {
                let count = self.counts.entry(number).or_default();
                *count = count.saturating_sub(ports);
                if *count == 0 {
                    self.counts.remove(&number);
                }
            }
            match is {
                Some(number) => {
                    *self.counts.entry(number).or_default() += ports;
                    change.published.push((id, number));
                }
                None => change.withdrawn.push(id),
            }
        }
    }
}

/// Where a port leads to.
fn leads_to(runs: &Runs, port: u16) -> Option<u32> {
    let (_, (last, number)) = runs.range(..=port).next_back()?;
    (*last >= port).then_some(*number)
}

/// The runs of a place as they shall be: the `claims`, in their order, and between them what
/// services have that are not `spoken` of.
fn wanted(before: &Runs, claims: &[Claim], spoken: &HashSet<u32>) -> Runs {
    let mut runs: Runs = claims
        .iter()
        .map(|(first, last, number)| (*first, (*last, *number)))
        .collect();
    for (first, (last, number)) in before.iter().filter(|(_, (_, n))| !spoken.contains(n)) {
        // What others have taken of it goes; the pieces between stay.
        let mut from = u32::from(*first);
        let end = u32::from(*last);
        let begin = claims.partition_point(|(_, to, _)| to < first);
        for (taken, to, _) in claims[begin..].iter().take_while(|(f, ..)| f <= last) {
            insert(&mut runs, from, u32::from(*taken), *number);
            from = from.max(u32::from(*to) + 1);
        }
        insert(&mut runs, from, end + 1, *number);
    }
    runs
}

/// Adds the run from `first` to the port before `end`, unless there is none between.
fn insert(runs: &mut Runs, first: u32, end: u32, number: u32) {
    if first < end
        && let (Ok(first), Ok(last)) = (u16::try_from(first), u16::try_from(end - 1))
    {
        runs.insert(first, (last, number));
    }
}

/// Puts single keys with their numbers together to runs of neighbouring ports.
pub fn runs_of(mut found: Vec<(ServiceKey, u32)>) -> Vec<(ServiceKey, u32)> {
    found.sort_unstable_by_key(|(id, number)| (place(id), id.listen.ports.keys(), *number));
    let mut runs: Vec<(ServiceKey, u32)> = Vec::new();
    for (id, number) in found {
        let (first, last) = id.listen.ports.keys();
        if let Some((run, of)) = runs.last_mut()
            && *of == number
            && place(run) == place(&id)
            && run.listen.ports != Ports::Any
            && run.listen.ports.keys().1.checked_add(1) == Some(first)
        {
            run.listen.ports = Ports::span(run.listen.ports.keys().0, last);
            continue;
        }
        runs.push((id, number));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VIP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1));

    fn id(first: u16, last: u16) -> ServiceKey {
        key((VIP, Protocol::Tcp), first, last)
    }

    #[test]
    fn a_range_that_grows_publishes_what_is_new() {
        let mut keys = Keys::default();
        let whole = keys.change(&[(id(8000, 8100), 1)], &[]);
        assert_eq!(whole.published, [(id(8000, 8100), 1)]);
        let more = keys.change(&[(id(8000, 8200), 1)], &[]);
        assert_eq!(more.published, [(id(8101, 8200), 1)]);
        assert_eq!(more.withdrawn, []);
        let less = keys.change(&[(id(8050, 8200), 1)], &[]);
        assert_eq!(less.published, []);
        assert_eq!(less.withdrawn, [id(8000, 8049)]);
        assert_eq!(keys.change(&[(id(8050, 8200), 1)], &[]), Change::default());
    }

    #[test]
    fn ports_that_change_hands_are_never_withdrawn() {
        let mut keys = Keys::default();
        keys.change(&[(id(8000, 8100), 1)], &[]);
        let change = keys.change(&[(id(8050, 8050), 2)], &[(id(8000, 8100), 1)]);
        assert_eq!(change.published, [(id(8050, 8050), 2)]);
        assert_eq!(change.withdrawn, [id(8000, 8049), id(8051, 8100)]);
    }

    #[test]
    fn every_port_is_a_key_of_its_own() {
        let mut keys = Keys::default();
        keys.change(&[(id(0, 0), 1), (id(1, 10), 2)], &[]);
        let change = keys.change(&[], &[(id(1, 10), 2)]);
        assert_eq!(change.withdrawn, [id(1, 10)]);
        let change = keys.change(&[(id(1, 1), 1)], &[]);
        assert_eq!(change.withdrawn, [id(0, 0)]);
    }

    #[test]
    fn single_keys_become_runs() {
        let one = |port| id(port, port);
        let other = ServiceKey {
            protocol: Protocol::Udp,
            ..one(82)
        };
        let found = vec![
            (one(81), 1),
            (one(80), 1),
            (one(0), 1),
            (one(1), 1),
            (one(65535), 1),
            (other, 1),
            (one(82), 2),
        ];
        let mut expected = vec![
            (one(0), 1),
            (one(1), 1),
            (id(80, 81), 1),
            (one(82), 2),
            (one(65535), 1),
            (other, 1),
        ];
        expected.sort_unstable();
        let mut runs = runs_of(found);
        runs.sort_unstable();
        assert_eq!(runs, expected);
    }

    proptest! {
        /// Against a plain table of ports.
        #[test]
        fn the_keys_are_what_was_asked_for(
            steps in prop::collection::vec(
                prop::collection::btree_map(0_u16..40, (1_u16..8, 1_u32..5), 0..6), 1..8),
        ) {
            let mut keys = Keys::default();
            let mut table: HashMap<u16, u32> = HashMap::new();
            let mut held: Vec<(ServiceKey, u32)> = Vec::new();
            for step in steps {
                let mut owners: Vec<(ServiceKey, u32)> = Vec::new();
                let (mut next, mut numbers) = (0, HashSet::new());
                for (first, (len, number)) in step {
                    if first < next || !numbers.insert(number) {
                        continue;
                    }
                    let last = if first == 0 { 0 } else { first + len - 1 };
                    owners.push((id(first, last), number));
                    next = last + 1;
                }
                let leaving: Vec<_> =
                    held.iter().filter(|(_, n)| !numbers.contains(n)).copied().collect();
                let change = keys.change(&owners, &leaving);
                for gone in change.withdrawn {
                    let (first, last) = gone.listen.ports.keys();
                    for port in first..=last {
                        prop_assert!(table.remove(&port).is_some());
                    }
                }
                for (new, number) in change.published {
                    let (first, last) = new.listen.ports.keys();
                    for port in first..=last {
                        prop_assert_ne!(table.insert(port, number), Some(number));
                    }
                }
                let mut expected = HashMap::new();
                for (id, number) in &owners {
                    let (first, last) = id.listen.ports.keys();
                    expected.extend((first..=last).map(|port| (port, *number)));
                }
                prop_assert_eq!(&table, &expected);
                let mut adopted = Keys::default();
                for (id, number) in runs_of(table.iter().map(|(p, n)| (id(*p, *p), *n)).collect()) {
                    adopted.adopt(&id, number);
                }
                prop_assert_eq!(adopted.change(&owners, &[]), Change::default());
                held = owners;
            }
        }
    }
}
