//! Stateless: the way of a packet whose backend the selection table alone tells.
//!
//! In a service with a hash scheduler and a forward mode that translates nothing, a flow is found
//! by hashing its packets again. As long as its slot is settled there is nothing else to know of it:
//! no flow is looked up, none recorded. `docs/flow-state.md` says what happens when a slot changes.

use crate::{
    family::Family,
    flow::{self, Work},
    frame::Frame,
    lookup, maps,
    parse::{Link, Packet, protocol},
    rewrite, select, stats,
    verdict::Verdict,
};
use lb_common::{
    addr::Address,
    backend::{BACKEND_RESOLVED, NO_BACKEND, Slot},
    filter::LANE_ANY_PORT,
    flow::{DIRECTION_CLIENT, FlowKey},
    hash,
    service::{SERVICE_GUARDED, SERVICE_STATELESS, Service, forward, scheduler},
};

/// Sends the packet, if its service is stateless and its slot settled. `None`: its flow may be
/// recorded, or it cannot be sent.
#[inline(always)]
pub fn forward<F: Family>(
    frame: &Frame,
    link: &Link,
    packet: &Packet<F>,
    lane: u8,
) -> Option<Verdict> {
    let key = packet.key();
    let (number, service) = lookup::service::<F>(key.dst, key.dport, packet.protocol, lane)?;
    if service.flags & SERVICE_STATELESS == 0 || service.previous_table != 0 {
        return None;
    }
    // Whoever may begin a flow is asked on the long way.
    let begins = packet.protocol == protocol::UDP || packet.flags.opens();
    if service.flags & SERVICE_GUARDED != 0 && begins {
        return None;
    }
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
    let ifindex = backend.ifindex;
    let rewritten = if mode == forward::DSR {
        rewrite::l2::l2(frame, link, packet, number, &backend.l2)
    } else {
        let gue = mode == forward::GUE;
        rewrite::encap::encap_usual(frame, packet, number, slot.backend, backend, gue, flow_hash)
    };
    if let Err(dropped) = rewritten {
        return Some(dropped);
    }
    let begins = u64::from(packet.flags.opens());
    stats::count_placed(number, slot.backend, packet.packet_len.into(), begins);
    Some(Verdict::leave(frame, ifindex))
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
    let hash = if service.scheduler == scheduler::SOURCE_HASH {
        hash::source_hash(key.src)
    } else {
        flow_hash
    };
    select::slot(first.wrapping_add(hash::slot_of(hash, slots)))
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
