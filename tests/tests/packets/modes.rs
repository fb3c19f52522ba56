//! `dnat`, `dsr`, `ipip` and `gue`: what leaves for the backend, what is remembered and counted.

use crate::vlan::{TAGS, rewritten};
use lb_common::{
    flow::state,
    names,
    service::{forward, on_backend_down},
    stats::DropReason,
};
use sluice_tests::{
    harness::{
        Balancer, Counts, Expected, GUE_PORT, OTHER_INTERFACE, Service, TCP, UDP, Verdict, service,
    },
    oracle,
    packet::{
        BACKEND_1, BACKEND_2, BALANCER, CLIENT, CLIENT_2, Checksum, DESTINATION_OPTIONS, Family,
        GATEWAY, HOP_BY_HOP, Host, Packet, ROUTING, STRANGER, VIP, VIP_2, error_for, icmp_error,
        reset_for, tcp, time_exceeded, too_big, transport, udp,
    },
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A mode, the client's family and the backend's.
#[derive(Clone, Copy, Debug)]
struct Way {
    mode: u8,
    inner: Family,
    outer: Family,
}

impl Way {
    /// Whether the client's packets are all the balancer sees.
    fn one_sided(self) -> bool {
        self.mode != forward::DNAT
    }

    fn encapsulates(self) -> bool {
        self.mode == forward::IPIP || self.mode == forward::GUE
    }

    /// The port of the backends: a mode that cannot rewrite it has the VIP's.
    fn port(self) -> u16 {
        if self.one_sided() { 80 } else { 8080 }
    }

    /// A service at port 80 of [`VIP`] without backends.
    fn service(self, protocol: u8) -> Service {
        service(self.inner, protocol, VIP, 80).forward(self.mode)
    }

    /// That service with [`BACKEND_1`].
    fn balancer(self, protocol: u8) -> Balancer {
        Balancer::new(vec![self.service(protocol).backend_of(
            self.outer,
            BACKEND_1,
            self.port(),
            1,
        )])
    }

    /// `sent` as it leaves for `backend`; `gue_sport` is used where there is one.
    fn expected(self, sent: &Packet, backend: Host, gue_sport: u16) -> Packet {
        let (src, dst) = (BALANCER.ip(self.outer), backend.ip(self.outer));
        match self.mode {
            forward::DNAT => sent.dnat_to(backend, self.port()),
            forward::DSR => sent.dsr_to(backend.mac),
            forward::IPIP => sent.ipip_to(src, dst, backend.mac),
            _ => sent.gue_to(src, dst, backend.mac, (gue_sport, GUE_PORT)),
        }
    }

    /// Sends a packet and checks all of it that leaves for `backend`, which is `right` on the way
    /// there, and what is counted. The source port of `gue` is the program's choice.
    #[track_caller]
    fn check_as(
        self,
        balancer: &mut Balancer,
        what: &str,
        (sent, right): (&Packet, &Packet),
        backend: Host,
        counts: &Counts,
    ) {
        let what = format!("{self:?}: {what}");
        let outcome = balancer.send(sent);
        assert_eq!(
            outcome.verdict,
            Verdict::Tx,
            "{what}: not forwarded; counted: {:?}",
            outcome.counts
        );
        let mut sport = 0;
        if self.mode == forward::GUE {
            (sport, _) = oracle::ports(&outcome.frame).expect("UDP around the packet");
            assert!(sport >= 49152, "{what}: source port {sport} is not dynamic");
        }
        let expected = self.expected(right, backend, sport).build();
        oracle::assert_frame(&what, &expected, &outcome.frame);
        assert_eq!(
            outcome.counts, *counts,
            "{what}: the counters moved otherwise than expected"
        );
    }

    /// As [`Way::check_as`] for a packet that needs no mending.
    #[track_caller]
    fn check(
        self,
        balancer: &mut Balancer,
        what: &str,
        sent: &Packet,
        backend: Host,
        counts: &Counts,
    ) {
        self.check_as(balancer, what, (sent, sent), backend, counts);
    }

    /// Opens a flow from `sent`'s address to [`BACKEND_1`].
    #[track_caller]
    fn open(self, balancer: &mut Balancer, sent: &Packet) {
        let counts = first(sent);
        self.check(balancer, "the first packet", sent, BACKEND_1, &counts);
    }
}

/// Every mode but `nat`, with every combination of families it can do.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for inner in Family::BOTH {
        for mode in [forward::DNAT, forward::DSR] {
            ways.push(Way {
                mode,
                inner,
                outer: inner,
            });
        }
        for mode in [forward::IPIP, forward::GUE] {
            for outer in Family::BOTH {
                ways.push(Way { mode, inner, outer });
            }
        }
    }
    ways
}

fn encapsulations() -> impl Iterator<Item = Way> {
    ways().into_iter().filter(|w| w.encapsulates())
}

fn request(family: Family, protocol: u8) -> Packet {
    let packet = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
    if protocol == TCP {
        packet.syn()
    } else {
        packet.payload(*b"question")
    }
}

/// What the first packet of a flow to backend 1 of service 1 moves.
fn first(sent: &Packet) -> Counts {
    with_load(
        Counts::default()
            .packet_in(1, 1, sent.ip_len())
            .connection(1, 1),
        sent.protocol(),
    )
}

/// What any other packet moves, of a flow that is as its first packet left it.
fn next(sent: &Packet) -> Counts {
    with_load(
        Counts::default().packet_in(1, 1, sent.ip_len()),
        sent.protocol(),
    )
}

fn with_load(counts: Counts, protocol: u8) -> Counts {
    if protocol == TCP {
        counts.load(1, 0, 1)
    } else {
        counts.load(1, 1, 0)
    }
}

