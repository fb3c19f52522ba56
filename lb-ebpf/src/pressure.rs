//! Pressure: when flows begin faster than a CPU may record them.
//!
//! What comes then is not let into the flow table, where it would push out flows that live. Where the
//! forward mode needs no record there is none; where it does, it goes into a smaller table of its own
//! (`opening`), in which only other half-open flows can be pushed out. A client that completes its
//! handshake has shown that its address is its own, and its flow moves to the flow table.

use crate::{
    family::Family,
    flow::{
        Decision, FOLLOW, OVER,
        change::{count_begin, count_end, flags_lead_to},
        dropped, exceeds, refused, table, too_big, touch,
    },
    maps,
    parse::TcpFlags,
};
use lb_common::{
    abi::{TICKS_PER_SECOND, ticks_since},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED},
    flow::{DIRECTION_BACKEND, FlowKey, state},
    stats::DropReason,
};

/// Ticks of a window in which new flows are counted, as a power of two: about 67 ms.
const WINDOW_SHIFT: u32 = 6;
/// Windows in a second.
const WINDOWS: u32 = TICKS_PER_SECOND >> WINDOW_SHIFT;
/// Ticks for which half-open flows are looked for after the last one was recorded: longer than the
/// daemon lets one live.
const REMEMBERED: u32 = 120 * TICKS_PER_SECOND;
/// Ticks between two notes that there are half-open flows.
const NOTE_INTERVAL: u32 = 128;

/// Counts a new flow; whether there are too many on this CPU to record it like any other.
#[inline(always)]
pub fn is_high(now: u32) -> bool {
    let Some(settings) = maps::SETTINGS.get(0) else {
        return false;
    };
    let limit = settings.new_flows;
    if limit == 0 {
        return false;
    }
    let Some(pace) = maps::PRESSURE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
    let pace = unsafe { &mut *pace };
    let window = now >> WINDOW_SHIFT;
    if pace.window != window {
        pace.window = window;
        pace.begun = 0;
    }
    pace.begun += 1;
    let is_high = pace.begun > limit / WINDOWS;
    pace.flows += u64::from(is_high);
    is_high
}

/// Notes that a half-open flow is being recorded.
#[inline(always)]
pub fn note_opening(now: u32) {
    if let Some(last) = maps::LAST_OPENING.get_ptr_mut(0) {
        // SAFETY: an aligned word of a map value, which all CPUs write with nearly the same.
        unsafe {
            if ticks_since(now, last.read_volatile()) >= NOTE_INTERVAL {
                last.write_volatile(now);
            }
        }
    }
}

/// Whether there may be half-open flows.
#[inline(always)]
pub fn may_be_opening(now: u32) -> bool {
    maps::LAST_OPENING
        .get(0)
        .is_some_and(|last| *last != 0 && ticks_since(now, *last) < REMEMBERED)
}

/// Follows a half-open flow: its entry is left in `work.client`. [`OVER`]: there is none.
#[inline(always)]
fn resume<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return OVER;
    };
    work.settles = 0;
    let Some(flow) = F::opening().get_ptr_mut(&work.arrival.key) else {
        return OVER;
    };
    // SAFETY: as in `flow::follow`.
    let flow = unsafe { &mut *flow };
    let number = flow.service;
    if work.arrival.can_travel == 0 {
        return refused(DropReason::TtlExceeded, number);
    }
    let flags = TcpFlags(work.arrival.flags);
    let opposite = flow.opposite(work.arrival.key.protocol);
    touch(flow, work.arrival.now);
    if flow.direction == DIRECTION_BACKEND {
        if exceeds(
            work.arrival.packet_len,
            flow.mtu.into(),
            work.arrival.ifindex,
        ) {
            return too_big(flow.mtu, number);
        }
        table::copy(&raw mut work.client, flow);
        if work.way.set_back(flow).is_none() {
            return OVER;
        }
        if flags.any(TcpFlags::CHANGES)
            && let Some(client) = F::opening().get_ptr_mut(&opposite)
        {
            // SAFETY: as above.
            let client = unsafe { &mut *client };
            client.state = flags_lead_to(client, flags, true);
        }
        return FOLLOW;
    }
    let known = maps::BACKENDS.get(flow.backend).filter(|backend| {
        backend.generation == flow.generation && backend.flags & BACKEND_ALIVE != 0
    });
    let Some(backend) = known else {
        return forget::<F>(&work.arrival.key, &opposite);
    };
    let Some(reply) = F::opening().get_ptr_mut(&opposite) else {
        // Only half of it is left: no answer would find its way.
        return forget::<F>(&work.arrival.key, &opposite);
    };
    if flags.opens() && state::is_over(flow.state, true) {
        return forget::<F>(&work.arrival.key, &opposite);
    }
    if backend.flags & BACKEND_RESOLVED == 0 {
        return dropped(DropReason::NoNeighbour, number);
    }
    let mtu = backend.mtu;
    if exceeds(work.arrival.packet_len, mtu.into(), work.arrival.ifindex) {
        return too_big(mtu, number);
    }
    flow.state = flags_lead_to(flow, flags, false);
    table::copy(&raw mut work.client, flow);
    work.way.set(&backend.l2, backend.ifindex, backend.tags);
    table::copy(&raw mut work.reply, reply);
    // A second packet of the same datagrams' flow is what UDP has of a handshake.
    if matches!(work.client.state, state::ESTABLISHED | state::UDP) {
        work.reply_key = opposite;
        work.settles = 1;
    }
    FOLLOW
}

