//! A reference model of the balancer: what it must do, written a second time and differently.
//!
//! It works on packets as the builder describes them, keeps its flows in a list, recomputes every
//! checksum from scratch and has a hash function of its own. Only the source port of a new `nat`
//! flow is a free choice of the data plane: the model takes it from the real output and checks
//! that the choice was allowed.

use crate::{
    harness::{Backend, Balancer, Counts, FlowEntry, INGRESS, Outcome, Service, TCP, UDP, Verdict},
    oracle,
    packet::{
        BALANCER, Checksum, Family, Mac, Packet, Transport, error_for, icmp_error, pong, reset_for,
        time_exceeded, too_big,
    },
};
use lb_common::{
    abi,
    flow::state,
    service::{forward, on_backend_down, on_no_backend, scheduler},
    stats::DropReason,
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// What must happen to a packet.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame afterwards, if it leaves or passes.
    pub frame: Option<Vec<u8>>,
    /// What must be counted.
    pub counts: Counts,
}

/// A connection.
#[derive(Clone, Debug)]
struct Flow {
    protocol: u8,
    client: (IpAddr, u16),
    vip: (IpAddr, u16),
    /// One of [`forward`].
    forward: u8,
    /// Source of the packets as the backend sees them.
    source: (IpAddr, u16),
    /// Their destination.
    destination: (IpAddr, u16),
    service: u32,
    /// Index in the service's backends.
    index: usize,
    backend: u32,
    generation: u32,
    state: u8,
    /// Ethernet source and destination of the first packet.
    macs: (Mac, Mac),
    /// VLAN tags of the first packet.
    tags: u32,
    age: u32,
}

/// A datagram whose first fragment was sent on.
#[derive(Clone, Debug)]
struct Datagram {
    key: (IpAddr, IpAddr, u16, u8),
    flow: Flow,
    from_backend: bool,
    hash: u32,
    age: u32,
}

/// The backend that a client returns to.
#[derive(Clone, Debug)]
struct Client {
    service: u32,
    /// The bits of its address that count.
    bits: u128,
    index: usize,
    backend: u32,
    generation: u32,
    age: u32,
}

/// The first `bits` of an address.
fn first_bits(ip: IpAddr, bits: u8) -> u128 {
    let (all, width) = match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)), 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    };
    let others = width - u32::from(bits).min(width);
    all.checked_shr(others).unwrap_or(0)
}

/// Ticks of half a minute.
const DATAGRAM_LIFETIME: u32 = 30 * 953;

/// What the fragments of a datagram have in common.
fn identity(packet: &Packet) -> (IpAddr, IpAddr, u16, u8) {
    let protocol = match packet.family {
        Family::V4 => packet.protocol(),
        Family::V6 => 0,
    };
    (packet.src, packet.dst, packet.id, protocol)
}

/// The model.
pub struct Model {
    datagrams: Vec<Datagram>,
    services: Vec<Service>,
    /// The number of each service's first backend.
    first_backend: Vec<u32>,
    generations: BTreeMap<u32, u32>,
    turns: BTreeMap<u32, usize>,
    flows: Vec<Flow>,
    load: BTreeMap<u32, (u64, u64)>,
    clients: Vec<Client>,
    /// Whether the packet belonged to a flow that picks another backend.
    moves: bool,
    /// What is known of the last packet whose flow is not recorded.
    passing: Option<Flow>,
    ports: std::ops::RangeInclusive<u16>,
    /// Networks of the outer source addresses, with the mask of their host bits.
    encap4: Option<(u32, u32)>,
    encap6: Option<(u128, u128)>,
    gue_port: u16,
}

/// The hash that places packets: of a list of 64-bit words, each taken in by multiplication, with
/// the upper half of the product folded into the lower one.
fn hash(words: &[u64]) -> u32 {
    const PRIME: u128 = 0x9e37_79b9_7f4a_7c15;
    let times = |value: u64| ((u128::from(value) * PRIME) % (1 << 64)) as u64;
    let mut words = words.iter();
    let mut state = *words.next().expect("a first word");
    for word in words {
        let product = times(state ^ word);
        state = product ^ (product / (1 << 32));
    }
    (times(state) / (1 << 32)) as u32
}

/// The words of an address as they lie in memory, two and two; IPv4 has half a one.
fn halves(ip: IpAddr) -> Vec<u64> {
    match ip {
        IpAddr::V4(ip) => vec![u64::from(u32::from_ne_bytes(ip.octets()))],
        IpAddr::V6(ip) => ip
            .octets()
            .chunks_exact(8)
            .map(|half| u64::from_ne_bytes(half.try_into().expect("eight bytes")))
            .collect(),
    }
}

/// The hash of a flow: what `maglev` picks by, and what encapsulation spreads by.
fn flow_hash(packet: &Packet) -> u32 {
    let ports = u64::from(packet.dport.to_be()) << 16 | u64::from(packet.sport.to_be());
    let mut words = vec![SEED << 32 | u64::from(packet.protocol())];
    words.extend(halves(packet.src));
    words.push(ports);
    hash(&words)
}

/// The hash of a client, which `source-hash` picks by.
fn source_hash(src: IpAddr) -> u32 {
    let mut words = vec![SEED << 32];
    words.extend(halves(src));
    hash(&words)
}

/// The seed all balancers share.
const SEED: u64 = 0x511c_e001;

