//! `dnat` with a gateway: requests and answers leave as those of a recorded flow, and nothing is recorded until a
//! slot changes hands or a client comes by another way.

use crate::stateless::{begin, each, packet};
use lb_common::{backend::LOCAL, flow::SYN_REPEATED, service::on_backend_down, stats::DropReason};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, Outcome, Previous, Service, TCP, UDP, Verdict, service},
    oracle,
    packet::{
        BACKEND_1, BACKEND_2, BALANCER, CLIENT, CLIENT_2, Checksum, Family, GATEWAY, Host, Packet,
        STRANGER, VIP, VIP_2, error_for, icmp_error, reset_for, time_exceeded, too_big, transport,
    },
};
use std::{thread::sleep, time::Duration};

const PORT: u16 = 8080;

fn two(family: Family, protocol: u8) -> Service {
    service(family, protocol, VIP, 80)
        .backend(BACKEND_1, PORT, 1)
        .backend(BACKEND_2, PORT, 1)
        .through(GATEWAY)
}

/// The same service, all of whose flows are recorded.
fn recorded(service: &Service) -> Service {
    Service {
        stateless: false,
        gateway: None,
        ..service.clone()
    }
}

/// Only the first backend takes new flows; all slots are its own.
fn first_of_two(family: Family, protocol: u8) -> Service {
    two(family, protocol).last(|b| b.weight = 0)
}

fn answer(family: Family, protocol: u8, from: Host, port: u16) -> Packet {
    let packet = transport(family, protocol)
        .macs(from.mac, BALANCER.mac)
        .from(from, PORT)
        .to(CLIENT, port);
    if protocol == TCP {
        packet.ack()
    } else {
        packet
    }
}

/// The backend that a packet went to.
fn reached(outcome: &Outcome) -> Host {
    let to = &outcome.frame[..6];
    let backends = [BACKEND_1, BACKEND_2];
    let backend = backends.into_iter().find(|b| b.mac == to);
    backend.unwrap_or_else(|| panic!("{outcome:?} went to no backend"))
}

/// What both balancers do with a packet must be the same, but for what is counted of connections.
fn same(follows: &mut Balancer, records: &mut Balancer, what: &str, sent: &Packet) -> Outcome {
    let (expected, got) = (records.send(sent), follows.send(sent));
    assert_eq!(
        (got.verdict, &got.frame),
        (expected.verdict, &expected.frame),
        "{what}: {sent:?}"
    );
    assert_eq!(got.counts.drops, expected.counts.drops, "{what}");
    let traffic = |counts: &Counts| {
        let all = counts.services.iter().chain(&counts.backends);
        all.map(|(n, c)| (*n, c.packets_in, c.bytes_in, c.packets_out, c.bytes_out))
            .collect::<Vec<_>>()
    };
    assert_eq!(traffic(&got.counts), traffic(&expected.counts), "{what}");
    got
}

#[test]
fn both_directions_leave_as_those_of_a_recorded_flow() {
    each(|family, protocol| {
        let service = two(family, protocol);
        let mut records = Balancer::new(vec![recorded(&service)]);
        let mut follows = Balancer::new(vec![service]);
        for port in 40000..40030 {
            let mut both = |what, sent: &Packet| same(&mut follows, &mut records, what, sent);
            let backend = reached(&both("the first packet", &begin(family, protocol, port)));
            let asks = packet(family, protocol, port);
            let answers = answer(family, protocol, backend, port);
            if protocol == TCP {
                both("SYN-ACK", &answers.clone().syn());
            }
            both("request", &asks.clone().payload(*b"give me an odd piece"));
            both("answer", &answers.clone().payload(*b"there it is."));
            both("answer of one byte", &answers.clone().payload(*b"."));
            both(
                "checksum left to hardware",
                &asks.clone().checksum(Checksum::Partial),
            );
            both(
                "the same in an answer",
                &answers.clone().checksum(Checksum::Partial),
            );
            both("damaged", &answers.clone().checksum(Checksum::Wrong(7)));
            both("no hop left", &asks.clone().ttl(1));
            both("no hop left for the answer", &answers.clone().ttl(1));
            if protocol == TCP {
                both("FIN", &answers.clone().fin());
                both("FIN of the client", &asks.clone().fin());
                both("the last ACK", &answers);
            } else if family == Family::V4 {
                both("no checksum", &answers.checksum(Checksum::Zero));
            }
        }
        assert_eq!(follows.flows(family), [], "nothing is recorded");
    });
}

