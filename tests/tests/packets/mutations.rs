//! Packets for a VIP with random bytes changed: whatever they are, the program ends with a verdict
//! and accounts for the packet.

use proptest::prelude::*;
use sluice_tests::{
    harness::{Balancer, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, CLIENT, DESTINATION_OPTIONS, Family, HOP_BY_HOP, Packet, VIP, ping, tcp, udp,
    },
};
use std::cell::RefCell;

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

thread_local! {
    static BALANCER: RefCell<Balancer> = RefCell::new(balancer());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_changed_packet_is_accounted_for(
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
        let outcome = BALANCER.with_borrow_mut(|b| b.run(&frame));
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
                    prop_assert_eq!(outcome.frame.len(), frame.len());
                }
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