impl Model {
    /// A model of a balancer as it has just been set up.
    #[must_use]
    pub fn new(balancer: &Balancer) -> Self {
        let settings = balancer.settings();
        let mask4 = u32::from_be(settings.encap_mask4);
        let mask6 = u32::from_be(settings.encap_mask6);
        let network6 = settings
            .encap_source6
            .iter()
            .fold(0, |n, w| n << 32 | u128::from(u32::from_be(*w)));
        Self {
            services: balancer.services.clone(),
            first_backend: (1..=balancer.services.len() as u32)
                .map(|n| balancer.backend_number(n, 0))
                .collect(),
            generations: BTreeMap::new(),
            turns: BTreeMap::new(),
            datagrams: Vec::new(),
            flows: Vec::new(),
            load: BTreeMap::new(),
            clients: Vec::new(),
            moves: false,
            passing: None,
            ports: settings.nat_port_first..=settings.nat_port_last,
            encap4: (mask4 != 0).then_some((u32::from_be(settings.encap_source4), mask4)),
            encap6: (mask6 != 0).then_some((network6, u128::from(mask6))),
            gue_port: u16::from_be(settings.gue_port),
        }
    }

    /// Follows a change of the configuration.
    pub fn change(&mut self, service: u32, change: impl FnOnce(&mut Service)) {
        change(&mut self.services[service as usize - 1]);
    }

    /// Gives the number of a backend to a new one.
    pub fn replace_backend(&mut self, service: u32, index: usize) {
        let number = self.first_backend[service as usize - 1] + index as u32;
        *self.generations.entry(number).or_insert(1) += 1;
        self.load.remove(&number);
    }

    /// Lets time pass.
    pub fn age(&mut self, ticks: u32) {
        for flow in &mut self.flows {
            flow.age += ticks;
        }
        for datagram in &mut self.datagrams {
            datagram.age += ticks;
        }
        for client in &mut self.clients {
            client.age += ticks;
        }
    }

    /// Number of flows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there are no flows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// The service number and the index in it of the backend of flow `n`.
    #[must_use]
    pub fn backend_of(&self, n: usize) -> (u32, usize) {
        (self.flows[n].service, self.flows[n].index)
    }

    /// The addresses a client sends from and to on flow `n`: family, protocol, client, VIP.
    #[must_use]
    pub fn client_tuple(&self, n: usize) -> (Family, u8, (IpAddr, u16), (IpAddr, u16)) {
        let flow = &self.flows[n];
        let family = Family::of(flow.vip.0);
        (family, flow.protocol, flow.client, flow.vip)
    }

    /// The addresses a backend answers with on flow `n`: family, protocol, from, to. Where it
    /// answers the client itself, that is not the balancer's to see but may come its way.
    #[must_use]
    pub fn reply_tuple(&self, n: usize) -> (Family, u8, (IpAddr, u16), (IpAddr, u16)) {
        let flow = &self.flows[n];
        let family = Family::of(flow.vip.0);
        (family, flow.protocol, flow.destination, flow.source)
    }

    /// What the balancer must do with `packet`, given what it did where it had a choice.
    ///
    /// # Errors
    /// If that choice was not allowed.
    pub fn step(&mut self, packet: &Packet, real: &Outcome) -> Result<Prediction, String> {
        let mut prediction = self.decide(packet, real)?;
        prediction.counts.load = self
            .load
            .iter()
            .filter(|(_, l)| **l != (0, 0))
            .map(|(n, l)| (*n, *l))
            .collect();
        Ok(prediction)
    }

    /// What the balancer must do with a packet whose headers contradict each other.
    #[must_use]
    pub fn malformed(&self, dst: IpAddr, frame: &[u8]) -> Prediction {
        let mut counts = Counts::default();
        let ours = self.is_vip(dst);
        if ours {
            counts = counts.drop(DropReason::Malformed, 0);
        }
        counts.load = self
            .load
            .iter()
            .filter(|(_, l)| **l != (0, 0))
            .map(|(n, l)| (*n, *l))
            .collect();
        Prediction {
            verdict: if ours { Verdict::Drop } else { Verdict::Pass },
            frame: (!ours).then(|| frame.to_vec()),
            counts,
        }
    }

    fn is_vip(&self, ip: IpAddr) -> bool {
        self.services.iter().any(|s| s.vip == ip)
    }

    fn decide(&mut self, packet: &Packet, real: &Outcome) -> Result<Prediction, String> {
        if packet.piece() == Some(false) {
            return Ok(self.later_fragment(packet));
        }
        let prediction = self.whole(packet, real)?;
        let mut counters = prediction.counts.services.values();
        if packet.piece().is_some() && counters.any(|c| c.packets_in + c.packets_out > 0) {
            self.remember(packet);
        }
        Ok(prediction)
    }

    /// A first fragment was sent on: where the rest of its datagram goes.
    fn remember(&mut self, packet: &Packet) {
        let (from, to) = ((packet.src, packet.sport), (packet.dst, packet.dport));
        let of_protocol = || {
            self.flows
                .iter()
                .filter(|f| f.protocol == packet.protocol())
        };
        let reply = of_protocol()
            .find(|f| translates(f.forward) && f.destination == from && f.source == to);
        let request = of_protocol().find(|f| f.client == from && f.vip == to);
        let flow = reply
            .or(request)
            .or(self.passing.as_ref())
            .expect("what was sent on has a flow")
            .clone();
        let key = identity(packet);
        self.datagrams.retain(|d| d.key != key);
        self.datagrams.push(Datagram {
            key,
            flow,
            from_backend: reply.is_some(),
            hash: flow_hash(packet),
            age: 0,
        });
    }

