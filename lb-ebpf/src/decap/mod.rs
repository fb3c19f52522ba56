//! Decapsulation on a backend: IP in IP and GUE come off, and the kernel sees the packet as the
//! client sent it.
//!
//! Only packets whose outer destination is an address of this host and whose inner destination is
//! one of its VIPs are touched. Everything else goes to the kernel as it came.

mod inner;
mod layer;
mod maps;

use crate::{
    bounds,
    family::{Family, V4, V6},
    frame::Frame,
    parse::{self, Fault, Link, Located, Network, ethernet, protocol},
};
use aya_ebpf::{bindings::xdp_md, helpers::bpf_xdp_adjust_head};
use core::mem::offset_of;
use layer::{CONGESTION, Layer, ecn};
use lb_common::decap::{HELD, Outcome, Settings};
use network_types::{eth::EthHdr, udp::UdpHdr, vlan::VlanHdr};

/// IPv4 as the payload of IP (RFC 2003).
const IPIP: u8 = 4;
/// IPv6 as the payload of IP (RFC 2473).
const IPV6: u8 = 41;

/// Bytes of the GUE header of version 0 without options (draft-ietf-intarea-gue section 3.1).
const GUE_LEN: usize = 4;

/// Link header, outer IP header with options or extensions, UDP and GUE: no inner header begins
/// further in.
const MAX_OFFSET: u32 = 4096;

/// Takes the encapsulation off if there is one for us, and counts.
#[inline(always)]
pub fn take_off(ctx: *mut xdp_md) {
    let frame = Frame::new(ctx);
    let Ok(link) = parse::ethernet(&frame) else {
        return;
    };
    let done = match link.ethertype {
        ethernet::IPV4 => outer::<V4>(&frame, &link),
        ethernet::IPV6 => outer::<V6>(&frame, &link),
        _ => return,
    };
    if let Err(Refusal(outcome, bytes)) = done {
        count(outcome, bytes);
    }
}

/// Why a packet stays as it is: number of an [`Outcome`], 0 if it is none of our business, and
/// its bytes.
struct Refusal(u32, u32);

impl Refusal {
    /// Nothing encapsulated for us: not counted.
    const NOT_OURS: Self = Self(0, 0);
}

/// An inner packet in the outer one.
struct Carried {
    /// How it is carried: [`Outcome::Ipip`] or [`Outcome::Gue`].
    how: Outcome,
    /// Whether it is IPv6.
    v6: bool,
    /// Bytes from the start of what follows the outer IP header to the inner one.
    skip: u32,
    /// Bytes there are for it.
    room: u32,
}

/// The way of a packet: outer header, what it carries, inner header, and off with it.
#[inline(always)]
fn outer<O: Layer>(frame: &Frame, link: &Link) -> Result<(), Refusal> {
    let network = O::network(frame, link).ok_or(Refusal::NOT_OURS)?;
    let located = match O::locate(frame, &network) {
        Ok(located) => located,
        Err(fault) => return Err(unsound::<O>(frame, &network, fault)),
    };
    let bytes = located.packet_len;
    let carried = match carried(frame, &located) {
        // Before the maps are asked: most packets carry nothing.
        Err(Refusal(0, _)) => return Err(Refusal::NOT_OURS),
        carried => carried,
    };
    if !is_held::<O>(&network) {
        return Err(Refusal::NOT_OURS);
    }
    let Carried {
        how,
        v6,
        skip,
        room,
    } = carried.map_err(|Refusal(outcome, _)| Refusal(outcome, bytes))?;
    let link = LinkHeader::read(frame, link);
    let offset = frame.offset(located.header) as u32 + skip;
    let offset = bounds::within(offset, EthHdr::LEN as u32, MAX_OFFSET)
        .ok_or(Refusal(Outcome::Malformed as u32, bytes))?;
    let congestion = u32::from(ecn::<O>(network.header) == CONGESTION);

    // The packet is not read through `frame` any more.
    let ctx = frame.ctx;
    let (judged, ethertype) = if v6 {
        (inner::admit6(ctx, offset, room, congestion), V6::ETHERTYPE)
    } else {
        (inner::admit4(ctx, offset, room, congestion), V4::ETHERTYPE)
    };
    let (refused, len) = inner::verdict(judged);
    if refused != 0 {
        return Err(Refusal(refused, bytes));
    }
    let removed = offset.wrapping_sub(link.len as u32);
    // SAFETY: a valid context; the frame is taken anew by `write`.
    if unsafe { bpf_xdp_adjust_head(ctx, removed as i32) } != 0 {
        return Err(Refusal(Outcome::AdjustFailed as u32, bytes));
    }
    link.write(ctx, ethertype);
    count(how as u32, len);
    Ok(())
}

/// What follows the outer IP header.
#[inline(always)]
fn carried(frame: &Frame, located: &Located) -> Result<Carried, Refusal> {
    let ipip = |v6| Carried {
        how: Outcome::Ipip,
        v6,
        skip: 0,
        room: located.transport_len,
    };
    match located.protocol {
        IPIP => Ok(ipip(false)),
        IPV6 => Ok(ipip(true)),
        protocol::UDP => gue(frame, located),
        _ => Err(Refusal::NOT_OURS),
    }
}

