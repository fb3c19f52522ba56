//! ICMP errors that quote a packet of a flow reach the end of the flow that must hear of it.

use lb_common::stats::DropReason;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, OTHER_INTERFACE, TCP, UDP, service},
    packet::{
        BACKEND_1, BALANCER, CLIENT, CLIENT_2, Family, GATEWAY, Packet, STRANGER, VIP, icmp_error,
        reply, transport,
    },
};

/// Type, code and bytes 4 to 7 of every error that is carried.
fn errors(family: Family) -> Vec<(&'static str, u8, u8, [u8; 4])> {
    match family {
        Family::V4 => vec![
            ("host unreachable", 3, 1, [0; 4]),
            ("port unreachable", 3, 3, [0; 4]),
            ("fragmentation needed", 3, 4, [0, 0, 0x05, 0x14]),
            ("time exceeded", 11, 0, [0; 4]),
            ("parameter problem", 12, 0, [20, 0, 0, 0]),
        ],
        Family::V6 => vec![
            ("no route", 1, 0, [0; 4]),
            ("port unreachable", 1, 4, [0; 4]),
            ("packet too big", 2, 0, [0, 0, 0x05, 0x14]),
            ("time exceeded", 3, 0, [0; 4]),
            ("parameter problem", 4, 1, [0, 0, 0, 40]),
        ],
    }
}

/// A balancer with one flow, client port 40000, and the packets of both directions: what the
/// client sent, what left for the backend, what the backend sent, what left for the client.
struct Flow {
    balancer: Balancer,
    family: Family,
    protocol: u8,
    asked: Packet,
    asked_out: Packet,
    answered: Packet,
    answered_out: Packet,
}

impl Flow {
    fn new(family: Family, protocol: u8) -> Self {
        let mut balancer = Balancer::new(vec![
            service(family, protocol, VIP, 80).backend(BACKEND_1, 8080, 1),
        ]);
        let first = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
        let first = if protocol == TCP { first.syn() } else { first };
        let counts = Counts::default()
            .packet_in(1, 1, first.ip_len())
            .connection(1, 1);
        let (active, inactive) = load(protocol);
        let port = balancer.check_new(
            "first packet",
            &first,
            |port| Expected::sent(&first.nat_to(BACKEND_1, 8080, port)),
            &counts.load(1, active, inactive),
        );
        let asked = transport(family, protocol)
            .from(CLIENT, 40000)
            .to(VIP, 80)
            .payload(*b"a question of odd length");
        let answered = reply(family, protocol, BACKEND_1, 8080, port).payload([7; 700]);
        Self {
            asked_out: asked.nat_to(BACKEND_1, 8080, port),
            answered_out: answered.nat_back(VIP, 80, CLIENT, 40000),
            balancer,
            family,
            protocol,
            asked,
            answered,
        }
    }

    fn counts(&self, counts: Counts) -> Counts {
        let (active, inactive) = load(self.protocol);
        counts.load(1, active, inactive)
    }

    /// An error from a router on the client's side.
    fn on_clients_side(&self, error: (u8, u8, [u8; 4]), quoted: &Packet, keep: usize) -> Packet {
        icmp_error(self.family, error, &quoted.clone().ttl(50), keep)
            .from(STRANGER, 0)
            .to(VIP, 0)
    }

    /// The same as the backend must get it.
    fn at_backend(&self, error: (u8, u8, [u8; 4]), quoted: &Packet, keep: usize) -> Packet {
        icmp_error(self.family, error, &quoted.clone().ttl(50), keep)
            .macs(BALANCER.mac, BACKEND_1.mac)
            .from(BALANCER, 0)
            .to(BACKEND_1, 0)
            .ttl(63)
    }

    /// An error from the backend itself or a router before it.
    fn on_backends_side(&self, error: (u8, u8, [u8; 4]), quoted: &Packet, keep: usize) -> Packet {
        icmp_error(self.family, error, &quoted.clone().ttl(50), keep)
            .macs(BACKEND_1.mac, BALANCER.mac)
            .from(BACKEND_1, 0)
            .to(BALANCER, 0)
    }

    /// The same as the client must get it.
    fn at_client(&self, error: (u8, u8, [u8; 4]), quoted: &Packet, keep: usize) -> Packet {
        icmp_error(self.family, error, &quoted.clone().ttl(50), keep)
            .macs(BALANCER.mac, GATEWAY.mac)
            .from(VIP, 0)
            .to(CLIENT, 0)
            .ttl(63)
    }
}

