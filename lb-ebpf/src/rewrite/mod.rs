//! Rewrite: the packet becomes what the next hop shall see. One module for each forward mode.

mod nat;

pub use nat::nat;

use crate::parse::Link;
use core::mem::offset_of;
use network_types::eth::EthHdr;

/// Sends an answer back the way the packet came.
#[inline(always)]
pub fn exchange_link(link: &Link) {
    let destination = link.header.read_mac(offset_of!(EthHdr, dst_addr));
    let source = link.header.read_mac(offset_of!(EthHdr, src_addr));
    link.header.write_mac(offset_of!(EthHdr, dst_addr), source);
    link.header
        .write_mac(offset_of!(EthHdr, src_addr), destination);
}
