//! Runs the real programs on single packets with `BPF_PROG_TEST_RUN`.
//!
//! Each [`Balancer`] has an object in the kernel to itself, with its own maps and no pins, so tests
//! run side by side.

use crate::{
    oracle,
    packet::{BALANCER, Family, Host, Mac, Packet},
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, LpmTrie, Map, MapData, PerCpuArray, hash_map::HashMap as BpfHashMap, lpm_trie,
        xdp::DevMapHash,
    },
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use bytemuck::Zeroable as _;
use lb_common::{
    abi, addr, backend, client,
    filter::{
        LANE_ANY_PORT, LANE_BACKEND, LANE_HELD, LANE_NAT_SOURCE, LANE_ORIGIN, LANE_STATELESS,
        LANE_VIP, lane_of, place,
    },
    flow, flow_table, fragment,
    service::{self, ServiceKey},
    stats::{Counters, DropReason},
};
use sluice::dataplane::{FlowTable, STORES_IN_ORDER};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    sync::{Barrier, Mutex},
};

/// What XDP does with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The program failed.
    Aborted,
    /// Dropped.
    Drop,
    /// To the kernel.
    Pass,
    /// Out of the interface it came from.
    Tx,
    /// Out of another interface.
    Redirect,
}

impl Verdict {
    fn of(code: u32) -> Self {
        match code {
            0 => Self::Aborted,
            1 => Self::Drop,
            2 => Self::Pass,
            3 => Self::Tx,
            4 => Self::Redirect,
            other => panic!("the program returned {other}, which is no XDP code"),
        }
    }
}

/// TCP, as an IP protocol number.
pub const TCP: u8 = 6;
/// UDP, as an IP protocol number.
pub const UDP: u8 = 17;
/// The interface test packets come from: the kernel attributes them to the loopback device.
pub const INGRESS: u32 = 1;
/// UDP port that `gue` sends to in tests.
pub const GUE_PORT: u16 = 6080;
/// MTU of [`INGRESS`].
pub const MTU: u16 = 1500;
/// An interface beside [`INGRESS`] that packets may be redirected to.
pub const OTHER_INTERFACE: u32 = 1000;
/// An interface that packets may not be redirected to.
pub const UNKNOWN_INTERFACE: u32 = 1001;

/// A backend of a [`Service`].
#[derive(Clone, Debug)]
pub struct Backend {
    /// Address.
    pub ip: IpAddr,
    /// MAC address of the next hop.
    pub mac: Mac,
    /// Port.
    pub port: u16,
    /// Share of new flows.
    pub weight: u32,
    /// Most connections it may hold; 0: no limit.
    pub max_connections: u32,
    /// Whether it may keep its flows.
    pub alive: bool,
    /// Whether its next hop is known.
    pub resolved: bool,
    /// Interface it is behind.
    pub ifindex: u32,
    /// Bytes of the largest packet that can be sent towards it; 0: any.
    pub mtu: u32,
    /// VLAN tags towards it, as [`lb_common::vlan`] packs them.
    pub tags: u32,
}

/// What happened to every slot of a stateless service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Previous {
    /// It belonged to this backend until a moment ago.
    Backend(usize),
    /// Long ago, but there are recorded flows.
    Closing,
}

/// A service to be put into the maps.
#[derive(Clone, Debug)]
pub struct Service {
    /// VIP.
    pub vip: IpAddr,
    /// First port, or 0 for every port.
    pub port: u16,
    /// Last port.
    pub last_port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// One of [`service::forward`].
    pub forward: u8,
    /// One of [`service::scheduler`].
    pub scheduler: u8,
    /// One of [`service::on_no_backend`].
    pub on_no_backend: u8,
    /// One of [`service::on_backend_down`].
    pub on_backend_down: u8,
    /// Ticks a handshake may take; 0: no limit.
    pub connect_timeout: u32,
    /// Ticks for which a client returns to its backend; 0: not at all.
    pub affinity: u32,
    /// Bits of a client's address that affinity goes by.
    pub affinity_mask: u8,
    /// New flows a second that one client may begin; 0: no limit.
    pub source_rate: u32,
    /// Prefixes of clients, and whether they may begin flows; whoever none holds may.
    pub access: Vec<(IpAddr, u8, bool)>,
    /// Whether flows are recorded only where a slot is not settled.
    pub stateless: bool,
    /// The router that clients of a stateless service in `dnat` come through.
    pub gateway: Option<Host>,
    /// Whether a SYN that one backend does not answer goes to another.
    pub plural: bool,
    /// What each slot's other number is: which backend, of what the slot has now; `None`: it is settled. Of a
    /// stateless service.
    pub previous: Option<Previous>,
    /// Backends.
    pub backends: Vec<Backend>,
}

/// A round-robin service at `host:port` without backends; at every port of `host` if `port` is 0.
#[must_use]
pub fn service(family: Family, protocol: u8, host: Host, port: u16) -> Service {
    Service {
        vip: host.ip(family),
        port,
        last_port: port,
        protocol,
        forward: service::forward::NAT,
        scheduler: service::scheduler::ROUND_ROBIN,
        on_no_backend: service::on_no_backend::RESET,
        on_backend_down: service::on_backend_down::KEEP,
        connect_timeout: 0,
        affinity: 0,
        affinity_mask: 128,
        source_rate: 0,
        access: Vec::new(),
        stateless: false,
        gateway: None,
        plural: false,
        previous: None,
        backends: Vec::new(),
    }
}

impl Service {
    /// Listens on every port up to `last`.
    #[must_use]
    pub fn until(mut self, last: u16) -> Self {
        self.last_port = last;
        self
    }

    /// Lets a repeated SYN try another backend.
    #[must_use]
    pub fn plural(mut self) -> Self {
        self.plural = true;
        self
    }

    /// Follows the selection table, by hash.
    #[must_use]
    pub fn stateless(mut self) -> Self {
        self.stateless = true;
        self.scheduler(service::scheduler::MAGLEV)
    }

    /// Translates by hash, and answers through this router.
    #[must_use]
    pub fn through(mut self, gateway: Host) -> Self {
        self.gateway = Some(gateway);
        self.forward(service::forward::DNAT).stateless()
    }

    /// Sets the forward mode.
    #[must_use]
    pub fn forward(mut self, forward: u8) -> Self {
        self.forward = forward;
        self
    }

    /// Sets the scheduler.
    #[must_use]
    pub fn scheduler(mut self, scheduler: u8) -> Self {
        self.scheduler = scheduler;
        self
    }

    /// Sets what a flow meets without a backend.
    #[must_use]
    pub fn on_no_backend(mut self, what: u8) -> Self {
        self.on_no_backend = what;
        self
    }

    /// Sets what flows of a dead backend meet.
    #[must_use]
    pub fn on_backend_down(mut self, what: u8) -> Self {
        self.on_backend_down = what;
        self
    }

    /// Lets clients return to their backend for this many ticks, by the first `mask` bits of their
    /// address.
    #[must_use]
    pub fn affinity(mut self, ticks: u32, mask: u8) -> Self {
        (self.affinity, self.affinity_mask) = (ticks, mask);
        self
    }

    /// Limits the new flows that one client may begin in a second.
    #[must_use]
    pub fn source_rate(mut self, rate: u32) -> Self {
        self.source_rate = rate;
        self
    }

    /// Allows or denies the clients of a prefix.
    #[must_use]
    pub fn access(mut self, address: IpAddr, bits: u8, allow: bool) -> Self {
        self.access.push((address, bits, allow));
        self
    }

    /// Sets the limit of a handshake, in ticks.
    #[must_use]
    pub fn connect_timeout(mut self, ticks: u32) -> Self {
        self.connect_timeout = ticks;
        self
    }

