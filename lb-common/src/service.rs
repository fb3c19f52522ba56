//! Services: what a packet's destination is looked up as.

use crate::{
    addr::Address,
    hash::{FACTOR, pair},
};
use bytemuck::{Pod, Zeroable};

/// [`ServiceKey::port`] of a service that takes every port no other key names. No packet that is
/// balanced carries it.
pub const ANY_PORT: u16 = 0;

/// Added to [`ServiceKey::protocol`]: not what clients ask for, but where answers come from.
pub const ORIGIN: u16 = 1 << 8;

/// What a service is found by in maps `services4` and `services6`.
///
/// A service on a range of ports has a key for each of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct ServiceKey<A> {
    /// The VIP, network order.
    pub vip: A,
    /// Destination port, network order, or [`ANY_PORT`].
    pub port: u16,
    /// IP protocol number (6 TCP, 17 UDP), or that and [`ORIGIN`].
    pub protocol: u16,
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for ServiceKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for ServiceKey<[u32; 4]> {}
const _: () = assert!(size_of::<ServiceKey<u32>>() == 8);
const _: () = assert!(size_of::<ServiceKey<[u32; 4]>>() == 20);

impl<A: Address> ServiceKey<A> {
    /// The key that answers of a backend are known by which belong to flows that are not recorded; what it
    /// leads to is the backend's number. Address and port in network order.
    #[inline(always)]
    #[must_use]
    pub const fn origin(address: A, port: u16, protocol: u8) -> Self {
        Self {
            vip: address,
            port,
            protocol: ORIGIN | protocol as u16,
        }
    }

    /// The key of `vip:port/protocol`; `vip` and `port` in network order.
    #[inline(always)]
    #[must_use]
    pub const fn new(vip: A, port: u16, protocol: u8) -> Self {
        Self {
            vip,
            port,
            protocol: protocol as u16,
        }
    }
}

/// A port that a service listens on.
///
/// The number is written last and cleared first, so whoever finds the key and a number has both of
/// the same listener.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Listener<A> {
    /// What packets must match.
    pub key: ServiceKey<A>,
    /// The service's number in map `services`, or the backend's in map `backends` if the key is of an
    /// [`ORIGIN`]; 0: nobody listens, whatever the key says.
    pub service: u32,
    /// Zero; keeps the next one aligned.
    pub reserved: u32,
}

/// Listeners of one IPv4 bucket, and of one IPv6 bucket.
pub const LISTENERS4: usize = 4;
/// As [`LISTENERS4`].
pub const LISTENERS6: usize = 2;

/// An element of map `services4`: one cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Bucket4 {
    /// The listeners, with gaps.
    pub listeners: [Listener<u32>; LISTENERS4],
}

/// An element of map `services6`: one cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Bucket6 {
    /// The listeners, with gaps.
    pub listeners: [Listener<[u32; 4]>; LISTENERS6],
    /// Zero; fills the line.
    pub reserved: [u32; 2],
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for Bucket4 {}
// SAFETY: as above.
unsafe impl Pod for Bucket6 {}
const _: () = assert!(size_of::<Listener<u32>>() == 16);
const _: () = assert!(size_of::<Listener<[u32; 4]>>() == 28);
const _: () = assert!(size_of::<Bucket4>() == 64);
const _: () = assert!(size_of::<Bucket6>() == 64);

/// The two buckets that a key may be in.
///
/// Two choices keep buckets nearly evenly filled (Azar et al., "Balanced Allocations", 1994), and
/// a listener that finds both full moves another one over (Pagh and Rodler, "Cuckoo Hashing",
/// 2001). Multiplications: they are on the way of every packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places(u64);

impl Places {
    /// Of a key.
    #[inline(always)]
    #[must_use]
    pub fn of<A: Address>(key: &ServiceKey<A>) -> Self {
        let vip = key.vip.widen();
        let port = pair(0, key.port as u32 | (key.protocol as u32) << 16);
        let mut word = vip[0] as u64 | port;
        if A::WORDS > 1 {
            let high = pair(vip[0], vip[1]).wrapping_mul(FACTOR);
            let both = (high ^ pair(vip[2], vip[3])).wrapping_mul(FACTOR);
            word = (both >> 32) ^ both ^ port;
        }
        Self(word.wrapping_mul(FACTOR))
    }

    /// Where it is looked for first, of `buckets`.
    #[inline(always)]
    #[must_use]
    pub const fn first(self, buckets: u32) -> u32 {
        crate::hash::slot_of((self.0 >> 32) as u32, buckets)
    }

    /// Where it is looked for then.
    #[inline(always)]
    #[must_use]
    pub const fn second(self, buckets: u32) -> u32 {
        let again = (self.0 ^ self.0 >> 31).wrapping_mul(FACTOR);
        crate::hash::slot_of((again >> 32) as u32, buckets)
    }
}

