//! Egress: what a server on the balancer's own host answers leaves with the VIP as its source.
//!
//! XDP hands a packet for such a backend to the kernel, and the server's answer is the kernel's
//! own packet, which XDP never sees. It passes here on its way out, and finds its flow as the
//! answer of any other backend does.

use crate::{
    family::{Family, V4, V6},
    flow::{self, table},
    parse::{TcpFlags, ethernet, protocol},
    stats,
};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
};
use core::mem::{MaybeUninit, offset_of};
use lb_common::{
    addr::Address,
    filter,
    flow::{DIRECTION_BACKEND, FlowKey},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

/// Where the network header begins. The kernel keeps a VLAN tag beside the packet, not in it.
pub const NETWORK: usize = EthHdr::LEN;
/// More fragments, and the fragment's offset.
const FRAGMENT: u16 = 0x3fff_u16.to_be();

/// Gives an answer of a local backend its VIP. Anything else stays as it is.
#[inline(always)]
pub fn restore(ctx: *mut __sk_buff) {
    match ethertype(ctx) {
        Some(ethernet::IPV4) => restore4(ctx),
        Some(ethernet::IPV6) => restore6(ctx),
        _ => 0,
    };
}

/// [`translate`] for IPv4. Like [`restore6`] apart from what it is called from, whose other
/// subprograms need the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn restore4(ctx: *mut __sk_buff) -> u32 {
    let places = places4(ctx);
    u32::from(places.is_some_and(|places| translate::<V4>(ctx, &places).is_some()))
}

/// [`translate`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn restore6(ctx: *mut __sk_buff) -> u32 {
    u32::from(translate::<V6>(ctx, &places6()).is_some())
}

/// The ethertype behind VLAN tags.
#[inline(always)]
pub fn ethertype(ctx: *mut __sk_buff) -> Option<u16> {
    load(ctx, offset_of!(EthHdr, ether_type))
}

/// The fields of an IPv4 packet; none of a fragment.
#[inline(always)]
pub fn places4(ctx: *mut __sk_buff) -> Option<Places> {
    let version_ihl: u8 = load(ctx, NETWORK)?;
    let fragment: u16 = load(ctx, NETWORK + offset_of!(Ipv4Hdr, frags))?;
    if fragment & FRAGMENT != 0 {
        return None;
    }
    Some(Places {
        protocol: NETWORK + offset_of!(Ipv4Hdr, proto),
        src: NETWORK + offset_of!(Ipv4Hdr, src_addr),
        dst: NETWORK + offset_of!(Ipv4Hdr, dst_addr),
        transport: NETWORK + usize::from(version_ihl & 0xf) * 4,
        sum: Some(NETWORK + offset_of!(Ipv4Hdr, check)),
    })
}

/// The fields of an IPv6 packet without extension headers.
#[inline(always)]
pub fn places6() -> Places {
    Places {
        protocol: NETWORK + offset_of!(Ipv6Hdr, next_hdr),
        src: NETWORK + offset_of!(Ipv6Hdr, src_addr),
        dst: NETWORK + offset_of!(Ipv6Hdr, dst_addr),
        transport: NETWORK + Ipv6Hdr::LEN,
        sum: None,
    }
}

/// Where the fields of a packet are.
pub struct Places {
    /// The protocol behind the network header.
    pub protocol: usize,
    /// Source address.
    pub src: usize,
    /// Destination address.
    pub dst: usize,
    /// The transport header.
    pub transport: usize,
    /// The network header's own sum.
    pub sum: Option<usize>,
}

