//! Health checks take the traffic's way: what a check sends to a backend is made a packet for the
//! VIP, and in `ipip` and `gue` put into another one, as a client's would be. A backend that lacks
//! the VIP or the decapsulation does not answer.
//!
//! The socket is connected to the backend's own address, so that route and next hop are right, and
//! marks its packets. What answers comes from the VIP, and gets the backend's address back before
//! the kernel looks at it: it may hold the VIP itself, and would take nothing from there.

use crate::{
    checksum,
    egress::{self, NETWORK, Places, load, readdress, store},
    family::{Family, V4, V6},
    lookup, maps,
    parse::{ethernet, protocol},
};
use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_MARK_MANGLED_0, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated::{bpf_csum_update, bpf_skb_adjust_room},
};
use core::mem::offset_of;
use lb_common::{
    abi::Settings,
    addr::{Address, FAMILY_V4},
    csum,
    flow::FlowKey,
    hash,
    probe::TARGET_MASK,
    service::forward,
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

/// What the host sends: [`TC_ACT_UNSPEC`], or [`TC_ACT_SHOT`] for a check that cannot be sent as
/// it should.
#[inline(always)]
pub fn send(ctx: *mut __sk_buff) -> i32 {
    // SAFETY: a valid context.
    let mark = unsafe { (*ctx).mark };
    let ours = maps::LOCAL_SETTINGS
        .get(0)
        .is_some_and(|s| s.probe_mark != 0 && mark & !TARGET_MASK == s.probe_mark);
    if !ours {
        return TC_ACT_UNSPEC;
    }
    let sent = match egress::ethertype(ctx) {
        Some(ethernet::IPV4) => send_probe4(ctx, mark & TARGET_MASK),
        Some(ethernet::IPV6) => send_probe6(ctx, mark & TARGET_MASK),
        _ => return TC_ACT_UNSPEC,
    };
    if sent == 0 {
        TC_ACT_SHOT
    } else {
        TC_ACT_UNSPEC
    }
}

/// [`towards`] for IPv4: 0 if the packet must not leave.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_probe4(ctx: *mut __sk_buff, target: u32) -> u32 {
    let Some(places) = egress::places4(ctx) else {
        return 1;
    };
    u32::from(towards::<V4>(ctx, target, &places).unwrap_or(true))
}

/// [`towards`] for IPv6: 0 if the packet must not leave.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_probe6(ctx: *mut __sk_buff, target: u32) -> u32 {
    u32::from(towards::<V6>(ctx, target, &egress::places6()).unwrap_or(true))
}

/// The transport header's sum, with the flags that mending it takes; `None`: another protocol.
#[inline(always)]
fn sum_of(places: &Places, kind: u8) -> Option<(usize, u64)> {
    match kind {
        protocol::TCP => Some((places.transport + offset_of!(TcpHdr, check), 0)),
        // A sum of zero stays (RFC 768).
        protocol::UDP => Some((
            places.transport + offset_of!(UdpHdr, check),
            u64::from(BPF_F_MARK_MANGLED_0),
        )),
        _ => None,
    }
}

/// The key of what answers in map `probes`; addresses in their four-word form.
#[inline(always)]
fn key<A: Address>(src: A, dst: A, sport: u16, dport: u16, kind: u8) -> FlowKey<[u32; 4]> {
    FlowKey {
        src: lookup::word_by_word(src.widen()),
        dst: lookup::word_by_word(dst.widen()),
        sport,
        dport,
        protocol: u32::from(kind),
    }
}

/// Makes a packet for the target's VIP of one that was sent to its backend. `None`: it was not, and
/// stays as it is.
#[inline(always)]
fn towards<F: Family>(ctx: *mut __sk_buff, target: u32, places: &Places) -> Option<bool> {
    let target = maps::PROBE_TARGETS.get(target)?;
    if target.family != F::Addr::FAMILY {
        return None;
    }
    let (src, dst): (F::Addr, F::Addr) = (load(ctx, places.src)?, load(ctx, places.dst)?);
    let vip = lookup::address::<F::Addr>(&target.vip);
    // A balancer whose address towards the backend is the VIP cannot be answered there.
    if dst != lookup::address::<F::Addr>(&target.backend) || src == vip {
        return None;
    }
    let kind: u8 = load(ctx, places.protocol)?;
    let sum = sum_of(places, kind)?;
    let sport: u16 = load(ctx, places.transport)?;
    let dport: u16 = load(ctx, places.transport + 2)?;
    let known = key(vip, src, dport, sport, kind);
    if maps::PROBES.get_ptr(&known).is_none() {
        let backend = lookup::word_by_word(dst.widen());
        maps::PROBES.insert(&known, &backend, 0).ok()?;
    }
    readdress(ctx, places, places.dst, (dst, vip), sum);
    if !forward::encapsulates(target.forward) {
        return Some(true);
    }
    // As a client's packet that the balancer itself had sent.
    let flow = FlowKey::<F::Addr> {
        src,
        dst: vip,
        sport,
        dport,
        protocol: u32::from(kind),
    };
    let around = Around {
        src,
        dst,
        vip,
        kind,
        hash: hash::flow_hash(&flow),
        gue: target.forward == forward::GUE,
    };
    Some(encapsulate::<F>(ctx, &around).is_some())
}

