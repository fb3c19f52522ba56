//! Section `[[service]]` with what is below it, and `[defaults]`.

use super::{
    Backend, Endpoint, Error, Listen, Ports, Protocol, Service,
    health::{self, HealthOptions, positive},
    read::{At, Entry, Section, closest, quote},
    value::{self, Prefix},
};
use crate::scheduler::MAGLEV_SLOTS_MAX;
use lb_common::{
    names::{FORWARD, Names, ON_BACKEND_DOWN, ON_NO_BACKEND, SCHEDULER, name_of, number_of},
    service::{forward, on_backend_down, on_no_backend, scheduler},
};
use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Duration};

const IDLE_TIMEOUT_TCP: Duration = Duration::from_secs(15 * 60);
const IDLE_TIMEOUT_UDP: Duration = Duration::from_secs(60);
const WEIGHT_MAX: u32 = 65_535;

/// Keys that both a service and `[defaults]` may have.
const CASCADING: [&str; 18] = [
    "forward",
    "scheduler",
    "table_size",
    "track",
    "affinity",
    "affinity_mask4",
    "affinity_mask6",
    "on_backend_down",
    "on_no_backend",
    "slow_start",
    "drain_timeout",
    "panic_threshold",
    "idle_timeout",
    "connect_timeout",
    "max_new_per_source",
    "allow",
    "deny",
    "health",
];

/// The cascading keys as one section has them.
#[derive(Default)]
pub(super) struct Options {
    forward: Option<At<u8>>,
    scheduler: Option<At<u8>>,
    table_size: Option<At<u32>>,
    track: Option<At<bool>>,
    on_backend_down: Option<At<u8>>,
    on_no_backend: Option<At<u8>>,
    idle_timeout: Option<At<Duration>>,
    connect_timeout: Option<At<Duration>>,
    slow_start: Option<At<Duration>>,
    drain_timeout: Option<At<Duration>>,
    panic_threshold: Option<At<u32>>,
    affinity: Option<At<Duration>>,
    affinity_mask4: Option<At<u32>>,
    affinity_mask6: Option<At<u32>>,
    max_new_per_source: Option<At<u32>>,
    allow: Option<At<Vec<At<Prefix>>>>,
    deny: Option<At<Vec<At<Prefix>>>>,
    health: HealthOptions,
}

/// Reads `[defaults]`.
pub(super) fn defaults(root: &Section<'_>) -> Result<Options, Error> {
    match root.table("defaults", "defaults")? {
        None => Ok(Options::default()),
        Some(section) => {
            section.only(&CASCADING)?;
            Options::read(&section)
        }
    }
}

/// A service, and the places that errors about several services name.
pub(super) struct Placed {
    pub(super) service: Service,
    pub(super) name: usize,
    pub(super) listen: usize,
    pub(super) gateway: Option<usize>,
    pub(super) backends: Vec<usize>,
}

