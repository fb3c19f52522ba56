//! A connection changes state, or ends.

use super::{Decision, FOLLOW, OVER, Work, dropped, refused, table};
use crate::{atomic, family::Family, lookup, maps, parse::TcpFlags};
use core::mem::offset_of;
use lb_common::{
    abi::ticks_since,
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Load},
    filter::LANE_VIP,
    flow::{Flow, SYN_REPEATED, next_state, state},
    hash,
    service::{SERVICE_PLURAL, forward, on_backend_down},
    stats::DropReason,
};

/// A client's packet that may change its flow's state, or whose backend is not as it was.
#[inline(always)]
pub fn revise<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return FOLLOW;
    };
    let Some(flow) = table::flow::<F>(work.number) else {
        return OVER;
    };
    let arrival = &work.arrival;
    let Some(backend) = maps::BACKENDS.get(flow.backend) else {
        return dropped(DropReason::NoBackend, flow.service);
    };
    let flags = TcpFlags(arrival.flags);
    let udp = flow.state == state::UDP;
    let known = backend.generation == flow.generation;
    let alive = known && backend.flags & BACKEND_ALIVE != 0;
    let service = maps::SERVICES.get(flow.service);
    let number = flow.service;

    if !alive {
        // A backend that is no longer there cannot keep its flows.
        let rule = service.map_or(on_backend_down::RESET, |s| s.on_backend_down);
        let reset = !known || rule != on_backend_down::KEEP;
        let moves = rule == on_backend_down::RESCHEDULE;
        if flags.opens() || (udp && reset) || moves {
            forget::<F>(work, flow, known);
            // Only where the packet goes on to be placed, so that the mark meets no other.
            let is_vip = lookup::lane_of::<F>(work.arrival.key.dst) & LANE_VIP != 0;
            work.moves = u32::from(moves && is_vip);
            return OVER;
        }
        if reset {
            forget::<F>(work, flow, known);
            return refused(DropReason::BackendDown, number);
        }
    }
    if flags.opens() {
        if state::is_over(flow.state, forward::translates(flow.forward)) {
            forget::<F>(work, flow, known);
            return OVER;
        }
        let limit = service.map_or(0, |s| s.connect_timeout);
        if flow.state == state::SYN_SENT
            && limit != 0
            && ticks_since(arrival.now, flow.created()) >= limit
        {
            forget::<F>(work, flow, known);
            return refused(DropReason::ConnectTimeout, number);
        }
        if flow.state == state::SYN_SENT
            && service.is_some_and(|s| s.flags & SERVICE_PLURAL != 0)
            && ticks_since(arrival.now, flow.last_seen) >= SYN_REPEATED
        {
            // The client asks again, so nobody has answered: another backend shall.
            count_load(flow.backend, RETRIES);
            (work.avoid, work.since) = (flow.backend, flow.created());
            work.avoider = hash::flow_hash(&work.arrival.key);
            forget::<F>(work, flow, known);
            return OVER;
        }
    }
    if backend.flags & BACKEND_RESOLVED == 0 {
        return dropped(DropReason::NoNeighbour, number);
    }
    let was_open = flow.state == state::ESTABLISHED;
    advance(flow, flags, false);
    if flow.state == state::ESTABLISHED && !was_open && forward::translates(flow.forward) {
        // The client is where its packets say: the backend's entry is to be kept as well.
        work.other_key = flow.opposite(work.arrival.key.protocol);
        if let Some(reply) = table::flow::<F>(F::find(table::OTHER)) {
            reply.proven = 1;
        }
    }
    FOLLOW
}

/// A SYN, FIN or RST from the backend changes the state, which the client's entry holds.
#[inline(always)]
pub fn note_reply<F: Family>() -> Decision {
    let Some(work) = F::work() else {
        return FOLLOW;
    };
    let Some(flow) = table::flow::<F>(F::find(table::ARRIVAL)) else {
        if let Some(flow) = F::opening().get_ptr_mut(&work.arrival.key) {
            // Not counted yet.
            // SAFETY: as in `follow`.
            let flow = unsafe { &mut *flow };
            flow.state = flags_lead_to(flow, TcpFlags(work.arrival.flags), true);
        }
        return FOLLOW;
    };
    let flags = TcpFlags(work.arrival.flags);
    if flags.any(TcpFlags::RST) && flow.state == state::SYN_SENT {
        count_load(flow.backend, RESETS);
        // A refusal. The client's next SYN tries another backend, if there is one; but only once,
        // or it would not hear of it if all of them refuse.
        let plural = maps::SERVICES
            .get(flow.service)
            .is_some_and(|s| s.flags & SERVICE_PLURAL != 0);
        if plural && ticks_since(work.arrival.now, flow.created()) < SYN_REPEATED {
            return dropped(DropReason::Refused, flow.service);
        }
    }
    advance(flow, flags, true);
    FOLLOW
}

