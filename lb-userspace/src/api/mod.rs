//! The HTTP API: one set of types, a server on the control socket and a client for the command
//! line.

use crate::model::Admin;
use std::{future::Future, net::IpAddr, str::FromStr};

pub mod client;
#[cfg(test)]
pub(crate) mod sample;
pub mod server;
pub mod types;

/// What the server asks of the daemon.
///
/// Services reach these methods by their name: the server has already translated
/// `VIP:port/protocol` and refused what is not configured.
pub trait Control: Send + Sync + 'static {
    /// Every service, in the order of the configuration.
    fn services(&self) -> impl Future<Output = Reply<Vec<types::Service>>> + Send;
    /// Every backend, or those of one service, in the order of the configuration.
    fn backends(
        &self,
        service: Option<String>,
    ) -> impl Future<Output = Reply<Vec<types::Backend>>> + Send;
    /// The flows that pass `filter`, at most `filter.limit` of them.
    fn connections(
        &self,
        filter: ConnectionFilter,
    ) -> impl Future<Output = Reply<Vec<types::Connection>>> + Send;
    /// How many flows pass `filter`; its limit does not count.
    fn connection_count(&self, filter: ConnectionFilter)
    -> impl Future<Output = Reply<u64>> + Send;
    /// Forgets the flows that pass `filter`, and tells how many there were; its limit does not count.
    fn connection_flush(&self, filter: ConnectionFilter)
    -> impl Future<Output = Reply<u64>> + Send;
    /// Packets dropped, for every reason there is, zeros included.
    fn drops(&self) -> impl Future<Output = Reply<Vec<types::Drops>>> + Send;
    /// The daemon and what it has put into the kernel.
    fn status(&self) -> impl Future<Output = Reply<types::Status>> + Send;
    /// What the operator wants of a backend, known by its name or its address as listed. Returns when
    /// new flows follow it.
    fn set_admin(
        &self,
        service: String,
        backend: String,
        admin: Admin,
    ) -> impl Future<Output = Reply<types::Backend>> + Send;
    /// The flows of a backend that have not ended.
    fn open_flows(
        &self,
        service: String,
        backend: String,
    ) -> impl Future<Output = Reply<types::OpenFlows>> + Send;
    /// Ends the daemon; traffic flows on. Returns as soon as the end has begun.
    fn stop(&self) -> impl Future<Output = Reply<()>> + Send;
    /// Reads the configuration file again; returns when it is in force or refused.
    fn reload(&self) -> impl Future<Output = Reply<()>> + Send;
}

/// What the daemon answers.
pub type Reply<T> = Result<T, Failure>;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// HTTP status, 4xx or 5xx.
    pub status: u16,
    /// One line that names the object and what to do.
    pub message: String,
}

impl Failure {
    /// The request makes no sense as it stands: 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            message: message.into(),
        }
    }

    /// The object does not exist: 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self {
            status: 404,
            message: message.into(),
        }
    }

    /// The object is not in a state that allows it, or the configuration is bad: 409.
    pub fn refused(message: impl Into<String>) -> Self {
        Self {
            status: 409,
            message: message.into(),
        }
    }

    /// The daemon could not do it: 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            status: 500,
            message: message.into(),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::internal(format!("{error:#}"))
    }
}

/// Which flows are wanted. Everything that is given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionFilter {
    /// Name of the service.
    pub service: Option<String>,
    /// Name or `address:port` of the backend, as [`types::Backend`] has them.
    pub backend: Option<String>,
    /// Where the client is.
    pub client: Option<ClientFilter>,
    /// State, one of [`lb_common::names::STATE`].
    pub state: Option<u8>,
    /// How many flows at most; `None`: all.
    pub limit: Option<usize>,
}

/// A client: `192.0.2.1`, `192.0.2.0/24`, `192.0.2.1:4711`, `[2001:db8::1]:4711`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFilter {
    /// Address.
    pub address: IpAddr,
    /// Leading bits of the address that must be equal.
    pub prefix: u8,
    /// Port; `None`: any.
    pub port: Option<u16>,
}

impl ClientFilter {
    /// Whether `address:port` is meant.
    #[must_use]
    pub fn matches(&self, address: IpAddr, port: u16) -> bool {
        let same = match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                leading_bits_equal(a.to_bits().into(), b.to_bits().into(), self.prefix, 32)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                leading_bits_equal(a.to_bits(), b.to_bits(), self.prefix, 128)
            }
            _ => false,
        };
        same && self.port.is_none_or(|p| p == port)
    }
}

fn leading_bits_equal(a: u128, b: u128, prefix: u8, width: u32) -> bool {
    let ignored = width.saturating_sub(u32::from(prefix));
    (a ^ b).checked_shr(ignored).unwrap_or(0) == 0
}

impl FromStr for ClientFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "client {text:?}: neither an address, a prefix nor address:port; \
                 write 192.0.2.1, 192.0.2.0/24, 192.0.2.1:4711 or [2001:db8::1]:4711"
            )
        };
        let width = |address: IpAddr| if address.is_ipv4() { 32 } else { 128 };
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self {
                address,
                prefix: width(address),
                port: None,
            });
        }
        if let Ok(socket) = text.parse::<std::net::SocketAddr>() {
            let address = socket.ip();
            return Ok(Self {
                address,
                prefix: width(address),
                port: Some(socket.port()),
            });
        }
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address = address.parse().map_err(|_| bad())?;
        let prefix = prefix
            .parse()
            .ok()
            .filter(|p| *p <= width(address))
            .ok_or_else(bad)?;
        Ok(Self {
            address,
            prefix,
            port: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_filters_match_what_they_name() {
        let cases = [
            ("192.0.2.1", "192.0.2.1:9", true),
            ("192.0.2.1", "192.0.2.2:9", false),
            ("192.0.2.1:9", "192.0.2.1:9", true),
            ("192.0.2.1:9", "192.0.2.1:8", false),
            ("192.0.2.0/24", "192.0.2.200:1", true),
            ("192.0.2.0/24", "192.0.3.0:1", false),
            ("0.0.0.0/0", "203.0.113.9:1", true),
            ("0.0.0.0/0", "[2001:db8::1]:1", false),
            ("::/0", "[2001:db8::1]:1", true),
            ("2001:db8::/32", "[2001:db8:ffff::1]:1", true),
            ("2001:db8::/32", "[2001:db9::1]:1", false),
            ("[2001:db8::1]:80", "[2001:db8::1]:80", true),
        ];
        for (filter, client, expected) in cases {
            let filter: ClientFilter = filter.parse().unwrap();
            let client: std::net::SocketAddr = client.parse().unwrap();
            assert_eq!(
                filter.matches(client.ip(), client.port()),
                expected,
                "{filter:?} {client}"
            );
        }
    }

    #[test]
    fn nonsense_is_refused_with_examples() {
        for text in [
            "",
            "web",
            "192.0.2.0/33",
            "192.0.2.1:x",
            "192.0.2.1/",
            "2001:db8::/129",
        ] {
            let error = text.parse::<ClientFilter>().unwrap_err();
            assert!(
                error.contains(&format!("{text:?}")) && error.contains("192.0.2.0/24"),
                "{error}"
            );
        }
    }
}
