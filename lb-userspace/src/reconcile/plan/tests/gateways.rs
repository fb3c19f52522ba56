//! Services in `dnat` that do not record their flows, and what answers are known by.

use super::*;

const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 254));

impl Fake {
    /// Whatever belongs to a flow that is not recorded, its answers are known, and those alone.
    pub(super) fn check_gateways(&self, op: &Op) {
        for ((ip, port, protocol), number) in &self.keys {
            let service = &self.services[number];
            if !has_gateway(service) {
                continue;
            }
            let gateway = &self.gateways[number];
            let vip = to_ip(
                if ip.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 },
                &gateway.vip,
            );
            assert_eq!(
                (vip, u16::from_be(gateway.port)),
                (*ip, *port),
                "after {op:?}"
            );
            let (first, len) = ServiceRecord::unpack_table(service.table);
            let slots = (first..first + len).map(|slot| self.slots[&slot].backend);
            let used: HashSet<u32> = slots.filter(|backend| *backend != NO_BACKEND).collect();
            for backend in used {
                let address = self.address(backend);
                assert!(
                    self.origins.contains_key(&(address, *protocol)),
                    "{address} is in use after {op:?}"
                );
                let lane = self.lane(address.ip());
                let bits = LANE_ORIGIN | LANE_BACKEND;
                assert_eq!(lane & bits, bits, "of {address} after {op:?}");
            }
        }
        for ((address, _), number) in &self.origins {
            assert_eq!(self.address(*number), *address, "after {op:?}");
            assert!(self.lane(address.ip()) & LANE_ORIGIN != 0, "after {op:?}");
        }
    }

    fn address(&self, backend: u32) -> SocketAddr {
        let record = &self.backends[&backend];
        let ip = to_ip(record.family, &record.addr);
        SocketAddr::new(ip, u16::from_be(record.port))
    }

    /// What origins lead to, by the last byte of their address.
    fn hosts(&self) -> BTreeMap<u8, u32> {
        let host = |address: &SocketAddr| match address.ip() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        let origins = self.origins.iter();
        origins.map(|((a, _), number)| (host(a), *number)).collect()
    }
}

/// A service that does not record its flows.
fn stateless(n: u8, backends: &[(u8, u32)]) -> Service {
    Service {
        stateless: true,
        gateway: Some(ROUTER),
        ..recorded(n, backends)
    }
}

/// The same service if it does.
fn recorded(n: u8, backends: &[(u8, u32)]) -> Service {
    Service {
        forward: forward::DNAT,
        scheduler: schedulers::MAGLEV,
        ..service(n, backends)
    }
}

fn is_about_gateways(op: &Op) -> bool {
    matches!(
        op,
        Op::Gateway { .. } | Op::PublishOrigin { .. } | Op::WithdrawOrigin { .. }
    )
}

#[test]
fn answers_are_known_before_a_flow_goes_unrecorded() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let wanted = [stateless(1, &[(1, 1), (2, 1)])];
    let ops = reach(&mut reconciler, &mut fake, &wanted, now);
    let place = |is_it: fn(&Op) -> bool| ops.iter().position(is_it).expect("an operation");
    let service = place(|op| matches!(op, Op::Service { .. }));
    assert!(place(|op| matches!(op, Op::Gateway { .. })) < service);
    let last = ops
        .iter()
        .rposition(|op| matches!(op, Op::PublishOrigin { .. }));
    assert!(last < Some(service));
    let hop = hop(ROUTER).unwrap();
    let expected = GatewayRecord {
        vip: from_ip(wanted[0].id.listen.ip),
        l2: l2(&hop),
        ifindex: hop.ifindex,
        tags: 0,
        port: 81_u16.to_be(),
        mtu: 1500,
        flags: GATEWAY_RESOLVED,
        reserved: [0; 5],
    };
    assert_eq!(fake.gateways, [(1, expected)].into());
    assert_eq!(fake.hosts().len(), 2);
    assert_eq!(reach(&mut reconciler, &mut fake, &wanted, now), []);
}

#[test]
fn a_new_daemon_changes_nothing_of_them() {
    let now = Instant::now();
    let mut fake = Fake::default();
    let wanted = [stateless(1, &[(1, 1), (2, 1)]), recorded(2, &[(3, 1)])];
    let mut before = Reconciler::new(10, 10, 10_000);
    let held = HashSet::from([IpAddr::from([198, 18, 0, 254])]);
    let ops = before.hold(&held);
    carry_out(&mut fake, &ops);
    reach(&mut before, &mut fake, &wanted, now);
    let whole = fake.clone();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    reconciler.hold(&held);
    let repairs = reconciler.adopt(fake.found());
    carry_out(&mut fake, &repairs);
    assert_eq!(fake, whole);
    let ops = reach(&mut reconciler, &mut fake, &wanted, now);
    let shares = |op: &Op| matches!(op, Op::Share { .. });
    assert!(ops.iter().all(shares), "{ops:?}");
    let gateways: Vec<_> = reconciler.gateways().map(|(id, _)| id).collect();
    assert_eq!(gateways, [wanted[0].id]);
}

