//! Stateless services: random traffic through the real program while the real planner changes the pool at random, and
//! every packet of every flow must reach the backend that its flow began with, and in `dnat` every answer its client.
//!
//! Seeded, so a failure repeats. `SLUICE_FLOW_STATE_STEPS` sets the length of each run.

use lb_common::{
    abi::Settings,
    flow::FlowKey,
    service::{forward, on_backend_down, on_no_backend, scheduler},
};
use sluice::{
    config::{Limits, Protocol},
    dataplane::{Dataplane, Flowing as _},
    flows::{Flows, Patience, Timeouts},
    model::ServiceKey,
    reconcile::{Backend, Hop, Op, Reconciler, Service, apply},
};
use sluice_tests::{
    harness::{TCP, UDP},
    packet::{BALANCER, Family, GATEWAY, Mac, Packet, STRANGER, transport},
};
use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

/// How long a flow may be silent.
const WINDOW: Duration = Duration::from_secs(60);
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const PORT: u16 = 80;
/// XDP_DROP and XDP_TX.
const DROP: u32 = 1;
const SENT: u32 = 3;
/// The loopback interface, which every namespace has.
const INTERFACE: u32 = 1;

/// Small, quick, and the same everywhere (Marsaglia, "Xorshift RNGs", 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A backend of the pool, by the last byte of its address.
#[derive(Clone, Copy, Debug)]
struct Member {
    weight: u32,
    alive: bool,
}

/// A flow as its client knows it.
#[derive(Clone, Copy, Debug)]
struct Flow {
    backend: u8,
    last: Instant,
}

/// What a run is about.
#[derive(Clone, Copy)]
struct Kind {
    protocol: u8,
    forward: u8,
    scheduler: u8,
}

const TCP_DSR: Kind = Kind {
    protocol: TCP,
    forward: forward::DSR,
    scheduler: scheduler::MAGLEV,
};

struct World {
    dataplane: Dataplane,
    reconciler: Reconciler,
    flows: Flows,
    random: Random,
    now: Instant,
    kind: Kind,
    policy: u8,
    /// The Ethernet address of the router that is the gateway now.
    router: Mac,
    pool: BTreeMap<u8, Member>,
    /// Flows by client address and port.
    known: BTreeMap<(u32, u16), Flow>,
    packets: u64,
    moved: u64,
    most_recorded: u64,
}

fn host(n: u8) -> IpAddr {
    IpAddr::from([198, 18, 0, n])
}

/// The way to an address; the gateway is the router with this Ethernet address.
fn hop(address: IpAddr, router: Mac) -> Option<Hop> {
    let IpAddr::V4(v4) = address else { return None };
    let is_gateway = v4 == GATEWAY.v4;
    Some(Hop {
        destination: if is_gateway {
            router
        } else {
            [2, 0, 0, 0, 1, v4.octets()[3]]
        },
        source: BALANCER.mac,
        ifindex: INTERFACE,
        tags: 0,
        address: host(254),
        mtu: 1500,
    })
}

/// The neighbour that a client comes from: most of them come through the gateway.
const fn neighbour(client: (u32, u16), router: Mac) -> Mac {
    if client.1.is_multiple_of(8) {
        STRANGER.mac
    } else {
        router
    }
}

impl World {
    fn new(seed: u64, kind: Kind, policy: u8, flows: u32) -> Self {
        let limits = Limits {
            flows,
            services: 4,
            backends: 64,
            slots: 65536,
            ..Limits::DEFAULT
        };
        let settings: Settings = bytemuck::Zeroable::zeroed();
        let dataplane = Dataplane::load_unpinned(&limits, settings).expect("the program loads");
        let flows = Flows::new(&dataplane.maps).unwrap();
        let mut world = Self {
            dataplane,
            reconciler: Reconciler::new(limits.services, limits.backends, limits.slots),
            flows,
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now: Instant::now(),
            kind,
            policy,
            router: GATEWAY.mac,
            pool: BTreeMap::new(),
            known: BTreeMap::new(),
            packets: 0,
            moved: 0,
            most_recorded: 0,
        };
        for n in 1..=5 {
            world.pool.insert(
                n,
                Member {
                    weight: 1,
                    alive: true,
                },
            );
        }
        world.plan();
        world
    }

