//! More new flows than a CPU may record: what lives goes on, and what is real begins.

use lb_common::service::{forward, scheduler};
use sluice_tests::{
    harness::{Balancer, Counts, TCP, UDP, Verdict, service, v4, v6},
    oracle,
    packet::{
        BACKEND_1, BACKEND_2, BACKEND_3, CLIENT, Family, Packet, VIP, reply, tcp, transport, udp,
    },
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// New flows a second that each CPU records: so few that they do not fill the flow table while the
/// test runs.
const RATE: u32 = 100;

fn balancer(family: Family, mode: u8, scheduler: u8) -> Balancer {
    let port = if forward::translates(mode) { 8080 } else { 80 };
    let one = |protocol| {
        service(family, protocol, VIP, 80)
            .forward(mode)
            .scheduler(scheduler)
            .backend(BACKEND_1, port, 1)
            .backend(BACKEND_2, port, 1)
            .backend(BACKEND_3, port, 1)
    };
    Balancer::new(vec![one(TCP), one(UDP)])
}

fn client(family: Family, n: u16) -> IpAddr {
    match family {
        Family::V4 => v4(3 + (n / 250) as u8, (n % 250) as u8 + 1),
        Family::V6 => v6(3, n + 1),
    }
}

/// What the backend answers to a packet that left as `frame`.
fn answer_to(
    family: Family,
    protocol: u8,
    mode: u8,
    frame: &[u8],
    client: (IpAddr, u16),
) -> Packet {
    let backends = [BACKEND_1, BACKEND_2, BACKEND_3];
    let backend = backends
        .into_iter()
        .find(|b| frame[..6] == b.mac)
        .expect("a backend");
    let (nat_port, _) = oracle::ports(frame).expect("ports");
    let answer = reply(family, protocol, backend, 8080, nat_port);
    match mode {
        forward::NAT => answer,
        _ => answer.to(client.0, client.1),
    }
}

/// A client's connection through the balancer.
struct Connection {
    family: Family,
    client: (IpAddr, u16),
    /// The first bytes of what leaves: the backend's MAC address.
    backend: Vec<u8>,
    /// In `nat`, what the backend answers to.
    answer: Option<Packet>,
}

impl Connection {
    /// The handshake; the three packets have `between` between them.
    fn open(
        balancer: &mut Balancer,
        (family, mode): (Family, u8),
        n: u16,
        mut between: impl FnMut(&mut Balancer),
    ) -> Self {
        let from = (client(family, n), 30000 + n);
        let packet = |packet: Packet| packet.from(from.0, from.1).to(VIP, 80);
        let (verdict, frame) = balancer.run_uncounted(&packet(tcp(family)).syn().build());
        assert_eq!(
            verdict,
            Verdict::Tx,
            "the SYN of client {n}: {:?}",
            balancer.counts().drops
        );
        let answer = forward::translates(mode).then(|| answer_to(family, TCP, mode, &frame, from));
        let connection = Self {
            family,
            client: from,
            backend: frame[..6].to_vec(),
            answer,
        };
        between(balancer);
        if let Some(answer) = &connection.answer {
            let (verdict, _) = balancer.run_uncounted(&answer.clone().syn().ack().build());
            assert_eq!(verdict, Verdict::Tx, "the SYN-ACK for client {n}");
            between(balancer);
        }
        connection.exchange(balancer, "completes the handshake");
        connection
    }

    /// A packet of the client and one of the backend.
    fn exchange(&self, balancer: &mut Balancer, what: &str) {
        let packet = tcp(self.family)
            .from(self.client.0, self.client.1)
            .to(VIP, 80)
            .ack()
            .payload(*b"request");
        let (verdict, frame) = balancer.run_uncounted(&packet.build());
        assert_eq!(verdict, Verdict::Tx, "{:?} {what}", self.client);
        assert_eq!(
            frame[..6],
            self.backend,
            "{:?} {what}: another backend",
            self.client
        );
        if let Some(answer) = &self.answer {
            let port = oracle::ports(&frame).expect("ports").0;
            assert_eq!(port, answer.dport, "{:?} {what}: another port", self.client);
            let answer = answer.clone().ack().payload(*b"answer");
            let (verdict, _) = balancer.run_uncounted(&answer.build());
            assert_eq!(
                verdict,
                Verdict::Tx,
                "the answer to {:?} {what}",
                self.client
            );
        }
    }
}

/// SYNs and datagrams from addresses that nobody has.
struct Spoofed(Family, u64);

impl Spoofed {
    fn next(&mut self) -> Packet {
        // xorshift64*
        self.1 ^= self.1 >> 12;
        self.1 ^= self.1 << 25;
        self.1 ^= self.1 >> 27;
        let random = self.1.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let host = (random >> 32) as u32;
        let from: IpAddr = match self.0 {
            Family::V4 => Ipv4Addr::from(0x0a00_0000 | host >> 8).into(),
            Family::V6 => {
                Ipv6Addr::from(0x2001_0db8_00ff_0000_0000_0000_0000_0000_u128 | u128::from(random))
                    .into()
            }
        };
        let port = (random as u16) | 1;
        if random.is_multiple_of(16) {
            udp(self.0).from(from, port).to(VIP, 80)
        } else {
            tcp(self.0).from(from, port).to(VIP, 80).syn()
        }
    }
}

fn ways() -> impl Iterator<Item = (Family, u8, u8)> {
    let modes = [
        (forward::NAT, scheduler::MAGLEV),
        (forward::NAT, scheduler::LEAST_CONNECTIONS),
        (forward::DSR, scheduler::MAGLEV),
        (forward::DSR, scheduler::ROUND_ROBIN),
    ];
    let both = |(mode, scheduler)| Family::BOTH.map(|family| (family, mode, scheduler));
    modes.into_iter().flat_map(both)
}

/// Far more spoofed packets than the flow table has entries, while held connections go on and new
/// ones begin: none of these fails, and the table holds them all in the end.
#[test]
fn a_flood_leaves_connections_alone() {
    let floods = std::env::var("SLUICE_FLOOD_PACKETS").map_or(100_000, |n| {
        n.parse()
            .expect("SLUICE_FLOOD_PACKETS is a number of packets")
    });
    for (family, mode, scheduler) in ways() {
        let mut balancer = balancer(family, mode, scheduler);
        let mut held: Vec<Connection> = (0..20)
            .map(|n| Connection::open(&mut balancer, (family, mode), n, |_| {}))
            .collect();
        let counted = balancer.counts().load;
        balancer.set_new_flows(RATE);
        let mut spoofed = Spoofed(family, 0x9e37_79b9_7f4a_7c15);
        let mut sent = 0;
        let mut flood = |balancer: &mut Balancer, packets: u32| {
            for _ in 0..packets {
                balancer.run_uncounted(&spoofed.next().build());
                sent += 1;
            }
            sent
        };
        // Whatever window of time this is, it is over the limit from here on.
        flood(&mut balancer, 1000);
        let mut n = 100;
        while flood(&mut balancer, 400) < floods {
            let new = Connection::open(&mut balancer, (family, mode), n, |balancer| {
                flood(balancer, 100);
            });
            for connection in held.iter().rev().take(25).chain([&new]) {
                connection.exchange(&mut balancer, "amid the flood");
            }
            // Where no flow is recorded a change of the pool would move it; nobody changes it here.
            held.push(new);
            n += 1;
        }
        for connection in &held {
            connection.exchange(&mut balancer, "after the flood");
        }
        if forward::translates(mode) {
            let flows = balancer.flows(family);
            for connection in &held {
                assert!(
                    flows
                        .iter()
                        .any(|f| f.src == connection.client && !f.from_backend),
                    "{:?} is in the flow table",
                    connection.client
                );
            }
            assert!(!balancer.opening(family).is_empty());
        }
        let load = balancer.counts().load;
        for backend in counted.keys() {
            assert!(
                load[backend].0 >= counted[backend].0,
                "held connections stay counted: {load:?}"
            );
        }
        balancer.discard();
    }
}

/// Half-open flows under pressure are not in the flow table, are not counted as connections, and move
/// when the client completes the handshake.
#[test]
fn a_connection_moves_when_its_handshake_is_complete() {
    for family in Family::BOTH {
        for mode in [forward::NAT, forward::DNAT] {
            let mut balancer = balancer(family, mode, scheduler::ROUND_ROBIN);
            balancer.run_uncounted(&tcp(family).from(CLIENT, 1).to(VIP, 80).syn().build());
            // Less than one in the window of time that is counted.
            balancer.set_new_flows(1);
            let recorded = balancer.flows(family).len();
            let loaded = balancer.counts().load;
            let connection = Connection::open(&mut balancer, (family, mode), 7, |balancer| {
                assert_eq!(balancer.flows(family).len(), recorded);
                assert_eq!(balancer.opening(family).len(), 2);
                assert_eq!(balancer.counts().load, loaded);
            });
            assert_eq!(balancer.flows(family).len(), recorded + 2);
            assert_eq!(balancer.opening(family), []);
            let (active, _) = balancer.counts().load[&2];
            assert_eq!(active, 1, "counted from here on");
            connection.exchange(&mut balancer, "as any other");

            // UDP has a second packet instead.
            let datagram = udp(family).from(CLIENT, 2).to(VIP, 80);
            assert_eq!(balancer.run_uncounted(&datagram.build()).0, Verdict::Tx);
            assert_eq!(balancer.opening(family).len(), 2);
            assert_eq!(balancer.run_uncounted(&datagram.build()).0, Verdict::Tx);
            assert_eq!(balancer.opening(family), []);
            assert_eq!(balancer.flows(family).len(), recorded + 4);
        }
    }
}

/// What a half-open flow sends and gets is what any flow does, and whoever repeats its SYN gets the
/// same backend and port.
#[test]
fn packets_of_half_open_flows_leave_as_any_other() {
    for family in Family::BOTH {
        for protocol in [TCP, UDP] {
            let mut calm = balancer(family, forward::NAT, scheduler::MAGLEV);
            let mut pressed = balancer(family, forward::NAT, scheduler::MAGLEV);
            pressed.set_new_flows(1);
            let first = transport(family, protocol).from(CLIENT, 40000).to(VIP, 80);
            let first = if protocol == TCP { first.syn() } else { first };
            let sent = calm.run_uncounted(&first.build());
            assert_eq!(pressed.run_uncounted(&first.build()), sent);
            assert!(!pressed.opening(family).is_empty());
            let answer = answer_to(
                family,
                protocol,
                forward::NAT,
                &sent.1,
                (CLIENT.ip(family), 40000),
            );
            let answer = if protocol == TCP {
                answer.syn().ack()
            } else {
                answer
            };
            let mut packets = vec![answer.clone()];
            if protocol == TCP {
                packets.extend([first.clone(), answer.clone().ack().rst()]);
            }
            for packet in packets {
                let packet = packet.build();
                assert_eq!(pressed.run_uncounted(&packet), calm.run_uncounted(&packet));
            }
            let mut last = first.clone().ttl(1);
            last.payload = b"no hop left".to_vec();
            let counts = |balancer: &mut Balancer| balancer.send(&last);
            let (one, other) = (counts(&mut calm), counts(&mut pressed));
            assert_eq!((one.verdict, one.frame), (other.verdict, other.frame));
            let drops = |c: &Counts| c.drops.clone();
            assert_eq!(drops(&one.counts), drops(&other.counts));
        }
    }
}
