//! The maps as an operator reads them: one JSON object for each entry, fields by name.
//!
//! Straight from the pins, with or without a daemon.

use super::{
    attach::interface_name,
    listeners::{Bucketed, Listeners},
    map::{HashMap, PerCpuArray, SharedArray, is_zero},
    maps::{Flowing, Maps, NAMES},
    pins,
};
use crate::api::types::MapStatus;
use anyhow::{Context as _, Result, anyhow};
use bytemuck::Pod;
use lb_common::{
    addr::{self, Address},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend, Load, Slot},
    client::{ALLOW, AccessKey, Affinity, ClientKey, SERVICE_BITS, Source},
    filter,
    flow::{DIRECTION_CLIENT, Flow, FlowKey, THROUGH_GATEWAY},
    flow_table::{DISPLACED, Entry, Tags, WAYS},
    fragment::{Datagram, FragmentKey},
    local::{PEER_VIP, Peer, PeerKey},
    names::{self, name_of},
    probe::ProbeTarget,
    service::{
        ClientLink, GATEWAY_RESOLVED, Gateway, Interface, LINKS, ORIGIN, Service, ServiceKey,
        VIP_ANSWER_ARP, VIP_HELD, Vip,
    },
    stats::{Counters, DropReason},
    vlan,
};
use serde_json::{Value, json};
use std::{io, net::IpAddr, ops::AddAssign, path::Path};

/// Takes one entry; an error ends the dump.
type Emit<'a> = &'a mut dyn FnMut(Value) -> io::Result<()>;

/// The maps pinned in `pin_path` and how full they are.
pub fn list(pin_path: &Path) -> Result<Vec<MapStatus>> {
    Ok(open(pin_path)?.status()?)
}

