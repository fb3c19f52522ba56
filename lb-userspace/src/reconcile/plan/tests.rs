//! Plans carried out on maps made of ordinary collections, looked at after every single step.

use super::*;
use crate::config::Protocol;
use lb_common::{
    backend::NO_BACKEND,
    service::{on_backend_down, on_no_backend, scheduler as schedulers},
};
use proptest::prelude::*;
use std::{collections::BTreeMap, time::Duration};

/// The maps.
#[derive(Clone, Debug, Default, PartialEq)]
struct Fake {
    lanes: BTreeMap<u32, u64>,
    backends: BTreeMap<u32, BackendRecord>,
    services: BTreeMap<u32, ServiceRecord>,
    slots: BTreeMap<u32, Slot>,
    keys: BTreeMap<(SocketAddr, Protocol), u32>,
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
            Op::Backend { number, record } => {
                self.backends.insert(*number, *record);
            }
            Op::Slots { first, slots } => self.slots.extend((*first..).zip(slots.iter().copied())),
            Op::Service { number, record } => {
                self.services.insert(*number, *record);
            }
            Op::Vip { address, flags } => {
                self.vips.insert(*address, *flags);
            }
            Op::Publish { id, number } => {
                self.keys.insert((id.listen, id.protocol), *number);
            }
            Op::Withdraw { id } => {
                self.keys.remove(&(id.listen, id.protocol));
            }
            Op::RemoveVip { address } => {
                self.vips.remove(address);
            }
        }
        self.check(op);
    }

    fn check(&self, op: &Op) {
        for ((listen, _), number) in &self.keys {
            let service = &self.services[number];
            let (first, len) = ServiceRecord::unpack_table(service.table);
            for slot in first..first + len {
                let backend = self.slots[&slot].backend;
                assert_ne!(backend, NO_BACKEND, "after {op:?}");
                assert_eq!(
                    self.backends[&backend].service, *number,
                    "slot {slot} names a backend of another service after {op:?}"
                );
            }
            assert!(self.vips.contains_key(&listen.ip()), "after {op:?}");
            assert!(self.lane(listen.ip()) & LANE_VIP != 0, "after {op:?}");
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
            .map(|((listen, protocol), number)| {
                let (listen, protocol) = (*listen, *protocol);
                (ServiceKey { listen, protocol }, *number)
            })
            .collect();
        let tables = self
            .services
            .values()
            .map(|service| {
                let (first, len) = ServiceRecord::unpack_table(service.table);
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
            vips: self.vips.iter().map(|(a, f)| (*a, *f)).collect(),
        }
    }
}

fn id(n: u8) -> ServiceKey {
    ServiceKey {
        listen: SocketAddr::from(([203, 0, 113, n / 2], 80 + u16::from(n % 2))),
        protocol: Protocol::Tcp,
    }
}

fn service(n: u8, backends: &[(u8, u32)]) -> Service {
    Service {
        id: id(n),
        name: format!("s{n}"),
        forward: 0,
        scheduler: schedulers::ROUND_ROBIN,
        on_no_backend: on_no_backend::RESET,
        on_backend_down: on_backend_down::KEEP,
        connect_timeout: 0,
        answer_arp: true,
        backends: backends
            .iter()
            .map(|(host, weight)| Backend {
                address: SocketAddr::from(([198, 18, 0, *host], 8080)),
                weight: *weight,
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
        matches!(&ops[..], [Op::Slots { slots, .. }, Op::Service { .. }] if slots.len() == 1),
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

fn pools() -> impl Strategy<Value = Vec<(u8, Vec<(u8, u32)>)>> {
    let backends = prop::collection::btree_map(1_u8..8, 0_u32..4, 0..6);
    let services = prop::collection::btree_map(0_u8..6, backends, 0..5);
    services.prop_map(|services| {
        services
            .into_iter()
            .map(|(n, backends)| (n, backends.into_iter().collect()))
            .collect()
    })
}

proptest! {
    /// Any wish after any other, with restarts in between: sound after every step, and in the end
    /// exactly what was wished.
    #[test]
    fn every_step_of_every_plan_is_sound(
        wishes in prop::collection::vec((pools(), any::<bool>()), 1..12),
    ) {
        let mut now = Instant::now();
        let mut fake = Fake::default();
        let mut reconciler = Reconciler::new(8, 64, 4096);
        for (wish, restart) in wishes {
            now += Duration::from_secs(1);
            if restart {
                reconciler = Reconciler::new(8, 64, 4096);
                let ops = reconciler.adopt(fake.found());
                carry_out(&mut fake, &ops);
            }
            let wanted: Vec<Service> = wish.iter().map(|(n, pool)| service(*n, pool)).collect();
            let ids: HashSet<ServiceKey> = wanted.iter().map(|s| s.id).collect();
            let removed: Vec<ServiceKey> =
                reconciler.service_ids().filter(|id| !ids.contains(id)).collect();
            let ops = reconciler.plan(&wanted, &removed, hop, now).unwrap();
            carry_out(&mut fake, &ops);

            prop_assert_eq!(fake.keys.len(), wanted.len());
            for service in &wanted {
                let number = fake.keys[&(service.id.listen, service.id.protocol)];
                let (first, len) = ServiceRecord::unpack_table(fake.services[&number].table);
                let mut shares: HashMap<SocketAddr, u32> = HashMap::new();
                for slot in first..first + len {
                    let record = fake.backends[&fake.slots[&slot].backend];
                    let ip = to_ip(record.family, &record.addr);
                    *shares.entry(SocketAddr::new(ip, u16::from_be(record.port))).or_default() += 1;
                }
                let total: u32 = service.backends.iter().map(|b| b.weight).sum();
                for backend in &service.backends {
                    let share = shares.get(&backend.address).copied().unwrap_or(0);
                    prop_assert_eq!(share * total, backend.weight * len);
                    let number = reconciler.backend_number(&service.id, &backend.address);
                    let record = fake.backends[&number.unwrap()];
                    prop_assert_eq!(record.flags & BACKEND_ALIVE != 0, backend.alive);
                    let source = to_ip(record.family, &record.source);
                    prop_assert!(fake.lane(source) & LANE_NAT_SOURCE != 0);
                }
            }
            prop_assert_eq!(
                fake.vips.keys().copied().collect::<HashSet<_>>(),
                wanted.iter().map(|s| s.id.listen.ip()).collect::<HashSet<_>>()
            );
            let again = reconciler.plan(&wanted, &[], hop, now).unwrap();
            prop_assert_eq!(again, vec![]);
        }
    }
}
