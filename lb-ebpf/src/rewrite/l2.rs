//! `dsr`: only the Ethernet addresses change. The backend holds the VIP itself and answers the
//! client without us.

use super::update_checksum;
use crate::{
    family::Family,
    flow::Outgoing,
    frame::Frame,
    parse::{Link, Packet},
    verdict::Verdict,
};

/// Writes the link header of `outgoing`.
#[inline(always)]
pub fn l2<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
) -> Result<(), Verdict> {
    update_checksum(frame, packet, outgoing.flow.service, None)?;
    link.header.write_words(0, outgoing.l2);
    Ok(())
}