/// Shows `emit` every entry of the map `name` pinned in `pin_path`. Elements of arrays that are
/// all zero are left out.
///
/// Entry by entry, because a flow table has millions.
pub fn dump(pin_path: &Path, name: &str, emit: Emit<'_>) -> Result<()> {
    if !NAMES.contains(&name) {
        return Err(anyhow!("no map \"{name}\"; there are {}", NAMES.join(", ")));
    }
    let maps = open(pin_path)?;
    let result = match name {
        "settings" => array(&maps.settings, emit, |_, s| {
            json!({
                "abi_version": s.abi_version,
                "nat_port_first": s.nat_port_first,
                "nat_port_last": s.nat_port_last,
                "nat_port_seed": s.nat_port_seed,
                "nat_sources4": s.nat_sources4,
                "nat_sources6": s.nat_sources6,
                "gue_port": u16::from_be(s.gue_port),
                "new_flows": s.new_flows,
                "encap_source4": addr::to_ip(addr::FAMILY_V4, &[s.encap_source4, 0, 0, 0]),
                "encap_mask4": addr::to_ip(addr::FAMILY_V4, &[s.encap_mask4, 0, 0, 0]),
                "encap_source6": addr::to_ip(addr::FAMILY_V6, &s.encap_source6),
                "encap_mask6": addr::to_ip(addr::FAMILY_V6, &[0, 0, 0, s.encap_mask6]),
            })
        }),
        "nat_sources4" => array(
            &maps.nat_sources4,
            emit,
            |index, a: u32| json!({"element": index, "address": addr::to_ip(addr::FAMILY_V4, &[a, 0, 0, 0])}),
        ),
        "nat_sources6" => array(
            &maps.nat_sources6,
            emit,
            |index, a: [u32; 4]| json!({"element": index, "address": addr::to_ip(addr::FAMILY_V6, &a)}),
        ),
        "address_filter" => address_filter(&maps.address_filter, emit),
        "vips4" => hash(&maps.vips4, emit, vip),
        "vips6" => hash(&maps.vips6, emit, vip),
        "services4" => listeners(&maps.services4, emit),
        "services6" => listeners(&maps.services6, emit),
        "services" => array(&maps.services, emit, service),
        "gateways" => array(&maps.gateways, emit, gateway),
        "backends" => array(&maps.backends, emit, backend),
        "slots" => array(
            &maps.slots,
            emit,
            |index, s: Slot| json!({"slot": index, "backend": s.backend, "previous": s.previous}),
        ),
        "cursors" => array(
            &maps.cursors,
            emit,
            |index, c| json!({"service": index, "next": c.next}),
        ),
        "flows4" => flows::<u32>(&maps, emit),
        "flows6" => flows::<[u32; 4]>(&maps, emit),
        "flow_sets4" => array(&maps.flow_sets4, emit, set),
        "flow_sets6" => array(&maps.flow_sets6, emit, set),
        "opening4" => hash(&maps.opening4, emit, |key, value| flow(&maps, key, value)),
        "opening6" => hash(&maps.opening6, emit, |key, value| flow(&maps, key, value)),
        "last_opening" => array(
            &maps.last_opening,
            emit,
            |_, tick: u32| json!({"tick": tick}),
        ),
        "pressure" => counters(
            &maps.pressure,
            emit,
            |_, p| json!({"flows": p.flows, "displaced": p.displaced}),
        ),
        "fragments4" => hash(&maps.fragments4, emit, |key, datagram| {
            let id = u16::from_ne_bytes([key.id.to_ne_bytes()[0], key.id.to_ne_bytes()[1]]);
            fragment(key, u32::from(u16::from_be(id)), datagram)
        }),
        "fragments6" => hash(&maps.fragments6, emit, |key, datagram| {
            fragment(key, u32::from_be(key.id), datagram)
        }),
        "affinity4" => hash(&maps.affinity4, emit, affinity),
        "affinity6" => hash(&maps.affinity6, emit, affinity),
        "sources4" => hash(&maps.sources4, emit, source),
        "sources6" => hash(&maps.sources6, emit, source),
        "access4" => hash(&maps.access4, emit, access),
        "access6" => hash(&maps.access6, emit, access),
        "backend_load" => array(&maps.backend_load, emit, |index, l: Load| {
            json!({
                "backend": index,
                "begun": l.begun,
                "ended": l.ended,
                "opened": l.opened,
                "closed": l.closed,
                "released": l.released,
                "weight": l.weight,
                "max_connections": l.max_connections,
                "retries": l.retries,
                "resets": l.resets,
            })
        }),
        "service_stats" => counters(&maps.service_stats, emit, |index, c| {
            stats("service", index, c)
        }),
        "backend_stats" => counters(&maps.backend_stats, emit, |index, c| {
            stats("backend", index, c)
        }),
        "drops" => counters(&maps.drops, emit, |index, packets| {
            let reason = DropReason::ALL.iter().find(|r| **r as u32 == index);
            json!({"reason": reason.map_or("unknown", |r| r.name()), "packets": packets})
        }),
        "interfaces" => hash(
            &maps.interfaces,
            emit,
            |index, i: &Interface| json!({"ifindex": index, "name": interface_name(*index), "mac": mac(&i.mac), "link": i.link}),
        ),
        "links" => array(
            &maps.links,
            emit,
            |index, l: ClientLink| json!({"link": index, "ifindex": l.ifindex, "name": interface_name(l.ifindex), "mac": mac(&l.mac())}),
        ),
        "redirects" => hash(
            &maps.redirects,
            emit,
            |index, r| json!({"ifindex": index, "name": interface_name(*index), "to": r.ifindex}),
        ),
        "local_settings" => array(
            &maps.local_settings,
            emit,
            |_, s| json!({"netns_cookie": s.netns_cookie, "probe_mark": s.probe_mark}),
        ),
        "local_peers" => hash(&maps.local_peers, emit, local_peer),
        "probe_targets" => array(&maps.probe_targets, emit, |index, t: ProbeTarget| {
            json!({
                "target": index,
                "vip": addr::to_ip(t.family, &t.vip),
                "backend_address": addr::to_ip(t.family, &t.backend),
                "forward": name_of(names::FORWARD, t.forward),
            })
        }),
        "probes" => hash(&maps.probes, emit, probe),
        other => return Err(anyhow!("map {other} has no description")),
    };
    result.with_context(|| format!("map {name}"))
}

