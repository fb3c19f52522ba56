//! What hardly ever happens: the kernel refuses what it is asked for.

use lb_common::{
    service::{forward, scheduler},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, INGRESS, TCP, UDP, Verdict, service},
    packet::{BACKEND_1, BALANCER, CLIENT, Family, VIP, tcp, udp},
};

/// A driver that leaves no room in front of a packet: it cannot be put into another one.
#[test]
fn a_packet_that_cannot_grow_is_dropped_and_counted() {
    for family in Family::BOTH {
        for mode in [forward::IPIP, forward::GUE] {
            let mut balancer = Balancer::new(vec![
                service(family, UDP, VIP, 80)
                    .forward(mode)
                    .backend(BACKEND_1, 80, 1),
            ]);
            let sent = udp(family).from(CLIENT, 40000).to(VIP, 80).payload([7; 33]);
            for again in [false, true] {
                let outcome = balancer.run_without_headroom(&sent.build());
                let what = format!("{family:?}, mode {mode}, again: {again}");
                assert_eq!(outcome.verdict, Verdict::Drop, "{what}");
                let drops: Vec<_> = outcome.counts.drops.into_iter().collect();
                assert_eq!(drops, [(DropReason::AdjustFailed.name(), 1)], "{what}");
                let counters = outcome.counts.services[&1];
                assert_eq!((counters.drops, counters.packets_in), (1, 0), "{what}");
            }
            // With room it goes.
            assert_eq!(balancer.send(&sent).verdict, Verdict::Tx);
        }
    }
}

/// The flow table holds the client's entry already, as it may when another CPU was faster. Here it is
/// the backend's own: it and the client are one, and so are the VIP and the address that `nat` sends
/// from.
#[test]
fn a_flow_that_cannot_be_recorded_is_dropped_and_counted() {
    const PORT: u16 = 30000;
    for family in Family::BOTH {
        let services = vec![service(family, TCP, BALANCER, PORT).backend(BACKEND_1, 8080, 1)];
        let mut balancer = Balancer::with_ports(services, (PORT, PORT));
        let sent = tcp(family).from(BACKEND_1, 8080).to(BALANCER, PORT).syn();
        let outcome = balancer.send(&sent);
        assert_eq!(outcome.verdict, Verdict::Drop);
        let drops: Vec<_> = outcome.counts.drops.into_iter().collect();
        assert_eq!(drops, [(DropReason::TableFull.name(), 1)]);
        assert!(balancer.flows(family).is_empty(), "nothing is left behind");
        // Another client's is recorded.
        let other = tcp(family).from(CLIENT, 40000).to(BALANCER, PORT).syn();
        assert_eq!(balancer.send(&other).verdict, Verdict::Tx);
    }
}

/// Answers would not find back: the daemon tells of every interface before the program is there, so this
/// is one that has just gone.
#[test]
fn a_flow_from_an_unknown_interface_is_not_recorded_where_answers_have_to_find_back() {
    for family in Family::BOTH {
        for mode in [forward::NAT, forward::DNAT, forward::DSR] {
            let mut balancer = Balancer::new(vec![
                service(family, UDP, VIP, 80)
                    .forward(mode)
                    .scheduler(scheduler::ROUND_ROBIN)
                    .backend(BACKEND_1, 80, 1),
            ]);
            balancer.forget_interface(INGRESS);
            let outcome = balancer.send(&udp(family).from(CLIENT, 40000).to(VIP, 80));
            let what = format!("{family:?}, mode {mode}");
            if mode == forward::DSR {
                assert_eq!(outcome.verdict, Verdict::Tx, "{what}");
                continue;
            }
            assert_eq!(outcome.verdict, Verdict::Drop, "{what}");
            let drops: Vec<_> = outcome.counts.drops.into_iter().collect();
            assert_eq!(drops, [(DropReason::NoNeighbour.name(), 1)], "{what}");
            assert!(balancer.flows(family).is_empty(), "{what}");
        }
    }
}
