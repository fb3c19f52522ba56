//! What the sender of a packet that goes no further is told, whole and counted.

use lb_common::stats::DropReason;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, INGRESS, MTU, TCP, UDP, Verdict, service},
    packet::{
        BACKEND_1, CLIENT, Family, Packet, VIP, error_for, reply, tcp, time_exceeded, too_big,
        transport, udp,
    },
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

fn balancer(family: Family, protocol: u8) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80).backend(BACKEND_1, 8080, 1),
    ])
}

fn expired() -> Counts {
    Counts::default().drop(DropReason::TtlExceeded, 1)
}

/// What `traceroute` and `tracepath` send for their last hop but one.
#[test]
fn a_packet_without_a_hop_left_is_answered_by_the_vip() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            for len in [0, 1, 520, 521, 1204, 1205, 1400] {
                let probe = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
                let probe = if protocol == TCP { probe.syn() } else { probe };
                let probe = probe.ttl(1).payload(vec![3; len]);
                balancer(family, protocol).check(
                    &format!("{family:?} protocol {protocol}, {len} bytes"),
                    &probe,
                    &Expected::sent(&error_for(&probe, time_exceeded(family))),
                    &expired(),
                );
            }
        }
    }
}

#[test]
fn tags_stay_and_padding_is_not_quoted() {
    for family in Family::BOTH {
        let dressed = |packet: Packet| match family {
            Family::V4 => packet.options(&[1, 1, 1, 0]),
            Family::V6 => packet.extension(0, 16),
        };
        let mut balancer = balancer(family, UDP);
        for tags in 0..3 {
            for padding in [0, 18] {
                let mut probe = dressed(udp(family).from(CLIENT, 40000).to(VIP, 80))
                    .payload(*b"odd")
                    .trailer(vec![0xee; padding])
                    .ttl(0);
                for tag in 0..tags {
                    probe = probe.vlan(0x8100, 100 + tag);
                }
                balancer.check(
                    &format!("{family:?}, {tags} tags, {padding} bytes of padding"),
                    &probe,
                    &Expected::sent(&error_for(&probe, time_exceeded(family))),
                    &expired(),
                );
            }
        }
    }
}

/// RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e).
#[test]
fn nobody_is_told_at_an_address_that_is_no_hosts() {
    let v4 = |a, b, c, d| IpAddr::V4(Ipv4Addr::new(a, b, c, d));
    let v6 = |text: &str| IpAddr::V6(text.parse::<Ipv6Addr>().expect("an address"));
    for source in [
        v4(0, 0, 0, 0),
        v4(127, 0, 0, 1),
        v4(224, 0, 0, 1),
        v4(255, 255, 255, 255),
        v6("::"),
        v6("::1"),
        v6("ff02::1"),
    ] {
        let family = if source.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        let probe = udp(family).from(source, 40000).to(VIP, 80).ttl(1);
        balancer(family, UDP).check(&source.to_string(), &probe, &Expected::Dropped, &expired());
    }
}

/// One backend behind a way of 1300 bytes.
fn narrow(family: Family, protocol: u8) -> Balancer {
    Balancer::new(vec![
        service(family, protocol, VIP, 80)
            .backend(BACKEND_1, 8080, 1)
            .last(|b| b.mtu = 1300),
    ])
}

fn large(family: Family, ip_len: u64) -> Packet {
    let packet = udp(family).from(CLIENT, 40000).to(VIP, 80);
    let headers = packet.ip_len();
    packet.payload(vec![9; (ip_len - headers) as usize])
}

