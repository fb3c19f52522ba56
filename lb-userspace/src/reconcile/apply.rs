//! Carries a plan out, and reads what adopted maps hold.

use super::plan::{Found, Op};
use crate::{
    config::{Listen, Ports, Prefix, Protocol},
    dataplane::{HashMap as DataplaneMap, Maps},
    model::ServiceKey as Key,
};
use anyhow::{Context as _, Result, ensure};
use lb_common::{
    addr::{Address, from_ipv4, from_ipv6},
    backend::Load,
    client::{ALLOW, AccessKey, ClientKey, DENY, SERVICE_BITS},
    service::{ORIGIN, Service, ServiceKey, Vip},
};
use std::{
    collections::HashMap,
    mem::offset_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
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
        Op::Gateway { number, record } => {
            maps.gateways.store(*number, *record);
            ensure!(maps.gateways.read(*number) == *record, "reads differently");
        }
        Op::PublishOrigin {
            address,
            protocol,
            number,
        } => {
            let found = match address.ip() {
                IpAddr::V4(a) => {
                    let key = origin_key(from_ipv4(a), *address, *protocol);
                    maps.services4.insert(&key, *number)?;
                    maps.services4.get(&key)
                }
                IpAddr::V6(a) => {
                    let key = origin_key(from_ipv6(a), *address, *protocol);
                    maps.services6.insert(&key, *number)?;
                    maps.services6.get(&key)
                }
            };
            ensure!(found == Some(*number), "reads differently");
        }
        Op::WithdrawOrigin { address, protocol } => {
            match address.ip() {
                IpAddr::V4(a) => {
                    let key = origin_key(from_ipv4(a), *address, *protocol);
                    maps.services4.remove(&key)
                }
                IpAddr::V6(a) => {
                    let key = origin_key(from_ipv6(a), *address, *protocol);
                    maps.services6.remove(&key)
                }
            };
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

fn key<A: Address>(vip: A, port: u16, id: &Key) -> ServiceKey<A> {
    ServiceKey::new(vip, port.to_be(), id.protocol.number())
}

fn origin_key<A: Address>(ip: A, address: SocketAddr, protocol: Protocol) -> ServiceKey<A> {
    ServiceKey::origin(ip, address.port().to_be(), protocol.number())
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
        Op::Gateway { number, .. } => format!("map gateways: service {number}"),
        Op::PublishOrigin {
            address, protocol, ..
        }
        | Op::WithdrawOrigin { address, protocol } => {
            format!("map services: backend {address}/{}", protocol.name())
        }
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
        let address = IpAddr::V4(Ipv4Addr::from(key.vip.to_ne_bytes()));
        note_listener(&mut found, address, key, number);
    });
    maps.services6.each(|key, number| {
        let address = IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(key.vip)));
        note_listener(&mut found, address, key, number);
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
    found.gateways = (0..maps.gateways.len())
        .map(|number| (number, maps.gateways.read(number)))
        .filter(|(_, record)| *record != bytemuck::Zeroable::zeroed())
        .collect();
    let tables = |record: &Service| [record.table, record.members];
    for table in found.records.values().flat_map(tables) {
        let (first, len) = Service::unpack_table(table);
        let end = first.checked_add(len);
        // None at all seems to be at the first slot, where there may be one.
        if len > 0 && end.is_some_and(|end| end <= maps.slots.len()) {
            let slots = (first..first + len).map(|slot| maps.slots.read(slot));
            found.tables.insert(first, slots.collect());
        }
    }
    found.lanes = (0..maps.address_filter.len())
        .map(|element| (element, maps.address_filter.read(element)))
        .filter(|(_, lanes)| *lanes != 0)
        .collect();
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

fn note_listener<A>(found: &mut Found, ip: IpAddr, key: &ServiceKey<A>, number: u32) {
    let protocol = match key.protocol & !ORIGIN {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => return,
    };
    let port = u16::from_be(key.port);
    if key.protocol & ORIGIN != 0 {
        let address = SocketAddr::new(ip, port);
        found.origins.push((address, protocol, number));
        return;
    }
    let ports = Ports::span(port, port);
    let listen = Listen { ip, ports };
    found.services.push((Key { listen, protocol }, number));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Limits, dataplane::Dataplane};
    use bytemuck::Zeroable as _;
    use lb_common::{addr::from_ip, backend::Slot, service::Gateway};

    fn maps() -> Maps {
        let limits = Limits {
            flows: 64,
            services: 4,
            listeners: 64,
            backends: 4,
            slots: 64,
            ..Limits::DEFAULT
        };
        let settings = bytemuck::Zeroable::zeroed();
        let dataplane = Dataplane::load_unpinned(&limits, settings);
        dataplane.expect("root, and a kernel with XDP").maps
    }

    #[test]
    fn the_table_at_the_first_slot_is_found_again() {
        let maps = maps();
        let id = Key {
            listen: "198.51.100.10:80".parse().unwrap(),
            protocol: Protocol::Tcp,
        };
        let record = Service {
            table: Service::pack_table(0, 2),
            ..Service::zeroed()
        };
        let (first, number) = (0, 1);
        let slots = vec![Slot::settled(1), Slot::settled(2)];
        let ops = [
            Op::Slots {
                first,
                slots: slots.clone(),
            },
            Op::Service { number, record },
            Op::Publish { id, number },
        ];
        apply(&maps, &ops).unwrap();
        let found = find(&maps).unwrap();
        assert_eq!(found.services, [(id, number)]);
        assert_eq!(found.tables, [(first, slots)].into());
    }

    #[test]
    fn what_answers_are_known_by_is_found_again() {
        let maps = maps();
        let protocol = Protocol::Udp;
        let addresses = ["10.0.0.11:3001", "[2001:db8::11]:3001"].map(|a| a.parse().unwrap());
        let record = Gateway {
            vip: from_ip("2001:db8::1".parse().unwrap()),
            ..Gateway::zeroed()
        };
        let number = 4;
        apply(&maps, &[Op::Gateway { number, record }]).unwrap();
        for (number, address) in (1..).zip(addresses) {
            let publish = Op::PublishOrigin {
                address,
                protocol,
                number,
            };
            apply(&maps, &[publish]).unwrap();
        }
        let found = find(&maps).unwrap();
        assert_eq!(found.gateways, [(4, record)].into());
        let origins = [(addresses[0], protocol, 1), (addresses[1], protocol, 2)];
        assert_eq!(found.origins, origins);
        assert!(found.services.is_empty(), "{:?}", found.services);
        for address in addresses {
            apply(&maps, &[Op::WithdrawOrigin { address, protocol }]).unwrap();
        }
        assert_eq!(find(&maps).unwrap().origins, []);
    }
}
