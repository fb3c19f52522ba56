//! Stateless: the way of a packet whose backend the selection table alone tells.
//!
//! In a service with a hash scheduler and a forward mode that translates nothing, or in `dnat` with a
//! gateway, a flow is found by hashing its packets again. As long as its slot is settled there is
//! nothing else to know of it: no flow is looked up, none recorded. `docs/flow-state.md` says what
//! happens when a slot changes, and how answers are told in `dnat`.

use crate::{
    atomic, checksum,
    family::Family,
    flow::{self, Decision, FOLLOW, NOT_OURS, Work, change, dropped, refused, table, too_big},
    frame::Frame,
    lookup, maps,
    parse::{Link, Packet, TcpFlags, protocol},
    rewrite, select, stats,
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{
    abi::ticks_since,
    addr::Address,
    backend::{BACKEND_RESOLVED, Backend, LOCAL, NO_BACKEND, Slot},
    csum,
    filter::{LANE_ANY_PORT, LANE_HELD},
    flow::{DIRECTION_BACKEND, DIRECTION_CLIENT, Flow, FlowKey, SYN_FORGOTTEN, SYN_REPEATED},
    hash,
    service::{
        GATEWAY_RESOLVED, Gateway, SERVICE_GUARDED, SERVICE_PLURAL, SERVICE_STATELESS, Service,
        ServiceKey, forward, scheduler,
    },
    stats::DropReason,
};
use network_types::{eth::EthHdr, tcp::TcpHdr};

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
    if mode == forward::DNAT
        && !returns::<F>(
            number,
            backend,
            packet.network.src,
            &Sender::of(frame, link),
        )
    {
        return None;
    }
    if backend.flags & BACKEND_RESOLVED == 0
        || backend.tags != 0
        || mode != forward::DSR && F::hops(packet.network.header) <= 1
        || flow::exceeds(packet.packet_len, backend.mtu.into(), frame.ingress())
    {
        return None;
    }
    if packet.flags.opens()
        && service.flags & SERVICE_PLURAL != 0
        && let Some(since) = unanswered_since(packet, flow_hash)
    {
        change::count_load(slot.backend, change::RETRIES);
        let work = F::work()?;
        (work.avoid, work.since) = (slot.backend, since);
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
    } else if mode == forward::DNAT {
        rewrite::nat::redirect(frame, link, packet, backend, check)?;
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

/// The neighbour that a packet came from.
pub struct Sender {
    /// Its Ethernet address in the first six bytes.
    pub l2: [u32; 3],
    /// The interface it is behind.
    pub ifindex: u32,
    /// VLAN tags towards it.
    pub tags: u32,
}

impl Sender {
    #[inline(always)]
    fn of(frame: &Frame, link: &Link) -> Self {
        let source = link.header.read_mac(offset_of!(EthHdr, src_addr));
        Self {
            l2: [source.head, u32::from(source.tail), 0],
            ifindex: frame.ingress(),
            tags: link.tags,
        }
    }
}

/// Whether answers of `backend` find a client in `dnat` whose flow is not recorded.
///
/// They go to the gateway, so that is where the client must have come from. What goes to this host itself may have
/// nothing to do with the VIP. What the kernel delivers is answered on its way out, where only flows are known. And
/// a backend cannot answer itself.
#[inline(always)]
pub fn returns<F: Family>(
    service: u32,
    backend: &Backend,
    client: F::Addr,
    sender: &Sender,
) -> bool {
    let may_be_us = lookup::lane_of::<F>(client) & LANE_HELD != 0;
    let leads_back =
        |gateway: &Gateway| gateway.leads_back(&sender.l2, sender.ifindex, sender.tags);
    !may_be_us
        && backend.ifindex != LOCAL
        && lookup::address::<F::Addr>(&backend.addr) != client
        && maps::GATEWAYS.get(service).is_some_and(leads_back)
}

/// [`returns`] for the flow that is being placed.
#[inline(always)]
pub fn returns_to_arrival<F: Family>() -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    let Some(backend) = maps::BACKENDS.get(work.backend) else {
        return 0;
    };
    let arrival = &work.arrival;
    let sender = Sender {
        l2: arrival.l2,
        ifindex: arrival.ifindex,
        tags: arrival.tags,
    };
    returns::<F>(work.service, backend, arrival.key.src, &sender).into()
}

/// Fills `work.client` and `work.way` for an answer whose flow is recorded in entry `work.number`, and goes through its
/// service's gateway all the same.
#[inline(always)]
pub fn through_gateway<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return NOT_OURS;
    };
    let Some(flow) = table::flow::<F>(work.number) else {
        return NOT_OURS;
    };
    let number = flow.service;
    table::copy(&raw mut work.client, flow);
    let Some(gateway) = maps::GATEWAYS.get(number) else {
        return NOT_OURS;
    };
    leave_through::<F>(work, gateway, number)
}