/// How packets reach the backend; names in [`crate::names::FORWARD`].
pub mod forward {
    /// Full NAT: destination and source rewritten, the reply returns to the balancer.
    pub const NAT: u8 = 0;
    /// Destination rewritten; the backend's route to the client leads through the balancer.
    pub const DNAT: u8 = 1;
    /// Only MAC addresses rewritten; the backend answers the client itself.
    pub const DSR: u8 = 2;
    /// The packet inside another IP packet (RFC 2003, RFC 2473, RFC 4213).
    pub const IPIP: u8 = 3;
    /// The packet inside UDP: Generic UDP Encapsulation, variant 1.
    pub const GUE: u8 = 4;

    /// Whether addresses and ports are rewritten, so that replies come back to the balancer.
    #[inline(always)]
    #[must_use]
    pub const fn translates(forward: u8) -> bool {
        forward <= DNAT
    }

    /// Whether the packet is put inside another.
    #[inline(always)]
    #[must_use]
    pub const fn encapsulates(forward: u8) -> bool {
        forward >= IPIP
    }

    /// Bytes that a packet grows by on its way to a backend of `family`.
    #[must_use]
    pub const fn overhead(forward: u8, family: u8) -> u32 {
        if !encapsulates(forward) {
            return 0;
        }
        let ip = if family == crate::addr::FAMILY_V4 {
            20
        } else {
            40
        };
        let udp = if forward == GUE { 8 } else { 0 };
        ip + udp
    }
}

/// How a backend is picked for a new flow; names in [`crate::names::SCHEDULER`].
pub mod scheduler {
    /// Slot by hash of the 5-tuple in a Maglev table.
    pub const MAGLEV: u8 = 0;
    /// Slots in turn; the table holds the smooth weighted sequence.
    pub const ROUND_ROBIN: u8 = 1;
    /// Slot by hash of the client address in a Maglev table.
    pub const SOURCE_HASH: u8 = 2;
    /// The backend that holds the fewest connections for its weight; in turn among equals.
    pub const LEAST_CONNECTIONS: u8 = 3;
    /// Two slots at random; of the two the backend that holds fewer connections for its weight.
    pub const RANDOM: u8 = 4;

    /// Whether the packets of a flow alone tell its slot.
    #[inline(always)]
    #[must_use]
    pub const fn hashes(scheduler: u8) -> bool {
        matches!(scheduler, MAGLEV | SOURCE_HASH)
    }
}

/// What a new flow meets when no backend can take it; names in [`crate::names::ON_NO_BACKEND`].
pub mod on_no_backend {
    /// TCP is answered with RST; UDP is dropped.
    pub const RESET: u8 = 0;
    /// Dropped without an answer.
    pub const DROP: u8 = 1;
    /// Handed to the kernel.
    pub const PASS: u8 = 2;
}

/// What packets of an existing flow meet when its backend has died; names in
/// [`crate::names::ON_BACKEND_DOWN`].
pub mod on_backend_down {
    /// Sent on as before.
    pub const KEEP: u8 = 0;
    /// TCP is answered with RST and the flow forgotten; UDP picks again.
    pub const RESET: u8 = 1;
    /// Picks another backend.
    pub const RESCHEDULE: u8 = 2;
}

/// Flag of [`Service::flags`]: flows are not recorded, but follow the selection table, as long as
/// their slot is settled ([`crate::backend::Slot`]).
pub const SERVICE_STATELESS: u32 = 1 << 0;
/// Flag of [`Service::flags`]: more than one backend takes new flows, so a SYN that one does not
/// answer can go to another.
pub const SERVICE_PLURAL: u32 = 1 << 1;
/// Flag of [`Service::flags`]: a backend may have a limit ([`crate::backend::Load::max_connections`]).
pub const SERVICE_LIMITED: u32 = 1 << 4;
/// Flag of [`Service::flags`]: it is to be asked whether a client may begin a flow.
pub const SERVICE_GUARDED: u32 = 1 << 5;
/// Flag of [`Service::flags`]: maps `access4` and `access6` have prefixes of it. Only together with
/// [`SERVICE_GUARDED`].
pub const SERVICE_LISTED: u32 = 1 << 6;

/// One service: an element of map `services`, one cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Service {
    /// The selection table: first element of map `slots` in the low 32 bits, number of slots in
    /// the high 32 bits. Zero slots: no backend. Replaced with one 64-bit store.
    pub table: u64,
    /// The table that stateless flows followed until it was replaced by one of another size,
    /// packed likewise; 0 when no flow follows it any more.
    pub previous_table: u64,
    /// One slot for each backend that takes new flows, packed likewise: for schedulers that look at
    /// the backends themselves, and where one is full.
    pub members: u64,
    /// Bits of a client's address that affinity goes by, network order; IPv4 in word 0.
    pub affinity_mask: [u32; 4],
    /// Ticks for which a client returns to its backend after its last flow; 0: no affinity.
    pub affinity: u32,
    /// Ticks a TCP handshake may take before a repeated SYN is answered with RST; 0 for no limit.
    pub connect_timeout: u32,
    /// New flows a second that one client address may begin; 0: no limit.
    pub source_rate: u32,
    /// `SERVICE_*`.
    pub flags: u32,
    /// One of [`forward`].
    pub forward: u8,
    /// One of [`scheduler`].
    pub scheduler: u8,
    /// One of [`on_no_backend`].
    pub on_no_backend: u8,
    /// One of [`on_backend_down`].
    pub on_backend_down: u8,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Service>() == 64 && align_of::<Service>() == 8);

