//! Carries a plan out, and reads what adopted maps hold.

use super::plan::{Found, Op};
use crate::{
    config::{Listen, Ports, Prefix, Protocol},
    dataplane::{HashMap as DataplaneMap, Maps},
    model::ServiceKey as Key,
};
use anyhow::{Context as _, Result, ensure};
use lb_common::{
    addr::{from_ipv4, from_ipv6},
    backend::Load,
    client::{ALLOW, AccessKey, ClientKey, DENY, SERVICE_BITS},
    service::{Service, ServiceKey, Vip},
};
use std::{
    collections::HashMap,
    mem::offset_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::atomic::Ordering,
};

/// Carries out `ops` in their order. Each is read back.
///
/// # Errors
///
/// When the kernel refuses one; those before it are done.
pub fn apply(maps: &Maps, ops: &[Op]) -> Result<()> {
    for op in ops {
        step(maps, op).with_context(|| describe(op))?;
    }
    Ok(())
}

fn step(maps: &Maps, op: &Op) -> Result<()> {
    match op {
        Op::Lanes { element, value } => {
            let lanes = maps.address_filter.atomic_u64(*element, 0);
            lanes.store(*value, Ordering::Release);
        }
        Op::ResetService { number } => {
            maps.service_stats.reset(*number)?;
            maps.cursors.store(*number, bytemuck::Zeroable::zeroed());
        }
        Op::ResetBackend { number } => {
            maps.backend_stats.reset(*number)?;
            maps.backend_load
                .store(*number, bytemuck::Zeroable::zeroed());
        }
        Op::Share {
            number,
            weight,
            max_connections,
        } => {
            let share = Load::pack_share(*weight, *max_connections);
            maps.backend_load
                .atomic_u64(*number, offset_of!(Load, weight))
                .store(share, Ordering::Release);
        }
        Op::Backend { number, record } => {
            maps.backends.store(*number, *record);
            ensure!(maps.backends.read(*number) == *record, "reads differently");
        }
        Op::Slots { first, slots } => maps.slots.write_slice(*first, slots),
        Op::Reslot { first, changes } => {
            for (place, slot) in changes {
                // One store: a packet meets the slot as it was or as it is.
                maps.slots
                    .atomic_u64(first + place, 0)
                    .store(bytemuck::cast(*slot), Ordering::Release);
            }
        }
        Op::Access {
            number,
            prefix,
            allow,
        } => {
            let rule = allow.map(|allow| if allow { ALLOW } else { DENY });
            let (address, bits) = (prefix.address, prefix.bits);
            match address {
                IpAddr::V4(a) => {
                    decide(
                        &maps.access4,
                        &access_key(*number, from_ipv4(a), bits),
                        rule,
                    )?;
                }
                IpAddr::V6(a) => {
                    decide(
                        &maps.access6,
                        &access_key(*number, from_ipv6(a), bits),
                        rule,
                    )?;
                }
            }
        }
        Op::Service { number, record } => {
            maps.services.store(*number, *record);
            ensure!(maps.services.read(*number) == *record, "reads differently");
        }
        Op::Vip { address, flags } => {
            let vip = Vip { flags: *flags };
            match address {
                IpAddr::V4(a) => maps.vips4.insert(&from_ipv4(*a), &vip)?,
                IpAddr::V6(a) => maps.vips6.insert(&from_ipv6(*a), &vip)?,
            }
        }
        Op::RemoveVip { address } => {
            match address {
                IpAddr::V4(a) => maps.vips4.remove(&from_ipv4(*a))?,
                IpAddr::V6(a) => maps.vips6.remove(&from_ipv6(*a))?,
            };
        }
        Op::Publish { id, number } => {
            for port in ports(id) {
                let found = match id.listen.ip {
                    IpAddr::V4(a) => {
                        let key = key(from_ipv4(a), port, id);
                        maps.services4.insert(&key, *number)?;
                        maps.services4.get(&key)
                    }
                    IpAddr::V6(a) => {
                        let key = key(from_ipv6(a), port, id);
                        maps.services6.insert(&key, *number)?;
                        maps.services6.get(&key)
                    }
                };
                ensure!(found == Some(*number), "reads differently");
            }
        }
        Op::Withdraw { id } => {
            for port in ports(id) {
                match id.listen.ip {
                    IpAddr::V4(a) => maps.services4.remove(&key(from_ipv4(a), port, id)),
                    IpAddr::V6(a) => maps.services6.remove(&key(from_ipv6(a), port, id)),
                };
            }
        }
    }
    Ok(())
}