#[test]
fn what_no_service_explains_is_taken_away() {
    let now = Instant::now();
    let mut fake = Fake::default();
    let wanted = [stateless(1, &[(1, 1)]), recorded(2, &[(2, 1)])];
    reach(
        &mut Reconciler::new(10, 10, 10_000),
        &mut fake,
        &wanted,
        now,
    );
    let mut found = fake.found();
    let stray = |host: u8| SocketAddr::from(([198, 18, 0, host], 8080));
    // Of a service that records its flows, of a backend that is not there, and of another protocol.
    let (own, other) = (fake.hosts()[&1], 3 - fake.hosts()[&1]);
    for (address, protocol, number) in [
        (stray(2), Protocol::Tcp, other),
        (stray(3), Protocol::Tcp, 9),
        (stray(1), Protocol::Udp, own),
    ] {
        found.origins.push((address, protocol, number));
        fake.origins.insert((address, protocol), number);
    }
    found.gateways.insert(2, fake.gateways[&1]);
    found.gateways.insert(7, fake.gateways[&1]);
    let ops = Reconciler::new(10, 10, 10_000).adopt(found);
    let ops: Vec<&Op> = ops.iter().filter(|op| is_about_gateways(op)).collect();
    assert_eq!(ops.len(), 5, "{ops:?}");
    let (number, record) = (2, no_gateway());
    assert!(ops.contains(&&Op::Gateway { number, record }));
    let (address, protocol) = (stray(1), Protocol::Udp);
    assert!(ops.contains(&&Op::WithdrawOrigin { address, protocol }));
}

#[test]
fn a_backend_that_goes_is_known_until_its_flows_are_gone() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let (one, two) = ([stateless(1, &[(1, 1)])], [stateless(1, &[(1, 1), (2, 1)])]);
    reach(&mut reconciler, &mut fake, &one, now);
    let ops = reach(&mut reconciler, &mut fake, &two, now);
    assert_eq!(ops.iter().filter(|op| is_about_gateways(op)).count(), 1);
    let ops = reach(&mut reconciler, &mut fake, &one, now);
    assert!(!ops.iter().any(is_about_gateways), "{ops:?}");
    assert_eq!(fake.hosts().len(), 2);
    let gone = SocketAddr::from(([198, 18, 0, 2], 8080));
    let ops = reconciler.forget_backend(&one[0].id, &gone);
    carry_out(&mut fake, &ops);
    assert_eq!(fake.hosts().into_keys().collect::<Vec<_>>(), [1]);
    assert_eq!(fake.lane(gone.ip()), 0);
}

#[test]
fn a_gateway_out_of_reach_keeps_its_last_address() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let wanted = [stateless(1, &[(1, 1)])];
    reach(&mut reconciler, &mut fake, &wanted, now);
    let before = fake.gateways[&1];
    let mut after = |change: fn(Hop) -> Option<Hop>| {
        let hop = |address| match address {
            ROUTER => change(hop(address)?),
            other => hop(other),
        };
        let ops = reconciler.plan(&wanted, &[], hop, now).unwrap();
        let [Op::Gateway { number: 1, record }] = ops[..] else {
            panic!("{ops:?}");
        };
        record
    };
    let lost = GatewayRecord { flags: 0, ..before };
    assert_eq!(after(|_| None), lost);
    assert_eq!(after(Some), before);
    let at_home = |hop: Hop| {
        let ifindex = LOCAL;
        Some(Hop { ifindex, ..hop })
    };
    assert_eq!(after(at_home), lost);
    let elsewhere = |hop: Hop| {
        let (ifindex, tags, destination) = (9, 5, [2, 0, 0, 0, 0, 3]);
        Some(Hop {
            ifindex,
            tags,
            destination,
            mtu: 70_000,
            ..hop
        })
    };
    let record = after(elsewhere);
    assert_eq!((record.ifindex, record.tags, record.mtu), (9, 5, u16::MAX));
    assert_ne!(record.l2, before.l2);
}

#[test]
fn another_gateway_is_in_force_when_its_way_is_known() {
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 253));
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let wanted = [stateless(1, &[(1, 1)])];
    reach(&mut reconciler, &mut fake, &wanted, now);
    let before = fake.gateways[&1];
    let wanted = wanted.map(|service| Service {
        gateway: Some(OTHER),
        ..service
    });
    let mut plan = |known: bool| {
        let way = |way: Hop| {
            let destination = [2, 0, 0, 0, 0, 9];
            known.then_some(Hop { destination, ..way })
        };
        let hop = |address| match address {
            OTHER => hop(address).and_then(way),
            address => hop(address),
        };
        reconciler.plan(&wanted, &[], hop, now).unwrap()
    };
    assert_eq!(plan(false), [], "the one before goes on");
    let [Op::Gateway { number: 1, record }] = plan(true)[..] else {
        panic!("no gateway");
    };
    assert_ne!(record.l2, before.l2);
    let [Op::Gateway { number: 1, record }] = plan(false)[..] else {
        panic!("no gateway");
    };
    assert_eq!(record.flags, 0, "and is lost");
}

