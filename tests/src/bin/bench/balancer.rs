//! The balancer that is measured: in the kernel, with services, and attached to nothing.

use crate::frame::{BACKEND_MAC, BALANCER_MAC, CLIENT_MAC, Family, Network, PORT};
use anyhow::Result;
use bytemuck::{Pod, Zeroable as _};
use lb_common::{
    abi::Settings,
    addr::{Address, from_ip},
    bench::{FIRST_PORT, PORT_BITS},
    flow::{DIRECTION_CLIENT, Flow, FlowKey},
    flow_table::Entry,
    hash,
    service::{Interface, forward, on_backend_down, on_no_backend, scheduler},
    stats::Counters,
};
use sluice::{
    config::{Limits, Listen, Ports, Protocol},
    dataplane::{Dataplane, FlowTable, Flowing as _},
    model::ServiceKey,
    reconcile::{Backend, Hop, Reconciler, Service, apply},
};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// The interface packets seem to come from unless another is named: the loopback interface.
const LOOPBACK: u32 = 1;

/// A service to be put into the maps. Its VIP has the number of its place.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Address family of VIP and backends.
    pub family: Family,
    /// Transport protocol.
    pub protocol: Protocol,
    /// One of [`lb_common::service::forward`].
    pub forward: u8,
    /// One of [`lb_common::service::scheduler`].
    pub scheduler: u8,
    /// One of [`on_no_backend`].
    pub on_no_backend: u8,
    /// Number of backends.
    pub backends: u32,
    /// Whether clients come through a gateway that is known: `dnat` records no flow then.
    pub gateway: bool,
}

/// The balancer.
pub struct Balancer {
    /// Program and maps.
    pub dataplane: Dataplane,
    /// The interface that packets come from and leave by.
    ifindex: u32,
    reconciler: Reconciler,
    /// The services as they are in the maps.
    pub services: Vec<Service>,
}

/// Room for everything but flows.
pub const LIMITS: Limits = Limits {
    flows: 1 << 16,
    services: 4096,
    listeners: 65536,
    backends: 16384,
    slots: 4 << 20,
    ..Limits::DEFAULT
};

impl Balancer {
    /// Loads it with room for so many flows, and puts services into its maps.
    pub fn load(flows: u32, plans: &[Plan]) -> Result<Self> {
        Self::load_on(LOOPBACK, flows, plans)
    }

    /// The same for packets that come from interface `ifindex`, and leave by it.
    pub fn load_on(ifindex: u32, flows: u32, plans: &[Plan]) -> Result<Self> {
        let limits = Limits { flows, ..LIMITS };
        let settings = Settings {
            nat_port_first: 1024,
            nat_port_last: 60999,
            nat_port_seed: 0x5eed,
            gue_port: 6080_u16.to_be(),
            ..Settings::zeroed()
        };
        let dataplane = Dataplane::load_unpinned(&limits, settings)?;
        let interface = Interface {
            mac: BALANCER_MAC,
            mtu: 1500,
            link: dataplane.link(ifindex, BALANCER_MAC)?,
        };
        dataplane.maps.interfaces.insert(&ifindex, &interface)?;
        let services = Self::services(plans);
        let reconciler = Reconciler::new(limits.services, limits.backends, limits.slots);
        let mut balancer = Self {
            dataplane,
            ifindex,
            reconciler,
            services: services.clone(),
        };
        balancer.apply(&services)?;
        Ok(balancer)
    }

    /// Services with addresses: VIPs by their place, backends one after the other.
    pub fn services(plans: &[Plan]) -> Vec<Service> {
        let mut first = 1;
        let mut services = Vec::new();
        for (vip, plan) in (0..).zip(plans) {
            services.push(service(plan, vip, first));
            first += plan.backends;
        }
        services
    }

    /// Puts these services into the maps, as the daemon does: what is to be done is planned, and carried out.
    pub fn apply(&mut self, services: &[Service]) -> Result<()> {
        let ifindex = self.ifindex;
        let hop = |address| Some(hop(address, ifindex));
        let ops = self.reconciler.plan(services, &[], hop, Instant::now())?;
        apply::apply(&self.dataplane.maps, &ops)
    }

    /// Lets no more than this many new flows a second into the flow table, on each CPU; 0: as many as come.
    pub fn limit_new_flows(&self, new_flows: u32) {
        let settings = &self.dataplane.maps.settings;
        let now = settings.read(0);
        settings.store(0, Settings { new_flows, ..now });
    }

    /// Everything counted so far, of all services; drops also of packets that no service was found for.
    pub fn counters(&self) -> Result<Counters> {
        let stats = &self.dataplane.maps.service_stats;
        let mut total = Counters::default();
        // With thousands of services one call for all of them is the cheaper way.
        if self.services.len() > 64 {
            stats.sums()?.into_iter().for_each(|one| total += one);
        } else {
            for number in 1..=self.services.len() as u32 {
                total += stats.sum(number)?;
            }
        }
        total.drops = self.dataplane.maps.drops.sums()?.iter().sum();
        Ok(total)
    }

