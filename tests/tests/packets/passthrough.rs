//! What is not the balancer's reaches the kernel unchanged, byte for byte, and moves no counter.

use lb_common::stats::DropReason;
use proptest::prelude::*;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, BALANCER, CLIENT, Checksum, Family, STRANGER, VIP, VIP_2, other, reply, tcp, udp,
    },
};

fn balancer() -> Balancer {
    Balancer::new(
        Family::BOTH
            .into_iter()
            .flat_map(|family| {
                [TCP, UDP]
                    .map(|protocol| service(family, protocol, VIP, 80).backend(BACKEND_1, 8080, 1))
            })
            .collect(),
    )
}

#[test]
fn packets_for_others_pass() {
    let mut balancer = balancer();
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    for family in Family::BOTH {
        for (what, packet) in [
            ("another destination", tcp(family).to(STRANGER, 80).syn()),
            ("another destination, UDP", udp(family).to(STRANGER, 80)),
            ("an address that is no VIP", tcp(family).to(VIP_2, 80).syn()),
            ("another port of the VIP", tcp(family).to(VIP, 22).syn()),
            (
                "another protocol for the VIP",
                other(family, 132).to(VIP, 0).payload([0; 40]),
            ),
            (
                "the host's own ssh",
                tcp(family).to(BALANCER, 22).ack().payload(*b"SSH-2.0"),
            ),
            ("the host's own SYN", tcp(family).to(BALANCER, 22).syn()),
            (
                "the host's own DNS answer",
                udp(family).from(STRANGER, 53).to(BALANCER, 45000),
            ),
            (
                "a NAT port that nobody uses",
                udp(family).from(STRANGER, 53).to(BALANCER, 20001),
            ),
            (
                "a NAT port, TCP",
                tcp(family).from(STRANGER, 53).to(BALANCER, 20001).ack(),
            ),
            ("a TTL of one", tcp(family).to(STRANGER, 80).ttl(1)),
            (
                "a wrong checksum",
                udp(family).to(STRANGER, 80).checksum(Checksum::Wrong(7)),
            ),
            (
                "a partial checksum",
                udp(family).to(STRANGER, 80).checksum(Checksum::Partial),
            ),
            (
                "a fragment",
                udp(family)
                    .to(STRANGER, 80)
                    .fragment(3, true)
                    .payload([1; 80]),
            ),
        ] {
            cases.push((format!("{family:?}: {what}"), packet.build()));
            cases.push((
                format!("{family:?}: {what}, tagged"),
                packet.vlan(0x8100, 77).build(),
            ));
        }
    }
    let mut frame = tcp(Family::V4).to(VIP, 80).syn().build();
    for ether_type in [
        0x0000u16, 0x0026, 0x0801, 0x8847, 0x88cc, 0x88e5, 0x9100, 0xffff,
    ] {
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        cases.push((format!("EtherType {ether_type:#06x}"), frame.clone()));
    }
    cases.push((
        "three VLAN tags".into(),
        tcp(Family::V4)
            .to(VIP, 80)
            .syn()
            .vlan(0x88a8, 1)
            .vlan(0x8100, 2)
            .vlan(0x8100, 3)
            .build(),
    ));
    for (what, frame) in cases {
        balancer.check(&what, &frame, &Expected::Passed, &Counts::default());
    }
}

#[test]
fn frames_of_every_length_pass() {
    let mut balancer = balancer();
    for ether_type in [0x0800u16, 0x86dd, 0x0806, 0x8100, 0x88a8, 0x1234] {
        // The kernel takes no frame below 14 bytes.
        for len in 14..=60 {
            for fill in [0x00, 0x45, 0x60, 0xff] {
                let mut frame = vec![fill; len];
                frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
                let what = format!("{len} bytes of {fill:#04x}, EtherType {ether_type:#06x}");
                balancer.check(&what, &frame, &Expected::Passed, &Counts::default());
            }
        }
    }
}

#[test]
fn a_reply_from_elsewhere_than_the_backend_passes() {
    for family in Family::BOTH {
        let mut balancer = balancer();
        let sent = udp(family).from(CLIENT, 40000).to(VIP, 80);
        let outcome = balancer.send(&sent);
        assert_eq!(outcome.verdict, Verdict::Tx);
        let (port, _) = sluice_tests::oracle::ports(&outcome.frame).expect("ports");
        let number = if family == Family::V4 { 2 } else { 4 };
        for (what, packet) in [
            ("another host", reply(family, UDP, STRANGER, 8080, port)),
            ("another port", reply(family, UDP, BACKEND_1, 8081, port)),
            (
                "another protocol",
                reply(family, TCP, BACKEND_1, 8080, port),
            ),
            (
                "another of our ports",
                reply(family, UDP, BACKEND_1, 8080, port ^ 1),
            ),
        ] {
            balancer.check(
                what,
                &packet,
                &Expected::Passed,
                &Counts::default().load(number, 1, 0),
            );
        }
    }
}

/// Whether a frame, with up to two VLAN tags, holds an IPv4 header with a destination in
/// 127.0.0.0/8: no host may send one.
fn is_for_loopback(frame: &[u8]) -> bool {
    let mut network = 14;
    for _ in 0..2 {
        if matches!(
            frame.get(network - 2..network),
            Some([0x81, 0] | [0x88, 0xa8])
        ) {
            network += 4;
        }
    }
    frame.get(network - 2..network) == Some(&[8, 0])
        && frame.len() >= network + 20
        && frame[network + 16] == 127
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever bytes arrive: the program ends, and does nothing to what is not for a VIP, unless
    /// it should never have been sent.
    #[test]
    fn random_bytes_pass(
        bytes in proptest::collection::vec(any::<u8>(), 14..200),
        ether_type in prop_oneof![Just(0x0800u16), Just(0x86dd), Just(0x0806), Just(0x8100), any::<u16>()],
    ) {
        thread_local! {
            static BALANCER: std::cell::RefCell<Balancer> = std::cell::RefCell::new(balancer());
        }
        let mut frame = bytes;
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        BALANCER.with_borrow_mut(|b| {
            let (expected, counts) = if is_for_loopback(&frame) {
                let counts = Counts::default().drop(DropReason::Martian, 0);
                (Expected::Dropped, counts)
            } else {
                (Expected::Passed, Counts::default())
            };
            b.check("random bytes", &frame, &expected, &counts);
        });
    }
}
