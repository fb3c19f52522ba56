//! Packets for a VIP with random bytes changed: whatever they are, the program ends with a verdict
//! and accounts for the packet.

use lb_common::service::forward;
use proptest::prelude::*;
use sluice_tests::{
    harness::{Balancer, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, CLIENT, DESTINATION_OPTIONS, Family, HOP_BY_HOP, Packet, VIP, ping, tcp, udp,
    },
};
use std::cell::RefCell;

/// Every mode, and both families outside where there is an outside.
const WAYS: [(u8, bool); 7] = [
    (forward::NAT, false),
    (forward::DNAT, false),
    (forward::DSR, false),
    (forward::IPIP, false),
    (forward::IPIP, true),
    (forward::GUE, false),
    (forward::GUE, true),
];

fn balancer((mode, across): (u8, bool)) -> Balancer {
    let services = Family::BOTH.into_iter().flat_map(|family| {
        [TCP, UDP].map(|protocol| {
            let outer = if across { family.other() } else { family };
            service(family, protocol, VIP, 80)
                .forward(mode)
                .backend_of(outer, BACKEND_1, 8080, 1)
        })
    });
    Balancer::new(services.collect())
}

/// How much longer a forwarded packet may be.
fn growths(mode: u8) -> &'static [usize] {
    match mode {
        forward::IPIP => &[20, 40],
        forward::GUE => &[28, 48],
        _ => &[0],
    }
}

fn originals() -> Vec<Packet> {
    let mut packets = Vec::new();
    for family in Family::BOTH {
        let tcp = tcp(family).from(CLIENT, 40000).to(VIP, 80);
        packets.push(tcp.clone().syn());
        packets.push(tcp.clone().ack().payload(*b"some payload"));
        packets.push(tcp.clone().syn().vlan(0x88a8, 5).vlan(0x8100, 6));
        packets.push(udp(family).from(CLIENT, 40000).to(VIP, 80).payload([7; 33]));
        packets.push(
            ping(family, 1, 1)
                .from(CLIENT, 0)
                .to(VIP, 0)
                .payload([1; 20]),
        );
        packets.push(match family {
            Family::V4 => tcp.syn().options(&[1; 12]),
            Family::V6 => tcp
                .syn()
                .extension(HOP_BY_HOP, 8)
                .extension(DESTINATION_OPTIONS, 16),
        });
    }
    packets
}

/// How many VLAN tags a frame has.
fn tags(frame: &[u8]) -> usize {
    let tags = frame[12..].chunks_exact(4);
    tags.take_while(|tag| matches!(tag[..2], [0x81, 0x00] | [0x88, 0xa8]))
        .count()
}

thread_local! {
    static BALANCERS: RefCell<Vec<Balancer>> = RefCell::new(WAYS.map(balancer).into());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_changed_packet_is_accounted_for(
        way in 0..WAYS.len(),
        which in 0usize..12,
        changes in proptest::collection::vec((12usize..110, any::<u8>()), 1..6),
        cut in prop_oneof![4 => Just(usize::MAX), 1 => 14usize..110],
    ) {
        let mut frame = originals()[which].build();
        for (at, value) in changes {
            let at = at % frame.len();
            frame[at] = value;
        }
        frame.truncate(cut);
        let outcome = BALANCERS.with_borrow_mut(|b| b[way].run(&frame));
        let counts = &outcome.counts;
        let drops: u64 = counts.drops.values().sum();
        let packets_in: u64 = counts.services.values().map(|c| c.packets_in).sum();
        match outcome.verdict {
            Verdict::Pass => {
                prop_assert_eq!(&outcome.frame, &frame, "what passes is untouched");
                prop_assert_eq!((drops, packets_in), (0, 0));
            }
            Verdict::Drop => prop_assert_eq!((drops, packets_in), (1, 0)),
            // Forwarded, answered (ping), or refused with RST.
            Verdict::Tx => {
                prop_assert!(drops + packets_in <= 1, "{:?}", counts);
                if drops == 0 {
                    let growths = if packets_in == 0 { &[0] } else { growths(WAYS[way].0) };
                    // The backend is behind no VLAN; an answer goes back into that it came by.
                    let tags = if packets_in == 1 { tags(&frame) } else { 0 };
                    let growth = (outcome.frame.len() + 4 * tags).checked_sub(frame.len());
                    prop_assert!(
                        growth.is_some_and(|g| growths.contains(&g)),
                        "{:?} bytes more", growth
                    );
                }
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
