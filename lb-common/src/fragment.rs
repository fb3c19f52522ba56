//! Fragments: what the data plane remembers of a datagram whose first fragment it has placed.

use crate::{abi, addr::Address};
use bytemuck::{Pod, Zeroable};

/// Key of maps `fragments4` and `fragments6`: what all fragments of a datagram have in common
/// (RFC 791 section 3.2, RFC 8200 section 4.5).
///
/// Aligned to 8 bytes, so that it can be copied in double words on the BPF stack.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Zeroable)]
pub struct FragmentKey<A> {
    /// Source address, network order.
    pub src: A,
    /// Destination address, network order.
    pub dst: A,
    /// Identification as it stands in the header: 16 bits in IPv4, 32 in IPv6.
    pub id: u32,
    /// IPv4: IP protocol number. IPv6: 0.
    pub protocol: u32,
}

/// Value of maps `fragments4` and `fragments6`: where the first fragment went, and so the rest.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Datagram<A> {
    /// Source address its fragments leave with, network order.
    pub src: A,
    /// Destination address its fragments leave with, network order.
    pub dst: A,
    /// The backend's number in map `backends`.
    pub backend: u32,
    /// [`crate::backend::Backend::generation`] at the time of the first fragment.
    pub generation: u32,
    /// The service's number in map `services`.
    pub service: u32,
    /// Ethernet destination and source towards the client. Used from the backend.
    pub l2: [u32; 3],
    /// Interface towards the client. Used from the backend.
    pub ifindex: u32,
    /// VLAN tags towards the client, packed as in [`crate::vlan`]. Used from the backend.
    pub tags: u32,
    /// Tick of the first fragment.
    pub created: u32,
    /// What to add (ones' complement) to the sum of the IPv4 header when the addresses change.
    pub l3_delta: u16,
    /// `DIRECTION_*` of the flow.
    pub direction: u8,
    /// One of [`crate::service::forward`].
    pub forward: u8,
    /// The first fragment's hash of the flow, for the encapsulation of the others.
    pub hash: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for FragmentKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for FragmentKey<[u32; 4]> {}
// SAFETY: as above.
unsafe impl Pod for Datagram<u32> {}
// SAFETY: as above.
unsafe impl Pod for Datagram<[u32; 4]> {}
const _: () = assert!(size_of::<FragmentKey<u32>>() == 16);
const _: () = assert!(size_of::<FragmentKey<[u32; 4]>>() == 40);
const _: () = assert!(size_of::<Datagram<u32>>() == 56);
const _: () = assert!(size_of::<Datagram<[u32; 4]>>() == 80);

/// Ticks after which a datagram is forgotten: Linux waits as long for the rest of one
/// (`net.ipv4.ipfrag_time`), so a later fragment could complete nothing.
pub const LIFETIME: u32 = 30 * abi::TICKS_PER_SECOND;

impl<A: Address> Datagram<A> {
    /// Whether it is to be forgotten.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(&self, now: u32) -> bool {
        abi::ticks_since(now, self.created) >= LIFETIME
    }
}