    /// Source, destination and their ports of an answer to client number `n` of the first service, whose flows
    /// are not recorded.
    pub fn answer(&self, family: Family, n: u32) -> Ends {
        let client = from_ip(family.address(Network::Clients, n >> PORT_BITS));
        let port = (FIRST_PORT + (n as u16 & ((1 << PORT_BITS) - 1))).to_be();
        let maps = &self.dataplane.maps;
        let (first, slots) = maps.services.read(1).table();
        let (dst, dport) = ([0; 4], PORT.to_be());
        let flow = FlowKey {
            src: client,
            dst,
            sport: port,
            dport,
            protocol: u32::from(Protocol::Tcp.number()),
        };
        let hash = match family {
            Family::V4 => hash::flow_hash(&FlowKey {
                src: client[0],
                dst: 0,
                sport: port,
                dport,
                protocol: flow.protocol,
            }),
            Family::V6 => hash::flow_hash(&flow),
        };
        let slot = maps.slots.read(first + hash::slot_of(hash, slots));
        let backend = maps.backends.read(slot.backend);
        (backend.addr, client, backend.port, port)
    }

    /// Shows `f` source, destination and ports of every client's flow, and of the answers to it.
    pub fn flows(&self, family: Family, mut f: impl FnMut(Ends, Ends)) -> Result<()> {
        let maps = &self.dataplane.maps;
        match family {
            Family::V4 => {
                <u32>::flow_table(maps)?.each(|_, key, flow| ends(key, flow, &mut f))?;
            }
            Family::V6 => {
                <[u32; 4]>::flow_table(maps)?.each(|_, key, flow| ends(key, flow, &mut f))?;
            }
        }
        Ok(())
    }

    /// Forgets all flows.
    pub fn clear(&self, family: Family) -> Result<()> {
        let maps = &self.dataplane.maps;
        match family {
            Family::V4 => clear(&<u32>::flow_table(maps)?),
            Family::V6 => clear(&<[u32; 4]>::flow_table(maps)?),
        }
    }
}

/// The way to every address.
fn hop(address: IpAddr, ifindex: u32) -> Hop {
    let family = match address {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    };
    let is_gateway = address == gateway(family);
    Hop {
        destination: if is_gateway { CLIENT_MAC } else { BACKEND_MAC },
        source: BALANCER_MAC,
        ifindex,
        tags: 0,
        address: family.address(Network::Hosts, 0),
        mtu: 1500,
    }
}

/// The router that clients come through.
fn gateway(family: Family) -> IpAddr {
    family.address(Network::Hosts, u16::MAX.into())
}

fn clear<A: Address>(table: &FlowTable<A>) -> Result<()>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut keys = Vec::new();
    table.each(|_, key, _| keys.push(*key))?;
    let view = table.view();
    for key in &keys {
        view.remove(key)?;
    }
    Ok(())
}

/// Source, destination and their ports, in network order.
pub type Ends = ([u32; 4], [u32; 4], u16, u16);

fn ends<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, f: &mut impl FnMut(Ends, Ends)) {
    if flow.direction == DIRECTION_CLIENT {
        let of = |key: &FlowKey<A>| (key.src.widen(), key.dst.widen(), key.sport, key.dport);
        f(of(key), of(&flow.opposite(key.protocol)));
    }
}

impl Plan {
    /// Whether flows are found by hashing their packets again, and not recorded.
    pub const fn is_stateless(&self) -> bool {
        scheduler::hashes(self.scheduler) && (!forward::translates(self.forward) || self.gateway)
    }
}

fn service(plan: &Plan, vip: u32, first_host: u32) -> Service {
    let address = |n| SocketAddr::new(plan.family.address(Network::Hosts, n), PORT);
    let backend = |n| Backend {
        address: address(n),
        weight: 1,
        configured_weight: 1,
        max_connections: 0,
        alive: true,
    };
    Service {
        id: ServiceKey {
            listen: Listen {
                ip: plan.family.address(Network::Vips, vip),
                ports: Ports::One(PORT),
            },
            protocol: plan.protocol,
        },
        name: format!("service {vip}"),
        forward: plan.forward,
        scheduler: plan.scheduler,
        on_no_backend: plan.on_no_backend,
        on_backend_down: on_backend_down::KEEP,
        connect_timeout: 0,
        affinity: 0,
        affinity_mask: [0; 4],
        source_rate: 0,
        access: std::collections::BTreeMap::new(),
        table_size: 0,
        stateless: plan.is_stateless(),
        gateway: plan.gateway.then(|| gateway(plan.family)),
        idle_timeout: Duration::from_secs(900),
        answer_arp: true,
        held: false,
        backends: (first_host..first_host + plan.backends)
            .map(backend)
            .collect(),
    }
}

impl Plan {
    /// A service with `backends`, of TCP.
    pub const fn new(family: Family, forward: u8, scheduler: u8, backends: u32) -> Self {
        Self {
            family,
            protocol: Protocol::Tcp,
            forward,
            scheduler,
            on_no_backend: on_no_backend::DROP,
            backends,
            gateway: false,
        }
    }
}
