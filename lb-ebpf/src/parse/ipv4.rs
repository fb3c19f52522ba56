//! IPv4 (RFC 791).

use super::{Fault, Link, Located, Network};
use crate::{family::V4, frame::Frame};
use core::mem::offset_of;
use network_types::ip::Ipv4Hdr;

/// More-fragments flag and fragment offset, as they stand in the frame.
pub const FRAGMENT_BITS: u16 = 0x3fff_u16.to_be();
/// Fragment offset.
pub const OFFSET: u16 = 0x1fff_u16.to_be();

/// Reads the addresses.
#[inline(always)]
pub fn network(frame: &Frame, link: &Link) -> Option<Network<V4>> {
    let header = frame.check(link.payload, Ipv4Hdr::LEN)?;
    Some(Network {
        header,
        src: header.read_address(offset_of!(Ipv4Hdr, src_addr)),
        dst: header.read_address(offset_of!(Ipv4Hdr, dst_addr)),
    })
}

/// Finds the transport header behind the options, also that of a first fragment.
#[inline(always)]
pub fn locate_first(frame: &Frame, network: &Network<V4>) -> Result<Located, Fault> {
    let header = network.header;
    let version_ihl: u8 = header.read(offset_of!(Ipv4Hdr, vihl));
    let header_len = u32::from(version_ihl & 0xf) * 4;
    let packet_len = u32::from(u16::from_be(header.read(offset_of!(Ipv4Hdr, tot_len))));
    if version_ihl >> 4 != 4
        || header_len < Ipv4Hdr::LEN as u32
        || packet_len < header_len
        || !frame.holds(header, packet_len as usize)
    {
        return Err(Fault::Malformed);
    }
    let fragment = header.read::<u16>(offset_of!(Ipv4Hdr, frags)) & FRAGMENT_BITS;
    if fragment & OFFSET != 0 {
        return Err(Fault::Fragment);
    }
    Ok(Located {
        header: header.skip(header_len as usize),
        protocol: header.read(offset_of!(Ipv4Hdr, proto)),
        packet_len,
        transport_len: packet_len - header_len,
        first_fragment: fragment != 0,
    })
}
