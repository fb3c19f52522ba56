//! Bounds that the verifier must see although the compiler already knows them.

/// `value`, if it lies between `min` and `max`.
///
/// The compiler drops a test whose outcome it can prove; the verifier, which does not follow the
/// same proof, then refuses the access behind it. The instruction hides the value's
/// history, so the test stays.
#[inline(always)]
pub fn within(value: u32, min: u32, max: u32) -> Option<u32> {
    let mut value = value;
    // SAFETY: moves a register to itself.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("{0} = {0}", inout(wreg) value);
    }
    (value >= min && value <= max).then_some(value)
}

/// `value`, with its history hidden from the compiler.
///
/// A difference of packet pointers that ends up in 32 bits would be computed in 32 bits, and the
/// verifier allows arithmetic on pointers only in 64.
#[inline(always)]
pub fn whole(value: usize) -> usize {
    let mut value = value as u64;
    // SAFETY: moves a register to itself.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value);
    }
    value as usize
}
