//! What only the whole file tells: duplicates, and whether everything has room.

use crate::scheduler;
use lb_common::{
    names::{FORWARD, name_of},
    service::{
        forward,
        scheduler::{RANDOM, ROUND_ROBIN},
    },
};

use super::{
    Backend, Endpoint, Error, Limits, Listen, Ports, Protocol, Service, read::Section,
    service::Placed,
};
use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

/// Checks services against each other and against the limits.
pub(super) fn check(
    root: &Section<'_>,
    limits: &Limits,
    limits_offset: usize,
    services: &[Placed],
) -> Result<(), Error> {
    let mut names = HashMap::new();
    let mut listeners = Listeners::new();
    let mut vips = HashMap::new();
    for placed in services {
        let service = &placed.service;
        if let Some(other) = taken(&mut names, &service.name, placed.name) {
            let message = format!(
                "the name is already taken in line {}; choose another",
                root.source.line(other)
            );
            return Err(refuse(root, service, placed.name, &message));
        }
        if let Some(other) = overlapping(&mut listeners, placed) {
            let (own, line) = (service.listener(), root.source.line(other.listen));
            let message = if other.service.listen == service.listen {
                format!(
                    "{own} is already taken in line {line}; choose another address, port or protocol"
                )
            } else {
                format!(
                    "{own} overlaps {} in line {line}; choose other ports, another address or protocol",
                    other.service.listener()
                )
            };
            return Err(refuse(root, service, placed.listen, &message));
        }
        vips.entry(service.vip()).or_insert(placed);
    }
    for placed in services {
        backends(root, placed, &vips)?;
        if let Some((gateway, offset)) = placed.service.gateway.zip(placed.gateway)
            && let Some(other) = vips.get(&gateway)
        {
            let message = format!(
                "gateway {gateway} is the VIP of service \"{}\"; write the address of the router that clients come \
                 through",
                other.service.name
            );
            return Err(refuse(root, &placed.service, offset, &message));
        }
    }
    origins(root, services)?;
    room(root, limits, limits_offset, services)
}

/// Notes `key` at `offset`; the place that has it already, if any.
fn taken<K: Eq + Hash>(seen: &mut HashMap<K, usize>, key: K, offset: usize) -> Option<usize> {
    match seen.entry(key) {
        Entry::Occupied(other) => Some(*other.get()),
        Entry::Vacant(place) => {
            place.insert(offset);
            None
        }
    }
}

/// The services on each VIP and protocol, by their first port.
type Listeners<'a> = HashMap<(IpAddr, Protocol), BTreeMap<u16, &'a Placed>>;

/// Notes what a service listens on; the one that has some of it already, if any.
fn overlapping<'a>(listeners: &mut Listeners<'a>, placed: &'a Placed) -> Option<&'a Placed> {
    let Listen { ip, ports } = placed.service.listen;
    let taken = listeners.entry((ip, placed.service.protocol)).or_default();
    let (first, last) = ports.keys();
    // Those that are there overlap nowhere, so the nearest from below tells for all of them.
    let nearest = taken.range(..=last).next_back();
    if let Some((_, other)) = nearest
        && other.service.listen.ports.shared(ports) > 0
    {
        return Some(other);
    }
    taken.insert(first, placed);
    None
}

fn refuse(root: &Section<'_>, service: &Service, offset: usize, message: &str) -> Error {
    root.error(offset, format!("service \"{}\": {message}", service.name))
}

fn backends(
    root: &Section<'_>,
    placed: &Placed,
    vips: &HashMap<IpAddr, &Placed>,
) -> Result<(), Error> {
    let service = &placed.service;
    let mut names = HashMap::new();
    let mut addresses = HashMap::new();
    for (backend, &offset) in service.backends.iter().zip(&placed.backends) {
        let refuse = |message: &str| {
            let message = format!("backend \"{}\": {message}", backend.name);
            refuse(root, service, offset, &message)
        };
        let ip = backend.address.ip();
        let mode = name_of(FORWARD, service.forward);
        if !forward::encapsulates(service.forward) && ip.is_ipv4() != service.vip().is_ipv4() {
            let (family, other) = if ip.is_ipv4() {
                ("IPv4", "IPv6")
            } else {
                ("IPv6", "IPv4")
            };
            return Err(refuse(&format!(
                "its address {ip} is {family} but the VIP is {other}; forward \"{mode}\" needs the same family, use an {other} address"
            )));
        }
        let port = backend.address.port();
        let ports = service.listen.ports;
        if !forward::translates(service.forward) && port != ports.for_backends() {
            return Err(refuse(&format!(
                "its port {port} is not the VIP's {ports}, and forward \"{mode}\" leaves ports as they are; leave the port out, or use forward \"nat\""
            )));
        }
        if let Some(other) = vips.get(&ip) {
            return Err(refuse(&format!(
                "its address {ip} is the VIP of service \"{}\"; use the backend's own address",
                other.service.name
            )));
        }
        if let Some(other) = taken(&mut addresses, backend.address, offset) {
            return Err(refuse(&format!(
                "address {} is already a backend in line {}; remove one",
                Endpoint(backend.address),
                root.source.line(other)
            )));
        }
        if let Some(other) = taken(&mut names, &backend.name, offset) {
            return Err(refuse(&format!(
                "the name is already taken by the backend in line {}; choose another",
                root.source.line(other)
            )));
        }
    }
    Ok(())
}