#[test]
fn windows_last_until_a_new_daemon_knows_how_long() {
    let now = Instant::now();
    let mut fake = Fake::default();
    let mut before = Reconciler::new(10, 10, 10_000);
    reach(
        &mut before,
        &mut fake,
        &[stateless(1, &[(1, 1), (2, 1)])],
        now,
    );
    reach(
        &mut before,
        &mut fake,
        &[stateless(1, &[(1, 1), (3, 1)])],
        now,
    );
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let repairs = reconciler.adopt(fake.found());
    carry_out(&mut fake, &repairs);
    assert_eq!(reconciler.settle(&HashMap::new(), now), []);
    reach(
        &mut reconciler,
        &mut fake,
        &[stateless(1, &[(1, 1), (3, 1)])],
        now,
    );
    let window = wanted_window();
    assert_eq!(reconciler.settle(&HashMap::new(), now + window / 2), []);
    reconciler.settle(&HashMap::new(), now + window / 2 + window / 4);
    assert_ne!(reconciler.settle(&HashMap::new(), now + 2 * window), []);
}

fn wanted_window() -> Duration {
    service(1, &[]).idle_timeout
}

#[test]
fn what_nat_has_sent_from_stays_in_the_filter_of_a_new_daemon() {
    let source = IpAddr::from([198, 18, 0, 250]);
    let mut fake = Fake::default();
    let mut before = Reconciler::new(10, 10, 100);
    let mut ops = before.hold(&HashSet::from([source]));
    ops.extend(before.add_nat_sources(&[source]));
    carry_out(&mut fake, &ops);
    let whole = fake.clone();
    let mut reconciler = Reconciler::new(10, 10, 100);
    reconciler.hold(&HashSet::from([source]));
    let repairs = reconciler.adopt(fake.found());
    carry_out(&mut fake, &repairs);
    assert_eq!(fake, whole);
    let ops = reconciler.hold(&HashSet::new());
    carry_out(&mut fake, &ops);
    assert_eq!(fake.lane(source), LANE_NAT_SOURCE);
}

#[test]
fn a_service_without_its_gateway_is_looked_up_first() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    reach(
        &mut reconciler,
        &mut fake,
        &[stateless(1, &[(1, 1), (2, 1)])],
        now,
    );
    // One of them only waits for its flows.
    reach(&mut reconciler, &mut fake, &[stateless(1, &[(1, 1)])], now);
    let wanted = [recorded(1, &[(1, 1)])];
    let ops = reach(&mut reconciler, &mut fake, &wanted, now);
    let service = ops.iter().rposition(|op| matches!(op, Op::Service { .. }));
    let gateway = ops.iter().position(is_about_gateways);
    assert!(service < gateway, "{ops:?}");
    assert!(
        matches!(ops[gateway.unwrap()], Op::Gateway { .. }),
        "{ops:?}"
    );
    assert!(fake.gateways.is_empty() && fake.origins.is_empty());
    for host in [1, 2] {
        // Flows that are recorded go on to be answered.
        assert_eq!(fake.lane([198, 18, 0, host].into()), LANE_BACKEND);
    }
    assert_eq!(reach(&mut reconciler, &mut fake, &wanted, now), []);
    let again = [stateless(1, &[(1, 1)])];
    reach(&mut reconciler, &mut fake, &again, now);
    assert_eq!(fake.hosts().len(), 2);
    reach(&mut reconciler, &mut fake, &[], now);
    assert!(fake.gateways.is_empty() && fake.origins.is_empty());
    assert!(fake.lanes.values().all(|lanes| *lanes == 0));
}

#[test]
fn a_service_that_shrinks_to_one_port_may_have_a_gateway() {
    let now = Instant::now();
    let mut reconciler = Reconciler::new(10, 10, 10_000);
    let mut fake = Fake::default();
    let range = Service {
        id: on(Ports::Range(80, 90)),
        ..recorded(1, &[(1, 1)])
    };
    let one = Service {
        id: on(Ports::One(85)),
        ..stateless(1, &[(1, 1)])
    };
    reach(
        &mut reconciler,
        &mut fake,
        std::slice::from_ref(&range),
        now,
    );
    reach(&mut reconciler, &mut fake, &[one], now);
    assert_eq!(fake.gateways[&1].port, 85_u16.to_be());
    assert_eq!(fake.hosts().len(), 1);
    reach(&mut reconciler, &mut fake, &[range], now);
    assert!(fake.gateways.is_empty() && fake.origins.is_empty());
}

