//! The configuration: what the operator wants, parsed and validated.
//!
//! Text becomes a [`Config`] in one step and every value in it is already valid; nothing behind
//! this module checks again.

mod daemon;
mod error;
mod health;
mod listen;
mod read;
mod select;
mod service;
#[cfg(test)]
mod tests;
mod tls;
mod value;
mod whole;

pub use error::Error;
pub use health::{
    Check, Dns, Exec, Grpc, Health, Http, Pattern, Start, Udp, User, environment, rcode_name,
};
pub use listen::{Endpoint, Listen, Ports};
pub use select::{BackendSelector, SelectError, ServiceSelector};
pub use tls::Tls;
pub use value::{Human, Prefix, duration};

use read::{Section, Source};
use std::{
    fs::File,
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use toml::de::DeTable;

/// A file above this size is no configuration.
const FILE_MAX: u64 = 64 << 20;

/// A whole configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Section `[daemon]`.
    pub daemon: Daemon,
    /// Section `[limits]`.
    pub limits: Limits,
    /// Section `[timeouts]`.
    pub timeouts: Timeouts,
    /// Every `[[service]]`, in the order of the file, with `[defaults]` applied.
    pub services: Vec<Service>,
}

/// Section `[daemon]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Interfaces the program is attached to.
    pub interfaces: Vec<String>,
    /// How it is attached.
    pub mode: AttachMode,
    /// Directory on a BPF file system that holds the pins.
    pub pin_path: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Where metrics and the API are served over TCP, if anywhere.
    pub http: Option<SocketAddr>,
    /// Whether ARP and neighbour discovery for VIPs are answered that no kernel address holds.
    pub answer_arp: bool,
    /// First and last source port of `nat`, inclusive; `None`: the larger range outside the host's
    /// ephemeral ports.
    pub nat_ports: Option<(u16, u16)>,
    /// Addresses that `nat` sends from, in turn by a hash of the flow; empty: the host's own address
    /// towards each backend.
    pub nat_sources: Vec<IpAddr>,
    /// Where the outer packets of `ipip` and `gue` come from.
    pub encap_source: EncapSource,
    /// UDP port that `gue` sends to.
    pub gue_port: u16,
    /// Command that is run when the state of a backend changes: program and arguments; empty: none.
    pub on_state_change: Vec<String>,
    /// Whether clients on this host are led to the services; `None`: if it can be done.
    pub local_clients: Option<bool>,
    /// The cgroup whose processes these clients are; `None`: all of this host.
    pub cgroup: Option<PathBuf>,
    /// First bits of the marks of packets of health checks that are led to the VIP; the low
    /// [`lb_common::probe::TARGET_BITS`] are zero.
    pub probe_mark: u32,
}

/// Networks that the outer packets of `ipip` and `gue` come from, with a hash of the flow in the host
/// part. Where there is none they come from the balancer's own address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncapSource {
    /// Network and prefix length of outer IPv4 packets.
    pub v4: Option<(Ipv4Addr, u8)>,
    /// Network and prefix length of outer IPv6 packets.
    pub v6: Option<(Ipv6Addr, u8)>,
}

/// How the XDP program is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver where it can, else generic.
    Auto,
    /// In the driver, or not at all.
    Driver,
    /// Behind the driver, on socket buffers: slower, works everywhere.
    Generic,
}

/// Section `[timeouts]`: how long a TCP flow that is not established may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// While it is being opened.
    pub opening: Duration,
    /// When one side has sent FIN.
    pub closing: Duration,
    /// When both have: for what is repeated.
    pub time_wait: Duration,
    /// After RST.
    pub closed: Duration,
}

impl Default for Timeouts {
    /// Closing as IPVS, the others somewhat shorter: nothing is gained by keeping what is over.
    fn default() -> Self {
        Self {
            opening: Duration::from_secs(60),
            closing: Duration::from_secs(120),
            time_wait: Duration::from_secs(20),
            closed: Duration::from_secs(10),
        }
    }
}

/// Section `[limits]`: sizes of the maps, fixed when they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of each family's flow table. A `nat` connection takes two.
    pub flows: u32,
    /// Services.
    pub services: u32,
    /// Ports that services of one address family listen on, each of a range counted.
    pub listeners: u32,
    /// Backends, counted once for each service they serve.
    pub backends: u32,
    /// Slots of all selection tables together.
    pub slots: u32,
    /// Entries of each family's table of fragmented datagrams.
    pub fragments: u32,
    /// Clients of each address family whose backend, and whose rate of new flows, is remembered.
    pub clients: u32,
    /// Prefixes of each address family in all allow and deny lists together.
    pub prefixes: u32,
    /// Entries of each family's table of half-open flows that began under pressure.
    pub opening: u32,
    /// New flows a second that each CPU lets into the flow table; 0: as many as come. No size of a
    /// map, so a reload may change it.
    pub new_flows_per_cpu: u32,
}

