//! Addresses of both families behind one trait.

use bytemuck::Pod;

/// `AF_INET`, as stored in [`crate::backend::Backend::family`].
pub const FAMILY_V4: u8 = 2;
/// `AF_INET6`, as stored in [`crate::backend::Backend::family`].
pub const FAMILY_V6: u8 = 10;

/// An IP address as the maps hold it: network order, in 32-bit words.
///
/// IPv4 is one `u32`, IPv6 is `[u32; 4]`. Words rather than bytes, because the BPF back end
/// compares and copies byte arrays one byte at a time.
pub trait Address: Pod + Eq {
    /// `FAMILY_V4` or `FAMILY_V6`.
    const FAMILY: u8;
    /// Number of 32-bit words.
    const WORDS: usize;
    /// What fills an [`crate::flow_table::Entry`].
    type EntryRest: Pod + Eq + core::fmt::Debug;

    /// The address in the four-word form that family-independent records use; unused words are
    /// zero.
    fn widen(self) -> [u32; 4];
    /// The inverse of [`Address::widen`]; words the family does not have are ignored.
    fn narrow(words: &[u32; 4]) -> Self;
}

impl Address for u32 {
    const FAMILY: u8 = FAMILY_V4;
    const WORDS: usize = 1;
    type EntryRest = [u32; 0];

    #[inline(always)]
    fn widen(self) -> [u32; 4] {
        [self, 0, 0, 0]
    }

    #[inline(always)]
    fn narrow(words: &[u32; 4]) -> Self {
        words[0]
    }
}

impl Address for [u32; 4] {
    const FAMILY: u8 = FAMILY_V6;
    const WORDS: usize = 4;
    type EntryRest = [u32; 4];

    #[inline(always)]
    fn widen(self) -> [u32; 4] {
        self
    }

    #[inline(always)]
    fn narrow(words: &[u32; 4]) -> Self {
        *words
    }
}

/// The IPv4 address `ip` in network order.
#[must_use]
pub fn from_ipv4(ip: core::net::Ipv4Addr) -> u32 {
    u32::from_ne_bytes(ip.octets())
}

/// The IPv6 address `ip` in network order.
#[must_use]
pub fn from_ipv6(ip: core::net::Ipv6Addr) -> [u32; 4] {
    bytemuck::cast(ip.octets())
}

/// Any address in the four-word form of family-independent records.
#[must_use]
pub fn from_ip(ip: core::net::IpAddr) -> [u32; 4] {
    match ip {
        core::net::IpAddr::V4(ip) => from_ipv4(ip).widen(),
        core::net::IpAddr::V6(ip) => from_ipv6(ip),
    }
}

/// The inverse of [`from_ip`]; `family` is [`FAMILY_V4`] or [`FAMILY_V6`].
#[must_use]
pub fn to_ip(family: u8, words: &[u32; 4]) -> core::net::IpAddr {
    if family == FAMILY_V4 {
        let octets: [u8; 4] = words[0].to_ne_bytes();
        core::net::IpAddr::V4(octets.into())
    } else {
        let octets: [u8; 16] = bytemuck::cast(*words);
        core::net::IpAddr::V6(octets.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    #[test]
    fn addresses_survive_the_round_trip() {
        let v4 = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
        let v6 = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));
        assert_eq!(to_ip(FAMILY_V4, &from_ip(v4)), v4);
        assert_eq!(to_ip(FAMILY_V6, &from_ip(v6)), v6);
    }

    #[test]
    fn words_hold_network_order() {
        assert_eq!(
            from_ipv4(Ipv4Addr::new(1, 2, 3, 4)).to_ne_bytes(),
            [1, 2, 3, 4]
        );
    }
}
