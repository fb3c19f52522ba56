//! The networks that this host is in.

use super::table::contains;
use std::{io, net::IpAddr};

/// A network that an interface of this host is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// An address in it, which this host has.
    pub address: IpAddr,
    /// Its prefix length.
    pub length: u8,
}

impl Network {
    /// Whether `address` lies in it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        contains(self.address, self.length, address)
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shift = |bits: u8| u32::from(bits - self.length);
        let first = match self.address {
            IpAddr::V4(ip) => {
                let host = u32::MAX.checked_shr(32 - shift(32)).unwrap_or(0);
                IpAddr::V4((ip.to_bits() & !host).into())
            }
            IpAddr::V6(ip) => {
                let host = u128::MAX.checked_shr(128 - shift(128)).unwrap_or(0);
                IpAddr::V6((ip.to_bits() & !host).into())
            }
        };
        write!(f, "{first}/{}", self.length)
    }
}

/// The networks that interfaces in this thread's network namespace are in, one for each address.
///
/// # Errors
///
/// When the kernel does not tell.
pub fn networks() -> io::Result<Vec<Network>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the call fills the pointer with a list that is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: elements of the list are valid until it is freed, and the last points to null.
    while let Some(element) = unsafe { next.as_ref() } {
        let address = ip(element.ifa_addr);
        let mask = ip(element.ifa_netmask);
        if let (Some(address), Some(mask)) = (address, mask) {
            let length = match mask {
                IpAddr::V4(mask) => mask.to_bits().count_ones(),
                IpAddr::V6(mask) => mask.to_bits().count_ones(),
            };
            let length = u8::try_from(length).unwrap_or(u8::MAX);
            found.push(Network { address, length });
        }
        next = element.ifa_next;
    }
    // SAFETY: the list is the one that the call made, and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// The address in a socket address, if it is one of IP.
fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: null, or a valid socket address of the family that it says; it need not be aligned.
    unsafe {
        let family = (!address.is_null()).then(|| (&raw const (*address).sa_family).read())?;
        match i32::from(family) {
            libc::AF_INET => {
                let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()))
            }
            libc::AF_INET6 => {
                let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(IpAddr::from(address.sin6_addr.s6_addr))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_shown_by_their_first_address() {
        for (address, length, shown) in [
            ("10.1.2.3", 8, "10.0.0.0/8"),
            ("10.1.2.3", 32, "10.1.2.3/32"),
            ("10.1.2.3", 0, "0.0.0.0/0"),
            ("2001:db8:1::7", 32, "2001:db8::/32"),
            ("2001:db8:1::7", 128, "2001:db8:1::7/128"),
            ("2001:db8:1::7", 0, "::/0"),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(Network { address, length }.to_string(), shown);
        }
    }

    #[test]
    fn the_loopback_network_is_found() {
        let localhost: IpAddr = [127, 1, 1, 1].into();
        let networks = networks().unwrap();
        assert!(
            networks.iter().any(|n| n.contains(localhost)),
            "{networks:?}"
        );
    }
}
