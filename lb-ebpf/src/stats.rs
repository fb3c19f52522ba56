//! Counters.

use crate::maps;
use lb_common::stats::Counters;

/// One packet from a client.
#[inline(always)]
pub fn count_in(service: u32, backend: u32, bytes: u64) {
    both(service, backend, |counters| {
        counters.packets_in += 1;
        counters.bytes_in += bytes;
    });
}

/// One packet from a client, which may begin a connection.
#[inline(always)]
pub fn count_placed(service: u32, backend: u32, bytes: u64, begins: bool) {
    both(service, backend, |counters| {
        if begins {
            counters.connections += 1;
        }
        counters.packets_in += 1;
        counters.bytes_in += bytes;
    });
}

/// One packet to a client.
#[inline(always)]
pub fn count_out(service: u32, backend: u32, bytes: u64) {
    both(service, backend, |counters| {
        counters.packets_out += 1;
        counters.bytes_out += bytes;
    });
}

/// One flow placed.
#[inline(always)]
pub fn count_connection(service: u32, backend: u32) {
    both(service, backend, |counters| counters.connections += 1);
}

/// One packet dropped for the reason of this number; `service` 0 if it is not known whose it was.
#[inline(always)]
pub fn count_drop(reason: u8, service: u32) {
    if let Some(count) = maps::DROPS.get_ptr_mut(u32::from(reason)) {
        // SAFETY: as in `both`.
        unsafe { *count += 1 };
    }
    if service != 0
        && let Some(counters) = maps::SERVICE_STATS.get_ptr_mut(service)
    {
        // SAFETY: as in `both`.
        unsafe { (*counters).drops += 1 };
    }
}

/// Changes the counters of a service and of a backend.
///
/// One after the other: of two pointers that are looked up first, the compiler tests both for null
/// in one operation, which the verifier refuses.
#[inline(always)]
fn both(service: u32, backend: u32, mut change: impl FnMut(&mut Counters)) {
    if let Some(counters) = maps::SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        change(unsafe { &mut *counters });
    }
    if let Some(counters) = maps::BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: as above.
        change(unsafe { &mut *counters });
    }
}
