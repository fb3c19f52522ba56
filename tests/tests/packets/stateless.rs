//! Services whose flows follow the selection table: what leaves is what a recorded flow would send, and nothing is
//! recorded until a slot changes hands.

use lb_common::{
    flow::state,
    service::{forward, on_backend_down},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, Previous, Service, TCP, UDP, service},
    packet::{
        BACKEND_1, BACKEND_2, CLIENT, Family, GATEWAY, Packet, VIP, error_for, reset_for, too_big,
        transport,
    },
};

const MODES: [u8; 3] = [forward::DSR, forward::IPIP, forward::GUE];

fn two(family: Family, protocol: u8, mode: u8) -> Service {
    service(family, protocol, VIP, 80)
        .forward(mode)
        .backend(BACKEND_1, 80, 1)
        .backend(BACKEND_2, 80, 1)
        .stateless()
}

/// Only the first backend takes new flows; all slots are its own.
fn first_of_two(family: Family, protocol: u8) -> Service {
    two(family, protocol, forward::DSR).last(|b| b.weight = 0)
}

pub fn packet(family: Family, protocol: u8, port: u16) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, port).to(VIP, 80);
    if protocol == TCP {
        packet.ack()
    } else {
        packet
    }
}

pub fn begin(family: Family, protocol: u8, port: u16) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, port).to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet
    }
}

pub fn each(mut check: impl FnMut(Family, u8)) {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            check(family, protocol);
        }
    }
}

#[test]
fn packets_leave_as_those_of_a_recorded_flow() {
    for mode in MODES {
        each(|family, protocol| {
            let mut follows = Balancer::new(vec![two(family, protocol, mode)]);
            let mut records = two(family, protocol, mode);
            records.stateless = false;
            let mut records = Balancer::new(vec![records]);
            for port in 40000..40040 {
                let begin = begin(family, protocol, port);
                let next = packet(family, protocol, port).payload(*b"and on");
                for (sent, begins) in [(begin, true), (next, false)] {
                    let expected = records.send(&sent);
                    let got = follows.send(&sent);
                    assert_eq!(
                        (got.verdict, &got.frame),
                        (expected.verdict, &expected.frame)
                    );
                    let counted = got.counts.services[&1].connections;
                    // Nobody can tell which packet of UDP is a flow's first.
                    assert_eq!(counted, u64::from(begins && protocol == TCP));
                }
            }
            assert_eq!(follows.flows(family), [], "nothing is recorded");
        });
    }
}

#[test]
fn a_packet_that_cannot_go_on_is_refused_as_ever() {
    each(|family, protocol| {
        let mut unresolved = two(family, protocol, forward::DSR);
        for backend in &mut unresolved.backends {
            backend.resolved = false;
        }
        let sent = packet(family, protocol, 40000);
        Balancer::new(vec![unresolved]).check(
            "no next hop",
            &sent,
            &Expected::Dropped,
            &Counts::default().drop(DropReason::NoNeighbour, 1),
        );
        let none = service(family, protocol, VIP, 80)
            .forward(forward::DSR)
            .stateless();
        let mut balancer = Balancer::new(vec![none]);
        let expected = if protocol == TCP {
            Expected::sent(&reset_for(&sent))
        } else {
            Expected::Dropped
        };
        balancer.check(
            "no backend",
            &sent,
            &expected,
            &Counts::default().drop(DropReason::NoBackend, 1),
        );
        for mode in [forward::IPIP, forward::GUE] {
            let mut balancer = Balancer::new(vec![two(family, protocol, mode)]);
            let outcome = balancer.send(&packet(family, protocol, 40000).ttl(1));
            let expected = Counts::default().drop(DropReason::TtlExceeded, 1);
            assert_eq!(outcome.counts, expected);
        }
    });
}

