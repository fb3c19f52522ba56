//! ARP (RFC 826) and neighbour discovery (RFC 4861): who has this VIP?

use crate::{
    family::{V4, V6},
    frame::{Frame, Mac},
    lookup, maps,
    parse::{Link, Network, protocol},
    verdict::Verdict,
};
use aya_ebpf::helpers::bpf_xdp_adjust_tail;
use core::mem::offset_of;
use lb_common::{csum, service::VIP_ANSWER_ARP, stats::DropReason};
use network_types::{arp::ArpHdr, eth::EthHdr, icmp::Icmpv6Hdr, ip::Ipv6Hdr};

/// Hardware type Ethernet, protocol type IPv4, their address lengths, operation: eight bytes as
/// they stand in the frame.
const ARP_REQUEST: u64 = u64::from_ne_bytes([0, 1, 8, 0, 6, 4, 0, 1]);
const ARP_REPLY: u64 = u64::from_ne_bytes([0, 1, 8, 0, 6, 4, 0, 2]);

/// Answers an ARP request for a VIP that no kernel address answers for.
#[inline(always)]
pub fn answer_arp(frame: &Frame, link: &Link) -> Result<Verdict, Verdict> {
    let arp = frame
        .check(link.payload, ArpHdr::LEN)
        .ok_or(Verdict::PASS)?;
    let sender: u32 = arp.read(offset_of!(ArpHdr, spa));
    let target: u32 = arp.read(offset_of!(ArpHdr, tpa));
    // A host that announces an address as its own (RFC 5227) does not ask.
    if arp.read::<u64>(0) != ARP_REQUEST || sender == target {
        return Err(Verdict::PASS);
    }
    let vip = lookup::vip::<V4>(&target).ok_or(Verdict::PASS)?;
    let mac = own_mac(frame, vip.flags).ok_or(Verdict::PASS)?;
    let asker = arp.read_mac(offset_of!(ArpHdr, sha));
    arp.write(0, ARP_REPLY);
    arp.write_mac(offset_of!(ArpHdr, sha), mac);
    arp.write(offset_of!(ArpHdr, spa), target);
    arp.write_mac(offset_of!(ArpHdr, tha), asker);
    arp.write(offset_of!(ArpHdr, tpa), sender);
    link.header.write_mac(offset_of!(EthHdr, dst_addr), asker);
    link.header.write_mac(offset_of!(EthHdr, src_addr), mac);
    Ok(Verdict::TRANSMIT)
}

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Bytes of a solicitation without options.
const SOLICITATION_LEN: usize = 24;
/// Bytes of the advertisement: header, target, target link-layer address option.
const ADVERTISEMENT_LEN: usize = 32;
/// Offset of the target address in both.
const TARGET: usize = 8;
/// Neighbour discovery is believed only from the link itself (RFC 4861 section 7.1.1).
const LINK_HOPS: u8 = 255;
const FLAG_SOLICITED: u32 = 1 << 30;
const FLAG_OVERRIDE: u32 = 1 << 29;
/// Option 2, target link-layer address, one unit of eight bytes.
const OPTION: u16 = u16::from_ne_bytes([2, 1]);

/// Answers a neighbour solicitation for a VIP that no kernel address answers for; any other
/// packet is the kernel's.
#[inline(always)]
pub fn answer_solicitation(frame: &Frame, link: &Link, network: &Network<V6>) -> Verdict {
    advertise(frame, link, network).unwrap_or(Verdict::PASS)
}

