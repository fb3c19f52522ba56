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
    for _ in 0..MAX_EXTENSIONS {
        match located.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => {}
            FRAGMENT => {}
            _ => return Ok(located),
        }
        let extension = frame.check(located.header, 8).ok_or(Fault::Malformed)?;
        let len = if located.protocol == FRAGMENT {
            let place: u16 = extension.read(2);
            if place & OFFSET != 0 {
                return Err(Fault::Fragment);
            }
            // One that says it is the only one is none (RFC 6946).
            located.first_fragment = place & MORE != 0;
            FRAGMENT_LEN as u32
        } else {
            // Length in units of 8 bytes, the first not counted (RFC 8200 section 4.3).
            (u32::from(extension.read::<u8>(1)) + 1) * 8
        };
        if len > located.transport_len {
            return Err(Fault::Malformed);
        }
        located.protocol = extension.read(0);
        located.header = extension.skip(len as usize);
        located.transport_len -= len;
    }
    match located.protocol {
        HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => Err(Fault::Malformed),
        _ => Ok(located),
    }
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
        at = extension.skip((usize::from(extension.read::<u8>(1)) + 1) * 8);
    }
    None
}