#[test]
fn connections_are_counted_by_their_syn() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, TCP)]);
        let syn = begin(family, TCP, 40000);
        let backend = reached(&balancer.send(&syn));
        assert_eq!(balancer.send(&syn).counts.services[&1].connections, 1);
        let answer = answer(family, TCP, backend, 40000).syn();
        let counts = balancer.send(&answer).counts;
        let number = if backend == BACKEND_1 { 1 } else { 2 };
        assert_eq!(
            counts,
            Counts::default().packet_out(1, number, answer.ip_len())
        );
    }
}

#[test]
fn what_is_no_answer_to_the_vip_passes() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        let backend = reached(&balancer.send(&begin(family, protocol, 40000)));
        let other = if backend == BACKEND_1 {
            BACKEND_2
        } else {
            BACKEND_1
        };
        let answers = answer(family, protocol, backend, 40000);
        let mut passes = |what, packet: &Packet| {
            balancer.check(what, packet, &Expected::Passed, &Counts::default());
        };
        passes(
            "of a backend the flow is not with",
            &answer(family, protocol, other, 40000),
        );
        passes(
            "from another port",
            &answers.clone().from(backend, PORT + 1),
        );
        passes(
            "from a host that is no backend",
            &answers.clone().from(STRANGER, PORT),
        );
        if protocol == TCP {
            let begins = transport(family, TCP)
                .macs(backend.mac, BALANCER.mac)
                .from(backend, PORT)
                .to(CLIENT, 40000)
                .syn();
            passes("a connection that the backend begins", &begins);
        }
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        balancer.hold(CLIENT.ip(family));
        balancer.check(
            "to this host",
            &answers,
            &Expected::Passed,
            &Counts::default(),
        );
    });
}

#[test]
fn clients_who_come_by_another_way_are_recorded_and_answered_there() {
    each(|family, protocol| {
        let service = two(family, protocol);
        let mut records = Balancer::new(vec![recorded(&service)]);
        let mut follows = Balancer::new(vec![service]);
        let near = |packet: Packet| packet.macs(CLIENT_2.mac, BALANCER.mac);
        let mut both = |what, sent: &Packet| same(&mut follows, &mut records, what, sent);
        let backend = reached(&both("first", &near(begin(family, protocol, 40000))));
        let answers = answer(family, protocol, backend, 40000);
        let outcome = both("answer", &answers);
        assert_eq!(outcome.frame[..6], CLIENT_2.mac);
        both("next", &near(packet(family, protocol, 40000)));
        both("tagged", &begin(family, protocol, 40001).vlan(0x8100, 7));
        assert!(!follows.flows(family).is_empty());
        assert_eq!(follows.flows(family), records.flows(family));
        // A client that the network sends another way meanwhile.
        let mut follows = Balancer::new(vec![two(family, protocol)]);
        follows.send(&begin(family, protocol, 40000));
        assert_eq!(follows.flows(family), []);
        follows.send(&near(packet(family, protocol, 40000)));
        assert_eq!(follows.flows(family).len(), 2);
        assert_eq!(follows.send(&answers).frame[..6], CLIENT_2.mac);
    });
}