    fn key(&self) -> ServiceKey {
        ServiceKey {
            listen: SocketAddr::from((VIP, PORT)).into(),
            protocol: if self.kind.protocol == TCP {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
        }
    }

    fn plan(&mut self) {
        let backend = |(n, member): (&u8, &Member)| Backend {
            address: SocketAddr::new(host(*n), PORT),
            max_connections: 0,
            weight: if member.alive { member.weight } else { 0 },
            configured_weight: 1,
            alive: member.alive,
        };
        let wanted = Service {
            id: self.key(),
            name: "model".to_owned(),
            forward: self.kind.forward,
            scheduler: self.kind.scheduler,
            on_no_backend: on_no_backend::DROP,
            on_backend_down: self.policy,
            connect_timeout: 0,
            affinity: 0,
            affinity_mask: [0; 4],
            source_rate: 0,
            access: std::collections::BTreeMap::new(),
            table_size: 0,
            stateless: true,
            gateway: (self.kind.forward == forward::DNAT).then_some(GATEWAY.v4.into()),
            idle_timeout: WINDOW,
            answer_arp: false,
            held: false,
            backends: self.pool.iter().map(backend).collect(),
        };
        let router = self.router;
        let hop = |address| hop(address, router);
        let ops = self.reconciler.plan(&[wanted], &[], hop, self.now).unwrap();
        self.apply(&ops);
    }

    fn apply(&self, ops: &[Op]) {
        apply::apply(&self.dataplane.maps, ops).unwrap();
    }

    /// One packet through the program: its verdict and the frame afterwards.
    fn run(&mut self, packet: &Packet) -> (u32, Vec<u8>) {
        let frame = packet.build();
        let run = self.dataplane.test_run(&frame, INTERFACE, 1).unwrap();
        self.packets += 1;
        (run.verdict, run.data)
    }

    /// A client's packet: the backend it reached.
    fn send(&mut self, client: (u32, u16), opens: bool) -> Option<u8> {
        let packet: Packet = transport(Family::V4, self.kind.protocol)
            .from(IpAddr::from(Ipv4Addr::from(client.0)), client.1)
            .to(IpAddr::from(VIP), PORT)
            .macs(neighbour(client, self.router), BALANCER.mac);
        let packet = match (self.kind.protocol, opens) {
            (TCP, true) => packet.syn(),
            (TCP, false) => packet.ack(),
            _ => packet,
        };
        let (verdict, frame) = self.run(&packet);
        match verdict {
            // A reset goes to the client.
            SENT if frame[..5] == [2, 0, 0, 0, 1] => Some(frame[5]),
            SENT | DROP => None,
            other => panic!("verdict {other} for {client:?}"),
        }
    }

    /// What the backend answers reaches the client, from the VIP.
    fn answer(&mut self, client: (u32, u16), backend: u8, opens: bool) {
        if self.kind.forward != forward::DNAT {
            return;
        }
        let to = IpAddr::from(Ipv4Addr::from(client.0));
        let packet = transport(Family::V4, self.kind.protocol)
            .macs([2, 0, 0, 0, 1, backend], BALANCER.mac)
            .from(host(backend), PORT)
            .to(to, client.1);
        let packet = match (self.kind.protocol, opens) {
            (TCP, true) => packet.syn().ack(),
            (TCP, false) => packet.ack(),
            _ => packet,
        };
        let run = self.run(&packet);
        let expected = packet
            .macs(BALANCER.mac, neighbour(client, self.router))
            .from(IpAddr::from(VIP), PORT)
            .ttl(63);
        assert_eq!(run, (SENT, expected.build()), "an answer to {client:?}");
    }

    fn begin(&mut self) {
        let client = (
            u32::from(Ipv4Addr::new(198, 19, 0, 0)) + self.random.below(5000) as u32,
            1024 + self.random.below(60000) as u16,
        );
        if self.known.contains_key(&client) {
            return;
        }
        if let Some(backend) = self.send(client, true) {
            let last = self.now;
            self.known.insert(client, Flow { backend, last });
            self.answer(client, backend, true);
        }
    }

    fn go_on(&mut self) {
        if self.known.is_empty() {
            return;
        }
        let n = self.random.below(self.known.len() as u64) as usize;
        let (client, flow) = self.known.iter().nth(n).map(|(c, f)| (*c, *f)).unwrap();
        let reached = self.send(client, false);
        if reached == Some(flow.backend) {
            if let Some(flow) = self.known.get_mut(&client) {
                flow.last = self.now;
            }
            self.answer(client, flow.backend, false);
            return;
        }
        let dead = self
            .pool
            .get(&flow.backend)
            .is_some_and(|member| !member.alive);
        if !(dead && self.policy != on_backend_down::KEEP) {
            self.moved += 1;
        }
        self.end(client);
    }

    /// Number of flows that are recorded.
    fn recorded(&self) -> u64 {
        let flows = <u32>::flow_table(&self.dataplane.maps).unwrap();
        flows.len()
    }

    fn end(&mut self, client: (u32, u16)) {
        self.known.remove(&client);
        let key = FlowKey {
            src: client.0.to_be(),
            dst: u32::from(VIP).to_be(),
            sport: client.1.to_be(),
            dport: PORT.to_be(),
            protocol: self.kind.protocol.into(),
        };
        let flows = <u32>::flow_table(&self.dataplane.maps).unwrap();
        let flows = flows.view();
        if let Some(flow) = flows.remove(&key).unwrap() {
            flows.remove(&flow.opposite(key.protocol)).unwrap();
        }
    }

    fn change_pool(&mut self) {
        if self.random.one_in(4) {
            // The other router takes over, and has its address.
            self.router[4] ^= 1;
            self.plan();
            return;
        }
        let n = 1 + self.random.below(12) as u8;
        let up = self
            .pool
            .values()
            .filter(|m| m.alive && m.weight > 0)
            .count();
        match (self.random.below(6), self.pool.contains_key(&n)) {
            // A new one, unless the former owner of its address still has flows.
            (0 | 1, false) => {
                if self.known.values().all(|flow| flow.backend != n) {
                    self.pool.insert(
                        n,
                        Member {
                            weight: 1,
                            alive: true,
                        },
                    );
                }
            }
            (0, true) if up > 1 => {
                self.pool.remove(&n);
            }
            (1 | 2, true) => {
                let weight = self.random.below(4) as u32;
                if weight > 0 || up > 1 {
                    self.pool.insert(
                        n,
                        Member {
                            weight,
                            alive: true,
                        },
                    );
                }
            }
            (3, true) => {
                self.pool.insert(
                    n,
                    Member {
                        weight: 1,
                        alive: false,
                    },
                );
            }
            (_, true) => {
                self.pool.insert(
                    n,
                    Member {
                        weight: 1,
                        alive: true,
                    },
                );
            }
            _ => return,
        }
        self.plan();
        self.retire();
    }

    /// Backends that were removed go when their last flow has ended.
    fn retire(&mut self) {
        let retiring: Vec<(ServiceKey, SocketAddr, u32)> = self.reconciler.retiring().collect();
        for (service, address, _) in retiring {
            let in_use = self
                .known
                .values()
                .any(|flow| host(flow.backend) == address.ip());
            if !in_use && !self.reconciler.remembers(&service, &address) {
                let ops = self.reconciler.forget_backend(&service, &address);
                self.apply(&ops);
            }
        }
    }

    fn pass_time(&mut self) {
        self.now += Duration::from_millis(self.random.below(30_000));
        let silent: Vec<(u32, u16)> = self
            .known
            .iter()
            .filter(|(_, flow)| self.now - flow.last > WINDOW)
            .map(|(client, _)| *client)
            .collect();
        for client in silent {
            self.end(client);
        }
        let number = self.reconciler.service_number(&self.key()).unwrap();
        let timeouts = Timeouts {
            patience: Patience::default(),
            idle: HashMap::from([(number, u32::MAX / 2)]),
            stateless: self.reconciler.stateless_tables(),
            affinity: std::collections::HashMap::new(),
        };
        let sweep = self.flows.sweep(&timeouts).unwrap();
        self.most_recorded = self.most_recorded.max(sweep.flows);
        let ops = self.reconciler.settle(&sweep.settling, self.now);
        self.apply(&ops);
        self.retire();
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..30 => self.begin(),
            30..97 => self.go_on(),
            97 => self.change_pool(),
            _ if self.random.one_in(3) => self.pass_time(),
            _ => self.go_on(),
        }
    }
}

