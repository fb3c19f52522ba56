//! Flow: packets of a connection follow the way its first packet took.
//!
//! One lookup answers for both directions. What happens with every packet is in this file. What
//! happens when a connection begins ([`place`]) or changes state ([`change`]) is in subprograms, so
//! that the way of most packets stays short, and in global ones, which the kernel verifies once and
//! not again for each state they may be called in. They find the packet in the CPU's [`Work`].

pub mod change;
mod place;
pub mod table;

use crate::{
    family::Family,
    frame::Frame,
    maps,
    parse::{Link, Packet, TcpFlags},
    pressure, rewrite, stateless,
    verdict::Verdict,
};
use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::generated::bpf_ktime_get_coarse_ns};
use core::mem::offset_of;
use lb_common::{
    abi::{self, ticks_since},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend},
    client::ClientKey,
    filter::{LANE_NAT_SOURCE, LANE_ORIGIN, LANE_VIP},
    flow::{DIRECTION_BACKEND, Flow, FlowKey, THROUGH_GATEWAY, state},
    fragment::{Datagram, FragmentKey},
    service::forward,
    stats::DropReason,
};
use network_types::eth::EthHdr;
use table::Number;

/// Where a packet goes and what it becomes. Everything stays in the maps it was found in: a copy
/// would fill the stack.
#[derive(Clone, Copy)]
pub struct Outgoing<A: 'static> {
    /// The flow, with what to rewrite the packet to.
    pub flow: &'static Flow<A>,
    /// Ethernet destination and source.
    pub l2: &'static [u32; 3],
    /// Interface.
    pub ifindex: u32,
    /// VLAN tags.
    pub tags: u32,
}

/// What a subprogram needs to know of a packet.
#[repr(C, align(8))]
pub struct Arrival<A> {
    /// The client's key.
    pub key: FlowKey<A>,
    /// Ethernet destination and source towards the sender.
    pub l2: [u32; 3],
    pub ifindex: u32,
    /// VLAN tags it came with.
    pub tags: u32,
    pub now: u32,
    /// Bytes of the IP packet.
    pub packet_len: u32,
    /// TCP flags.
    pub flags: u8,
    /// 1 if the packet has a hop left.
    pub can_travel: u8,
    /// The destination's lane of the address filter.
    pub lane: u8,
}

/// Where a packet leaves to.
#[repr(C)]
pub struct Way {
    /// Ethernet destination and source.
    pub l2: [u32; 3],
    pub ifindex: u32,
    /// VLAN tags.
    pub tags: u32,
}

impl Way {
    /// To a backend, or to a client.
    #[inline(always)]
    pub fn set(&mut self, l2: &[u32; 3], ifindex: u32, tags: u32) {
        rewrite::copy_link(&mut self.l2, l2);
        self.ifindex = ifindex;
        self.tags = tags;
    }

    /// To the client of a flow whose backend's entry this is; `None` if its interface is not known.
    #[inline(always)]
    pub fn set_back<A>(&mut self, flow: &Flow<A>) -> Option<()> {
        let link = maps::LINKS.get(flow.link.into())?;
        if link.ifindex == 0 {
            return None;
        }
        self.l2[0] = flow.hop_head;
        self.l2[1] = u32::from(flow.hop_tail) | link.source[0];
        self.l2[2] = link.source[1];
        self.ifindex = link.ifindex;
        self.tags = flow.tags();
        Some(())
    }
}

/// Each CPU's desk, where subprograms find the packet and leave their result; it also holds what
/// would be too large for the stack.
#[repr(C, align(8))]
pub struct Work<A> {
    pub arrival: Arrival<A>,
    /// The service and the backend chosen for a new flow, or of the flow that an error quotes.
    pub service: u32,
    pub backend: u32,
    /// How what a subprogram could not encapsulate itself is to travel: 1 in GUE, 0 in IP.
    pub gue: u32,
    /// The hash of its flow.
    pub hash: u32,
    /// VLAN tags that a packet leaves with whose link header a subprogram has written.
    pub tags: u32,
    /// 1 if the packet belonged to a flow of a dead backend that picks another.
    pub moves: u32,
    /// 1 if a half-open flow has become one like any other.
    pub settles: u32,
    /// 1 if an answer whose flow is not recorded may be of one whose client is with another backend.
    pub unsure: u32,
    /// 1 if a new flow is to be recorded.
    pub recording: u32,
    /// 1 if it is to be recorded among the half-open ones.
    pub opening: u32,
    /// The backend that did not answer the client's first SYN, and is not to be picked again; or
    /// [`lb_common::backend::NO_BACKEND`].
    pub avoid: u32,
    /// When that SYN came, if there was one.
    pub since: u32,

