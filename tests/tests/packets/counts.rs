//! Counts of connections, and the sweep that keeps them true beside traffic.

use lb_common::{
    addr::from_ip,
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend, Load, Slot},
    filter,
    service::{Service, ServiceKey, forward, scheduler},
};
use sluice::{
    config::Limits,
    dataplane::Dataplane,
    flows::{Flows, Patience, Sweep, Timeouts},
};
use sluice_tests::{
    harness::TCP,
    packet::{BACKEND_1, CLIENT, Family, Packet, VIP, tcp},
};
use std::{
    collections::HashMap,
    mem::offset_of,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

/// The backend's number, and the service's.
const ONE: u32 = 1;

/// One backend, whose every flow is recorded.
fn dataplane() -> Dataplane {
    let limits = Limits {
        flows: 4096,
        services: 4,
        backends: 4,
        slots: 64,
        ..Limits::DEFAULT
    };
    let dataplane =
        Dataplane::load_unpinned(&limits, bytemuck::Zeroable::zeroed()).expect("it loads");
    let maps = &dataplane.maps;
    let vip = from_ip(VIP.ip(Family::V4))[0];
    let (element, shift) = filter::place(filter::lane_of(vip));
    let lane = u64::from(filter::LANE_VIP) << shift;
    let lanes = maps.address_filter.atomic_u64(element, 0);
    lanes.store(lane, Ordering::Relaxed);
    maps.backends.store(
        ONE,
        Backend {
            addr: from_ip(BACKEND_1.ip(Family::V4)),
            service: ONE,
            generation: 1,
            ifindex: 1,
            family: lb_common::addr::FAMILY_V4,
            flags: BACKEND_ALIVE | BACKEND_RESOLVED,
            ..bytemuck::Zeroable::zeroed()
        },
    );
    maps.slots.write_slice(0, &[Slot::settled(ONE)]);
    let table = Service::pack_table(0, 1);
    maps.services.store(
        ONE,
        Service {
            table,
            members: table,
            forward: forward::DSR,
            scheduler: scheduler::ROUND_ROBIN,
            ..bytemuck::Zeroable::zeroed()
        },
    );
    maps.services4
        .insert(&ServiceKey::new(vip, 80_u16.to_be(), TCP), ONE)
        .expect("room for a listener");
    dataplane
}

fn from(port: u16) -> Packet {
    tcp(Family::V4).from(CLIENT, port).to(VIP, 80)
}

fn send(dataplane: &Dataplane, packet: &Packet) {
    dataplane
        .test_run(&packet.build(), 1, 1)
        .expect("the program runs");
}

fn sweep(flows: &mut Flows) -> Sweep {
    let timeouts = Timeouts {
        patience: Patience::default(),
        idle: HashMap::from([(ONE, u32::MAX / 2)]),
        stateless: HashMap::new(),
        affinity: HashMap::new(),
    };
    flows.sweep(&timeouts).expect("the tables can be read")
}

fn load(dataplane: &Dataplane) -> Load {
    dataplane.maps.backend_load.read(ONE)
}

#[test]
fn what_is_wrong_is_corrected_by_the_second_sweep() {
    let dataplane = dataplane();
    let mut flows = Flows::new(&dataplane.maps).expect("tables");
    for port in 1..=5 {
        send(&dataplane, &from(port).syn());
    }
    send(&dataplane, &from(1).ack());
    let found = sweep(&mut flows);
    assert_eq!((found.flows, found.drift), (5, 0));
    let begun = dataplane
        .maps
        .backend_load
        .atomic_u64(ONE, offset_of!(Load, begun));
    begun.fetch_add(3, Ordering::Relaxed);
    // Of all connections, and of those that are held.
    let drifts = [0, 6, 0].map(|_| sweep(&mut flows).drift);
    assert_eq!(drifts, [0, 6, 0]);
    let load = load(&dataplane);
    assert_eq!((load.active(), load.inactive()), (1, 4));
    assert_eq!(Load::held(load.begun, load.released), 5);
}

/// Beside steady traffic a sweep sees other states than are counted when it ends, again and again in the same
/// direction: once it took that for drift.
#[test]
fn sweeps_beside_traffic_change_nothing() {
    const PORTS: u16 = 8;
    const ROUNDS: u32 = 3000;
    let dataplane = dataplane();
    let mut flows = Flows::new(&dataplane.maps).expect("tables");
    let done = AtomicBool::new(false);
    let mut sweeps = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                let port = 1 + (round % u32::from(PORTS)) as u16;
                send(&dataplane, &from(port).syn());
                send(&dataplane, &from(port).ack());
                send(&dataplane, &from(port).fin().ack());
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            assert_eq!(sweep(&mut flows).drift, 0, "after {sweeps} sweeps");
            sweeps += 1;
        }
    });
    assert!(sweeps > 10, "{sweeps} sweeps beside traffic");
    assert_eq!([sweep(&mut flows).drift, sweep(&mut flows).drift], [0, 0]);
    let load = load(&dataplane);
    let counted = (load.active(), load.inactive());
    assert_eq!(counted, (0, u64::from(PORTS)), "all are half closed");
    assert_eq!(Load::held(load.begun, load.released), 0);
    assert_eq!(load.begun, u64::from(ROUNDS));
}
