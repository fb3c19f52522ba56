//! The address filter: the first thing that is asked of a packet.
//!
//! Most packets of a host that also does other work are not for the balancer. Map
//! `address_filter` is a table of [`LANES`] one-byte lanes indexed by a hash of the destination
//! address. A lane without the bits of those proves that no VIP and no NAT source address hashes to it, so the
//! packet passes after one array access and no hash lookup. A lane that is set proves nothing;
//! the lookups behind it decide.

use crate::{addr::Address, hash};

/// Number of lanes. Eight lanes share one 64-bit element of the map.
pub const LANES: u32 = 65536;
/// Number of elements of map `address_filter`.
pub const ELEMENTS: u32 = LANES / 8;

/// Lane bit: the address may be a VIP.
pub const LANE_VIP: u8 = 1 << 0;
/// Lane bit: the address may be one that `nat` sends from.
pub const LANE_NAT_SOURCE: u8 = 1 << 1;
/// Lane bit: a service may take every port of the address ([`crate::service::ANY_PORT`]).
pub const LANE_ANY_PORT: u8 = 1 << 2;
/// Lane bit: a service of the address may be stateless
/// ([`crate::service::SERVICE_STATELESS`]).
pub const LANE_STATELESS: u8 = 1 << 4;
/// Lane bit: the address may be a backend whose replies to clients come through here (`dnat`).
/// Asked of a packet's source.
pub const LANE_BACKEND: u8 = 1 << 3;
/// Lane bit: the address may be a backend some of whose answers belong to flows that are not recorded
/// ([`crate::service::Gateway`]). Asked of a packet's source.
pub const LANE_ORIGIN: u8 = 1 << 5;
/// Lane bit: the address may be one of this host's own, whose connections to backends are no clients'.
pub const LANE_HELD: u8 = 1 << 6;
/// The bits that mean nothing in a packet's destination when it is asked whether the packet is ours.
pub const LANES_OF_OTHERS: u8 = LANE_BACKEND | LANE_ORIGIN | LANE_HELD;

/// The lane of `address`, below [`LANES`].
#[inline(always)]
#[must_use]
pub fn lane_of<A: Address>(address: A) -> u32 {
    let words = address.widen();
    // Multiplicative hashing (Knuth, TAOCP 6.4): the high bits of the product depend on all bits
    // of the key. IPv4 has only one word.
    if A::WORDS > 1 {
        let high = hash::pair(words[0], words[1]).wrapping_mul(hash::FACTOR);
        let both = (high ^ hash::pair(words[2], words[3])).wrapping_mul(hash::FACTOR);
        return (both >> 48) as u32;
    }
    words[0].wrapping_mul(0x9e37_79b1) >> 16
}

/// Element of the map and shift within it for `lane`.
#[inline(always)]
#[must_use]
pub const fn place(lane: u32) -> (u32, u32) {
    (lane >> 3, (lane & 7) * 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lanes_stay_in_range(v4: u32, v6: [u32; 4]) {
            prop_assert!(lane_of(v4) < LANES);
            prop_assert!(lane_of(v6) < LANES);
            prop_assert!(place(lane_of(v4)).0 < ELEMENTS);
        }
    }

    #[test]
    fn neighbouring_addresses_spread() {
        let lane = |host: u8| lane_of(u32::from_ne_bytes([10, 0, 0, host]));
        let mut lanes = [0u32; 256];
        for host in 0..=255u8 {
            lanes[usize::from(host)] = lane(host);
        }
        lanes.sort_unstable();
        let distinct = 1 + lanes.windows(2).filter(|w| w[0] != w[1]).count();
        assert!(distinct > 250, "{distinct} of 256 lanes");
    }
}