/// Refuses services that share a backend with one that tells answers by the backend they come from.
fn origins(root: &Section<'_>, services: &[Placed]) -> Result<(), Error> {
    type Origins<'a> = HashMap<(IpAddr, Protocol), BTreeMap<u16, (&'a Placed, usize)>>;
    let place = |placed: &Placed, backend: &Backend| {
        let ip = backend.address.ip();
        (ip, placed.service.protocol)
    };
    let mut origins = Origins::new();
    for placed in services.iter().filter(|p| p.service.gateway.is_some()) {
        for (backend, &offset) in placed.service.backends.iter().zip(&placed.backends) {
            let of_address = origins.entry(place(placed, backend)).or_default();
            of_address
                .entry(backend.address.port())
                .or_insert((placed, offset));
        }
    }
    let translating = |p: &&Placed| forward::translates(p.service.forward);
    for placed in services.iter().filter(translating) {
        let service = &placed.service;
        for (backend, &offset) in service.backends.iter().zip(&placed.backends) {
            let Some(of_address) = origins.get(&place(placed, backend)) else {
                continue;
            };
            // A backend without a port has those that packets are sent to.
            let (first, last) = match (backend.address.port(), service.listen.ports) {
                (0, Ports::Any) => (1, u16::MAX),
                (0, ports) => ports.keys(),
                (port, _) => (port, port),
            };
            let mut shared = of_address.range(first..=last);
            if let Some((port, (other, their_offset))) =
                shared.find(|(_, (other, _))| !std::ptr::eq(*other, placed))
            {
                let message = format!(
                    "backend \"{}\": answers from {} are for service \"{}\", because of its gateway and the \
                     backend in line {}; use another address or port, or remove that gateway",
                    backend.name,
                    SocketAddr::new(backend.address.ip(), *port),
                    other.service.name,
                    root.source.line(*their_offset)
                );
                return Err(refuse(root, service, offset, &message));
            }
        }
    }
    Ok(())
}

/// Whether the maps that are made by the limits hold what is configured.
fn room(
    root: &Section<'_>,
    limits: &Limits,
    offset: usize,
    services: &[Placed],
) -> Result<(), Error> {
    let too_small = |key: &str, limit: u32, needed: u64, what: &str| {
        let message = format!(
            "limits: {key} = {limit} is too small for {what}; write {key} = {needed} or more"
        );
        root.error(offset, message)
    };
    let count = services.len() as u64;
    if count > u64::from(limits.services) {
        let what = format!("{count} services");
        return Err(too_small("services", limits.services, count, &what));
    }
    for (family, is_v4) in [("IPv4", true), ("IPv6", false)] {
        let of_family = || {
            let services = services.iter().map(|placed| &placed.service);
            services.filter(|service| service.vip().is_ipv4() == is_v4)
        };
        let ports: u64 = of_family()
            .map(|service| u64::from(service.listen.ports.count()))
            .sum();
        // Where answers come from is kept in the same maps, of backends that wait for their flows to end as well.
        let origins: u64 = of_family()
            .filter(|service| service.gateway.is_some())
            .map(|service| service.backends.len() as u64)
            .sum();
        let count = ports + 2 * origins;
        if count > u64::from(limits.listeners) {
            let mut what = format!("{ports} ports on {family} VIPs");
            if origins > 0 {
                what += &format!(
                    " and {origins} backends of services with a gateway, and their replacements"
                );
            }
            return Err(too_small("listeners", limits.listeners, count, &what));
        }
    }
    let count: u64 = services
        .iter()
        .map(|placed| placed.service.backends.len() as u64)
        .sum();
    if count > u64::from(limits.backends) {
        let what = format!("{count} backends");
        return Err(too_small("backends", limits.backends, count, &what));
    }
    for (family, is_v4) in [("IPv4", true), ("IPv6", false)] {
        let of_family = services
            .iter()
            .map(|placed| &placed.service)
            .filter(|service| service.vip().is_ipv4() == is_v4);
        let count: u64 = of_family
            .map(|service| service.rules().count() as u64)
            .sum();
        // A reload adds what is new before it takes away what is old.
        if 2 * count > u64::from(limits.prefixes) {
            let what = format!("{count} prefixes of {family} clients and their replacements");
            return Err(too_small("prefixes", limits.prefixes, 2 * count, &what));
        }
    }
    let mut total = 0;
    for placed in services {
        let service = &placed.service;
        let mut weights: Vec<u32> = service.backends.iter().map(|b| b.weight).collect();
        let parts = service.weight_parts();
        let is_cycle = [ROUND_ROBIN, RANDOM].contains(&service.scheduler);
        if is_cycle && parts > 1 && !weights.is_empty() {
            // While one of them is in force in part, the cycle has a turn for each of the parts.
            weights.iter_mut().for_each(|weight| *weight *= parts);
            weights.push(1);
        }
        let slots = scheduler::slots(service.scheduler, &weights, service.table_size)
            .map_err(|error| refuse(root, service, placed.name, &error.to_string()))?;
        total += u64::from(slots);
        // A slot each, for when the backend that was picked is full.
        if service.backends.iter().any(|b| b.max_connections != 0) {
            total += service.backends.len() as u64;
        }
    }
    // New tables are written while the old ones are still in use, and a reload may replace all.
    let needed = 2 * total;
    if needed > u64::from(limits.slots) {
        let what = "the selection tables of all services and their replacements";
        return Err(too_small("slots", limits.slots, needed, what));
    }
    Ok(())
}
