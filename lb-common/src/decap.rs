//! What `sluice decap` and its program share: which packets lose their encapsulation, and what is
//! counted.

use bytemuck::{Pod, Zeroable};

/// Version of the maps `decap_*`, which live and die without those of the balancer.
pub const ABI_VERSION: u32 = 1;

/// UDP port of GUE (IANA), as Linux `fou` and the balancer use it.
pub const GUE_PORT: u16 = 6080;

/// Bit of a value in maps `decap_addrs4` and `decap_addrs6`: this host holds the address,
/// so a packet whose outer destination it is was sent to this host.
pub const HELD: u32 = 1 << 0;
/// Bit: packets whose inner destination it is are taken.
pub const VIP: u32 = 1 << 1;

/// The one record of map `decap_settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Settings {
    /// [`crate::abi::MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// UDP port that GUE arrives at, network order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

const _: () = assert!(size_of::<Settings>() == 16 && align_of::<Settings>() == 8);

/// Per-CPU element of map `decap_stats`. Bytes are those of the inner IP packet where there is one,
/// else of the outer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Counter>() == 16);

impl core::ops::AddAssign for Counter {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// Number of elements of map `decap_stats`; larger than the largest [`Outcome`].
pub const OUTCOME_SLOTS: u32 = 16;

/// What became of an encapsulated packet for this host: the index into map `decap_stats`.
///
/// A refused packet goes to the kernel as it is. Numbers are stable for ever; a retired one is never
/// given again.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// IP in IP, taken off.
    Ipip = 1,
    /// GUE, taken off.
    Gue = 2,
    /// Headers contradict each other or the packet's length, outside or inside.
    Malformed = 3,
    /// The outer packet is a fragment.
    Fragment = 4,
    /// The inner destination is no VIP of this host.
    NotVip = 5,
    /// A GUE header with options, of a control message or of another version.
    Unsupported = 6,
    /// The network marked congestion on the outer header, and the inner cannot carry the mark
    /// (RFC 6040 section 4.2).
    Congestion = 7,
    /// The kernel refused to move the packet's start.
    AdjustFailed = 8,
}

impl Outcome {
    /// Every outcome, in the order of its number.
    pub const ALL: [Self; 8] = [
        Self::Ipip,
        Self::Gue,
        Self::Malformed,
        Self::Fragment,
        Self::NotVip,
        Self::Unsupported,
        Self::Congestion,
        Self::AdjustFailed,
    ];

    /// The name operators see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ipip => "ipip",
            Self::Gue => "gue",
            Self::Malformed => "malformed",
            Self::Fragment => "fragment",
            Self::NotVip => "not_vip",
            Self::Unsupported => "unsupported",
            Self::Congestion => "congestion",
            Self::AdjustFailed => "adjust_failed",
        }
    }

    /// Whether the encapsulation was taken off.
    #[must_use]
    pub const fn taken(self) -> bool {
        matches!(self, Self::Ipip | Self::Gue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_distinct_and_fit_the_map() {
        for (i, a) in Outcome::ALL.iter().enumerate() {
            assert!((*a as u32) < OUTCOME_SLOTS && *a as u8 != 0);
            for b in &Outcome::ALL[i + 1..] {
                assert_ne!(*a as u8, *b as u8);
                assert_ne!(a.name(), b.name());
            }
        }
    }
}
