//! A connection begins: a backend is picked, then each direction is recorded.
//!
//! Three subprograms, called one after the other: as one, they and their caller would take more
//! stack than the kernel grants.

use super::{
    Decision, FOLLOW, NOT_OURS, change::count_begin, dropped, exceeds, refused, table, too_big,
};
use crate::{
    admit, atomic, checksum,
    family::Family,
    lookup, maps,
    parse::{TcpFlags, protocol},
    pressure,
    select::{self, ALL_FULL},
    stateless, stats,
};
use aya_ebpf::bindings::BPF_NOEXIST;
use lb_common::{
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, LOCAL, NO_BACKEND},
    csum,
    flow::{DIRECTION_BACKEND, DIRECTION_CLIENT, Flow, FlowKey, THROUGH_GATEWAY, state},
    flow_table::ROUND,
    hash,
    service::{
        SERVICE_GUARDED, SERVICE_STATELESS, Service, forward, on_backend_down, on_no_backend,
    },
    stats::DropReason,
};

/// Picks a backend for a new flow and prepares the backend's entry.
#[inline(always)]
pub fn choose<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return NOT_OURS;
    };
    let arrival = &work.arrival;
    let key = &arrival.key;
    let udp = key.protocol == u32::from(protocol::UDP);
    let found = lookup::service::<F>(key.dst, key.dport, key.protocol as u8, arrival.lane);
    let Some((number, service)) = found else {
        return NOT_OURS;
    };
    let opens = TcpFlags(arrival.flags).opens();
    let stateless = service.flags & SERVICE_STATELESS != 0;
    let translates = forward::translates(service.forward);
    let moves = work.moves != 0;
    work.moves = 0;
    if !udp && !opens && translates && !stateless && !moves {
        return refused(DropReason::NoFlow, number);
    }
    if service.flags & SERVICE_GUARDED != 0 && (udp || opens) {
        match F::admit(number) {
            FOLLOW => {}
            decision => return decision,
        }
    }
    work.recording = 1;
    work.opening = 0;
    work.reply_number = table::NONE;
    let mut by_hash = false;
    if !stateless {
        // In the middle of a flow that is not recorded: its first packet came under pressure, or its
        // entry is gone. The backend knows what to make of it.
        by_hash = !udp && !opens && !translates;
        if !by_hash && pressure::is_high(work.arrival.now) {
            by_hash = !translates;
            if translates {
                work.opening = 1;
                pressure::note_opening(work.arrival.now);
            }
        }
    }
    // Consumed: it concerns this packet only, if it does.
    let mut avoid = core::mem::replace(&mut work.avoid, NO_BACKEND);
    if avoid != NO_BACKEND && work.avoider != hash::flow_hash(&work.arrival.key) {
        avoid = NO_BACKEND;
    }
    work.created = if avoid == NO_BACKEND {
        work.arrival.now
    } else {
        work.since
    };
    let arrival = &work.arrival;
    let key = &arrival.key;
    let backend_number = if avoid != NO_BACKEND && opens {
        let other = select::another(number, service, key, avoid);
        if stateless {
            stateless::expose(service, key);
        }
        other
    } else if by_hash {
        work.recording = 0;
        select::by_hash(service, key)
    } else if stateless {
        let owners = stateless::owners(service, key);
        // A UDP packet may begin a flow or belong to one: it is taken for the latter.
        let old = if opens {
            owners.new
        } else {
            old_owner(service, &owners)
        };
        let reschedules = service.on_backend_down == on_backend_down::RESCHEDULE;
        if old == REFUSED && !udp && !reschedules {
            return refused(DropReason::BackendDown, number);
        }
        // One that is with its slot's backend is found there without a record.
        work.recording = u32::from(owners.new != owners.old);
        if old == REFUSED { owners.new } else { old }
    } else if service.affinity != 0 {
        match admit::returning::<F>(work, number, service) {
            NO_BACKEND => match select::backend(number, service, &work.arrival.key) {
                none @ (NO_BACKEND | ALL_FULL) => none,
                backend => admit::remember::<F>(work, number, service, backend),
            },
            backend => backend,
        }
    } else {
        select::backend(number, service, key)
    };
    let arrival = &work.arrival;
    let key = &arrival.key;
    if backend_number == ALL_FULL {
        return no_backend(DropReason::BackendFull, service, number);
    }
    let Some(backend) = maps::BACKENDS
        .get(backend_number)
        .filter(|_| backend_number != NO_BACKEND)
    else {
        return no_backend(DropReason::NoBackend, service, number);
    };
    if backend.flags & BACKEND_RESOLVED == 0 {
        return dropped(DropReason::NoNeighbour, number);
    }
    // The packet would arrive from the backend's own address, which no host takes from outside.
    if service.forward == forward::DNAT && lookup::address::<F::Addr>(&backend.addr) == key.src {
        return refused(DropReason::Hairpin, number);
    }
    if arrival.can_travel == 0 && service.forward != forward::DSR {
        return refused(DropReason::TtlExceeded, number);
    }
    if exceeds(arrival.packet_len, backend.mtu.into(), arrival.ifindex) {
        return too_big(backend.mtu, number);
    }
    work.service = number;
    work.backend = backend_number;
    let returns = stateless && translates && F::returns() != 0;
    if stateless && translates && !returns && work.recording == 0 {
        work.recording = 1;
        if pressure::is_high(work.arrival.now) {
            work.opening = 1;
            pressure::note_opening(work.arrival.now);
        }
    }
    let arrival = &work.arrival;
    let key = &arrival.key;
    let (mut link, mut mtu) = (THROUGH_GATEWAY, 0);
    if translates && work.recording != 0 && !returns {
        // SAFETY: a copy of a record that hardly ever changes.
        let interface = unsafe { maps::INTERFACES.get(arrival.ifindex) };
        let Some(interface) = interface.filter(|i| i.link != THROUGH_GATEWAY.into()) else {
            return dropped(DropReason::NoNeighbour, number);
        };
        (link, mtu) = (interface.link as u16, interface.mtu);
    }
    // The kernel answers a client on its own, so a local backend needs no other source.
    let mode = if service.forward == forward::NAT && backend.ifindex == LOCAL {
        forward::DNAT
    } else {
        service.forward
    };
    // What the packet is rewritten to, reversed: what a reply will look like. Where nothing is
    // rewritten that is the client's own tuple.
    work.reply_key = FlowKey {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        protocol: key.protocol,
    };
    if forward::translates(service.forward) {
        work.reply_key.src = lookup::address(&backend.addr);
        if backend.port != 0 {
            work.reply_key.sport = backend.port;
        }
        if mode == forward::NAT {
            work.reply_key.dst = lookup::address(&backend.source);
        }
    }
    work.reply = Flow {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        backend: backend_number,
        generation: backend.generation,
        service: number,
        link,
        hop_head: arrival.l2[0],
        hop_tail: arrival.l2[1] as u16,
        mtu,
        created_or_tags: arrival.tags,
        last_seen: arrival.now,
        l3_delta: 0,
        l4_delta: 0,
        state: if udp {
            state::UDP
        } else if opens {
            state::SYN_SENT
        } else {
            state::of_unknown(arrival.flags)
        },
        direction: DIRECTION_BACKEND,
        forward: mode,
        // UDP has no more to show, and a flow in the middle has shown it before.
        proven: u8::from(udp || !opens),
    };
    FOLLOW
}