#[inline(always)]
fn translate<F: Family>(ctx: *mut __sk_buff, places: &Places) -> Option<()> {
    let src: F::Addr = load(ctx, places.src)?;
    if crate::lookup::lane_of::<F>(src) & filter::LANE_BACKEND == 0 {
        return None;
    }
    let protocol: u8 = load(ctx, places.protocol)?;
    let transport = places.transport;
    let (sum, flags, mangled) = match protocol {
        protocol::TCP => {
            let flags: u8 = load(ctx, transport + 13)?;
            (transport + offset_of!(TcpHdr, check), flags, 0)
        }
        // A sum of zero stays: the sender chose to send none (RFC 768).
        protocol::UDP => (
            transport + offset_of!(UdpHdr, check),
            0,
            u64::from(BPF_F_MARK_MANGLED_0),
        ),
        _ => return None,
    };
    // The same desk as XDP's: both run with interrupts of the network stack held off.
    let work = F::work()?;
    let key = FlowKey::<F::Addr> {
        src,
        dst: load(ctx, places.dst)?,
        sport: load(ctx, transport)?,
        dport: load(ctx, transport + 2)?,
        protocol: u32::from(protocol),
    };
    work.arrival.key = key;
    let flow = match table::flow::<F>(F::find(table::ARRIVAL)) {
        Some(flow) => flow,
        // SAFETY: a live map value, as in `flow::follow`.
        None => unsafe { &mut *F::opening().get_ptr_mut(&key)? },
    };
    if flow.direction != DIRECTION_BACKEND {
        return None;
    }
    flow::touch(flow, flow::now());
    if TcpFlags(flags).any(TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST) {
        work.arrival.key = flow.opposite(key.protocol);
        work.arrival.flags = flags;
        F::note_reply();
    }
    let new = crate::lookup::load::<F::Addr>(&flow.src);
    readdress(ctx, places, places.src, (src, new), (sum, mangled));
    for (offset, from, to) in [(0, key.sport, flow.sport), (2, key.dport, flow.dport)] {
        // SAFETY: as above.
        unsafe {
            bpf_l4_csum_replace(ctx, sum as u32, from.into(), to.into(), mangled | 2);
        }
        store(ctx, transport + offset, to);
    }
    // SAFETY: a valid context.
    let len = unsafe { (*ctx).len }.wrapping_sub(NETWORK as u32);
    stats::count_out(flow.service, flow.backend, u64::from(len));
    Some(())
}

/// Writes another address in the place of the one at `at`, and mends the sums. `sum` is where the
/// transport's is, with the flags of `bpf_l4_csum_replace` that its protocol asks for.
#[inline(always)]
pub fn readdress<A: Address>(
    ctx: *mut __sk_buff,
    places: &Places,
    at: usize,
    (old, new): (A, A),
    (sum, mangled): (usize, u64),
) {
    let (old, new) = (old.widen(), new.widen());
    for i in 0..A::WORDS {
        let (from, to) = (u64::from(old[i]), u64::from(new[i]));
        // SAFETY: the helpers check the offsets.
        unsafe {
            if let Some(sum) = places.sum {
                bpf_l3_csum_replace(ctx, sum as u32, from, to, 4);
            }
            let how = u64::from(BPF_F_PSEUDO_HDR) | mangled | 4;
            bpf_l4_csum_replace(ctx, sum as u32, from, to, how);
        }
        store(ctx, at + 4 * i, new[i]);
    }
}

/// A piece of the packet; `None` if it ends before.
#[inline(always)]
pub fn load<T: Copy>(ctx: *mut __sk_buff, offset: usize) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills the value, or fails; every type it is used with is made of integers.
    unsafe {
        let to = value.as_mut_ptr().cast();
        (bpf_skb_load_bytes(ctx.cast(), offset as u32, to, size_of::<T>() as u32) == 0)
            .then(|| value.assume_init())
    }
}

/// Writes a piece of the packet.
#[inline(always)]
pub fn store<T: Copy>(ctx: *mut __sk_buff, offset: usize, value: T) {
    let from = (&raw const value).cast();
    // SAFETY: the value lives over the call; the helper checks the offset.
    unsafe {
        bpf_skb_store_bytes(ctx, offset as u32, from, size_of::<T>() as u32, 0);
    }
}
