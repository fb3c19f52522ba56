//! Admit: whether a client may begin a flow, and which backend it returns to.

use crate::{
    atomic,
    family::Family,
    flow::{Decision, FOLLOW, NOT_OURS, Work, dropped},
    maps, select,
};
use aya_ebpf::{
    bindings::BPF_NOEXIST, btf_maps::lpm_trie::Key, helpers::generated::bpf_ktime_get_coarse_ns,
};
use lb_common::{
    abi::ticks_since,
    addr::Address,
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, NO_BACKEND},
    client::{ALLOW, Affinity, ClientKey, SERVICE_BITS, Source, masked},
    service::{SERVICE_LISTED, Service},
    stats::DropReason,
};

/// How often a client's rate is looked at again because another CPU has changed it meanwhile.
const TRIES: u32 = 4;

/// Whether the client whose key is `work.arrival.key` may begin a flow of this service. Only for
/// services with [`lb_common::service::SERVICE_GUARDED`].
#[inline(always)]
fn admit<F: Family>(number: u32) -> Decision {
    let (Some(work), Some(service)) = (F::work(), maps::SERVICES.get(number)) else {
        return NOT_OURS;
    };
    let addr = work.arrival.key.src;
    if service.flags & SERVICE_LISTED != 0 {
        let bits = SERVICE_BITS + F::Addr::WORDS as u32 * 32;
        work.access = Key::new(
            bits,
            ClientKey {
                service: number,
                addr,
            },
        );
        if F::access().get(&work.access).is_some_and(|v| *v != ALLOW) {
            return dropped(DropReason::Denied, number);
        }
    }
    if service.source_rate != 0 {
        work.client_key.service = number;
        work.client_key.addr = addr;
        if !within_rate::<F>(&work.client_key, service.source_rate) {
            return dropped(DropReason::RateLimited, number);
        }
    }
    FOLLOW
}

#[inline(always)]
fn within_rate<F: Family>(key: &ClientKey<F::Addr>, rate: u32) -> bool {
    // SAFETY: the helper only reads the kernel's clock.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    for _ in 0..TRIES {
        let Some(source) = F::sources().get_ptr_mut(key) else {
            let first = Source {
                clear: Source::next(0, now, rate).unwrap_or(now),
            };
            if F::sources()
                .insert(key, &first, u64::from(BPF_NOEXIST))
                .is_ok()
            {
                return true;
            }
            continue;
        };
        // SAFETY: a map value, aligned to 8 bytes.
        let clear = unsafe { (&raw const (*source).clear).read_volatile() };
        let Some(next) = Source::next(clear, now, rate) else {
            return false;
        };
        // SAFETY: as above.
        if unsafe { atomic::replace_u64(&raw mut (*source).clear, clear, next) } {
            return true;
        }
    }
    // So many at once are too many.
    false
}

/// The backend that the client returns to, or [`NO_BACKEND`].
#[inline(always)]
pub fn returning<F: Family>(work: &mut Work<F::Addr>, number: u32, service: &Service) -> u32 {
    work.client_key.service = number;
    work.client_key.addr = masked(work.arrival.key.src, &service.affinity_mask);
    let Some(entry) = F::affinity().get_ptr_mut(&work.client_key) else {
        return NO_BACKEND;
    };
    // SAFETY: a live map value. Two CPUs that serve one client write the same.
    let entry = unsafe { &mut *entry };
    let backend = entry.backend;
    let is_fresh = ticks_since(work.arrival.now, entry.last_seen) < service.affinity;
    if !is_fresh || !is_there(backend, entry.generation) || select::is_full(backend) {
        return NO_BACKEND;
    }
    entry.last_seen = work.arrival.now;
    backend
}

/// Whether a backend is still the one it was, and takes new flows.
#[inline(always)]
fn is_there(number: u32, generation: u32) -> bool {
    let Some(backend) = maps::BACKENDS.get(number) else {
        return false;
    };
    let usable = BACKEND_ALIVE | BACKEND_RESOLVED;
    u32::from(backend.generation) == generation
        && backend.flags & usable == usable
        && maps::BACKEND_LOAD
            .get(number)
            .is_some_and(|load| load.weight != 0)
}

/// Remembers the backend that was picked for a client, for whom [`returning`] found none. Returns
/// it, or the one that another CPU has picked for the same client meanwhile.
#[inline(always)]
pub fn remember<F: Family>(
    work: &mut Work<F::Addr>,
    number: u32,
    service: &Service,
    backend: u32,
) -> u32 {
    let Some(record) = maps::BACKENDS.get(backend) else {
        return backend;
    };
    let entry = Affinity {
        backend,
        generation: record.generation.into(),
        last_seen: work.arrival.now,
        reserved: 0,
    };
    let key = &work.client_key;
    if F::affinity()
        .insert(key, &entry, u64::from(BPF_NOEXIST))
        .is_ok()
    {
        return backend;
    }
    match returning::<F>(work, number, service) {
        NO_BACKEND => {
            // What is there is of no use any more.
            let _ = F::affinity().insert(&work.client_key, &entry, 0);
            backend
        }
        other => other,
    }
}

/// [`admit`] for IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn may_begin4(service: u32) -> Decision {
    admit::<crate::family::V4>(service)
}

/// [`admit`] for IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn may_begin6(service: u32) -> Decision {
    admit::<crate::family::V6>(service)
}
