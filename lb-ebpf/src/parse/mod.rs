//! Parse: from bytes to addresses, ports and flags.
//!
//! In two steps, so that a packet for somebody else costs only the first: [`network`] reads the
//! addresses, [`transport`] judges the headers and reads the rest.

pub mod ethernet;
pub mod ipv4;
pub mod ipv6;
mod transport;

pub use ethernet::{Link, parse as ethernet};
pub use transport::{Packet, TcpFlags, transport, unsound};

use crate::{
    family::Family,
    frame::{Cursor, Frame},
    verdict::Verdict,
};

/// IP protocol numbers (IANA).
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
}

/// The network header, as far as anybody's packet is looked at.
pub struct Network<F: Family> {
    /// Its first byte.
    pub header: Cursor,
    /// Source address.
    pub src: F::Addr,
    /// Destination address.
    pub dst: F::Addr,
}

/// What is behind the network header.
pub struct Located {
    /// First byte of the transport header; nothing is checked behind it.
    pub header: Cursor,
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes of the IP packet, headers included.
    pub packet_len: u32,
    /// Bytes from the transport header to the end of the IP packet.
    pub transport_len: u32,
    /// Whether more of it comes in later fragments: then there is less of it here than its own
    /// headers say.
    pub first_fragment: bool,
}

/// Why a packet cannot be balanced.
pub enum Fault {
    /// Headers contradict each other or the frame.
    Malformed,
    /// A fragment that has no ports.
    Fragment,
}

/// Reads the addresses. A frame too short for them is the kernel's to judge.
#[inline(always)]
pub fn network<F: Family>(frame: &Frame, link: &Link) -> Result<Network<F>, Verdict> {
    F::network(frame, link).ok_or(Verdict::PASS)
}