/// Stands for the backend of a flow whose service ends those of a dead one.
const REFUSED: u32 = u32::MAX;

/// The backend of a packet that begins no flow.
#[inline(always)]
fn old_owner(service: &Service, owners: &stateless::Owners) -> u32 {
    let keeps = service.on_backend_down == on_backend_down::KEEP;
    match maps::BACKENDS.get(owners.old) {
        Some(old) if keeps || old.flags & BACKEND_ALIVE != 0 => owners.old,
        _ if owners.old == NO_BACKEND || owners.old == owners.new => owners.new,
        _ if service.on_backend_down == on_backend_down::RESET => REFUSED,
        _ => owners.new,
    }
}

/// Source ports that are tried for a new flow before it is refused.
const PORT_TRIES: u32 = 64;

/// How many of these may take a port from a flow that nobody completes.
const RECYCLING_TRIES: u32 = 32;
/// How many of these may take it from one that has just begun.
const LAST_TRIES: u32 = 4;

/// Records the backend's entry of a new flow, under a source port that no other flow to this
/// backend has. In `dnat` that is the client's own port, unless the client has a flow from it to
/// the same backend through another VIP.
#[inline(always)]
pub fn record_reply<F: Family>() -> Decision {
    let (Some(work), Some(settings)) = (F::work(), maps::SETTINGS.get(0)) else {
        return NOT_OURS;
    };
    if !forward::translates(work.reply.forward) {
        return FOLLOW;
    }
    let client = &work.arrival.key;
    // The seed differs on every balancer, so nobody outside can guess what follows from it.
    let start = hash::jhash_3words(
        hash::address_word(client.src),
        u32::from(client.sport) << 16 | u32::from(client.dport),
        work.reply.backend,
        settings.nat_port_seed,
    );
    // Other bits of it than those that the search begins with.
    if work.reply.forward == forward::NAT
        && let Some(source) = F::nat_source(settings, start.rotate_left(16))
    {
        work.reply_key.dst = source;
    }
    let key = &work.reply_key;
    let addresses =
        checksum::replaced(client.src, key.dst) + checksum::replaced(client.dst, key.src);
    // All but the port that is yet to be found.
    let sum =
        addresses + u64::from(!client.sport) + u64::from(!client.dport) + u64::from(key.sport);
    // What one direction adds to a sum, the other takes away: the complement.
    work.reply.l3_delta = !csum::fold(addresses);
    let first = u32::from(settings.nat_port_first);
    let span = u32::from(settings.nat_port_last)
        .wrapping_sub(first)
        .wrapping_add(1);
    // A search that begins where the client's place in the flow table says finds a free port at the first try for as long
    // as few are taken.
    let beside = F::port_beside().wrapping_sub(first) % ROUND;
    let mut offset = if beside < span {
        beside + ROUND * hash::slot_of(start, (span - beside).div_ceil(ROUND))
    } else {
        hash::slot_of(start, span)
    };
    // A stride of its own for each client leaves the clusters that linear probing would build; a
    // small range is walked port by port.
    let stride = if span > 4 * PORT_TRIES {
        1 + (start & 0xff)
    } else {
        1
    };
    if work.recording == 0 {
        work.reply_key.dport = client.sport;
        work.reply.l4_delta = !csum::fold(sum + u64::from(client.sport));
        return FOLLOW;
    }
    let mut own = work.reply.forward == forward::DNAT;
    // After the client's own port the one beside it; after that another one of the same set, if there is one.
    let mut next = if own {
        offset
    } else if offset + ROUND < span {
        offset + ROUND
    } else if offset >= ROUND {
        offset % ROUND
    } else {
        (offset + stride) % span.max(1)
    };
    // Packets that find no record keep their port.
    let keeps_port = maps::SERVICES
        .get(work.service)
        .is_some_and(|service| service.flags & SERVICE_STATELESS != 0);
    // A port that a flow of the other table has is taken too.
    let asks_both = pressure::may_be_opening(work.arrival.now);
    for attempt in 0..PORT_TRIES {
        let port = if own {
            client.sport
        } else {
            (first.wrapping_add(offset) as u16).to_be()
        };
        own = false;
        work.reply_key.dport = port;
        let mut taken = F::find(table::REPLY) != table::NONE
            || asks_both && F::opening().get_ptr(&work.reply_key).is_some();
        if taken && keeps_port {
            // By a packet of the same flow on another CPU: the sender repeats this one.
            return dropped(DropReason::TableFull, work.service);
        }
        if taken && attempt >= PORT_TRIES - RECYCLING_TRIES {
            // One that has just begun may be real.
            let any = attempt >= PORT_TRIES - LAST_TRIES;
            taken = F::recycle(u32::from(any)) == 0;
        }
        if !taken {
            work.reply.l4_delta = !csum::fold(sum + u64::from(port));
            let added = if work.opening == 0 {
                table::reserved::<F>(table::REPLY)
            } else {
                let only_new = u64::from(BPF_NOEXIST);
                let opening = F::opening();
                opening
                    .insert(&work.reply_key, &work.reply, only_new)
                    .is_ok()
            };
            if added {
                work.reply_number = if work.opening == 0 {
                    work.number
                } else {
                    table::NONE
                };
                return FOLLOW;
            }
        }
        offset = next;
        next += stride;
        if next >= span {
            next -= span;
        }
    }
    dropped(DropReason::PortExhausted, work.service)
}