/// Sets what is decided about a prefix, or removes it.
fn decide<A>(
    map: &DataplaneMap<AccessKey<A>, u32>,
    key: &AccessKey<A>,
    rule: Option<u32>,
) -> Result<()>
where
    AccessKey<A>: bytemuck::Pod,
{
    match rule {
        Some(rule) => map.insert(key, &rule)?,
        None => {
            map.remove(key)?;
        }
    }
    Ok(())
}

fn access_key<A>(service: u32, addr: A, bits: u8) -> AccessKey<A> {
    AccessKey {
        prefix_len: SERVICE_BITS + u32::from(bits),
        data: ClientKey { service, addr },
    }
}

/// The ports of the keys that stand for `id`.
fn ports(id: &Key) -> RangeInclusive<u16> {
    let (first, last) = id.listen.ports.keys();
    first..=last
}

fn key<A: lb_common::addr::Address>(vip: A, port: u16, id: &Key) -> ServiceKey<A> {
    ServiceKey::new(vip, port.to_be(), id.protocol.number())
}

fn describe(op: &Op) -> String {
    match op {
        Op::Lanes { element, .. } => format!("map address_filter: element {element}"),
        Op::ResetService { number } => format!("map service_stats: service {number}"),
        Op::ResetBackend { number } | Op::Share { number, .. } => {
            format!("counters of backend {number}")
        }
        Op::Backend { number, .. } => format!("map backends: backend {number}"),
        Op::Access { number, prefix, .. } => format!("map access: {prefix} of service {number}"),
        Op::Slots { first, .. } | Op::Reslot { first, .. } => {
            format!("map slots: table at {first}")
        }
        Op::Service { number, .. } => format!("map services: service {number}"),
        Op::Vip { address, .. } | Op::RemoveVip { address } => format!("map vips: {address}"),
        Op::Publish { id, .. } | Op::Withdraw { id } => {
            format!("map services: {id}")
        }
    }
}

/// Reads what adopted maps hold.
///
/// # Errors
///
/// When the kernel refuses to tell.
pub fn find(maps: &Maps) -> Result<Found> {
    let mut found = Found::default();
    maps.services4.each(|key, number| {
        let vip = IpAddr::V4(Ipv4Addr::from(key.vip.to_ne_bytes()));
        found.services.extend(service(vip, key, number));
    });
    maps.services6.each(|key, number| {
        let vip = IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(key.vip)));
        found.services.extend(service(vip, key, number));
    });
    maps.vips4.iter_batches(|address, vip| {
        let address = IpAddr::V4(Ipv4Addr::from(address.to_ne_bytes()));
        found.vips.push((address, vip.flags));
    })?;
    maps.vips6.iter_batches(|address, vip| {
        let address = IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(*address)));
        found.vips.push((address, vip.flags));
    })?;
    maps.access4.iter_batches(|key, rule| {
        let address = Ipv4Addr::from(key.data.addr.to_ne_bytes());
        note_rule(&mut found, key, address.into(), *rule);
    })?;
    maps.access6.iter_batches(|key, rule| {
        let address = Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(key.data.addr));
        note_rule(&mut found, key, address.into(), *rule);
    })?;
    found.records = found
        .services
        .iter()
        .filter(|(_, number)| *number < maps.services.len())
        .map(|(_, number)| (*number, maps.services.read(*number)))
        .collect::<HashMap<_, _>>();
    let tables = |record: &Service| [record.table, record.members];
    for table in found.records.values().flat_map(tables) {
        let (first, len) = Service::unpack_table(table);
        if first
            .checked_add(len)
            .is_some_and(|end| end <= maps.slots.len())
        {
            let slots = (first..first + len).map(|slot| maps.slots.read(slot));
            found.tables.insert(first, slots.collect());
        }
    }
    found.backends = (1..maps.backends.len())
        .map(|number| (number, maps.backends.read(number)))
        .filter(|(_, record)| record.generation != 0 || record.service != 0)
        .collect();
    Ok(found)
}

fn note_rule<A>(found: &mut Found, key: &AccessKey<A>, address: IpAddr, rule: u32) {
    let bits = key.prefix_len.saturating_sub(SERVICE_BITS) as u8;
    let rules = found.access.entry(key.data.service).or_default();
    rules.insert(Prefix { address, bits }, rule == ALLOW);
}

fn service<A>(vip: IpAddr, key: &ServiceKey<A>, number: u32) -> Option<(Key, u32)> {
    let protocol = match key.protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => return None,
    };
    let port = u16::from_be(key.port);
    let listen = Listen {
        ip: vip,
        ports: Ports::span(port, port),
    };
    Some((Key { listen, protocol }, number))
}