/// Reads the service whose header is number `ordinal` in the file, counted from 1.
pub(super) fn service(
    mut section: Section<'_>,
    ordinal: usize,
    defaults: &Options,
) -> Result<Placed, Error> {
    section.object = format!("service {ordinal}");
    let entry = section.require("name", "give it one, such as name = \"web\"")?;
    let name = entry.text("web")?;
    value::name(name).map_err(|message| entry.bad(name, message))?;
    let name_offset = entry.offset;
    section.object = format!("service {}", quote(name));

    let mut known = vec!["name", "listen", "protocol", "gateway", "backend"];
    known.extend(CASCADING);
    section.only(&known)?;

    let entry = section.require("listen", "write listen = \"198.51.100.10:80\"")?;
    let text = entry.text("198.51.100.10:80")?;
    let listen_offset = entry.offset;
    let listen = value::listen(text).map_err(|message| entry.bad(text, message))?;
    let protocol = match section.get("protocol") {
        None => Protocol::Tcp,
        Some(entry) => match entry.text("tcp")? {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            text => return Err(entry.bad(text, "is unknown; use tcp or udp")),
        },
    };

    let own = Options::read(&section)?;
    let idle_timeout = pick(&own.idle_timeout, &defaults.idle_timeout).map_or(
        match protocol {
            Protocol::Tcp => IDLE_TIMEOUT_TCP,
            Protocol::Udp => IDLE_TIMEOUT_UDP,
        },
        |at| at.value,
    );
    let connect_timeout = match (protocol, &own.connect_timeout) {
        (Protocol::Udp, Some(at)) => {
            let message = "connect_timeout is for tcp, where there is a handshake; remove it";
            return Err(section.error(at.offset, message));
        }
        (Protocol::Udp, None) => None,
        (Protocol::Tcp, own) => pick(own, &defaults.connect_timeout).map(|at| at.value),
    };
    let (allow, deny) = lists(&section, listen.ip, &own, defaults)?;
    let number =
        |own, default, fallback| pick(own, default).map_or(fallback, |at: &At<u8>| at.value);

    let mut backends = Vec::new();
    let mut backend_offsets = Vec::new();
    let mut sections = section.tables("backend", "service.backend")?;
    for (index, section) in sections.iter_mut().enumerate() {
        let (backend, offset) = backend(section, index + 1, listen.ports.for_backends())?;
        backends.push(backend);
        backend_offsets.push(offset);
    }
    let mode = number(&own.forward, &defaults.forward, forward::NAT);
    if !forward::translates(mode)
        && let Some(n) = backends.iter().position(|b| b.address.ip().is_loopback())
    {
        return Err(section.error(
            backend_offsets[n],
            format!(
                "backend {} is a loopback address, which takes only forward nat or dnat",
                Endpoint(backends[n].address)
            ),
        ));
    }
    let affinity = pick(&own.affinity, &defaults.affinity).map_or(Duration::ZERO, |at| at.value);
    let (mask, other, longest) = if listen.ip.is_ipv4() {
        let mask = pick(&own.affinity_mask4, &defaults.affinity_mask4);
        (mask, &own.affinity_mask6, 32)
    } else {
        let mask = pick(&own.affinity_mask6, &defaults.affinity_mask6);
        (mask, &own.affinity_mask4, 128)
    };
    if let Some(other) = other {
        let message = "the VIP has no client of this family; remove this affinity_mask";
        return Err(section.error(other.offset, message));
    }
    if affinity.is_zero()
        && let Some(own) = own.affinity_mask4.as_ref().or(own.affinity_mask6.as_ref())
    {
        let message = "affinity_mask has no effect without affinity; add affinity = \"10m\"";
        return Err(section.error(own.offset, message));
    }
    let max_new_per_source =
        pick(&own.max_new_per_source, &defaults.max_new_per_source).map_or(0, |at| at.value);
    let scheduler = number(&own.scheduler, &defaults.scheduler, scheduler::MAGLEV);
    let needs = Needs {
        affinity: !affinity.is_zero(),
        rate_of_datagrams: protocol == Protocol::Udp && max_new_per_source != 0,
    };
    let table_size = match (&own.table_size, scheduler::hashes(scheduler)) {
        (Some(at), false) => {
            let message = "table_size is for scheduler maglev or source-hash; remove it";
            return Err(section.error(at.offset, message));
        }
        (_, false) => 0,
        (own, true) => pick(own, &defaults.table_size).map_or(0, |at| at.value),
    };
    let track_all = pick(&own.track, &defaults.track).is_some_and(|at| at.value);
    let gateway = section
        .get("gateway")
        .map(|entry| gateway(&entry, mode, listen, &backends))
        .transpose()?;
    let gateway_offset = gateway.as_ref().map(|at| at.offset);
    let has_gateway = gateway.is_some();
    let why = records_all(
        (mode, has_gateway),
        scheduler,
        connect_timeout,
        &backends,
        needs,
    );
    if let Some(at) = &gateway {
        if let Some(why) = &why {
            let message = format!("{why} needs every flow recorded; remove gateway");
            return Err(section.error(at.offset, message));
        }
        if track_all {
            let message = if own.track.is_some() {
                "gateway is there so that flows need no record, but track = \"all\" records them all; remove one"
            } else {
                "gateway is there so that flows need no record, but track = \"all\" in [defaults] records them all; remove it, or add track = \"changes\""
            };
            return Err(section.error(at.offset, message));
        }
    }
    if let Some(track) = &own.track
        && !track.value
        && let Some(why) = why
    {
        let remedy = if mode == forward::DNAT {
            "add gateway = \"192.0.2.1\", the router that clients come through, or remove track = \"changes\""
        } else {
            "remove track = \"changes\""
        };
        let message = format!("{why} needs every flow recorded; {remedy}");
        return Err(section.error(track.offset, message));
    }
    let health = health::resolve(
        &section,
        &sections,
        protocol,
        &mut backends,
        (own.health, &defaults.health),
    )?;
    Ok(Placed {
        service: Service {
            name: name.to_owned(),
            listen,
            protocol,
            forward: mode,
            scheduler,
            table_size,
            track_all,
            gateway: gateway.map(|at| at.value),
            on_no_backend: number(
                &own.on_no_backend,
                &defaults.on_no_backend,
                on_no_backend::RESET,
            ),
            on_backend_down: number(
                &own.on_backend_down,
                &defaults.on_backend_down,
                on_backend_down::KEEP,
            ),
            idle_timeout,
            connect_timeout,
            slow_start: pick(&own.slow_start, &defaults.slow_start)
                .map_or(Duration::ZERO, |at| at.value),
            drain_timeout: pick(&own.drain_timeout, &defaults.drain_timeout).map(|at| at.value),
            panic_threshold: pick(&own.panic_threshold, &defaults.panic_threshold)
                .map_or(0, |at| at.value),
            affinity,
            affinity_mask: mask.map_or(longest, |at| at.value as u8),
            max_new_per_source,
            allow,
            deny,
            health,
            backends,
        },
        name: name_offset,
        listen: listen_offset,
        gateway: gateway_offset,
        backends: backend_offsets,
    })
}