/// The state that follows the flow's when a packet with these flags has been forwarded.
#[inline(always)]
pub fn flags_lead_to<A>(flow: &Flow<A>, flags: TcpFlags, from_backend: bool) -> u8 {
    next_state(
        flow.state,
        flags.any(TcpFlags::SYN),
        flags.any(TcpFlags::ACK),
        flags.any(TcpFlags::FIN),
        flags.any(TcpFlags::RST),
        from_backend,
        forward::translates(flow.forward),
    )
}

/// Moves the flow to its next state and counts the connection where it now belongs.
#[inline(always)]
fn advance<A>(flow: &mut Flow<A>, flags: TcpFlags, from_backend: bool) {
    const _: () = assert!(offset_of!(Flow<u32>, state) % 4 == 0);
    const _: () = assert!(offset_of!(Flow<[u32; 4]>, state) % 4 == 0);
    let before = flow.state;
    let after = flags_lead_to(flow, flags, from_backend);
    if before == after {
        return;
    }
    // State, direction, mode and a zero share one word. Whoever changes it counts, so two CPUs that
    // see the same change count it once.
    let (direction, mode) = (flow.direction, flow.forward);
    let word = |state: u8| u32::from_ne_bytes([state, direction, mode, 0]);
    let backend = flow.backend;
    // SAFETY: four bytes of a map value, aligned as asserted.
    if !unsafe { atomic::replace((&raw mut flow.state).cast(), word(before), word(after)) } {
        return;
    }
    // The number may belong to another backend by now, which never counted this flow.
    if maps::BACKENDS
        .get(backend)
        .is_none_or(|b| b.generation != flow.generation)
    {
        return;
    }
    match (state::is_active(before), state::is_active(after)) {
        (false, true) => count_load(backend, OPENED),
        (true, false) => count_load(backend, CLOSED),
        _ => {}
    }
    if state::is_held(before) && !state::is_held(after) {
        count_load(backend, RELEASED);
    }
}

/// Counts a flow that is recorded from now on.
#[inline(always)]
pub fn count_begin(backend: u32, state: u8) {
    count_load(backend, BEGUN);
    if state::is_active(state) {
        count_load(backend, OPENED);
    }
    if !state::is_held(state) {
        count_load(backend, RELEASED);
    }
}

/// Counts one that is no more.
#[inline(always)]
pub fn count_end(backend: u32, state: u8) {
    count_load(backend, ENDED);
    if state::is_active(state) {
        count_load(backend, CLOSED);
    }
    if state::is_held(state) {
        count_load(backend, RELEASED);
    }
}

/// Removes both entries of the arriving packet's flow. `counted`: its backend still counts it.
#[inline(always)]
fn forget<F: Family>(work: &mut Work<F::Addr>, flow: &Flow<F::Addr>, counted: bool) {
    let (backend, state) = (flow.backend, flow.state);
    work.other_key = flow.opposite(work.arrival.key.protocol);
    F::remove(table::OTHER);
    // Only whoever removed the client's entry counts its end.
    if F::remove(table::ARRIVAL) == 1 && counted {
        count_end(backend, state);
    }
}

/// Offset of the counter of connections.
const BEGUN: usize = offset_of!(Load, begun);
/// Offset of the counter of connections that are no more.
const ENDED: usize = offset_of!(Load, ended);
/// Offset of the counter of connections that have become active.
const OPENED: usize = offset_of!(Load, opened);
/// Offset of the counter of connections that are active no more.
const CLOSED: usize = offset_of!(Load, closed);
/// Offset of the counter of connections that need not be carried any more.
const RELEASED: usize = offset_of!(Load, released);
/// Offset of the counter of SYNs that were repeated.
pub const RETRIES: usize = offset_of!(Load, retries);
/// Offset of the counter of connections that were refused.
pub const RESETS: usize = offset_of!(Load, resets);

/// Adds one to a counter of a backend's load.
#[inline(always)]
pub fn count_load(backend: u32, counter: usize) {
    if let Some(load) = maps::BACKEND_LOAD.get_ptr_mut(backend) {
        // SAFETY: a counter within the map value, aligned to 8 bytes.
        unsafe { atomic::increment(load.byte_add(counter).cast()) };
    }
}