    fn later_fragment(&self, packet: &Packet) -> Prediction {
        let known = self
            .datagrams
            .iter()
            .find(|d| d.key == identity(packet) && d.age < DATAGRAM_LIFETIME);
        let Some(datagram) = known else {
            return match self.is_vip(packet.dst) {
                true => dropped(DropReason::Fragment, 0),
                false => pass(packet),
            };
        };
        let flow = &datagram.flow;
        if packet.ttl <= 1 && flow.forward != forward::DSR {
            return dropped(DropReason::TtlExceeded, flow.service);
        }
        let packet = packet.opaque();
        let len = packet.ip_len();
        if datagram.from_backend {
            let (vip, client) = (flow.vip, flow.client);
            let out = rewritten(&packet, vip, client)
                .macs(flow.macs.1, flow.macs.0)
                .retagged(flow.tags);
            return Prediction {
                verdict: Verdict::Tx,
                frame: Some(out.build()),
                counts: Counts::default().packet_out(flow.service, flow.backend, len),
            };
        }
        let backend = &self.services[flow.service as usize - 1].backends[flow.index];
        if flow.generation != self.generation(flow.backend) {
            return dropped(DropReason::BackendDown, flow.service);
        }
        if !backend.resolved {
            return dropped(DropReason::NoNeighbour, flow.service);
        }
        if exceeding(&packet, backend, flow.forward, flow.service).is_some() {
            return dropped(DropReason::TooBig, flow.service);
        }
        Prediction {
            verdict: Verdict::Tx,
            frame: Some(self.sent_to(backend, &packet, flow, datagram.hash).build()),
            counts: Counts::default().packet_in(flow.service, flow.backend, len),
        }
    }

    /// An error of a router about a packet of flow `n`: of its answer on the client's side, or of
    /// its question on the backend's side, and what must happen to it. `None`: the balancer does
    /// not see such a one.
    #[must_use]
    pub fn error(
        &self,
        n: usize,
        about_answer: bool,
        error: (u8, u8, [u8; 4]),
        (keep, ttl): (usize, u8),
    ) -> Option<(Packet, Prediction)> {
        let flow = &self.flows[n];
        let family = Family::of(flow.vip.0);
        let quote = |from: (IpAddr, u16), to: (IpAddr, u16)| {
            let quoted = crate::packet::transport(family, flow.protocol)
                .from(from.0, from.1)
                .to(to.0, to.1)
                .ttl(17)
                .payload(*b"as much as anybody wants to know");
            icmp_error(family, error, &quoted, keep).ttl(ttl)
        };
        if !about_answer {
            if !translates(flow.forward) {
                return None;
            }
            let sent = quote(flow.source, flow.destination)
                .from(flow.destination.0, 0)
                .to(flow.source.0, 0);
            let counts = Counts::default().packet_out(flow.service, flow.backend, sent.ip_len());
            let out = quote(flow.client, flow.vip)
                .macs(flow.macs.1, flow.macs.0)
                .from(flow.vip.0, 0)
                .to(flow.client.0, 0)
                .retagged(flow.tags);
            return Some((sent, self.carried(flow, out, counts)));
        }
        let sent = quote(flow.vip, flow.client)
            .from(crate::packet::STRANGER, 0)
            .to(flow.vip.0, 0);
        let counts = Counts::default().packet_in(flow.service, flow.backend, sent.ip_len());
        let backend = &self.services[flow.service as usize - 1].backends[flow.index];
        if ttl > 1 || flow.forward == forward::DSR {
            if flow.generation != self.generation(flow.backend) {
                return Some((sent, self.ended(DropReason::BackendDown, flow)));
            }
            if !backend.resolved {
                return Some((sent, self.ended(DropReason::NoNeighbour, flow)));
            }
        }
        if translates(flow.forward) {
            let source = match flow.forward {
                forward::DNAT => sent.src,
                _ => flow.source.0,
            };
            let out = quote(flow.destination, flow.source)
                .macs(BALANCER.mac, backend.mac)
                .from(source, 0)
                .to(flow.destination.0, 0)
                .retagged(backend.tags);
            return Some((sent, self.carried(flow, out, counts)));
        }
        if ttl <= 1 && flow.forward != forward::DSR {
            return Some((sent, self.ended(DropReason::TtlExceeded, flow)));
        }
        let asked = crate::packet::transport(family, flow.protocol)
            .from(flow.client.0, flow.client.1)
            .to(flow.vip.0, flow.vip.1);
        let out = self.sent_to(backend, &sent, flow, flow_hash(&asked));
        let mut prediction = self.ended(DropReason::TtlExceeded, flow);
        (prediction.verdict, prediction.frame) = (Verdict::Tx, Some(out.build()));
        prediction.counts = Counts {
            load: prediction.counts.load,
            ..counts
        };
        Some((sent, prediction))
    }

    /// A translated error that is sent on, if it has a hop left.
    fn carried(&self, flow: &Flow, mut out: Packet, counts: Counts) -> Prediction {
        let mut prediction = self.ended(DropReason::TtlExceeded, flow);
        if out.ttl > 1 {
            out.ttl -= 1;
            (prediction.verdict, prediction.frame) = (Verdict::Tx, Some(out.build()));
            prediction.counts = Counts {
                load: prediction.counts.load,
                ..counts
            };
        }
        prediction
    }

    /// The end of a packet of this flow.
    fn ended(&self, reason: DropReason, flow: &Flow) -> Prediction {
        let mut prediction = dropped(reason, flow.service);
        prediction.counts.load = self
            .load
            .iter()
            .filter(|(_, l)| **l != (0, 0))
            .map(|(n, l)| (*n, *l))
            .collect();
        prediction
    }

