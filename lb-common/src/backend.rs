//! Backends, and the slots of the selection tables that name them.

use bytemuck::{Pod, Zeroable};

/// The backend number that stands for "none". Backend 0 of map `backends` is never used.
pub const NO_BACKEND: u32 = 0;

/// Flag: the next hop is resolved, packets can be sent.
pub const BACKEND_RESOLVED: u8 = 1 << 0;
/// Flag: the backend may keep its flows. Cleared when it is found dead; a SYN on one of its flows
/// then picks again.
pub const BACKEND_ALIVE: u8 = 1 << 1;

/// [`Backend::ifindex`] of a backend on the balancer's own host: the kernel delivers its packets.
pub const LOCAL: u32 = 0;

/// One backend of one service: an element of map `backends`, one cache line.
///
/// Two services that share a server have a backend each, so counters and state never mix.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Backend {
    /// Address, network order; IPv4 in word 0.
    pub addr: [u32; 4],
    /// The balancer's source address towards this backend, in `nat` and of an encapsulation,
    /// network order.
    pub source: [u32; 4],
    /// Ethernet destination and source towards the next hop: twelve bytes as they stand in the
    /// frame.
    pub l2: [u32; 3],
    /// Interface the next hop is behind, or [`LOCAL`].
    pub ifindex: u32,
    /// Number of the service it belongs to.
    pub service: u32,
    /// VLAN tags towards the next hop, packed as in [`crate::vlan`].
    pub tags: u32,
    /// Raised each time the element is given to another backend, so that a flow of the former one
    /// is told apart. A flow belongs here only if its generation is the same.
    pub generation: u16,
    /// Bytes of the largest packet of a client that can be sent towards it, which leaves room for
    /// what the forward mode adds; 0 if that is not known.
    pub mtu: u16,
    /// Port, network order; 0: packets keep the port they were sent to.
    pub port: u16,
    /// [`crate::addr::FAMILY_V4`] or [`crate::addr::FAMILY_V6`].
    pub family: u8,
    /// `BACKEND_*`.
    pub flags: u8,
}

const _: () = assert!(size_of::<Backend>() == 64 && align_of::<Backend>() == 4);

/// One slot of a selection table: an element of map `slots`.
///
/// Written with one 64-bit store, so a reader sees both numbers of the same moment.
///
/// In a service whose flows are not recorded ([`crate::service::SERVICE_STATELESS`]) the two
/// numbers tell what becomes of a packet; `docs/flow-state.md` has the argument.
///
/// | `previous` | the slot is | a packet of a flow that is not recorded belongs to |
/// | --- | --- | --- |
/// | equal to `backend` | settled: no flow of it needs a record to be found | `backend` |
/// | another backend | changed | `previous`, unless it begins a flow |
/// | [`NO_BACKEND`] | closing: some flows of it are recorded | `backend` |
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Slot {
    /// The backend that new flows of this slot go to, or [`NO_BACKEND`].
    pub backend: u32,
    /// The backend that owned the slot before; equal to `backend` when the slot is settled.
    pub previous: u32,
}

const _: () = assert!(size_of::<Slot>() == 8);

impl Slot {
    /// A slot of a backend whose flows are all its own.
    #[inline(always)]
    #[must_use]
    pub const fn settled(backend: u32) -> Self {
        Self {
            backend,
            previous: backend,
        }
    }

    /// Whether no flow of this slot needs a record to be found.
    #[inline(always)]
    #[must_use]
    pub const fn is_settled(self) -> bool {
        self.backend == self.previous
    }

    /// The backend that flows belong to which are not recorded.
    #[inline(always)]
    #[must_use]
    pub const fn unrecorded(self) -> u32 {
        if self.previous == NO_BACKEND {
            self.backend
        } else {
            self.previous
        }
    }
}

/// What has become of the connections of one backend, and what limits them: an element of map `backend_load`.
///
/// Shared by all CPUs and changed atomically, only when a connection changes state. The counters of
/// connections only grow, so that whoever reads them twice knows how much has changed in between; what
/// there is now are differences of two.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Load {
    /// Connections that were recorded: TCP connections, and UDP flows.
    pub begun: u64,
    /// Of these, those that are recorded no more.
    pub ended: u64,
    /// Those that have become active: established TCP connections, and UDP flows.
    pub opened: u64,
    /// Those that were active, and are no more.
    pub closed: u64,
    /// Those that the backend need not carry any more: one side has begun to close them, or they have
    /// ended.
    pub released: u64,
    /// Weight in force: 0 takes no new flows.
    pub weight: u32,
    /// Most flows it may hold; 0: no limit.
    pub max_connections: u32,
    /// SYNs that were repeated because the backend did not answer.
    pub retries: u64,
    /// Connections that the backend reset before they were established.
    pub resets: u64,
}

const _: () = assert!(size_of::<Load>() == 64);

/// The difference of two counters. Below zero for a moment, when one is read and then the other
/// changes.
#[inline(always)]
const fn difference(more: u64, less: u64) -> u64 {
    let difference = more.wrapping_sub(less);
    if difference >> 63 == 0 { difference } else { 0 }
}

impl Load {
    /// Established TCP connections, and UDP flows.
    #[must_use]
    pub const fn active(&self) -> u64 {
        difference(self.opened, self.closed)
    }

    /// TCP connections being opened or closed.
    #[must_use]
    pub const fn inactive(&self) -> u64 {
        difference(self.recorded(), self.active())
    }

    /// All connections that are recorded.
    #[must_use]
    pub const fn recorded(&self) -> u64 {
        difference(self.begun, self.ended)
    }

    /// Connections that neither side has begun to close, what the backend has to carry, from the counters of that
    /// name.
    #[inline(always)]
    #[must_use]
    pub const fn held(begun: u64, released: u64) -> u64 {
        difference(begun, released)
    }

    /// What [`Load::weight`] and [`Load::max_connections`] are together, so that they can be
    /// written with one 64-bit store that disturbs no counter.
    #[must_use]
    pub const fn pack_share(weight: u32, max_connections: u32) -> u64 {
        let ([a, b, c, d], [e, f, g, h]) = (weight.to_ne_bytes(), max_connections.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }

    /// Whether a backend that holds `held` connections has no room for another.
    #[inline(always)]
    #[must_use]
    pub const fn is_full(held: u64, max_connections: u32) -> bool {
        max_connections != 0 && held >= max_connections as u64
    }

    /// Whether `held` connections for `weight` are a smaller share than `other_held` for
    /// `other_weight`. Counts below 2^32 and weights that fit a configuration do not overflow.
    #[inline(always)]
    #[must_use]
    pub const fn is_less_loaded(
        (held, weight): (u64, u32),
        (other_held, other_weight): (u64, u32),
    ) -> bool {
        held.wrapping_mul(other_weight as u64) < other_held.wrapping_mul(weight as u64)
    }
}
