//! How operators address a service or a backend of a configuration.

use super::{Backend, Config, Endpoint, Listen, Protocol, Service, read::closest, value};
use std::{fmt, net::SocketAddr, str::FromStr};

/// A service, by its name or by `VIP:ports/proto`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceSelector {
    /// The name.
    Name(String),
    /// VIP, ports and protocol.
    Listener(Listen, Protocol),
}

impl FromStr for ServiceSelector {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        if text.is_empty() {
            return Err(SelectError(
                "the service is empty; give its name or VIP:port/proto".to_owned(),
            ));
        }
        if let Some((address, protocol)) = text.rsplit_once('/')
            && let Ok(address) = address.parse()
        {
            return match protocol {
                "tcp" => Ok(Self::Listener(address, Protocol::Tcp)),
                "udp" => Ok(Self::Listener(address, Protocol::Udp)),
                _ => Err(SelectError(format!(
                    "service {text:?}: unknown protocol; end it with /tcp or /udp"
                ))),
            };
        }
        if text.parse::<Listen>().is_ok() {
            return Err(SelectError(format!(
                "service {text:?}: the protocol is missing; write {text}/tcp or {text}/udp"
            )));
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl ServiceSelector {
    /// Whether `service` is meant.
    #[must_use]
    pub fn matches(&self, service: &Service) -> bool {
        match self {
            Self::Name(name) => *name == service.name,
            Self::Listener(address, protocol) => {
                *address == service.listen && *protocol == service.protocol
            }
        }
    }
}

/// A backend of a given service, by its name or by `address:port`; by its address alone if it has
/// no port of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendSelector {
    /// The name.
    Name(String),
    /// Address and port; port 0 for none.
    Address(SocketAddr),
}

impl From<&str> for BackendSelector {
    fn from(text: &str) -> Self {
        let bare = || value::bare(text).map(|ip| SocketAddr::new(ip, 0));
        match text.parse().ok().or_else(bare) {
            Some(address) => Self::Address(address),
            None => Self::Name(text.to_owned()),
        }
    }
}

impl BackendSelector {
    /// Whether `backend` is meant.
    #[must_use]
    pub fn matches(&self, backend: &Backend) -> bool {
        match self {
            Self::Name(name) => *name == backend.name,
            // An address without a port may be a backend's name as well.
            Self::Address(address) => {
                *address == backend.address || Endpoint(*address).to_string() == backend.name
            }
        }
    }
}

/// Nothing is known by what the operator wrote: one line that says so and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectError(String);

impl fmt::Display for SelectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SelectError {}

impl Config {
    /// The service that `text` names, as [`ServiceSelector`].
    pub fn find_service(&self, text: &str) -> Result<&Service, SelectError> {
        let selector: ServiceSelector = text.parse()?;
        let found = self
            .services
            .iter()
            .find(|service| selector.matches(service));
        found.ok_or_else(|| {
            let names: Vec<&str> = self.services.iter().map(|s| s.name.as_str()).collect();
            let remedy = remedy(text, &names, "sluice service list");
            SelectError(format!("service {text:?}: there is none; {remedy}"))
        })
    }
}

impl Service {
    /// The backend that `text` names, as [`BackendSelector`].
    pub fn find_backend(&self, text: &str) -> Result<&Backend, SelectError> {
        let selector = BackendSelector::from(text);
        let found = self
            .backends
            .iter()
            .find(|backend| selector.matches(backend));
        found.ok_or_else(|| {
            let names: Vec<&str> = self.backends.iter().map(|b| b.name.as_str()).collect();
            let list = format!("sluice backend list {}", self.name);
            let remedy = remedy(text, &names, &list);
            let service = &self.name;
            SelectError(format!(
                "service {service:?}: backend {text:?}: there is none; {remedy}"
            ))
        })
    }
}

fn remedy(text: &str, names: &[&str], list: &str) -> String {
    match closest(text, names) {
        Some(close) => format!("did you mean {close}?"),
        None => format!("see \"{list}\""),
    }
}