    /// Adds a healthy backend on the segment of [`INGRESS`]; with port 0 it gets packets at the
    /// port they were sent to.
    #[must_use]
    pub fn backend(self, host: Host, port: u16, weight: u32) -> Self {
        let family = Family::of(self.vip);
        self.backend_of(family, host, port, weight)
    }

    /// As [`Service::backend`], reached at its address of `family`.
    #[must_use]
    pub fn backend_of(self, family: Family, host: Host, port: u16, weight: u32) -> Self {
        self.with(Backend {
            ip: host.ip(family),
            mac: host.mac,
            port,
            weight,
            max_connections: 0,
            alive: true,
            resolved: true,
            ifindex: INGRESS,
            mtu: 0,
            tags: 0,
        })
    }

    /// Whether a backend has a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.backends.iter().any(|b| b.max_connections != 0)
    }

    /// Adds a backend.
    #[must_use]
    pub fn with(mut self, backend: Backend) -> Self {
        self.backends.push(backend);
        self
    }

    /// Changes the backend added last.
    #[must_use]
    pub fn last(mut self, change: impl FnOnce(&mut Backend)) -> Self {
        change(self.backends.last_mut().expect("a backend was added"));
        self
    }
}

/// Everything that is counted, summed over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By service number.
    pub services: BTreeMap<u32, Counters>,
    /// By backend number.
    pub backends: BTreeMap<u32, Counters>,
    /// By name of the reason; those that are not zero.
    pub drops: BTreeMap<&'static str, u64>,
    /// Active and inactive connections by backend number; as they are, not as a difference.
    pub load: BTreeMap<u32, (u64, u64)>,
}

impl Counts {
    /// What has been added since `earlier`; load is kept as it is now. Zero entries are left out.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let difference = |now: &BTreeMap<u32, Counters>, then: &BTreeMap<u32, Counters>| {
            now.iter()
                .map(|(n, c)| {
                    let t = then.get(n).copied().unwrap_or_default();
                    let d = Counters {
                        connections: c.connections - t.connections,
                        packets_in: c.packets_in - t.packets_in,
                        bytes_in: c.bytes_in - t.bytes_in,
                        packets_out: c.packets_out - t.packets_out,
                        bytes_out: c.bytes_out - t.bytes_out,
                        drops: c.drops - t.drops,
                    };
                    (*n, d)
                })
                .filter(|(_, c)| *c != Counters::default())
                .collect()
        };
        Self {
            services: difference(&self.services, &earlier.services),
            backends: difference(&self.backends, &earlier.backends),
            drops: self
                .drops
                .iter()
                .map(|(n, c)| (*n, c - earlier.drops.get(n).copied().unwrap_or(0)))
                .filter(|(_, c)| *c != 0)
                .collect(),
            load: self.load.clone(),
        }
    }

    /// Expects one client packet of `bytes` for a service and a backend.
    #[must_use]
    pub fn packet_in(mut self, service: u32, backend: u32, bytes: u64) -> Self {
        for c in self.both(service, backend) {
            c.packets_in += 1;
            c.bytes_in += bytes;
        }
        self
    }

    /// Expects one packet of `bytes` to a client.
    #[must_use]
    pub fn packet_out(mut self, service: u32, backend: u32, bytes: u64) -> Self {
        for c in self.both(service, backend) {
            c.packets_out += 1;
            c.bytes_out += bytes;
        }
        self
    }

    /// Expects one placed flow.
    #[must_use]
    pub fn connection(mut self, service: u32, backend: u32) -> Self {
        for c in self.both(service, backend) {
            c.connections += 1;
        }
        self
    }

    /// Expects one dropped packet; `service` 0: of nobody.
    #[must_use]
    pub fn drop(mut self, reason: DropReason, service: u32) -> Self {
        *self.drops.entry(reason.name()).or_default() += 1;
        if service != 0 {
            self.services.entry(service).or_default().drops += 1;
        }
        self
    }

    /// Expects a backend to have this many active and inactive connections.
    #[must_use]
    pub fn load(mut self, backend: u32, active: u64, inactive: u64) -> Self {
        self.load.insert(backend, (active, inactive));
        self
    }

    fn both(&mut self, service: u32, backend: u32) -> [&mut Counters; 2] {
        [
            self.services.entry(service).or_default(),
            self.backends.entry(backend).or_default(),
        ]
    }
}

/// What the program made of a packet.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// What was counted.
    pub counts: Counts,
}

/// Something that can be sent.
pub trait Frame {
    /// Its bytes.
    fn frame(&self) -> Vec<u8>;
}

impl Frame for Packet {
    fn frame(&self) -> Vec<u8> {
        self.build()
    }
}

impl Frame for Vec<u8> {
    fn frame(&self) -> Vec<u8> {
        self.clone()
    }
}

/// What a test expects of a packet.
#[derive(Clone, Debug)]
pub enum Expected {
    /// Sent back out of the interface it came from, as this frame.
    Sent(Vec<u8>),
    /// Sent out of another interface, as this frame.
    Redirected(Vec<u8>),
    /// Handed to the kernel, unchanged.
    Passed,
    /// Dropped.
    Dropped,
}

impl Expected {
    /// [`Expected::Sent`].
    #[must_use]
    pub fn sent(frame: &impl Frame) -> Self {
        Self::Sent(frame.frame())
    }

    /// [`Expected::Redirected`].
    #[must_use]
    pub fn redirected(frame: &impl Frame) -> Self {
        Self::Redirected(frame.frame())
    }
}

/// One entry of a flow table, in readable form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowEntry {
    /// Source of the packets it matches.
    pub src: (IpAddr, u16),
    /// Destination of the packets it matches.
    pub dst: (IpAddr, u16),
    /// IP protocol.
    pub protocol: u32,
    /// Source the packets leave with.
    pub out_src: (IpAddr, u16),
    /// Destination the packets leave with.
    pub out_dst: (IpAddr, u16),
    /// Backend number.
    pub backend: u32,
    /// Backend generation.
    pub generation: u32,
    /// Service number.
    pub service: u32,
    /// One of [`service::forward`].
    pub forward: u8,
    /// One of [`flow::state`].
    pub state: u8,
    /// Whether it matches the backend's packets.
    pub from_backend: bool,
}

impl fmt::Display for FlowEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} -> {:?} proto {} leaves as {:?} -> {:?} by {}, backend {}, state {}",
            self.src,
            self.dst,
            self.protocol,
            self.out_src,
            self.out_dst,
            lb_common::names::name_of(lb_common::names::FORWARD, self.forward),
            self.backend,
            lb_common::names::name_of(lb_common::names::STATE, self.state),
        )
    }
}

/// A value of a map, for aya.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Raw<T>(T);

// SAFETY: transparent around a type without padding, for which any bits are a value.
unsafe impl<T: bytemuck::Pod> aya::Pod for Raw<T> {}

/// The real data plane with maps of its own.
pub struct Balancer {
    /// Taken only by `drop`.
    ebpf: Option<Ebpf>,
    /// The services in the maps; service `n` is element `n - 1`.
    pub services: Vec<Service>,
    /// The number of each service's first backend; the others follow.
    first_backend: Vec<u32>,
    /// First slot and room of each service's table.
    tables: Vec<(u32, u32)>,
    lanes: BTreeMap<u32, u64>,
    /// Of backends by service number and index; 1 where there is none.
    generations: BTreeMap<(u32, usize), u32>,
    settings: abi::Settings,
    /// The counters after the last packet, where nothing has moved them since.
    last_counts: Option<Counts>,
}

