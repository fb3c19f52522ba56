//! Backends on the balancer's own host: the kernel gets the packet, rewritten.

use lb_common::{backend::LOCAL, service::forward, stats::DropReason};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, Verdict, service},
    oracle,
    packet::{BACKEND_1, CLIENT, Checksum, Family, Packet, STRANGER, VIP, tcp, transport},
};

fn request(family: Family, protocol: u8) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet.payload(*b"question")
    }
}

#[test]
fn the_kernel_gets_what_is_for_a_local_backend() {
    for family in Family::BOTH {
        for (mode, protocol) in [
            (forward::NAT, TCP),
            (forward::NAT, UDP),
            (forward::DNAT, TCP),
            (forward::DNAT, UDP),
        ] {
            for checksum in [Checksum::Right, Checksum::Partial] {
                let service = service(family, protocol, VIP, 80)
                    .forward(mode)
                    .backend(BACKEND_1, 8080, 1)
                    .last(|b| b.ifindex = LOCAL);
                let mut balancer = Balancer::new(vec![service]);
                let right = request(family, protocol);
                let sent = right.clone().checksum(checksum);
                for packets in 1..3 {
                    let outcome = balancer.send(&sent);
                    let what = format!("{family:?}, mode {mode}, {protocol}, packet {packets}");
                    assert_eq!(outcome.verdict, Verdict::Pass, "{what}");
                    // Client, Ethernet addresses and hops as they were.
                    let expected = right.clone().to(BACKEND_1, 8080).build();
                    oracle::assert_frame(&what, &expected, &outcome.frame);
                    let mut counts = Counts::default().packet_in(1, 1, sent.ip_len());
                    if packets == 1 {
                        counts = counts.connection(1, 1);
                    }
                    let counts = match protocol {
                        TCP => counts.load(1, 0, 1),
                        _ => counts.load(1, 1, 0),
                    };
                    assert_eq!(outcome.counts, counts, "{what}");
                }
                let flows = balancer.flows(family);
                assert_eq!(flows.len(), 2, "both directions: {flows:?}");
            }
        }
    }
}

#[test]
fn packets_for_loopback_addresses_are_dropped() {
    let mut balancer = Balancer::new(vec![
        service(Family::V4, TCP, VIP, 80).backend(BACKEND_1, 8080, 1),
    ]);
    for (address, passes) in [
        ([127, 0, 0, 1], false),
        ([127, 255, 255, 255], false),
        ([126, 255, 255, 255], true),
        ([128, 0, 0, 0], true),
    ] {
        let mut to = STRANGER;
        to.v4 = address.into();
        let packet = tcp(Family::V4).from(CLIENT, 40000).to(to, 3001).syn();
        let (expected, counts) = if passes {
            (Expected::Passed, Counts::default())
        } else {
            let counts = Counts::default().drop(DropReason::Martian, 0);
            (Expected::Dropped, counts)
        };
        balancer.check(&format!("{address:?}"), &packet, &expected, &counts);
    }
}