    /// The hash of the flow that the two before are about: what stops on its way to be placed leaves
    /// them behind.
    pub avoider: u32,
    /// When the first packet of the new flow came.
    pub created: u32,
    /// The backend's entry of a new flow, and its key.
    pub reply: Flow<A>,
    pub reply_key: FlowKey<A>,
    /// A key that the flow table is asked for.
    pub other_key: FlowKey<A>,
    /// The entry that was found, or is being filled.
    pub number: Number,
    /// How little the flow in it will be missed.
    pub worth: u64,
    /// The backend's entry of the flow that is being recorded, if it has one.
    pub reply_number: Number,
    /// 1 if another flow had to go, whose other entry has the key `other_key`.
    pub replaced: u32,
    /// The client's entry of a new flow, or the entry that the packet of a half-open one belongs to.
    pub client: Flow<A>,
    /// Where the packet leaves to, whichever entry that is.
    pub way: Way,
    /// The client as the maps of clients know it.
    pub client_key: ClientKey<A>,
    /// What the lists are asked for.
    pub access: Key<ClientKey<A>>,
    /// Of the fragment that is being followed, or the first one of a datagram.
    pub fragment: FragmentKey<A>,
    /// Where the first fragment goes.
    pub datagram: Datagram<A>,
}

/// What a subprogram decided, in one register: one of the constants, or the number of a drop
/// reason, to which [`REFUSE`] is added if the sender is to be told, and the MTU from bit 16 on if
/// that is what it is told; the service's number in the high half.
pub type Decision = u64;

/// Go on.
pub const FOLLOW: u64 = 0;
/// The flow is over, and the packet may begin another.
pub const OVER: u64 = 1 << 16;
/// Not a packet for any service.
pub const NOT_OURS: u64 = 2 << 16;
/// Tell the sender.
const REFUSE: u64 = 1 << 8;

#[inline(always)]
pub const fn dropped(reason: DropReason, service: u32) -> Decision {
    (service as u64) << 32 | reason as u64
}

#[inline(always)]
pub const fn too_big(mtu: u16, service: u32) -> Decision {
    refused(DropReason::TooBig, service) | (mtu as u64) << 16
}

#[inline(always)]
pub const fn refused(reason: DropReason, service: u32) -> Decision {
    dropped(reason, service) | REFUSE
}

/// The verdict for a decision that ends the packet's way.
#[inline(always)]
const fn ended(decision: Decision) -> Verdict {
    if decision == NOT_OURS {
        return Verdict::PASS;
    }
    let service = (decision >> 32) as u32;
    if decision as u8 == DropReason::TooBig as u8 {
        return Verdict::too_big((decision >> 16) as u16, service);
    }
    Verdict::refused(decision as u8, decision & REFUSE != 0, service)
}

/// Ticks between two notes of a flow's last packet: a line that all CPUs read is not written
/// with every packet.
const TOUCH_INTERVAL: u32 = 128;

/// States that no ordinary packet changes.
const STEADY: u32 = 1 << state::UDP | 1 << state::ESTABLISHED;

/// Finds the packet's flow, or begins one.
#[inline(always)]
pub fn follow<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    lane: u8,
) -> Result<Outgoing<F::Addr>, Verdict> {
    // The host's own traffic shares the address that NAT sends from, but not its ports.
    if lane == LANE_NAT_SOURCE && !is_nat_port(packet.dport) {
        return Err(Verdict::PASS);
    }
    let work = F::work().ok_or(Verdict::PASS)?;
    work.arrival.key = packet.key();
    let can_travel = F::hops(packet.network.header) > 1;
    work.number = F::find(table::ARRIVAL);
    if let Some(flow) = table::flow::<F>(work.number) {
        let now = now();
        if !can_travel && flow.forward != forward::DSR {
            return Err(Verdict::refused(
                DropReason::TtlExceeded as u8,
                true,
                flow.service,
            ));
        }
        if flow.direction == DIRECTION_BACKEND {
            return to_client::<F>(frame, packet, flow, now);
        }
        if let Some(outgoing) = to_backend::<F>(frame, packet, flow, now)? {
            return Ok(outgoing);
        }
    }
    if lane & (LANE_VIP | LANE_ORIGIN) == 0 && !pressure::may_be_opening(now()) {
        return Err(Verdict::PASS);
    }
    begin::<F>(frame, link, packet, can_travel, lane)
}

