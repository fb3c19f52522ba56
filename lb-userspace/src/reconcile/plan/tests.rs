//! Plans carried out on maps made of ordinary collections, looked at after every single step.

mod gateways;

use super::*;
use crate::config::Listen;
use lb_common::{
    backend::NO_BACKEND,
    service::{on_backend_down, on_no_backend},
};
use proptest::prelude::*;
use std::{collections::BTreeMap, time::Duration};

/// How long a flow may be silent.
const WINDOW: Duration = Duration::from_secs(60);

/// The maps.
#[derive(Clone, Debug, Default, PartialEq)]
struct Fake {
    lanes: BTreeMap<u32, u64>,
    backends: BTreeMap<u32, BackendRecord>,
    services: BTreeMap<u32, ServiceRecord>,
    slots: BTreeMap<u32, Slot>,
    /// Weight and most connections of each backend.
    shares: BTreeMap<u32, (u32, u32)>,
    /// What decides about clients, by service.
    access: HashMap<u32, BTreeMap<Prefix, bool>>,
    /// By VIP, port and protocol; port 0 is every port.
    keys: BTreeMap<(IpAddr, u16, Protocol), u32>,
    gateways: BTreeMap<u32, GatewayRecord>,
    origins: BTreeMap<Origin, u32>,
    vips: BTreeMap<IpAddr, u32>,
}

impl Fake {
    /// Carries out one step, and checks what a packet would meet right after it.
    fn step(&mut self, op: &Op) {
        match op {
            Op::Lanes { element, value } => {
                self.lanes.insert(*element, *value);
            }
            Op::ResetService { .. } | Op::ResetBackend { .. } => {}
            Op::Share {
                number,
                weight,
                max_connections,
            } => {
                self.shares.insert(*number, (*weight, *max_connections));
            }
            Op::Backend { number, record } => {
                self.backends.insert(*number, *record);
            }
            Op::Access {
                number,
                prefix,
                allow,
            } => {
                let rules = self.access.entry(*number).or_default();
                match allow {
                    Some(allow) => rules.insert(*prefix, *allow),
                    None => rules.remove(prefix),
                };
                if rules.is_empty() {
                    self.access.remove(number);
                }
            }
            Op::Slots { first, slots } => self.slots.extend((*first..).zip(slots.iter().copied())),
            Op::Reslot { first, changes } => {
                for (place, slot) in changes {
                    self.slots.insert(first + place, *slot);
                }
            }
            Op::Service { number, record } => {
                self.services.insert(*number, *record);
            }
            Op::Vip { address, flags } => {
                self.vips.insert(*address, *flags);
            }
            Op::Publish { id, number } => {
                for key in keys_of(id) {
                    let before = self.keys.insert(key, *number);
                    assert_ne!(
                        before,
                        Some(*number),
                        "{key:?} is published again by {op:?}"
                    );
                }
            }
            Op::Withdraw { id } => {
                for key in keys_of(id) {
                    assert!(
                        self.keys.remove(&key).is_some(),
                        "{key:?} is not there: {op:?}"
                    );
                }
            }
            Op::Gateway { number, record } => {
                if *record == no_gateway() {
                    self.gateways.remove(number);
                } else {
                    self.gateways.insert(*number, *record);
                }
            }
            Op::PublishOrigin {
                address,
                protocol,
                number,
            } => {
                let before = self.origins.insert((*address, *protocol), *number);
                assert_ne!(before, Some(*number), "published again: {op:?}");
            }
            Op::WithdrawOrigin { address, protocol } => {
                let before = self.origins.remove(&(*address, *protocol));
                assert!(before.is_some(), "not there: {op:?}");
            }
            Op::RemoveVip { address } => {
                self.vips.remove(address);
            }
        }
        self.check(op);
    }

    fn check(&self, op: &Op) {
        self.check_gateways(op);
        for ((ip, port, _), number) in &self.keys {
            let service = &self.services[number];
            for slot in [service.table, service.members].iter().flat_map(|table| {
                let (first, len) = ServiceRecord::unpack_table(*table);
                first..first + len
            }) {
                let slot_now = self.slots[&slot];
                let backend = slot_now.unrecorded();
                if backend == NO_BACKEND && service.flags & SERVICE_STATELESS != 0 {
                    continue;
                }
                assert_ne!(backend, NO_BACKEND, "after {op:?}");
                assert_eq!(
                    self.backends[&backend].service, *number,
                    "slot {slot} names a backend of another service after {op:?}"
                );
            }
            assert!(self.vips.contains_key(ip), "after {op:?}");
            assert!(self.lane(*ip) & LANE_VIP != 0, "after {op:?}");
            if *port == 0 {
                assert!(self.lane(*ip) & LANE_ANY_PORT != 0, "after {op:?}");
            }
        }
    }

