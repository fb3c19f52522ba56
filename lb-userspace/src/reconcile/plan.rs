//! From what is held and what is wanted to an ordered list of operations.

use super::{
    delta::{Changes, Delta},
    filter::Filter,
    keys::{self, Keys},
    origins::{Origin, Origins},
    slots::{Region, SlotSpace},
};
use crate::{
    config::{Endpoint, Ports, Prefix, Protocol},
    model::{self, ServiceKey},
    scheduler::{self, Member},
};
use anyhow::{Result, anyhow};
use lb_common::{
    addr::{FAMILY_V4, FAMILY_V6, from_ip, to_ip},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend as BackendRecord, LOCAL, NO_BACKEND, Slot},
    filter::{
        LANE_ANY_PORT, LANE_BACKEND, LANE_HELD, LANE_NAT_SOURCE, LANE_ORIGIN, LANE_STATELESS,
        LANE_VIP,
    },
    service::{
        GATEWAY_RESOLVED, Gateway as GatewayRecord, SERVICE_GUARDED, SERVICE_LIMITED,
        SERVICE_LISTED, SERVICE_PLURAL, SERVICE_STATELESS, Service as ServiceRecord,
        VIP_ANSWER_ARP, VIP_HELD, forward, scheduler as schedulers,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// A service as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// What it is found by.
    pub id: ServiceKey,
    /// Its name, for messages.
    pub name: String,
    /// One of [`lb_common::service::forward`].
    pub forward: u8,
    /// One of [`lb_common::service::scheduler`].
    pub scheduler: u8,
    /// One of [`lb_common::service::on_no_backend`].
    pub on_no_backend: u8,
    /// One of [`lb_common::service::on_backend_down`].
    pub on_backend_down: u8,
    /// Ticks a handshake may take; 0: no limit.
    pub connect_timeout: u32,
    /// Ticks for which a client returns to its backend after its last flow; 0: not at all.
    pub affinity: u32,
    /// Bits of a client's address that affinity goes by, as in the record.
    pub affinity_mask: [u32; 4],
    /// New flows a second that one client address may begin; 0: no limit.
    pub source_rate: u32,
    /// What decides about clients, and whether they may begin flows: see
    /// [`crate::config::Service::rules`].
    pub access: BTreeMap<Prefix, bool>,
    /// Slots that its table has at least.
    pub table_size: u32,
    /// Whether its flows are found by hashing again, and recorded only where the table changes.
    pub stateless: bool,
    /// The router that answers go to whose flow is not recorded. Only in `dnat`, and there in every service
    /// that is stateless.
    pub gateway: Option<IpAddr>,
    /// How long a flow of it may be silent.
    pub idle_timeout: Duration,
    /// Whether ARP and neighbour discovery for its VIP are answered.
    pub answer_arp: bool,
    /// Whether an interface of this host has its VIP.
    pub held: bool,
    /// Its backends, in the order of the configuration.
    pub backends: Vec<Backend>,
}

/// A backend as it shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Weight in force; 0: no new flows.
    pub weight: u32,
    /// Weight configured.
    pub configured_weight: u32,
    /// Most connections it may hold; 0: no limit.
    pub max_connections: u32,
    /// Whether it keeps the flows it has.
    pub alive: bool,
}

/// How packets leave towards an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Ethernet destination.
    pub destination: [u8; 6],
    /// Ethernet source.
    pub source: [u8; 6],
    /// Interface index.
    pub ifindex: u32,
    /// VLAN tags, packed as in [`lb_common::vlan`].
    pub tags: u32,
    /// The balancer's address towards it.
    pub address: IpAddr,
    /// Bytes of the largest IP packet on the way there.
    pub mtu: u32,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Sets one element of the address filter.
    Lanes {
        /// Element.
        element: u32,
        /// Its eight lanes.
        value: u64,
    },
    /// Sets the counters of a service's number to zero, for a new owner.
    ResetService {
        /// Service number.
        number: u32,
    },
    /// Sets the counters of a backend's number to zero, for a new owner.
    ResetBackend {
        /// Backend number.
        number: u32,
    },
    /// Writes a backend.
    Backend {
        /// Backend number.
        number: u32,
        /// What it becomes.
        record: BackendRecord,
    },
    /// Writes what a backend's load is judged by, and leaves its counters alone.
    Share {
        /// Backend number.
        number: u32,
        /// Weight in force.
        weight: u32,
        /// Most connections it may hold; 0: no limit.
        max_connections: u32,
    },
    /// Writes a selection table.
    Slots {
        /// First slot.
        first: u32,
        /// The slots.
        slots: Vec<Slot>,
    },
    /// Changes some slots of the table that begins at `first`, each by itself.
    Reslot {
        /// First slot of the table.
        first: u32,
        /// What becomes of which.
        changes: Changes,
    },
    /// Writes what decides about clients of a service.
    Access {
        /// Service number.
        number: u32,
        /// The clients.
        prefix: Prefix,
        /// Whether they may begin flows; `None`: nothing is decided about them.
        allow: Option<bool>,
    },
    /// Writes a service.
    Service {
        /// Service number.
        number: u32,
        /// What it becomes.
        record: ServiceRecord,
    },
    /// Writes what becomes of answers of a service whose flow is not recorded.
    Gateway {
        /// Service number.
        number: u32,
        /// What it becomes.
        record: GatewayRecord,
    },
    /// Lets answers be known by the backend they come from.
    PublishOrigin {
        /// Address and port of the backend.
        address: SocketAddr,
        /// Protocol of its service.
        protocol: Protocol,
        /// Backend number.
        number: u32,
    },
    /// Answers are known by the backend they come from no longer.
    WithdrawOrigin {
        /// Address and port of the backend.
        address: SocketAddr,
        /// Protocol of its service.
        protocol: Protocol,
    },
    /// Announces a VIP.
    Vip {
        /// The VIP.
        address: IpAddr,
        /// `VIP_*`.
        flags: u32,
    },
    /// Lets packets to some ports find a service.
    Publish {
        /// What they find it by: a service's key, or some ports of a range.
        id: ServiceKey,
        /// Service number.
        number: u32,
    },
    /// Packets to some ports find a service no longer.
    Withdraw {
        /// What they found it by: a service's key, or some ports of a range.
        id: ServiceKey,
    },
    /// Forgets a VIP.
    RemoveVip {
        /// The VIP.
        address: IpAddr,
    },
}

