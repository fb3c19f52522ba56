//! What a service listens on: one port, a range of ports, every port.

use lb_common::stats::DropReason;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, Service, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, Family, Packet, VIP, VIP_2, reply, reset_for,
        transport,
    },
};

fn request(family: Family, protocol: u8, port: u16) -> Packet {
    let packet = transport(family, protocol)
        .from(CLIENT, 40000)
        .to(VIP, port);
    if protocol == TCP {
        packet.syn()
    } else {
        packet.payload(*b"question")
    }
}

fn load(counts: Counts, backend: u32, protocol: u8) -> Counts {
    if protocol == TCP {
        counts.load(backend, 0, 1)
    } else {
        counts.load(backend, 1, 0)
    }
}

/// The service and backend a new flow to `port` is counted for; `None`: it passes to the kernel.
#[track_caller]
fn taken_by(balancer: &mut Balancer, family: Family, protocol: u8, port: u16) -> Option<u32> {
    let sent = request(family, protocol, port);
    let outcome = balancer.send(&sent);
    balancer.reset();
    if outcome.verdict == Verdict::Pass {
        assert_eq!(outcome.frame, sent.build(), "passes untouched");
        assert_eq!(outcome.counts, Counts::default(), "passes uncounted");
        return None;
    }
    assert_eq!(outcome.verdict, Verdict::Tx, "{:?}", outcome.counts);
    outcome.counts.services.keys().next().copied()
}

#[test]
fn a_range_takes_its_ports_and_no_other() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let range = service(family, protocol, VIP, 8000)
                .until(8100)
                .backend(BACKEND_1, 80, 1);
            let mut balancer = Balancer::new(vec![range]);
            for (port, expected) in [
                (7999, None),
                (8000, Some(1)),
                (8050, Some(1)),
                (8100, Some(1)),
                (8101, None),
            ] {
                let got = taken_by(&mut balancer, family, protocol, port);
                assert_eq!(got, expected, "{family:?} protocol {protocol} port {port}");
            }
            let other = if protocol == TCP { UDP } else { TCP };
            let got = taken_by(&mut balancer, family, other, 8050);
            assert_eq!(got, None, "{family:?}: the range is of the other protocol");
        }
    }
}

#[test]
fn who_names_the_port_goes_before_who_takes_every_port() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let listen = |port| service(family, protocol, VIP, port);
            let mut balancer = Balancer::new(vec![
                listen(0).backend(BACKEND_1, 0, 1),
                listen(80).backend(BACKEND_2, 8080, 1),
                listen(8000).until(8010).backend(BACKEND_3, 0, 1),
            ]);
            for (port, expected) in [
                (1, Some(1)),
                (79, Some(1)),
                (80, Some(2)),
                (81, Some(1)),
                (7999, Some(1)),
                (8000, Some(3)),
                (8010, Some(3)),
                (8011, Some(1)),
                (65535, Some(1)),
                // Reserved, and not a port anything listens on.
                (0, None),
            ] {
                let got = taken_by(&mut balancer, family, protocol, port);
                assert_eq!(got, expected, "{family:?} protocol {protocol} port {port}");
            }
        }
    }
}

/// Another VIP, or the other protocol of the same one, is not drawn in.
#[test]
fn every_port_is_every_port_of_one_vip_and_protocol() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, TCP, VIP_2, 0).backend(BACKEND_1, 0, 1),
            service(family, UDP, VIP, 0).backend(BACKEND_1, 0, 1),
            service(family, TCP, VIP, 80).backend(BACKEND_1, 80, 1),
        ]);
        assert_eq!(taken_by(&mut balancer, family, TCP, 81), None);
        assert_eq!(taken_by(&mut balancer, family, TCP, 80), Some(3));
        assert_eq!(taken_by(&mut balancer, family, UDP, 80), Some(2));
    }
}

/// There and back, byte for byte: the backend sees the client's port, the client the VIP's.
fn keeps_the_port(service: impl Fn(Family, u8) -> Service, port: u16, backend_port: u16) {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let what = format!("{family:?} protocol {protocol}");
            let mut balancer = Balancer::new(vec![service(family, protocol)]);
            let sent = request(family, protocol, port);
            let counts = Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1);
            let nat_port = balancer.check_new(
                &format!("{what}: first packet"),
                &sent,
                |nat_port| Expected::sent(&sent.nat_to(BACKEND_1, backend_port, nat_port)),
                &load(counts, 1, protocol),
            );
            let answer = reply(family, protocol, BACKEND_1, backend_port, nat_port);
            let answer = if protocol == TCP {
                answer.syn().ack()
            } else {
                answer.payload(*b"an answer")
            };
            let counts = Counts::default().packet_out(1, 1, answer.ip_len());
            balancer.check(
                &format!("{what}: reply"),
                &answer,
                &Expected::sent(&answer.nat_back(VIP, port, CLIENT, 40000)),
                &load(counts, 1, protocol),
            );
        }
    }
}

#[test]
fn a_backend_without_a_port_gets_the_port_the_client_sent_to() {
    let every = |family, protocol| service(family, protocol, VIP, 0).backend(BACKEND_1, 0, 1);
    keeps_the_port(every, 5060, 5060);
    let range = |family, protocol| {
        service(family, protocol, VIP, 8000)
            .until(8010)
            .backend(BACKEND_1, 0, 1)
    };
    keeps_the_port(range, 8010, 8010);
}

#[test]
fn a_backend_with_a_port_gets_all_of_a_range_there() {
    let range = |family, protocol| {
        service(family, protocol, VIP, 8000)
            .until(8010)
            .backend(BACKEND_1, 80, 1)
    };
    keeps_the_port(range, 8003, 80);
}

/// The same client, the same source port, two ports of one service: two connections.
#[test]
fn two_ports_of_one_service_are_two_flows() {
    for family in Family::BOTH {
        let every = service(family, UDP, VIP, 0).backend(BACKEND_1, 0, 1);
        let mut balancer = Balancer::new(vec![every]);
        for (flows, port) in [(1, 53), (2, 54), (2, 53)] {
            let outcome = balancer.send(&request(family, UDP, port));
            assert_eq!(outcome.verdict, Verdict::Tx);
            assert_eq!(balancer.flows(family).len(), 2 * flows, "to port {port}");
        }
    }
}

#[test]
fn a_segment_of_no_connection_is_refused_on_every_port() {
    for family in Family::BOTH {
        let every = service(family, TCP, VIP, 0).backend(BACKEND_1, 0, 1);
        let mut balancer = Balancer::new(vec![every]);
        let stray = transport(family, TCP).from(CLIENT, 40000).to(VIP, 9).ack();
        balancer.check(
            "a segment that opens nothing",
            &stray,
            &Expected::sent(&reset_for(&stray)),
            &Counts::default().drop(DropReason::NoFlow, 1),
        );
    }
}
