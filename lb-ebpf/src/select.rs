//! Select: a backend for a new flow.

use crate::{atomic, maps};
use lb_common::{
    addr::Address,
    backend::{Backend, NO_BACKEND, Slot},
    flow::FlowKey,
    hash,
    service::{Service, scheduler},
};

/// The backend that the service's selection table gives a new flow, with its number.
#[inline(always)]
pub fn backend<A: Address>(
    number: u32,
    service: &Service,
    key: &FlowKey<A>,
) -> Option<(u32, &'static Backend)> {
    let (first, slots) = service.table();
    if slots == 0 {
        return None;
    }
    let slot = match service.scheduler {
        scheduler::ROUND_ROBIN => next_turn(number, slots)?,
        scheduler::SOURCE_HASH => hash::slot_of(hash::source_hash(key.src), slots),
        _ => hash::slot_of(hash::flow_hash(key), slots),
    };
    let backend = self::slot(first.wrapping_add(slot))?.backend;
    if backend == NO_BACKEND {
        return None;
    }
    Some((backend, maps::BACKENDS.get(backend)?))
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