/// What the maps hold, and how it is changed.
#[derive(Debug)]
pub struct Reconciler {
    services: HashMap<ServiceKey, Held>,
    keys: Keys,
    service_numbers: Numbers,
    backend_numbers: Numbers,
    /// The generation each backend number had last.
    generations: HashMap<u32, u16>,
    space: SlotSpace,
    filter: Filter,
    /// Addresses that `nat` sends from whatever the backend.
    nat_sources: HashSet<IpAddr>,
    /// Addresses that the kernel holds.
    local: HashSet<IpAddr>,
    origins: Origins,
    /// Services on each VIP, and its flags.
    vips: HashMap<IpAddr, (u32, u32)>,
}

/// A service in the maps.
#[derive(Debug)]
struct Held {
    number: u32,
    record: ServiceRecord,
    backends: HashMap<SocketAddr, HeldBackend>,
    /// What the table was built from; `None` for one that was found in adopted maps.
    pool: Option<Vec<Member>>,
    /// Hash of the table's content.
    digest: u64,
    /// Hash of the list of members.
    members_digest: u64,
    /// What decides about clients.
    access: BTreeMap<Prefix, bool>,
    /// What becomes of answers; zero if all its flows are recorded.
    gateway: GatewayRecord,
    /// The router that it is the way to; `None` also if that is not known.
    gateway_address: Option<IpAddr>,
    /// What of the table changed lately, in a stateless service.
    delta: Option<Delta>,
    /// How long a flow of it may be silent.
    idle_timeout: Duration,
    /// Slots that were asked for; 0 as well where that is not known.
    table_size: u32,
    /// Whether the filter says of its VIP that it may be stateless.
    is_marked: bool,
}

/// A backend in the maps.
#[derive(Debug)]
struct HeldBackend {
    number: u32,
    record: BackendRecord,
    /// Weight in force and most connections; `None` for one that was found in adopted maps.
    share: Option<(u32, u32)>,
    /// Bits of the filter that its flows may need.
    lanes: HashSet<(IpAddr, u8)>,
    /// No longer configured; stays until its flows are gone.
    retiring: bool,
}

/// What of a plan can fail, made before anything changes.
struct Draft<'a> {
    wanted: &'a Service,
    number: u32,
    is_new: bool,
    pool: Vec<Member>,
    new_backends: Vec<(SocketAddr, u32)>,
    table: Option<NewTable>,
    /// The list of members where it has changed; empty where none is needed.
    members: Option<NewMembers>,
}

struct NewMembers {
    region: Region,
    members: Vec<u32>,
    digest: u64,
}

struct NewTable {
    /// Room for it; `None` where it takes the place of one of the same size.
    region: Option<Region>,
    owners: Vec<u32>,
    digest: u64,
}

/// The selection table of a stateless service.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Its first slot in map `slots`.
    pub first: u32,
    /// How many it has.
    pub len: u32,
    /// Whether the client's address alone tells the slot.
    pub by_source: bool,
    /// The forward mode of packets that follow it.
    pub forward: u8,
    /// Raised with every change of an owner.
    pub version: u64,
}

/// What a look at all recorded flows has shown of a stateless service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settling {
    /// [`Table::version`] of what was looked at.
    pub version: u64,
    /// Slots that were closing, and had no flow that only its record leads right.
    pub settled: Vec<u32>,
    /// Slots that were settled although they have one.
    pub strayed: Vec<u32>,
}

/// What the maps held when they were adopted.
#[derive(Debug, Default)]
pub struct Found {
    /// Keys and numbers of maps `services4` and `services6`.
    pub services: Vec<(ServiceKey, u32)>,
    /// Every element of map `services` that is in use, by its number.
    pub records: HashMap<u32, ServiceRecord>,
    /// Every element of map `backends`, by its number.
    pub backends: Vec<(u32, BackendRecord)>,
    /// The tables of the services, by their first slot.
    pub tables: HashMap<u32, Vec<Slot>>,
    /// What decides about clients, by service number.
    pub access: HashMap<u32, BTreeMap<Prefix, bool>>,
    /// Every element of map `gateways` that is in use, by its number.
    pub gateways: HashMap<u32, GatewayRecord>,
    /// What answers are known by, and the backend's number.
    pub origins: Vec<(SocketAddr, Protocol, u32)>,
    /// VIPs and their flags.
    pub vips: Vec<(IpAddr, u32)>,
    /// Every element of map `address_filter` that is not zero, by its number.
    pub lanes: HashMap<u32, u64>,
}

impl Reconciler {
    /// Of empty maps with room for this much.
    #[must_use]
    pub fn new(services: u32, backends: u32, slots: u32) -> Self {
        Self {
            services: HashMap::new(),
            keys: Keys::default(),
            service_numbers: Numbers::new(services),
            backend_numbers: Numbers::new(backends),
            generations: HashMap::new(),
            space: SlotSpace::new(slots),
            filter: Filter::default(),
            nat_sources: HashSet::new(),
            local: HashSet::new(),
            origins: Origins::default(),
            vips: HashMap::new(),
        }
    }

