//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are ones' complement over 16-bit words taken in native order from network-order memory,
//! which gives the checksum in network order (RFC 1071 section 2 (B)).

/// Folds a sum of 16-bit words into 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Whether `sum`, which is below 2^48, may be `check` when it is folded. `false` is certain.
///
/// Equal sums differ by a multiple of 65535, and such a multiple is known by its product with the
/// number's inverse (Granlund and Montgomery, "Division by Invariant Integers using
/// Multiplication", 1994, section 9): a third of what it takes to fold.
#[inline(always)]
#[must_use]
pub const fn may_fold_to(sum: u64, check: u16) -> bool {
    // 65535 times this is 2^64 - 1.
    const INVERSE: u64 = 0x0001_0001_0001_0001;
    let difference = sum + (!check) as u64;
    difference.wrapping_mul(INVERSE.wrapping_neg()) <= INVERSE
}

/// The sum of one 32-bit word, to be added to others before [`fold`].
#[inline(always)]
#[must_use]
pub const fn word(w: u32) -> u64 {
    w as u64
}

/// The sum that takes one 32-bit word away.
#[inline(always)]
#[must_use]
pub const fn minus(w: u32) -> u64 {
    !w as u64
}

/// `check` (the field as it stands in the packet) after `delta` has been added to the words it
/// covers: RFC 1624 equation 3, `HC' = ~(~HC + ~m + m')`, with `delta = fold(~m + m')`.
#[inline(always)]
#[must_use]
pub const fn update(check: u16, delta: u16) -> u16 {
    let sum = (!check) as u32 + delta as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// A UDP checksum as it may stand in a packet: zero would mean "none" and is sent as its equal
/// (RFC 768).
#[inline(always)]
#[must_use]
pub const fn udp(check: u16) -> u16 {
    if check == 0 { 0xffff } else { check }
}

/// Sum over bytes, an odd last byte padded with zero. For the user side and tests; the data plane
/// uses a kernel helper.
#[must_use]
pub fn sum_bytes(bytes: &[u8]) -> u64 {
    let mut sum = 0u64;
    let mut chunks = bytes.chunks_exact(2);
    for chunk in &mut chunks {
        sum += u64::from(u16::from_ne_bytes([chunk[0], chunk[1]]));
    }
    if let [last] = chunks.remainder() {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 section 3: the worked example.
    #[test]
    fn rfc1071_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum_bytes(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    /// RFC 1624 section 4: the case that equation 2 of RFC 1141 gets wrong.
    #[test]
    fn rfc1624_example() {
        let be = |v: u16| u16::from_ne_bytes(v.to_be_bytes());
        let delta = fold(u64::from(!be(0x5555)) + u64::from(be(0x3285)));
        assert_eq!(update(be(0xdd2f), delta), be(0x0000));
    }

    proptest! {
        #[test]
        fn what_folds_to_a_checksum_is_known_without_folding(sum in 1u64..1 << 48, check: u16) {
            prop_assert!(may_fold_to(sum, fold(sum)));
            let same = check == fold(sum) || check == 0 && fold(sum) == 0xffff;
            prop_assert_eq!(may_fold_to(sum, check), same);
        }

        #[test]
        fn incremental_equals_recomputed(
            mut data in proptest::collection::vec(any::<u8>(), 8..200),
            old in any::<u32>(), new in any::<u32>(),
        ) {
            data[4..8].copy_from_slice(&old.to_ne_bytes());
            let before = !fold(sum_bytes(&data));
            data[4..8].copy_from_slice(&new.to_ne_bytes());
            let after = !fold(sum_bytes(&data));
            let got = update(before, fold(minus(old) + word(new)));
            // Both zeros of ones' complement stand for the same sum.
            prop_assert!(got == after || (got ^ after) == 0xffff && (got == 0 || after == 0));
        }

        #[test]
        fn fold_is_the_remainder(sum: u64) {
            prop_assert_eq!(u64::from(fold(sum)) % 0xffff, sum % 0xffff);
        }
    }
}
