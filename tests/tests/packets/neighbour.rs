//! ARP, neighbour discovery and ping of a VIP.

use lb_common::service::VIP_ANSWER_ARP;
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, service},
    packet::{
        BACKEND_1, BALANCER, CLIENT, DESTINATION_OPTIONS, Family, GATEWAY, Packet, STRANGER, VIP,
        arp, arp_request, neighbour_advertisement, neighbour_solicitation, ping, pong,
    },
};
use std::net::{IpAddr, Ipv6Addr};

fn balancer() -> Balancer {
    Balancer::new(
        Family::BOTH
            .into_iter()
            .map(|family| service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1))
            .collect(),
    )
}

#[track_caller]
fn answered(balancer: &mut Balancer, what: &str, sent: &Vec<u8>, expected: Vec<u8>) {
    balancer.check(what, sent, &Expected::Sent(expected), &Counts::default());
}

#[track_caller]
fn passed(balancer: &mut Balancer, what: &str, sent: &Vec<u8>) {
    balancer.check(what, sent, &Expected::Passed, &Counts::default());
}

#[test]
fn an_arp_request_for_a_vip_is_answered() {
    let mut balancer = balancer();
    let reply = arp(
        (BALANCER.mac, GATEWAY.mac),
        2,
        (BALANCER.mac, VIP.v4),
        (GATEWAY.mac, GATEWAY.v4),
    );
    answered(
        &mut balancer,
        "broadcast",
        &arp_request(GATEWAY, VIP.v4),
        reply.clone(),
    );
    // A host that refreshes its cache asks the known address itself (RFC 1122 section 2.3.2.1).
    let mut unicast = arp_request(GATEWAY, VIP.v4);
    unicast[..6].copy_from_slice(&BALANCER.mac);
    answered(&mut balancer, "unicast", &unicast, reply.clone());
    // Frames are padded to sixty bytes on a wire.
    let pad = |mut frame: Vec<u8>| {
        frame.resize(60, 0);
        frame
    };
    answered(
        &mut balancer,
        "padded",
        &pad(arp_request(GATEWAY, VIP.v4)),
        pad(reply),
    );
}

#[test]
fn an_arp_request_in_a_vlan_is_answered_in_it() {
    let tag = |frame: Vec<u8>| [&frame[..12], &[0x81, 0, 0x20, 7], &frame[12..]].concat();
    let reply = arp(
        (BALANCER.mac, GATEWAY.mac),
        2,
        (BALANCER.mac, VIP.v4),
        (GATEWAY.mac, GATEWAY.v4),
    );
    answered(
        &mut balancer(),
        "tagged",
        &tag(arp_request(GATEWAY, VIP.v4)),
        tag(reply),
    );
}

#[test]
fn other_arp_passes() {
    let mut balancer = balancer();
    passed(
        &mut balancer,
        "for another host",
        &arp_request(GATEWAY, STRANGER.v4),
    );
    passed(
        &mut balancer,
        "for the balancer's own address",
        &arp_request(GATEWAY, BALANCER.v4),
    );
    let reply = arp(
        (GATEWAY.mac, BALANCER.mac),
        2,
        (GATEWAY.mac, GATEWAY.v4),
        (BALANCER.mac, VIP.v4),
    );
    passed(&mut balancer, "a reply", &reply);
    let mut announced = GATEWAY;
    announced.v4 = VIP.v4;
    passed(
        &mut balancer,
        "another host that announces the VIP as its own",
        &arp_request(announced, VIP.v4),
    );
    let request = arp_request(GATEWAY, VIP.v4);
    for len in 14..request.len() {
        passed(&mut balancer, "truncated", &request[..len].to_vec());
    }
    for (what, at, value) in [
        ("another hardware type", 15, 6),
        ("another protocol type", 16, 0x86),
        ("another hardware length", 18, 8),
        ("another protocol length", 19, 16),
    ] {
        let mut other = request.clone();
        other[at] = value;
        passed(&mut balancer, what, &other);
    }
}

#[test]
fn a_vip_that_the_kernel_holds_is_the_kernels_to_answer_for() {
    let mut balancer = balancer();
    balancer.set_vip_flags(VIP.ip(Family::V4), 0);
    balancer.set_vip_flags(VIP.ip(Family::V6), 0);
    passed(&mut balancer, "ARP", &arp_request(GATEWAY, VIP.v4));
    let solicitation = neighbour_solicitation(GATEWAY, VIP.v6).build();
    passed(&mut balancer, "solicitation", &solicitation);
    balancer.set_vip_flags(VIP.ip(Family::V6), VIP_ANSWER_ARP);
    answered(
        &mut balancer,
        "solicitation, once it is told to answer",
        &solicitation,
        neighbour_advertisement(BALANCER.mac, VIP.v6, GATEWAY).build(),
    );
}

