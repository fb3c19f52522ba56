//! Full NAT: source and destination are replaced, in both directions alike.

use crate::{
    checksum,
    family::Family,
    flow::Outgoing,
    frame::Frame,
    parse::{Link, Packet, protocol},
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{csum, stats::DropReason};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

/// Writes addresses, ports, hop count, checksums and the link header of `outgoing`.
#[inline(always)]
pub fn nat<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
) -> Result<(), Verdict> {
    let udp = packet.protocol == protocol::UDP;
    if udp {
        write_check(frame, packet, outgoing, offset_of!(UdpHdr, check), true)?;
    } else {
        write_check(frame, packet, outgoing, offset_of!(TcpHdr, check), false)?;
    }
    packet.transport.write(0, outgoing.sport);
    packet.transport.write(2, outgoing.dport);
    let hops = F::hops(packet.network.header) - 1;
    F::readdress(
        packet.network.header,
        outgoing.src,
        outgoing.dst,
        outgoing.l3_delta,
        hops,
    );
    link.header.write_words(0, outgoing.l2);
    Ok(())
}

#[inline(always)]
fn write_check<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    outgoing: &Outgoing<F::Addr>,
    offset: usize,
    udp: bool,
) -> Result<(), Verdict> {
    let mut check: u16 = packet.transport.read(offset);
    if udp && check == 0 {
        // The sender chose to send none (RFC 768).
        return Ok(());
    }
    let pseudo = checksum::pseudo_header(
        packet.network.src,
        packet.network.dst,
        packet.protocol,
        packet.transport_len,
    );
    if check == pseudo {
        check = checksum::complete(
            frame.ctx,
            frame.offset(packet.transport) as u32,
            packet.transport_len,
        )
        .ok_or(Verdict::drop(DropReason::AdjustFailed, outgoing.service))?;
    }
    check = csum::update(check, outgoing.l4_delta);
    if udp {
        check = csum::udp(check);
    }
    packet.transport.write(offset, check);
    Ok(())
}