    /// Takes over what is `found`, and returns what has to be done first: what no service
    /// explains is removed, and the filter made to cover what is.
    pub fn adopt(&mut self, mut found: Found) -> Vec<Op> {
        let mut ops = Vec::new();
        // Flows may still be sent from an address that nothing else tells of.
        for (element, lanes) in found.lanes {
            self.filter.keep(element, lanes, LANE_NAT_SOURCE);
        }
        let mut by_number: HashMap<u32, Vec<ServiceKey>> = HashMap::new();
        for (id, number) in keys::runs_of(found.services) {
            by_number.entry(number).or_default().push(id);
        }
        for (number, runs) in &by_number {
            // A daemon that died amid a change of a range leaves it in pieces. The largest stands
            // for the service until the next plan.
            let largest = runs.iter().max_by_key(|id| (id.listen.ports.count(), **id));
            let Some(id) = largest else {
                continue;
            };
            let record = found.records.get(number).copied();
            let claimed = record.is_some_and(|record| {
                self.service_numbers.claim(*number)
                    && tables_of(&record).all(|region| self.space.claim(region))
            });
            let Some(record) = record.filter(|_| claimed) else {
                ops.extend(runs.iter().map(|id| Op::Withdraw { id: *id }));
                continue;
            };
            let is_any = |id: &ServiceKey| id.listen.ports == Ports::Any;
            for run in runs {
                let same = (run.listen.ip, run.protocol) == (id.listen.ip, id.protocol);
                if same && is_any(run) == is_any(id) {
                    self.keys.adopt(run, *number);
                } else {
                    ops.push(Op::Withdraw { id: *run });
                }
            }
            let owners_in = |table: u64| -> Vec<u32> {
                let slots = found.tables.get(&region_of(table).first);
                let slots = slots.filter(|_| table != 0).into_iter().flatten();
                slots.map(|slot| slot.backend).collect()
            };
            let slots = found
                .tables
                .get(&region_of(record.table).first)
                .cloned()
                .unwrap_or_default();
            let digest = digest_of(&owners_in(record.table));
            let stateless = record.flags & SERVICE_STATELESS != 0;
            let replaced = region_of(record.previous_table);
            self.services.insert(
                *id,
                Held {
                    number: *number,
                    record,
                    backends: HashMap::new(),
                    pool: None,
                    digest,
                    members_digest: digest_of(&owners_in(own_members(&record))),
                    access: found.access.remove(number).unwrap_or_default(),
                    gateway: if has_gateway(&record) {
                        found.gateways.remove(number).unwrap_or_else(no_gateway)
                    } else {
                        no_gateway()
                    },
                    gateway_address: None,
                    delta: stateless.then(|| Delta::adopt(slots, replaced)),
                    idle_timeout: Duration::ZERO,
                    table_size: 0,
                    is_marked: stateless,
                },
            );
            if stateless {
                self.filter.add(id.listen.ip, LANE_STATELESS);
            }
        }
        for number in found.gateways.into_keys() {
            let record = no_gateway();
            ops.push(Op::Gateway { number, record });
        }
        for (number, access) in found.access {
            ops.extend(changed_access(number, &access, &BTreeMap::new()).1);
        }
        let by_number: HashMap<u32, ServiceKey> = self
            .services
            .iter()
            .map(|(id, held)| (held.number, *id))
            .collect();
        let mut origins: HashMap<Origin, u32> = found
            .origins
            .into_iter()
            .map(|(address, protocol, number)| ((address, protocol), number))
            .collect();
        for (number, record) in found.backends {
            self.generations.insert(number, record.generation);
            if record.service == 0 {
                continue;
            }
            let held = by_number
                .get(&record.service)
                .and_then(|id| Some((id, self.services.get_mut(id)?)))
                .filter(|_| self.backend_numbers.claim(number));
            let Some((id, held)) = held else {
                let generation = self.next_generation(number);
                ops.push(clear_backend(number, generation));
                continue;
            };
            let source = to_ip(record.family, &record.source);
            let address = SocketAddr::new(
                to_ip(record.family, &record.addr),
                u16::from_be(record.port),
            );
            let mut lanes = HashSet::new();
            let has_gateway = has_gateway(&held.record);
            for lane in lanes_of(held.record.forward, has_gateway, address, source) {
                self.filter.add(lane.0, lane.1);
                lanes.insert(lane);
            }
            let origin = (address, id.protocol);
            if has_gateway && origins.get(&origin) == Some(&number) {
                origins.remove(&origin);
                self.origins.adopt(origin, number);
            }
            held.backends.insert(
                address,
                HeldBackend {
                    number,
                    record,
                    share: None,
                    lanes,
                    retiring: false,
                },
            );
        }
        for (address, protocol) in origins.into_keys() {
            ops.push(Op::WithdrawOrigin { address, protocol });
        }
        for id in self.services.keys() {
            self.filter.add(id.listen.ip, LANE_VIP);
            if id.listen.ports == Ports::Any {
                self.filter.add(id.listen.ip, LANE_ANY_PORT);
            }
            self.vips.entry(id.listen.ip).or_default().0 += 1;
        }
        for (address, flags) in found.vips {
            match self.vips.get_mut(&address) {
                Some(vip) => vip.1 = flags,
                None => ops.push(Op::RemoveVip { address }),
            }
        }
        // Lanes that nothing explains stay: a flow may still be sent from an address that its
        // backend has left.
        for (element, value) in self.filter.elements() {
            ops.push(Op::Lanes { element, value });
        }
        ops
    }

    /// `nat` is going to send from these addresses too: what the filter must know first. It never
    /// forgets one, because flows that were sent from it may go on.
    pub fn add_nat_sources(&mut self, addresses: &[IpAddr]) -> Vec<Op> {
        let mut ops = Vec::new();
        for address in addresses {
            if self.nat_sources.insert(*address) {
                ops.extend(lanes(self.filter.add(*address, LANE_NAT_SOURCE)));
            }
        }
        ops
    }

    /// The kernel holds these addresses now, and no others: what the filter must know. What is said of it ahead
    /// of [`Reconciler::adopt`] is not to be done, since that says it with all the rest.
    pub fn hold(&mut self, addresses: &HashSet<IpAddr>) -> Vec<Op> {
        let mut ops = Vec::new();
        for address in addresses.difference(&self.local) {
            ops.extend(lanes(self.filter.add(*address, LANE_HELD)));
        }
        for address in self.local.difference(addresses) {
            ops.extend(lanes(self.filter.remove(*address, LANE_HELD)));
        }
        self.local.clone_from(addresses);
        ops
    }