/// What a service promises about flows that only a record of them can keep.
#[derive(Clone, Copy)]
struct Needs {
    /// A client returns to its backend.
    affinity: bool,
    /// Flows of a protocol that does not show where one begins are counted.
    rate_of_datagrams: bool,
}

/// What makes it impossible to find a flow by hashing its packets again, if anything. In `dnat` that is
/// also the lack of a gateway, without which nobody knows where answers go.
fn records_all(
    (mode, has_gateway): (u8, bool),
    scheduler: u8,
    connect_timeout: Option<Duration>,
    backends: &[Backend],
    needs: Needs,
) -> Option<String> {
    if mode == forward::NAT || mode == forward::DNAT && !has_gateway {
        return Some(format!("forward {}", quote(name_of(FORWARD, mode))));
    }
    if !scheduler::hashes(scheduler) {
        return Some(format!(
            "scheduler {}",
            quote(name_of(SCHEDULER, scheduler))
        ));
    }
    if needs.affinity {
        return Some("affinity".to_owned());
    }
    if needs.rate_of_datagrams {
        return Some("max_new_per_source of a udp service".to_owned());
    }
    if backends.iter().any(|b| b.max_connections != 0) {
        return Some("max_connections".to_owned());
    }
    connect_timeout.map(|_| "connect_timeout".to_owned())
}

/// The router that clients come through, if the service can do without records of its flows.
fn gateway(
    entry: &Entry<'_, '_>,
    mode: u8,
    listen: Listen,
    backends: &[Backend],
) -> Result<At<IpAddr>, Error> {
    if mode != forward::DNAT {
        let message = "gateway is for forward \"dnat\", where answers to clients come through here; remove it";
        return Err(entry.error(message));
    }
    let text = entry.text("192.0.2.1")?;
    let address = value::gateway(text).map_err(|message| entry.bad(text, message))?;
    if address.is_ipv4() != listen.ip.is_ipv4() {
        let (family, other) = if address.is_ipv4() {
            ("IPv4", "IPv6")
        } else {
            ("IPv6", "IPv4")
        };
        let message =
            format!("is {family} but the VIP is {other}; write the router's {other} address");
        return Err(entry.bad(text, message));
    }
    if address == listen.ip {
        let message = "is the VIP; write the address of the router that clients come through";
        return Err(entry.bad(text, message));
    }
    if let Some(backend) = backends.iter().find(|b| b.address.ip() == address) {
        let message = format!(
            "is backend {}; write the address of the router that clients come through",
            quote(&backend.name)
        );
        return Err(entry.bad(text, message));
    }
    if !matches!(listen.ports, Ports::One(_)) {
        let message = "gateway needs a single port to listen on, which answers are sent from; write \
                       one port in listen, or remove gateway";
        return Err(entry.error(message));
    }
    Ok(entry.at(address))
}

