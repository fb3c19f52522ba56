//! What the log has told of a counter.

use std::time::{Duration, Instant};

/// Shortest time between two warnings of the same kind.
const INTERVAL: Duration = Duration::from_secs(10);

/// How much of a counter that only grows has been told of, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    count: Option<u64>,
    at: Option<Instant>,
}

impl Told {
    /// By how much the counter has grown since it was told of, if it is to be told of again. What it is when it is
    /// first seen has been counted for an earlier daemon.
    pub(super) fn news(&mut self, count: u64, now: Instant) -> Option<u64> {
        let before = *self.count.get_or_insert(count);
        let due = self.at.is_none_or(|at| now.duration_since(at) >= INTERVAL);
        if count <= before || !due {
            return None;
        }
        (self.count, self.at) = (Some(count), Some(now));
        Some(count - before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_at_once_and_then_now_and_then() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut told = Told::default();
        assert_eq!(told.news(7, start), None, "counted before");
        assert_eq!(told.news(9, after(1)), Some(2));
        assert_eq!(told.news(10, after(2)), None, "too soon");
        assert_eq!(
            told.news(14, after(11)),
            Some(5),
            "with what came meanwhile"
        );
        assert_eq!(told.news(14, after(60)), None);
        assert_eq!(told.news(15, after(60)), Some(1));
    }
}