fn state_word(balancer: &Balancer, family: Family) -> &'static str {
    let flows = balancer.flows(family);
    let client = flows.iter().find(|f| !f.from_backend).expect("a flow");
    names::name_of(names::STATE, client.state)
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 256 + 1) as u8).collect()
}

#[test]
fn packets_reach_the_backend_and_the_flow_is_recorded() {
    for way in ways() {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            let sent = request(way.inner, protocol);
            way.open(&mut balancer, &sent);
            let flows = balancer.flows(way.inner);
            let client = flows.iter().find(|f| !f.from_backend).expect("client's");
            assert_eq!(client.src, (CLIENT.ip(way.inner), 40000));
            assert_eq!(client.dst, (VIP.ip(way.inner), 80));
            assert_eq!(client.forward, way.mode);
            assert_eq!((client.service, client.backend), (1, 1));
            assert_eq!(client.out_src, client.src, "the client's address is kept");
            if way.one_sided() {
                assert_eq!(client.out_dst, client.dst);
                assert_eq!(flows.len(), 1, "{way:?}: there are no replies to match");
            } else {
                assert_eq!(client.out_dst, (BACKEND_1.ip(way.inner), 8080));
                assert_eq!(flows.len(), 2, "{way:?}: both directions are matched");
                let back = flows.iter().find(|f| f.from_backend).expect("backend's");
                assert_eq!((back.src, back.dst), (client.out_dst, client.out_src));
                assert_eq!((back.out_src, back.out_dst), (client.dst, client.src));
            }
            let other = balancer.flows(way.inner.other());
            assert!(other.is_empty(), "{way:?}: flows are the client's family");
            for len in [0, 1, 2, 255, 1200] {
                let mut more = request(way.inner, protocol).payload(payload(len));
                if protocol == TCP {
                    more = more.syn();
                }
                let counts = next(&more);
                way.check(&mut balancer, "a later packet", &more, BACKEND_1, &counts);
            }
        }
    }
}

#[test]
fn two_backends_keep_their_flows_apart() {
    for way in ways() {
        let mut balancer = Balancer::new(vec![
            way.service(UDP)
                .backend_of(way.outer, BACKEND_1, way.port(), 1)
                .backend_of(way.outer, BACKEND_2, way.port(), 1),
        ]);
        let sent = |port| request(way.inner, UDP).from(CLIENT, port);
        way.open(&mut balancer, &sent(40000));
        let second = sent(40001);
        let counts = Counts::default()
            .packet_in(1, 2, second.ip_len())
            .connection(1, 2)
            .load(1, 1, 0)
            .load(2, 1, 0);
        way.check(&mut balancer, "another flow", &second, BACKEND_2, &counts);
        for (port, number, backend) in [(40000, 1, BACKEND_1), (40001, 2, BACKEND_2)] {
            let again = sent(port);
            let counts = Counts::default()
                .packet_in(1, number, again.ip_len())
                .load(1, 1, 0)
                .load(2, 1, 0);
            way.check(&mut balancer, "again", &again, backend, &counts);
        }
    }
}

#[test]
fn one_service_may_have_backends_of_both_families() {
    for way in encapsulations().filter(|w| w.inner == w.outer) {
        let across = Way {
            outer: way.inner.other(),
            ..way
        };
        let mut balancer = Balancer::new(vec![
            way.service(UDP)
                .backend_of(way.outer, BACKEND_1, 80, 1)
                .backend_of(across.outer, BACKEND_2, 80, 1),
        ]);
        way.open(&mut balancer, &request(way.inner, UDP));
        let sent = request(way.inner, UDP).from(CLIENT_2, 40000);
        let counts = Counts::default()
            .packet_in(1, 2, sent.ip_len())
            .connection(1, 2)
            .load(1, 1, 0)
            .load(2, 1, 0);
        across.check(&mut balancer, "the other family", &sent, BACKEND_2, &counts);
    }
}

/// DSCP and ECN of the inner packet are the outer one's (RFC 2983 section 3.1, RFC 6040 section
/// 4.1, normal mode), and no mode changes them.
#[test]
fn the_class_is_kept_and_copied() {
    for way in ways() {
        let mut balancer = way.balancer(UDP);
        way.open(&mut balancer, &request(way.inner, UDP));
        for tos in [0x00, 0x01, 0x02, 0x03, 0x28, 0xb8, 0xb9, 0xff] {
            let mut sent = request(way.inner, UDP);
            sent.tos = tos;
            let counts = next(&sent);
            let what = format!("class {tos:#04x}");
            way.check(&mut balancer, &what, &sent, BACKEND_1, &counts);
        }
    }
}

/// Everything that can stand around the transport header, with and without a checksum that the
/// sender left to its hardware.
#[test]
fn headers_around_stay_as_they_are() {
    let dressed: Vec<(&str, Packet)> = vec![
        ("one VLAN tag", tcp(Family::V4).vlan(0x8100, 0x6064)),
        (
            "two VLAN tags",
            tcp(Family::V4).vlan(0x88a8, 100).vlan(0x8100, 200),
        ),
        ("IPv6 in a VLAN", udp(Family::V6).vlan(0x8100, 5)),
        (
            "IPv6 in two VLANs",
            tcp(Family::V6).vlan(0x88a8, 5).vlan(0x8100, 6),
        ),
        ("IPv4 options", tcp(Family::V4).options(&[1, 1, 1, 0])),
        ("all IPv4 options", udp(Family::V4).options(&[1; 40])),
        (
            "hop-by-hop options",
            tcp(Family::V6).extension(HOP_BY_HOP, 8),
        ),
        (
            "three extension headers",
            udp(Family::V6)
                .extension(HOP_BY_HOP, 16)
                .extension(DESTINATION_OPTIONS, 8)
                .extension(DESTINATION_OPTIONS, 24),
        ),
        ("a routing header", tcp(Family::V6).extension(ROUTING, 8)),
        ("no DF", {
            let mut packet = tcp(Family::V4);
            packet.dont_fragment = false;
            packet
        }),
        ("padding", tcp(Family::V4).trailer([0; 6])),
        ("an odd trailer", udp(Family::V6).trailer([0xee; 5])),
        (
            "options in a VLAN, and padding",
            udp(Family::V4)
                .vlan(0x8100, 9)
                .options(&[1; 8])
                .trailer([7; 3]),
        ),
    ];
    for (what, packet) in dressed {
        for way in ways().into_iter().filter(|w| w.inner == packet.family) {
            let mut balancer = way.balancer(packet.protocol());
            balancer.change(1, |s| s.backends[0].tags = packet.tags());
            let sent = packet
                .clone()
                .from(CLIENT, 40000)
                .to(VIP, 80)
                .payload(payload(33));
            let sent = if packet.protocol() == TCP {
                sent.syn()
            } else {
                sent
            };
            way.check(&mut balancer, what, &sent, BACKEND_1, &first(&sent));
            let partial = sent.clone().checksum(Checksum::Partial);
            let counts = next(&sent);
            let what = format!("{what}, partial checksum");
            way.check_as(&mut balancer, &what, (&partial, &sent), BACKEND_1, &counts);
        }
    }
}

