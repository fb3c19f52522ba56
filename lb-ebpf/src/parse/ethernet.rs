//! Ethernet II and VLAN tags (IEEE 802.1Q, 802.1ad).

use crate::{
    frame::{Cursor, Frame},
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::vlan;
use network_types::{eth::EthHdr, vlan::VlanHdr};

/// Ethertypes as they stand in the frame.
pub const IPV4: u16 = 0x0800_u16.to_be();
pub const IPV6: u16 = 0x86dd_u16.to_be();
pub const ARP: u16 = 0x0806_u16.to_be();
pub const VLAN: u16 = 0x8100_u16.to_be();
pub const SERVICE_VLAN: u16 = 0x88a8_u16.to_be();

/// The link-layer header.
pub struct Link {
    /// The Ethernet header; its 14 bytes are checked.
    pub header: Cursor,
    /// Ethertype behind the VLAN tags, as it stands in the frame.
    pub ethertype: u16,
    /// First byte behind the tags; nothing is checked there.
    pub payload: Cursor,
    /// The VLAN tags, packed as in [`lb_common::vlan`].
    pub tags: u32,
}

/// Reads the Ethernet header and up to two VLAN tags.
#[inline(always)]
pub fn parse(frame: &Frame) -> Result<Link, Verdict> {
    let header = frame.start(EthHdr::LEN).ok_or(Verdict::PASS)?;
    let mut link = Link {
        header,
        ethertype: header.read(offset_of!(EthHdr, ether_type)),
        payload: header.skip(EthHdr::LEN),
        tags: 0,
    };
    for i in 0..2 {
        if link.ethertype != VLAN && link.ethertype != SERVICE_VLAN {
            break;
        }
        let tag = frame
            .check(link.payload, VlanHdr::LEN)
            .ok_or(Verdict::PASS)?;
        // The outer tag is the low half.
        let tci = u16::from_be(tag.read(0));
        link.tags |= u32::from(vlan::tag(tci, link.ethertype == SERVICE_VLAN)) << (16 * i);
        link.ethertype = tag.read(offset_of!(VlanHdr, ether_type));
        link.payload = tag.skip(VlanHdr::LEN);
    }
    Ok(link)
}