    /// Services in the maps.
    pub fn service_ids(&self) -> impl Iterator<Item = ServiceKey> + '_ {
        self.services.keys().copied()
    }

    /// The number of a service.
    #[must_use]
    pub fn service_number(&self, id: &ServiceKey) -> Option<u32> {
        self.services.get(id).map(|held| held.number)
    }

    /// Bits of a client's address that affinity goes by, by the number of a service that has it.
    pub fn affinity_masks(&self) -> HashMap<u32, [u32; 4]> {
        let with = |held: &&Held| held.record.affinity != 0;
        let services = self.services.values().filter(with);
        services
            .map(|held| (held.number, held.record.affinity_mask))
            .collect()
    }

    /// All backends in use have a number below this.
    #[must_use]
    pub const fn backend_numbers_end(&self) -> u32 {
        self.backend_numbers.used + 1
    }

    /// The number of a backend.
    #[must_use]
    pub fn backend_number(&self, id: &ServiceKey, address: &SocketAddr) -> Option<u32> {
        Some(self.services.get(id)?.backends.get(address)?.number)
    }

    /// Every backend in the maps.
    pub fn records(&self) -> impl Iterator<Item = (ServiceKey, SocketAddr, &BackendRecord)> + '_ {
        self.services.iter().flat_map(|(id, held)| {
            held.backends
                .iter()
                .map(|(address, backend)| (*id, *address, &backend.record))
        })
    }

    /// What becomes of answers of each service with a gateway.
    pub fn gateways(&self) -> impl Iterator<Item = (ServiceKey, &GatewayRecord)> + '_ {
        let services = self.services.iter();
        services
            .filter(|(_, held)| held.gateway != no_gateway())
            .map(|(id, held)| (*id, &held.gateway))
    }

    /// Bytes that the forward mode of a service adds to packets for a backend of `family`.
    pub fn overhead(&self, service: &ServiceKey, family: u8) -> u32 {
        self.services
            .get(service)
            .map_or(0, |held| forward::overhead(held.record.forward, family))
    }

    /// Backends that wait for their flows to end.
    pub fn retiring(&self) -> impl Iterator<Item = (ServiceKey, SocketAddr, u32)> + '_ {
        self.services.iter().flat_map(|(id, held)| {
            held.backends
                .iter()
                .filter(|(_, backend)| backend.retiring)
                .map(|(address, backend)| (*id, *address, backend.number))
        })
    }

    /// Plans the change to `wanted`, with `removed` gone; services in neither stay as they are.
    ///
    /// A backend that is wanted no longer stays, without new flows, until
    /// [`Reconciler::forget_backend`]. `hop` tells the way to an address, if there is one.
    ///
    /// # Errors
    ///
    /// When something wanted has no room. Then nothing has changed.
    pub fn plan(
        &mut self,
        wanted: &[Service],
        removed: &[ServiceKey],
        hop: impl Fn(IpAddr) -> Option<Hop>,
        now: Instant,
    ) -> Result<Vec<Op>> {
        let continued = self.rename(wanted, removed);
        let mut drafts = Vec::new();
        for service in wanted {
            match self.draft(service, now) {
                Ok(draft) => drafts.push(draft),
                Err(error) => {
                    for draft in drafts {
                        self.discard(&draft);
                    }
                    for (new, old) in continued {
                        self.services
                            .remove(&new)
                            .map(|held| self.services.insert(old, held));
                    }
                    return Err(error);
                }
            }
        }
        let removed: Vec<(ServiceKey, u32)> = removed
            .iter()
            .filter_map(|id| Some((*id, self.services.get(id)?.number)))
            .collect();
        let owners: Vec<(ServiceKey, u32)> = drafts
            .iter()
            .map(|draft| (draft.wanted.id, draft.number))
            .collect();
        let change = self.keys.change(&owners, &removed);
        let mut ops = Vec::new();
        // First, so that the keys that come find room. A port that changes hands is not among
        // them: its key is overwritten.
        let withdrawn = change.withdrawn.into_iter();
        ops.extend(withdrawn.map(|id| Op::Withdraw { id }));
        for draft in drafts {
            self.carry_out(draft, &hop, now, &mut ops);
        }
        let published = change.published.into_iter();
        ops.extend(published.map(|(id, number)| Op::Publish { id, number }));
        for (id, _) in removed {
            self.remove(&id, now, &mut ops);
        }
        Ok(ops)
    }

    /// Gives services whose ports were changed their new keys; returns those, each with the former
    /// one.
    fn rename(
        &mut self,
        wanted: &[Service],
        removed: &[ServiceKey],
    ) -> HashMap<ServiceKey, ServiceKey> {
        if removed.is_empty() {
            return HashMap::new();
        }
        let is_held = |id: &&ServiceKey| self.services.contains_key(id);
        let old: Vec<ServiceKey> = removed.iter().filter(is_held).copied().collect();
        let wanted = wanted.iter().map(|service| &service.id);
        let new: Vec<ServiceKey> = wanted.filter(|id| !is_held(id)).copied().collect();
        let continued = model::successions(&old, &new);
        for (new, old) in &continued {
            if let Some(held) = self.services.remove(old) {
                self.services.insert(*new, held);
            }
        }
        continued
    }

    /// Numbers and room for one service, and its table if that has changed.
    fn draft<'a>(&mut self, wanted: &'a Service, now: Instant) -> Result<Draft<'a>> {
        let mut draft = Draft {
            wanted,
            number: 0,
            is_new: false,
            pool: Vec::new(),
            new_backends: Vec::new(),
            table: None,
            members: None,
        };
        let result = self
            .fill(&mut draft, now)
            .and_then(|()| self.fill_members(&mut draft, now));
        if result.is_err() {
            self.discard(&draft);
        }
        result.map(|()| draft)
    }

    fn fill(&mut self, draft: &mut Draft<'_>, now: Instant) -> Result<()> {
        let wanted = draft.wanted;
        let held = self.services.get(&wanted.id);
        match held {
            Some(held) => draft.number = held.number,
            None => {
                draft.number = self.service_numbers.take().ok_or_else(|| {
                    anyhow!(
                        "service {:?}: no room; raise limits.services above {}",
                        wanted.name,
                        self.service_numbers.limit
                    )
                })?;
                draft.is_new = true;
            }
        }
        for backend in &wanted.backends {
            let number = match held.and_then(|held| held.backends.get(&backend.address)) {
                Some(backend) => backend.number,
                None => {
                    let number = self.backend_numbers.take().ok_or_else(|| {
                        anyhow!(
                            "service {:?}: backend {}: no room; raise limits.backends above {}",
                            wanted.name,
                            Endpoint(backend.address),
                            self.backend_numbers.limit
                        )
                    })?;
                    draft.new_backends.push((backend.address, number));
                    number
                }
            };
            draft.pool.push(Member {
                identity: backend.address,
                backend: number,
                weight: backend.weight,
                configured_weight: backend.configured_weight,
            });
        }
        let same = held.is_some_and(|held| {
            held.pool.as_ref() == Some(&draft.pool)
                && held.record.scheduler == wanted.scheduler
                && held.delta.is_some() == wanted.stateless
                && held.table_size == wanted.table_size
        });
        if same {
            return Ok(());
        }
        let mut owners = scheduler::build(wanted.scheduler, &draft.pool, wanted.table_size)
            .map_err(|error| anyhow!("service {:?}: {error}", wanted.name))?;
        let len_before = held.map_or(0, |held| region_of(held.record.table).len as usize);
        let stays = wanted.stateless && held.is_some_and(|held| held.delta.is_some());
        if stays && owners.is_empty() {
            // Nobody takes new flows; those there are stay where they are.
            owners = vec![NO_BACKEND; len_before];
        }
        let digest = digest_of(&owners);
        let keeps_kind =
            |held: &Held| held.delta.is_some() == wanted.stateless && held.digest == digest;
        if held.is_some_and(keeps_kind) {
            return Ok(());
        }
        let mut region = None;
        if !stays || owners.len() != len_before {
            region = Some(self.room(wanted, owners.len(), now)?);
        }
        draft.table = Some(NewTable {
            region,
            owners,
            digest,
        });
        Ok(())
    }

    /// The list of members, where the service needs one that is not its table.
    fn fill_members(&mut self, draft: &mut Draft<'_>, now: Instant) -> Result<()> {
        let wanted = draft.wanted;
        let members = if is_limited(wanted) && !looks_at_members(wanted) {
            scheduler::members(&draft.pool)
        } else {
            Vec::new()
        };
        let digest = digest_of(&members);
        let held = self.services.get(&wanted.id);
        let before = held.map_or_else(|| digest_of(&[]), |held| held.members_digest);
        if before != digest {
            let region = self.room(wanted, members.len(), now)?;
            draft.members = Some(NewMembers {
                region,
                members,
                digest,
            });
        }
        Ok(())
    }

    /// Room for a table of `len` slots.
    fn room(&mut self, wanted: &Service, len: usize, now: Instant) -> Result<Region> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.space.take(len, now).ok_or_else(|| {
            anyhow!(
                "service {:?}: no room for a table of {len} slots; raise limits.slots above {}",
                wanted.name,
                self.space.total()
            )
        })
    }

    /// Gives back what a draft has taken.
    fn discard(&mut self, draft: &Draft<'_>) {
        if draft.is_new {
            self.service_numbers.give_back(draft.number);
        }
        for (_, number) in &draft.new_backends {
            self.backend_numbers.give_back(*number);
        }
        let table = draft.table.as_ref().and_then(|table| table.region);
        let members = draft.members.as_ref().map(|members| members.region);
        for region in table.into_iter().chain(members) {
            self.space.put_back(region);
        }
    }

    fn carry_out(
        &mut self,
        draft: Draft<'_>,
        hop: &impl Fn(IpAddr) -> Option<Hop>,
        now: Instant,
        ops: &mut Vec<Op>,
    ) {
        let wanted = draft.wanted;
        let mut held = self.services.remove(&wanted.id).unwrap_or_else(|| {
            ops.push(Op::ResetService {
                number: draft.number,
            });
            Held {
                number: draft.number,
                record: bytemuck::Zeroable::zeroed(),
                backends: HashMap::new(),
                pool: None,
                digest: 0,
                members_digest: digest_of(&[]),
                access: BTreeMap::new(),
                gateway: no_gateway(),
                gateway_address: None,
                delta: None,
                idle_timeout: Duration::ZERO,
                table_size: 0,
                is_marked: false,
            }
        });
        held.idle_timeout = wanted.idle_timeout;
        held.table_size = wanted.table_size;
        for (address, number) in draft.new_backends {
            ops.push(Op::ResetBackend { number });
            let generation = self.next_generation(number);
            held.backends.insert(
                address,
                HeldBackend {
                    number,
                    record: BackendRecord {
                        generation,
                        ..bytemuck::Zeroable::zeroed()
                    },
                    share: None,
                    lanes: HashSet::new(),
                    retiring: false,
                },
            );
        }
        let configured: HashMap<SocketAddr, &Backend> = wanted
            .backends
            .iter()
            .map(|backend| (backend.address, backend))
            .collect();
        for (address, backend) in &mut held.backends {
            let configured = configured.get(address);
            backend.retiring = configured.is_none();
            let share = configured.map_or((0, 0), |b| (b.weight, b.max_connections));
            if backend.share.replace(share) != Some(share) {
                ops.push(Op::Share {
                    number: backend.number,
                    weight: share.0,
                    max_connections: share.1,
                });
            }
            let record = backend_record(
                (held.number, wanted.forward),
                *address,
                hop(address.ip()),
                configured.is_none_or(|backend| backend.alive),
                &backend.record,
            );
            let source = to_ip(record.family, &record.source);
            let has_gateway = wanted.gateway.is_some();
            for lane in lanes_of(wanted.forward, has_gateway, *address, source) {
                if backend.lanes.insert(lane) {
                    ops.extend(lanes(self.filter.add(lane.0, lane.1)));
                }
            }
            if record != backend.record {
                backend.record = record;
                ops.push(Op::Backend {
                    number: backend.number,
                    record,
                });
            }
            if has_gateway {
                let origin = (*address, wanted.id.protocol);
                let op = self
                    .origins
                    .publish(origin, backend.number, backend.retiring);
                ops.extend(op);
            }
        }
        if let Some(gateway) = wanted.gateway {
            // This host itself is no router that clients come through.
            let way = hop(gateway).filter(|hop| hop.ifindex != LOCAL);
            let is_same = held.gateway_address == Some(gateway);
            if way.is_some() {
                held.gateway_address = Some(gateway);
            }
            let record = gateway_record(&wanted.id, way, is_same, &held.gateway);
            if record != held.gateway {
                held.gateway = record;
                ops.push(Op::Gateway {
                    number: held.number,
                    record,
                });
            }
        }
        let before = held.record;
        let takers = draft.pool.iter().filter(|member| member.weight > 0).count();
        if let Some(table) = draft.table {
            self.put_table(&mut held, table, wanted, now, ops);
        }
        let mut members = own_members(&before);
        if let Some(NewMembers {
            region,
            members: numbers,
            digest,
        }) = draft.members
        {
            self.space.release(region_of(members), now);
            members = pack(region);
            held.members_digest = digest;
            ops.push(Op::Slots {
                first: region.first,
                slots: numbers.into_iter().map(Slot::settled).collect(),
            });
        }
        if looks_at_members(wanted) {
            members = held.record.table;
        }
        held.pool = Some(draft.pool);
        let (come, gone) = changed_access(held.number, &held.access, &wanted.access);
        held.access.clone_from(&wanted.access);
        ops.extend(come);
        let guarded = !wanted.access.is_empty() || wanted.source_rate != 0;
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let record = ServiceRecord {
            table: held.record.table,
            previous_table: held.record.previous_table,
            members,
            flags: flag(wanted.stateless, SERVICE_STATELESS)
                | flag(takers > 1, SERVICE_PLURAL)
                | flag(is_limited(wanted), SERVICE_LIMITED)
                | flag(guarded, SERVICE_GUARDED)
                | flag(!wanted.access.is_empty(), SERVICE_LISTED),
            affinity: wanted.affinity,
            affinity_mask: wanted.affinity_mask,
            source_rate: wanted.source_rate,
            connect_timeout: wanted.connect_timeout,
            forward: wanted.forward,
            scheduler: wanted.scheduler,
            on_no_backend: wanted.on_no_backend,
            on_backend_down: wanted.on_backend_down,
            ..bytemuck::Zeroable::zeroed()
        };
        if wanted.stateless && !held.is_marked {
            held.is_marked = true;
            ops.extend(lanes(self.filter.add(wanted.id.listen.ip, LANE_STATELESS)));
        }
        if record != before || draft.is_new {
            held.record = record;
            ops.push(Op::Service {
                number: held.number,
                record,
            });
        }
        ops.extend(gone);
        if wanted.gateway.is_none() && held.gateway != no_gateway() {
            self.drop_gateway(wanted.id.protocol, &mut held, ops);
        }
        let address = wanted.id.listen.ip;
        let mut flags = if wanted.answer_arp { VIP_ANSWER_ARP } else { 0 };
        if wanted.held {
            flags |= VIP_HELD;
        }
        let vip = self.vips.entry(address).or_insert((0, u32::MAX));
        vip.0 += u32::from(draft.is_new);
        if vip.1 != flags {
            vip.1 = flags;
            ops.push(Op::Vip { address, flags });
        }
        if draft.is_new {
            ops.extend(lanes(self.filter.add(address, LANE_VIP)));
            if wanted.id.listen.ports == Ports::Any {
                ops.extend(lanes(self.filter.add(address, LANE_ANY_PORT)));
            }
        }
        self.services.insert(wanted.id, held);
    }

    /// Puts a new table into force.
    fn put_table(
        &mut self,
        held: &mut Held,
        table: NewTable,
        wanted: &Service,
        now: Instant,
        ops: &mut Vec<Op>,
    ) {
        held.digest = table.digest;
        let old = region_of(held.record.table);
        let until = now + wanted.idle_timeout;
        let Some(region) = table.region else {
            if let Some(delta) = &mut held.delta {
                ops.push(Op::Reslot {
                    first: old.first,
                    changes: delta.change(&table.owners, until),
                });
            }
            return;
        };
        match &mut held.delta {
            Some(delta) if wanted.stateless && old.len > 0 => {
                delta.replace(&table.owners, old, until);
                let slots = delta.slots().to_vec();
                ops.push(Op::Slots {
                    first: region.first,
                    slots,
                });
                let oldest = delta.replaced();
                if oldest == old {
                    // Before the new table: a packet must never meet that one alone.
                    held.record.previous_table = pack(oldest);
                    ops.push(Op::Service {
                        number: held.number,
                        record: held.record,
                    });
                } else {
                    self.space.release(old, now);
                }
            }
            _ => {
                if let Some(delta) = held.delta.take() {
                    self.space.release(delta.replaced(), now);
                }
                self.space.release(old, now);
                held.record.previous_table = 0;
                // Flows of a service that was another kind are recorded, and with whomever.
                let delta = if old.len > 0 {
                    Delta::closing(&table.owners)
                } else {
                    Delta::settled(&table.owners)
                };
                let slots = if wanted.stateless {
                    delta.slots().to_vec()
                } else {
                    table.owners.into_iter().map(Slot::settled).collect()
                };
                held.delta = wanted.stateless.then_some(delta);
                ops.push(Op::Slots {
                    first: region.first,
                    slots,
                });
            }
        }
        held.record.table = pack(region);
    }

    /// Ends what is over of the changes of stateless services. `seen` tells what a look at all
    /// recorded flows has shown, by service number.
    pub fn settle(&mut self, seen: &HashMap<u32, Settling>, now: Instant) -> Vec<Op> {
        let mut ops = Vec::new();
        let mut free = Vec::new();
        for held in self.services.values_mut() {
            let Some(delta) = &mut held.delta else {
                continue;
            };
            // How long windows last is not known until it has been planned.
            if held.idle_timeout.is_zero() {
                continue;
            }
            let first = region_of(held.record.table).first;
            let mut reslot = |changes: Changes| {
                if !changes.is_empty() {
                    ops.push(Op::Reslot { first, changes });
                }
            };
            let (changes, replaced) = delta.expire(now, now + held.idle_timeout);
            reslot(changes);
            if replaced.is_none()
                && let Some(settling) = seen.get(&held.number)
                && settling.version == delta.version()
            {
                reslot(delta.settle(settling.settled.iter().copied()));
                reslot(delta.reopen(settling.strayed.iter().copied()));
            }
            if let Some(region) = replaced {
                held.record.previous_table = 0;
                ops.push(Op::Service {
                    number: held.number,
                    record: held.record,
                });
                free.push(region);
            }
        }
        for region in free {
            self.space.release(region, now);
        }
        ops
    }

    /// The tables of stateless services, by service number.
    #[must_use]
    pub fn stateless_tables(&self) -> HashMap<u32, Table> {
        let of_held = |held: &Held| {
            let region = region_of(held.record.table);
            let table = Table {
                first: region.first,
                len: region.len,
                by_source: held.record.scheduler == schedulers::SOURCE_HASH,
                forward: held.record.forward,
                version: held.delta.as_ref()?.version(),
            };
            Some((held.number, table))
        };
        self.services.values().filter_map(of_held).collect()
    }

    /// Whether flows of a backend may be seen that are not recorded and not found by the table.
    #[must_use]
    pub fn remembers(&self, id: &ServiceKey, address: &SocketAddr) -> bool {
        self.services.get(id).is_some_and(|held| {
            let backend = held.backends.get(address);
            let delta = held.delta.as_ref().zip(backend);
            delta.is_some_and(|(delta, backend)| delta.remembers(backend.number))
        })
    }

    /// Takes a service away that no key leads to, with its backends and, if it was the last on it,
    /// its VIP.
    fn remove(&mut self, id: &ServiceKey, now: Instant, ops: &mut Vec<Op>) {
        let Some(mut held) = self.services.remove(id) else {
            return;
        };
        let address = id.listen.ip;
        if let Some(vip) = self.vips.get_mut(&address) {
            vip.0 -= 1;
            if vip.0 == 0 {
                self.vips.remove(&address);
                ops.push(Op::RemoveVip { address });
            }
        }
        if id.listen.ports == Ports::Any {
            ops.extend(lanes(self.filter.remove(address, LANE_ANY_PORT)));
        }
        ops.extend(lanes(self.filter.remove(address, LANE_VIP)));
        ops.push(Op::Service {
            number: held.number,
            record: bytemuck::Zeroable::zeroed(),
        });
        if held.gateway != no_gateway() {
            self.drop_gateway(id.protocol, &mut held, ops);
        }
        ops.extend(changed_access(held.number, &held.access, &BTreeMap::new()).1);
        for region in tables_of(&held.record) {
            self.space.release(region, now);
        }
        if held.is_marked {
            ops.extend(lanes(self.filter.remove(address, LANE_STATELESS)));
        }
        self.service_numbers.give_back(held.number);
        for (address, backend) in held.backends {
            self.drop_backend((address, id.protocol), backend, ops);
        }
    }

    /// Answers of the service are found by recorded flows alone from now on, as its record says.
    fn drop_gateway(&mut self, protocol: Protocol, held: &mut Held, ops: &mut Vec<Op>) {
        held.gateway = no_gateway();
        held.gateway_address = None;
        ops.push(Op::Gateway {
            number: held.number,
            record: held.gateway,
        });
        for (address, backend) in &mut held.backends {
            ops.extend(self.origins.withdraw((*address, protocol), backend.number));
            let lane = (address.ip(), LANE_ORIGIN);
            if backend.lanes.remove(&lane) {
                ops.extend(lanes(self.filter.remove(lane.0, lane.1)));
            }
        }
    }

    /// Takes away a backend that is configured no longer; one that still is stays.
    pub fn forget_backend(&mut self, id: &ServiceKey, address: &SocketAddr) -> Vec<Op> {
        let mut ops = Vec::new();
        if let Some(held) = self.services.get_mut(id)
            && held.backends.get(address).is_some_and(|b| b.retiring)
            && let Some(backend) = held.backends.remove(address)
        {
            if let Some(delta) = &mut held.delta {
                ops.push(Op::Reslot {
                    first: region_of(held.record.table).first,
                    changes: delta.forget(backend.number),
                });
            }
            self.drop_backend((*address, id.protocol), backend, &mut ops);
        }
        ops
    }

    fn drop_backend(&mut self, origin: Origin, backend: HeldBackend, ops: &mut Vec<Op>) {
        ops.extend(self.origins.withdraw(origin, backend.number));
        let generation = self.next_generation(backend.number);
        ops.push(clear_backend(backend.number, generation));
        for (address, bit) in backend.lanes {
            ops.extend(lanes(self.filter.remove(address, bit)));
        }
        self.backend_numbers.give_back(backend.number);
    }

    fn next_generation(&mut self, number: u32) -> u16 {
        let generation = self.generations.entry(number).or_default();
        *generation = generation.wrapping_add(1);
        *generation
    }
}