fn open(pin_path: &Path) -> Result<Maps> {
    if !pin_path.join("settings").exists() {
        return Err(anyhow!(
            "no data plane in {}; \"sluice run\" makes one",
            pin_path.display()
        ));
    }
    pins::verify_abi(pin_path)?;
    Maps::open(pin_path)
}

fn hash<K: Pod, V: Pod>(
    map: &HashMap<K, V>,
    emit: Emit<'_>,
    describe: impl Fn(&K, &V) -> Value,
) -> io::Result<()> {
    let mut result = Ok(());
    map.iter_batches(|key, value| {
        if result.is_ok() {
            result = emit(describe(key, value));
        }
    })?;
    result
}

fn flows<A: Flowing>(maps: &Maps, emit: Emit<'_>) -> io::Result<()>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut result = Ok(());
    A::flow_table(maps)?.each(|_, key, value| {
        if result.is_ok() {
            result = emit(flow(maps, key, value));
        }
    })?;
    result
}

/// The tags of a set, and whether flows of it are in another one.
fn set(index: u32, word: u64) -> Value {
    let tags: Vec<u64> = (0..WAYS).map(|way| Tags(word).of(way)).collect();
    json!({"set": index, "tags": tags, "displaced": word & DISPLACED != 0})
}

fn array<T: Pod>(
    map: &SharedArray<T>,
    emit: Emit<'_>,
    describe: impl Fn(u32, T) -> Value,
) -> io::Result<()> {
    (0..map.len())
        .map(|index| (index, map.read(index)))
        .filter(|(_, value)| !is_zero(value))
        .try_for_each(|(index, value)| emit(describe(index, value)))
}

fn counters<V: Pod + AddAssign>(
    map: &PerCpuArray<V>,
    emit: Emit<'_>,
    describe: impl Fn(u32, V) -> Value,
) -> io::Result<()> {
    (0..)
        .zip(map.sums()?)
        .filter(|(_, value)| !is_zero(value))
        .try_for_each(|(index, value)| emit(describe(index, value)))
}

fn address_filter(map: &SharedArray<u64>, emit: Emit<'_>) -> io::Result<()> {
    for lane in 0..filter::LANES {
        let (element, shift) = filter::place(lane);
        let bits = (map.read(element) >> shift) as u8;
        if bits != 0 {
            emit(json!({
                "lane": lane,
                "vip": bits & filter::LANE_VIP != 0,
                "any_port": bits & filter::LANE_ANY_PORT != 0,
                "nat_source": bits & filter::LANE_NAT_SOURCE != 0,
                "stateless": bits & filter::LANE_STATELESS != 0,
                "backend": bits & filter::LANE_BACKEND != 0,
                "origin": bits & filter::LANE_ORIGIN != 0,
                "held": bits & filter::LANE_HELD != 0,
            }))?;
        }
    }
    Ok(())
}

fn affinity<A: Address>(key: &ClientKey<A>, entry: &Affinity) -> Value {
    json!({
        "service": key.service,
        "client": ip(key.addr),
        "backend": entry.backend,
        "generation": entry.generation,
        "last_seen": entry.last_seen,
    })
}

fn source<A: Address>(key: &ClientKey<A>, entry: &Source) -> Value {
    json!({"service": key.service, "client": ip(key.addr), "clear": entry.clear})
}

fn access<A: Address>(key: &AccessKey<A>, rule: &u32) -> Value {
    json!({
        "service": key.data.service,
        "prefix": format!("{}/{}", ip(key.data.addr), key.prefix_len.saturating_sub(SERVICE_BITS)),
        "access": if *rule == ALLOW { "allow" } else { "deny" },
    })
}