#[test]
fn a_client_that_may_be_this_host_is_recorded_and_a_backend_is_not_led_to_itself() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        let of = |host: Host| begin(family, protocol, 40000).from(host, 40000);
        for backend in [BACKEND_1, BACKEND_2] {
            let outcome = balancer.send(&of(backend));
            let refused = outcome
                .counts
                .drops
                .contains_key(DropReason::Hairpin.name());
            assert!(refused || reached(&outcome) != backend, "{outcome:?}");
        }
        assert_eq!(balancer.flows(family), []);
        // All slots are the one backend's.
        let mut alone = Balancer::new(vec![first_of_two(family, protocol)]);
        let outcome = alone.send(&of(BACKEND_1));
        assert_eq!(
            outcome.counts,
            Counts::default().drop(DropReason::Hairpin, 1)
        );
        assert_eq!(reached(&alone.send(&of(BACKEND_2))), BACKEND_1);
        balancer.hold(CLIENT_2.ip(family));
        let backend = reached(&balancer.send(&of(CLIENT_2)));
        assert_eq!(balancer.flows(family).len(), 2);
        let answers = answer(family, protocol, backend, 40000).to(CLIENT_2, 40000);
        assert_eq!(balancer.send(&answers).frame[..6], GATEWAY.mac);
    });
}

#[test]
fn without_a_way_to_the_gateway_new_flows_are_recorded_and_answers_wait() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        let backend = reached(&balancer.send(&begin(family, protocol, 40000)));
        balancer.write_gateway(1, |gateway| gateway.flags = 0);
        balancer.check(
            "an answer",
            &answer(family, protocol, backend, 40000),
            &Expected::Dropped,
            &Counts::default().drop(DropReason::NoNeighbour, 1),
        );
        let backend = reached(&balancer.send(&begin(family, protocol, 40001)));
        assert_eq!(balancer.flows(family).len(), 2);
        let outcome = balancer.send(&answer(family, protocol, backend, 40001));
        assert_eq!(outcome.frame[..6], GATEWAY.mac);
    });
}

#[test]
fn answers_that_do_not_fit_the_way_to_the_gateway_are_told() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        let backend = reached(&balancer.send(&begin(family, protocol, 40000)));
        balancer.write_gateway(1, |gateway| gateway.mtu = 1280);
        let sent = answer(family, protocol, backend, 40000).payload(vec![1; 1300]);
        balancer.check(
            "an answer",
            &sent,
            &Expected::sent(&error_for(&sent, too_big(family, 1280))),
            &Counts::default().drop(DropReason::TooBig, 1),
        );
    });
}

#[test]
fn a_backend_of_this_host_is_recorded() {
    each(|family, protocol| {
        let mut service = first_of_two(family, protocol);
        service.backends[0].ifindex = LOCAL;
        let mut balancer = Balancer::new(vec![service]);
        assert_eq!(
            balancer.send(&begin(family, protocol, 40000)).verdict,
            Verdict::Pass
        );
        assert_eq!(balancer.flows(family).len(), 2);
    });
}

#[test]
fn a_changed_slot_keeps_its_flows_and_both_sides_are_answered() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![first_of_two(family, protocol)]);
        balancer.change(1, |s| s.previous = Some(Previous::Backend(1)));
        // One that was there before: its answers find their way, whoever speaks first.
        let outcome = balancer.send(&answer(family, protocol, BACKEND_2, 40000));
        assert_eq!(outcome.frame[..6], GATEWAY.mac);
        assert_eq!(balancer.flows(family), []);
        let outcome = balancer.send(&packet(family, protocol, 40000));
        assert_eq!(reached(&outcome), BACKEND_2);
        assert_eq!(balancer.flows(family).len(), 2);
        if protocol == TCP {
            // A new one is the new backend's.
            let outcome = balancer.send(&begin(family, protocol, 40001));
            assert_eq!(reached(&outcome), BACKEND_1);
            let outcome = balancer.send(&answer(family, protocol, BACKEND_1, 40001).syn());
            assert_eq!(outcome.frame[..6], GATEWAY.mac);
            assert_eq!(balancer.flows(family).len(), 4);
        }
        // The window ends: what is recorded stays, what is not belongs to the slot's backend.
        balancer.change(1, |s| s.previous = Some(Previous::Closing));
        let outcome = balancer.send(&packet(family, protocol, 40000));
        assert_eq!(reached(&outcome), BACKEND_2);
        let outcome = balancer.send(&answer(family, protocol, BACKEND_2, 40000));
        assert_eq!(outcome.frame[..6], GATEWAY.mac);
        let outcome = balancer.send(&answer(family, protocol, BACKEND_2, 40002));
        assert_eq!(outcome.verdict, Verdict::Pass, "of no flow of this backend");
        let outcome = balancer.send(&packet(family, protocol, 40002));
        assert_eq!(reached(&outcome), BACKEND_1);
    });
}

