//! Health checks that take the traffic's way: in `dsr`, `ipip` and `gue` a check is to reach the
//! VIP on one certain backend.
//!
//! The daemon's socket connects to the backend's own address and marks its packets. On their way
//! out the mark tells what becomes of them; what answers is led back to the socket.

use bytemuck::{Pod, Zeroable};

/// Bits of a packet's mark that number the check's target: element of map `probe_targets`. The bits
/// above are [`crate::local::LocalSettings::probe_mark`].
pub const TARGET_BITS: u32 = 20;
/// The mask of those bits.
pub const TARGET_MASK: u32 = (1 << TARGET_BITS) - 1;

/// One element of map `probe_targets`: what becomes of a check's packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ProbeTarget {
    /// The VIP, network order; IPv4 in word 0.
    pub vip: [u32; 4],
    /// The backend's address, which the socket is connected to, network order.
    pub backend: [u32; 4],
    /// Of both: [`crate::addr::FAMILY_V4`] or [`crate::addr::FAMILY_V6`]; 0: no target.
    pub family: u8,
    /// One of [`crate::service::forward`].
    pub forward: u8,
    /// Zero.
    pub reserved: u16,
}

const _: () = assert!(size_of::<ProbeTarget>() == 36);