/// Entries of the flow tables in tests.
///
/// Far more than any test's flows.
const FLOWS: u32 = 32768;
/// Entries of the tables of fragmented datagrams.
const FRAGMENTS: u32 = 2048;
/// Entries of the tables of half-open flows.
const OPENING: u32 = 4096;
/// Entries of the tables of clients.
const CLIENTS: u32 = 8192;
/// Entries of the tables of allowed and denied prefixes.
const PREFIXES: u32 = 8192;
/// Slots of a table for a hash scheduler.
const TABLE_SLOTS: usize = 251;
/// Elements of the maps indexed by service number.
const SERVICES: u32 = 65;
/// Elements of the maps indexed by backend number.
const BACKENDS: u32 = 257;
/// Buckets of the maps that listeners are found in.
const LISTENERS: u32 = 512;

impl Balancer {
    /// Loads the object and puts `services` into its maps.
    ///
    /// # Panics
    /// If the kernel refuses.
    #[must_use]
    pub fn new(services: Vec<Service>) -> Self {
        Self::with_ports(services, (20000, 29999))
    }

    /// As [`Balancer::new`], with a range of source ports for `nat`.
    ///
    /// # Panics
    /// If the kernel refuses.
    #[must_use]
    pub fn with_ports(services: Vec<Service>, ports: (u16, u16)) -> Self {
        let (ebpf, lanes) = idle()
            .lock()
            .expect("no test panics while it takes an object")
            .pop()
            .unwrap_or_else(|| (load(STORES_IN_ORDER), BTreeMap::new()));
        Self::on(ebpf, lanes, services, ports)
    }

    /// As [`Balancer::new`], with the program as it is loaded where CPUs may see the stores of another one in any order. To be
    /// [discarded](Balancer::discard) afterwards.
    ///
    /// # Panics
    /// If the kernel refuses.
    #[must_use]
    pub fn with_stores_in_any_order(services: Vec<Service>) -> Self {
        Self::on(load(0), BTreeMap::new(), services, (20000, 29999))
    }

    fn on(
        ebpf: Ebpf,
        lanes: BTreeMap<u32, u64>,
        services: Vec<Service>,
        ports: (u16, u16),
    ) -> Self {
        let settings = abi::Settings {
            magic: abi::MAGIC,
            abi_version: abi::ABI_VERSION,
            nat_port_first: ports.0,
            nat_port_last: ports.1,
            nat_port_seed: 0x1234_5678,
            flow_sets: flow_table::sets(FLOWS),
            gue_port: GUE_PORT.to_be(),
            ..bytemuck::Zeroable::zeroed()
        };
        let mut balancer = Self {
            ebpf: Some(ebpf),
            services: Vec::new(),
            first_backend: Vec::new(),
            tables: Vec::new(),
            lanes,
            generations: BTreeMap::new(),
            settings,
            last_counts: None,
        };
        balancer.wipe();
        balancer.set("settings", 0, settings);
        balancer.set_interface_mtu(INGRESS, MTU);
        let mut redirects: DevMapHash<&mut MapData> = balancer
            .map("redirects")
            .try_into()
            .expect("redirects is a devmap hash");
        // The value must be a device that exists; a test run does not send to it.
        redirects
            .insert(OTHER_INTERFACE, INGRESS, None, 0)
            .expect("an entry in redirects");
        for family in Family::BOTH {
            balancer.mark(BALANCER.ip(family), LANE_NAT_SOURCE);
        }
        for service in services {
            balancer.add(service);
        }
        balancer
    }

    /// Sends encapsulated packets from addresses in these networks, whose host bits carry the
    /// flow's hash.
    pub fn set_encap_source(&mut self, v4: Option<(Ipv4Addr, u8)>, v6: Option<(Ipv6Addr, u8)>) {
        if let Some((network, bits)) = v4 {
            self.settings.encap_source4 = addr::from_ipv4(network);
            self.settings.encap_mask4 = (u32::MAX >> bits).to_be();
        }
        if let Some((network, bits)) = v6 {
            self.settings.encap_source6 = addr::from_ipv6(network);
            // No more bits than the hash has.
            self.settings.encap_mask6 = (u32::MAX >> bits.saturating_sub(96)).to_be();
        }
        let settings = self.settings;
        self.set("settings", 0, settings);
    }