/// The way of what `work.client` says through a gateway.
#[inline(always)]
fn leave_through<F: Family>(work: &mut Work<F::Addr>, gateway: &Gateway, service: u32) -> Decision {
    if gateway.flags & GATEWAY_RESOLVED == 0 {
        return dropped(DropReason::NoNeighbour, service);
    }
    let arrival = &work.arrival;
    if flow::exceeds(arrival.packet_len, gateway.mtu.into(), arrival.ifindex) {
        return too_big(gateway.mtu, service);
    }
    work.way.set(&gateway.l2, gateway.ifindex, gateway.tags);
    FOLLOW
}

/// What becomes in `dnat` of a client's packet with the key `work.arrival.key`.
#[inline(always)]
fn towards_backend<F: Family>(work: &mut Work<F::Addr>, backend: &Backend) {
    let (key, flow) = (&work.arrival.key, &mut work.client);
    let address = lookup::address::<F::Addr>(&backend.addr);
    let addresses = checksum::replaced(key.dst, address);
    let ports = u64::from(!key.dport) + u64::from(backend.port);
    flow.src = key.src;
    flow.dst = address;
    flow.sport = key.sport;
    flow.dport = backend.port;
    flow.l3_delta = csum::fold(addresses);
    flow.l4_delta = csum::fold(addresses + ports);
    flow.generation = backend.generation;
    flow.forward = forward::DNAT;
    flow.direction = DIRECTION_CLIENT;
}

/// A packet of no recorded flow that is perhaps a backend's answer to a client of a `dnat` service which does not
/// record its flows; its key is `work.arrival.key`. [`NOT_OURS`] if it is none.
///
/// It is one if a packet the other way round, to the VIP, would belong to this very backend without being
/// recorded. `work.client` and `work.way` say then what becomes of it, and `work.unsure` whether `work.other_key`, the
/// key of such a packet, may be recorded all the same: then its client is with another backend.
#[inline(always)]
pub fn answer<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return NOT_OURS;
    };
    let arrival = &work.arrival;
    let key = &arrival.key;
    if lookup::lane_of::<F>(key.dst) & LANE_HELD != 0 {
        return NOT_OURS;
    }
    let origin = ServiceKey::origin(key.src, key.sport, key.protocol as u8);
    let number = lookup::listener::<F>(&origin);
    let Some(backend) = maps::BACKENDS.get(number).filter(|_| number != 0) else {
        return NOT_OURS;
    };
    let service_number = backend.service;
    let (Some(service), Some(gateway)) = (
        maps::SERVICES.get(service_number),
        maps::GATEWAYS.get(service_number),
    ) else {
        return NOT_OURS;
    };
    if service.flags & SERVICE_STATELESS == 0 || service.forward != forward::DNAT {
        return NOT_OURS;
    }
    let vip = lookup::address::<F::Addr>(&gateway.vip);
    let asked = FlowKey {
        src: key.dst,
        dst: vip,
        sport: key.dport,
        dport: gateway.port,
        protocol: key.protocol,
    };
    let owners = owners(service, &asked);
    if owners.old != number {
        return NOT_OURS;
    }
    work.other_key = asked;
    work.unsure = u32::from(!owners.settled);
    let arrival = &work.arrival;
    let key = &arrival.key;
    if arrival.can_travel == 0 {
        return refused(DropReason::TtlExceeded, service_number);
    }
    let flow = &mut work.client;
    let addresses = checksum::replaced(key.src, vip);
    let ports = u64::from(!key.sport) + u64::from(gateway.port);
    flow.src = vip;
    flow.dst = key.dst;
    flow.sport = gateway.port;
    flow.dport = key.dport;
    flow.l3_delta = csum::fold(addresses);
    flow.l4_delta = csum::fold(addresses + ports);
    flow.service = service_number;
    flow.backend = number;
    flow.generation = backend.generation;
    flow.forward = forward::DNAT;
    flow.direction = DIRECTION_BACKEND;
    leave_through::<F>(work, gateway, service_number)
}

