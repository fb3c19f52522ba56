//! Counters.

use crate::maps;
use lb_common::stats::Counters;

/// One packet from a client.
#[inline(always)]
pub fn count_in(service: u32, backend: u32, bytes: u64) {
    for counters in both(service, backend).into_iter().flatten() {
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        unsafe {
            (*counters).packets_in += 1;
            (*counters).bytes_in += bytes;
        }
    }
}

/// One packet to a client.
#[inline(always)]
pub fn count_out(service: u32, backend: u32, bytes: u64) {
    for counters in both(service, backend).into_iter().flatten() {
        // SAFETY: as in `count_in`.
        unsafe {
            (*counters).packets_out += 1;
            (*counters).bytes_out += bytes;
        }
    }
}

/// One flow placed.
#[inline(always)]
pub fn count_connection(service: u32, backend: u32) {
    for counters in both(service, backend).into_iter().flatten() {
        // SAFETY: as in `count_in`.
        unsafe { (*counters).connections += 1 };
    }
}

/// One packet dropped for the reason of this number; `service` 0 if it is not known whose it was.
#[inline(always)]
pub fn count_drop(reason: u8, service: u32) {
    if let Some(count) = maps::DROPS.get_ptr_mut(u32::from(reason)) {
        // SAFETY: as in `count_in`.
        unsafe { *count += 1 };
    }
    if service != 0
        && let Some(counters) = maps::SERVICE_STATS.get_ptr_mut(service)
    {
        // SAFETY: as in `count_in`.
        unsafe { (*counters).drops += 1 };
    }
}

#[inline(always)]
fn both(service: u32, backend: u32) -> [Option<*mut Counters>; 2] {
    [
        maps::SERVICE_STATS.get_ptr_mut(service),
        maps::BACKEND_STATS.get_ptr_mut(backend),
    ]
}