#[test]
fn tags_are_those_of_the_next_hop_in_every_mode() {
    for way in ways() {
        for from in TAGS {
            for to in TAGS {
                let mut balancer = way.balancer(UDP);
                let sent = request(way.inner, UDP).tagged(from);
                let right = sent.clone().tagged(&rewritten(from, to));
                balancer.change(1, |s| s.backends[0].tags = right.tags());
                let what = format!("{from:x?} to {to:x?}");
                let packets = (&sent, &right);
                way.check_as(&mut balancer, &what, packets, BACKEND_1, &first(&sent));
                way.check_as(&mut balancer, &what, packets, BACKEND_1, &next(&sent));
            }
        }
    }
}

#[test]
fn partial_checksums_are_completed_in_every_mode() {
    for way in ways() {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(way.inner, protocol));
            for len in (0..40).chain([511, 512, 513, 1023, 1024, 1025, 1399, 1400]) {
                let right = request(way.inner, protocol).payload(payload(len));
                let partial = right.clone().checksum(Checksum::Partial);
                let counts = next(&right);
                let what = format!("partial checksum, {len} bytes");
                way.check_as(&mut balancer, &what, (&partial, &right), BACKEND_1, &counts);
            }
        }
    }
}

#[test]
fn a_missing_udp_checksum_stays_missing() {
    for way in ways().into_iter().filter(|w| w.inner == Family::V4) {
        let mut balancer = way.balancer(UDP);
        way.open(&mut balancer, &request(Family::V4, UDP));
        for len in [0, 1, 2, 3, 511, 513, 1400] {
            let sent = request(Family::V4, UDP)
                .payload(payload(len))
                .checksum(Checksum::Zero);
            let what = format!("no checksum, {len} bytes");
            way.check(&mut balancer, &what, &sent, BACKEND_1, &next(&sent));
        }
    }
}

/// The outer checksum of GUE over IPv6 must be right for whatever is inside (RFC 8200 section
/// 8.1); over IPv4 there is none, which [`Packet::gue_to`] says.
#[test]
fn gue_over_ipv6_carries_a_right_checksum() {
    for inner in Family::BOTH {
        let way = Way {
            mode: forward::GUE,
            inner,
            outer: Family::V6,
        };
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(inner, protocol));
            let dresses: [&dyn Fn(Packet) -> Packet; 3] = [
                &|p| p,
                &|p| match p.family {
                    Family::V4 => p.options(&[1, 1, 1, 0]),
                    Family::V6 => p.extension(DESTINATION_OPTIONS, 8),
                },
                &|p| match (p.family, p.protocol()) {
                    (Family::V4, UDP) => p.checksum(Checksum::Zero),
                    (Family::V6, _) => p.extension(HOP_BY_HOP, 16).extension(ROUTING, 24),
                    _ => p,
                },
            ];
            for dress in dresses {
                for len in (0..20).chain([1001, 1300]) {
                    let sent = dress(request(inner, protocol).payload(payload(len)));
                    let outcome = balancer.send(&sent);
                    assert_eq!(outcome.verdict, Verdict::Tx);
                    oracle::assert_checksums(&format!("{way:?}, {len} bytes"), &outcome.frame);
                    let sport = oracle::ports(&outcome.frame).expect("UDP").0;
                    let expected = way.expected(&sent, BACKEND_1, sport).build();
                    oracle::assert_frame(&format!("{way:?}"), &expected, &outcome.frame);
                }
            }
        }
    }
}

/// The flow label is in no inner checksum, so it moves the outer one: through all values, of which
/// zero must be sent as its equal. (What is inside in IPv4 always adds up to the same.)
#[test]
fn the_checksum_of_gue_over_ipv6_is_never_zero() {
    let way = Way {
        mode: forward::GUE,
        inner: Family::V6,
        outer: Family::V6,
    };
    let mut balancer = way.balancer(UDP);
    let mut seen = BTreeSet::new();
    for label in 0..=u32::from(u16::MAX) {
        let mut sent = request(Family::V6, UDP);
        sent.flow_label = label;
        let (_, frame) = balancer.run_uncounted(&sent.build());
        let sport = oracle::ports(&frame).expect("UDP outside").0;
        let expected = way.expected(&sent, BACKEND_1, sport).build();
        if frame != expected {
            oracle::assert_frame(&format!("label {label:#06x}"), &expected, &frame);
        }
        seen.insert([frame[60], frame[61]]);
    }
    assert!(seen.contains(&[0xff, 0xff]) && !seen.contains(&[0, 0]));
}