fn steps() -> u64 {
    std::env::var("SLUICE_FLOW_STATE_STEPS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(20_000)
}

fn run(seed: u64, kind: Kind, policy: u8, flows: u32) -> World {
    let mut world = World::new(seed, kind, policy, flows);
    for _ in 0..steps() {
        world.step();
    }
    println!(
        "seed {seed}: {} packets, {} flows at the end, at most {} recorded, {} moved",
        world.packets,
        world.known.len(),
        world.most_recorded,
        world.moved
    );
    world
}

#[test]
fn no_flow_changes_its_backend_without_need() {
    let policies = [on_backend_down::KEEP, on_backend_down::RESET];
    let mut seed = 0;
    for forward in [forward::DSR, forward::DNAT] {
        for protocol in [TCP, UDP] {
            for scheduler in [scheduler::MAGLEV, scheduler::SOURCE_HASH] {
                for policy in policies {
                    seed += 1;
                    let kind = Kind {
                        protocol,
                        forward,
                        scheduler,
                    };
                    let world = run(seed, kind, policy, 65536);
                    assert!(world.most_recorded > 0, "nothing was ever recorded");
                    assert_eq!(world.moved, 0, "of {} packets", world.packets);
                }
            }
        }
    }
}

#[test]
fn a_stable_pool_records_nothing() {
    let mut world = World::new(99, TCP_DSR, on_backend_down::KEEP, 1024);
    for _ in 0..5000 {
        world.begin();
        world.go_on();
    }
    assert_eq!(world.moved, 0);
    assert!(world.known.len() > 4000);
    assert_eq!(world.recorded(), 0);
}

#[test]
fn a_changed_table_settles_when_its_flows_have_ended() {
    let mut world = World::new(7, TCP_DSR, on_backend_down::KEEP, 65536);
    for _ in 0..500 {
        world.begin();
    }
    world.pool.insert(
        1,
        Member {
            weight: 0,
            alive: true,
        },
    );
    world.plan();
    for _ in 0..3000 {
        world.go_on();
    }
    assert_eq!(world.moved, 0);
    let recorded = world.recorded();
    // Those of one backend of five, and the few whose slots changed hands among the others.
    assert!((50..200).contains(&recorded), "{recorded} of 500");
    for client in world.known.keys().copied().collect::<Vec<_>>() {
        world.end(client);
    }
    world.now += WINDOW;
    for _ in 0..3 {
        world.pass_time();
    }
    let unsettled = (0..world.dataplane.maps.slots.len())
        .filter(|n| !world.dataplane.maps.slots.read(*n).is_settled())
        .count();
    assert_eq!(unsettled, 0);
}
