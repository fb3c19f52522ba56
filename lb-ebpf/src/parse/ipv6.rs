//! IPv6 (RFC 8200) and the extension headers that may precede TCP and UDP.

use super::{Fault, Link, Located, Network};
use crate::{family::V6, frame::Frame};
use core::mem::offset_of;
use network_types::ip::Ipv6Hdr;

// Next-header values (IANA).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Bytes of a fragment header.
pub const FRAGMENT_LEN: usize = 8;
/// Fragment offset, in the third and fourth byte of a fragment header.
pub const OFFSET: u16 = 0xfff8_u16.to_be();

/// More-fragments flag beside it.
const MORE: u16 = 1_u16.to_be();

/// Extension headers that are walked over; RFC 8200 section 4.1 orders no more than four before
/// the transport header.
const MAX_EXTENSIONS: u32 = 4;

/// Where the transport header lies at the most: behind Ethernet, two tags, and as many extension
/// headers, each as long as it can be.
const MAX_OFFSET: u32 = 22 + Ipv6Hdr::LEN as u32 + MAX_EXTENSIONS * 2048;

/// Reads the addresses.
#[inline(always)]
pub fn network(frame: &Frame, link: &Link) -> Option<Network<V6>> {
    let header = frame.check(link.payload, Ipv6Hdr::LEN)?;
    Some(Network {
        header,
        src: header.read_address(offset_of!(Ipv6Hdr, src_addr)),
        dst: header.read_address(offset_of!(Ipv6Hdr, dst_addr)),
    })
}

/// Finds the transport header behind the extension headers, also that of a first fragment.
#[inline(always)]
pub fn locate_first(frame: &Frame, network: &Network<V6>) -> Result<Located, Fault> {
    let header = network.header;
    let version_class: u8 = header.read(0);
    let payload_len = u32::from(u16::from_be(header.read(offset_of!(Ipv6Hdr, payload_len))));
    let packet_len = payload_len + Ipv6Hdr::LEN as u32;
    if version_class >> 4 != 6 || !frame.holds(header, packet_len as usize) {
        return Err(Fault::Malformed);
    }
    let mut located = Located {
        header: header.skip(Ipv6Hdr::LEN),
        protocol: header.read(offset_of!(Ipv6Hdr, next_hdr)),
        packet_len,
        transport_len: payload_len,
        first_fragment: false,
    };
    if !is_extension(located.protocol) {
        return Ok(located);
    }
    for _ in 0..MAX_EXTENSIONS {
        if located.protocol == FRAGMENT || !is_extension(located.protocol) {
            break;
        }
        // Length in units of 8 bytes, the first not counted (RFC 8200 section 4.3).
        let extension = frame.check(located.header, 8).ok_or(Fault::Malformed)?;
        let len = (u32::from(extension.read::<u8>(1)) + 1) * 8;
        if len > located.transport_len {
            return Err(Fault::Malformed);
        }
        located.protocol = extension.read(0);
        // However many there are, what follows is one case to the verifier, not one for each.
        located.header = frame
            .anywhere(extension.skip(len as usize), MAX_OFFSET)
            .ok_or(Fault::Malformed)?;
        located.transport_len -= len;
    }
    match located.protocol {
        FRAGMENT => locate_behind(frame, located),
        protocol if is_extension(protocol) => Err(Fault::Malformed),
        _ => Ok(located),
    }
}

/// Whether something else follows the header of this number.
#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT)
}

/// Steps over the fragment header that was found. The transport header comes behind it: nobody
/// sends the destination options that RFC 8200 section 4.1 allows in between.
#[inline(always)]
fn locate_behind(frame: &Frame, mut located: Located) -> Result<Located, Fault> {
    let fragment = frame
        .check(located.header, FRAGMENT_LEN)
        .ok_or(Fault::Malformed)?;
    // The frame may go on behind the packet.
    if located.transport_len < FRAGMENT_LEN as u32 {
        return Err(Fault::Malformed);
    }
    let place: u16 = fragment.read(2);
    if place & OFFSET != 0 {
        return Err(Fault::Fragment);
    }
    // One that says it is the only one is none (RFC 6946).
    located.first_fragment = place & MORE != 0;
    located.protocol = fragment.read(0);
    located.header = fragment.skip(FRAGMENT_LEN);
    located.transport_len -= FRAGMENT_LEN as u32;
    if is_extension(located.protocol) {
        return Err(Fault::Fragment);
    }
    Ok(located)
}

/// Finds the fragment header of a fragment: its identification.
#[inline(always)]
pub fn identification(frame: &Frame, network: &Network<V6>) -> Option<u32> {
    let mut next: u8 = network.header.read(offset_of!(Ipv6Hdr, next_hdr));
    let mut at = network.header.skip(Ipv6Hdr::LEN);
    for _ in 0..MAX_EXTENSIONS {
        let extension = frame.check(at, 8)?;
        match next {
            FRAGMENT => return Some(extension.read(4)),
            HOP_BY_HOP | ROUTING | DESTINATION => {}
            _ => return None,
        }
        next = extension.read(0);
        let len = (usize::from(extension.read::<u8>(1)) + 1) * 8;
        at = frame.anywhere(extension.skip(len), MAX_OFFSET)?;
    }
    None
}