#[test]
fn a_changed_slot_keeps_its_flows_and_records_them() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![first_of_two(family, protocol)]);
        balancer.change(1, |s| s.previous = Some(Previous::Backend(1)));
        let old = packet(family, protocol, 40000);
        let held = |n| {
            let active = Counts::default().packet_in(1, n, old.ip_len());
            active.load(n, 1, 0)
        };
        let begun = |counts: Counts| {
            // For UDP, one that is recorded counts as begun.
            if protocol == UDP {
                counts.connection(1, 2)
            } else {
                counts
            }
        };
        let to_second = Expected::sent(&old.dsr_to(BACKEND_2.mac));
        balancer.check("an old flow", &old, &to_second, &begun(held(2)));
        assert_eq!(balancer.flows(family).len(), 1);
        balancer.check("again", &old, &to_second, &held(2));
        if protocol == TCP {
            let new = begin(family, protocol, 40001);
            let counts = Counts::default()
                .packet_in(1, 1, new.ip_len())
                .connection(1, 1)
                .load(1, 0, 1)
                .load(2, 1, 0);
            let to_first = Expected::sent(&new.dsr_to(BACKEND_1.mac));
            balancer.check("a new flow", &new, &to_first, &counts);
            let states: Vec<u8> = balancer.flows(family).iter().map(|f| f.state).collect();
            assert!(states.contains(&state::ESTABLISHED) && states.contains(&state::SYN_SENT));
        }
        // The window ends: what is recorded stays, what is not belongs to the slot's backend.
        balancer.change(1, |s| s.previous = Some(Previous::Closing));
        let flows = balancer.flows(family).len();
        let outcome = balancer.send(&old);
        assert_eq!(outcome.frame, old.dsr_to(BACKEND_2.mac).build());
        let unseen = packet(family, protocol, 40002);
        let outcome = balancer.send(&unseen);
        assert_eq!(outcome.frame, unseen.dsr_to(BACKEND_1.mac).build());
        assert_eq!(balancer.flows(family).len(), flows, "no other is recorded");
    });
}

#[test]
fn flows_of_a_dead_former_backend_follow_the_policy() {
    each(|family, protocol| {
        let service = first_of_two(family, protocol).last(|b| b.alive = false);
        let mut balancer = Balancer::new(vec![service]);
        balancer.change(1, |s| s.previous = Some(Previous::Backend(1)));
        let old = packet(family, protocol, 40000);
        let outcome = balancer.send(&old);
        assert_eq!(outcome.frame, old.dsr_to(BACKEND_2.mac).build(), "keep");

        balancer.change(1, |s| s.on_backend_down = on_backend_down::RESET);
        let old = packet(family, protocol, 40001);
        let outcome = balancer.send(&old);
        if protocol == TCP {
            assert_eq!(outcome.frame, reset_for(&old).build(), "reset");
            assert_eq!(outcome.counts.drops[DropReason::BackendDown.name()], 1);
        } else {
            assert_eq!(
                outcome.frame,
                old.dsr_to(BACKEND_1.mac).build(),
                "picks again"
            );
        }
    });
}

#[test]
fn an_error_about_an_unrecorded_flow_reaches_its_backend() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, TCP, forward::DSR)]);
        let sent = packet(family, TCP, 40000);
        let reached = balancer.send(&sent).frame[..6].to_vec();
        let answer = transport(family, TCP)
            .from(VIP, 80)
            .to(CLIENT, 40000)
            .ack()
            .payload(vec![7; 900]);
        let error = error_for(&answer, too_big(family, 1400)).from(GATEWAY, 0);
        let outcome = balancer.send(&error);
        assert_eq!(outcome.frame[..6], reached);
        assert_eq!(balancer.flows(family), []);
    }
}

#[test]
fn fragments_follow_the_first() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, UDP, forward::DSR)]);
        let whole = packet(family, UDP, 40000).payload(vec![1; 3000]);
        let reached = balancer.send(&packet(family, UDP, 40000)).frame[..6].to_vec();
        for piece in whole.fragments(1000) {
            let outcome = balancer.send(&piece);
            assert_eq!(outcome.frame[..6], reached, "{:?}", outcome.counts);
        }
        assert_eq!(balancer.flows(family), []);
    }
}