/// Whether a backend of the service has a limit.
fn is_limited(service: &Service) -> bool {
    service.backends.iter().any(|b| b.max_connections != 0)
}

/// Whether the selection table is the list of members.
fn looks_at_members(service: &Service) -> bool {
    service.scheduler == schedulers::LEAST_CONNECTIONS
}

/// The list of members that is not the selection table; 0 if there is none.
fn own_members(record: &ServiceRecord) -> u64 {
    if record.members == record.table {
        0
    } else {
        record.members
    }
}

/// The slots that a service has in use.
fn tables_of(record: &ServiceRecord) -> impl Iterator<Item = Region> + use<> {
    [record.table, record.previous_table, own_members(record)]
        .into_iter()
        .map(region_of)
}

/// What makes the lists of a service those of `after`: what is done first, and what is done when
/// the service's record says whether there are any.
///
/// What comes is added from the longest prefix to the shortest, and then what goes is taken away
/// from the shortest to the longest. So a client is decided about at every moment as before or as
/// after: the longest prefix that holds it is always that of one of the two.
fn changed_access(
    number: u32,
    before: &BTreeMap<Prefix, bool>,
    after: &BTreeMap<Prefix, bool>,
) -> (Vec<Op>, Vec<Op>) {
    let op = |(prefix, allow): (&Prefix, Option<bool>)| Op::Access {
        number,
        prefix: *prefix,
        allow,
    };
    let mut come: Vec<_> = after
        .iter()
        .filter(|(prefix, allow)| before.get(prefix) != Some(allow))
        .map(|(prefix, allow)| (prefix, Some(*allow)))
        .collect();
    come.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.bits));
    let mut gone: Vec<_> = before
        .keys()
        .filter(|prefix| !after.contains_key(prefix))
        .map(|prefix| (prefix, None))
        .collect();
    gone.sort_by_key(|(prefix, _)| prefix.bits);
    (
        come.into_iter().map(op).collect(),
        gone.into_iter().map(op).collect(),
    )
}