/// One `[[service]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Unique name.
    pub name: String,
    /// VIP and ports.
    pub listen: Listen,
    /// Transport protocol.
    pub protocol: Protocol,
    /// One of [`lb_common::service::forward`].
    pub forward: u8,
    /// One of [`lb_common::service::scheduler`].
    pub scheduler: u8,
    /// Slots that its selection table has at least, with a hash scheduler.
    pub table_size: u32,
    /// Whether every flow is recorded, also where hashing its packets again would find its backend.
    pub track_all: bool,
    /// In `dnat`, the router that clients come through: where answers go whose flow is not recorded.
    pub gateway: Option<IpAddr>,
    /// One of [`lb_common::service::on_no_backend`].
    pub on_no_backend: u8,
    /// One of [`lb_common::service::on_backend_down`].
    pub on_backend_down: u8,
    /// How long an established flow may be silent.
    pub idle_timeout: Duration,
    /// How long a TCP handshake may take; `None`: as long as the client tries.
    pub connect_timeout: Option<Duration>,
    /// How long the weight of a backend that comes up takes to rise; zero: it is there at once.
    pub slow_start: Duration,
    /// How long the flows of a drained backend may go on; `None`: as long as they like.
    pub drain_timeout: Option<Duration>,
    /// Percent of the backends below which those that are down are used too; 0: never.
    pub panic_threshold: u32,
    /// How long a client returns to its backend after its last flow; zero: not at all.
    pub affinity: Duration,
    /// How many bits of a client's address affinity goes by.
    pub affinity_mask: u8,
    /// New flows a second that one client address may begin; 0: no limit.
    pub max_new_per_source: u32,
    /// Clients that may begin flows, of the VIP's family; empty: all.
    pub allow: Vec<Prefix>,
    /// Clients that may not, of the VIP's family.
    pub deny: Vec<Prefix>,
    /// How backends are checked that do not say otherwise.
    pub health: Arc<Health>,
    /// Backends, in the order of the file.
    pub backends: Vec<Backend>,
}

impl Service {
    /// What decides about a client by the longest prefix that holds it, and whether it may begin a
    /// flow then. With an allow list, whoever no prefix holds may not.
    pub fn rules(&self) -> impl Iterator<Item = (Prefix, bool)> + '_ {
        let everybody = Prefix {
            address: match self.vip() {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            },
            bits: 0,
        };
        let others = (!self.allow.is_empty()).then_some((everybody, false));
        let others = others.filter(|_| !self.allow.contains(&everybody));
        let others = others.filter(|_| !self.deny.contains(&everybody));
        let allow = self.allow.iter().map(|prefix| (*prefix, true));
        let deny = self.deny.iter().map(|prefix| (*prefix, false));
        allow.chain(deny).chain(others)
    }
}

/// Transport protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
}

/// One `[[service.backend]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Name, unique within the service; the address as [`Endpoint`] shows it if none was given.
    pub name: String,
    /// Address and port; port 0: packets keep the port they were sent to.
    pub address: SocketAddr,
    /// Share of new flows relative to the other backends; 0: none, existing flows are kept.
    pub weight: u32,
    /// Whether it takes new flows only while no backend does that is not a backup.
    pub backup: bool,
    /// Most connections it may hold; 0: no limit.
    pub max_connections: u32,
    /// How it is checked: the service's [`Service::health`], or one of its own.
    pub health: Arc<Health>,
}

impl Config {
    /// Reads and checks the file `path`.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut bytes))
            .map_err(|error| {
                let remedy = "check the path and its permissions";
                Error::file(path, format!("cannot be read: {error}; {remedy}"))
            })?;
        if bytes.len() as u64 > FILE_MAX {
            let message = format!(
                "is larger than {} MiB; is it a configuration?",
                FILE_MAX >> 20
            );
            return Err(Error::file(path, message));
        }
        match str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text, path),
            Err(error) => {
                let before = &bytes[..error.valid_up_to()];
                let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
                let message = "this line is not UTF-8 text; save the file as UTF-8";
                Err(Error::at(path, line, message))
            }
        }
    }

    /// Checks `text`; `path` is what errors call it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let source = Source { path, text };
        let table = DeTable::parse(text).map_err(|error| source.malformed(&error))?;
        let root = Section::root(source, table.get_ref());
        root.only(&["daemon", "limits", "timeouts", "defaults", "service"])?;
        let daemon = daemon::daemon(&root)?;
        let (limits, limits_offset) = daemon::limits(&root)?;
        let timeouts = daemon::timeouts(&root)?;
        let defaults = service::defaults(&root)?;
        let services = root
            .tables("service", "service")?
            .into_iter()
            .enumerate()
            .map(|(index, section)| service::service(section, index + 1, &defaults))
            .collect::<Result<Vec<_>, Error>>()?;
        whole::check(&root, &limits, limits_offset, &services)?;
        Ok(Self {
            daemon,
            limits,
            timeouts,
            services: services.into_iter().map(|placed| placed.service).collect(),
        })
    }
}

impl Protocol {
    /// IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// `tcp` or `udp`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl Service {
    /// The service as operators address it: `VIP:ports/proto`.
    #[must_use]
    pub fn listener(&self) -> String {
        format!("{}/{}", self.listen, self.protocol.name())
    }

    /// In how many parts a weight may be in force: a slow start raises it by twentieths, an agent
    /// says percents.
    pub(super) fn weight_parts(&self) -> u32 {
        let listens = |backend: &Backend| {
            backend.health.agent.is_some() || backend.health.check == Check::Agent
        };
        match self.slow_start {
            _ if self.backends.iter().any(listens) => 100,
            Duration::ZERO => 1,
            _ => 20,
        }
    }

    /// The VIP.
    #[must_use]
    pub const fn vip(&self) -> IpAddr {
        self.listen.ip
    }
}