    /// Anything but a later fragment.
    fn whole(&mut self, packet: &Packet, real: &Outcome) -> Result<Prediction, String> {
        let nobody = pass(packet);
        if let Transport::Icmp { kind, code, rest } = packet.transport {
            let echo = if packet.family == Family::V4 { 8 } else { 128 };
            if self.is_vip(packet.dst) && (kind, code) == (echo, 0) {
                return Ok(answer_ping(packet, rest));
            }
            return Ok(nobody);
        }
        let ours = self.is_vip(packet.dst);
        let (from, to) = ((packet.src, packet.sport), (packet.dst, packet.dport));
        let generations = self.generations.clone();
        let of_protocol = |f: &&mut Flow| f.protocol == packet.protocol();
        if let Some(flow) = self
            .flows
            .iter_mut()
            .filter(of_protocol)
            .filter(|f| translates(f.forward))
            .find(|f| f.destination == from && f.source == to)
        {
            if packet.ttl <= 1 {
                return Ok(expired(packet, flow.service));
            }
            let next = after(flow.state, packet, Sender::Backend);
            if generations.get(&flow.backend).copied().unwrap_or(1) == flow.generation {
                move_load(&mut self.load, flow.backend, flow.state, next);
            }
            flow.state = next;
            let (vip, client) = (flow.vip, flow.client);
            let mut out = rewritten(packet, vip, client).retagged(flow.tags);
            (out.src_mac, out.dst_mac) = (flow.macs.1, flow.macs.0);
            return Ok(Prediction {
                verdict: Verdict::Tx,
                frame: Some(out.build()),
                counts: Counts::default().packet_out(flow.service, flow.backend, packet.ip_len()),
            });
        }
        if let Some(n) = self
            .flows
            .iter()
            .position(|f| f.protocol == packet.protocol() && f.client == from && f.vip == to)
            && let Some(prediction) = self.known(n, packet)
        {
            return Ok(prediction);
        }
        if !ours {
            return Ok(nobody);
        }
        self.begin(packet, real)
    }

    /// A client's packet on flow `n`. `None`: the flow is over and the packet begins another.
    fn known(&mut self, n: usize, packet: &Packet) -> Option<Prediction> {
        let flow = self.flows[n].clone();
        if packet.ttl <= 1 && flow.forward != forward::DSR {
            return Some(expired(packet, flow.service));
        }
        let service = &self.services[flow.service as usize - 1];
        let backend = &service.backends[flow.index];
        let same = flow.generation == self.generation(flow.backend);
        let leaves = service.on_backend_down != on_backend_down::KEEP;
        let moves = service.on_backend_down == on_backend_down::RESCHEDULE;
        let opens = opens(packet);
        if !same || (!backend.alive && leaves) {
            self.forget(n, same);
            self.moves = moves;
            return if opens || flow.protocol != TCP || moves {
                None
            } else {
                Some(refused(packet, DropReason::BackendDown, flow.service))
            };
        }
        // Where replies are not seen, the client's FIN is all there is to know of the end.
        let over = flow.state >= state::TIME_WAIT
            || (flow.state == state::FIN_CLIENT && !translates(flow.forward));
        if opens && (!backend.alive || over) {
            self.forget(n, true);
            return None;
        }
        let limit = service.connect_timeout;
        if opens && limit != 0 && flow.state == state::SYN_SENT && flow.age >= limit {
            self.forget(n, true);
            return Some(refused(packet, DropReason::ConnectTimeout, flow.service));
        }
        if !backend.resolved {
            return Some(dropped(DropReason::NoNeighbour, flow.service));
        }
        let sender = if translates(flow.forward) {
            Sender::Client
        } else {
            Sender::ClientAlone
        };
        let next = after(flow.state, packet, sender);
        move_load(&mut self.load, flow.backend, flow.state, next);
        self.flows[n].state = next;
        Some(self.to_backend(packet, &flow))
    }

    fn begin(&mut self, packet: &Packet, real: &Outcome) -> Result<Prediction, String> {
        let Some(n) = self.listener(packet) else {
            return Ok(pass(packet));
        };
        let number = n as u32 + 1;
        let moves = std::mem::take(&mut self.moves);
        let begins = packet.protocol() != TCP || opens(packet);
        if !begins {
            if !translates(self.services[n].forward) {
                return Ok(self.unrecorded(n, packet));
            }
            if !moves {
                return Ok(refused(packet, DropReason::NoFlow, number));
            }
        }
        if begins && !self.may_begin(n, packet.src) {
            return Ok(dropped(DropReason::Denied, number));
        }
        let without_backend = self.services[n].on_no_backend;
        let index = match self.returning(number, packet, real) {
            Ok(index) => index,
            Err(reason) => {
                return Ok(match without_backend {
                    on_no_backend::PASS => pass(packet),
                    on_no_backend::DROP => dropped(reason, number),
                    _ => refused(packet, reason, number),
                });
            }
        };
        let service = &self.services[n];
        let backend = service.backends[index].clone();
        assert_eq!(backend.ifindex, INGRESS, "the model knows one interface");
        if !backend.resolved {
            return Ok(dropped(DropReason::NoNeighbour, number));
        }
        if service.forward == forward::DNAT && backend.ip == packet.src {
            return Ok(refused(packet, DropReason::Hairpin, number));
        }
        if packet.ttl <= 1 && service.forward != forward::DSR {
            return Ok(expired(packet, number));
        }
        if let Some(answer) = exceeding(packet, &backend, service.forward, number) {
            return Ok(answer);
        }
        let (client, vip) = ((packet.src, packet.sport), (packet.dst, packet.dport));
        let (source, destination) = if translates(service.forward) {
            let port = match backend.port {
                0 => packet.dport,
                port => port,
            };
            let destination = (backend.ip, port);
            match self.source_port(packet, service.forward, destination, real)? {
                Some(source) => {
                    self.recycle(packet.protocol(), source, destination);
                    (source, destination)
                }
                None => return Ok(dropped(DropReason::PortExhausted, number)),
            }
        } else {
            (client, vip)
        };
        let number_of_backend = self.first_backend[n] + index as u32;
        let flow = Flow {
            protocol: packet.protocol(),
            client,
            vip,
            forward: self.services[n].forward,
            source,
            destination,
            service: number,
            index,
            backend: number_of_backend,
            generation: self.generation(number_of_backend),
            state: match flags(packet) {
                _ if packet.protocol() != TCP => state::UDP,
                _ if begins => state::SYN_SENT,
                (.., true) => state::CLOSED,
                (_, _, true, _) => state::FIN_CLIENT,
                _ => state::ESTABLISHED,
            },
            macs: (packet.src_mac, packet.dst_mac),
            tags: packet.tags(),
            age: 0,
        };
        let load = self.load.entry(number_of_backend).or_default();
        if is_active(flow.state) {
            load.0 += 1;
        } else {
            load.1 += 1;
        }
        let mut prediction = self.to_backend(packet, &flow);
        if begins {
            prediction.counts = prediction.counts.connection(number, number_of_backend);
        }
        self.flows.push(flow);
        Ok(prediction)
    }

