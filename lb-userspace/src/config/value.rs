//! The small languages inside values: durations, addresses, ranges.
//!
//! Every function says what is wrong in words that follow the quoted value: `is not ...; write
//! ...`.

use super::{Listen, Ports};
use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// Longest duration that is accepted. The data plane's clock of 32-bit ticks wraps after 52 days;
/// half of that can be told from the past.
pub(super) const LONGEST: Duration = Duration::from_secs(14 * 24 * 3600);

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// A duration such as `500ms`, `3s`, `10m` or `1h30m`; at most [`LONGEST`], zero is allowed.
pub fn duration(text: &str) -> Result<Duration, String> {
    let malformed = || "is not a duration; write it like \"500ms\", \"3s\" or \"10m\"".to_owned();
    let too_long = || format!("is too long; choose at most \"{}\"", Human(LONGEST));
    let mut rest = text;
    let mut total: u64 = 0;
    if rest.is_empty() {
        return Err(malformed());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        if number.is_empty() {
            return Err(malformed());
        }
        if unit.is_empty() && tail.is_empty() {
            return Err(format!("has no unit; write \"{text}s\" or \"{text}ms\""));
        }
        let (_, factor) = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(malformed)?;
        total = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*factor))
            .and_then(|part| part.checked_add(total))
            .ok_or_else(too_long)?;
        rest = tail;
    }
    let total = Duration::from_millis(total);
    if total > LONGEST {
        return Err(too_long());
    }
    Ok(total)
}

/// Shows a duration as the configuration writes it: `1h30m`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Human(
    /// The duration; what is below a millisecond is left out.
    pub Duration,
);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (name, factor) in UNITS.iter().rev() {
            let count = rest / u128::from(*factor);
            if count > 0 {
                write!(f, "{count}{name}")?;
            }
            rest %= u128::from(*factor);
        }
        Ok(())
    }
}

/// The value of `listen`.
pub(super) fn listen(text: &str) -> Result<Listen, String> {
    const WRITE: &str = "write it like \"198.51.100.10:80\" or \"[2001:db8::1]:443\"";
    let malformed = || format!("is not an address and port; {WRITE}");
    if text.parse::<IpAddr>().is_ok() {
        return Err(format!("has no port; {WRITE}"));
    }
    let (host, ports) = text.rsplit_once(':').ok_or_else(malformed)?;
    // Whether the host is good is what the same text with a plain port tells.
    let address: SocketAddr = format!("{host}:1").parse().map_err(|_| malformed())?;
    let ip = address.ip();
    usable(ip)?;
    if ports == "*" {
        let ports = Ports::Any;
        return Ok(Listen { ip, ports });
    }
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (Some(first), Some(last)) = (number(first), number(last)) else {
        return Err(format!(
            "has no valid port; {WRITE}, with a port from 1 to 65535, a range \"8000-8100\" or \"*\" for every port"
        ));
    };
    if first == 0 || last == 0 {
        return Err("has port 0, which no packet carries; choose 1 to 65535".to_owned());
    }
    if first > last {
        return Err(format!(
            "has a range that begins above its end; write \"{host}:{last}-{first}\""
        ));
    }
    let ports = Ports::span(first, last);
    Ok(Listen { ip, ports })
}

/// An address without a port: `10.0.0.11`, `2001:db8::11`, `[2001:db8::11]`.
pub(super) fn bare(text: &str) -> Option<IpAddr> {
    let inner = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    match inner {
        Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    }
}

/// The address of a router.
pub(super) fn gateway(text: &str) -> Result<IpAddr, String> {
    let address = bare(text).ok_or_else(|| {
        "is not an address; write it like \"192.0.2.1\" or \"2001:db8::1\"".to_owned()
    })?;
    usable(address)?;
    Ok(address)
}