fn lanes(change: Option<(u32, u64)>) -> Option<Op> {
    change.map(|(element, value)| Op::Lanes { element, value })
}

/// What the filter must know for replies of a backend to be seen.
fn lanes_of(
    mode: u8,
    has_gateway: bool,
    backend: SocketAddr,
    source: IpAddr,
) -> impl Iterator<Item = (IpAddr, u8)> {
    let lane = match mode {
        // The backend is on this host, and answers the client itself.
        forward::NAT if source == backend.ip() => Some((source, LANE_BACKEND)),
        forward::NAT if !source.is_unspecified() => Some((source, LANE_NAT_SOURCE)),
        forward::DNAT => Some((backend.ip(), LANE_BACKEND)),
        _ => None,
    };
    let origin = has_gateway.then_some((backend.ip(), LANE_ORIGIN));
    lane.into_iter().chain(origin)
}

/// Whether some flows of a service are not recorded whose answers come through here.
const fn has_gateway(record: &ServiceRecord) -> bool {
    record.flags & SERVICE_STATELESS != 0 && record.forward == forward::DNAT
}

/// What a service without a gateway has in its place.
fn no_gateway() -> GatewayRecord {
    bytemuck::Zeroable::zeroed()
}

/// The record of a gateway. Without a way to it the last one known stays in: marked as unusable if it is lost, and in
/// force if it is that of another gateway (`is_same` is false), until the way to the new one is known.
fn gateway_record(
    id: &ServiceKey,
    hop: Option<Hop>,
    is_same: bool,
    before: &GatewayRecord,
) -> GatewayRecord {
    let (port, _) = id.listen.ports.keys();
    let mut record = GatewayRecord {
        vip: from_ip(id.listen.ip),
        port: port.to_be(),
        flags: if is_same { 0 } else { before.flags },
        ..*before
    };
    if let Some(hop) = hop {
        record.l2 = l2(&hop);
        record.ifindex = hop.ifindex;
        record.tags = hop.tags;
        record.mtu = u16::try_from(hop.mtu).unwrap_or(u16::MAX);
        record.flags = GATEWAY_RESOLVED;
    }
    record
}