/// UDP may end before the IP packet does (RFC 9868 puts options there); its checksum covers only
/// itself, the outer one everything.
#[test]
fn bytes_behind_an_inner_datagram_are_carried_and_summed() {
    for outer in Family::BOTH {
        for mode in [forward::IPIP, forward::GUE] {
            let way = Way {
                mode,
                inner: Family::V6,
                outer,
            };
            let mut balancer = way.balancer(UDP);
            for surplus in [1, 2, 3, 20] {
                let grow = |packet: &Packet| {
                    let mut frame = packet.build();
                    let len = u16::from_be_bytes([frame[18], frame[19]]) + surplus;
                    frame[18..20].copy_from_slice(&len.to_be_bytes());
                    frame.extend(payload(usize::from(surplus)));
                    frame
                };
                let sent = request(Family::V6, UDP);
                let outcome = balancer.run(&grow(&sent));
                assert_eq!(outcome.verdict, Verdict::Tx, "{:?}", outcome.counts);
                let sport = match mode {
                    forward::GUE => oracle::ports(&outcome.frame).expect("UDP").0,
                    _ => 0,
                };
                let mut expected = way.expected(&sent, BACKEND_1, sport);
                expected.payload = grow(&sent.clone().ttl(63)).split_off(14);
                let what = format!("{way:?}, {surplus} bytes");
                oracle::assert_frame(&what, &expected.build(), &outcome.frame);
            }
        }
    }
}

/// A packet damaged on its way stays damaged, and a checksum around it that is made from its own
/// never hides that.
#[test]
fn a_wrong_checksum_stays_exactly_as_wrong() {
    for way in ways() {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(way.inner, protocol));
            for by in [1, 0x100, 0x7fff, 0xfffe] {
                let sent = request(way.inner, protocol)
                    .payload(payload(33))
                    .checksum(Checksum::Wrong(by));
                let (_, frame) = balancer.run_uncounted(&sent.build());
                let sport = match way.mode {
                    forward::GUE => oracle::ports(&frame).expect("UDP").0,
                    _ => 0,
                };
                let mut expected = way.expected(&sent, BACKEND_1, sport);
                if way.mode == forward::GUE && way.outer == Family::V6 {
                    expected.checksum = Checksum::Wrong(by);
                }
                let what = format!("{way:?} protocol {protocol}, wrong by {by:#x}");
                oracle::assert_frame(&what, &expected.build(), &frame);
            }
        }
    }
}

#[test]
fn hops_are_taken_where_the_balancer_routes() {
    for way in ways() {
        let mut balancer = way.balancer(UDP);
        if way.mode == forward::DSR {
            for ttl in [1, 0, 2, 255] {
                let sent = request(way.inner, UDP).ttl(ttl);
                let counts = if ttl == 1 { first(&sent) } else { next(&sent) };
                let what = format!("{ttl} hops");
                way.check(&mut balancer, &what, &sent, BACKEND_1, &counts);
            }
            continue;
        }
        let expired =
            |packet: &Packet| Expected::sent(&error_for(packet, time_exceeded(packet.family)));
        let sent = request(way.inner, UDP).ttl(1);
        balancer.check(
            "no hop left on a new flow",
            &sent,
            &expired(&sent),
            &Counts::default().drop(DropReason::TtlExceeded, 1),
        );
        assert!(balancer.flows(way.inner).is_empty());
        way.open(&mut balancer, &request(way.inner, UDP).ttl(2));
        for ttl in [0, 1] {
            let counts = Counts::default().drop(DropReason::TtlExceeded, 1);
            let sent = request(way.inner, UDP).ttl(ttl);
            balancer.check(
                "no hop left on a known flow",
                &sent,
                &expired(&sent),
                &with_load(counts, UDP),
            );
        }
        let sent = request(way.inner, UDP).ttl(255);
        way.check(&mut balancer, "all hops", &sent, BACKEND_1, &next(&sent));
    }
}

#[test]
fn what_exceeds_the_mtu_once_encapsulated_is_too_big() {
    for way in encapsulations() {
        let udp_header = if way.mode == forward::GUE { 8 } else { 0 };
        let outer_header = if way.outer == Family::V4 { 20 } else { 40 };
        let inner_header = if way.inner == Family::V4 { 28 } else { 48 };
        let fits = 1500 - udp_header - outer_header - inner_header;
        let mut balancer = Balancer::new(vec![
            way.service(UDP)
                .backend_of(way.outer, BACKEND_1, 80, 1)
                .last(|b| b.mtu = 1500),
        ]);
        let largest = request(way.inner, UDP).payload(payload(fits));
        way.open(&mut balancer, &largest);
        let sent = request(way.inner, UDP).payload(payload(fits + 1));
        balancer.check(
            &format!("{way:?}: a byte more"),
            &sent,
            &Expected::sent(&error_for(
                &sent,
                too_big(way.inner, largest.ip_len() as u16),
            )),
            &with_load(Counts::default().drop(DropReason::TooBig, 1), UDP),
        );
    }
}

/// The networks that outer sources are taken from.
const SOURCE4: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 19, 64, 0), 18);
const SOURCE6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 0), 96);

fn outer_addresses(frame: &[u8]) -> (IpAddr, IpAddr) {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).expect("it parses");
    match packet.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        Some(etherparse::NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        other => panic!("no IP packet: {other:?}"),
    }
}

fn in_network(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => (ip.to_bits() ^ SOURCE4.0.to_bits()) >> (32 - SOURCE4.1) == 0,
        IpAddr::V6(ip) => (ip.to_bits() ^ SOURCE6.0.to_bits()) >> (128 - SOURCE6.1) == 0,
    }
}