    /// Lets `nat` send from `sources`, all of one family, instead of each backend's own address.
    pub fn nat_sources(&mut self, sources: &[IpAddr]) {
        for (element, source) in (0_u32..).zip(sources) {
            match source {
                IpAddr::V4(a) => self.set("nat_sources4", element, addr::from_ipv4(*a)),
                IpAddr::V6(a) => self.set("nat_sources6", element, addr::from_ipv6(*a)),
            }
            self.mark(*source, LANE_NAT_SOURCE);
        }
        let count = sources.len() as u8;
        match sources.first() {
            Some(IpAddr::V4(_)) => self.settings.nat_sources4 = count,
            Some(IpAddr::V6(_)) => self.settings.nat_sources6 = count,
            None => {}
        }
        let settings = self.settings;
        self.set("settings", 0, settings);
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &abi::Settings {
        &self.settings
    }

    /// The number of backend `index` of service `service` (a number, from 1).
    #[must_use]
    pub fn backend_number(&self, service: u32, index: usize) -> u32 {
        self.first_backend[service as usize - 1] + index as u32
    }

    /// Adds a service and returns its number.
    pub fn add(&mut self, service: Service) -> u32 {
        self.last_counts = None;
        let number = self.services.len() as u32 + 1;
        let first = self.services.last().map_or(1, |s| {
            self.first_backend[number as usize - 2] + s.backends.len() as u32
        });
        self.first_backend.push(first);
        self.services.push(service.clone());
        for index in 0..service.backends.len() {
            self.write_backend(number, index);
        }
        self.write_service(number);
        let vip = service::Vip {
            flags: service::VIP_ANSWER_ARP,
        };
        match service.vip {
            IpAddr::V4(ip) => self.hash_insert("vips4", addr::from_ipv4(ip), vip),
            IpAddr::V6(ip) => self.hash_insert("vips6", addr::from_ipv6(ip), vip),
        }
        for port in service.port..=service.last_port {
            let (port, protocol) = (port.to_be(), service.protocol);
            match service.vip {
                IpAddr::V4(ip) => {
                    self.listen4(ServiceKey::new(addr::from_ipv4(ip), port, protocol), number);
                }
                IpAddr::V6(ip) => {
                    self.listen6(ServiceKey::new(addr::from_ipv6(ip), port, protocol), number);
                }
            }
        }
        if service.gateway.is_some() {
            self.write_origins(number, &service);
        }
        for (address, bits, allow) in &service.access {
            self.write_access(number, *address, *bits, *allow);
        }
        self.mark(service.vip, LANE_VIP);
        if service.port == 0 {
            self.mark(service.vip, LANE_ANY_PORT);
        }
        if service.stateless {
            self.mark(service.vip, LANE_STATELESS);
        }
        if service.forward == service::forward::DNAT {
            for backend in &service.backends {
                self.mark(backend.ip, LANE_BACKEND);
            }
        }
        number
    }

    fn listen4(&mut self, key: ServiceKey<u32>, number: u32) {
        let places = service::Places::of(&key);
        let buckets = [places.first(LISTENERS), places.second(LISTENERS)];
        let mut listen = |place| {
            let mut bucket: service::Bucket4 = self.get("services4", place);
            let listener = bucket.listeners.iter_mut().find(|l| l.service == 0)?;
            (listener.key, listener.service) = (key, number);
            self.set("services4", place, bucket);
            Some(())
        };
        let listens = buckets.into_iter().find_map(&mut listen);
        listens.expect("few listeners");
    }

    fn listen6(&mut self, key: ServiceKey<[u32; 4]>, number: u32) {
        let places = service::Places::of(&key);
        let buckets = [places.first(LISTENERS), places.second(LISTENERS)];
        let mut listen = |place| {
            let mut bucket: service::Bucket6 = self.get("services6", place);
            let listener = bucket.listeners.iter_mut().find(|l| l.service == 0)?;
            (listener.key, listener.service) = (key, number);
            self.set("services6", place, bucket);
            Some(())
        };
        let listens = buckets.into_iter().find_map(&mut listen);
        listens.expect("few listeners");
    }

    /// What answers of flows that are not recorded are known by.
    fn write_origins(&mut self, number: u32, service: &Service) {
        for (index, backend) in service.backends.iter().enumerate() {
            let (port, protocol) = (backend.port.to_be(), service.protocol);
            let element = self.backend_number(number, index);
            match backend.ip {
                IpAddr::V4(ip) => {
                    let key = ServiceKey::origin(addr::from_ipv4(ip), port, protocol);
                    self.listen4(key, element);
                }
                IpAddr::V6(ip) => {
                    let key = ServiceKey::origin(addr::from_ipv6(ip), port, protocol);
                    self.listen6(key, element);
                }
            }
            self.mark(backend.ip, LANE_ORIGIN);
        }
    }

    /// Writes the way of answers that no flow is recorded for, as it is now.
    pub fn write_gateway(&mut self, number: u32, change: impl FnOnce(&mut service::Gateway)) {
        let service = &self.services[number as usize - 1];
        let host = service.gateway.expect("a service with a gateway");
        let mut l2 = [0u8; 12];
        l2[..6].copy_from_slice(&host.mac);
        l2[6..].copy_from_slice(&BALANCER.mac);
        let mut gateway = service::Gateway {
            vip: addr::from_ip(service.vip),
            l2: bytemuck::cast(l2),
            ifindex: INGRESS,
            port: service.port.to_be(),
            mtu: 1500,
            flags: service::GATEWAY_RESOLVED,
            ..bytemuck::Zeroable::zeroed()
        };
        change(&mut gateway);
        self.set("gateways", number, gateway);
    }

    /// This host has the address.
    pub fn hold(&mut self, address: IpAddr) {
        self.mark(address, LANE_HELD);
    }

    /// Changes a service and writes it anew, with a new table; its backends must stay as many.
    pub fn change(&mut self, number: u32, change: impl FnOnce(&mut Service)) {
        let service = &mut self.services[number as usize - 1];
        let before = service.backends.len();
        change(service);
        assert_eq!(
            before,
            service.backends.len(),
            "backends keep their numbers"
        );
        for index in 0..before {
            self.write_backend(number, index);
        }
        self.write_service(number);
    }

    /// Gives the number of backend `index` to a new backend, as the daemon does: with the next
    /// generation, and without connections.
    pub fn replace_backend(&mut self, service: u32, index: usize) {
        *self.generations.entry((service, index)).or_insert(1) += 1;
        self.write_backend(service, index);
        let number = self.backend_number(service, index);
        self.without_connections(number);
        self.last_counts = None;
    }

    /// Sets the counters of a backend's connections to 0.
    fn without_connections(&mut self, number: u32) {
        let load: backend::Load = self.get("backend_load", number);
        let load = backend::Load {
            weight: load.weight,
            max_connections: load.max_connections,
            ..bytemuck::Zeroable::zeroed()
        };
        self.set("backend_load", number, load);
    }

    fn write_access(&mut self, service: u32, address: IpAddr, bits: u8, allow: bool) {
        let prefix_len = client::SERVICE_BITS + u32::from(bits);
        let rule = if allow { client::ALLOW } else { client::DENY };
        match address {
            IpAddr::V4(ip) => {
                let addr = addr::from_ipv4(ip);
                let data = client::ClientKey { service, addr };
                let key = client::AccessKey { prefix_len, data };
                self.lpm_insert("access4", key, rule);
            }
            IpAddr::V6(ip) => {
                let addr = addr::from_ipv6(ip);
                let data = client::ClientKey { service, addr };
                let key = client::AccessKey { prefix_len, data };
                self.lpm_insert("access6", key, rule);
            }
        }
    }

    /// Sets the MTU of an interface, with the balancer's MAC address; 0: it is not known.
    pub fn set_interface_mtu(&mut self, ifindex: u32, mtu: u16) {
        let mac = BALANCER.mac;
        // Any place will do, if each has its own.
        let link = 1 + ifindex % (service::LINKS - 1);
        let interface = service::Interface { mac, mtu, link };
        self.hash_insert("interfaces", ifindex, interface);
        self.set("links", link, service::ClientLink::new(ifindex, mac));
    }

    /// Takes an interface out of the map of interfaces.
    pub fn forget_interface(&mut self, ifindex: u32) {
        let mut interfaces: BpfHashMap<&mut MapData, u32, Raw<service::Interface>> = self
            .map("interfaces")
            .try_into()
            .unwrap_or_else(|e| panic!("map interfaces is not a hash of these sizes: {e}"));
        interfaces
            .remove(&ifindex)
            .unwrap_or_else(|e| panic!("map interfaces: {e}"));
    }

    /// Sets the flags of a VIP.
    pub fn set_vip_flags(&mut self, vip: IpAddr, flags: u32) {
        match vip {
            IpAddr::V4(ip) => {
                self.hash_insert("vips4", addr::from_ipv4(ip), service::Vip { flags });
            }
            IpAddr::V6(ip) => {
                self.hash_insert("vips6", addr::from_ipv6(ip), service::Vip { flags });
            }
        }
    }

    fn write_backend(&mut self, number: u32, index: usize) {
        let generation = self.generations.get(&(number, index)).copied().unwrap_or(1);
        let b = self.services[number as usize - 1].backends[index].clone();
        let mut l2 = [0u8; 12];
        l2[..6].copy_from_slice(&b.mac);
        l2[6..].copy_from_slice(&BALANCER.mac);
        let (family, source) = match b.ip {
            IpAddr::V4(_) => (addr::FAMILY_V4, BALANCER.ip(Family::V4)),
            IpAddr::V6(_) => (addr::FAMILY_V6, BALANCER.ip(Family::V6)),
        };
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        let record = backend::Backend {
            addr: addr::from_ip(b.ip),
            source: addr::from_ip(source),
            l2: bytemuck::cast(l2),
            ifindex: b.ifindex,
            service: number,
            tags: b.tags,
            generation: u16::try_from(generation).expect("few replacements"),
            port: b.port.to_be(),
            family,
            flags: flag(b.resolved, backend::BACKEND_RESOLVED)
                | flag(b.alive, backend::BACKEND_ALIVE),
            mtu: u16::try_from(b.mtu.saturating_sub(service::forward::overhead(
                self.services[number as usize - 1].forward,
                family,
            )))
            .expect("an MTU of IP"),
        };
        let element = self.backend_number(number, index);
        self.set("backends", element, record);
        let load = backend::Load {
            weight: in_force(&b),
            max_connections: b.max_connections,
            ..self.get("backend_load", element)
        };
        self.set("backend_load", element, load);
    }

    fn write_service(&mut self, number: u32) {
        let s = self.services[number as usize - 1].clone();
        let table = selection_table(&s);
        let members = members(&s);
        // The list of members lies behind the table.
        let room = (table.len() + members.len()) as u32;
        let end = self.tables.iter().map(|(first, room)| first + room).max();
        let fresh = (end.unwrap_or(0), room);
        let place = number as usize - 1;
        match self.tables.get_mut(place) {
            Some(old) if old.1 >= room => {}
            Some(old) => *old = fresh,
            None => self.tables.push(fresh),
        }
        let first = self.tables[place].0;
        for (i, index) in table.iter().chain(&members).enumerate() {
            let backend = self.backend_number(number, *index);
            self.set(
                "slots",
                first + i as u32,
                backend::Slot {
                    backend,
                    previous: match s.previous {
                        None => backend,
                        Some(Previous::Closing) => backend::NO_BACKEND,
                        Some(Previous::Backend(index)) => self.backend_number(number, index),
                    },
                },
            );
        }
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let record = service::Service {
            table: service::Service::pack_table(first, table.len() as u32),
            members: service::Service::pack_table(first + table.len() as u32, members.len() as u32),
            connect_timeout: s.connect_timeout,
            forward: s.forward,
            scheduler: s.scheduler,
            on_no_backend: s.on_no_backend,
            on_backend_down: s.on_backend_down,
            flags: flag(s.stateless, service::SERVICE_STATELESS)
                | flag(s.plural, service::SERVICE_PLURAL)
                | flag(s.is_limited(), service::SERVICE_LIMITED)
                | flag(!s.access.is_empty(), service::SERVICE_LISTED)
                | flag(
                    !s.access.is_empty() || s.source_rate != 0,
                    service::SERVICE_GUARDED,
                ),
            affinity: s.affinity,
            affinity_mask: mask(s.affinity_mask),
            source_rate: s.source_rate,
            ..bytemuck::Zeroable::zeroed()
        };
        self.set("services", number, record);
        if s.gateway.is_some() {
            self.write_gateway(number, |_| {});
        }
    }

    fn mark(&mut self, ip: IpAddr, bit: u8) {
        let lane = match ip {
            IpAddr::V4(ip) => lane_of(addr::from_ipv4(ip)),
            IpAddr::V6(ip) => lane_of(addr::from_ipv6(ip)),
        };
        let (element, shift) = place(lane);
        let lanes = self.lanes.entry(element).or_default();
        *lanes |= u64::from(bit) << shift;
        let lanes = *lanes;
        self.set("address_filter", element, lanes);
    }

    fn map(&mut self, name: &str) -> &mut Map {
        self.ebpf_mut()
            .map_mut(name)
            .unwrap_or_else(|| panic!("the object has no map {name}"))
    }

    fn set<T: bytemuck::Pod>(&mut self, map: &str, element: u32, value: T) {
        let mut array: Array<&mut MapData, Raw<T>> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not an array of this size: {e}"));
        array
            .set(element, Raw(value), 0)
            .unwrap_or_else(|e| panic!("map {map}, element {element}: {e}"));
    }

    fn get<T: bytemuck::Pod>(&self, map: &str, element: u32) -> T {
        let array: Array<&MapData, Raw<T>> = self
            .ebpf()
            .map(map)
            .and_then(|m| m.try_into().ok())
            .unwrap_or_else(|| panic!("map {map} is not an array of this size"));
        array
            .get(&element, 0)
            .unwrap_or_else(|e| panic!("map {map}, element {element}: {e}"))
            .0
    }

    fn per_cpu<T: bytemuck::Pod>(&self, map: &str, element: u32) -> Vec<T> {
        let array: PerCpuArray<&MapData, Raw<T>> = self
            .ebpf()
            .map(map)
            .and_then(|m| m.try_into().ok())
            .unwrap_or_else(|| panic!("map {map} is not a per-CPU array of this size"));
        let values = array
            .get(&element, 0)
            .unwrap_or_else(|e| panic!("map {map}, element {element}: {e}"));
        values.iter().map(|v| v.0).collect()
    }

    fn hash_insert<K: bytemuck::Pod, V: bytemuck::Pod>(&mut self, map: &str, key: K, value: V) {
        let mut hash: BpfHashMap<&mut MapData, Raw<K>, Raw<V>> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a hash of these sizes: {e}"));
        hash.insert(Raw(key), Raw(value), 0)
            .unwrap_or_else(|e| panic!("map {map}: {e}"));
    }

    fn lpm_insert<A: addr::Address>(&mut self, map: &str, key: client::AccessKey<A>, rule: u32)
    where
        client::ClientKey<A>: bytemuck::Pod,
    {
        let mut trie: LpmTrie<&mut MapData, Raw<client::ClientKey<A>>, u32> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a trie of these sizes: {e}"));
        let key = lpm_trie::Key::new(key.prefix_len, Raw(key.data));
        trie.insert(&key, rule, 0)
            .unwrap_or_else(|e| panic!("map {map}: {e}"));
    }

    fn clear_trie<A: addr::Address>(&mut self, map: &str)
    where
        client::ClientKey<A>: bytemuck::Pod,
    {
        let mut trie: LpmTrie<&mut MapData, Raw<client::ClientKey<A>>, u32> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a trie of these sizes: {e}"));
        let keys: Vec<_> = trie.keys().collect();
        for key in keys {
            let key = key.unwrap_or_else(|e| panic!("map {map}: {e}"));
            trie.remove(&key)
                .unwrap_or_else(|e| panic!("map {map}: {e}"));
        }
    }

    /// Makes what is known of clients' backends older by `ticks`.
    pub fn age_clients(&mut self, ticks: u32) {
        self.age_affinity::<u32>("affinity4", ticks);
        self.age_affinity::<[u32; 4]>("affinity6", ticks);
    }

    fn age_affinity<A>(&mut self, map: &str, ticks: u32)
    where
        A: addr::Address,
        client::ClientKey<A>: bytemuck::Pod,
    {
        type Clients<M, A> = BpfHashMap<M, Raw<client::ClientKey<A>>, Raw<client::Affinity>>;
        let mut hash: Clients<&mut MapData, A> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a hash of these sizes: {e}"));
        let entries: Vec<_> = hash.iter().collect();
        for entry in entries {
            let (key, mut client) = entry.unwrap_or_else(|e| panic!("map {map}: {e}"));
            client.0.last_seen = client.0.last_seen.wrapping_sub(ticks);
            hash.insert(key, client, 0)
                .unwrap_or_else(|e| panic!("map {map}: {e}"));
        }
    }

    fn clear_opening(&mut self) {
        self.clear_hash::<flow::FlowKey<u32>, flow::Flow<u32>>("opening4");
        self.clear_hash::<flow::FlowKey<[u32; 4]>, flow::Flow<[u32; 4]>>("opening6");
        self.set("last_opening", 0, 0_u32);
    }

    /// Lets each CPU record so many new flows a second; 0: as many as come.
    pub fn set_new_flows(&mut self, rate: u32) {
        self.settings.new_flows = rate;
        let settings = self.settings;
        self.set("settings", 0, settings);
    }

    /// Leaves so many sets of the flow table in use.
    pub fn set_flow_sets(&mut self, sets: u32) {
        self.settings.flow_sets = sets;
        let settings = self.settings;
        self.set("settings", 0, settings);
    }

    /// All half-open flows that began under pressure, of a family, sorted.
    #[must_use]
    pub fn opening(&self, family: Family) -> Vec<FlowEntry> {
        self.half_open(family)
    }

    fn clear_clients(&mut self) {
        self.clear_hash::<client::ClientKey<u32>, client::Affinity>("affinity4");
        self.clear_hash::<client::ClientKey<[u32; 4]>, client::Affinity>("affinity6");
        self.clear_hash::<client::ClientKey<u32>, client::Source>("sources4");
        self.clear_hash::<client::ClientKey<[u32; 4]>, client::Source>("sources6");
    }

    /// Everything counted so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let sum = |map: &str, n: u32| {
            let mut total = Counters::default();
            for c in self.per_cpu::<Counters>(map, n) {
                total += c;
            }
            total
        };
        let backends: u32 = self.services.iter().map(|s| s.backends.len() as u32).sum();
        Counts {
            services: (0..=self.services.len() as u32)
                .map(|n| (n, sum("service_stats", n)))
                .collect(),
            backends: (0..=backends)
                .map(|n| (n, sum("backend_stats", n)))
                .collect(),
            drops: DropReason::ALL
                .iter()
                .map(|r| {
                    (
                        r.name(),
                        self.per_cpu::<u64>("drops", *r as u32).iter().sum(),
                    )
                })
                .filter(|(_, n)| *n != 0)
                .collect(),
            load: (0..=backends)
                .map(|n| {
                    let load: backend::Load = self.get("backend_load", n);
                    (n, (load.active(), load.inactive()))
                })
                .filter(|(_, load)| *load != (0, 0))
                .collect(),
        }
    }

    /// Runs the program on a frame.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run(&mut self, frame: &[u8]) -> Outcome {
        let before = self.last_counts.take().unwrap_or_else(|| self.counts());
        let (verdict, frame) = self.run_uncounted(frame);
        let after = self.counts();
        let counts = after.since(&before);
        self.last_counts = Some(after);
        Outcome {
            verdict,
            frame,
            counts,
        }
    }

    /// As [`Balancer::run`], with no room in front of the frame for it to grow: what a driver would
    /// leave there is taken by metadata.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run_without_headroom(&mut self, frame: &[u8]) -> Outcome {
        let before = self.last_counts.take().unwrap_or_else(|| self.counts());
        // All of the 256 bytes in front of the frame but those of the kernel's own struct xdp_frame.
        let metadata = [0; 216];
        let data = [&metadata, frame].concat();
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let context = [metadata.len() as u32, data.len() as u32, 0, 0, 0, 0];
        let mut out = vec![0; data.len() + 256];
        let result = self
            .program()
            .test_run(TestRunOptions {
                data_in: Some(&data),
                data_out: Some(&mut out),
                ctx_in: Some(bytemuck::bytes_of(&context)),
                ..TestRunOptions::default()
            })
            .unwrap_or_else(|e| panic!("test run of {} bytes: {}", frame.len(), chain(&e)));
        out.truncate(result.data_size_out as usize);
        let after = self.counts();
        let counts = after.since(&before);
        self.last_counts = Some(after);
        Outcome {
            verdict: Verdict::of(result.return_value),
            frame: out.split_off(metadata.len()),
            counts,
        }
    }

    /// Runs the program without looking at the counters.
    ///
    /// # Panics
    /// If the kernel does not run it.
    pub fn run_uncounted(&mut self, frame: &[u8]) -> (Verdict, Vec<u8>) {
        self.last_counts = None;
        run_program(self.program(), frame)
    }

    /// Runs lists of frames at the same time, each list on a CPU of its own as far as there are
    /// any. Returns what became of each frame.
    ///
    /// # Panics
    /// If the kernel does not run one.
    pub fn run_parallel(&mut self, lists: &[Vec<Vec<u8>>]) -> Vec<Vec<(Verdict, Vec<u8>)>> {
        self.last_counts = None;
        let program = self.program();
        let start = Barrier::new(lists.len());
        std::thread::scope(|scope| {
            let threads: Vec<_> = lists
                .iter()
                .enumerate()
                .map(|(n, frames)| {
                    let start = &start;
                    scope.spawn(move || {
                        stay_on_cpu(n);
                        start.wait();
                        frames.iter().map(|f| run_program(program, f)).collect()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("every frame is run"))
                .collect()
        })
    }

    fn program(&self) -> &Xdp {
        self.ebpf()
            .program("sluice_xdp")
            .and_then(|p| p.try_into().ok())
            .expect("sluice_xdp was loaded")
    }

    /// Runs the program on a packet.
    pub fn send(&mut self, packet: &Packet) -> Outcome {
        self.run(&packet.build())
    }

    /// Sends a frame and asserts verdict, whole output and exact counter changes.
    ///
    /// # Panics
    /// With a sentence for everything that is not as expected.
    #[track_caller]
    pub fn check(&mut self, what: &str, sent: &impl Frame, expected: &Expected, counts: &Counts) {
        let sent = sent.frame();
        let outcome = self.run(&sent);
        let (verdict, frame) = match expected {
            Expected::Sent(frame) => (Verdict::Tx, Some(frame)),
            Expected::Redirected(frame) => (Verdict::Redirect, Some(frame)),
            Expected::Passed => (Verdict::Pass, Some(&sent)),
            Expected::Dropped => (Verdict::Drop, None),
        };
        assert_eq!(
            outcome.verdict, verdict,
            "{what}: the verdict is not as expected; counted: {:?}",
            outcome.counts
        );
        if let Some(frame) = frame {
            oracle::assert_frame(what, frame, &outcome.frame);
        }
        assert_eq!(
            outcome.counts, *counts,
            "{what}: the counters moved otherwise than expected"
        );
    }

    /// As [`Balancer::check`] for the first packet of a flow; `expected` is told the source port
    /// that `nat` took, which is checked to be in range. Returns that port.
    ///
    /// # Panics
    /// With a sentence for everything that is not as expected.
    #[track_caller]
    pub fn check_new(
        &mut self,
        what: &str,
        sent: &impl Frame,
        expected: impl FnOnce(u16) -> Expected,
        counts: &Counts,
    ) -> u16 {
        let frame = sent.frame();
        let outcome = self.run(&frame);
        assert!(
            matches!(outcome.verdict, Verdict::Tx | Verdict::Redirect),
            "{what}: the packet was not forwarded but {:?}; counted: {:?}",
            outcome.verdict,
            outcome.counts
        );
        let (port, _) = oracle::ports(&outcome.frame)
            .unwrap_or_else(|| panic!("{what}: the packet left without ports"));
        let range = self.settings.nat_port_first..=self.settings.nat_port_last;
        assert!(
            range.contains(&port),
            "{what}: source port {port} is outside {range:?}"
        );
        let (verdict, frame) = match expected(port) {
            Expected::Sent(frame) => (Verdict::Tx, frame),
            Expected::Redirected(frame) => (Verdict::Redirect, frame),
            other => panic!("{what}: a new flow is not expected to be {other:?}"),
        };
        assert_eq!(
            outcome.verdict, verdict,
            "{what}: the verdict is not as expected"
        );
        oracle::assert_frame(what, &frame, &outcome.frame);
        assert_eq!(
            outcome.counts, *counts,
            "{what}: the counters moved otherwise than expected"
        );
        port
    }

    /// The load of a backend, by its number.
    #[must_use]
    pub fn load_of(&self, backend: u32) -> backend::Load {
        self.get("backend_load", backend)
    }

    /// Established connections and UDP flows that had to make room for others, also in tests before this one.
    #[must_use]
    pub fn displaced(&self) -> u64 {
        let of_cpus = self.per_cpu::<abi::Pressure>("pressure", 0);
        of_cpus.iter().map(|pressure| pressure.displaced).sum()
    }

    /// All flows of a family, sorted.
    #[must_use]
    pub fn flows(&self, family: Family) -> Vec<FlowEntry> {
        let mut entries: Vec<_> = self.placed(family).into_iter().map(|(_, f)| f).collect();
        entries.sort();
        entries
    }

    /// The flow table of a family, and the set of each entry.
    pub fn placed(&self, family: Family) -> Vec<(u32, FlowEntry)> {
        let set = |place: u32| place / flow_table::WAYS;
        match family {
            Family::V4 => self
                .recorded::<u32>()
                .iter()
                .map(|(place, k, f)| (set(*place), readable(k, f)))
                .collect(),
            Family::V6 => self
                .recorded::<[u32; 4]>()
                .iter()
                .map(|(place, k, f)| (set(*place), readable(k, f)))
                .collect(),
        }
    }

    /// The half-open flows of a family, sorted.
    fn half_open(&self, family: Family) -> Vec<FlowEntry> {
        let mut entries: Vec<_> = match family {
            Family::V4 => self
                .raw_flows::<u32>("opening4")
                .iter()
                .map(|(k, f)| readable(k, f))
                .collect(),
            Family::V6 => self
                .raw_flows::<[u32; 4]>("opening6")
                .iter()
                .map(|(k, f)| readable(k, f))
                .collect(),
        };
        entries.sort();
        entries
    }

    /// All entries of a table of half-open flows as they are.
    fn raw_flows<A>(&self, map: &str) -> Vec<(flow::FlowKey<A>, flow::Flow<A>)>
    where
        A: addr::Address,
        flow::FlowKey<A>: bytemuck::Pod,
        flow::Flow<A>: bytemuck::Pod,
    {
        let hash: BpfHashMap<&MapData, Raw<flow::FlowKey<A>>, Raw<flow::Flow<A>>> = self
            .ebpf()
            .map(map)
            .and_then(|m| m.try_into().ok())
            .unwrap_or_else(|| panic!("map {map} is not a hash of these sizes"));
        hash.iter()
            .map(|entry| {
                let (key, value) = entry.unwrap_or_else(|e| panic!("map {map}: {e}"));
                (key.0, value.0)
            })
            .collect()
    }

    /// Makes every flow older by `ticks`, as if so much time had passed.
    pub fn age_flows(&mut self, ticks: u32) {
        self.age_recorded::<u32>(ticks);
        self.age_recorded::<[u32; 4]>(ticks);
    }

    fn age_recorded<A: addr::Address>(&mut self, ticks: u32)
    where
        flow_table::Entry<A>: bytemuck::Pod,
        flow::FlowKey<A>: bytemuck::Pod,
        flow::Flow<A>: bytemuck::Pod,
    {
        let [map, _] = flow_maps::<A>();
        for (place, key, mut flow) in self.recorded::<A>() {
            if flow.direction == flow::DIRECTION_CLIENT {
                flow.created_or_tags = flow.created().wrapping_sub(ticks);
            }
            flow.last_seen = flow.last_seen.wrapping_sub(ticks);
            let empty = flow_table::Entry::<A>::zeroed();
            self.set(map, place, flow_table::Entry { key, flow, ..empty });
        }
    }

    /// The flow table of a family: places, keys and values.
    fn recorded<A: addr::Address>(&self) -> Vec<(u32, flow::FlowKey<A>, flow::Flow<A>)>
    where
        flow_table::Entry<A>: bytemuck::Pod,
        flow::FlowKey<A>: bytemuck::Pod,
        flow::Flow<A>: bytemuck::Pod,
    {
        let fd = |name: &str| match self.ebpf().map(name) {
            Some(Map::Array(map)) => map.fd().as_fd(),
            _ => panic!("the object has no array {name}"),
        };
        let [entries, sets] = flow_maps::<A>();
        let mut recorded = Vec::new();
        FlowTable::new(fd(entries), fd(sets), fd("settings"))
            .and_then(|table| table.each(|place, key, flow| recorded.push((place, *key, *flow))))
            .unwrap_or_else(|e| panic!("map {entries}: {e}"));
        recorded
    }

    fn clear_recorded<A: addr::Address>(&mut self)
    where
        flow_table::Entry<A>: bytemuck::Pod,
        flow::FlowKey<A>: bytemuck::Pod,
        flow::Flow<A>: bytemuck::Pod,
    {
        let [map, tags] = flow_maps::<A>();
        for (place, ..) in self.recorded::<A>() {
            self.set(map, place, flow_table::Entry::<A>::zeroed());
            self.set(tags, place / flow_table::WAYS, 0_u64);
        }
    }

    /// Makes every fragmented datagram older by `ticks`.
    pub fn age_fragments(&mut self, ticks: u32) {
        self.age_datagrams::<u32>("fragments4", ticks);
        self.age_datagrams::<[u32; 4]>("fragments6", ticks);
    }

    fn age_datagrams<A>(&mut self, map: &str, ticks: u32)
    where
        A: addr::Address,
        fragment::FragmentKey<A>: bytemuck::Pod,
        fragment::Datagram<A>: bytemuck::Pod,
    {
        type Fragments<M, A> =
            BpfHashMap<M, Raw<fragment::FragmentKey<A>>, Raw<fragment::Datagram<A>>>;
        let mut hash: Fragments<&mut MapData, A> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a hash of these sizes: {e}"));
        let entries: Vec<_> = hash.iter().collect();
        for entry in entries {
            let (key, mut datagram) = entry.unwrap_or_else(|e| panic!("map {map}: {e}"));
            datagram.0.created = datagram.0.created.wrapping_sub(ticks);
            hash.insert(key, datagram, 0)
                .unwrap_or_else(|e| panic!("map {map}: {e}"));
        }
    }

    fn clear_fragments(&mut self) {
        self.clear_hash::<fragment::FragmentKey<u32>, fragment::Datagram<u32>>("fragments4");
        self.clear_hash::<fragment::FragmentKey<[u32; 4]>, fragment::Datagram<[u32; 4]>>(
            "fragments6",
        );
    }

    /// Forgets all flows, fragments, connections and round-robin positions; counters stay.
    pub fn reset(&mut self) {
        self.clear_recorded::<u32>();
        self.clear_recorded::<[u32; 4]>();
        self.clear_opening();
        self.clear_fragments();
        self.clear_clients();
        let backends: u32 = self.services.iter().map(|s| s.backends.len() as u32).sum();
        for number in 1..=backends {
            self.without_connections(number);
        }
        self.zero::<service::Cursor>("cursors", self.services.len() as u32 + 1);
    }

    /// Makes the maps as a fresh object has them, but for the counters.
    fn wipe(&mut self) {
        self.clear_recorded::<u32>();
        self.clear_recorded::<[u32; 4]>();
        self.clear_opening();
        self.clear_fragments();
        self.clear_clients();
        self.clear_trie::<u32>("access4");
        self.clear_trie::<[u32; 4]>("access6");
        self.clear_hash::<u32, service::Vip>("vips4");
        self.clear_hash::<[u32; 4], service::Vip>("vips6");
        self.zero::<service::Bucket4>("services4", LISTENERS);
        self.zero::<service::Bucket6>("services6", LISTENERS);
        self.zero::<backend::Load>("backend_load", BACKENDS);
        self.zero::<backend::Backend>("backends", BACKENDS);
        self.zero::<service::Cursor>("cursors", SERVICES);
        self.zero::<service::Gateway>("gateways", SERVICES);
        self.zero::<service::Service>("services", SERVICES);
        for element in std::mem::take(&mut self.lanes).into_keys() {
            self.set("address_filter", element, 0u64);
        }
    }

    fn zero<T: bytemuck::Pod>(&mut self, map: &str, elements: u32) {
        for element in 0..elements {
            self.set(map, element, T::zeroed());
        }
    }

    fn clear_hash<K: bytemuck::Pod, V: bytemuck::Pod>(&mut self, map: &str) {
        let mut hash: BpfHashMap<&mut MapData, Raw<K>, Raw<V>> = self
            .map(map)
            .try_into()
            .unwrap_or_else(|e| panic!("map {map} is not a hash of these sizes: {e}"));
        let keys: Vec<_> = hash.keys().collect();
        for key in keys {
            let key = key.unwrap_or_else(|e| panic!("map {map}: {e}"));
            hash.remove(&key)
                .unwrap_or_else(|e| panic!("map {map}: {e}"));
        }
    }

    /// Gives up the object: no other test shall find it as this one left it.
    pub fn discard(mut self) {
        self.ebpf = None;
    }

    fn ebpf(&self) -> &Ebpf {
        self.ebpf.as_ref().expect("taken only by drop")
    }

    fn ebpf_mut(&mut self) -> &mut Ebpf {
        self.ebpf.as_mut().expect("taken only by drop")
    }
}

fn run_program(program: &Xdp, frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut out = vec![0; frame.len() + 256];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        })
        .unwrap_or_else(|e| panic!("test run of {} bytes: {}", frame.len(), chain(&e)));
    out.truncate(result.data_size_out as usize);
    (Verdict::of(result.return_value), out)
}

