//! What the program that measures (`lb-ebpf/bench`) shares with `cargo xtask bench`. Nothing of it is in the balancer.

use bytemuck::{Pod, Zeroable};

/// Words of a packet's headers that are restored before each run of the program under test: Ethernet, IPv6 and TCP, rounded up.
pub const HEADER_WORDS: usize = 10;

/// Bits of a flow's number that become the client's port; the others are added to its address.
pub const PORT_BITS: u32 = 14;

/// The client's first port, host order. [`PORT_BITS`] follow.
pub const FIRST_PORT: u16 = 0x4000;

/// The one record of map `case`: which packets the program under test gets.
///
/// A flow's number is `first + (next * stride) % (mask + 1)`; with an odd stride every number comes once in `mask + 1` packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Case {
    /// Packets so far; counted by the program.
    pub next: u64,
    /// How far apart the numbers of successive packets are; odd.
    pub stride: u64,
    /// Number of flows less one; the number of flows is a power of two.
    pub mask: u64,
    /// The lowest flow number.
    pub first: u64,
    /// Flow numbers are spread over this many successive VIPs, a power of two, less one.
    pub vip_mask: u32,
    /// Bytes of the packet.
    pub length: u32,
    /// The last word of the client's address, host order, for flow numbers below 2^[`PORT_BITS`].
    pub client: u32,
    /// The last word of the first VIP, host order.
    pub vip: u32,
    /// Sum of the IPv4 header's half words as they stand in the packet, without checksum and without the two words above.
    pub ip_sum: u32,
    /// The same of pseudo-header and transport header, also without the client's port.
    pub transport_sum: u32,
    /// 1 if the program under test makes the packet longer at its head, 0 if at its tail; what shrinks, shrinks at its tail.
    pub grows_at_head: u32,
    /// One of [`stamp`].
    pub stamp: u32,
    /// The headers of a packet of flow 0; its checksums do not matter.
    pub headers: [u64; HEADER_WORDS],
    /// Packets that could not be prepared; counted by the program.
    pub failures: u64,
}

/// What makes one packet differ from the next.
pub mod stamp {
    /// Nothing: headers are restored as they are.
    pub const NONE: u32 = 0;
    /// TCP from the client with this number.
    pub const TCP: u32 = 1;
    /// UDP from the client with this number.
    pub const UDP: u32 = 2;
    /// TCP with the addresses and ports of an element of map `tuples`.
    pub const TUPLE: u32 = 3;
}

/// Element of map `tuples`: addresses and ports that no arithmetic leads to, with their checksums. Everything in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Tuple {
    /// Source address; the first word alone for IPv4.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Checksum of the IPv4 header.
    pub ip_checksum: u16,
    /// Checksum of the TCP segment.
    pub transport_checksum: u16,
}
