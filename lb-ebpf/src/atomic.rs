//! Atomic operations, which the target's `core::sync::atomic` does not offer.

use core::arch::asm;

/// Adds one.
///
/// # Safety
///
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn increment(target: *mut u64) {
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "lock *(u64 *)({target} + 0) += {one}",
            target = in(reg) target,
            one = in(reg) 1_u64,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = target;
}

/// Adds `value` and returns what was there before.
///
/// # Safety
///
/// `target` must point into a map value and be aligned to 8 bytes.
#[inline(always)]
pub unsafe fn fetch_add(target: *mut u64, value: u64) -> u64 {
    let before: u64;
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({target} + 0), {value})",
            target = in(reg) target,
            value = inout(reg) value => before,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (target, value);
        before = 0;
    }
    before
}

/// Writes `value`. Whatever was written before is seen by whoever sees it, and nothing that follows is read before.
///
/// # Safety
///
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn exchange_u64(target: *mut u64, value: u64) {
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "{value} = xchg_64({target} + 0, {value})",
            target = in(reg) target,
            value = inout(reg) value => _,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = (target, value);
}

/// Clears the bits that are not in `value`.
///
/// # Safety
///
/// As for [`fetch_add`].
#[inline(always)]
pub unsafe fn and_u64(target: *mut u64, value: u64) {
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "lock *(u64 *)({target} + 0) &= {value}",
            target = in(reg) target,
            value = in(reg) value,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = (target, value);
}

/// Defines an operation on 64 bits that returns what was there before, and is ordered with all other accesses.
macro_rules! fetching {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// As for [`fetch_add`].
        #[inline(always)]
        pub unsafe fn $name(target: *mut u64, value: u64) {
            // SAFETY: one instruction on memory the caller vouches for.
            #[cfg(target_arch = "bpf")]
            unsafe {
                asm!(
                    concat!("{value} = ", $instruction, "((u64 *)({target} + 0), {value})"),
                    target = in(reg) target,
                    value = inout(reg) value => _,
                );
            }
            #[cfg(not(target_arch = "bpf"))]
            let _ = (target, value);
        }
    };
}

fetching!(
    /// Sets the bits that are in `value`.
    fetch_or_u64, "atomic_fetch_or"
);
fetching!(
    /// Turns over the bits that are in `value`.
    fetch_xor_u64, "atomic_fetch_xor"
);

/// Replaces `old` by `new`; tells whether `old` was there.
///
/// # Safety
///
/// `target` must point into a map value and be aligned to 4 bytes.
#[inline(always)]
pub unsafe fn replace(target: *mut u32, old: u32, new: u32) -> bool {
    let mut found = old;
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "w0 = cmpxchg32_32({target} + 0, w0, {new})",
            target = in(reg) target,
            new = in(wreg) new,
            inout("w0") found,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (target, new);
        found = 0;
    }
    found == old
}

/// As [`replace`], for 64 bits.
///
/// # Safety
///
/// `target` must point into a map value and be aligned to 8 bytes.
#[inline(always)]
pub unsafe fn replace_u64(target: *mut u64, old: u64, new: u64) -> bool {
    let mut found = old;
    // SAFETY: one instruction on memory the caller vouches for.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "r0 = cmpxchg_64({target} + 0, r0, {new})",
            target = in(reg) target,
            new = in(reg) new,
            inout("r0") found,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (target, new);
        found = 0;
    }
    found == old
}