#[test]
fn a_neighbour_solicitation_for_a_vip_is_answered() {
    let mut balancer = balancer();
    let advertisement = neighbour_advertisement(BALANCER.mac, VIP.v6, GATEWAY);
    let solicitation = neighbour_solicitation(GATEWAY, VIP.v6);
    answered(
        &mut balancer,
        "multicast",
        &solicitation.build(),
        advertisement.build(),
    );
    // A known neighbour is confirmed with a question to the address itself.
    let unicast = solicitation
        .clone()
        .macs(GATEWAY.mac, BALANCER.mac)
        .to(VIP, 0);
    answered(
        &mut balancer,
        "unicast",
        &unicast.build(),
        advertisement.build(),
    );
    // The source link-layer address may be left out of a unicast question (RFC 4861 section 4.3).
    let mut short = unicast;
    short.payload.truncate(16);
    answered(
        &mut balancer,
        "without option",
        &short.build(),
        advertisement.build(),
    );
    let mut long = solicitation.clone();
    long.payload.extend([14, 1, 1, 2, 3, 4, 5, 6]);
    answered(
        &mut balancer,
        "with a nonce",
        &long.build(),
        advertisement.build(),
    );
    answered(
        &mut balancer,
        "in a VLAN",
        &solicitation.vlan(0x8100, 7).build(),
        advertisement.vlan(0x8100, 7).build(),
    );
}

/// RFC 4861 section 7.2.4: without a source address the answer goes to all nodes, unsolicited.
#[test]
fn duplicate_address_detection_is_answered_to_all_nodes() {
    let mut question = neighbour_solicitation(GATEWAY, VIP.v6);
    question.src = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    question.payload.truncate(16);
    let mut answer = neighbour_advertisement(BALANCER.mac, VIP.v6, GATEWAY);
    answer.dst = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    answer.dst_mac = [0x33, 0x33, 0, 0, 0, 1];
    answer.transport = sluice_tests::packet::Transport::Icmp {
        kind: 136,
        code: 0,
        rest: [0x20, 0, 0, 0],
    };
    answered(
        &mut balancer(),
        "from the unspecified address",
        &question.build(),
        answer.build(),
    );
}

#[test]
fn other_neighbour_discovery_passes() {
    let mut balancer = balancer();
    let question = neighbour_solicitation(GATEWAY, VIP.v6);
    passed(
        &mut balancer,
        "for another host",
        &neighbour_solicitation(GATEWAY, STRANGER.v6).build(),
    );
    passed(
        &mut balancer,
        "from beyond the link",
        &question.clone().ttl(254).build(),
    );
    let mut other = question.clone();
    other.transport = sluice_tests::packet::Transport::Icmp {
        kind: 135,
        code: 1,
        rest: [0; 4],
    };
    passed(&mut balancer, "another code", &other.build());
    passed(
        &mut balancer,
        "an advertisement",
        &neighbour_advertisement(GATEWAY.mac, VIP.v6, BALANCER).build(),
    );
    let frame = question.build();
    for len in 14..14 + 40 + 24 {
        passed(&mut balancer, "truncated", &frame[..len].to_vec());
    }
}

fn ping_vip(family: Family, len: usize) -> Packet {
    ping(family, 7, 3)
        .from(CLIENT, 0)
        .to(VIP, 0)
        .payload((0..len).map(|i| i as u8).collect::<Vec<_>>())
}

fn pong_for(request: &Packet) -> Packet {
    let mut packet = pong(request.family, 7, 3)
        .macs(request.dst_mac, request.src_mac)
        .from(VIP, 0)
        .to(CLIENT, 0)
        .payload(request.payload.clone());
    packet.vlans.clone_from(&request.vlans);
    packet.options.clone_from(&request.options);
    packet.extensions.clone_from(&request.extensions);
    packet.trailer.clone_from(&request.trailer);
    packet.tos = request.tos;
    packet
}

#[test]
fn a_ping_of_a_vip_is_answered() {
    let mut balancer = balancer();
    for family in Family::BOTH {
        for len in [0, 1, 56, 57, 1400] {
            let request = ping_vip(family, len);
            answered(
                &mut balancer,
                &format!("{family:?}, {len} bytes"),
                &request.build(),
                pong_for(&request).build(),
            );
        }
        for ttl in [1, 255] {
            let request = ping_vip(family, 8);
            let answer = pong_for(&request);
            answered(
                &mut balancer,
                &format!("{family:?}, TTL {ttl}"),
                &request.ttl(ttl).build(),
                answer.build(),
            );
        }
    }
    for request in [
        ping_vip(Family::V4, 9).vlan(0x88a8, 4).vlan(0x8100, 7),
        ping_vip(Family::V4, 9).options(&[1; 4]),
        ping_vip(Family::V4, 1).trailer([0; 17]),
        ping_vip(Family::V6, 9).extension(DESTINATION_OPTIONS, 8),
    ] {
        answered(
            &mut balancer,
            "dressed",
            &request.build(),
            pong_for(&request).build(),
        );
    }
}

#[test]
fn other_icmp_passes() {
    let mut balancer = balancer();
    for family in Family::BOTH {
        let request = ping_vip(family, 8);
        passed(
            &mut balancer,
            "ping of another host",
            &request.clone().to(STRANGER, 0).build(),
        );
        passed(
            &mut balancer,
            "ping of the balancer's own address",
            &request.clone().to(BALANCER, 0).build(),
        );
        passed(
            &mut balancer,
            "an echo reply",
            &pong(family, 7, 3).from(CLIENT, 0).to(VIP, 0).build(),
        );
    }
}
