//! Answers a TCP packet that cannot be forwarded with RST, so that nobody waits in vain.

use crate::{
    checksum,
    family::{Family, V4, V6},
    frame::Frame,
    parse::{self, TcpFlags, ethernet, protocol},
    rewrite,
};
use aya_ebpf::{bindings::xdp_md, helpers::bpf_xdp_adjust_tail};
use core::mem::offset_of;
use lb_common::csum;
use network_types::tcp::TcpHdr;

/// Turns the packet into a RST to its sender; tells whether there is one to send.
///
/// Reads the packet again from its start: this is off the way of packets that are forwarded, and
/// keeps nothing alive there.
#[inline(never)]
pub fn answer(ctx: *mut xdp_md) -> bool {
    let frame = Frame::new(ctx);
    let Ok(link) = parse::ethernet(&frame) else {
        return false;
    };
    match link.ethertype {
        ethernet::IPV4 => reset::<V4>(&frame, &link).is_some(),
        ethernet::IPV6 => reset::<V6>(&frame, &link).is_some(),
        _ => false,
    }
}

/// Sequence numbers follow RFC 9293 section 3.10.7.1.
#[inline(always)]
fn reset<F: Family>(frame: &Frame, link: &parse::Link) -> Option<()> {
    let network = F::network(frame, link)?;
    let located = F::locate(frame, &network).ok()?;
    if located.protocol != protocol::TCP {
        return None;
    }
    let tcp = frame.check(located.header, TcpHdr::LEN)?;
    let flags = TcpFlags(tcp.read(13));
    // Never answer a reset: two of us would go on for ever.
    if flags.any(TcpFlags::RST) {
        return None;
    }
    let header_len = u32::from(tcp.read::<u8>(12) >> 4) * 4;
    let payload_len = located.transport_len - header_len;
    let (seq, ack, reply) = if flags.any(TcpFlags::ACK) {
        (
            tcp.read::<u32>(offset_of!(TcpHdr, ack_seq)),
            0,
            TcpFlags::RST,
        )
    } else {
        let received = u32::from_be(tcp.read(offset_of!(TcpHdr, seq)))
            .wrapping_add(payload_len)
            .wrapping_add(u32::from(flags.any(TcpFlags::SYN)))
            .wrapping_add(u32::from(flags.any(TcpFlags::FIN)));
        (0, received.to_be(), TcpFlags::RST | TcpFlags::ACK)
    };
    let ports = (tcp.read::<u16>(2), tcp.read::<u16>(0));
    let (src, dst) = (network.dst, network.src);

    let link_len = frame.offset(network.header);
    let wanted = link_len + F::HEADER_LEN + TcpHdr::LEN;
    let present = frame.len();
    // Never grows: the packet held these headers, or longer ones.
    // SAFETY: a valid context; the frame is taken anew below.
    if unsafe { bpf_xdp_adjust_tail(frame.ctx, wanted as i32 - present as i32) } != 0 {
        return None;
    }
    let frame = Frame::new(frame.ctx);
    let link = parse::ethernet(&frame).ok()?;
    let header = frame.check(link.payload, F::HEADER_LEN + TcpHdr::LEN)?;
    let tcp = header.skip(F::HEADER_LEN);
    rewrite::exchange_link(&link);
    F::write_header(header, src, dst, protocol::TCP, 0, TcpHdr::LEN as u16);
    let data_offset_flags = u16::from_ne_bytes([5 << 4, reply]);
    let pseudo = checksum::pseudo_header(src, dst, protocol::TCP, TcpHdr::LEN as u32);
    let sum = u64::from(pseudo)
        + u64::from(ports.0)
        + u64::from(ports.1)
        + csum::word(seq)
        + csum::word(ack)
        + u64::from(data_offset_flags);
    tcp.write(0, ports.0);
    tcp.write(2, ports.1);
    tcp.write(offset_of!(TcpHdr, seq), seq);
    tcp.write(offset_of!(TcpHdr, ack_seq), ack);
    tcp.write(12, data_offset_flags);
    tcp.write(offset_of!(TcpHdr, window), 0_u16);
    tcp.write(offset_of!(TcpHdr, check), !csum::fold(sum));
    tcp.write(offset_of!(TcpHdr, urg_ptr), 0_u16);
    Some(())
}