/// A packet from the backend, on its way to the client.
#[inline(always)]
fn to_client<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    flow: &'static mut Flow<F::Addr>,
    now: u32,
) -> Result<Outgoing<F::Addr>, Verdict> {
    let work = F::work().ok_or(Verdict::PASS)?;
    let through_gateway = flow.link == THROUGH_GATEWAY;
    if through_gateway {
        work.arrival.packet_len = packet.packet_len;
        work.arrival.ifindex = frame.ingress();
        match F::through_gateway() {
            FOLLOW => {}
            decision => return Err(ended(decision)),
        }
    } else if exceeds(packet.packet_len, flow.mtu.into(), frame.ingress()) {
        return Err(Verdict::too_big(flow.mtu, flow.service));
    }
    touch(flow, now);
    if packet.flags.any(TcpFlags::CHANGES) {
        work.arrival.key = flow.opposite(u32::from(packet.protocol));
        work.arrival.flags = packet.flags.0;
        work.arrival.now = now;
        match F::note_reply() {
            FOLLOW => {}
            decision => return Err(ended(decision)),
        }
    }
    let flow = if through_gateway {
        &work.client
    } else {
        work.way.set_back(flow).ok_or(Verdict::PASS)?;
        flow
    };
    Ok(Outgoing {
        flow,
        l2: &work.way.l2,
        ifindex: work.way.ifindex,
        tags: work.way.tags,
    })
}

/// A packet from the client, on its way to the backend. `None`: the flow is over and the packet
/// begins another.
#[inline(always)]
fn to_backend<F: Family>(
    frame: &Frame,
    packet: &Packet<F>,
    flow: &'static mut Flow<F::Addr>,
    now: u32,
) -> Result<Option<Outgoing<F::Addr>>, Verdict> {
    let Some(backend) = maps::BACKENDS.get(flow.backend) else {
        return Err(Verdict::drop(DropReason::NoBackend, flow.service));
    };
    if packet.flags.any(TcpFlags::CHANGES) || !is_steady(flow, backend) {
        let work = F::work().ok_or(Verdict::PASS)?;
        work.arrival.flags = packet.flags.0;
        work.arrival.now = now;
        match F::revise() {
            FOLLOW => {}
            OVER => return Ok(None),
            decision => return Err(ended(decision)),
        }
    }
    if exceeds(packet.packet_len, backend.mtu.into(), frame.ingress()) {
        return Err(Verdict::too_big(backend.mtu, flow.service));
    }
    touch(flow, now);
    Ok(Some(Outgoing {
        flow,
        l2: &backend.l2,
        ifindex: backend.ifindex,
        tags: backend.tags,
    }))
}

/// Whether an ordinary packet of a client changes nothing of its flow, and its backend is as it was.
#[inline(always)]
pub fn is_steady<A>(flow: &Flow<A>, backend: &Backend) -> bool {
    STEADY >> (flow.state & 7) & 1 != 0
        && backend.flags == BACKEND_RESOLVED | BACKEND_ALIVE
        && backend.generation == flow.generation
}

/// Whether a packet is too large for a way of this MTU.
///
/// One that is larger than the interface it came by can receive is not a packet yet: generic mode
/// sees what a local sender leaves its interface to cut up, and sends it on like that.
#[inline(always)]
pub fn exceeds(packet_len: u32, mtu: u32, ingress: u32) -> bool {
    // An MTU of 0 is that of a way that is not known.
    if packet_len.wrapping_sub(1) <= mtu.wrapping_sub(1) {
        return false;
    }
    let received = interface_mtu(ingress);
    received == 0 || packet_len <= received
}

/// The MTU of an attached interface; 0 if it is not known.
#[inline(always)]
fn interface_mtu(ifindex: u32) -> u32 {
    // SAFETY: a copy of one half word.
    unsafe { maps::INTERFACES.get(ifindex) }.map_or(0, |i| i.mtu.into())
}

/// The first packet of a flow, or one of a half-open flow.
#[inline(always)]
fn begin<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    can_travel: bool,
    lane: u8,
) -> Result<Outgoing<F::Addr>, Verdict> {
    let work = F::work().ok_or(Verdict::PASS)?;
    work.arrival.l2 = back(link);
    work.arrival.ifindex = frame.ingress();
    work.arrival.tags = link.tags;
    work.arrival.now = now();
    work.arrival.packet_len = packet.packet_len;
    work.arrival.flags = packet.flags.0;
    work.arrival.can_travel = u8::from(can_travel);
    work.arrival.lane = lane;
    let mut decision = OVER;
    if pressure::may_be_opening(work.arrival.now) {
        decision = F::resume();
        if decision == FOLLOW && work.settles != 0 {
            F::settle();
        }
    }
    if decision == OVER && lane & LANE_VIP == 0 {
        decision = NOT_OURS;
    }
    if decision == OVER {
        for step in [F::choose, F::record_reply, F::record_client] {
            decision = step();
            if decision != FOLLOW {
                break;
            }
        }
    }
    // The port that a client's packets come from may be that of a service, or its address share the lane of a VIP.
    if decision == NOT_OURS && !packet.flags.opens() {
        decision = F::answer();
        if decision == FOLLOW && work.unsure != 0 && F::find(table::OTHER) != table::NONE {
            decision = NOT_OURS;
        }
        if decision == FOLLOW
            && packet.flags.any(TcpFlags::SYN | TcpFlags::RST)
            && stateless::note_answer(frame, packet, &work.client)
        {
            decision = dropped(DropReason::Refused, work.client.service);
        }
    }
    if decision != FOLLOW {
        return Err(ended(decision));
    }
    Ok(Outgoing {
        flow: &work.client,
        l2: &work.way.l2,
        ifindex: work.way.ifindex,
        tags: work.way.tags,
    })
}

