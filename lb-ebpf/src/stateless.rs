//! Stateless: the way of a packet whose backend the selection table alone tells.
//!
//! In a service with a hash scheduler and a forward mode that translates nothing, a flow is found
//! by hashing its packets again. As long as its slot is settled there is nothing else to know of it:
//! no flow is looked up, none recorded. `docs/flow-state.md` says what happens when a slot changes.

use crate::{
    atomic, checksum,
    family::Family,
    flow::{self, Work, change},
    frame::Frame,
    lookup, maps,
    parse::{Link, Packet, protocol},
    rewrite, select, stats,
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{
    abi::ticks_since,
    addr::Address,
    backend::{BACKEND_RESOLVED, NO_BACKEND, Slot},
    csum,
    filter::LANE_ANY_PORT,
    flow::{DIRECTION_CLIENT, FlowKey, SYN_FORGOTTEN, SYN_REPEATED},
    hash,
    service::{SERVICE_GUARDED, SERVICE_PLURAL, SERVICE_STATELESS, Service, forward, scheduler},
};
use network_types::tcp::TcpHdr;

/// Sends the packet, if its service is stateless and its slot settled. `None`: its flow may be
/// recorded, or it cannot be sent.
#[inline(always)]
pub fn forward<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    lane: u8,
) -> Option<Verdict> {
    let dst = packet.network.dst;
    let (number, service) = lookup::service::<F>(dst, packet.dport, packet.protocol, lane)?;
    if service.flags & SERVICE_STATELESS == 0 || service.previous_table != 0 {
        return None;
    }
    // Whoever may begin a flow is asked on the long way.
    let begins = packet.protocol == protocol::UDP || packet.flags.opens();
    if service.flags & SERVICE_GUARDED != 0 && begins {
        return None;
    }
    let packet = &packet.afresh();
    let key = packet.key();
    let flow_hash = hash::flow_hash(&key);
    let slot = slot_in(service, service.table(), &key, flow_hash)?;
    if !slot.is_settled() {
        return None;
    }
    let backend = maps::BACKENDS.get(slot.backend)?;
    let mode = service.forward;
    if backend.flags & BACKEND_RESOLVED == 0
        || backend.tags != 0
        || mode != forward::DSR && F::hops(packet.network.header) <= 1
        || flow::exceeds(packet.packet_len, backend.mtu.into(), frame.ingress())
    {
        return None;
    }
    if packet.flags.opens() && service.flags & SERVICE_PLURAL != 0 && is_repeated(packet, flow_hash)
    {
        change::count_load(slot.backend, change::RETRIES);
        let work = F::work()?;
        (work.avoid, work.since) = (slot.backend, flow::now());
        work.avoider = flow_hash;
        return None;
    }
    let packet = &packet.afresh();
    let pseudo = checksum::pseudo_sum(
        packet.network.src,
        packet.network.dst,
        packet.protocol,
        packet.transport_len,
    );
    let check = packet.checksum(frame)?;
    // The sender may have left it to its hardware; or a checksum around it needs one inside.
    if csum::may_fold_to(pseudo, check) || check == 0 && mode == forward::GUE {
        return None;
    }
    let ifindex = backend.ifindex;
    if mode == forward::DSR {
        rewrite::l2::send_to(link, &backend.l2);
    } else {
        let gue = mode == forward::GUE;
        if let Err(dropped) =
            rewrite::encap::encap_usual(frame, packet, number, backend, gue, flow_hash, pseudo)
        {
            return Some(dropped);
        }
    }
    let begins = packet.flags.opens();
    stats::count_placed(number, slot.backend, packet.packet_len.into(), begins);
    Some(Verdict::leave(frame, ifindex))
}