/// Records the client's entry of a new flow.
#[inline(always)]
pub fn record_client<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return NOT_OURS;
    };
    let (number, backend_number) = (work.service, work.backend);
    let Some(backend) = maps::BACKENDS.get(backend_number) else {
        return dropped(DropReason::NoBackend, number);
    };
    work.way.set(&backend.l2, backend.ifindex, backend.tags);
    table::copy(&raw mut work.client, &raw const work.reply);
    work.client.src = work.reply_key.dst;
    work.client.dst = work.reply_key.src;
    work.client.sport = work.reply_key.dport;
    work.client.dport = work.reply_key.sport;
    work.client.l3_delta = !work.reply.l3_delta;
    work.client.l4_delta = !work.reply.l4_delta;
    work.client.direction = DIRECTION_CLIENT;
    work.client.proven = 0;
    work.client.created_or_tags = work.created;
    if work.recording == 0 {
        if work.client.state == state::SYN_SENT {
            stats::count_connection(number, backend_number);
        }
        return FOLLOW;
    }
    if work.client.forward != forward::NAT
        && let Some(cursor) = maps::CURSORS.get_ptr_mut(number)
    {
        // SAFETY: a map value, aligned to 8 bytes.
        unsafe { atomic::increment(&raw mut (*cursor).recorded) };
    }
    let added = if work.opening == 0 {
        table::reserved::<F>(table::ARRIVAL)
    } else {
        let only_new = u64::from(BPF_NOEXIST);
        let opening = F::opening();
        opening
            .insert(&work.arrival.key, &work.client, only_new)
            .is_ok()
    };
    if !added {
        // Full, or another CPU was faster with a packet of the same flow; the sender repeats this
        // one.
        if forward::translates(work.client.forward) {
            if work.opening == 0 {
                table::release::<F>(work.reply_number);
            } else {
                let _ = F::opening().remove(&work.reply_key);
            }
        }
        return dropped(DropReason::TableFull, number);
    }
    // One that is recorded in the middle was counted when it began.
    if matches!(work.client.state, state::UDP | state::SYN_SENT) {
        stats::count_connection(number, backend_number);
    }
    // What is half open, and may be pushed out at any time, is not counted as a connection yet.
    if work.opening == 0 {
        // First, or its end might be counted before.
        count_begin(backend_number, work.client.state);
        F::publish();
    }
    FOLLOW
}

#[inline(always)]
const fn no_backend(reason: DropReason, service: &Service, number: u32) -> Decision {
    match service.on_no_backend {
        on_no_backend::PASS => NOT_OURS,
        on_no_backend::DROP => dropped(reason, number),
        _ => refused(reason, number),
    }
}