/// The prefixes of a service's lists that are of its VIP's family.
fn lists(
    section: &Section<'_>,
    vip: IpAddr,
    own: &Options,
    defaults: &Options,
) -> Result<(Vec<Prefix>, Vec<Prefix>), Error> {
    let of_family = |list: Option<&At<Vec<At<Prefix>>>>| -> Vec<At<Prefix>> {
        let prefixes = list.map_or(&[][..], |at| &at.value);
        let same = |at: &&At<Prefix>| at.value.address.is_ipv4() == vip.is_ipv4();
        prefixes.iter().filter(same).cloned().collect()
    };
    let list = pick(&own.allow, &defaults.allow);
    let (allow, deny) = (of_family(list), of_family(pick(&own.deny, &defaults.deny)));
    if let Some(list) = list
        && !list.value.is_empty()
        && allow.is_empty()
    {
        let (family, all) = if vip.is_ipv4() {
            ("IPv4", "0.0.0.0/0")
        } else {
            ("IPv6", "::/0")
        };
        let message =
            format!("allow names no {family} clients, so none could come; add some, or \"{all}\"");
        return Err(section.error(list.offset, message));
    }
    let mut known: HashSet<Prefix> = allow.iter().map(|at| at.value).collect();
    if let Some(twice) = deny.iter().find(|at| !known.insert(at.value)) {
        let message = format!("deny {} is listed before; remove one", twice.value);
        return Err(section.error(twice.offset, message));
    }
    let values = |list: Vec<At<Prefix>>| list.into_iter().map(|at| at.value).collect();
    let mut allow: Vec<Prefix> = values(allow);
    if let [everybody] = &allow[..]
        && everybody.bits == 0
    {
        allow.clear();
    }
    Ok((allow, values(deny)))
}

/// What the service says, else what `[defaults]` says.
fn pick<'a, T>(own: &'a Option<At<T>>, default: &'a Option<At<T>>) -> Option<&'a At<T>> {
    own.as_ref().or(default.as_ref())
}

/// Reads a backend, whose name `section` is called by from then on.
fn backend(
    section: &mut Section<'_>,
    ordinal: usize,
    port: u16,
) -> Result<(Backend, usize), Error> {
    let service = section.object.clone();
    section.object = format!("{service}: backend {ordinal}");
    let name = match section.get("name") {
        None => None,
        Some(entry) => {
            let name = entry.text("app1")?;
            value::name(name).map_err(|message| entry.bad(name, message))?;
            section.object = format!("{service}: backend {}", quote(name));
            Some(name)
        }
    };
    let entry = section.require("address", "write address = \"10.0.0.11:3001\"")?;
    let text = entry.text("10.0.0.11:3001")?;
    let address = value::backend(text, port).map_err(|message| entry.bad(text, message))?;
    let offset = entry.offset;
    if name.is_none() {
        section.object = format!("{service}: backend {}", Endpoint(address));
    }
    section.only(&[
        "name",
        "address",
        "weight",
        "backup",
        "max_connections",
        "health",
    ])?;
    let weight = match section.get("weight") {
        None => 1,
        Some(entry) => entry.integer(0, WEIGHT_MAX)?,
    };
    let backup = match section.get("backup") {
        None => false,
        Some(entry) => entry.boolean()?,
    };
    let max_connections = match section.get("max_connections") {
        None => 0,
        Some(entry) => entry.integer(0, u32::MAX)?,
    };
    let backend = Backend {
        name: name.map_or_else(|| Endpoint(address).to_string(), str::to_owned),
        address,
        weight,
        backup,
        max_connections,
        // Known when the service's own check is.
        health: Arc::default(),
    };
    Ok((backend, offset))
}