/// GUE: version 1 is the inner IP header itself, version 0 has a header of its own before it.
#[inline(always)]
fn gue(frame: &Frame, located: &Located) -> Result<Carried, Refusal> {
    const MALFORMED: Refusal = Refusal(Outcome::Malformed as u32, 0);
    const UNSUPPORTED: Refusal = Refusal(Outcome::Unsupported as u32, 0);
    let udp = frame
        .check(located.header, UdpHdr::LEN)
        .ok_or(Refusal::NOT_OURS)?;
    if udp.read::<u16>(2) != settings().ok_or(Refusal::NOT_OURS)?.port {
        return Err(Refusal::NOT_OURS);
    }
    let len = u32::from(u16::from_be(udp.read(offset_of!(UdpHdr, len))));
    if len > located.transport_len || len < (UdpHdr::LEN + GUE_LEN) as u32 {
        return Err(MALFORMED);
    }
    let first = frame
        .check(udp, UdpHdr::LEN + GUE_LEN)
        .ok_or(MALFORMED)?
        .skip(UdpHdr::LEN);
    let carried = |v6, header: usize| {
        let skip = (UdpHdr::LEN + header) as u32;
        Ok(Carried {
            how: Outcome::Gue,
            v6,
            skip,
            room: len - skip,
        })
    };
    // Version, control flag and length of the options, all zero, in the first byte of version 0;
    // the IP version in the first four bits of version 1. Flags announce options.
    let (head, kind): (u8, u8) = (first.read(0), first.read(1));
    match (head, head >> 4, kind) {
        (_, 4, _) => carried(false, 0),
        (_, 6, _) => carried(true, 0),
        (0, _, IPIP) if first.read::<u16>(2) == 0 => carried(false, GUE_LEN),
        (0, _, IPV6) if first.read::<u16>(2) == 0 => carried(true, GUE_LEN),
        _ => Err(UNSUPPORTED),
    }
}

/// An outer header that contradicts itself, or that of a fragment: counted if it says that it carries
/// something for us.
#[inline(always)]
fn unsound<O: Layer>(frame: &Frame, network: &Network<O>, fault: Fault) -> Refusal {
    let (protocol, payload) = O::claim(frame, network);
    let carries = match protocol {
        IPIP | IPV6 => true,
        protocol::UDP => payload
            .and_then(|udp| frame.check(udp, UdpHdr::LEN))
            .zip(settings())
            .is_some_and(|(udp, settings)| udp.read::<u16>(2) == settings.port),
        _ => false,
    };
    if !carries || !is_held::<O>(network) {
        return Refusal::NOT_OURS;
    }
    let outcome = match fault {
        Fault::Malformed => Outcome::Malformed,
        Fault::Fragment => Outcome::Fragment,
    };
    Refusal(outcome as u32, frame.reach(network.header) as u32)
}

/// Whether the packet was sent to this host.
#[inline(always)]
fn is_held<O: Layer>(network: &Network<O>) -> bool {
    role::<O>(&network.dst) & HELD != 0
}

/// The bits an address has in the maps; none if this host does not know it.
#[inline(always)]
fn role<L: Layer>(address: &L::Addr) -> u32 {
    // SAFETY: a copy of one word; a concurrent removal at worst shows the value of a moment ago.
    unsafe { L::addresses().get(address) }
        .copied()
        .unwrap_or_default()
}

#[inline(always)]
fn settings() -> Option<&'static Settings> {
    maps::SETTINGS.get(0)
}

#[inline(always)]
fn count(outcome: u32, bytes: u32) {
    if outcome == 0 {
        return;
    }
    if let Some(counter) = maps::STATS.get_ptr_mut(outcome) {
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

/// The Ethernet header and its tags, to be written again in front of the inner packet.
struct LinkHeader {
    macs: [u32; 3],
    tags: [u32; 2],
    len: usize,
}

impl LinkHeader {
    #[inline(always)]
    fn read(frame: &Frame, link: &Link) -> Self {
        const ONE: usize = EthHdr::LEN + VlanHdr::LEN;
        const TWO: usize = ONE + VlanHdr::LEN;
        let header = link.header;
        // As constants, so that the verifier knows where `write` writes. Both tags lie in front of
        // the outer IP header, so they can be read without looking how many there are.
        let len = match frame.offset(link.payload) {
            EthHdr::LEN => EthHdr::LEN,
            ONE => ONE,
            _ => TWO,
        };
        let tags = frame.check(header, TWO).map_or([0; 2], |header| {
            [header.read(12), header.read(12 + VlanHdr::LEN)]
        });
        Self {
            macs: [header.read(0), header.read(4), header.read(8)],
            tags,
            len,
        }
    }

    /// Writes it at the start of the frame.
    #[inline(always)]
    fn write(&self, ctx: *mut xdp_md, ethertype: u16) {
        let frame = Frame::new(ctx);
        // The inner packet is longer than both tags.
        let Some(header) = frame.start(EthHdr::LEN + 2 * VlanHdr::LEN) else {
            return;
        };
        header.write_words(0, &self.macs);
        if self.len > EthHdr::LEN {
            header.write(12, self.tags[0]);
        }
        if self.len > EthHdr::LEN + VlanHdr::LEN {
            header.write(12 + VlanHdr::LEN, self.tags[1]);
        }
        match self.len - EthHdr::LEN {
            0 => header.write(12, ethertype),
            VlanHdr::LEN => header.write(12 + VlanHdr::LEN, ethertype),
            _ => header.write(12 + 2 * VlanHdr::LEN, ethertype),
        }
    }
}