impl Service {
    /// Packs the place of a selection table for [`Service::table`].
    #[must_use]
    pub const fn pack_table(first: u32, slots: u32) -> u64 {
        (slots as u64) << 32 | first as u64
    }

    /// First slot and number of slots of the selection table, both of the same moment.
    #[inline(always)]
    #[must_use]
    pub fn table(&self) -> (u32, u32) {
        // SAFETY: a field of ours. Volatile, because the daemon replaces it while packets come.
        let table = unsafe { (&raw const self.table).read_volatile() };
        Self::unpack_table(table)
    }

    /// First slot and number of slots.
    #[inline(always)]
    #[must_use]
    pub const fn unpack_table(table: u64) -> (u32, u32) {
        (table as u32, (table >> 32) as u32)
    }
}

/// What becomes of the answers of a `dnat` service that does not record its flows: an element of map
/// `gateways`, by the service's number; one cache line. `docs/flow-state.md` has the argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Gateway {
    /// The VIP, which they are from, network order; IPv4 in word 0.
    pub vip: [u32; 4],
    /// Ethernet destination and source towards the router that clients come through: twelve bytes as they
    /// stand in the frame.
    pub l2: [u32; 3],
    /// Interface the router is behind.
    pub ifindex: u32,
    /// VLAN tags towards it, packed as in [`crate::vlan`].
    pub tags: u32,
    /// The VIP's port, network order.
    pub port: u16,
    /// Bytes of the largest IP packet that can be sent towards it; 0 if that is not known.
    pub mtu: u16,
    /// `GATEWAY_*`.
    pub flags: u32,
    /// Zero; fills the line.
    pub reserved: [u32; 5],
}

const _: () = assert!(size_of::<Gateway>() == 64);

/// Flag of [`Gateway::flags`]: the way to it is known.
pub const GATEWAY_RESOLVED: u32 = 1 << 0;

impl Gateway {
    /// Whether a client's packet that came by `ifindex` from a neighbour with the address in the first six
    /// bytes of `l2` is answered this way; `tags` are the VLAN tags it came with.
    #[inline(always)]
    #[must_use]
    pub const fn leads_back(&self, l2: &[u32; 3], ifindex: u32, tags: u32) -> bool {
        self.flags & GATEWAY_RESOLVED != 0
            && self.ifindex == ifindex
            && self.tags == tags
            && self.l2[0] == l2[0]
            && self.l2[1] as u16 == l2[1] as u16
    }
}

/// The round-robin position of one service: an element of map `cursors`.
///
/// In a map of its own, so that the line written with every new flow is not the line that every
/// packet reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Cursor {
    /// Number of flows placed so far; the next slot is this modulo the table's length.
    pub next: u64,
    /// Number of flows of a stateless service that were about to be recorded: raised before the
    /// flow can be found, so that whoever saw none, and this unchanged, knows that there is none.
    pub recorded: u64,
    /// Keeps each record in a cache line of its own.
    pub reserved: [u64; 6],
}

const _: () = assert!(size_of::<Cursor>() == 64);

/// Value of maps `vips4` and `vips6`, keyed by the address in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Vip {
    /// `VIP_*`.
    pub flags: u32,
}

/// Flag: ARP requests and neighbour solicitations for this address are answered, because no
/// kernel address would.
pub const VIP_ANSWER_ARP: u32 = 1 << 0;
/// Flag: an interface of this host has the address, so what is for no service may be for the host.
pub const VIP_HELD: u32 = 1 << 1;

/// Value of map `interfaces`, keyed by interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Interface {
    /// Ethernet address, as it stands in a frame.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet it can send; 0: not known.
    pub mtu: u16,
    /// Its place in map `links`.
    pub link: u32,
}

const _: () = assert!(size_of::<Interface>() == 12);

/// An element of map `links`: an interface, as flows name it by whose client it is. A place is given to another interface only when
/// there is none that had no interface yet, and its own is gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ClientLink {
    /// Bytes four to twelve of the Ethernet header of what leaves by it: two for the end of the destination, which are zero, and
    /// the interface's own address.
    pub source: [u32; 2],
    /// Interface index; 0: nobody has this place.
    pub ifindex: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<ClientLink>() == 16);

/// Elements of map `links`. The first is [`crate::flow::THROUGH_GATEWAY`].
pub const LINKS: u32 = 1024;

impl ClientLink {
    /// Of an interface.
    #[must_use]
    pub const fn new(ifindex: u32, mac: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = mac;
        Self {
            source: [
                u32::from_ne_bytes([0, 0, a, b]),
                u32::from_ne_bytes([c, d, e, f]),
            ],
            ifindex,
            reserved: 0,
        }
    }

    /// The interface's own Ethernet address.
    #[must_use]
    pub const fn mac(&self) -> [u8; 6] {
        let [_, _, a, b] = self.source[0].to_ne_bytes();
        let [c, d, e, f] = self.source[1].to_ne_bytes();
        [a, b, c, d, e, f]
    }
}