#[test]
fn outer_sources_spread_over_their_network_and_stay_with_the_flow() {
    for way in encapsulations() {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            balancer.set_encap_source(Some(SOURCE4), Some(SOURCE6));
            let mut sources = BTreeSet::new();
            for port in 1..=512 {
                let sent = request(way.inner, protocol).from(CLIENT, port);
                let mut of_flow = BTreeSet::new();
                for len in [0, 1, 700] {
                    let sent = sent.clone().payload(payload(len));
                    let (_, frame) = balancer.run_uncounted(&sent.build());
                    let (src, dst) = outer_addresses(&frame);
                    assert_eq!(dst, BACKEND_1.ip(way.outer));
                    assert!(in_network(src), "{way:?}: {src} is outside the network");
                    let sport = match way.mode {
                        forward::GUE => oracle::ports(&frame).expect("UDP").0,
                        _ => 0,
                    };
                    let mut expected = way.expected(&sent, BACKEND_1, sport);
                    expected.src = src;
                    oracle::assert_frame(&format!("{way:?}"), &expected.build(), &frame);
                    of_flow.insert(src);
                }
                assert_eq!(of_flow.len(), 1, "{way:?}: one flow, one source");
                sources.extend(of_flow);
            }
            // 512 draws from 2^14 leave about eight out; from 2^32 none.
            assert!(
                sources.len() > 480,
                "{way:?}: {} sources for 512 flows",
                sources.len()
            );
        }
    }
}

#[test]
fn without_a_network_the_outer_source_is_the_balancer() {
    for way in encapsulations() {
        let mut balancer = way.balancer(UDP);
        // A network of the other family changes nothing.
        match way.outer {
            Family::V4 => balancer.set_encap_source(None, Some(SOURCE6)),
            Family::V6 => balancer.set_encap_source(Some(SOURCE4), None),
        }
        way.open(&mut balancer, &request(way.inner, UDP));
    }
}

#[test]
fn source_ports_of_gue_spread_and_stay_with_the_flow() {
    for way in ways().into_iter().filter(|w| w.mode == forward::GUE) {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            let mut ports = BTreeSet::new();
            for client in [CLIENT, CLIENT_2] {
                for port in 1..=256 {
                    let sent = request(way.inner, protocol).from(client, port);
                    let mut of_flow = BTreeSet::new();
                    for len in [0, 1, 700] {
                        let sent = sent.clone().payload(payload(len)).build();
                        let (_, frame) = balancer.run_uncounted(&sent);
                        let (sport, dport) = oracle::ports(&frame).expect("UDP outside");
                        assert_eq!(dport, GUE_PORT);
                        assert!(sport >= 49152, "{way:?}: {sport}");
                        of_flow.insert(sport);
                    }
                    assert_eq!(of_flow.len(), 1, "{way:?}: one flow, one port");
                    ports.extend(of_flow);
                }
            }
            assert!(
                ports.len() > 480,
                "{way:?}: {} ports for 512 flows",
                ports.len()
            );
        }
    }
}

/// A reply of `dnat`, for whatever client it is.
fn answer(
    family: Family,
    protocol: u8,
    client: impl sluice_tests::packet::Address,
    port: u16,
) -> Packet {
    transport(family, protocol)
        .macs(BACKEND_1.mac, BALANCER.mac)
        .from(BACKEND_1, 8080)
        .to(client, port)
}

fn dnat(family: Family) -> Way {
    Way {
        mode: forward::DNAT,
        inner: family,
        outer: family,
    }
}

#[test]
fn replies_of_dnat_return_as_the_vips() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let way = dnat(family);
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(family, protocol));
            let mut sent = answer(family, protocol, CLIENT, 40000);
            if protocol == TCP {
                sent = sent.syn().ack();
            }
            for (what, sent, right) in [
                ("an answer", sent.clone(), sent.clone()),
                (
                    "a partial checksum",
                    sent.clone().checksum(Checksum::Partial),
                    sent.clone(),
                ),
                ("a tag", sent.clone().vlan(0x8100, 3), sent.clone()),
            ] {
                let counts = Counts::default().packet_out(1, 1, sent.ip_len());
                balancer.check(
                    what,
                    &sent,
                    &Expected::sent(&right.nat_back(VIP, 80, CLIENT, 40000)),
                    &with_load(counts, protocol),
                );
            }
            for ttl in [0, 1] {
                let counts = Counts::default().drop(DropReason::TtlExceeded, 1);
                let sent = answer(family, protocol, CLIENT, 40000).ttl(ttl);
                balancer.check(
                    "an answer without a hop left",
                    &sent,
                    &Expected::sent(&error_for(&sent, time_exceeded(family))),
                    &with_load(counts, protocol),
                );
            }
        }
    }
}

#[test]
fn a_backends_own_traffic_is_not_ours() {
    for family in Family::BOTH {
        let way = dnat(family);
        let mut balancer = way.balancer(UDP);
        way.open(&mut balancer, &request(family, UDP));
        let own = answer(family, UDP, CLIENT, 40000);
        for (what, packet) in [
            ("to another port", own.clone().to(CLIENT, 40001)),
            ("to another host", own.clone().to(STRANGER, 40000)),
            ("from another port", own.clone().from(BACKEND_1, 8081)),
            ("a later piece", own.clone().fragment(3, true)),
            ("to the balancer itself", own.clone().to(BALANCER, 22)),
            ("with no hop left", own.to(STRANGER, 40000).ttl(1)),
        ] {
            balancer.check(
                what,
                &packet,
                &Expected::Passed,
                &with_load(Counts::default(), UDP),
            );
        }
    }
}

