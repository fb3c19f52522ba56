//! Select: a backend for a new flow.

use crate::{atomic, maps};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_loop};
use core::ffi::c_void;
use lb_common::{
    addr::Address,
    backend::{Load, NO_BACKEND, Slot},
    flow::FlowKey,
    hash,
    service::{SERVICE_LIMITED, Service, scheduler},
};

/// What stands for "all backends are full" in place of a backend's number.
pub const ALL_FULL: u32 = u32::MAX;

/// The number of the backend that a new flow of the service goes to, or [`NO_BACKEND`], or
/// [`ALL_FULL`].
#[inline(always)]
pub fn backend<A: Address>(number: u32, service: &Service, key: &FlowKey<A>) -> u32 {
    if service.scheduler == scheduler::LEAST_CONNECTIONS {
        return least_loaded(number);
    }
    let backend = by_table(number, service, key).unwrap_or(NO_BACKEND);
    if service.flags & SERVICE_LIMITED != 0 && backend != NO_BACKEND && is_full(backend) {
        return least_loaded(number);
    }
    backend
}

/// Slots that are tried for a backend that is not the one before.
const OTHER_TRIES: u32 = 8;

/// As [`backend`], but another one than `avoid`, if there is one within a few tries.
#[inline(always)]
pub fn another<A: Address>(number: u32, service: &Service, key: &FlowKey<A>, avoid: u32) -> u32 {
    let (first, slots) = service.table();
    let flow_hash = hash::flow_hash(key);
    for attempt in 1..=OTHER_TRIES {
        let place = hash::slot_of(hash::jhash_3words(flow_hash, attempt, 0, hash::SEED), slots);
        let backend = self::slot(first.wrapping_add(place)).map_or(NO_BACKEND, |s| s.backend);
        let usable = slots != 0 && backend != NO_BACKEND && backend != avoid;
        if usable && (service.flags & SERVICE_LIMITED == 0 || !is_full(backend)) {
            return backend;
        }
    }
    self::backend(number, service, key)
}

/// The backend in the slot of the selection table that a hash, the turn or chance points to.
#[inline(always)]
fn by_table<A: Address>(number: u32, service: &Service, key: &FlowKey<A>) -> Option<u32> {
    let (first, slots) = service.table();
    if slots == 0 {
        return None;
    }
    let slot = match service.scheduler {
        scheduler::ROUND_ROBIN => next_turn(number, slots)?,
        scheduler::SOURCE_HASH => hash::slot_of(hash::source_hash(key.src), slots),
        scheduler::RANDOM => {
            let (a, b) = (at_random(first, slots)?, at_random(first, slots)?);
            return Some(if is_less_loaded(b, a) { b } else { a });
        }
        _ => hash::slot_of(hash::flow_hash(key), slots),
    };
    Some(self::slot(first.wrapping_add(slot))?.backend)
}

/// The number of the backend that a hash of the flow alone tells, or [`NO_BACKEND`].
#[inline(always)]
pub fn by_hash<A: Address>(service: &Service, key: &FlowKey<A>) -> u32 {
    let (first, slots) = service.table();
    if slots == 0 {
        return NO_BACKEND;
    }
    let hash = if service.scheduler == scheduler::SOURCE_HASH {
        hash::source_hash(key.src)
    } else {
        hash::flow_hash(key)
    };
    slot(first.wrapping_add(hash::slot_of(hash, slots))).map_or(NO_BACKEND, |slot| slot.backend)
}

#[inline(always)]
fn at_random(first: u32, slots: u32) -> Option<u32> {
    // SAFETY: the helper takes nothing and touches nothing.
    let slot = hash::slot_of(unsafe { bpf_get_prandom_u32() }, slots);
    Some(self::slot(first.wrapping_add(slot))?.backend)
}

/// One slot, both numbers of the same moment.
#[inline(always)]
pub fn slot(number: u32) -> Option<Slot> {
    let slot = maps::SLOTS.get_ptr_mut(number)?;
    // SAFETY: a map value of 8 bytes, aligned to them; written with one 64-bit store.
    let word = unsafe { slot.cast::<u64>().read_volatile() };
    Some(Slot {
        backend: word as u32,
        previous: (word >> 32) as u32,
    })
}

