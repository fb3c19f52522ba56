//! Forward: out by the interface of the next hop.

use crate::{family::Family, flow::Outgoing, frame::Frame, parse::Packet, stats, verdict::Verdict};
use lb_common::flow::DIRECTION_BACKEND;

/// Counts a rewritten packet and sends it.
#[inline(always)]
pub fn send<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
) -> Result<Verdict, Verdict> {
    let bytes = u64::from(packet.packet_len);
    if outgoing.flow.direction == DIRECTION_BACKEND {
        stats::count_out(outgoing.flow.service, outgoing.flow.backend, bytes);
    } else {
        stats::count_in(outgoing.flow.service, outgoing.flow.backend, bytes);
    }
    Ok(Verdict::leave(frame, outgoing.ifindex))
}