/// The address filter has one lane for many addresses: a client may share one with the balancer.
#[test]
fn a_client_that_shares_the_balancers_lane_is_answered() {
    use lb_common::{addr, filter::lane_of};
    let balancer_lane = lane_of(addr::from_ipv4(BALANCER.v4));
    let client = (0..1_u32 << 17)
        .map(|n| Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + n))
        .find(|ip| *ip != BALANCER.v4 && lane_of(addr::from_ipv4(*ip)) == balancer_lane)
        .map(IpAddr::V4)
        .expect("two addresses of a /15 share a lane");
    let way = dnat(Family::V4);
    let mut balancer = way.balancer(UDP);
    way.open(&mut balancer, &request(Family::V4, UDP).from(client, 40000));
    let sent = answer(Family::V4, UDP, client, 40000);
    let expected = {
        let mut packet = sent.nat_back(VIP, 80, CLIENT, 40000);
        packet.dst = client;
        packet
    };
    balancer.check(
        "an answer",
        &sent,
        &Expected::sent(&expected),
        &Counts::default()
            .packet_out(1, 1, sent.ip_len())
            .load(1, 1, 0),
    );
}

/// Two VIPs on one backend: a client that uses one port for both would be two flows with the same
/// tuple at the backend.
#[test]
fn dnat_takes_another_source_port_only_where_two_flows_would_meet() {
    for family in Family::BOTH {
        let way = dnat(family);
        let mut balancer = Balancer::new(vec![
            way.service(UDP).backend(BACKEND_1, 8080, 1),
            service(family, UDP, VIP_2, 80)
                .forward(forward::DNAT)
                .backend(BACKEND_1, 8080, 1),
        ]);
        way.open(&mut balancer, &request(family, UDP));
        let counts = |sent: &Packet| {
            Counts::default()
                .packet_in(2, 2, sent.ip_len())
                .connection(2, 2)
        };
        let second = request(family, UDP).to(VIP_2, 80);
        let port = balancer.check_new(
            "the same client and port at another VIP",
            &second,
            |port| Expected::sent(&second.dnat_to(BACKEND_1, 8080).from(CLIENT, port)),
            &counts(&second).load(1, 1, 0).load(2, 1, 0),
        );
        for (what, back, expected) in [
            (
                "the first VIP's answer",
                answer(family, UDP, CLIENT, 40000),
                answer(family, UDP, CLIENT, 40000).nat_back(VIP, 80, CLIENT, 40000),
            ),
            (
                "the second VIP's answer",
                answer(family, UDP, CLIENT, port),
                answer(family, UDP, CLIENT, port).nat_back(VIP_2, 80, CLIENT, 40000),
            ),
        ] {
            let number = if what.starts_with("the first") { 1 } else { 2 };
            balancer.check(
                what,
                &back,
                &Expected::sent(&expected),
                &Counts::default()
                    .packet_out(number, number, back.ip_len())
                    .load(1, 1, 0)
                    .load(2, 1, 0),
            );
        }
        for (what, sent) in [
            ("another port", request(family, UDP).from(CLIENT, 40001)),
            ("another client", request(family, UDP).from(CLIENT_2, 40000)),
        ] {
            let sent = sent.to(VIP_2, 80);
            let outcome = balancer.send(&sent);
            let expected = sent.dnat_to(BACKEND_1, 8080).build();
            oracle::assert_frame(what, &expected, &outcome.frame);
        }
    }
}

/// The states a connection goes through as the client's packets alone tell it.
#[test]
fn one_side_of_a_connection_tells_its_state() {
    for way in ways().into_iter().filter(|w| w.one_sided()) {
        let client = || tcp(way.inner).from(CLIENT, 40000).to(VIP, 80);
        let mut balancer = way.balancer(TCP);
        way.open(&mut balancer, &request(way.inner, TCP));
        assert_eq!(state_word(&balancer, way.inner), "SYN_SENT");
        for (what, sent, word, load) in [
            ("the SYN again", client().syn(), "SYN_SENT", (0, 1)),
            ("the ACK", client().ack(), "ESTABLISHED", (1, 0)),
            (
                "data",
                client().ack().psh().payload(*b"GET /"),
                "ESTABLISHED",
                (1, 0),
            ),
            ("a late SYN", client().syn(), "ESTABLISHED", (1, 0)),
            ("the FIN", client().fin().ack(), "FIN_CLIENT", (0, 1)),
            ("the last ACK", client().ack(), "FIN_CLIENT", (0, 1)),
        ] {
            let counts = Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .load(1, load.0, load.1);
            way.check(&mut balancer, what, &sent, BACKEND_1, &counts);
            assert_eq!(state_word(&balancer, way.inner), word, "{way:?}: {what}");
        }
        // The client has the port again: nothing more can be known of the backend's side.
        let again = client().syn();
        way.check(
            &mut balancer,
            "a new SYN",
            &again,
            BACKEND_1,
            &first(&again),
        );
        assert_eq!(state_word(&balancer, way.inner), "SYN_SENT");
        for (what, sent, word) in [
            ("a RST", client().rst(), "CLOSED"),
            ("data after the end", client().ack(), "CLOSED"),
        ] {
            way.check(&mut balancer, what, &sent, BACKEND_1, &next(&sent));
            assert_eq!(state_word(&balancer, way.inner), word, "{way:?}: {what}");
        }
        way.check(
            &mut balancer,
            "a new SYN",
            &again,
            BACKEND_1,
            &first(&again),
        );
    }
}