/// What the outer packet is made of.
struct Around<A> {
    src: A,
    /// The backend's address.
    dst: A,
    /// The inner packet's destination.
    vip: A,
    /// The inner packet's transport protocol.
    kind: u8,
    hash: u32,
    gue: bool,
}

/// Most words of what stands in front of the inner packet: IPv6 and UDP.
const OUTER_WORDS: usize = (Ipv6Hdr::LEN + UdpHdr::LEN) / 4;

/// The headers of the outer packet.
#[repr(align(8))]
struct Outer([u32; OUTER_WORDS]);

impl Outer {
    /// Word by word: see [`lookup::word_by_word`].
    #[inline(always)]
    fn set(&mut self, i: usize, word: u32) {
        // SAFETY: no caller names a word that is not there.
        unsafe { self.0.as_mut_ptr().add(i).write_volatile(word) };
    }
}

/// Two halves of a word, as they stand in the packet.
#[inline(always)]
const fn halves(first: u16, second: u16) -> u32 {
    u32::from_ne_bytes([
        first.to_ne_bytes()[0],
        first.to_ne_bytes()[1],
        second.to_ne_bytes()[0],
        second.to_ne_bytes()[1],
    ])
}

/// Puts the packet into another of its family. `None`: the kernel refuses.
#[inline(always)]
fn encapsulate<F: Family>(ctx: *mut __sk_buff, around: &Around<F::Addr>) -> Option<()> {
    let v4 = F::Addr::FAMILY == FAMILY_V4;
    let settings = maps::SETTINGS.get(0)?;
    // SAFETY: a valid context.
    let inner_len = unsafe { (*ctx).len }.wrapping_sub(NETWORK as u32);
    let first: u32 = load(ctx, NETWORK)?;
    let class = if v4 {
        first.to_ne_bytes()[1]
    } else {
        (u32::from_be(first) >> 20) as u8
    };
    let mut inner_sum = 0;
    if around.gue && !v4 {
        for i in 0..Ipv6Hdr::LEN / 4 {
            inner_sum += csum::word(load(ctx, NETWORK + 4 * i)?);
        }
        // What follows sums up to the complement of its pseudo-header, whether the device is still
        // to write that into its checksum or not.
        let len = inner_len.wrapping_sub(Ipv6Hdr::LEN as u32);
        let pseudo = checksum::pseudo_header(around.src, around.vip, around.kind, len);
        inner_sum += u64::from(!pseudo);
    }
    let udp = if around.gue { UdpHdr::LEN as u32 } else { 0 };
    let growth = F::HEADER_LEN as u32 + udp;
    let mut flags = if v4 {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
    } else {
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
    };
    if around.gue {
        flags |= BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
    }
    // SAFETY: a valid context; no pointer into the packet is held.
    unsafe {
        if bpf_skb_adjust_room(ctx, growth as i32, BPF_ADJ_ROOM_MAC, flags.into()) != 0 {
            return None;
        }
        // What passes here once more, below a VLAN's interface, is no check any more.
        (*ctx).mark = 0;
    }
    let source = outer_source::<F>(settings, around);
    let inside = if around.gue { protocol::UDP } else { F::INSIDE };
    let mut outer = Outer([0; OUTER_WORDS]);
    let (src, dst) = (source.widen(), around.dst.widen());
    let udp_at = if v4 {
        // RFC 6864 section 4.1: DF, and no identification.
        let words = [
            halves(
                u16::from_ne_bytes([0x45, class]),
                ((growth + inner_len) as u16).to_be(),
            ),
            halves(0, 0x4000_u16.to_be()),
            halves(u16::from_ne_bytes([crate::family::HOPS, inside]), 0),
            src[0],
            dst[0],
        ];
        let mut sum = 0;
        for word in words {
            sum += csum::word(word);
        }
        outer.set(0, words[0]);
        outer.set(1, words[1]);
        let ttl_protocol = u16::from_ne_bytes([crate::family::HOPS, inside]);
        outer.set(2, halves(ttl_protocol, !csum::fold(sum)));
        outer.set(3, words[3]);
        outer.set(4, words[4]);
        Ipv4Hdr::LEN / 4
    } else {
        outer.set(0, (0x6000_0000_u32 | u32::from(class) << 20).to_be());
        let len = ((udp + inner_len) as u16).to_be();
        outer.set(
            1,
            halves(len, u16::from_ne_bytes([inside, crate::family::HOPS])),
        );
        for i in 0..4 {
            outer.set(2 + i, src[i]);
            outer.set(6 + i, dst[i]);
        }
        Ipv6Hdr::LEN / 4
    };
    if around.gue {
        let len = inner_len + udp;
        let sport = crate::rewrite::encap::source_port(around.hash);
        let wire_len = (len as u16).to_be();
        let mut check = 0;
        if !v4 {
            let pseudo = checksum::pseudo_header(source, around.dst, protocol::UDP, len);
            let sum = u64::from(pseudo)
                + u64::from(sport)
                + u64::from(settings.gue_port)
                + u64::from(wire_len)
                + inner_sum;
            check = csum::udp(!csum::fold(sum));
        }
        outer.set(udp_at, halves(sport, settings.gue_port));
        outer.set(udp_at + 1, halves(wire_len, check));
    }
    for i in 0..OUTER_WORDS {
        if 4 * i as u32 >= growth {
            break;
        }
        // SAFETY: one of its words.
        store(ctx, NETWORK + 4 * i, unsafe {
            outer.0.as_ptr().add(i).read_volatile()
        });
    }
    Some(())
}

