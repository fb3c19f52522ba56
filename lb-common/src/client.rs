//! What is kept of clients: where each returns to, how fast it comes, whether it may come at all.

use crate::addr::Address;
use bytemuck::{Pod, Zeroable};

/// Key of maps `affinity4`, `affinity6`, `sources4` and `sources6`: a client of one service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Zeroable)]
pub struct ClientKey<A> {
    /// Number of the service.
    pub service: u32,
    /// The client's address, network order; in the maps of affinity what its mask leaves of it.
    pub addr: A,
}

/// Key of maps `access4` and `access6`, which find the longest prefix that holds a client.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Zeroable)]
pub struct AccessKey<A> {
    /// Bits that count: the 32 of the service's number, then those of the prefix.
    pub prefix_len: u32,
    /// Service and address.
    pub data: ClientKey<A>,
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for ClientKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for ClientKey<[u32; 4]> {}
// SAFETY: as above.
unsafe impl Pod for AccessKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for AccessKey<[u32; 4]> {}
const _: () = assert!(size_of::<ClientKey<u32>>() == 8);
const _: () = assert!(size_of::<ClientKey<[u32; 4]>>() == 20);
const _: () = assert!(size_of::<AccessKey<u32>>() == 12);
const _: () = assert!(size_of::<AccessKey<[u32; 4]>>() == 24);

/// Bits of [`AccessKey::prefix_len`] that the service's number takes.
pub const SERVICE_BITS: u32 = 32;

/// Value of maps `access4` and `access6`: clients of this prefix may begin flows.
pub const ALLOW: u32 = 1;
/// Value of maps `access4` and `access6`: they may not.
pub const DENY: u32 = 2;

/// Value of maps `affinity4` and `affinity6`: the backend that a client returns to.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Affinity {
    /// The backend's number.
    pub backend: u32,
    /// [`crate::backend::Backend::generation`] at that time.
    pub generation: u32,
    /// Tick at which the client last began a flow, or was last seen to have one.
    pub last_seen: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Affinity>() == 16);

/// Value of maps `sources4` and `sources6`: how fast a client begins flows.
///
/// The generic cell rate algorithm (ITU-T I.371), which is a token bucket in one number: each flow
/// moves it on by the time between two flows at the full rate, and it may be ahead of the clock by
/// a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Source {
    /// Nanoseconds of `CLOCK_MONOTONIC` at which nothing of what it has begun counts any more.
    pub clear: u64,
}

/// Nanoseconds that [`Source::clear`] may be ahead of the clock: a burst is what the rate allows in
/// that time.
pub const BURST: u64 = 1_000_000_000;

impl Source {
    /// What becomes of `clear` when a flow begins at `now`, at most `rate` a second; `None`: it may
    /// not begin.
    #[inline(always)]
    #[must_use]
    pub const fn next(clear: u64, now: u64, rate: u32) -> Option<u64> {
        if rate == 0 {
            return Some(clear);
        }
        let step = BURST / rate as u64;
        let from = if clear > now { clear } else { now };
        // Whole steps, so that a burst is exactly the rate.
        if from - now > step * (rate as u64 - 1) {
            return None;
        }
        Some(from + step)
    }
}

/// What `mask` leaves of an address; both in network order.
#[inline(always)]
#[must_use]
pub fn masked<A: Address>(addr: A, mask: &[u32; 4]) -> A {
    let mut words = addr.widen();
    let mut i = 0;
    while i < A::WORDS {
        words[i] &= mask[i];
        i += 1;
    }
    A::narrow(&words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_a_second_of_the_rate_and_then_the_rate_holds() {
        for rate in [1, 3, 200, 1_000_000] {
            let now = 5_000_000_000;
            let (mut clear, mut begun) = (0, 0);
            while let Some(next) = Source::next(clear, now, rate) {
                clear = next;
                begun += 1;
            }
            assert_eq!(begun, rate);
            let step = BURST / u64::from(rate);
            assert_eq!(Source::next(clear, now + step - 1, rate), None);
            assert!(Source::next(clear, now + step, rate).is_some());
        }
    }

    #[test]
    fn a_quiet_client_gains_no_more_than_a_burst() {
        let now = 100 * BURST;
        assert_eq!(Source::next(3, now, 10), Some(now + BURST / 10));
        assert_eq!(Source::next(3, now, 0), Some(3), "no rate, no limit");
    }

    #[test]
    fn a_mask_leaves_the_first_bits() {
        let v4 = |text: &str| crate::addr::from_ipv4(text.parse().unwrap());
        let mask = [v4("255.255.255.0"), 0, 0, 0];
        assert_eq!(masked(v4("192.0.2.77"), &mask), v4("192.0.2.0"));
        let mask = [u32::MAX, u32::MAX, 0, 0];
        assert_eq!(masked([1, 2, 3, 4], &mask), [1, 2, 0, 0]);
    }
}