#[test]
fn the_filter_knows_the_addresses_of_the_kernel() {
    let mut reconciler = Reconciler::new(10, 10, 100);
    let mut fake = Fake::default();
    let [one, two, three] = [1, 2, 3].map(|host| IpAddr::from([192, 0, 2, host]));
    let mut hold = |addresses: &[IpAddr]| {
        let ops = reconciler.hold(&addresses.iter().copied().collect());
        carry_out(&mut fake, &ops);
        [one, two, three].map(|address| fake.lane(address) & LANE_HELD != 0)
    };
    assert_eq!(hold(&[one, two]), [true, true, false]);
    assert_eq!(hold(&[two, three]), [false, true, true]);
    assert_eq!(hold(&[]), [false; 3]);
}

/// Of each of some hosts, whose backend it is; of each service, whether it is there, whether it records its flows, and
/// whether the way to its gateway is known. Then whether the daemon starts anew, and whether flows have ended.
type Wish = ([u8; 6], [(bool, bool); 3], bool, bool, bool);

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let owners = prop::array::uniform6(0_u8..4);
    let services = prop::array::uniform3((any::<bool>(), any::<bool>()));
    let wish = (
        owners,
        services,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    prop::collection::vec(wish, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Backends pass from one service to another, services come and go, and so do their gateways: every step is sound,
    /// and in the end what answers are known by is what is configured.
    #[test]
    fn every_step_with_gateways_is_sound(wishes in wishes()) {
        let mut now = Instant::now();
        let mut fake = Fake::default();
        let mut reconciler = Reconciler::new(16, 128, 100_000);
        // Services whose gateway this daemon has known the way to.
        let mut known = HashSet::new();
        for (owners, services, is_known, restart, forget) in wishes {
            now += Duration::from_secs(1);
            if restart {
                known.clear();
                reconciler = Reconciler::new(16, 128, 100_000);
                let ops = reconciler.adopt(fake.found());
                carry_out(&mut fake, &ops);
            }
            let mut wanted = Vec::new();
            for (n, (is_there, records)) in (1..).zip(services) {
                let hosts = (1..).zip(owners).filter(|(_, owner)| *owner == n);
                let pool: Vec<(u8, u32)> = hosts.map(|(host, _)| (host, 1)).collect();
                if is_there {
                    let service = if records { recorded } else { stateless };
                    wanted.push(service(2 * n, &pool));
                }
            }
            let hop = |address| hop(address).filter(|_| is_known || address != ROUTER);
            let ids: HashSet<ServiceKey> = wanted.iter().map(|s| s.id).collect();
            let removed: Vec<ServiceKey> =
                reconciler.service_ids().filter(|id| !ids.contains(id)).collect();
            let ops = reconciler.plan(&wanted, &removed, hop, now).unwrap();
            carry_out(&mut fake, &ops);
            if forget {
                for (id, address, _) in reconciler.retiring().collect::<Vec<_>>() {
                    let ops = reconciler.forget_backend(&id, &address);
                    carry_out(&mut fake, &ops);
                }
            }

            let with = wanted.iter().filter(|service| service.stateless);
            let with: HashSet<ServiceKey> = with.map(|service| service.id).collect();
            known.retain(|id| with.contains(id));
            if is_known {
                known.extend(with);
            }
            let mut numbers = HashSet::new();
            for service in &wanted {
                let number = reconciler.service_number(&service.id).unwrap();
                let gateway = fake.gateways.get(&number);
                prop_assert_eq!(gateway.is_some(), service.stateless);
                for backend in &service.backends {
                    let number = reconciler.backend_number(&service.id, &backend.address).unwrap();
                    let owner = fake.origins.get(&(backend.address, Protocol::Tcp)).copied();
                    if service.stateless {
                        prop_assert_eq!(owner, Some(number));
                    } else {
                        prop_assert_ne!(owner, Some(number));
                    }
                }
                if let Some(gateway) = gateway {
                    numbers.insert(number);
                    // What an earlier daemon has left stays until the way is known.
                    if known.contains(&service.id) {
                        prop_assert_eq!(gateway.flags == GATEWAY_RESOLVED, is_known);
                    }
                }
            }
            prop_assert_eq!(fake.gateways.len(), numbers.len());
            for backend in fake.origins.values() {
                let service = fake.backends[backend].service;
                prop_assert!(numbers.contains(&service));
            }
            let again = reconciler.plan(&wanted, &[], hop, now).unwrap();
            carry_out(&mut fake, &again);
            // One that waits for its flows may have got back what another service had.
            prop_assert!(!forget || again.is_empty(), "{:?}", again);
        }
    }
}