impl Options {
    fn read(section: &Section<'_>) -> Result<Self, Error> {
        let word = |key, names: Names| {
            section
                .get(key)
                .map(|entry| choice(&entry, names))
                .transpose()
        };
        let time = |key, example: &str| {
            section
                .get(key)
                .map(|entry| positive(&entry, example))
                .transpose()
        };
        let bits = |key, longest| {
            section
                .get(key)
                .map(|entry| Ok(entry.at(entry.integer(1, longest)?)))
                .transpose()
        };
        let list = |key, example: &str| {
            section
                .get(key)
                .map(|entry| prefixes(section, &entry, key, example))
                .transpose()
        };
        let options = Self {
            forward: word("forward", FORWARD)?,
            scheduler: word("scheduler", SCHEDULER)?,
            on_backend_down: word("on_backend_down", ON_BACKEND_DOWN)?,
            on_no_backend: word("on_no_backend", ON_NO_BACKEND)?,
            table_size: section
                .get("table_size")
                .map(|entry| Ok(entry.at(entry.integer(1, MAGLEV_SLOTS_MAX)?)))
                .transpose()?,
            track: section
                .get("track")
                .map(|entry| track(&entry))
                .transpose()?,
            idle_timeout: time("idle_timeout", "15m")?,
            connect_timeout: time("connect_timeout", "1s")?,
            slow_start: section
                .get("slow_start")
                .map(|entry| Ok(entry.at(any_duration(&entry, "30s")?)))
                .transpose()?,
            drain_timeout: time("drain_timeout", "5m")?,
            panic_threshold: section
                .get("panic_threshold")
                .map(|entry| Ok(entry.at(entry.integer(0, 100)?)))
                .transpose()?,
            affinity: section
                .get("affinity")
                .map(|entry| Ok(entry.at(any_duration(&entry, "10m")?)))
                .transpose()?,
            affinity_mask4: bits("affinity_mask4", 32)?,
            affinity_mask6: bits("affinity_mask6", 128)?,
            max_new_per_source: section
                .get("max_new_per_source")
                .map(|entry| {
                    let text = entry.text("200/s")?;
                    let rate = value::rate(text).map_err(|message| entry.bad(text, message))?;
                    Ok(entry.at(rate))
                })
                .transpose()?,
            allow: list("allow", "10.0.0.0/8")?,
            deny: list("deny", "203.0.113.0/24")?,
            health: HealthOptions::read(section)?,
        };
        Ok(options)
    }
}

/// Whether every flow is recorded.
fn track(entry: &Entry<'_, '_>) -> Result<At<bool>, Error> {
    match entry.text("all")? {
        "all" => Ok(entry.at(true)),
        "changes" => Ok(entry.at(false)),
        text => Err(entry.bad(text, "is unknown; use all or changes")),
    }
}

/// One of `names`.
fn choice(entry: &Entry<'_, '_>, names: Names) -> Result<At<u8>, Error> {
    let words: Vec<&str> = names.iter().map(|(_, word)| *word).collect();
    let text = entry.text(words.first().copied().unwrap_or_default())?;
    if let Some(number) = number_of(names, text) {
        return Ok(entry.at(number));
    }
    let remedy = format!("use {}", words.join(" or "));
    Err(match closest(text, &words) {
        Some(close) => entry.bad(text, format!("is unknown; did you mean {close}?")),
        None => entry.bad(text, format!("is unknown; {remedy}")),
    })
}

fn any_duration(entry: &Entry<'_, '_>, example: &str) -> Result<Duration, Error> {
    let text = entry.text(example)?;
    value::duration(text).map_err(|message| entry.bad(text, message))
}

fn prefixes(
    section: &Section<'_>,
    entry: &Entry<'_, '_>,
    key: &str,
    example: &str,
) -> Result<At<Vec<At<Prefix>>>, Error> {
    let mut known = HashSet::new();
    let prefixes: Result<Vec<At<Prefix>>, Error> = entry
        .texts(example)?
        .into_iter()
        .map(|at| {
            let bad = |message: &str| {
                section.error(at.offset, format!("{key} {} {message}", quote(at.value)))
            };
            let value = at.value.parse().map_err(|message: String| bad(&message))?;
            if !known.insert(value) {
                return Err(bad("is listed twice; remove one"));
            }
            Ok(At {
                value,
                offset: at.offset,
            })
        })
        .collect();
    Ok(entry.at(prefixes?))
}

impl Service {
    /// Whether flows are found by hashing their packets again, and recorded only where the selection
    /// table changes.
    #[must_use]
    pub fn is_stateless(&self) -> bool {
        let (mode, limit) = ((self.forward, self.gateway.is_some()), self.connect_timeout);
        let needs = Needs {
            affinity: !self.affinity.is_zero(),
            rate_of_datagrams: self.protocol == Protocol::Udp && self.max_new_per_source != 0,
        };
        !self.track_all && records_all(mode, self.scheduler, limit, &self.backends, needs).is_none()
    }
}
