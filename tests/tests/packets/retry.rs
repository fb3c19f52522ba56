//! A SYN that comes again has not been answered: it goes to another backend.

use lb_common::{
    backend::Load,
    flow::SYN_REPEATED,
    service::{forward, scheduler},
    stats::DropReason,
};
use sluice_tests::{
    harness::{Balancer, Expected, Service, TCP, Verdict, service},
    packet::{
        BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, Checksum, Family, Packet, VIP, reply, transport,
    },
};
use std::{thread::sleep, time::Duration};

fn three(family: Family, mode: u8) -> Service {
    service(family, TCP, VIP, 80)
        .forward(mode)
        .scheduler(scheduler::MAGLEV)
        .backend(BACKEND_1, 80, 1)
        .backend(BACKEND_2, 80, 1)
        .backend(BACKEND_3, 80, 1)
        .plural()
}

fn syn(family: Family) -> Packet {
    transport(family, TCP).from(CLIENT, 40000).to(VIP, 80).syn()
}

fn mac(frame: &[u8]) -> Vec<u8> {
    frame[..6].to_vec()
}

#[test]
fn a_repeated_syn_goes_to_another_backend_and_the_flow_stays_there() {
    for family in Family::BOTH {
        for mode in [
            forward::NAT,
            forward::DNAT,
            forward::DSR,
            forward::IPIP,
            forward::GUE,
        ] {
            let mut balancer = Balancer::new(vec![three(family, mode)]);
            let syn = syn(family);
            let first = mac(&balancer.send(&syn).frame);
            assert_eq!(
                mac(&balancer.send(&syn).frame),
                first,
                "a duplicate by the network"
            );
            balancer.age_flows(SYN_REPEATED);
            let outcome = balancer.send(&syn);
            let second = mac(&outcome.frame);
            assert_eq!(outcome.verdict, Verdict::Tx);
            assert_ne!(second, first, "{family:?} {mode}");
            let ack = transport(family, TCP).from(CLIENT, 40000).to(VIP, 80).ack();
            assert_eq!(mac(&balancer.send(&ack).frame), second);
            let retries: u64 = (1..=3)
                .map(|n| balancer.load_of(n))
                .map(|load: Load| load.retries)
                .sum();
            assert_eq!(retries, 1);
        }
    }
}

#[test]
fn so_it_does_where_flows_are_not_recorded() {
    for family in Family::BOTH {
        let modes = [forward::DSR, forward::IPIP, forward::GUE];
        // A client on this host or a guest of it leaves the checksum to its hardware.
        let left = modes.map(|mode| (mode, Checksum::Partial));
        for (mode, checksum) in modes
            .map(|mode| (mode, Checksum::Right))
            .into_iter()
            .chain(left)
        {
            let mut balancer = Balancer::new(vec![three(family, mode).stateless()]);
            // The program remembers those of the modes before.
            let port = 41000 + 4 * u16::from(mode) + 2 * u16::from(checksum == Checksum::Partial);
            let to = |port| {
                let packet = transport(family, TCP).from(CLIENT, port).to(VIP, 80);
                packet.checksum(checksum)
            };
            let syn = to(port).syn();
            let first = mac(&balancer.send(&syn).frame);
            assert_eq!(mac(&balancer.send(&syn).frame), first);
            assert_eq!(balancer.flows(family).len(), 0);
            // Nothing that could be made older: the program's own memory.
            sleep(Duration::from_millis(300));
            let second = mac(&balancer.send(&syn).frame);
            assert_ne!(second, first, "{family:?} {mode}");
            assert_eq!(balancer.flows(family).len(), 1);
            assert_eq!(mac(&balancer.send(&to(port).ack()).frame), second);
            // Another connection from the same port is no repetition.
            let other = to(port + 1).syn();
            let before = mac(&balancer.send(&other).frame);
            sleep(Duration::from_millis(300));
            let new = to(port + 1).syn().seq(99);
            assert_eq!(mac(&balancer.send(&new).frame), before);
        }
    }
}

#[test]
fn a_refusal_is_kept_from_the_client_once() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![three(family, forward::DNAT)]);
        let syn = syn(family);
        for last in [false, true] {
            let sent = balancer.send(&syn).frame;
            let backend = [BACKEND_1, BACKEND_2, BACKEND_3]
                .into_iter()
                .find(|b| b.mac[..] == sent[..6])
                .expect("one of the backends");
            let reset = transport(family, TCP)
                .from(backend, 80)
                .to(CLIENT, 40000)
                .rst();
            let outcome = balancer.send(&reset);
            if last {
                assert_eq!(
                    outcome.verdict,
                    Verdict::Tx,
                    "the client hears of the second"
                );
            } else {
                assert_eq!(outcome.verdict, Verdict::Drop);
                assert_eq!(outcome.counts.drops[DropReason::Refused.name()], 1);
                balancer.age_flows(SYN_REPEATED);
            }
        }
    }
}

#[test]
fn a_refusal_of_the_only_backend_reaches_the_client() {
    for family in Family::BOTH {
        let only = service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1);
        let mut balancer = Balancer::new(vec![only]);
        let sent = balancer.send(&syn(family));
        let (port, _) = sluice_tests::oracle::ports(&sent.frame).expect("ports");
        let reset = reply(family, TCP, BACKEND_1, 8080, port).rst();
        let back = reset.nat_back(VIP, 80, CLIENT, 40000);
        let outcome = balancer.send(&reset);
        let Expected::Sent(expected) = Expected::sent(&back) else {
            unreachable!("it is sent");
        };
        assert_eq!(outcome.frame, expected);
    }
}
