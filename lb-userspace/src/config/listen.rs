//! What a service listens on: an address with one port, a range of ports, or every port.

use super::value;
use lb_common::service::ANY_PORT;
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

/// A VIP and the ports a service takes of it: `198.51.100.10:80`, `[2001:db8::1]:8000-8100`,
/// `198.51.100.10:*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Listen {
    /// The VIP.
    pub ip: IpAddr,
    /// The ports.
    pub ports: Ports,
}

/// The ports a service takes of its VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// One port.
    One(u16),
    /// From the first to the last, both included; the first is below the last.
    Range(u16, u16),
    /// Every port that no other service of the VIP and protocol names.
    Any,
}

impl Ports {
    /// The ports from `first` to `last`; [`ANY_PORT`] alone stands for every port.
    #[must_use]
    pub const fn span(first: u16, last: u16) -> Self {
        if last == ANY_PORT {
            Self::Any
        } else if first == last {
            Self::One(first)
        } else {
            Self::Range(first, last)
        }
    }

    /// First and last port of the keys that the data plane finds the service by; the inverse of
    /// [`Ports::span`].
    #[must_use]
    pub const fn keys(self) -> (u16, u16) {
        match self {
            Self::One(port) => (port, port),
            Self::Range(first, last) => (first, last),
            Self::Any => (ANY_PORT, ANY_PORT),
        }
    }

    /// How many keys these are.
    #[must_use]
    pub const fn count(self) -> u32 {
        let (first, last) = self.keys();
        last as u32 - first as u32 + 1
    }

    /// How many keys are in both.
    #[must_use]
    pub fn shared(self, other: Self) -> u32 {
        let ((first, last), (from, to)) = (self.keys(), other.keys());
        let (first, last) = (u32::from(first.max(from)), u32::from(last.min(to)));
        (last + 1).saturating_sub(first)
    }

    /// The port that backends have which name none: the service's own, or 0 if it has several and
    /// packets keep theirs.
    #[must_use]
    pub const fn for_backends(self) -> u16 {
        match self {
            Self::One(port) => port,
            Self::Range(..) | Self::Any => 0,
        }
    }
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self {
            ip: address.ip(),
            ports: Ports::One(address.port()),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(port) => write!(f, "{port}"),
            Self::Range(first, last) => write!(f, "{first}-{last}"),
            Self::Any => f.write_str("*"),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}:{}", self.ports),
            IpAddr::V6(ip) => write!(f, "[{ip}]:{}", self.ports),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        value::listen(text)
    }
}

/// Shows a backend's address as the configuration writes it: without a port if it has none of its
/// own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint(
    /// Address and port; port 0 for none.
    pub SocketAddr,
);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.port() == 0 {
            self.0.ip().fmt(f)
        } else {
            self.0.fmt(f)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_share_what_is_in_both() {
        let range = Ports::Range(8000, 8100);
        for (other, shared) in [
            (range, 101),
            (Ports::Range(8100, 8200), 1),
            (Ports::Range(7000, 8000), 1),
            (Ports::Range(8101, 8200), 0),
            (Ports::Range(1, 65535), 101),
            (Ports::One(8050), 1),
            (Ports::One(7999), 0),
            (Ports::Any, 0),
        ] {
            assert_eq!(range.shared(other), shared, "{other:?}");
            assert_eq!(other.shared(range), shared, "{other:?}");
        }
        assert_eq!(Ports::Any.shared(Ports::Any), 1);
        assert_eq!(Ports::Range(1, 65535).count(), 65535);
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(v6: bool, host in 1_u8..255, a in 1_u16.., b in 1_u16.., any: bool) {
            let ip = if v6 {
                IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(host)])
            } else {
                IpAddr::from([198, 51, 100, host])
            };
            let ports = if any { Ports::Any } else { Ports::span(a.min(b), a.max(b)) };
            let listen = Listen { ip, ports };
            prop_assert_eq!(listen.to_string().parse(), Ok(listen));
            let (first, last) = ports.keys();
            prop_assert_eq!(Ports::span(first, last), ports);
        }
    }
}