    /// Whether a new flow may take a flow's source port: nobody has completed its handshake for long.
    fn is_recyclable(flow: &Flow) -> bool {
        let half_open = matches!(flow.state, state::SYN_SENT | state::SYN_RECEIVED);
        half_open && flow.age >= abi::TICKS_PER_SECOND
    }

    /// The end of the flow that had these addresses and ports, if there is one.
    fn recycle(&mut self, protocol: u8, source: (IpAddr, u16), destination: (IpAddr, u16)) {
        let taken = self.flows.iter().position(|f| {
            translates(f.forward)
                && (f.protocol, f.source, f.destination) == (protocol, source, destination)
        });
        if let Some(n) = taken {
            let flow = &self.flows[n];
            let counted = self.generation(flow.backend) == flow.generation;
            self.forget(n, counted);
        }
    }

    /// The source of a new flow as the backend sees it: what `real` chose, if it was free to.
    /// `None`: all ports are taken, and none can be had from a flow that nobody completes.
    fn source_port(
        &self,
        packet: &Packet,
        mode: u8,
        destination: (IpAddr, u16),
        real: &Outcome,
    ) -> Result<Option<(IpAddr, u16)>, String> {
        let address = match mode {
            forward::NAT => BALANCER.ip(packet.family),
            _ => packet.src,
        };
        let there = || {
            self.flows
                .iter()
                .filter(|f| translates(f.forward) && f.protocol == packet.protocol())
                .filter(|f| f.destination == destination && f.source.0 == address)
        };
        let mut used: Vec<u16> = there().map(|f| f.source.1).collect();
        if mode == forward::DNAT && !used.contains(&packet.sport) {
            return Ok(Some((address, packet.sport)));
        }
        if used.iter().filter(|p| self.ports.contains(p)).count() == self.ports.len() {
            let lasting = there().filter(|f| !Self::is_recyclable(f));
            used = lasting.map(|f| f.source.1).collect();
            if used.iter().filter(|p| self.ports.contains(p)).count() == self.ports.len() {
                return Ok(None);
            }
        }
        let Some((port, _)) = oracle::ports(&real.frame).filter(|_| real.verdict == Verdict::Tx)
        else {
            return Err(format!(
                "a new flow to {destination:?} should leave, but {:?} {:?}",
                real.verdict, real.counts
            ));
        };
        if !self.ports.contains(&port) {
            return Err(format!("source port {port} is outside {:?}", self.ports));
        }
        if used.contains(&port) {
            return Err(format!("source port {port} is in use to {destination:?}"));
        }
        Ok(Some((address, port)))
    }

    /// A client's packet on its way to the flow's backend.
    fn to_backend(&self, packet: &Packet, flow: &Flow) -> Prediction {
        let backend = &self.services[flow.service as usize - 1].backends[flow.index];
        if let Some(answer) = exceeding(packet, backend, flow.forward, flow.service) {
            return answer;
        }
        let out = self.sent_to(backend, packet, flow, flow_hash(packet));
        Prediction {
            verdict: Verdict::Tx,
            frame: Some(out.build()),
            counts: Counts::default().packet_in(flow.service, flow.backend, packet.ip_len()),
        }
    }

    /// A client's packet as it leaves for its backend.
    fn sent_to(&self, backend: &Backend, packet: &Packet, flow: &Flow, hash: u32) -> Packet {
        let mut packet = packet.clone().retagged(backend.tags);
        if is_partial(&packet) && packet.piece().is_none() {
            packet.checksum = Checksum::Right;
        }
        match flow.forward {
            forward::NAT | forward::DNAT => {
                rewritten(&packet, flow.source, flow.destination).macs(BALANCER.mac, backend.mac)
            }
            forward::DSR => packet.dsr_to(backend.mac),
            mode => {
                let source = self.outer_source(Family::of(backend.ip), hash);
                let mut out = if mode == forward::IPIP {
                    packet.ipip_to(source, backend.ip, backend.mac)
                } else {
                    let port = 49152 + (hash / (1 << 18)) as u16;
                    let ports = (port, self.gue_port);
                    packet.gue_to(source, backend.ip, backend.mac, ports)
                };
                if out.checksum == Checksum::Right && relies_on_inner(&packet) {
                    out.checksum = packet.checksum;
                }
                out
            }
        }
    }

    fn outer_source(&self, family: Family, hash: u32) -> IpAddr {
        match (family, self.encap4, self.encap6) {
            (Family::V4, Some((network, mask)), _) => Ipv4Addr::from(network | hash & mask).into(),
            (Family::V6, _, Some((network, mask))) => {
                Ipv6Addr::from(network | u128::from(hash) & mask).into()
            }
            _ => BALANCER.ip(family),
        }
    }

