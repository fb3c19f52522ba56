//! Which source ports are left to the data plane.

use std::{fs, io};

/// Ports below this are for servers, and clients behind strict firewalls may not use them.
const FIRST_UNPRIVILEGED: u16 = 1024;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// First and last port, inclusive, that the kernel gives to the host's own connections, IPv4 and
/// IPv6 alike.
///
/// # Errors
///
/// When `/proc` is not mounted or holds what no kernel writes.
pub fn ephemeral_port_range() -> io::Result<(u16, u16)> {
    let text = fs::read_to_string(RANGE)
        .map_err(|error| io::Error::new(error.kind(), format!("{RANGE}: {error}")))?;
    parse(&text).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{RANGE}: not a port range: {:?}", text.trim()),
        )
    })
}

/// The larger range of ports that the host's own connections do not use; `None` when theirs leaves
/// nothing above port 1023.
#[must_use]
pub fn nat_port_range((low, high): (u16, u16)) -> Option<(u16, u16)> {
    let below = (low > FIRST_UNPRIVILEGED).then(|| (FIRST_UNPRIVILEGED, low - 1));
    let above = high
        .checked_add(1)
        .map(|first| (first.max(FIRST_UNPRIVILEGED), u16::MAX));
    below
        .into_iter()
        .chain(above)
        .max_by_key(|(first, last)| last - first)
}

fn parse(text: &str) -> Option<(u16, u16)> {
    let mut words = text.split_whitespace().map(str::parse);
    match (words.next(), words.next(), words.next()) {
        (Some(Ok(low)), Some(Ok(high)), None) if low <= high => Some((low, high)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_gap_is_taken() {
        // The kernel's default.
        assert_eq!(nat_port_range((32768, 60999)), Some((1024, 32767)));
        assert_eq!(nat_port_range((1024, 40000)), Some((40001, 65535)));
        assert_eq!(nat_port_range((2000, 3000)), Some((3001, 65535)));
        assert_eq!(nat_port_range((50000, 65535)), Some((1024, 49999)));
        assert_eq!(nat_port_range((1, 100)), Some((1024, 65535)));
        assert_eq!(nat_port_range((1024, 65535)), None);
        assert_eq!(nat_port_range((1, 65535)), None);
    }

    #[test]
    fn the_kernel_file_is_read() {
        assert_eq!(parse("32768\t60999\n"), Some((32768, 60999)));
        for bad in ["", "32768", "60999 32768", "1 2 3", "1 70000"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        let (low, high) = ephemeral_port_range().unwrap();
        assert!(low <= high);
    }
}