#[test]
fn both_sides_of_a_connection_tell_its_state_in_dnat() {
    for family in Family::BOTH {
        let way = dnat(family);
        let client = || tcp(family).from(CLIENT, 40000).to(VIP, 80);
        let backend = || answer(family, TCP, CLIENT, 40000);
        let mut balancer = way.balancer(TCP);
        way.open(&mut balancer, &request(family, TCP));
        for (what, sent, word, load) in [
            ("an early ACK", client().ack(), "SYN_SENT", (0, 1)),
            ("the SYN-ACK", backend().syn().ack(), "SYN_RECV", (0, 1)),
            ("the ACK", client().ack(), "ESTABLISHED", (1, 0)),
            (
                "the backend's FIN",
                backend().fin().ack(),
                "FIN_BACKEND",
                (0, 1),
            ),
            (
                "the client's FIN",
                client().fin().ack(),
                "TIME_WAIT",
                (0, 1),
            ),
        ] {
            let out = sent.src_mac == BACKEND_1.mac;
            let (expected, counts) = if out {
                (
                    sent.nat_back(VIP, 80, CLIENT, 40000),
                    Counts::default().packet_out(1, 1, sent.ip_len()),
                )
            } else {
                (
                    sent.dnat_to(BACKEND_1, 8080),
                    Counts::default().packet_in(1, 1, sent.ip_len()),
                )
            };
            balancer.check(
                what,
                &sent,
                &Expected::sent(&expected),
                &counts.load(1, load.0, load.1),
            );
            assert_eq!(state_word(&balancer, family), word, "{what}");
        }
        let again = client().syn();
        way.check(
            &mut balancer,
            "a new SYN",
            &again,
            BACKEND_1,
            &first(&again),
        );
        assert_eq!(balancer.flows(family).len(), 2, "the old entries are gone");
    }
}

/// In the middle of a connection nobody knows, the client is told: by the balancer where that has to
/// know, else by the backend that a hash names.
#[test]
fn a_connection_nobody_knows_is_reset_by_whoever_should_know_it() {
    for way in ways() {
        let mut balancer = way.balancer(TCP);
        let sent = tcp(way.inner).from(CLIENT, 40000).to(VIP, 80).ack();
        if !forward::translates(way.mode) {
            let counts = Counts::default().packet_in(1, 1, sent.ip_len());
            way.check(
                &mut balancer,
                "an ACK out of nowhere",
                &sent,
                BACKEND_1,
                &counts,
            );
            assert_eq!(balancer.flows(way.inner), [], "nothing to remember");
            continue;
        }
        balancer.check(
            "an ACK out of nowhere",
            &sent,
            &Expected::sent(&reset_for(&sent)),
            &Counts::default().drop(DropReason::NoFlow, 1),
        );
    }
}

/// What flows of a dead backend meet is the same in every mode.
#[test]
fn flows_of_a_dead_backend_are_kept_or_reset() {
    for way in ways() {
        for what in [on_backend_down::KEEP, on_backend_down::RESET] {
            let mut balancer = Balancer::new(vec![
                way.service(TCP)
                    .on_backend_down(what)
                    .backend_of(way.outer, BACKEND_1, way.port(), 1)
                    .backend_of(way.outer, BACKEND_2, way.port(), 1),
            ]);
            way.open(&mut balancer, &request(way.inner, TCP));
            balancer.change(1, |s| s.backends[0].alive = false);
            let sent = tcp(way.inner).from(CLIENT, 40000).to(VIP, 80).ack();
            if what == on_backend_down::KEEP {
                let established = way.one_sided();
                let counts = Counts::default().packet_in(1, 1, sent.ip_len());
                let counts = counts.load(1, u64::from(established), u64::from(!established));
                way.check(
                    &mut balancer,
                    "data of a kept flow",
                    &sent,
                    BACKEND_1,
                    &counts,
                );
            } else {
                balancer.check(
                    "data of a flow that is reset",
                    &sent,
                    &Expected::sent(&reset_for(&sent)),
                    &Counts::default().drop(DropReason::BackendDown, 1),
                );
                assert!(balancer.flows(way.inner).is_empty(), "{way:?}");
            }
            let again = request(way.inner, TCP);
            let counts = Counts::default()
                .packet_in(1, 2, again.ip_len())
                .connection(1, 2)
                .load(2, 0, 1);
            way.check(
                &mut balancer,
                "a SYN picks again",
                &again,
                BACKEND_2,
                &counts,
            );
        }
    }
}

#[test]
fn a_backend_without_a_next_hop_is_not_sent_to() {
    for way in ways() {
        let mut balancer = way.balancer(UDP);
        balancer.change(1, |s| s.backends[0].resolved = false);
        let counts = Counts::default().drop(DropReason::NoNeighbour, 1);
        let sent = request(way.inner, UDP);
        balancer.check("a new flow", &sent, &Expected::Dropped, &counts);
        balancer.change(1, |s| s.backends[0].resolved = true);
        way.open(&mut balancer, &sent);
        balancer.change(1, |s| s.backends[0].resolved = false);
        let counts = with_load(counts, UDP);
        balancer.check("a known flow", &sent, &Expected::Dropped, &counts);
    }
}

#[test]
fn a_backend_behind_another_interface_is_reached_by_redirect() {
    for way in ways() {
        let mut balancer = Balancer::new(vec![
            way.service(UDP)
                .backend_of(way.outer, BACKEND_1, way.port(), 1)
                .last(|b| b.ifindex = OTHER_INTERFACE),
        ]);
        let sent = request(way.inner, UDP);
        let outcome = balancer.send(&sent);
        assert_eq!(outcome.verdict, Verdict::Redirect, "{way:?}");
        let sport = match way.mode {
            forward::GUE => oracle::ports(&outcome.frame).expect("UDP").0,
            _ => 0,
        };
        let expected = way.expected(&sent, BACKEND_1, sport).build();
        oracle::assert_frame(&format!("{way:?}"), &expected, &outcome.frame);
        assert_eq!(outcome.counts, first(&sent));
    }
}

/// What a backend sends to clients by itself is never taken for ours.
#[test]
fn direct_answers_pass_if_they_come_by() {
    for way in ways().into_iter().filter(|w| w.one_sided()) {
        let mut balancer = way.balancer(UDP);
        way.open(&mut balancer, &request(way.inner, UDP));
        let direct = udp(way.inner)
            .macs(BACKEND_1.mac, BALANCER.mac)
            .from(VIP, 80)
            .to(CLIENT, 40000);
        let counts = with_load(Counts::default(), UDP);
        balancer.check("a direct answer", &direct, &Expected::Passed, &counts);
        assert_eq!(balancer.flows(way.inner)[0].state, state::UDP);
    }
}