    /// The service a packet is for: one that names its port, else one that takes every port.
    fn listener(&self, packet: &Packet) -> Option<usize> {
        let at = |named: bool| {
            self.services.iter().position(|s| {
                (s.vip, s.protocol) == (packet.dst, packet.protocol())
                    && (s.port != 0) == named
                    && (!named || (s.port..=s.last_port).contains(&packet.dport))
            })
        };
        at(true).or_else(|| at(false).filter(|_| packet.dport != 0))
    }

    /// A packet in the middle of a connection that is not known: a hash of it tells the backend, who
    /// knows what to make of it.
    fn unrecorded(&mut self, n: usize, packet: &Packet) -> Prediction {
        let service = self.services[n].clone();
        let number = n as u32 + 1;
        let table = crate::harness::selection_table(&service);
        if table.is_empty() {
            return match service.on_no_backend {
                on_no_backend::PASS => pass(packet),
                on_no_backend::DROP => dropped(DropReason::NoBackend, number),
                _ => refused(packet, DropReason::NoBackend, number),
            };
        }
        let hash = match service.scheduler {
            scheduler::SOURCE_HASH => source_hash(packet.src),
            _ => flow_hash(packet),
        };
        let index = table[((u128::from(hash) * table.len() as u128) / (1 << 32)) as usize];
        let backend = &service.backends[index];
        if !backend.resolved {
            return dropped(DropReason::NoNeighbour, number);
        }
        if packet.ttl <= 1 && service.forward != forward::DSR {
            return expired(packet, number);
        }
        let number_of_backend = self.first_backend[n] + index as u32;
        let client = (packet.src, packet.sport);
        let vip = (packet.dst, packet.dport);
        let flow = Flow {
            protocol: packet.protocol(),
            client,
            vip,
            forward: service.forward,
            source: client,
            destination: vip,
            service: number,
            index,
            backend: number_of_backend,
            generation: self.generation(number_of_backend),
            state: state::ESTABLISHED,
            macs: (packet.src_mac, packet.dst_mac),
            tags: packet.tags(),
            age: 0,
        };
        let prediction = self.to_backend(packet, &flow);
        self.passing = Some(flow);
        prediction
    }

    /// Whether a client is allowed by the longest prefix that holds it.
    fn may_begin(&self, n: usize, client: IpAddr) -> bool {
        let holds = |rule: &&(IpAddr, u8, bool)| {
            let (address, bits, _) = **rule;
            address.is_ipv4() == client.is_ipv4()
                && first_bits(address, bits) == first_bits(client, bits)
        };
        let rules = self.services[n].access.iter().filter(holds);
        rules.max_by_key(|rule| rule.1).is_none_or(|rule| rule.2)
    }

    /// The backend that a client returns to, or the one picked for it.
    fn returning(
        &mut self,
        number: u32,
        packet: &Packet,
        real: &Outcome,
    ) -> Result<usize, DropReason> {
        let service = self.services[number as usize - 1].clone();
        if service.affinity == 0 {
            return self.pick(number, packet, real);
        }
        let bits = first_bits(packet.src, service.affinity_mask);
        let place = self
            .clients
            .iter()
            .position(|c| (c.service, c.bits) == (number, bits));
        if let Some(place) = place {
            let client = self.clients[place].clone();
            let backend = &service.backends[client.index];
            let there = client.generation == self.generation(client.backend)
                && backend.alive
                && backend.resolved
                && backend.weight > 0;
            if there && client.age < service.affinity && !self.is_full(number, client.index) {
                self.clients[place].age = 0;
                return Ok(client.index);
            }
        }
        let index = self.pick(number, packet, real)?;
        let backend = self.first_backend[number as usize - 1] + index as u32;
        let client = Client {
            service: number,
            bits,
            index,
            backend,
            generation: self.generation(backend),
            age: 0,
        };
        match place {
            Some(place) => self.clients[place] = client,
            None => self.clients.push(client),
        }
        Ok(index)
    }

    /// The backend of a new flow, or why there is none.
    fn pick(&mut self, number: u32, packet: &Packet, real: &Outcome) -> Result<usize, DropReason> {
        let service = self.services[number as usize - 1].clone();
        let table = crate::harness::selection_table(&service);
        if table.is_empty() {
            return Err(DropReason::NoBackend);
        }
        let by_hash = |hash: u32| ((u128::from(hash) * table.len() as u128) / (1 << 32)) as usize;
        let picked = match service.scheduler {
            scheduler::LEAST_CONNECTIONS => return self.least_loaded(number),
            scheduler::ROUND_ROBIN => table[self.turn(number, table.len())],
            scheduler::SOURCE_HASH => table[by_hash(source_hash(packet.src))],
            scheduler::RANDOM => {
                // A free choice, if one of the backends was chosen that may be.
                let may_be = |index: &&usize| self.ends_so(number, **index, packet, real);
                *table.iter().find(may_be).unwrap_or(&table[0])
            }
            _ => table[by_hash(flow_hash(packet))],
        };
        if self.is_full(number, picked) {
            return self.least_loaded(number);
        }
        Ok(picked)
    }