fn load(protocol: u8) -> (u64, u64) {
    if protocol == TCP { (0, 1) } else { (1, 0) }
}

/// Bytes of a quote: the least RFC 792 asks for, up to and beyond TCP's checksum, and all of it.
fn quotes(family: Family) -> [usize; 5] {
    let header = if family == Family::V4 { 20 } else { 40 };
    [
        header + 8,
        header + 16,
        header + 18,
        header + 20,
        usize::MAX,
    ]
}

#[test]
fn an_error_about_an_answer_goes_to_the_backend() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut flow = Flow::new(family, protocol);
            for (what, kind, code, rest) in errors(family) {
                for keep in quotes(family) {
                    let error = (kind, code, rest);
                    let sent = flow.on_clients_side(error, &flow.answered_out, keep);
                    let expected = flow.at_backend(error, &flow.answered, keep);
                    let counts = Counts::default().packet_in(1, 1, sent.ip_len());
                    let counts = flow.counts(counts);
                    flow.balancer.check(
                        &format!("{family:?} protocol {protocol}, {what}, {keep} bytes quoted"),
                        &sent,
                        &Expected::sent(&expected),
                        &counts,
                    );
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_question_goes_to_the_client() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut flow = Flow::new(family, protocol);
            for (what, kind, code, rest) in errors(family) {
                for keep in quotes(family) {
                    let error = (kind, code, rest);
                    let sent = flow.on_backends_side(error, &flow.asked_out, keep);
                    let expected = flow.at_client(error, &flow.asked, keep);
                    let counts = Counts::default().packet_out(1, 1, sent.ip_len());
                    let counts = flow.counts(counts);
                    flow.balancer.check(
                        &format!("{family:?} protocol {protocol}, {what}, {keep} bytes quoted"),
                        &sent,
                        &Expected::sent(&expected),
                        &counts,
                    );
                }
            }
        }
    }
}

const TOO_BIG: fn(Family) -> (u8, u8, [u8; 4]) = |family| match family {
    Family::V4 => (3, 4, [0, 0, 5, 20]),
    Family::V6 => (2, 0, [0, 0, 5, 20]),
};

#[test]
fn headers_around_and_in_the_quote_stay() {
    for family in Family::BOTH {
        let mut flow = Flow::new(family, UDP);
        let dressed = |packet: &Packet| match family {
            Family::V4 => packet.clone().options(&[1, 1, 1, 0, 7, 4, 4, 0]),
            // A router quotes the first fragment it could not send on.
            Family::V6 => packet.clone().fragment(0, true),
        };
        let tagged = |packet: Packet| {
            let packet = packet.vlan(0x88a8, 5).vlan(0x8100, 6).trailer([0; 7]);
            match family {
                Family::V4 => packet.options(&[1, 1, 1, 0]),
                Family::V6 => packet.extension(0, 8),
            }
        };
        let error = TOO_BIG(family);
        let sent = tagged(flow.on_clients_side(error, &dressed(&flow.answered_out), 500));
        let expected = tagged(flow.at_backend(error, &dressed(&flow.answered), 500));
        flow.balancer
            .change(1, |s| s.backends[0].tags = sent.tags());
        let counts = flow.counts(Counts::default().packet_in(1, 1, sent.ip_len()));
        flow.balancer.check(
            &format!("{family:?}"),
            &sent,
            &Expected::sent(&expected),
            &counts,
        );
    }
}

#[test]
fn a_datagram_without_checksum_is_quoted_without() {
    let mut flow = Flow::new(Family::V4, UDP);
    let zero = |packet: &Packet| {
        packet
            .clone()
            .checksum(sluice_tests::packet::Checksum::Zero)
    };
    let error = TOO_BIG(Family::V4);
    let sent = flow.on_backends_side(error, &zero(&flow.asked_out), 28);
    let expected = flow.at_client(error, &zero(&flow.asked), 28);
    let counts = flow.counts(Counts::default().packet_out(1, 1, sent.ip_len()));
    flow.balancer
        .check("no checksum", &sent, &Expected::sent(&expected), &counts);
}

/// Whoever damaged the message on its way must not be covered up.
#[test]
fn a_wrong_checksum_stays_wrong() {
    use sluice_tests::packet::Checksum::Wrong;
    for family in Family::BOTH {
        let mut flow = Flow::new(family, TCP);
        let error = TOO_BIG(family);
        let sent = flow
            .on_clients_side(error, &flow.answered_out, 100)
            .checksum(Wrong(0x0304));
        let expected = flow
            .at_backend(error, &flow.answered, 100)
            .checksum(Wrong(0x0304));
        let counts = flow.counts(Counts::default().packet_in(1, 1, sent.ip_len()));
        flow.balancer.check(
            &format!("{family:?}"),
            &sent,
            &Expected::sent(&expected),
            &counts,
        );
    }
}