/// One sequence for all CPUs: the weights hold for the balancer, not for each of its CPUs.
#[inline(always)]
fn next_turn(service: u32, slots: u32) -> Option<u32> {
    let cursor = maps::CURSORS.get_ptr_mut(service)?;
    // SAFETY: a map value, aligned to 8 bytes.
    let turn = unsafe { atomic::fetch_add(&raw mut (*cursor).next, 1) };
    Some((turn % u64::from(slots)) as u32)
}

/// Connections that a backend holds, and its weight.
#[inline(always)]
fn share(load: &Load) -> (u64, u32) {
    // SAFETY: a live map value, which other CPUs and the daemon change.
    unsafe {
        // First: what ends in between then counts as held, and the difference is never below zero.
        let released = (&raw const load.released).read_volatile();
        let begun = (&raw const load.begun).read_volatile();
        let weight = (&raw const load.weight).read_volatile();
        (Load::held(begun, released), weight)
    }
}

#[inline(always)]
fn is_less_loaded(a: u32, b: u32) -> bool {
    let Some(b) = maps::BACKEND_LOAD.get(b) else {
        return true;
    };
    let b = share(b);
    let Some(a) = maps::BACKEND_LOAD.get(a) else {
        return false;
    };
    Load::is_less_loaded(share(a), b)
}

/// Whether a backend has no room for another flow.
#[inline(always)]
pub fn is_full(backend: u32) -> bool {
    maps::BACKEND_LOAD
        .get(backend)
        .is_some_and(|load| Load::is_full(share(load).0, load.max_connections))
}

/// A walk through the members of a service. The compiler joins fields that begin as zero, and the place of a table, and the verifier
/// wants what it joins aligned.
#[repr(C, align(8))]
struct Walk {
    /// Connections that the best so far holds.
    held: u64,
    /// The best so far, and its weight.
    backend: u32,
    weight: u32,
    /// First slot and number of slots.
    first: u32,
    slots: u32,
    /// 1 if one was passed over because it was full.
    full: u32,
    /// The slot that the walk begins at.
    start: u32,
}

// A frame of more than 32 bytes would be too much for Linux 6.1, which counts in steps of 32.
const _: () = assert!(size_of::<Walk>() == 32);

/// The member of the service that holds the fewest connections for its weight and has room, or
/// [`NO_BACKEND`], or [`ALL_FULL`]. Among equals each has its turn.
///
/// A look at every member: a few nanoseconds each, once a flow. Two CPUs that look at the same time
/// may choose the same one, so a backend may hold as many more than it should as there are CPUs.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn least_loaded(service: u32) -> u32 {
    let Some(record) = maps::SERVICES.get(service) else {
        return NO_BACKEND;
    };
    // SAFETY: as in `by_table`.
    let members = unsafe { (&raw const record.members).read_volatile() };
    let (first, slots) = Service::unpack_table(members);
    if slots == 0 {
        return NO_BACKEND;
    }
    let Some(start) = next_turn(service, slots) else {
        return NO_BACKEND;
    };
    let mut walk = Walk {
        held: 0,
        backend: NO_BACKEND,
        weight: 0,
        first,
        slots,
        full: 0,
        start,
    };
    // SAFETY: the callback has the signature the helper wants, and the walk outlives the call.
    unsafe {
        bpf_loop(slots, compare as *mut c_void, (&raw mut walk).cast(), 0);
    }
    if walk.backend == NO_BACKEND && walk.full != 0 {
        return ALL_FULL;
    }
    walk.backend
}

/// One step of the walk; 0: go on.
#[inline(never)]
extern "C" fn compare(step: u32, walk: *mut Walk) -> u64 {
    // SAFETY: `least_loaded` passes a walk of its own.
    let walk = unsafe { &mut *walk };
    let mut slot = walk.start.wrapping_add(step);
    if slot >= walk.slots {
        slot = slot.wrapping_sub(walk.slots);
    }
    let Some(slot) = maps::SLOTS.get(walk.first.wrapping_add(slot)) else {
        return 0;
    };
    let backend = slot.backend;
    let Some(load) = maps::BACKEND_LOAD.get(backend) else {
        return 0;
    };
    let (held, weight) = share(load);
    if weight == 0 {
        return 0;
    }
    if Load::is_full(held, load.max_connections) {
        walk.full = 1;
        return 0;
    }
    if walk.backend == NO_BACKEND || Load::is_less_loaded((held, weight), (walk.held, walk.weight))
    {
        walk.held = held;
        walk.weight = weight;
        walk.backend = backend;
    }
    0
}