/// Ethernet destination and source as they stand in a frame.
fn l2(hop: &Hop) -> [u32; 3] {
    let mut l2 = [0; 12];
    l2[..6].copy_from_slice(&hop.destination);
    l2[6..].copy_from_slice(&hop.source);
    bytemuck::cast(l2)
}

fn clear_backend(number: u32, generation: u16) -> Op {
    Op::Backend {
        number,
        record: BackendRecord {
            generation,
            ..bytemuck::Zeroable::zeroed()
        },
    }
}

/// The record of a backend; without a way to it the last one known stays in, marked as unusable.
fn backend_record(
    (service, mode): (u32, u8),
    address: SocketAddr,
    hop: Option<Hop>,
    alive: bool,
    before: &BackendRecord,
) -> BackendRecord {
    let mut record = BackendRecord {
        addr: from_ip(address.ip()),
        service,
        port: address.port().to_be(),
        family: if address.is_ipv4() {
            FAMILY_V4
        } else {
            FAMILY_V6
        },
        flags: if alive { BACKEND_ALIVE } else { 0 },
        ..*before
    };
    if let Some(hop) = hop {
        record.l2 = l2(&hop);
        record.ifindex = hop.ifindex;
        record.tags = hop.tags;
        record.source = from_ip(hop.address);
        let mtu = hop
            .mtu
            .saturating_sub(forward::overhead(mode, record.family));
        // No IP packet is larger than what fits.
        record.mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        record.flags |= BACKEND_RESOLVED;
    }
    record
}