/// When a SYN came first, if it is a repetition of one that came a while ago, so that nobody seems to have
/// answered it. Remembers it.
///
/// In the other modes the flow would tell. A new connection of the same client from the same port
/// has another sequence number.
#[inline(always)]
fn unanswered_since<F: Family>(packet: &Packet<F>, flow_hash: u32) -> Option<u32> {
    let place = hash::slot_of(flow_hash, maps::RECENT);
    let recent = maps::RECENT_SYNS.get_ptr_mut(place)?;
    let mark = mark(flow_hash, packet.transport.read(offset_of!(TcpHdr, seq)));
    let now = flow::now();
    // SAFETY: a map value of 8 bytes. CPUs that write to it at once at worst forget a SYN.
    unsafe {
        let before = recent.read_volatile();
        let since = before as u32;
        let age = ticks_since(now, since);
        if (before >> 32) as u32 == mark && age < SYN_FORGOTTEN {
            return (age >= SYN_REPEATED).then_some(since);
        }
        recent.write_volatile(u64::from(mark) << 32 | u64::from(now));
    }
    None
}

/// What a SYN is remembered by; the sequence number as it stands in the packet.
#[inline(always)]
const fn mark(flow_hash: u32, sequence: u32) -> u32 {
    (flow_hash.rotate_left(16) ^ sequence) | 1
}

/// Notes the answer to a SYN that [`answer`] has found. `true` if it is kept from the client: the refusal of a SYN that
/// came a moment ago. Its next one tries another backend, if there is one; but only once, or it would not hear of it
/// if all of them refuse.
#[inline(always)]
pub fn note_answer<F: Family>(frame: &Frame, packet: &Packet<F>, flow: &Flow<F::Addr>) -> bool {
    let Some(tcp) = packet.tcp(frame) else {
        return false;
    };
    let sequence: u32 = tcp.read(offset_of!(TcpHdr, seq));
    let accepts = packet.flags.any(TcpFlags::SYN);
    // RFC 9293 section 3.10.7.1: nothing else is reset by a segment with sequence number 0.
    let refuses = packet.flags.any(TcpFlags::RST) && sequence == 0;
    if !packet.flags.any(TcpFlags::ACK) || !accepts && !refuses {
        return false;
    }
    if refuses {
        change::count_load(flow.backend, change::RESETS);
    }
    let flow_hash = hash::flow_hash(&flow.opposite(u32::from(packet.protocol)));
    let place = hash::slot_of(flow_hash, maps::RECENT);
    let Some(recent) = maps::RECENT_SYNS.get_ptr_mut(place) else {
        return false;
    };
    let acknowledged = u32::from_be(tcp.read(offset_of!(TcpHdr, ack_seq)));
    let asked = mark(flow_hash, acknowledged.wrapping_sub(1).to_be());
    // SAFETY: as in `unanswered_since`.
    let before = unsafe { recent.read_volatile() };
    if (before >> 32) as u32 != asked {
        return false;
    }
    if accepts {
        // A SYN that comes again is not without an answer: it was lost on the client's side.
        // SAFETY: as above.
        unsafe { recent.write_volatile(0) };
        return false;
    }
    let plural = maps::SERVICES
        .get(flow.service)
        .is_some_and(|service| service.flags & SERVICE_PLURAL != 0);
    plural && ticks_since(flow::now(), before as u32) < SYN_REPEATED
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
    /// Whether no flow of its slot is with another backend.
    pub settled: bool,
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
        settled: slot.is_settled() && service.previous_table == 0,
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
/// `work.arrival.key`; 0 if there is none.
#[inline(always)]
pub fn describe<F: Family>() -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    let key = &work.arrival.key;
    // Whatever the lane of its address.
    let found = lookup::service::<F>(key.dst, key.dport, key.protocol as u8, LANE_ANY_PORT);
    let Some((number, service)) = found.filter(|(_, s)| s.flags & SERVICE_STATELESS != 0) else {
        return 0;
    };
    let owners = owners(service, key);
    let backend = maps::BACKENDS.get(owners.old);
    let Some(backend) = backend.filter(|_| owners.old != NO_BACKEND) else {
        return 0;
    };
    let flow = &mut work.client;
    flow.service = number;
    flow.backend = owners.old;
    flow.generation = backend.generation;
    flow.forward = service.forward;
    flow.direction = DIRECTION_CLIENT;
    if service.forward == forward::DNAT {
        towards_backend::<F>(work, backend);
    }
    1
}
