//! The host's own sockets: clients on the balancer, and its health checks.

use bytemuck::{Pod, Zeroable};

/// The one record of map `local_settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LocalSettings {
    /// Cookie of the network namespace whose clients are served; 0: none are. The programs are
    /// called for sockets of every namespace.
    pub netns_cookie: u64,
    /// First bits of the mark of packets of health checks, see [`crate::probe`]; 0: there are none.
    pub probe_mark: u32,
    /// Zero.
    pub reserved: u32,
}

/// Key of map `local_peers`: a socket, and one of the two addresses of whom it talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct PeerKey {
    /// The kernel's cookie of the socket, never given twice.
    pub socket: u64,
    /// Address, network order; IPv4 in word 0.
    pub addr: [u32; 4],
    /// Port, network order.
    pub port: u16,
    /// [`crate::addr::FAMILY_V4`] or [`crate::addr::FAMILY_V6`].
    pub family: u8,
    /// [`PEER_VIP`] or [`PEER_BACKEND`]: whose address it is.
    pub whose: u8,
    /// Zero.
    pub reserved: u32,
}

/// [`PeerKey::whose`]: the address is the VIP that the application used; the value is the backend.
/// Only for UDP, where each datagram may name its own destination.
pub const PEER_VIP: u8 = 0;
/// [`PeerKey::whose`]: the address is the backend that the kernel knows; the value is the VIP.
pub const PEER_BACKEND: u8 = 1;

/// Value of map `local_peers`: the other address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Peer {
    /// Address, network order; IPv4 in word 0.
    pub addr: [u32; 4],
    /// Number of the backend.
    pub backend: u32,
    /// [`crate::backend::Backend::generation`] of the backend when it was picked.
    pub generation: u16,
    /// Port, network order.
    pub port: u16,
}

const _: () = assert!(size_of::<PeerKey>() == 32 && align_of::<PeerKey>() == 8);
const _: () = assert!(size_of::<Peer>() == 24);
