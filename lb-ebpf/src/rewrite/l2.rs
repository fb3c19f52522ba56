//! `dsr`: only the Ethernet addresses change. The backend holds the VIP itself and answers the
//! client without us.

use super::update_checksum;
use crate::{
    family::Family,
    frame::Frame,
    parse::{Link, Packet},
    verdict::Verdict,
};

/// Writes the link header towards a backend.
#[inline(always)]
pub fn l2<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    service: u32,
    l2: &[u32; 3],
) -> Result<(), Verdict> {
    update_checksum(frame, packet, service, None)?;
    send_to(link, l2);
    Ok(())
}

/// Writes the link header alone, for a packet whose checksum is complete.
#[inline(always)]
pub fn send_to(link: &Link, l2: &[u32; 3]) {
    link.header.write_words(0, l2);
}
