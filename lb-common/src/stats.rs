//! Counters and drop reasons.

use bytemuck::{Pod, Zeroable};

/// Per-CPU counters of one service or one backend: element of maps `service_stats` and
/// `backend_stats`. Bytes are those of the IP packet, as IPVS counts them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counters {
    /// Flows placed.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Packets dropped or refused, whatever the reason (map `drops` has the reasons).
    pub drops: u64,
}

const _: () = assert!(size_of::<Counters>() == 48);

impl core::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.packets_in += other.packets_in;
        self.bytes_in += other.bytes_in;
        self.packets_out += other.packets_out;
        self.bytes_out += other.bytes_out;
        self.drops += other.drops;
    }
}

/// Number of elements of map `drops`; larger than the largest [`DropReason`].
pub const DROP_SLOTS: u32 = 64;

/// Why a packet was not forwarded: the index into the per-CPU map `drops`.
///
/// Numbers are stable for ever; a retired one is never given again.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Header fields of a packet for a VIP contradict each other or the packet's length.
    Malformed = 1,
    /// An IP fragment, which cannot be placed.
    Fragment = 2,
    /// The service has no backend that takes new flows.
    NoBackend = 3,
    /// The backend's next hop has no Ethernet address yet.
    NoNeighbour = 4,
    /// Larger than the outgoing interface can send.
    TooBig = 5,
    /// TTL or hop limit would reach zero.
    TtlExceeded = 6,
    /// The flow table refused a new entry.
    TableFull = 7,
    /// No free source port towards the backend.
    PortExhausted = 8,
    /// Above a configured rate.
    RateLimited = 9,
    /// Refused by an allow or deny list.
    Denied = 10,
    /// The kernel refused to grow or shrink the packet.
    AdjustFailed = 11,
    /// A TCP packet without SYN that belongs to no known flow.
    NoFlow = 12,
    /// The flow's backend has died and the service resets its flows.
    BackendDown = 13,
    /// The backend did not complete the handshake in the configured time.
    ConnectTimeout = 14,
    /// The outgoing interface is not one the balancer may redirect to.
    NoInterface = 15,
    /// For a loopback address, though it comes from another host.
    Martian = 16,
    /// Every backend of the service that takes new flows holds as many as it may.
    BackendFull = 17,
    /// The backend would be its own client, which `dnat` cannot do.
    Hairpin = 18,
    /// RST of a backend for a connection that its client will try again, with another backend.
    Refused = 19,
}

impl DropReason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 19] = [
        Self::Malformed,
        Self::Fragment,
        Self::NoBackend,
        Self::NoNeighbour,
        Self::TooBig,
        Self::TtlExceeded,
        Self::TableFull,
        Self::PortExhausted,
        Self::RateLimited,
        Self::Denied,
        Self::AdjustFailed,
        Self::NoFlow,
        Self::BackendDown,
        Self::ConnectTimeout,
        Self::NoInterface,
        Self::Martian,
        Self::BackendFull,
        Self::Hairpin,
        Self::Refused,
    ];

    /// The name operators see in statistics and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Fragment => "fragment",
            Self::NoBackend => "no_backend",
            Self::NoNeighbour => "no_neighbour",
            Self::TooBig => "too_big",
            Self::TtlExceeded => "ttl_exceeded",
            Self::TableFull => "table_full",
            Self::PortExhausted => "port_exhausted",
            Self::RateLimited => "rate_limited",
            Self::Denied => "denied",
            Self::AdjustFailed => "adjust_failed",
            Self::NoFlow => "no_flow",
            Self::BackendDown => "backend_down",
            Self::ConnectTimeout => "connect_timeout",
            Self::NoInterface => "no_interface",
            Self::Martian => "martian",
            Self::BackendFull => "backend_full",
            Self::Hairpin => "hairpin",
            Self::Refused => "refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_distinct_and_fit_the_map() {
        for (i, a) in DropReason::ALL.iter().enumerate() {
            assert!((*a as u32) < DROP_SLOTS);
            for b in &DropReason::ALL[i + 1..] {
                assert_ne!(*a as u8, *b as u8);
                assert_ne!(a.name(), b.name());
            }
        }
    }
}