#[test]
fn errors_that_quote_no_flow_are_the_kernels() {
    for family in Family::BOTH {
        let mut flow = Flow::new(family, TCP);
        let error = TOO_BIG(family);
        let out = flow.answered_out.clone();
        let mut long = out.clone();
        long.sport = 81;
        let strange = out.clone().to(CLIENT_2, 40000);
        let other = transport(family, UDP).from(VIP, 80).to(CLIENT, 40000);
        let later = out.clone().fragment(3, true);
        let header = if family == Family::V4 { 20 } else { 40 };
        let mut not_quoting = flow.on_clients_side(error, &out, 100);
        not_quoting.payload[0] ^= 0xf0;
        let cases = [
            ("another port", flow.on_clients_side(error, &long, 100)),
            ("another client", flow.on_clients_side(error, &strange, 100)),
            ("another protocol", flow.on_clients_side(error, &other, 100)),
            ("a later fragment", flow.on_clients_side(error, &later, 100)),
            (
                "a cut header",
                flow.on_clients_side(error, &out, header - 1),
            ),
            ("cut ports", flow.on_clients_side(error, &out, header + 7)),
            ("no IP header", not_quoting),
            (
                "the direction it came by",
                flow.on_clients_side(error, &flow.asked, 100),
            ),
            (
                "to the balancer, what the backend sent",
                flow.on_backends_side(error, &flow.answered, 100),
            ),
        ];
        let counts = flow.counts(Counts::default());
        for (what, sent) in cases {
            flow.balancer.check(
                &format!("{family:?}, {what}"),
                &sent,
                &Expected::Passed,
                &counts,
            );
        }
    }
}

#[test]
fn an_error_without_a_hop_left_is_dropped_in_silence() {
    for family in Family::BOTH {
        let mut flow = Flow::new(family, TCP);
        let error = TOO_BIG(family);
        let sent = flow.on_clients_side(error, &flow.answered_out, 100).ttl(1);
        let counts = flow.counts(Counts::default().drop(DropReason::TtlExceeded, 1));
        flow.balancer
            .check(&format!("{family:?}"), &sent, &Expected::Dropped, &counts);
    }
}

#[test]
fn an_error_leaves_by_the_backends_interface() {
    for family in Family::BOTH {
        let mut flow = Flow::new(family, UDP);
        flow.balancer
            .change(1, |s| s.backends[0].ifindex = OTHER_INTERFACE);
        let error = TOO_BIG(family);
        let sent = flow.on_clients_side(error, &flow.answered_out, 100);
        let expected = flow.at_backend(error, &flow.answered, 100);
        let counts = flow.counts(Counts::default().packet_in(1, 1, sent.ip_len()));
        flow.balancer.check(
            &format!("{family:?}"),
            &sent,
            &Expected::redirected(&expected),
            &counts,
        );
    }
}

#[test]
fn an_error_for_a_backend_out_of_reach_is_counted() {
    for family in Family::BOTH {
        let mut flow = Flow::new(family, UDP);
        flow.balancer.change(1, |s| s.backends[0].resolved = false);
        let error = TOO_BIG(family);
        let sent = flow.on_clients_side(error, &flow.answered_out, 100);
        let counts = flow.counts(Counts::default().drop(DropReason::NoNeighbour, 1));
        flow.balancer.check(
            &format!("{family:?}, next hop unknown"),
            &sent,
            &Expected::Dropped,
            &counts,
        );
        flow.balancer.replace_backend(1, 0);
        let counts = Counts::default().drop(DropReason::BackendDown, 1);
        flow.balancer.check(
            &format!("{family:?}, backend replaced"),
            &sent,
            &Expected::Dropped,
            &counts,
        );
    }
}

#[test]
fn other_messages_are_the_kernels() {
    for (family, kind) in [
        (Family::V4, 4),
        (Family::V4, 5),
        (Family::V4, 13),
        (Family::V6, 5),
        (Family::V6, 137),
    ] {
        let mut flow = Flow::new(family, UDP);
        let sent = flow.on_clients_side((kind, 0, [0; 4]), &flow.answered_out, 100);
        let counts = flow.counts(Counts::default());
        flow.balancer.check(
            &format!("{family:?} type {kind}"),
            &sent,
            &Expected::Passed,
            &counts,
        );
    }
}