    fn lane(&self, address: IpAddr) -> u8 {
        let (element, shift) = lb_common::filter::place(super::super::filter::lane_of(address));
        (self.lanes.get(&element).copied().unwrap_or(0) >> shift) as u8
    }

    /// What a new daemon would find.
    fn found(&self) -> Found {
        let services: Vec<(ServiceKey, u32)> = self
            .keys
            .iter()
            .map(|((ip, port, protocol), number)| {
                let (ip, ports, protocol) = (*ip, Ports::span(*port, *port), *protocol);
                let listen = Listen { ip, ports };
                (ServiceKey { listen, protocol }, *number)
            })
            .collect();
        let tables = self
            .services
            .values()
            .flat_map(|service| [service.table, service.members])
            .filter(|table| *table != 0)
            .map(|table| {
                let (first, len) = ServiceRecord::unpack_table(table);
                let slots = (first..first + len).map(|slot| self.slots[&slot]);
                (first, slots.collect())
            })
            .collect();
        Found {
            records: services
                .iter()
                .map(|(_, number)| (*number, self.services[number]))
                .collect(),
            services,
            backends: self.backends.iter().map(|(n, r)| (*n, *r)).collect(),
            tables,
            access: self.access.clone(),
            gateways: self.gateways.iter().map(|(n, r)| (*n, *r)).collect(),
            origins: self
                .origins
                .iter()
                .map(|((a, p), n)| (*a, *p, *n))
                .collect(),
            vips: self.vips.iter().map(|(a, f)| (*a, *f)).collect(),
            lanes: self.lanes.iter().map(|(n, value)| (*n, *value)).collect(),
        }
    }
}

/// The keys that stand for `id` in the maps.
fn keys_of(id: &ServiceKey) -> impl Iterator<Item = (IpAddr, u16, Protocol)> {
    let (ip, protocol) = (id.listen.ip, id.protocol);
    let (first, last) = id.listen.ports.keys();
    (first..=last).map(move |port| (ip, port, protocol))
}

fn id(n: u8) -> ServiceKey {
    ServiceKey {
        listen: SocketAddr::from(([203, 0, 113, n / 2], 80 + u16::from(n % 2))).into(),
        protocol: Protocol::Tcp,
    }
}

fn on(ports: Ports) -> ServiceKey {
    let ip = IpAddr::from([203, 0, 113, 1]);
    ServiceKey {
        listen: Listen { ip, ports },
        protocol: Protocol::Tcp,
    }
}

fn service(n: u8, backends: &[(u8, u32)]) -> Service {
    service_on(id(n), backends)
}

fn service_on(id: ServiceKey, backends: &[(u8, u32)]) -> Service {
    Service {
        id,
        name: id.to_string(),
        forward: 0,
        scheduler: schedulers::ROUND_ROBIN,
        on_no_backend: on_no_backend::RESET,
        on_backend_down: on_backend_down::KEEP,
        connect_timeout: 0,
        affinity: 0,
        affinity_mask: [0; 4],
        source_rate: 0,
        access: BTreeMap::new(),
        table_size: 0,
        stateless: false,
        gateway: None,
        idle_timeout: WINDOW,
        answer_arp: true,
        held: false,
        backends: backends
            .iter()
            .map(|(host, weight)| Backend {
                address: SocketAddr::from(([198, 18, 0, *host], 8080)),
                weight: *weight,
                max_connections: 0,
                configured_weight: (*weight).max(1),
                alive: *weight > 0,
            })
            .collect(),
    }
}

fn hop(address: IpAddr) -> Option<Hop> {
    Some(Hop {
        destination: [2, 0, 0, 0, 0, 1],
        source: [2, 0, 0, 0, 0, 2],
        ifindex: 7,
        mtu: 1500,
        tags: 0,
        address: match address {
            IpAddr::V4(_) => IpAddr::from([198, 18, 0, 254]),
            IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 254]),
        },
    })
}