/// Binds the calling thread to a CPU, where there are so many.
fn stay_on_cpu(n: usize) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: a set of CPUs is plain memory, and the call changes this thread only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(n % cpus, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Objects in the kernel that no test uses at the moment. To verify a program takes longer than
/// most tests, so an object is used again after its maps have been wiped.
fn idle() -> &'static Mutex<Vec<(Ebpf, BTreeMap<u32, u64>)>> {
    static IDLE: Mutex<Vec<(Ebpf, BTreeMap<u32, u64>)>> = Mutex::new(Vec::new());
    &IDLE
}

fn load(stores_in_order: u32) -> Ebpf {
    let mut loader = EbpfLoader::new();
    for (name, entries) in [
        ("vips4", 64),
        ("vips6", 64),
        ("services4", LISTENERS),
        ("services6", LISTENERS),
        ("services", SERVICES),
        ("cursors", SERVICES),
        ("gateways", SERVICES),
        ("service_stats", SERVICES),
        ("backends", BACKENDS),
        ("backend_load", BACKENDS),
        ("backend_stats", BACKENDS),
        ("flows4", flow_table::sets(FLOWS) * flow_table::WAYS),
        ("flows6", flow_table::sets(FLOWS) * flow_table::WAYS),
        ("flow_sets4", flow_table::sets(FLOWS)),
        ("flow_sets6", flow_table::sets(FLOWS)),
        ("opening4", OPENING),
        ("opening6", OPENING),
        ("fragments4", FRAGMENTS),
        ("fragments6", FRAGMENTS),
        ("affinity4", CLIENTS),
        ("affinity6", CLIENTS),
        ("sources4", CLIENTS),
        ("sources6", CLIENTS),
        ("access4", PREFIXES),
        ("access6", PREFIXES),
    ] {
        loader.map_max_entries(name, entries);
    }
    let mut ebpf = loader
        .override_global("BUCKETS", &LISTENERS, true)
        .override_global("STORES_IN_ORDER", &stores_in_order, true)
        .load(sluice::dataplane::OBJECT)
        .unwrap_or_else(|e| panic!("the object does not load: {}", chain(&e)));
    let program: &mut Xdp = ebpf
        .program_mut("sluice_xdp")
        .expect("the object has program sluice_xdp")
        .try_into()
        .expect("sluice_xdp is an XDP program");
    program
        .load()
        .unwrap_or_else(|e| panic!("the verifier refuses sluice_xdp: {}", chain(&e)));
    ebpf
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // After a failure the maps may be in any state; the kernel frees the object.
        if std::thread::panicking() {
            return;
        }
        if let (Some(ebpf), Ok(mut idle)) = (self.ebpf.take(), idle().lock()) {
            idle.push((ebpf, std::mem::take(&mut self.lanes)));
        }
    }
}

