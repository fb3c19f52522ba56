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