#[test]
fn flows_of_a_dead_former_backend_follow_the_policy() {
    for family in Family::BOTH {
        let service = first_of_two(family, TCP).last(|b| b.alive = false);
        let mut balancer = Balancer::new(vec![service]);
        balancer.change(1, |s| s.previous = Some(Previous::Backend(1)));
        let old = packet(family, TCP, 40000);
        assert_eq!(reached(&balancer.send(&old)), BACKEND_2, "keep");
        balancer.change(1, |s| s.on_backend_down = on_backend_down::RESET);
        let old = packet(family, TCP, 40001);
        let outcome = balancer.send(&old);
        assert_eq!(outcome.frame, reset_for(&old).build(), "reset");
        assert_eq!(outcome.counts.drops[DropReason::BackendDown.name()], 1);
    }
}

#[test]
fn a_repeated_syn_goes_to_another_backend() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, TCP).plural()]);
        let syn = begin(family, TCP, 40000);
        let first = reached(&balancer.send(&syn));
        // Nothing that could be made older: the program's own memory.
        sleep(Duration::from_nanos(u64::from(SYN_REPEATED + 50) << 20));
        let second = reached(&balancer.send(&syn));
        assert_ne!(second, first);
        assert_eq!(balancer.flows(family).len(), 2);
        // The first one answers late: nobody waits for it any more.
        let late = answer(family, TCP, first, 40000).syn();
        balancer.check("too late", &late, &Expected::Passed, &load(second));
        let outcome = balancer.send(&answer(family, TCP, second, 40000).syn());
        assert_eq!(outcome.frame[..6], GATEWAY.mac);
        assert_eq!(reached(&balancer.send(&packet(family, TCP, 40000))), second);
    }
}

/// One connection of a backend that is being opened.
fn load(backend: Host) -> Counts {
    let number = if backend == BACKEND_1 { 1 } else { 2 };
    Counts::default().load(number, 0, 1)
}

#[test]
fn a_syn_that_was_answered_stays_where_it_is() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, TCP).plural()]);
        let syn = begin(family, TCP, 45_100).seq(7000);
        let first = reached(&balancer.send(&syn));
        let accepts = answer(family, TCP, first, 45_100).syn().ack_number(7001);
        for _ in 0..3 {
            // Lost on its way to the client.
            assert_eq!(balancer.send(&accepts).frame[..6], GATEWAY.mac);
            sleep(Duration::from_nanos(u64::from(SYN_REPEATED + 50) << 20));
            assert_eq!(reached(&balancer.send(&syn)), first);
        }
        assert_eq!(balancer.flows(family), []);
    }
}