/// Where the outer packet comes from, as a client's does.
#[inline(always)]
fn outer_source<F: Family>(settings: &Settings, around: &Around<F::Addr>) -> F::Addr {
    let hash = around.hash.to_be();
    let words = if F::Addr::FAMILY == FAMILY_V4 {
        if settings.encap_mask4 == 0 {
            return around.src;
        }
        [
            settings.encap_source4 | hash & settings.encap_mask4,
            0,
            0,
            0,
        ]
    } else {
        if settings.encap_mask6 == 0 {
            return around.src;
        }
        let [a, b, c, d] = settings.encap_source6;
        [a, b, c, d | hash & settings.encap_mask6]
    };
    F::Addr::narrow(&words)
}

/// A packet for the host: if it answers a check, it comes from the backend again.
#[inline(always)]
pub fn receive(ctx: *mut __sk_buff) -> Option<()> {
    match egress::ethertype(ctx)? {
        ethernet::IPV4 => back::<V4>(ctx, &egress::places4(ctx)?),
        ethernet::IPV6 => back::<V6>(ctx, &egress::places6()),
        _ => None,
    }
}

#[inline(always)]
fn back<F: Family>(ctx: *mut __sk_buff, places: &Places) -> Option<()> {
    let (src, dst): (F::Addr, F::Addr) = (load(ctx, places.src)?, load(ctx, places.dst)?);
    let kind: u8 = load(ctx, places.protocol)?;
    let sum = sum_of(places, kind)?;
    let sport: u16 = load(ctx, places.transport)?;
    let dport: u16 = load(ctx, places.transport + 2)?;
    let known = key(src, dst, sport, dport, kind);
    // SAFETY: a copy; an eviction at worst shows the address of another backend, and the check
    // fails.
    let backend = lookup::address::<F::Addr>(unsafe { maps::PROBES.get(&known) }?);
    readdress(ctx, places, places.src, (src, backend), sum);
    if F::Addr::FAMILY != FAMILY_V4 {
        // The device may have summed the whole packet. In IPv6 addresses and checksum cancel out,
        // with no header checksum between them, and the helper counts only the one
        // (inet_proto_csum_replace_by_diff in net/core/utils.c).
        let mended = csum::fold(checksum::replaced(src, backend));
        // SAFETY: a valid context.
        unsafe { bpf_csum_update(ctx, mended.into()) };
    }
    Some(())
}