#[inline(always)]
fn advertise(frame: &Frame, link: &Link, network: &Network<V6>) -> Option<Verdict> {
    let ip = frame.check(link.payload, Ipv6Hdr::LEN + SOLICITATION_LEN)?;
    let icmp = ip.skip(Ipv6Hdr::LEN);
    if ip.read::<u8>(offset_of!(Ipv6Hdr, next_hdr)) != protocol::ICMPV6
        || ip.read::<u8>(offset_of!(Ipv6Hdr, hop_limit)) != LINK_HOPS
        || icmp.read::<u16>(0) != u16::from_ne_bytes([SOLICITATION, 0])
    {
        return None;
    }
    let target: [u32; 4] = icmp.read_address(TARGET);
    let vip = lookup::vip::<V6>(&target)?;
    let mac = own_mac(frame, vip.flags)?;
    let asker = link.header.read_mac(offset_of!(EthHdr, src_addr));
    let source = network.src;
    let link_len = frame.offset(ip);

    // The solicitation may be shorter or longer than the answer.
    let wanted = link_len + Ipv6Hdr::LEN + ADVERTISEMENT_LEN;
    let present = frame.len();
    let change = wanted as i32 - present as i32;
    // SAFETY: a valid context; the frame is taken anew below.
    if change != 0 && unsafe { bpf_xdp_adjust_tail(frame.ctx, change) } != 0 {
        return Some(Verdict::drop(DropReason::AdjustFailed, 0));
    }
    let frame = Frame::new(frame.ctx);
    let ethernet = frame.start(EthHdr::LEN)?;
    let ip = frame.check(
        ethernet.skip(link_len & 0x1f),
        Ipv6Hdr::LEN + ADVERTISEMENT_LEN,
    )?;
    let icmp = ip.skip(Ipv6Hdr::LEN);

    // An asker without an address yet (duplicate address detection) is told through all nodes
    // (RFC 4861 section 7.2.4).
    let unspecified = source[0] | source[1] | source[2] | source[3] == 0;
    let (destination, ethernet_destination, flags) = if unspecified {
        (
            [0xff02_0000_u32.to_be(), 0, 0, 1_u32.to_be()],
            Mac {
                head: 0x3333_0000_u32.to_be(),
                tail: 1_u16.to_be(),
            },
            FLAG_OVERRIDE.to_be(),
        )
    } else {
        (source, asker, (FLAG_SOLICITED | FLAG_OVERRIDE).to_be())
    };
    ethernet.write_mac(offset_of!(EthHdr, dst_addr), ethernet_destination);
    ethernet.write_mac(offset_of!(EthHdr, src_addr), mac);
    ip.write(
        offset_of!(Ipv6Hdr, payload_len),
        (ADVERTISEMENT_LEN as u16).to_be(),
    );
    ip.write_address(offset_of!(Ipv6Hdr, src_addr), target);
    ip.write_address(offset_of!(Ipv6Hdr, dst_addr), destination);

    let kind = u16::from_ne_bytes([ADVERTISEMENT, 0]);
    let mut sum = u64::from((ADVERTISEMENT_LEN as u16).to_be())
        + u64::from(u16::from(protocol::ICMPV6).to_be())
        + u64::from(kind)
        + csum::word(flags)
        + u64::from(OPTION)
        + csum::word(mac.head)
        + u64::from(mac.tail);
    for i in 0..4 {
        // Target and source of the advertisement are the same address.
        sum += 2 * csum::word(target[i]) + csum::word(destination[i]);
    }
    icmp.write(0, kind);
    icmp.write(offset_of!(Icmpv6Hdr, check), !csum::fold(sum));
    icmp.write(4, flags);
    icmp.write_address(TARGET, target);
    icmp.write(SOLICITATION_LEN, OPTION);
    icmp.write_mac(SOLICITATION_LEN + 2, mac);
    Some(Verdict::TRANSMIT)
}

/// The Ethernet address to answer with, if the VIP is to be answered for.
#[inline(always)]
fn own_mac(frame: &Frame, vip_flags: u32) -> Option<Mac> {
    if vip_flags & VIP_ANSWER_ARP == 0 {
        return None;
    }
    let ifindex = frame.ingress();
    // SAFETY: a copy of one record that is written once for each interface.
    unsafe { maps::INTERFACES.get(ifindex) }.map(|interface| {
        let [a, b, c, d, e, f] = interface.mac;
        Mac {
            head: u32::from_ne_bytes([a, b, c, d]),
            tail: u16::from_ne_bytes([e, f]),
        }
    })
}