fn carry_out(fake: &mut Fake, ops: &[Op]) {
    for op in ops {
        fake.step(op);
    }
}

#[test]
fn a_wish_that_is_fulfilled_costs_nothing() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    let wanted = [service(1, &[(1, 6), (2, 4)])];
    assert!(!reconciler.plan(&wanted, &[], hop, now).unwrap().is_empty());
    assert_eq!(reconciler.plan(&wanted, &[], hop, now).unwrap(), []);
}

#[test]
fn one_backend_less_writes_one_table_and_one_pointer() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    reconciler
        .plan(&[service(1, &[(1, 1), (2, 1)])], &[], hop, now)
        .unwrap();
    let mut wanted = service(1, &[(1, 1), (2, 1)]);
    wanted.backends[1].weight = 0;
    let ops = reconciler.plan(&[wanted], &[], hop, now).unwrap();
    assert!(
        matches!(&ops[..], [Op::Share { weight: 0, .. }, Op::Slots { slots, .. }, Op::Service { .. }]
            if slots.len() == 1),
        "{ops:?}"
    );
}

#[test]
fn a_new_way_to_a_backend_writes_only_the_backend() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    let wanted = [service(1, &[(1, 1), (2, 1)])];
    reconciler.plan(&wanted, &[], hop, now).unwrap();
    let moved = |address: IpAddr| {
        let mut hop = hop(address)?;
        hop.ifindex = if address == IpAddr::from([198, 18, 0, 1]) {
            8
        } else {
            7
        };
        Some(hop)
    };
    let ops = reconciler.plan(&wanted, &[], moved, now).unwrap();
    assert!(
        matches!(&ops[..], [Op::Backend { record, .. }] if record.ifindex == 8),
        "{ops:?}"
    );
    let ops = reconciler.plan(&wanted, &[], |_| None, now).unwrap();
    let kept = |op: &Op| {
        matches!(op, Op::Backend { record, .. }
            if record.ifindex > 6 && record.flags & BACKEND_RESOLVED == 0)
    };
    assert!(ops.len() == 2 && ops.iter().all(kept), "{ops:?}");
}

#[test]
fn what_has_no_room_is_refused_whole() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(2, 3, 4);
    let mut fake = Fake::default();
    let ops = reconciler
        .plan(&[service(1, &[(1, 1), (2, 1)])], &[], hop, now)
        .unwrap();
    carry_out(&mut fake, &ops);
    for (wanted, remedy) in [
        (vec![service(2, &[(1, 1), (2, 1)])], "limits.backends"),
        (
            vec![service(2, &[]), service(3, &[]), service(4, &[])],
            "limits.services",
        ),
        (
            vec![service(2, &[(1, 5)]), service(1, &[(1, 2), (2, 3)])],
            "limits.slots",
        ),
    ] {
        let error = reconciler.plan(&wanted, &[], hop, now).unwrap_err();
        assert!(error.to_string().contains(remedy), "{error}");
    }
    // Nothing was kept: what fits still fits.
    let later = now + Duration::from_secs(1);
    let ops = reconciler
        .plan(&[service(2, &[(1, 1)])], &[], hop, later)
        .unwrap();
    carry_out(&mut fake, &ops);
}

#[test]
fn a_backend_that_is_configured_no_longer_waits_for_its_flows() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    let mut fake = Fake::default();
    let ops = reconciler
        .plan(&[service(1, &[(1, 1), (2, 1)])], &[], hop, now)
        .unwrap();
    carry_out(&mut fake, &ops);
    let ops = reconciler
        .plan(&[service(1, &[(1, 1)])], &[], hop, now)
        .unwrap();
    carry_out(&mut fake, &ops);
    let retiring: Vec<_> = reconciler.retiring().collect();
    let [(of, address, number)] = retiring[..] else {
        panic!("{retiring:?}");
    };
    assert_eq!((of, address.ip()), (id(1), IpAddr::from([198, 18, 0, 2])));
    assert_eq!(
        fake.backends[&number].flags,
        BACKEND_ALIVE | BACKEND_RESOLVED
    );
    let generation = fake.backends[&number].generation;
    let ops = reconciler.forget_backend(&of, &address);
    carry_out(&mut fake, &ops);
    assert_eq!(fake.backends[&number].service, 0);
    assert_ne!(fake.backends[&number].generation, generation);
    assert_eq!(reconciler.retiring().count(), 0);
    // One that is configured is not forgotten.
    let configured = SocketAddr::from(([198, 18, 0, 1], 8080));
    assert_eq!(reconciler.forget_backend(&of, &configured), []);
}

