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

/// Finds the transport header behind the extension headers.
#[inline(always)]
pub fn locate(frame: &Frame, network: &Network<V6>) -> Result<Located, Fault> {
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
    };
    for _ in 0..MAX_EXTENSIONS {
        match located.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => {}
            FRAGMENT => return Err(Fault::Fragment),
            _ => return Ok(located),
        }
        // Length in units of 8 bytes, the first not counted (RFC 8200 section 4.3).
        let extension = frame.check(located.header, 8).ok_or(Fault::Malformed)?;
        let len = (u32::from(extension.read::<u8>(1)) + 1) * 8;
        if len > located.transport_len {
            return Err(Fault::Malformed);
        }
        located.protocol = extension.read(0);
        located.header = extension.skip(len as usize);
        located.transport_len -= len;
    }
    match located.protocol {
        HOP_BY_HOP | ROUTING | DESTINATION => Err(Fault::Malformed),
        FRAGMENT => Err(Fault::Fragment),
        _ => Ok(located),
    }
}