/// Whether a SYN is a repetition of one that came a while ago, so that nobody seems to have
/// answered it. Remembers it.
///
/// In the other modes the flow would tell. A new connection of the same client from the same port
/// has another sequence number.
#[inline(always)]
fn is_repeated<F: Family>(packet: &Packet<F>, flow_hash: u32) -> bool {
    let Some(recent) = maps::RECENT_SYNS.get_ptr_mut(hash::slot_of(flow_hash, maps::RECENT)) else {
        return false;
    };
    let sequence: u32 = packet.transport.read(offset_of!(TcpHdr, seq));
    let mark = (flow_hash.rotate_left(16) ^ sequence) | 1;
    let now = flow::now();
    // SAFETY: a map value of 8 bytes. CPUs that write to it at once at worst forget a SYN.
    unsafe {
        let before = recent.read_volatile();
        let age = ticks_since(now, before as u32);
        if (before >> 32) as u32 == mark && age < SYN_FORGOTTEN {
            return age >= SYN_REPEATED;
        }
        recent.write_volatile(u64::from(mark) << 32 | u64::from(now));
    }
    false
}

/// A flow of this slot is going to be recorded although the slot is settled: from now on the flow
/// table is asked for those of it.
#[inline(always)]
pub fn expose<A: Address>(service: &Service, key: &FlowKey<A>) {
    let (first, slots) = service.table();
    let slot_hash = slot_hash(service, key, hash::flow_hash(key));
    let place = first.wrapping_add(hash::slot_of(slot_hash, slots));
    let Some(slot) = maps::SLOTS.get_ptr_mut(place) else {
        return;
    };
    // SAFETY: a map value of 8 bytes, aligned to them.
    unsafe {
        let word = slot.cast::<u64>().read_volatile();
        if word as u32 == (word >> 32) as u32 {
            atomic::replace_u64(slot.cast(), word, word & u64::from(u32::MAX));
        }
    }
}

/// The hash that names a flow's slot.
#[inline(always)]
fn slot_hash<A: Address>(service: &Service, key: &FlowKey<A>, flow_hash: u32) -> u32 {
    if service.scheduler == scheduler::SOURCE_HASH {
        hash::source_hash(key.src)
    } else {
        flow_hash
    }
}

/// The slot of a flow in a table.
#[inline(always)]
fn slot_in<A: Address>(
    service: &Service,
    (first, slots): (u32, u32),
    key: &FlowKey<A>,
    flow_hash: u32,
) -> Option<Slot> {
    if slots == 0 {
        return None;
    }
    let slot_hash = slot_hash(service, key, flow_hash);
    select::slot(first.wrapping_add(hash::slot_of(slot_hash, slots)))
}

/// Who has a flow of a stateless service that is not recorded.
pub struct Owners {
    /// The backend that new flows of its slot go to, or [`NO_BACKEND`].
    pub new: u32,
    /// The backend that it is with if it is not new, or [`NO_BACKEND`].
    pub old: u32,
}

/// Who has the flow of `key`, which is not recorded.
#[inline(always)]
pub fn owners<A: Address>(service: &Service, key: &FlowKey<A>) -> Owners {
    let flow_hash = hash::flow_hash(key);
    let none = Slot::settled(NO_BACKEND);
    let slot = slot_in(service, service.table(), key, flow_hash).unwrap_or(none);
    let mut owners = Owners {
        new: slot.backend,
        old: slot.unrecorded(),
    };
    if service.previous_table != 0 {
        // The slots of two tables have nothing to do with each other.
        let table = Service::unpack_table(service.previous_table);
        let slot = slot_in(service, table, key, flow_hash).unwrap_or(none);
        owners.old = slot.unrecorded();
    }
    owners
}

/// Fills `work.client` for a packet that is about a flow which is not recorded, whose key is
/// `work.arrival.key`. `None` if its service is not stateless.
#[inline(always)]
pub fn describe<F: Family>(work: &mut Work<F::Addr>) -> Option<()> {
    let key = &work.arrival.key;
    // Whatever the lane of its address.
    let found = lookup::service::<F>(key.dst, key.dport, key.protocol as u8, LANE_ANY_PORT);
    let (number, service) = found.filter(|(_, s)| s.flags & SERVICE_STATELESS != 0)?;
    let owners = owners(service, key);
    let backend = maps::BACKENDS.get(owners.old)?;
    if owners.old == NO_BACKEND {
        return None;
    }
    let flow = &mut work.client;
    flow.service = number;
    flow.backend = owners.old;
    flow.generation = backend.generation.into();
    flow.forward = service.forward;
    flow.direction = DIRECTION_CLIENT;
    Some(())
}