fn ip<A: Address>(address: A) -> IpAddr {
    addr::to_ip(A::FAMILY, &address.widen())
}

fn port(network_order: u16) -> u16 {
    u16::from_be(network_order)
}

fn protocol(number: u32) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => other.to_string(),
    }
}

fn mac(bytes: &[u8]) -> String {
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    hex.join(":")
}

/// Ethernet destination and source of a header's twelve bytes.
fn macs(l2: &[u32; 3]) -> (String, String) {
    let bytes: &[u8] = bytemuck::cast_slice(l2);
    (mac(&bytes[..6]), mac(&bytes[6..]))
}

fn vip<A: Address>(address: &A, vip: &Vip) -> Value {
    json!({
        "address": ip(*address),
        "answer_arp": vip.flags & VIP_ANSWER_ARP != 0,
        "held": vip.flags & VIP_HELD != 0,
    })
}

fn listeners<A: Bucketed>(map: &Listeners<A>, emit: Emit<'_>) -> io::Result<()> {
    let mut result = Ok(());
    map.each(|key, number| {
        if result.is_ok() {
            result = emit(listener(key, number));
        }
    });
    result
}

/// What a packet is for, or what an answer comes from.
fn listener<A: Address>(key: &ServiceKey<A>, number: u32) -> Value {
    let of = if key.protocol & ORIGIN == 0 {
        "service"
    } else {
        "backend"
    };
    json!({
        "address": ip(key.vip),
        "port": port(key.port),
        "protocol": protocol((key.protocol & !ORIGIN).into()),
        of: number,
    })
}

fn service(index: u32, service: Service) -> Value {
    let (first, slots) = Service::unpack_table(service.table);
    json!({
        "service": index,
        "first_slot": first,
        "slots": slots,
        "connect_timeout_ticks": service.connect_timeout,
        "forward": name_of(names::FORWARD, service.forward),
        "scheduler": name_of(names::SCHEDULER, service.scheduler),
        "on_no_backend": name_of(names::ON_NO_BACKEND, service.on_no_backend),
        "on_backend_down": name_of(names::ON_BACKEND_DOWN, service.on_backend_down),
    })
}

/// An IPv4 address stands in the first word.
fn gateway(index: u32, gateway: Gateway) -> Value {
    let (destination, source) = macs(&gateway.l2);
    let family = if gateway.vip[1..] == [0; 3] {
        addr::FAMILY_V4
    } else {
        addr::FAMILY_V6
    };
    json!({
        "service": index,
        "vip": addr::to_ip(family, &gateway.vip),
        "port": port(gateway.port),
        "next_hop": destination,
        "source_mac": source,
        "ifindex": gateway.ifindex,
        "vlans": vlans(gateway.tags),
        "mtu": gateway.mtu,
        "resolved": gateway.flags & GATEWAY_RESOLVED != 0,
    })
}

fn backend(index: u32, backend: Backend) -> Value {
    let (destination, source) = macs(&backend.l2);
    json!({
        "backend": index,
        "service": backend.service,
        "address": addr::to_ip(backend.family, &backend.addr),
        "port": port(backend.port),
        "nat_source": addr::to_ip(backend.family, &backend.source),
        "next_hop": destination,
        "source_mac": source,
        "ifindex": backend.ifindex,
        "vlans": vlans(backend.tags),
        "generation": backend.generation,
        "resolved": backend.flags & BACKEND_RESOLVED != 0,
        "alive": backend.flags & BACKEND_ALIVE != 0,
    })
}

/// The VLANs of a frame, the outer one first.
fn vlans(tags: u32) -> Value {
    let (outer, inner) = vlan::halves(tags);
    let there = [outer, inner].into_iter().filter(|tag| *tag != 0);
    there.map(|tag| tag & vlan::ID).collect()
}