/// A backend's address; `port` is used when it has none.
pub(super) fn backend(text: &str, port: u16) -> Result<SocketAddr, String> {
    let address = match bare(text) {
        Some(ip) => SocketAddr::new(ip, port),
        None => {
            let address: SocketAddr = text.parse().map_err(|_| {
                "is not an address; write it like \"10.0.0.11:3001\" or \"[2001:db8::11]:3001\""
                    .to_owned()
            })?;
            if address.port() == 0 {
                return Err(
                    "has port 0; choose 1 to 65535, or leave it out for the service's".to_owned(),
                );
            }
            address
        }
    };
    match address.ip() {
        IpAddr::V4(ip) if ip.is_loopback() => {}
        IpAddr::V6(ip) if ip.is_loopback() => {
            return Err(
                "cannot be a backend: the kernel takes no packet of another host to it; use \
                 another address of this host, or 127.0.0.1 behind an IPv4 VIP"
                    .to_owned(),
            );
        }
        ip => usable(ip)?,
    }
    Ok(canonical(address))
}

/// The address without what text may add to it beyond address and port.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

/// Refuses addresses that cannot be a VIP or a backend.
fn usable(ip: IpAddr) -> Result<(), String> {
    const USE: &str = "use a unicast address";
    let what = match ip {
        IpAddr::V4(ip) if ip.is_broadcast() => "the broadcast address",
        IpAddr::V4(ip) if ip.octets()[0] == 0 => "an unspecified address",
        IpAddr::V6(ip) if ip.is_unspecified() => "an unspecified address",
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => {
            return Err("is an IPv4 address in IPv6 clothing; write it as IPv4".to_owned());
        }
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            return Err("is a link-local address; use a global or unique local one".to_owned());
        }
        ip if ip.is_loopback() => "a loopback address",
        ip if ip.is_multicast() => "a multicast address",
        _ => return Ok(()),
    };
    Err(format!("is {what}; {USE}"))
}

/// `FIRST-LAST` or `ONE`, as numbers of `low..=high`.
pub(super) fn range(text: &str, low: u16, high: u16) -> Result<(u16, u16), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| {
        let text = text.trim();
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits
            .then(|| text.parse::<u16>().ok())
            .flatten()
            .filter(|number| (low..=high).contains(number))
    };
    let (Some(first), Some(last)) = (number(first), number(last)) else {
        return Err(format!(
            "is not a range of numbers from {low} to {high}; write it like \"{low}-{high}\""
        ));
    };
    if first > last {
        return Err(format!("begins above its end; write \"{last}-{first}\""));
    }
    Ok((first, last))
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// The first of them: all other bits are zero.
    pub address: IpAddr,
    /// How many bits are the same.
    pub bits: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = "is not an address prefix; write it like \"10.0.0.0/8\"";
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| malformed)?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => longest,
            Some(bits) => bits
                .parse()
                .ok()
                .filter(|bits| *bits <= longest)
                .ok_or(malformed)?,
        };
        let host = match address {
            IpAddr::V4(a) => u128::from(a.to_bits()) << bits & u128::from(u32::MAX),
            IpAddr::V6(a) => a.to_bits().checked_shl(bits.into()).unwrap_or(0),
        };
        if host != 0 {
            return Err("has bits set behind its prefix; set them to zero".to_owned());
        }
        Ok(Self { address, bits })
    }
}

/// `NUMBER/s`.
pub(super) fn rate(text: &str) -> Result<u32, String> {
    text.strip_suffix("/s")
        .and_then(|number| number.parse().ok())
        .filter(|number| *number > 0)
        .ok_or_else(|| "is not a rate; write it like \"200/s\"".to_owned())
}