/// The maps of a family's flow table: its entries, and the tags of its sets.
fn flow_maps<A: addr::Address>() -> [&'static str; 2] {
    if A::FAMILY == addr::FAMILY_V4 {
        ["flows4", "flow_sets4"]
    } else {
        ["flows6", "flow_sets6"]
    }
}

fn readable<A: addr::Address>(key: &flow::FlowKey<A>, value: &flow::Flow<A>) -> FlowEntry {
    let ip = |a: A| addr::to_ip(A::FAMILY, &a.widen());
    FlowEntry {
        src: (ip(key.src), u16::from_be(key.sport)),
        dst: (ip(key.dst), u16::from_be(key.dport)),
        protocol: key.protocol,
        out_src: (ip(value.src), u16::from_be(value.sport)),
        out_dst: (ip(value.dst), u16::from_be(value.dport)),
        backend: value.backend,
        generation: value.generation.into(),
        service: value.service,
        forward: value.forward,
        state: value.state,
        from_backend: value.direction == flow::DIRECTION_BACKEND,
    }
}

/// The selection table of a service, as indices of its backends. The tests' own, so that what the
/// data plane reads does not depend on how the daemon fills it.
#[must_use]
pub fn selection_table(service: &Service) -> Vec<usize> {
    let weights: Vec<u32> = service.backends.iter().map(in_force).collect();
    match service.scheduler {
        service::scheduler::ROUND_ROBIN | service::scheduler::RANDOM => smooth_sequence(&weights),
        service::scheduler::LEAST_CONNECTIONS => members(service),
        _ => spread_table(&weights, TABLE_SLOTS),
    }
}