fn region_of(table: u64) -> Region {
    let (first, len) = ServiceRecord::unpack_table(table);
    Region { first, len }
}

const fn pack(region: Region) -> u64 {
    ServiceRecord::pack_table(region.first, region.len)
}

fn digest_of(owners: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    owners.hash(&mut hasher);
    hasher.finish()
}

/// Numbers from 1 to a limit.
#[derive(Debug)]
struct Numbers {
    limit: u32,
    /// All above are free, and never were in use.
    used: u32,
    free: BTreeSet<u32>,
}

impl Numbers {
    const fn new(limit: u32) -> Self {
        Self {
            limit,
            used: 0,
            free: BTreeSet::new(),
        }
    }

    fn take(&mut self) -> Option<u32> {
        if self.used < self.limit {
            self.used += 1;
            return Some(self.used);
        }
        // The one that has been free for longest would be best; the lowest will do.
        self.free.pop_first()
    }

    /// Takes this number; `false` if it is taken or out of range.
    fn claim(&mut self, number: u32) -> bool {
        if number == 0 || number > self.limit {
            return false;
        }
        while self.used < number {
            self.used += 1;
            self.free.insert(self.used);
        }
        self.free.remove(&number)
    }

    fn give_back(&mut self, number: u32) {
        self.free.insert(number);
    }
}

#[cfg(test)]
mod tests;
