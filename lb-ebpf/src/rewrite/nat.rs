//! `nat` and `dnat`: addresses and ports are replaced, in both directions alike.

use super::{update_checksum, write_link};
use crate::{
    family::Family,
    flow::Outgoing,
    frame::Frame,
    lookup,
    parse::{Link, Packet},
    verdict::Verdict,
};
use lb_common::backend::LOCAL;

/// Writes addresses, ports, hop count, checksums and the link header of `outgoing`.
#[inline(always)]
pub fn nat<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
) -> Result<(), Verdict> {
    let flow = outgoing.flow;
    update_checksum(frame, packet, flow.service, Some(flow.l4_delta))?;
    packet.transport.write(0, flow.sport);
    packet.transport.write(2, flow.dport);
    // What this host delivers itself travels no further.
    let hops = F::hops(packet.network.header) - u8::from(outgoing.ifindex != LOCAL);
    F::readdress(
        packet.network.header,
        lookup::load(&flow.src),
        lookup::load(&flow.dst),
        flow.l3_delta,
        hops,
    );
    write_link(link, outgoing.l2, outgoing.ifindex);
    Ok(())
}