/// A name that an operator gives to a service or a backend.
pub(super) fn name(text: &str) -> Result<(), String> {
    const LONGEST_NAME: usize = 63;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() {
        return Err("is empty; give it a name".to_owned());
    }
    if text.len() > LONGEST_NAME {
        return Err(format!(
            "is too long; use at most {LONGEST_NAME} characters"
        ));
    }
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) || !text.chars().all(good) {
        return Err(
            "is not a name; begin with a letter or digit and use letters, digits, -, _ and ."
                .to_owned(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_as_operators_write_them() {
        for (text, ms) in [
            ("500ms", 500),
            ("3s", 3_000),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("2d", 172_800_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "3x",
            "5",
            "99999999999999999999s",
            "15d",
            "1M",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_that_can_be_backends() {
        let parse = |text| backend(text, 80).map(|address| address.to_string());
        assert_eq!(parse("10.0.0.11").as_deref(), Ok("10.0.0.11:80"));
        assert_eq!(parse("10.0.0.11:3001").as_deref(), Ok("10.0.0.11:3001"));
        assert_eq!(parse("127.0.0.1:3001").as_deref(), Ok("127.0.0.1:3001"));
        assert_eq!(parse("2001:db8::1").as_deref(), Ok("[2001:db8::1]:80"));
        assert_eq!(parse("[2001:db8::1]").as_deref(), Ok("[2001:db8::1]:80"));
        assert_eq!(parse("[2001:db8::1]:9").as_deref(), Ok("[2001:db8::1]:9"));
        for text in [
            "10.0.0.256:80",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "[::1]:80",
            "0.0.0.0:80",
            "[::]:80",
            "224.0.0.1:80",
            "[ff02::1]:80",
            "255.255.255.255:80",
            "[::ffff:10.0.0.1]:80",
            "[fe80::1]:80",
            "localhost:80",
            "[10.0.0.1]:80",
            "",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_a_service_may_listen_on() {
        let parse = |text: &str| listen(text).map(|listen| (listen.ip.to_string(), listen.ports));
        let v4 = |ports| Ok(("198.51.100.10".to_owned(), ports));
        let v6 = |ports| Ok(("2001:db8::1".to_owned(), ports));
        assert_eq!(parse("198.51.100.10:80"), v4(Ports::One(80)));
        assert_eq!(
            parse("198.51.100.10:8000-8100"),
            v4(Ports::Range(8000, 8100))
        );
        assert_eq!(parse("198.51.100.10:80-80"), v4(Ports::One(80)));
        assert_eq!(parse("198.51.100.10:1-65535"), v4(Ports::Range(1, 65535)));
        assert_eq!(parse("198.51.100.10:*"), v4(Ports::Any));
        assert_eq!(parse("[2001:db8::1]:443"), v6(Ports::One(443)));
        assert_eq!(parse("[2001:db8::1]:1-2"), v6(Ports::Range(1, 2)));
        assert_eq!(parse("[2001:db8::1]:*"), v6(Ports::Any));
        for text in [
            "198.51.100.10",
            "198.51.100.10:",
            "198.51.100.10:0",
            "198.51.100.10:0-10",
            "198.51.100.10:10-0",
            "198.51.100.10:10-9",
            "198.51.100.10:10-",
            "198.51.100.10:-10",
            "198.51.100.10:1-2-3",
            "198.51.100.10:+1-2",
            "198.51.100.10:1 - 2",
            "198.51.100.10:1-65536",
            "198.51.100.10:**",
            "127.0.0.1:*",
            "[ff02::1]:1-2",
            "2001:db8::1:*",
            "a:80",
            "*:80",
            "1.2.3.4:0",
            ":80",
            "2001:db8::1",
        ] {
            assert!(listen(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_run_upwards_within_their_bounds() {
        assert_eq!(range("200-299", 100, 599), Ok((200, 299)));
        assert_eq!(range("301", 100, 599), Ok((301, 301)));
        for text in [
            "299-200", "99-200", "200-600", "", "-", "2x", "200-", "+200", "1-2-3",
        ] {
            assert!(range(text, 100, 599).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_shown_duration_reads_back(ms in 0..=u64::try_from(LONGEST.as_millis()).unwrap()) {
            let original = Duration::from_millis(ms);
            prop_assert_eq!(duration(&Human(original).to_string()), Ok(original));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = duration(&text);
            let _ = listen(&text);
            let _ = backend(&text, 80);
            let _ = gateway(&text);
            let _ = range(&text, 1, 65535);
            let _ = text.parse::<Prefix>();
            let _ = rate(&text);
            let _ = name(&text);
        }
    }
}