    /// Whether a new flow to this backend may end as it really did.
    fn ends_so(&self, number: u32, index: usize, packet: &Packet, real: &Outcome) -> bool {
        let service = &self.services[number as usize - 1];
        let backend = &service.backends[index];
        let counted = self.first_backend[number as usize - 1] + index as u32;
        if real.counts.backends.contains_key(&counted) {
            return true;
        }
        let dropped = |reason: DropReason| real.counts.drops.contains_key(reason.name());
        let itself = service.forward == forward::DNAT && backend.ip == packet.src;
        let port = match backend.port {
            0 => packet.dport,
            port => port,
        };
        match backend.resolved {
            false => dropped(DropReason::NoNeighbour),
            true if itself => dropped(DropReason::Hairpin),
            true if dropped(DropReason::PortExhausted) => {
                let to = (backend.ip, port);
                matches!(
                    self.source_port(packet, service.forward, to, real),
                    Ok(None)
                )
            }
            true => dropped(DropReason::TooBig) || dropped(DropReason::TtlExceeded),
        }
    }

    /// The next of `len` turns of a service.
    fn turn(&mut self, number: u32, len: usize) -> usize {
        let turn = self.turns.entry(number).or_default();
        *turn += 1;
        (*turn - 1) % len
    }

    /// The connections that a backend has to carry.
    fn held(&self, number: u32, index: usize) -> u64 {
        let backend = self.first_backend[number as usize - 1] + index as u32;
        let generation = self.generation(backend);
        let held = |f: &&Flow| {
            (f.backend, f.generation) == (backend, generation)
                && matches!(
                    f.state,
                    state::UDP | state::SYN_SENT | state::SYN_RECEIVED | state::ESTABLISHED
                )
        };
        self.flows.iter().filter(held).count() as u64
    }

    fn is_full(&self, number: u32, index: usize) -> bool {
        let most = self.services[number as usize - 1].backends[index].max_connections;
        most != 0 && self.held(number, index) >= u64::from(most)
    }

    /// The backend with the smallest share of connections that has room; the first from the one
    /// whose turn it is.
    fn least_loaded(&mut self, number: u32) -> Result<usize, DropReason> {
        let service = self.services[number as usize - 1].clone();
        let mut members = crate::harness::members(&service);
        if members.is_empty() {
            return Err(DropReason::NoBackend);
        }
        let turn = self.turn(number, members.len());
        members.rotate_left(turn);
        members.retain(|index| !self.is_full(number, *index));
        // A multiple of every weight, so that shares compare as whole numbers.
        let scale: u64 = members
            .iter()
            .map(|index| u64::from(service.backends[*index].weight))
            .product();
        members
            .into_iter()
            .min_by_key(|index| {
                self.held(number, *index) * (scale / u64::from(service.backends[*index].weight))
            })
            .ok_or(DropReason::BackendFull)
    }

    fn generation(&self, backend: u32) -> u32 {
        self.generations.get(&backend).copied().unwrap_or(1)
    }

    fn forget(&mut self, n: usize, counted: bool) {
        let flow = self.flows.remove(n);
        if counted {
            let load = self.load.entry(flow.backend).or_default();
            if is_active(flow.state) {
                load.0 -= 1;
            } else {
                load.1 -= 1;
            }
        }
    }

    /// The flow tables as they must be, sorted. The state of a backend's entry is left at 0.
    #[must_use]
    pub fn flow_entries(&self, family: Family) -> Vec<FlowEntry> {
        let mut entries = Vec::new();
        for f in &self.flows {
            if f.vip.0.is_ipv4() != (family == Family::V4) {
                continue;
            }
            let entry = FlowEntry {
                src: f.client,
                dst: f.vip,
                protocol: u32::from(f.protocol),
                out_src: f.source,
                out_dst: f.destination,
                backend: f.backend,
                generation: f.generation,
                service: f.service,
                forward: f.forward,
                state: f.state,
                from_backend: false,
            };
            if translates(f.forward) {
                entries.push(FlowEntry {
                    src: f.destination,
                    dst: f.source,
                    out_src: f.vip,
                    out_dst: f.client,
                    state: 0,
                    from_backend: true,
                    ..entry.clone()
                });
            }
            entries.push(entry);
        }
        entries.sort();
        entries
    }
}

/// Whether replies come back through the balancer.
fn translates(mode: u8) -> bool {
    mode == forward::NAT || mode == forward::DNAT
}

/// Whether a checksum around this packet is made from the packet's own: then it is as wrong.
fn relies_on_inner(packet: &Packet) -> bool {
    let missing = packet.protocol() == UDP && packet.checksum == Checksum::Zero;
    let plain = packet.options.is_empty() && packet.extensions.is_empty();
    plain && packet.fragment.is_none() && !missing
}

fn is_active(state: u8) -> bool {
    state == state::ESTABLISHED || state == state::UDP
}

fn move_load(load: &mut BTreeMap<u32, (u64, u64)>, backend: u32, before: u8, after: u8) {
    let load = load.entry(backend).or_default();
    match (is_active(before), is_active(after)) {
        (true, false) => *load = (load.0 - 1, load.1 + 1),
        (false, true) => *load = (load.0 + 1, load.1 - 1),
        _ => {}
    }
}

/// SYN, ACK, FIN and RST of a packet.
fn flags(packet: &Packet) -> (bool, bool, bool, bool) {
    match &packet.transport {
        Transport::Tcp(t) => (t.syn, t.ack, t.fin, t.rst),
        _ => (false, false, false, false),
    }
}

fn opens(packet: &Packet) -> bool {
    flags(packet) == (true, false, false, false)
}

/// Who sends a packet of a flow.
#[derive(Clone, Copy, PartialEq)]
enum Sender {
    Backend,
    /// The client, where the backend's packets are seen too.
    Client,
    /// The client, where they are not.
    ClientAlone,
}