/// Plans, carries out, and returns what was done.
fn reach(
    reconciler: &mut Reconciler,
    fake: &mut Fake,
    wanted: &[Service],
    now: Instant,
) -> Vec<Op> {
    let ids: HashSet<ServiceKey> = wanted.iter().map(|s| s.id).collect();
    let removed: Vec<ServiceKey> = reconciler
        .service_ids()
        .filter(|id| !ids.contains(id))
        .collect();
    let ops = reconciler.plan(wanted, &removed, hop, now).unwrap();
    carry_out(fake, &ops);
    ops
}

#[test]
fn a_range_that_moves_keeps_number_backends_and_counters() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    let mut fake = Fake::default();
    let before = [service_on(on(Ports::Range(8000, 8100)), &[(1, 1)])];
    reach(&mut reconciler, &mut fake, &before, now);
    for (ports, changes) in [
        (Ports::Range(8000, 8200), vec![Ports::Range(8101, 8200)]),
        (
            Ports::Range(8050, 8201),
            vec![Ports::Range(8000, 8049), Ports::One(8201)],
        ),
        (Ports::One(8050), vec![Ports::Range(8051, 8201)]),
    ] {
        let wanted = [service_on(on(ports), &[(1, 1)])];
        let ops = reach(&mut reconciler, &mut fake, &wanted, now);
        let changed: Vec<Ports> = ops
            .iter()
            .map(|op| match op {
                Op::Publish { id, number: 1 } | Op::Withdraw { id } => id.listen.ports,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(changed, changes, "to {ports:?}");
    }
}

#[test]
fn a_range_that_has_no_room_keeps_its_name() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(1, 10, 100);
    let mut fake = Fake::default();
    let old = on(Ports::Range(8000, 8100));
    reach(
        &mut reconciler,
        &mut fake,
        &[service_on(old, &[(1, 1)])],
        now,
    );
    let wanted = [
        service_on(on(Ports::Range(8000, 8200)), &[(1, 1)]),
        service(7, &[]),
    ];
    let error = reconciler.plan(&wanted, &[old], hop, now).unwrap_err();
    assert!(error.to_string().contains("limits.services"), "{error}");
    assert_eq!(reconciler.service_ids().collect::<Vec<_>>(), [old]);
    let again = [service_on(old, &[(1, 1)])];
    assert_eq!(reconciler.plan(&again, &[], hop, now).unwrap(), []);
}

/// The daemon died after any number of keys: the next one finishes the work.
#[test]
fn half_a_range_is_adopted_and_made_whole() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 100);
    let mut whole = Fake::default();
    let wanted = [service_on(on(Ports::Range(10, 20)), &[(1, 1)])];
    reach(&mut reconciler, &mut whole, &wanted, now);
    for missing in [vec![10], vec![20], vec![15], vec![11, 12, 19]] {
        let mut fake = whole.clone();
        fake.keys.retain(|(_, port, _), _| !missing.contains(port));
        let mut reconciler = Reconciler::new(10, 10, 100);
        let repairs = reconciler.adopt(fake.found());
        carry_out(&mut fake, &repairs);
        reach(&mut reconciler, &mut fake, &wanted, now);
        assert_eq!(
            fake.keys.keys().collect::<Vec<_>>(),
            whole.keys.keys().collect::<Vec<_>>()
        );
        assert_eq!(fake.keys.values().collect::<HashSet<_>>().len(), 1);
    }
}