/// Path MTU discovery (RFC 1191, RFC 8201) ends at the balancer as at any router.
#[test]
fn a_packet_too_large_for_the_way_to_its_backend_is_answered_with_the_mtu() {
    for family in Family::BOTH {
        let mut balancer = narrow(family, UDP);
        let refused = Counts::default().drop(DropReason::TooBig, 1);
        let new = large(family, 1301);
        balancer.check(
            &format!("{family:?}, a new flow"),
            &new,
            &Expected::sent(&error_for(&new, too_big(family, 1300))),
            &refused,
        );
        assert!(balancer.flows(family).is_empty(), "it makes no flow");
        let fits = large(family, 1300);
        let port = balancer.check_new(
            &format!("{family:?}, the largest that fits"),
            &fits,
            |port| Expected::sent(&fits.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, 1300)
                .connection(1, 1)
                .load(1, 1, 0),
        );
        for len in [1301, 1500] {
            let mut known = large(family, len);
            // A sender without DF is told as well: it then cuts up its datagrams itself.
            known.dont_fragment = len == 1500;
            balancer.check(
                &format!("{family:?}, {len} bytes of a known flow"),
                &known,
                &Expected::sent(&error_for(&known, too_big(family, 1300))),
                &refused.clone().load(1, 1, 0),
            );
        }
        let back = reply(family, UDP, BACKEND_1, 8080, port).payload(vec![1; 1400]);
        balancer.check(
            &format!("{family:?}, the way to the client is another"),
            &back,
            &Expected::sent(&back.nat_back(VIP, 80, CLIENT, 40000)),
            &Counts::default()
                .packet_out(1, 1, back.ip_len())
                .load(1, 1, 0),
        );
    }
}

/// The server learns of a narrow link to the clients that begins at the balancer.
#[test]
fn an_answer_too_large_for_the_interface_to_its_client_is_answered_with_the_mtu() {
    for family in Family::BOTH {
        let mut balancer = balancer(family, UDP);
        balancer.set_interface_mtu(INGRESS, 1300);
        let asked = udp(family).from(CLIENT, 40000).to(VIP, 80);
        let port = balancer.check_new(
            "the question",
            &asked,
            |port| Expected::sent(&asked.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, asked.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        // Test packets come by one interface: from here on it stands for the backend's.
        balancer.set_interface_mtu(INGRESS, MTU);
        let answer = |len: u64| {
            let packet = reply(family, UDP, BACKEND_1, 8080, port);
            let headers = packet.ip_len();
            packet.payload(vec![1; (len - headers) as usize])
        };
        let large = answer(1301);
        balancer.check(
            &format!("{family:?}, too large"),
            &large,
            &Expected::sent(&error_for(&large, too_big(family, 1300))),
            &Counts::default().drop(DropReason::TooBig, 1).load(1, 1, 0),
        );
        let fits = answer(1300);
        balancer.check(
            &format!("{family:?}, the largest that fits"),
            &fits,
            &Expected::sent(&fits.nat_back(VIP, 80, CLIENT, 40000)),
            &Counts::default().packet_out(1, 1, 1300).load(1, 1, 0),
        );
    }
}

/// Generic mode sees what a local sender leaves its interface to cut up.
#[test]
fn what_no_interface_could_receive_is_not_measured() {
    for family in Family::BOTH {
        let mut balancer = narrow(family, UDP);
        let aggregate = large(family, 1501);
        balancer.check_new(
            &format!("{family:?}"),
            &aggregate,
            |port| Expected::sent(&aggregate.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, 1501)
                .connection(1, 1)
                .load(1, 1, 0),
        );
    }
}

/// A flood of such packets must not become a flood of answers.
#[test]
fn answers_are_limited() {
    let mut balancer = balancer(Family::V4, TCP);
    let probe = tcp(Family::V4)
        .from(CLIENT, 40000)
        .to(VIP, 80)
        .syn()
        .ttl(1)
        .build();
    let started = std::time::Instant::now();
    let (mut answered, mut dropped) = (0, 0);
    while dropped == 0 || answered + dropped < 2000 {
        match balancer.run_uncounted(&probe).0 {
            Verdict::Tx => answered += 1,
            Verdict::Drop => dropped += 1,
            other => panic!("an expired packet was {other:?}"),
        }
        assert!(answered < 1_000_000, "no limit is ever reached");
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u128;
    // A burst for each CPU and then one each tick of 1.05 ms; a coarse clock may add some.
    let most = cpus * (256 + started.elapsed().as_millis() + 16);
    assert!(
        u128::from(answered as u32) <= most,
        "{answered} answers, {most} allowed"
    );
    // The object may come from a test that has had some of the burst on this CPU.
    assert!(answered >= 128, "only {answered} answers in a burst");
    balancer.discard();
}