/// The life of a connection, as a list of what may happen.
fn after(state: u8, packet: &Packet, sender: Sender) -> u8 {
    use state::{
        CLOSED, ESTABLISHED, FIN_BACKEND, FIN_CLIENT, SYN_RECEIVED, SYN_SENT, TIME_WAIT, UDP,
    };
    let (syn, ack, fin, rst) = flags(packet);
    let from_backend = sender == Sender::Backend;
    match state {
        UDP | CLOSED => state,
        _ if rst => CLOSED,
        TIME_WAIT => TIME_WAIT,
        FIN_CLIENT if fin && from_backend => TIME_WAIT,
        FIN_BACKEND if fin && !from_backend => TIME_WAIT,
        _ if fin && from_backend => FIN_BACKEND,
        _ if fin => FIN_CLIENT,
        SYN_SENT if from_backend && syn && ack => SYN_RECEIVED,
        SYN_SENT if sender == Sender::ClientAlone && ack && !syn => ESTABLISHED,
        SYN_RECEIVED if !from_backend && ack && !syn => ESTABLISHED,
        _ => state,
    }
}

/// A packet with other addresses and ports, a hop older, and a checksum that is complete.
fn rewritten(packet: &Packet, from: (IpAddr, u16), to: (IpAddr, u16)) -> Packet {
    let mut out = packet.clone();
    (out.src, out.sport) = from;
    (out.dst, out.dport) = to;
    out.ttl -= 1;
    if packet.piece().is_none() {
        if is_partial(packet) {
            out.checksum = Checksum::Right;
        }
    } else if packet.checksum == Checksum::Partial
        && !matches!(packet.transport, Transport::Other(_))
    {
        // The first of several pieces: nobody can complete it.
        out.checksum = Checksum::Wrong(packet.partial_error());
    }
    out
}

/// Whether the checksum is to be completed.
fn is_partial(packet: &Packet) -> bool {
    packet.checksum != Checksum::Zero && packet.reads_as_partial()
}

fn pass(packet: &Packet) -> Prediction {
    Prediction {
        verdict: Verdict::Pass,
        frame: Some(packet.build()),
        counts: Counts::default(),
    }
}

fn dropped(reason: DropReason, service: u32) -> Prediction {
    Prediction {
        verdict: Verdict::Drop,
        frame: None,
        counts: Counts::default().drop(reason, service),
    }
}

/// The sender of a packet without a hop left is told.
fn expired(packet: &Packet, service: u32) -> Prediction {
    Prediction {
        verdict: Verdict::Tx,
        frame: Some(error_for(packet, time_exceeded(packet.family)).build()),
        ..dropped(DropReason::TtlExceeded, service)
    }
}

/// The sender of a packet that does not fit the way to a backend is told how large it may be.
fn exceeding(packet: &Packet, backend: &Backend, mode: u8, service: u32) -> Option<Prediction> {
    let outer = if backend.ip.is_ipv4() { 20 } else { 40 };
    let added = match mode {
        forward::IPIP => outer,
        forward::GUE => outer + 8,
        _ => 0,
    };
    let largest = backend.mtu.checked_sub(added)?;
    if backend.mtu == 0 || packet.ip_len() <= u64::from(largest) {
        return None;
    }
    let error = too_big(packet.family, largest as u16);
    Some(Prediction {
        verdict: Verdict::Tx,
        frame: Some(error_for(packet, error).build()),
        ..dropped(DropReason::TooBig, service)
    })
}

/// TCP is told, unless it is a RST itself or comes in pieces; UDP is dropped.
fn refused(packet: &Packet, reason: DropReason, service: u32) -> Prediction {
    let mut prediction = dropped(reason, service);
    if packet.protocol() == TCP && !flags(packet).3 && packet.piece().is_none() {
        prediction.verdict = Verdict::Tx;
        prediction.frame = Some(reset_for(packet).build());
    }
    prediction
}

fn answer_ping(packet: &Packet, rest: [u8; 4]) -> Prediction {
    let mut out = packet.clone();
    out.transport = match pong(packet.family, 0, 0).transport {
        Transport::Icmp { kind, .. } => Transport::Icmp {
            kind,
            code: 0,
            rest,
        },
        other => other,
    };
    (out.src, out.dst) = (packet.dst, packet.src);
    (out.src_mac, out.dst_mac) = (packet.dst_mac, packet.src_mac);
    out.ttl = 64;
    Prediction {
        verdict: Verdict::Tx,
        frame: Some(out.build()),
        counts: Counts::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::{
        addr::{FAMILY_V4, FAMILY_V6},
        flow::FlowKey,
    };
    use proptest::prelude::*;

    proptest! {
        /// Two implementations of the same function.
        #[test]
        fn the_hash_is_the_shared_one(src: [u32; 4], sport: u16, dport: u16, protocol: u8) {
            let words = |v6: bool| {
                let ports = u64::from(dport) << 16 | u64::from(sport);
                let client = lb_common::addr::to_ip(if v6 { FAMILY_V6 } else { FAMILY_V4 }, &src);
                let mut words = vec![SEED << 32 | u64::from(protocol)];
                words.extend(halves(client));
                words.push(ports);
                (client, words)
            };
            let protocol = u32::from(protocol);
            let (client, words4) = words(false);
            let key = FlowKey { src: src[0], dst: 1, sport, dport, protocol };
            prop_assert_eq!(hash(&words4), lb_common::hash::flow_hash(&key));
            prop_assert_eq!(source_hash(client), lb_common::hash::source_hash(src[0]));
            let (client, words6) = words(true);
            let key = FlowKey { src, dst: [1; 4], sport, dport, protocol };
            prop_assert_eq!(hash(&words6), lb_common::hash::flow_hash(&key));
            prop_assert_eq!(source_hash(client), lb_common::hash::source_hash(src));
        }
    }
}
