//! `nat` and `dnat`: addresses and ports are replaced, in both directions alike.

use super::{l2, update_checksum, write_link};
use crate::{
    checksum,
    family::Family,
    flow::Outgoing,
    frame::Frame,
    lookup,
    parse::{Link, Packet, protocol},
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{
    backend::{Backend, LOCAL},
    csum,
};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

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

/// Gives a client's packet another destination: what `dnat` does with one whose flow is not recorded. `check` is its
/// checksum, which is complete. Always `Some`.
#[inline(always)]
pub fn redirect<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    backend: &Backend,
    check: u16,
) -> Option<()> {
    let (src, old) = (packet.network.src, packet.network.dst);
    let new = lookup::address(&backend.addr);
    let addresses = checksum::replaced(old, new);
    let ports = u64::from(!packet.dport) + u64::from(backend.port);
    let sum = !csum::fold(u64::from(!check) + addresses + ports);
    if packet.protocol == protocol::TCP {
        let tcp = packet.tcp(frame)?;
        tcp.write(offset_of!(TcpHdr, check), sum);
    } else if check != 0 {
        // Zero: the sender chose to send none (RFC 768).
        let offset = offset_of!(UdpHdr, check);
        packet.transport.write(offset, csum::udp(sum));
    }
    packet.transport.write(2, backend.port);
    let hops = F::hops(packet.network.header) - 1;
    F::readdress(packet.network.header, src, new, csum::fold(addresses), hops);
    l2::send_to(link, &backend.l2);
    Some(())
}
