//! Noticed from traffic: backends that do not answer, or refuse, are checked at once and, past a
//! threshold, ejected. See `docs/failover.md`.

use super::{CheckKey, Daemon};
use crate::model::{BackendKey, CheckResult, State};
use lb_common::backend::Load;
use std::{
    collections::{HashMap, VecDeque},
    mem::offset_of,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// Failures older than this count no more.
const WINDOW: Duration = Duration::from_secs(2);

/// A SYN that comes again now went to a backend more than a second ago: one that has just come up is
/// not to blame.
const GRACE: Duration = Duration::from_millis(1500);

/// Shortest time between two checks of a backend that traffic asks for.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// What the data plane's counters said of each backend so far.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// The counters when they were last looked at, by backend number: SYNs that were repeated, and
    /// connections that were refused.
    counted: Vec<[u64; 2]>,
    failing: HashMap<BackendKey, Failing>,
}

impl Traffic {
    /// By how much the counters of the backends with numbers below `end` have risen, where they have.
    fn news(&mut self, end: u32, read: impl Fn(u32) -> [u64; 2]) -> HashMap<u32, [u64; 2]> {
        let mut news = HashMap::new();
        for number in 0..end {
            let counted = read(number);
            let Some(before) = self.counted.get_mut(number as usize) else {
                // What an earlier daemon left is no news.
                self.counted.push(counted);
                continue;
            };
            // Lower: the number has been given to another backend.
            let new = [0, 1].map(|n| counted[n].saturating_sub(before[n]));
            *before = counted;
            if new != [0; 2] {
                news.insert(number, new);
            }
        }
        news
    }
}

/// A backend that failed of late.
#[derive(Debug, Default)]
struct Failing {
    /// How often, and when that was noticed.
    failures: VecDeque<(Instant, u64)>,
    asked: Option<Instant>,
}

impl Failing {
    /// Takes new failures; returns all within the window.
    fn add(&mut self, new: u64, now: Instant) -> u64 {
        while let Some((at, _)) = self.failures.front()
            && now.duration_since(*at) >= WINDOW
        {
            self.failures.pop_front();
        }
        self.failures.push_back((now, new));
        self.failures.iter().map(|(_, count)| count).sum()
    }

    /// Whether it is time for a check.
    fn ask(&mut self, now: Instant) -> bool {
        let due = self
            .asked
            .is_none_or(|at| now.duration_since(at) >= ASK_INTERVAL);
        if due {
            self.asked = Some(now);
        }
        due
    }
}

impl Daemon {
    /// Looks at what the data plane has counted: two words for each backend.
    pub(super) fn watch_traffic(&mut self) {
        let now = Instant::now();
        let load = &self.dataplane.maps.backend_load;
        let end = self.reconciler.backend_numbers_end().min(load.len());
        let counter = |number, offset| load.atomic_u64(number, offset).load(Ordering::Relaxed);
        let news = self.traffic.news(end, |number| {
            [
                counter(number, offset_of!(Load, retries)),
                counter(number, offset_of!(Load, resets)),
            ]
        });
        self.ask_again(now);
        if news.is_empty() {
            return;
        }
        let failed: Vec<(BackendKey, [u64; 2])> = self
            .model
            .backends()
            .filter_map(|(key, _)| {
                let number = self.reconciler.backend_number(&key.service, &key.address)?;
                Some((key, *news.get(&number)?))
            })
            .collect();
        for (backend, [retries, resets]) in failed {
            let is_new = |b: &crate::model::Backend| now.duration_since(b.since()) < GRACE;
            let new = if self.model.backend(backend).is_none_or(is_new) {
                resets
            } else {
                retries + resets
            };
            let failing = self.traffic.failing.entry(backend).or_default();
            let failures = failing.add(new, now);
            if failing.ask(now) {
                let agent = false;
                self.checker.ask_now(&CheckKey { backend, agent });
            }
            let change = self.model.failed_in_traffic(backend, failures, now);
            self.note(change);
        }
    }
}

impl Daemon {
    /// Has backends that failed of late checked again at once as long as their check fails too, so that
    /// `fall` is soon reached.
    fn ask_again(&mut self, now: Instant) {
        let (model, checker) = (&self.model, &self.checker);
        self.traffic.failing.retain(|backend, failing| {
            let (backend, agent) = (*backend, false);
            let fails = model.backend(backend).is_some_and(|b| {
                b.state() == State::Up && b.last_check().is_some_and(CheckResult::is_failed)
            });
            if fails && failing.ask(now) {
                checker.ask_now(&CheckKey { backend, agent });
            }
            let last = failing.failures.back();
            last.is_some_and(|(at, _)| now.duration_since(*at) < WINDOW)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_daemon_counted_is_no_news() {
        let mut traffic = Traffic::default();
        assert_eq!(traffic.news(2, |_| [40, 60]), HashMap::new());
        assert_eq!(
            traffic.news(2, |n| [40, 60 + u64::from(n)]),
            [(1, [0, 1])].into()
        );
        assert_eq!(
            traffic.news(3, |_| [0, 0]),
            HashMap::new(),
            "others' numbers"
        );
        assert_eq!(
            traffic.news(3, |n| [u64::from(n), 0]),
            [(1, [1, 0]), (2, [2, 0])].into()
        );
    }

    #[test]
    fn failures_count_for_as_long_as_the_window() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut failing = Failing::default();
        assert_eq!(failing.add(2, at(100)), 2);
        assert_eq!(failing.add(1, at(1000)), 3);
        assert_eq!(failing.add(1, at(2100)), 2, "the first two are too old");
        assert!(failing.ask(at(0)) && !failing.ask(at(499)) && failing.ask(at(500)));
    }
}