/// Ethernet destination and source towards the packet's sender: twelve bytes as they will stand
/// in the frame.
#[inline(always)]
fn back(link: &Link) -> [u32; 3] {
    let to = link.header.read_mac(offset_of!(EthHdr, src_addr));
    let from = link.header.read_mac(offset_of!(EthHdr, dst_addr));
    let ([t0, t1], [f0, f1, f2, f3], [f4, f5]) = (
        to.tail.to_ne_bytes(),
        from.head.to_ne_bytes(),
        from.tail.to_ne_bytes(),
    );
    [
        to.head,
        u32::from_ne_bytes([t0, t1, f0, f1]),
        u32::from_ne_bytes([f2, f3, f4, f5]),
    ]
}

/// Notes that a packet of the flow has been seen.
#[inline(always)]
pub fn touch<A>(flow: &mut Flow<A>, now: u32) {
    if ticks_since(now, flow.last_seen) >= TOUCH_INTERVAL {
        flow.last_seen = now;
    }
}

#[inline(always)]
pub fn is_nat_port(port: u16) -> bool {
    let port = u16::from_be(port);
    maps::SETTINGS
        .get(0)
        .is_some_and(|s| port >= s.nat_port_first && port <= s.nat_port_last)
}

/// The coarse clock: a jiffy's resolution for the price of reading a variable.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: the helper only reads the kernel's clock.
    abi::ticks_from_ns(unsafe { bpf_ktime_get_coarse_ns() })
}

/// The subprograms of one family, under names of their own because the kernel knows global
/// functions by name.
macro_rules! subprograms {
    ($family:ty, $find:ident, $port_beside:ident, $reserve:ident, $publish:ident, $bury:ident, $remove:ident, $choose:ident, $record_reply:ident, $record_client:ident, $revise:ident, $note_reply:ident, $answer:ident, $describe:ident, $returns:ident, $through_gateway:ident) => {
        /// [`table::find`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $find(which: u32) -> Number {
            table::find::<$family>(which)
        }

        /// [`table::port_beside`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $port_beside() -> u32 {
            table::port_beside::<$family>()
        }

        /// [`table::reserve`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $reserve(which: u32) -> u64 {
            table::reserve::<$family>(which)
        }

        /// [`table::publish`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $publish() -> u64 {
            table::publish::<$family>()
        }

        /// [`table::bury`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $bury() -> u64 {
            table::bury::<$family>()
        }

        /// [`table::remove`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $remove(which: u32) -> u64 {
            table::remove::<$family>(which)
        }

        /// [`place::choose`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $choose() -> Decision {
            place::choose::<$family>()
        }

        /// [`place::record_reply`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $record_reply() -> Decision {
            place::record_reply::<$family>()
        }

        /// [`place::record_client`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $record_client() -> Decision {
            place::record_client::<$family>()
        }

        /// [`change::revise`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $revise() -> Decision {
            change::revise::<$family>()
        }

        /// [`change::note_reply`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $note_reply() -> Decision {
            change::note_reply::<$family>()
        }

        /// [`stateless::answer`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $answer() -> Decision {
            stateless::answer::<$family>()
        }

        /// [`stateless::describe`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $describe() -> u64 {
            stateless::describe::<$family>()
        }

        /// [`stateless::returns_to_arrival`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $returns() -> u64 {
            stateless::returns_to_arrival::<$family>()
        }

        /// [`stateless::through_gateway`] for one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $through_gateway() -> Decision {
            stateless::through_gateway::<$family>()
        }
    };
}

subprograms!(
    crate::family::V4,
    find4,
    port_beside4,
    reserve4,
    publish4,
    bury4,
    remove4,
    choose4,
    record_reply4,
    record_client4,
    revise4,
    note_reply4,
    answer4,
    describe4,
    returns4,
    through_gateway4
);
subprograms!(
    crate::family::V6,
    find6,
    port_beside6,
    reserve6,
    publish6,
    bury6,
    remove6,
    choose6,
    record_reply6,
    record_client6,
    revise6,
    note_reply6,
    answer6,
    describe6,
    returns6,
    through_gateway6
);