/// What the services of a wish listen on: no two of them overlap.
fn listeners() -> impl Strategy<Value = Vec<ServiceKey>> {
    let one = (0_u8..3, any::<bool>(), 0_u16..30, 0_u16..12);
    prop::collection::vec(one, 0..7).prop_map(|wished| {
        let mut ids: Vec<ServiceKey> = Vec::new();
        for (host, udp, first, more) in wished {
            let ports = match first {
                0..5 => Ports::Any,
                first => Ports::span(first, first + more),
            };
            let ip = match host {
                0 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
                host => IpAddr::from([203, 0, 113, host]),
            };
            let id = ServiceKey {
                listen: Listen { ip, ports },
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            };
            let overlaps = |other: &ServiceKey| {
                (other.listen.ip, other.protocol) == (ip, id.protocol)
                    && other.listen.ports.shared(ports) > 0
            };
            if !ids.iter().any(overlaps) {
                ids.push(id);
            }
        }
        ids
    })
}

/// Prefixes that hold one another, down to that of one client.
fn nested(n: u8) -> Prefix {
    Prefix {
        address: IpAddr::from([0, 0, 0, 0]),
        bits: 6 * n,
    }
}

fn wishes() -> impl Strategy<Value = Vec<Service>> {
    let backends = prop::collection::btree_map(1_u8..8, 0_u32..4, 0..6);
    let scheduler = prop_oneof![
        Just(schedulers::ROUND_ROBIN),
        Just(schedulers::LEAST_CONNECTIONS)
    ];
    let rules = prop::collection::btree_map(0_u8..6, any::<bool>(), 0..4);
    let pools = prop::collection::vec((backends, scheduler, 0_u32..2, rules), 7);
    (listeners(), pools).prop_map(|(listeners, pools)| {
        let services = listeners.into_iter().zip(pools);
        type Wish = (BTreeMap<u8, u32>, u8, u32, BTreeMap<u8, bool>);
        let service = |(id, (pool, scheduler, limit, rules)): (_, Wish)| {
            let mut service = service_on(id, &pool.into_iter().collect::<Vec<_>>());
            service.scheduler = scheduler;
            let rules = rules.into_iter();
            service.access = rules.map(|(n, allow)| (nested(n), allow)).collect();
            if let Some(backend) = service.backends.first_mut() {
                backend.max_connections = limit;
            }
            service
        };
        services.map(service).collect()
    })
}

proptest! {
    /// Any wish after any other, with restarts in between: sound after every step, and in the end
    /// exactly what was wished.
    #[test]
    fn every_step_of_every_plan_is_sound(
        wishes in prop::collection::vec((wishes(), any::<bool>()), 1..12),
    ) {
        let mut now = Instant::now();
        let mut fake = Fake::default();
        let mut reconciler = Reconciler::new(16, 128, 4096);
        for (wanted, restart) in wishes {
            now += Duration::from_secs(1);
            if restart {
                reconciler = Reconciler::new(16, 128, 4096);
                let ops = reconciler.adopt(fake.found());
                carry_out(&mut fake, &ops);
            }
            reach(&mut reconciler, &mut fake, &wanted, now);

            let keys: usize = wanted.iter().map(|s| keys_of(&s.id).count()).sum();
            prop_assert_eq!(fake.keys.len(), keys);
            for service in &wanted {
                let number = reconciler.service_number(&service.id).unwrap();
                for key in keys_of(&service.id) {
                    prop_assert_eq!(fake.keys[&key], number);
                }
                let (first, len) = ServiceRecord::unpack_table(fake.services[&number].table);
                let mut shares: HashMap<SocketAddr, u32> = HashMap::new();
                for slot in first..first + len {
                    let record = fake.backends[&fake.slots[&slot].backend];
                    let ip = to_ip(record.family, &record.addr);
                    *shares.entry(SocketAddr::new(ip, u16::from_be(record.port))).or_default() += 1;
                }
                let limited = service.backends.iter().any(|b| b.max_connections != 0);
                let (first, len_of_members) = ServiceRecord::unpack_table(fake.services[&number].members);
                let members: HashSet<u32> = (first..first + len_of_members)
                    .map(|slot| fake.slots[&slot].backend)
                    .collect();
                let with_weight: HashSet<u32> = service.backends.iter()
                    .filter(|b| b.weight > 0)
                    .filter(|_| limited || service.scheduler == schedulers::LEAST_CONNECTIONS)
                    .map(|b| reconciler.backend_number(&service.id, &b.address).unwrap())
                    .collect();
                prop_assert_eq!(len_of_members as usize, members.len());
                prop_assert_eq!(members, with_weight);
                let rules = fake.access.get(&number).cloned().unwrap_or_default();
                prop_assert_eq!(&rules, &service.access);
                let listed = fake.services[&number].flags & SERVICE_LISTED != 0;
                prop_assert_eq!(listed, !rules.is_empty());
                let total: u32 = service.backends.iter().map(|b| b.weight).sum();
                for backend in &service.backends {
                    let share = shares.get(&backend.address).copied().unwrap_or(0);
                    if service.scheduler == schedulers::LEAST_CONNECTIONS {
                        prop_assert_eq!(share, backend.weight.min(1));
                    } else {
                        prop_assert_eq!(share * total, backend.weight * len);
                    }
                    let number = reconciler.backend_number(&service.id, &backend.address);
                    let share = (backend.weight, backend.max_connections);
                    prop_assert_eq!(fake.shares[&number.unwrap()], share);
                    let record = fake.backends[&number.unwrap()];
                    prop_assert_eq!(record.flags & BACKEND_ALIVE != 0, backend.alive);
                    let source = to_ip(record.family, &record.source);
                    prop_assert!(fake.lane(source) & LANE_NAT_SOURCE != 0);
                }
            }
            prop_assert_eq!(
                fake.vips.keys().copied().collect::<HashSet<_>>(),
                wanted.iter().map(|s| s.id.listen.ip).collect::<HashSet<_>>()
            );
            for vip in fake.vips.keys() {
                // Two VIPs may share a lane; that they do not here is for the hash to say.
                let any = |s: &Service| s.id.listen.ports == Ports::Any && s.id.listen.ip == *vip;
                let wants = wanted.iter().any(any);
                prop_assert_eq!(fake.lane(*vip) & LANE_ANY_PORT != 0, wants);
            }
            let again = reconciler.plan(&wanted, &[], hop, now).unwrap();
            prop_assert_eq!(again, vec![]);
        }
    }
}