/// A router on the client's side, about an answer of the VIP: it goes to the backend, which sent
/// the answer itself in all modes but `dnat`.
#[test]
fn errors_reach_the_backend_as_the_mode_needs() {
    for way in ways() {
        for protocol in [TCP, UDP] {
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(way.inner, protocol));
            let error = too_big(way.inner, 1400);
            let quoting = |from: Host, port: u16| {
                let quoted = transport(way.inner, protocol)
                    .from(from, port)
                    .to(CLIENT, 40000)
                    .payload(payload(300));
                icmp_error(way.inner, error, &quoted, 500).from(STRANGER, 0)
            };
            let sent = quoting(VIP, 80).to(VIP, 0);
            let counts = Counts::default().packet_in(1, 1, sent.ip_len());
            let counts = with_load(counts, protocol);
            if way.one_sided() {
                way.check(&mut balancer, "an error", &sent, BACKEND_1, &counts);
                continue;
            }
            let expected = quoting(BACKEND_1, 8080)
                .macs(BALANCER.mac, BACKEND_1.mac)
                .to(BACKEND_1, 0)
                .ttl(63);
            let what = format!("{way:?}: an error");
            balancer.check(&what, &sent, &Expected::sent(&expected), &counts);
        }
    }
}

/// The backend itself or a router before it, about a question: it is for the client's address.
#[test]
fn errors_of_dnat_return_as_the_vips() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let way = dnat(family);
            let mut balancer = way.balancer(protocol);
            way.open(&mut balancer, &request(family, protocol));
            let asked = request(family, protocol).payload(payload(300)).ttl(50);
            let at_backend = asked.dnat_to(BACKEND_1, 8080).ttl(50);
            let error = too_big(family, 1300);
            let expected = icmp_error(family, error, &asked, 200)
                .macs(BALANCER.mac, GATEWAY.mac)
                .from(VIP, 0)
                .to(CLIENT, 0)
                .ttl(63);
            for (what, host) in [("the backend", BACKEND_1), ("a router", STRANGER)] {
                let sent = icmp_error(family, error, &at_backend, 200)
                    .macs(host.mac, BALANCER.mac)
                    .from(host, 0)
                    .to(CLIENT, 0);
                let counts = Counts::default().packet_out(1, 1, sent.ip_len());
                balancer.check(
                    &format!("{family:?} protocol {protocol}, from {what}"),
                    &sent,
                    &Expected::sent(&expected),
                    &with_load(counts, protocol),
                );
            }
        }
    }
}

#[test]
fn fragments_follow_the_first_in_every_mode() {
    for way in ways() {
        let mut balancer = way.balancer(UDP);
        let mut whole = request(way.inner, UDP).payload(payload(3000));
        whole.dont_fragment = false;
        let translated = whole.dnat_to(BACKEND_1, 8080).fragments(1000);
        let mut sports = BTreeSet::new();
        for (n, fragment) in whole.fragments(1000).iter().enumerate() {
            let counts = Counts::default().packet_in(1, 1, fragment.ip_len());
            let counts = match n {
                0 => counts.connection(1, 1).load(1, 1, 0),
                _ => counts.load(1, 1, 0),
            };
            let outcome = balancer.send(fragment);
            let what = format!("{way:?}, fragment {n}");
            assert_eq!(outcome.verdict, Verdict::Tx, "{what}: {:?}", outcome.counts);
            assert_eq!(outcome.counts, counts, "{what}: the counters");
            let mut sport = 0;
            if way.mode == forward::GUE {
                (sport, _) = oracle::ports(&outcome.frame).expect("UDP around the packet");
                sports.insert(sport);
            }
            let expected = match way.mode {
                forward::DNAT => translated[n].clone(),
                _ => way.expected(fragment, BACKEND_1, sport),
            };
            oracle::assert_frame(&what, &expected.build(), &outcome.frame);
        }
        assert!(sports.len() <= 1, "{way:?}: one flow, one way: {sports:?}");
    }
}

#[test]
fn fragments_of_dnat_return_as_the_vips() {
    for family in Family::BOTH {
        let way = dnat(family);
        let mut balancer = way.balancer(UDP);
        way.open(&mut balancer, &request(family, UDP));
        let mut whole = answer(family, UDP, CLIENT, 40000).payload(payload(3000));
        whole.dont_fragment = false;
        let expected = whole.nat_back(VIP, 80, CLIENT, 40000).fragments(1000);
        for (n, fragment) in whole.fragments(1000).iter().enumerate() {
            let counts = Counts::default().packet_out(1, 1, fragment.ip_len());
            balancer.check(
                &format!("{family:?}, fragment {n}"),
                fragment,
                &Expected::sent(&expected[n]),
                &with_load(counts, UDP),
            );
        }
    }
}

/// Whatever comes next of a dead backend's flow goes to another, who answers for himself.
#[test]
fn flows_of_a_dead_backend_pick_another() {
    for way in ways() {
        let mut balancer = Balancer::new(vec![
            way.service(TCP)
                .on_backend_down(on_backend_down::RESCHEDULE)
                .backend_of(way.outer, BACKEND_1, way.port(), 1)
                .backend_of(way.outer, BACKEND_2, way.port(), 1),
        ]);
        way.open(&mut balancer, &request(way.inner, TCP));
        balancer.change(1, |s| s.backends[0].alive = false);
        for what in ["the next packet", "the one after it"] {
            let sent = tcp(way.inner).from(CLIENT, 40000).to(VIP, 80).ack();
            let outcome = balancer.send(&sent);
            assert_eq!(outcome.verdict, Verdict::Tx, "{what}");
            let to: Vec<u32> = outcome.counts.backends.keys().copied().collect();
            assert_eq!(to, [2], "{what}");
            assert!(outcome.counts.drops.is_empty(), "{what}");
        }
    }
}
