//! VLAN tags of a frame in one word (IEEE 802.1Q, 802.1ad).
//!
//! The outer tag is the low half and the inner one the high half; 0 is an untagged frame. Priority
//! bits are no part of it: they do not tell where a packet goes.

/// Bits of a tag's VLAN identifier.
pub const ID: u16 = 0xfff;
/// Set in the half of a tag that is there; VLAN 0 is a tag too.
pub const PRESENT: u16 = 1 << 12;
/// Set in the half of a service tag (802.1ad, ethertype 0x88a8).
pub const SERVICE: u16 = 1 << 13;

/// Packs one tag. `tci` may have priority bits, which are left out.
#[inline(always)]
#[must_use]
pub const fn tag(tci: u16, service: bool) -> u16 {
    (tci & ID) | PRESENT | if service { SERVICE } else { 0 }
}

/// The word with one more tag in front of all others; `None` if there are two already.
#[must_use]
pub const fn push(tags: u32, outer: u16) -> Option<u32> {
    if tags >> 16 != 0 {
        return None;
    }
    Some(tags << 16 | outer as u32)
}

/// The tags, the outer one first; 0 where there is none.
#[inline(always)]
#[must_use]
pub const fn halves(tags: u32) -> (u16, u16) {
    (tags as u16, (tags >> 16) as u16)
}

/// How many tags there are.
#[inline(always)]
#[must_use]
pub const fn count(tags: u32) -> u32 {
    let (outer, inner) = halves(tags);
    (outer != 0) as u32 + (inner != 0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_pushed_last_is_the_outer_one() {
        let inner = push(0, tag(0x6014, false)).unwrap();
        assert_eq!(halves(inner), (PRESENT | 0x14, 0));
        let both = push(inner, tag(0, true)).unwrap();
        assert_eq!(halves(both), (PRESENT | SERVICE, PRESENT | 0x14));
        assert_eq!(push(both, tag(1, false)), None);
        assert_eq!((count(0), count(inner), count(both)), (0, 1, 2));
    }
}
