//! The version of the map layout and the settings record that carries it.

use bytemuck::{Pod, Zeroable};

/// Version of everything in this crate that is visible through a BPF map.
///
/// Raise it with every change of a map's key, value or meaning. A daemon adopts pinned maps only
/// when the version they carry equals its own.
pub const ABI_VERSION: u32 = 11;

/// Marks [`Settings::magic`]: the bytes `SLUICE` and a zero word, so that a foreign map is told
/// apart from an old one.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SLUICE\0\0");

/// Units of the data plane's coarse clock in one second.
///
/// A tick is 2^20 ns (1.048576 ms) of `CLOCK_MONOTONIC`, counted in a `u32` that wraps after 52
/// days; compare ticks with [`ticks_since`].
pub const TICKS_PER_SECOND: u32 = 953;

/// Most addresses of one family that `nat` may send from: elements of maps `nat_sources4` and
/// `nat_sources6`. Each has a source port range of its own towards every backend.
pub const NAT_SOURCES: u32 = 255;

/// Converts nanoseconds of `CLOCK_MONOTONIC` to ticks.
#[inline(always)]
#[must_use]
pub const fn ticks_from_ns(ns: u64) -> u32 {
    (ns >> 20) as u32
}

/// Ticks that have passed from `earlier` to `now`, across a wrap of the counter; 0 if `earlier`
/// is the later one, as it may be when another CPU has just written it. Good for 26 days.
#[inline(always)]
#[must_use]
pub const fn ticks_since(now: u32, earlier: u32) -> u32 {
    let passed = now.wrapping_sub(earlier);
    if passed > u32::MAX / 2 { 0 } else { passed }
}

/// The one record of map `settings`: what is common to all packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Settings {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`] of the daemon that made the maps.
    pub abi_version: u32,
    /// First source port that `nat` may use, host order, inclusive.
    pub nat_port_first: u16,
    /// Last source port that `nat` may use, host order, inclusive.
    pub nat_port_last: u16,
    /// Seed of the port search and of the places in the flow table, drawn at load so that neither is
    /// predictable from outside.
    pub nat_port_seed: u32,
    /// First bits of the source address of an encapsulation in IPv4, network order; used where
    /// the mask below is not zero.
    pub encap_source4: u32,
    /// Bits of that address that carry the flow's hash, network order; 0: the balancer's own
    /// address is the source.
    pub encap_mask4: u32,
    /// First bits of the source address of an encapsulation in IPv6, network order.
    pub encap_source6: [u32; 4],
    /// Bits of its last word that carry the flow's hash, network order; 0: as for IPv4.
    pub encap_mask6: u32,
    /// UDP destination port of `gue`, network order.
    pub gue_port: u16,
    /// Elements of map `nat_sources4` in use; 0: each backend's own [`crate::backend::Backend::source`].
    pub nat_sources4: u8,
    /// Elements of map `nat_sources6` in use; 0: as for IPv4.
    pub nat_sources6: u8,
    /// Flows a second that each CPU may record; beyond that new ones are placed without a record
    /// where the forward mode can do that. 0: no limit.
    pub new_flows: u32,
    /// Sets of maps `flows4` and `flows6`: see [`crate::flow_table`].
    pub flow_sets: u32,
    /// Zero; room for what comes next without moving what is here.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Settings>() == 64 && align_of::<Settings>() == 8);

/// Map `pressure`: how fast flows begin on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Pressure {
    /// The window of time that is counted.
    pub window: u32,
    /// New flows in it.
    pub begun: u32,
    /// Flows that began while there were too many: see [`Settings::new_flows`].
    pub flows: u64,
    /// Established connections and UDP flows that had to make room for others: see [`crate::flow_table::is_live`].
    pub displaced: u64,
}

const _: () = assert!(size_of::<Pressure>() == 24);

/// Of several CPUs only the flows and the displaced add up to something.
impl core::ops::AddAssign for Pressure {
    fn add_assign(&mut self, other: Self) {
        self.flows += other.flows;
        self.displaced += other.displaced;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_wrap_and_never_run_backwards() {
        assert_eq!(ticks_since(7, 5), 2);
        assert_eq!(ticks_since(1, u32::MAX), 2);
        assert_eq!(ticks_since(5, 6), 0);
    }
}