#[test]
fn what_is_recorded_because_of_a_change_follows_the_gateway() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![first_of_two(family, protocol)]);
        balancer.change(1, |s| s.previous = Some(Previous::Backend(1)));
        balancer.send(&packet(family, protocol, 40000));
        assert_eq!(balancer.flows(family).len(), 2);
        let mut l2 = [0; 12];
        l2[..6].copy_from_slice(&STRANGER.mac);
        l2[6..].copy_from_slice(&BALANCER.mac);
        balancer.write_gateway(1, |gateway| {
            (gateway.l2, gateway.mtu) = (bytemuck::cast(l2), 1280);
        });
        let answers = answer(family, protocol, BACKEND_2, 40000);
        assert_eq!(balancer.send(&answers).frame[..6], STRANGER.mac);
        let large = answers.clone().payload(vec![1; 1300]);
        let outcome = balancer.send(&large);
        let told = error_for(&large, too_big(family, 1280));
        assert_eq!(outcome.frame, told.build());
        // A router on the backend's side tells the client of its request.
        let sent = transport(family, protocol)
            .from(CLIENT, 40000)
            .to(BACKEND_2, PORT)
            .payload(*b"any");
        let error = icmp_error(family, time_exceeded(family), &sent, 64)
            .macs(BACKEND_2.mac, BALANCER.mac)
            .from(GATEWAY, 0)
            .to(CLIENT, 0);
        assert_eq!(balancer.send(&error).frame[..6], STRANGER.mac);
        balancer.write_gateway(1, |gateway| gateway.flags = 0);
        let outcome = balancer.send(&answers);
        assert_eq!(outcome.counts.drops[DropReason::NoNeighbour.name()], 1);
    });
}

#[test]
fn a_flood_past_the_gateway_fills_no_table() {
    each(|family, protocol| {
        let mut balancer = Balancer::new(vec![two(family, protocol)]);
        balancer.set_new_flows(1);
        let near = |packet: Packet| packet.macs(CLIENT_2.mac, BALANCER.mac);
        for port in 40000..40100 {
            reached(&balancer.send(&near(begin(family, protocol, port))));
        }
        assert!(
            balancer.flows(family).len() < 20,
            "{}",
            balancer.flows(family).len()
        );
        // Whoever is real completes his handshake.
        let port = 40099;
        let backend = reached(&balancer.send(&near(begin(family, protocol, port))));
        let answers = answer(family, protocol, backend, port);
        let answers = if protocol == TCP {
            answers.syn()
        } else {
            answers
        };
        assert_eq!(balancer.send(&answers).frame[..6], CLIENT_2.mac);
        let outcome = balancer.send(&near(packet(family, protocol, port)));
        assert_eq!(reached(&outcome), backend);
        balancer.set_new_flows(0);
    });
}

#[test]
fn the_first_refusal_is_kept_from_the_client() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![two(family, TCP).plural()]);
        let refusals =
            |balancer: &Balancer| balancer.load_of(1).resets + balancer.load_of(2).resets;
        // What the program remembers of other tests is not about this port.
        let syn = begin(family, TCP, 45_000).seq(1000);
        let first = reached(&balancer.send(&syn));
        let refusal = |from| {
            let rst = answer(family, TCP, from, 45_000).rst();
            rst.seq(0).ack_number(1001)
        };
        balancer.check(
            "a refusal",
            &refusal(first),
            &Expected::Dropped,
            &Counts::default().drop(DropReason::Refused, 1),
        );
        assert_eq!(refusals(&balancer), 1);
        let other = balancer.send(&refusal(first).ack_number(5));
        assert_eq!(other.frame[..6], GATEWAY.mac, "of another SYN");
        assert_eq!(refusals(&balancer), 2);
        let later = balancer.send(&answer(family, TCP, first, 45_000).rst());
        assert_eq!(later.frame[..6], GATEWAY.mac, "the end of a connection");
        assert_eq!(refusals(&balancer), 2);
        sleep(Duration::from_nanos(u64::from(SYN_REPEATED + 50) << 20));
        let second = reached(&balancer.send(&syn));
        assert_ne!(second, first);
        let outcome = balancer.send(&refusal(second));
        assert_eq!(outcome.frame[..6], GATEWAY.mac, "the second one is told");
    }
    let mut balancer = Balancer::new(vec![two(Family::V4, TCP)]);
    let first = reached(&balancer.send(&begin(Family::V4, TCP, 45_001).seq(1000)));
    let refusal = answer(Family::V4, TCP, first, 45_001)
        .rst()
        .seq(0)
        .ack_number(1001);
    let outcome = balancer.send(&refusal);
    assert_eq!(outcome.frame[..6], GATEWAY.mac, "nobody else could take it");
}

