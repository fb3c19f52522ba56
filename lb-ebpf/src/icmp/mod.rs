//! ICMP (RFC 792) and ICMPv6 (RFC 4443): a VIP answers its ping, and errors about our packets
//! reach those who must know.

pub mod answer;
pub mod error;

use crate::{
    family::{Family, HOPS},
    frame::Frame,
    lookup,
    parse::{self, Fault, Link, Located, Network},
    rewrite,
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::csum;
use network_types::icmp::Icmpv4Hdr;

/// Answers an echo request for a VIP in place and carries errors on; anything else is the
/// kernel's.
///
/// Type, code and checksum have the same place in both families. A VIP that the kernel holds too
/// is answered here as well: the answer is the same and cheaper.
#[inline(always)]
pub fn answer<F: Family>(
    frame: &Frame,
    link: &Link,
    network: &Network<F>,
    located: &Located,
) -> Verdict {
    let Some(header) = frame.check(located.header, Icmpv4Hdr::LEN) else {
        return Verdict::PASS;
    };
    if located.first_fragment {
        // Only the whole of it has the checksum that an answer needs.
        return parse::unsound(network, Fault::Fragment);
    }
    if located.transport_len < Icmpv4Hdr::LEN as u32 {
        return Verdict::PASS;
    }
    let request = u16::from_ne_bytes([F::ECHO_REQUEST, 0]);
    let reply = u16::from_ne_bytes([F::ECHO_REPLY, 0]);
    if F::is_icmp_error(header.read(0)) {
        return error::carry_on::<F>(frame, link);
    }
    if lookup::vip::<F>(&network.dst).is_none() {
        return Verdict::PASS;
    }
    if header.read::<u16>(0) != request {
        return F::answer_icmp(frame, link, network);
    }
    let delta = csum::fold(u64::from(!request) + u64::from(reply));
    let check: u16 = header.read(offset_of!(Icmpv4Hdr, check));
    header.write(0, reply);
    header.write(offset_of!(Icmpv4Hdr, check), csum::update(check, delta));
    // Exchanged addresses leave every sum as it is.
    F::readdress(network.header, network.dst, network.src, 0, HOPS);
    rewrite::exchange_link(link);
    Verdict::TRANSMIT
}