#[inline(always)]
fn forget<F: Family>(key: &FlowKey<F::Addr>, opposite: &FlowKey<F::Addr>) -> Decision {
    let _ = F::opening().remove(opposite);
    let _ = F::opening().remove(key);
    OVER
}

/// Moves the flow that [`resume`] has left to the flow table. Where that has no room for it, it stays.
#[inline(always)]
fn settle<F: Family>() {
    let Some(work) = F::work() else {
        return;
    };
    work.reply.proven = 1;
    work.reply_number = table::NONE;
    if F::find(table::REPLY) != table::NONE || !table::reserved::<F>(table::REPLY) {
        return;
    }
    work.reply_number = work.number;
    if !table::reserved::<F>(table::ARRIVAL) {
        table::release::<F>(work.reply_number);
        return;
    }
    count_begin(work.client.backend, work.client.state);
    F::publish();
    forget::<F>(&work.arrival.key, &work.reply_key);
}

/// Ticks that a handshake may take before its source port may be given to another flow.
const HALF_OPEN: u32 = TICKS_PER_SECOND;

/// Frees the source port in `work.reply_key`, if whoever has it is but half open, or half gone: 1 if
/// it is free now. `any`: however short a time ago it began, if that was under pressure.
///
/// A flood of spoofed SYNs takes the ports towards a backend long before it fills a table.
#[inline(always)]
fn recycle<F: Family>(any: u32) -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    let key = &work.reply_key;
    if let Some(reply) = F::opening().get_ptr(key) {
        // SAFETY: as in `flow::follow`.
        let reply = unsafe { &*reply };
        let client = reply.opposite(key.protocol);
        // If the client's entry is not there, it may be about to come.
        let began = F::opening()
            .get_ptr(&client)
            .map_or(reply.last_seen, |flow| {
                // SAFETY: as above.
                unsafe { (*flow).created() }
            });
        if any == 0 && ticks_since(work.arrival.now, began) < HALF_OPEN {
            return 0;
        }
        forget::<F>(&client, key);
        return u64::from(F::find(table::REPLY) == table::NONE);
    }
    let Some(reply) = table::flow::<F>(F::find(table::REPLY)) else {
        return 1;
    };
    work.other_key = reply.opposite(key.protocol);
    if let Some(client) = table::flow::<F>(F::find(table::OTHER)) {
        let half_open = matches!(client.state, state::SYN_SENT | state::SYN_RECEIVED);
        if !half_open || ticks_since(work.arrival.now, client.created()) < HALF_OPEN {
            return 0;
        }
        let (backend, generation, state) = (client.backend, client.generation, client.state);
        let counted = maps::BACKENDS
            .get(backend)
            .is_some_and(|b| b.generation == generation);
        if F::remove(table::OTHER) == 1 && counted {
            count_end(backend, state);
        }
    }
    F::remove(table::REPLY);
    1
}

/// [`recycle`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn recycle4(any: u32) -> u64 {
    recycle::<crate::family::V4>(any)
}

/// [`recycle`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn recycle6(any: u32) -> u64 {
    recycle::<crate::family::V6>(any)
}

/// [`settle`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn settle4() -> u64 {
    settle::<crate::family::V4>();
    0
}

/// [`settle`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn settle6() -> u64 {
    settle::<crate::family::V6>();
    0
}

/// [`resume`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn resume4() -> Decision {
    resume::<crate::family::V4>()
}

/// [`resume`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn resume6() -> Decision {
    resume::<crate::family::V6>()
}