#[test]
fn errors_about_either_direction_are_translated() {
    each(|family, protocol| {
        let service = two(family, protocol);
        let mut records = Balancer::new(vec![recorded(&service)]);
        let mut follows = Balancer::new(vec![service]);
        let mut both = |what, sent: &Packet| same(&mut follows, &mut records, what, sent);
        let backend = reached(&both("first", &begin(family, protocol, 40000)));
        // A router on the client's side cannot send an answer on.
        let sent = transport(family, protocol)
            .from(VIP, 80)
            .to(CLIENT, 40000)
            .payload(vec![7; 900]);
        both(
            "an answer is too big",
            &error_for(&sent, too_big(family, 1400)).from(GATEWAY, 0),
        );
        // One on the backend's side cannot send a request on.
        let sent = transport(family, protocol)
            .from(CLIENT, 40000)
            .to(backend, PORT)
            .payload(*b"any");
        let error = icmp_error(family, time_exceeded(family), &sent, 64)
            .macs(backend.mac, BALANCER.mac)
            .from(STRANGER, 0)
            .to(CLIENT, 0);
        let outcome = both("a request has no hop left", &error);
        assert_eq!(outcome.frame[..6], GATEWAY.mac);
        assert_eq!(follows.flows(family), []);
    });
}

#[test]
fn fragments_of_both_directions_follow_the_first() {
    for family in Family::BOTH {
        let service = two(family, UDP);
        let mut records = Balancer::new(vec![recorded(&service)]);
        let mut follows = Balancer::new(vec![service]);
        let mut both = |what, sent: &Packet| same(&mut follows, &mut records, what, sent);
        let backend = reached(&both("first", &begin(family, UDP, 40000)));
        let asks = packet(family, UDP, 40000).payload(vec![1; 3000]);
        let answers = answer(family, UDP, backend, 40000).payload(vec![2; 3000]);
        for piece in asks.fragments(1000).iter().chain(&answers.fragments(1000)) {
            both("a fragment", piece);
        }
        assert_eq!(follows.flows(family), []);
    }
}

#[test]
fn another_service_on_the_same_host_is_left_alone() {
    each(|family, protocol| {
        let other = service(family, protocol, VIP_2, 80).backend(BACKEND_1, 9090, 1);
        let mut balancer = Balancer::new(vec![two(family, protocol), other]);
        let sent = transport(family, protocol)
            .from(CLIENT, 40000)
            .to(VIP_2, 80);
        let sent = if protocol == TCP { sent.syn() } else { sent };
        let outcome = balancer.send(&sent);
        assert_eq!(reached(&outcome), BACKEND_1);
        assert_eq!(balancer.flows(family).len(), 2);
        assert_eq!(outcome.counts.services[&2].connections, 1);
        let (port, _) = oracle::ports(&outcome.frame).expect("TCP or UDP");
        let answers = transport(family, protocol)
            .macs(BACKEND_1.mac, BALANCER.mac)
            .from(BACKEND_1, 9090)
            .to(BALANCER, port);
        let answers = if protocol == TCP {
            answers.ack()
        } else {
            answers
        };
        let outcome = balancer.send(&answers);
        assert_eq!(outcome.counts.services[&2].packets_out, 1);
        // Without a record, it is nobody's.
        let outcome = balancer.send(&answers.to(CLIENT, 40000));
        assert_eq!(outcome.verdict, Verdict::Pass);
    });
}