/// Whether a client may begin a flow, by the longest prefix that holds it.
fn decision(rules: &BTreeMap<Prefix, bool>, client: u32) -> bool {
    let holds = |prefix: &&Prefix| {
        let IpAddr::V4(address) = prefix.address else {
            return false;
        };
        let differ = address.to_bits() ^ client;
        differ.checked_shr(32 - u32::from(prefix.bits)).unwrap_or(0) == 0
    };
    let longest = rules.keys().filter(holds).max_by_key(|prefix| prefix.bits);
    longest.is_none_or(|prefix| rules[prefix])
}

proptest! {
    /// While lists change, every client is decided about as before or as after.
    #[test]
    fn lists_change_without_a_gap(
        before in rules(), after in rules(), client in any::<u32>(),
    ) {
        let client = client & 0xf000_000f;
        let allowed = [decision(&before, client), decision(&after, client)];
        let (come, gone) = changed_access(1, &before, &after);
        let mut rules = before;
        for op in come.into_iter().chain(gone) {
            let Op::Access { prefix, allow, .. } = op else {
                panic!("{op:?}");
            };
            match allow {
                Some(allow) => rules.insert(prefix, allow),
                None => rules.remove(&prefix),
            };
            prop_assert!(allowed.contains(&decision(&rules, client)));
        }
        prop_assert_eq!(rules, after);
    }
}

fn rules() -> impl Strategy<Value = BTreeMap<Prefix, bool>> {
    let prefix = (any::<u32>(), prop_oneof![0_u8..5, 28_u8..33]).prop_map(|(address, bits)| {
        let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
        let address = std::net::Ipv4Addr::from(address & 0xf000_000f & mask).into();
        Prefix { address, bits }
    });
    prop::collection::btree_map(prefix, any::<bool>(), 0..40)
}

#[test]
fn a_larger_table_that_is_asked_for_takes_the_place_of_the_other() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let mut wanted = service(1, &[(1, 1), (2, 1)]);
    wanted.scheduler = schedulers::MAGLEV;
    for (asked, size) in [(0, 251), (600, 1021), (600, 1021), (0, 251)] {
        wanted.table_size = asked;
        let ops = reconciler.plan(&[wanted.clone()], &[], hop, now).unwrap();
        carry_out(&mut fake, &ops);
        let number = reconciler.service_number(&wanted.id).unwrap();
        let (_, len) = ServiceRecord::unpack_table(fake.services[&number].table);
        assert_eq!(len, size);
    }
}