/// The first `bits` bits of an address, as a record has them; those an address does not have count
/// for nothing.
fn mask(bits: u8) -> [u32; 4] {
    let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
    addr::from_ipv6(mask.into())
}

/// The weight in force of a backend.
fn in_force(backend: &Backend) -> u32 {
    if backend.alive { backend.weight } else { 0 }
}

/// The backends of a service that take new flows, as indices.
#[must_use]
pub fn members(service: &Service) -> Vec<usize> {
    let backends = service.backends.iter().enumerate();
    let members = backends.filter(|(_, backend)| in_force(backend) > 0);
    members.map(|(index, _)| index).collect()
}

/// The smooth weighted round-robin sequence of one period, as nginx places it: in each step every
/// backend gains its weight, the richest is taken and pays the sum.
#[must_use]
pub fn smooth_sequence(weights: &[u32]) -> Vec<usize> {
    let total: i64 = weights.iter().map(|w| i64::from(*w)).sum();
    let mut credit = vec![0i64; weights.len()];
    (0..total)
        .map(|_| {
            for (c, w) in credit.iter_mut().zip(weights) {
                *c += i64::from(*w);
            }
            let best = (0..credit.len())
                .filter(|i| weights[*i] > 0)
                .max_by_key(|i| (credit[*i], std::cmp::Reverse(*i)))
                .expect("a positive total has a positive weight");
            credit[best] -= total;
            best
        })
        .collect()
}

/// A table of `slots` slots in which each backend has its exact share, mixed so that neighbouring
/// slots differ. What a hash scheduler reads; how the daemon fills its tables is tested elsewhere.
#[must_use]
pub fn spread_table(weights: &[u32], slots: usize) -> Vec<usize> {
    let sequence = smooth_sequence(weights);
    if sequence.is_empty() {
        return Vec::new();
    }
    (0..slots).map(|i| sequence[i % sequence.len()]).collect()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text = format!("{text}: {e}");
        source = e.source();
    }
    text
}

/// An IPv4 address in the range tests use.
#[must_use]
pub fn v4(net: u8, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(198, 18, net, host))
}

/// An IPv6 address in the range tests use.
#[must_use]
pub fn v6(net: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host))
}