fn flow<A: Address>(maps: &Maps, key: &FlowKey<A>, flow: &Flow<A>) -> Value {
    let mut value = json!({
        "protocol": protocol(key.protocol),
        "source": ip(key.src),
        "source_port": port(key.sport),
        "destination": ip(key.dst),
        "destination_port": port(key.dport),
        "to_source": ip(flow.src),
        "to_source_port": port(flow.sport),
        "to_destination": ip(flow.dst),
        "to_destination_port": port(flow.dport),
        "service": flow.service,
        "backend": flow.backend,
        "generation": flow.generation,
        "last_seen_tick": flow.last_seen,
    });
    if flow.direction == DIRECTION_CLIENT {
        value["created_tick"] = flow.created().into();
        value["direction"] = "client".into();
        value["state"] = name_of(names::STATE, flow.state).into();
    } else {
        value["direction"] = "backend".into();
        if flow.link == THROUGH_GATEWAY {
            value["next_hop"] = "gateway".into();
            return value;
        }
        let (head, tail) = (flow.hop_head.to_ne_bytes(), flow.hop_tail.to_ne_bytes());
        let link = maps.links.read(u32::from(flow.link) % LINKS);
        value["next_hop"] = mac(&[head.as_slice(), &tail].concat()).into();
        value["source_mac"] = mac(&link.mac()).into();
        value["ifindex"] = link.ifindex.into();
        value["vlans"] = vlans(flow.tags());
    }
    value
}

fn fragment<A: Address>(key: &FragmentKey<A>, id: u32, datagram: &Datagram<A>) -> Value {
    let mut value = json!({
        "source": ip(key.src),
        "destination": ip(key.dst),
        "id": id,
        "to_source": ip(datagram.src),
        "to_destination": ip(datagram.dst),
        "service": datagram.service,
        "backend": datagram.backend,
        "generation": datagram.generation,
        "created_tick": datagram.created,
    });
    if A::FAMILY == addr::FAMILY_V4 {
        value["protocol"] = protocol(key.protocol).into();
    }
    if datagram.direction == DIRECTION_CLIENT {
        value["direction"] = "client".into();
    } else {
        let (destination, source) = macs(&datagram.l2);
        value["direction"] = "backend".into();
        value["next_hop"] = destination.into();
        value["source_mac"] = source.into();
        value["ifindex"] = datagram.ifindex.into();
        value["vlans"] = vlans(datagram.tags);
    }
    value
}

fn local_peer(key: &PeerKey, peer: &Peer) -> Value {
    let known = (addr::to_ip(key.family, &key.addr), port(key.port));
    let other = (addr::to_ip(key.family, &peer.addr), port(peer.port));
    let asked_for_vip = key.whose == PEER_VIP;
    let (vip, backend) = if asked_for_vip {
        (known, other)
    } else {
        (other, known)
    };
    json!({
        "socket": key.socket,
        "key": if asked_for_vip { "vip" } else { "backend" },
        "vip": vip.0,
        "vip_port": vip.1,
        "backend_address": backend.0,
        "backend_port": backend.1,
        "backend": peer.backend,
        "generation": peer.generation,
    })
}

/// An IPv4 address stands in the first word.
fn probe(key: &FlowKey<[u32; 4]>, backend: &[u32; 4]) -> Value {
    let narrow = [key.src, key.dst, *backend]
        .iter()
        .all(|a| a[1..] == [0; 3]);
    let family = if narrow {
        addr::FAMILY_V4
    } else {
        addr::FAMILY_V6
    };
    json!({
        "protocol": protocol(key.protocol),
        "source": addr::to_ip(family, &key.src),
        "source_port": port(key.sport),
        "destination": addr::to_ip(family, &key.dst),
        "destination_port": port(key.dport),
        "to_source": addr::to_ip(family, backend),
    })
}

fn stats(what: &str, index: u32, counters: Counters) -> Value {
    json!({
        what: index,
        "connections": counters.connections,
        "packets_in": counters.packets_in,
        "bytes_in": counters.bytes_in,
        "packets_out": counters.packets_out,
        "bytes_out": counters.bytes_out,
        "drops": counters.drops,
    })
}
