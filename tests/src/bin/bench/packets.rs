//! Nanoseconds per packet, by `BPF_PROG_TEST_RUN`.
//!
//! Cases that need the same flows in the table form a group: a balancer of its own, in which the table is empty at first, then holds
//! flows, then is full. In each of these stages every case is measured once in a round, and the floors with them.

use crate::{
    Choice,
    balancer::{Balancer, Plan},
    frame::{ACK, Family, Frame, Network, PORT, SYN, Transport},
    plot, progress,
    report::Report,
    wrapper::{self, Run, Target, Wrapper},
};
use anyhow::{Context as _, Result};
use lb_common::{
    bench::{Case as Stamp, FIRST_PORT, PORT_BITS, stamp},
    names::{FORWARD, SCHEDULER, name_of},
    service::{forward, on_no_backend, scheduler},
    stats::Counters,
};
use serde_json::json;
use sluice::config::Protocol;
use std::time::Duration;

/// New flows that each CPU records in a second while there is a flood: the default of `limits.new_flows_per_cpu`.
const NEW_FLOWS: u32 = 125_000;

/// Backends of a service.
const BACKENDS: u32 = 100;

/// Distance between the numbers of flows that are visited one after the other. The numbers they were placed in follow each other, and so
/// do their entries in memory; visited in the same order they would be fetched ahead.
const STRIDE: u64 = 0x9e37_79b1;

/// Ranges of flow numbers of which none is in the table, for what must not meet the same flows.
const NEW: u64 = 1 << 30;
/// See [`NEW`].
const SYN_FLOOD: u64 = 2 << 30;
/// See [`NEW`].
const ACK_FLOOD: u64 = 3 << 30;
/// See [`NEW`].
const NEW_IN_FULL: u64 = 4 << 30;
/// Flows that fill the table.
const FILLER: u64 = 5 << 30;
/// Number of flows in each of these ranges, less one.
const RANGE: u64 = (1 << 30) - 1;

/// XDP codes.
const DROP: u32 = 1;
/// See [`DROP`].
const PASS: u32 = 2;
/// See [`DROP`].
const TX: u32 = 3;

/// How much is measured.
struct Size {
    rounds: usize,
    /// Packets of one case in a round.
    packets: u32,
    /// Of flows that are established or never recorded: so many that it hardly counts that a call begins with empty caches.
    established: u32,
    /// Of new flows: in an empty table so many that it hardly counts that a call begins with empty caches, beside
    /// others so few that all rounds together leave it room.
    new: u32,
    /// See [`Size::new`].
    new_beside: u32,
    /// Room for flows; a `nat` connection takes two.
    room: u32,
    /// Numbers of established flows; the largest is what the table holds.
    flows: &'static [u32],
    services: &'static [u32],
    backends: &'static [u32],
}

const FULL: Size = Size {
    rounds: 5,
    packets: 100_000,
    established: 1_000_000,
    new: 100_000,
    new_beside: 10_000,
    room: 1_310_720,
    flows: &[1, 1 << 16, 1 << 19],
    services: &[1, 16, 256, 4096],
    backends: &[1, 16, 256, 4096, 16384],
};

const QUICK: Size = Size {
    rounds: 3,
    packets: 40_000,
    established: 400_000,
    new: 20_000,
    new_beside: 5_000,
    room: 196_608,
    flows: &[1, 1 << 16],
    services: &[1, 4096],
    backends: &[1, 16384],
};

/// What a case must do beside taking its time; otherwise something else was measured.
#[derive(Clone, Copy)]
struct Expected {
    verdict: u32,
    /// Bytes by which the packet grows.
    growth: i32,
    /// What every packet counts as.
    counts: Counts,
}

/// What every packet of a case is counted as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Counts {
    /// One from a client.
    In,
    /// One from a client that begins a connection.
    New,
    /// One to a client.
    Out,
    /// One that was dropped or refused.
    Drop,
    /// Nothing.
    Nothing,
    /// A new flow or a drop: the balancer may defend itself.
    Flood,
}

/// One line of the table.
struct Case {
    name: String,
    target: Target,
    /// Whether something runs in front; otherwise the packet is not changed.
    wrapped: bool,
    frame: Frame,
    stamp: Stamp,
    packets: u32,
    expected: Expected,
    /// Whether the table is cleared after each round.
    clears: bool,
    times: Vec<f64>,
    failure: Option<String>,
}

/// What cases have in common.
#[derive(Clone, Copy)]
struct Group {
    family: Family,
    protocol: Protocol,
    forward: u8,
    scheduler: u8,
    gateway: bool,
}

/// What `dnat` with a gateway is called in the names of cases.
const DNAT_GATEWAY: &str = "dnat-gateway";

impl Group {
    /// All of them, in the order of the table; only those that differ most if it must be quick.
    fn all(quick: bool) -> Vec<Self> {
        let kinds = [
            (scheduler::MAGLEV, Protocol::Tcp),
            (scheduler::ROUND_ROBIN, Protocol::Tcp),
            (scheduler::MAGLEV, Protocol::Udp),
        ];
        let mut groups = Vec::new();
        for (forward, _) in FORWARD {
            let all = !quick || [forward::NAT, forward::DSR].contains(forward);
            let kinds = if all { &kinds[..] } else { &kinds[..1] };
            for family in Family::BOTH {
                groups.extend(kinds.iter().map(|(scheduler, protocol)| Self {
                    family,
                    protocol: *protocol,
                    forward: *forward,
                    scheduler: *scheduler,
                    gateway: false,
                }));
            }
            if *forward == forward::DNAT {
                let hashed = |group: &&Self| {
                    group.forward == forward::DNAT && group.scheduler == scheduler::MAGLEV
                };
                let with = |group: &Self| Self {
                    gateway: true,
                    ..*group
                };
                let with_gateway: Vec<Self> = groups.iter().filter(hashed).map(with).collect();
                groups.extend(with_gateway);
            }
        }
        groups
    }

    fn name(&self, what: &str) -> String {
        let forward = if self.gateway {
            DNAT_GATEWAY
        } else {
            name_of(FORWARD, self.forward)
        };
        format!(
            "{forward} {} {} {} {what}",
            self.family.name(),
            self.protocol.name(),
            name_of(SCHEDULER, self.scheduler)
        )
    }

    fn plan(&self) -> Plan {
        Plan {
            protocol: self.protocol,
            gateway: self.gateway,
            ..Plan::new(self.family, self.forward, self.scheduler, BACKENDS)
        }
    }

    /// Whether the balancer sees both directions.
    fn translates(&self) -> bool {
        forward::translates(self.forward)
    }

    /// Names of the cases by stage: table empty, with flows, full.
    fn cases(&self, size: &Size) -> [Vec<(String, What)>; 3] {
        let tcp = self.protocol == Protocol::Tcp;
        let most = size.flows.last().copied().unwrap_or(1);
        let mut with_flows = Vec::new();
        for flows in size.flows {
            with_flows.push((
                format!("established {}", short(*flows)),
                What::Established(*flows),
            ));
        }
        if tcp && self.translates() {
            for flows in [1, most] {
                with_flows.push((format!("reply {}", short(flows)), What::Reply(flows)));
            }
        }
        with_flows.push((format!("new beside {}", short(most)), What::New));
        let mut full = vec![("new full".to_owned(), What::NewInFull)];
        if tcp {
            full.push(("ack flood".to_owned(), What::AckFlood));
            full.push(("syn flood".to_owned(), What::SynFlood));
        }
        [vec![("new".to_owned(), What::New)], with_flows, full].map(|stage| {
            stage
                .into_iter()
                .map(|(what, w)| (self.name(&what), w))
                .collect()
        })
    }
}

/// What a packet of a group is.
#[derive(Clone, Copy)]
enum What {
    /// Of one of so many flows that are in the table.
    Established(u32),
    /// The first one of a flow.
    New,
    /// The same, and there is no room.
    NewInFull,
    /// From a backend, of one of so many flows.
    Reply(u32),
    /// The first one of a flow, one of a great many.
    SynFlood,
    /// Not the first one, and of no flow.
    AckFlood,
}

/// `512k`.
fn short(n: u32) -> String {
    if n >= 1024 && n.is_multiple_of(1024) {
        format!("{}k", n / 1024)
    } else {
        n.to_string()
    }
}

fn size(choice: &Choice) -> &'static Size {
    if choice.quick { &QUICK } else { &FULL }
}

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    let size = size(choice);
    let mut names: Vec<String> = floors(Family::V4)
        .into_iter()
        .map(|case| case.name)
        .collect();
    names.extend(curve_floor(Family::V4).map(|case| case.name));
    for family in Family::BOTH {
        names.extend(common(family).into_iter().map(|case| case.name));
    }
    for group in Group::all(choice.quick) {
        let stages = group.cases(size);
        names.extend(stages.into_iter().flatten().map(|(name, _)| name));
    }
    names.extend(curves(size).into_iter().map(|curve| curve.name));
    names.retain(|name| choice.wants(name));
    names
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice) -> Result<Report> {
    let size = size(choice);
    let mut bench = Bench {
        wrapper: Wrapper::load(size.flows.last().copied().unwrap_or(1))?,
        size,
        call_cost: Duration::ZERO,
        report: Report::new(),
        all_floors: Vec::new(),
    };
    println!(
        "{:<52} {:>8} {:>8} {:>8}   ns per packet; above: less the floor of the same rounds",
        "case", "min", "median", "above"
    );
    for family in Family::BOTH {
        let cases = common(family).into_iter();
        let cases: Vec<Case> = cases.filter(|case| choice.wants(&case.name)).collect();
        if !cases.is_empty() {
            let balancer = bench.balancer(&common_services(family))?;
            bench.rounds(Some(&balancer), family, cases)?;
        }
    }
    for group in Group::all(choice.quick) {
        let stages = group.cases(size);
        let stages = stages.map(|stage| {
            let wanted = stage.into_iter().filter(|(name, _)| choice.wants(name));
            wanted.collect::<Vec<_>>()
        });
        if stages.iter().any(|stage| !stage.is_empty()) {
            let name = group.name("");
            bench.group(&group, stages).with_context(|| name)?;
        }
    }
    for curve in curves(size) {
        if choice.wants(&curve.name) {
            bench.curve(&curve).with_context(|| curve.name.clone())?;
        }
    }
    bench.conclude_floors();
    Ok(bench.report)
}

/// Pictures of the established flows and of the curves.
pub fn plots(report: &Report) -> Vec<(&'static str, String)> {
    let mut groups = Vec::new();
    let mut kinds = Vec::new();
    for (forward, kind) in FORWARD {
        let recorded = forward::translates(*forward);
        kinds.push((*kind, if recorded { "round-robin" } else { "maglev" }));
        if *forward == forward::DNAT {
            kinds.push((DNAT_GATEWAY, "maglev"));
        }
    }
    for (kind, by) in kinds {
        for family in Family::BOTH {
            let of = |flows: u32| {
                let case = format!(
                    "{kind} {} tcp {by} established {}",
                    family.name(),
                    short(flows)
                );
                report.number(&case, "min_ns")
            };
            groups.push(plot::Group {
                label: format!("{kind}, {by}, {}", family.name()),
                values: FULL.flows.iter().map(|flows| of(*flows)).collect(),
            });
        }
    }
    let floor = report.number("floor tx", "min_ns");
    groups.push(plot::Group {
        label: "floor: XDP_TX at once".to_owned(),
        values: vec![floor, f64::NAN, f64::NAN],
    });
    let established = plot::bars(
        "Established TCP, ns per packet",
        &["1 flow", "64k flows", "512k flows"],
        &groups,
    );

    let mut lines = Vec::new();
    for kind in ["dsr v4 tcp maglev", "nat v4 tcp round-robin"] {
        for (what, counts) in [("services", FULL.services), ("backends", FULL.backends)] {
            let point = |count: &u32| {
                let ns = report.number(&format!("{kind} {count} {what}"), "min_ns");
                (f64::from(*count), ns)
            };
            let points = counts.iter().map(point).filter(|(_, ns)| ns.is_finite());
            lines.push(plot::Line {
                label: format!("{}, {what}", kind.split(' ').next().unwrap_or_default()),
                points: points.collect(),
            });
        }
    }
    let curves = plot::lines(
        "32768 established flows, ns per packet",
        "number of services (of 4 backends), or of backends (of 1 service)",
        &lines,
    );
    vec![("established.svg", established), ("curves.svg", curves)]
}

struct Bench {
    wrapper: Wrapper,
    size: &'static Size,
    /// What a call costs beside its packets.
    call_cost: Duration,
    report: Report,
    /// The floors of all rounds.
    all_floors: Vec<Case>,
}

/// Flows in the curves: no more than the source ports towards a single backend.
const CURVE_FLOWS: u32 = 1 << 15;

/// How often each of them is seen in a round. The first time they are in no cache any more.
const CURVE_PASSES: u32 = 32;

/// One of the curves: how the cost of a packet depends on how much is configured.
struct Curve {
    name: String,
    forward: u8,
    scheduler: u8,
    services: u32,
    /// Of each service.
    backends: u32,
}

fn curves(size: &Size) -> Vec<Curve> {
    let mut curves = Vec::new();
    for (forward, scheduler) in [
        (forward::DSR, scheduler::MAGLEV),
        (forward::NAT, scheduler::ROUND_ROBIN),
    ] {
        let kind = format!(
            "{} v4 tcp {}",
            name_of(FORWARD, forward),
            name_of(SCHEDULER, scheduler)
        );
        curves.extend(size.services.iter().map(|services| Curve {
            name: format!("{kind} {services} services"),
            forward,
            scheduler,
            services: *services,
            backends: 4,
        }));
        curves.extend(size.backends.iter().map(|backends| Curve {
            name: format!("{kind} {backends} backends"),
            forward,
            scheduler,
            services: 1,
            backends: *backends,
        }));
    }
    curves
}

/// Programs that do next to nothing, with the same in front.
fn floors(family: Family) -> Vec<Case> {
    let frame = Frame::to_vip(family, Transport::Tcp(ACK), 0);
    let expected = Expected {
        verdict: TX,
        growth: 0,
        counts: Counts::Nothing,
    };
    let grown = Expected {
        growth: 20,
        ..expected
    };
    [
        ("floor tx", Target::FloorTx, true, expected),
        ("floor mac-swap", Target::FloorSwap, true, expected),
        ("floor grow", Target::FloorGrow, true, grown),
        ("floor tx unwrapped", Target::FloorTx, false, expected),
    ]
    .map(|(name, target, wrapped, expected)| {
        let mut case = Case::new(name, &frame, expected);
        case.stamp.grows_at_head = u32::from(expected.growth > 0);
        Case {
            target,
            wrapped,
            ..case
        }
    })
    .into()
}

/// What the curves are compared with: packets of as many flows, which cost the program in front
/// more than packets that are all the same.
fn curve_floor(family: Family) -> Option<Case> {
    let floor = floors(family).into_iter().next()?.of_curve(0);
    let name = "floor tx 32k flows".to_owned();
    Some(Case { name, ..floor })
}

/// VIP numbers of the services that [`common`] uses; the next one is nobody's.
const WITHOUT_BACKENDS: u32 = 1;
const REFUSING: u32 = 2;
const NOBODY: u32 = 3;

fn common_services(family: Family) -> [Plan; 3] {
    let plan = Plan::new(family, forward::DSR, scheduler::MAGLEV, BACKENDS);
    [
        plan,
        Plan {
            backends: 0,
            ..plan
        },
        Plan {
            backends: 0,
            on_no_backend: on_no_backend::RESET,
            ..plan
        },
    ]
}

/// Cases that are the same in every forward mode.
fn common(family: Family) -> Vec<Case> {
    let named = |name: &str| format!("{name} {}", family.name());
    let expected = |verdict, counts| Expected {
        verdict,
        growth: 0,
        counts,
    };
    let to = |flags, vip| Frame::to_vip(family, Transport::Tcp(flags), vip);
    let foreign = to(ACK, NOBODY);
    // A data offset below that of a header without options (RFC 9293 section 3.1).
    let mut malformed = to(ACK, 0);
    malformed.bytes[14 + family.ip_header() + 12] = 4 << 4;
    vec![
        Case::new(
            &named("not ours"),
            &foreign,
            expected(PASS, Counts::Nothing),
        ),
        Case {
            wrapped: false,
            ..Case::new(
                &named("not ours unwrapped"),
                &foreign,
                expected(PASS, Counts::Nothing),
            )
        },
        Case::new(
            &named("dropped malformed"),
            &malformed,
            expected(DROP, Counts::Drop),
        ),
        Case::new(
            &named("dropped no-backend"),
            &to(SYN, WITHOUT_BACKENDS),
            expected(DROP, Counts::Drop),
        )
        .stamped(),
        Case::new(
            &named("refused no-backend"),
            &to(SYN, REFUSING),
            Expected {
                growth: -10,
                ..expected(TX, Counts::Drop)
            },
        )
        .stamped(),
    ]
}

impl Case {
    /// A packet that is always the same, through the balancer.
    fn new(name: &str, frame: &Frame, expected: Expected) -> Self {
        Self {
            name: name.to_owned(),
            target: Target::Balancer,
            wrapped: true,
            frame: frame.clone(),
            stamp: frame.case(false),
            packets: 0,
            expected,
            clears: false,
            times: Vec::new(),
            failure: None,
        }
    }

    /// From many clients.
    fn stamped(self) -> Self {
        let mut stamp = self.frame.case(true);
        stamp.mask = RANGE;
        Self { stamp, ..self }
    }

    /// Of the flows of a curve.
    fn of_curve(self, vip_mask: u32) -> Self {
        let mut case = self.stamped();
        case.stamp.mask = u64::from(CURVE_FLOWS) - 1;
        case.stamp.vip_mask = vip_mask;
        case.stamp.stride = STRIDE;
        case.packets = CURVE_PASSES * CURVE_FLOWS;
        case
    }

    fn min(&self) -> f64 {
        self.times.iter().copied().fold(f64::NAN, f64::min)
    }

    fn median(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl Group {
    fn frame(&self, flags: u8, vip: u32) -> Frame {
        let transport = match self.protocol {
            Protocol::Tcp => Transport::Tcp(flags),
            Protocol::Udp => Transport::Udp,
        };
        Frame::to_vip(self.family, transport, vip)
    }

    /// Bytes that the forward mode puts in front.
    fn overhead(&self) -> i32 {
        let header = self.family.ip_header() as i32;
        match self.forward {
            forward::IPIP => header,
            forward::GUE => header + 8,
            _ => 0,
        }
    }

    /// What the first packet of a flow counts as. Without SYN and without a record it is one like any other.
    fn first(&self) -> Counts {
        let told = self.protocol == Protocol::Tcp;
        if told || !self.plan().is_stateless() {
            Counts::New
        } else {
            Counts::In
        }
    }

    fn forwarded(&self, counts: Counts) -> Expected {
        Expected {
            verdict: TX,
            growth: self.overhead(),
            counts,
        }
    }
}

/// The VIP number of the service whose flows fill the table. It records every one of them.
const FILLING: u32 = 1;

impl Bench {
    /// Runs packets for what they leave behind.
    fn send(&self, family: Family, stamp: &mut Stamp, frame: &Frame, packets: u32) -> Result<()> {
        let (target, bytes) = (Target::Balancer, &frame.bytes);
        self.wrapper
            .run(target, family, stamp, bytes, packets, Duration::ZERO)
            .map(drop)
    }

    fn balancer(&self, plans: &[Plan]) -> Result<Balancer> {
        let balancer = Balancer::load(self.size.room, plans)?;
        self.wrapper
            .set(Target::Balancer, balancer.dataplane.program())?;
        Ok(balancer)
    }

    /// Measures the cases of a group, by stage.
    fn group(&mut self, group: &Group, stages: [Vec<(String, What)>; 3]) -> Result<()> {
        progress(&format!("{}preparing", group.name("")));
        let plan = group.plan();
        let filler = Plan::new(group.family, forward::DSR, scheduler::ROUND_ROBIN, 1);
        let balancer = self.balancer(&[plan, filler])?;
        let [empty, with_flows, full] = stages;
        if !empty.is_empty() {
            let mut cases = self.cases(group, empty, self.size.new);
            cases.iter_mut().for_each(|case| case.clears = true);
            self.rounds(Some(&balancer), group.family, cases)?;
        }
        if !with_flows.is_empty() {
            let flows = self.size.flows.last().copied().unwrap_or(1);
            self.establish(group, &balancer, flows, 0)?;
            let cases = self.cases(group, with_flows, self.size.new_beside);
            self.rounds(Some(&balancer), group.family, cases)?;
        }
        if !full.is_empty() {
            self.fill(group)?;
            let cases = self.cases(group, full, self.size.new);
            self.rounds(Some(&balancer), group.family, cases)?;
        }
        Ok(())
    }

    /// These cases; `new` is how many flows begin in a round where they are recorded.
    fn cases(&self, group: &Group, named: Vec<(String, What)>, new: u32) -> Vec<Case> {
        let size = self.size;
        let case = |(name, what): (String, What)| {
            let first = |counts| Case::new(&name, &group.frame(SYN, 0), group.forwarded(counts));
            let mut case = match what {
                What::Established(_) => {
                    let frame = group.frame(ACK, 0);
                    Case::new(&name, &frame, group.forwarded(Counts::In))
                }
                What::New | What::NewInFull => first(group.first()),
                What::SynFlood => first(Counts::Flood),
                What::AckFlood => {
                    let frame = group.frame(ACK, 0);
                    Case::new(&name, &frame, group.forwarded(Counts::Flood))
                }
                What::Reply(_) => Case::new(
                    &name,
                    &reply(group.family, ACK),
                    Expected {
                        growth: 0,
                        ..group.forwarded(Counts::Out)
                    },
                ),
            }
            .stamped();
            case.stamp.stride = STRIDE;
            case.stamp.grows_at_head = u32::from(group.overhead() > 0);
            match what {
                What::Established(flows) => {
                    case.stamp.mask = u64::from(flows) - 1;
                    case.packets = size.established;
                }
                What::Reply(flows) => {
                    case.packets = size.established;
                    case.stamp.stamp = stamp::TUPLE;
                    case.stamp.mask = u64::from(flows) - 1;
                }
                What::New => {
                    case.stamp.first = NEW;
                    // What is not recorded does not fill the table.
                    let recorded = !group.plan().is_stateless();
                    case.packets = if recorded { new } else { size.established };
                }
                What::NewInFull => case.stamp.first = NEW_IN_FULL,
                What::SynFlood => case.stamp.first = SYN_FLOOD,
                What::AckFlood => case.stamp.first = ACK_FLOOD,
            }
            case
        };
        named.into_iter().map(case).collect()
    }

    /// Takes so many connections, spread over successive VIPs, through their handshakes.
    fn establish(
        &self,
        group: &Group,
        balancer: &Balancer,
        flows: u32,
        vip_mask: u32,
    ) -> Result<()> {
        let send = |frame: &Frame, kind: Option<u32>| {
            let mut stamp = frame.case(true);
            stamp.mask = u64::from(flows) - 1;
            stamp.vip_mask = vip_mask;
            stamp.grows_at_head = u32::from(group.overhead() > 0);
            stamp.stamp = kind.unwrap_or(stamp.stamp);
            let sent = self.send(group.family, &mut stamp, frame, flows);
            sent.context("while flows are made")
        };
        send(&group.frame(SYN, 0), None)?;
        if group.protocol == Protocol::Tcp {
            if group.translates() {
                self.tuples(group, balancer, SYN | ACK, flows)?;
                send(&reply(group.family, SYN | ACK), Some(stamp::TUPLE))?;
                self.tuples(group, balancer, ACK, flows)?;
            }
            send(&group.frame(ACK, 0), None)?;
        }
        Ok(())
    }

    /// Puts the backends' side of each flow into map `tuples`, for packets with these flags.
    fn tuples(&self, group: &Group, balancer: &Balancer, flags: u8, flows: u32) -> Result<()> {
        let template = reply(group.family, flags);
        let base = group.frame(ACK, 0).case(true).client;
        let tuples = &self.wrapper.tuples;
        // Visited one after the other, the numbers must not follow each other.
        let place = |n: u32| (u64::from(n).wrapping_mul(STRIDE) & (u64::from(flows) - 1)) as u32;
        if group.gateway {
            for n in 0..flows {
                let (from, to, sport, dport) = balancer.answer(group.family, n);
                tuples.store(place(n), template.tuple(from, to, sport, dport));
            }
            return Ok(());
        }
        balancer.flows(
            group.family,
            |(src, _, sport, _), (from, to, sport_back, dport_back)| {
                let last = match group.family {
                    Family::V4 => src[0],
                    Family::V6 => src[3],
                };
                let high = u32::from_be(last).wrapping_sub(base) << PORT_BITS;
                let n = high + u32::from(u16::from_be(sport) - FIRST_PORT);
                if n < flows {
                    tuples.store(place(n), template.tuple(from, to, sport_back, dport_back));
                }
            },
        )
    }

    /// Fills what is left of the table.
    fn fill(&self, group: &Group) -> Result<()> {
        let frame = Frame::to_vip(group.family, Transport::Tcp(SYN), FILLING);
        let mut stamp = frame.case(true);
        stamp.mask = RANGE;
        stamp.first = FILLER;
        let packets = self.size.room + self.size.room / 8;
        let sent = self.send(group.family, &mut stamp, &frame, packets);
        sent.context("while the table is filled")
    }

    /// Measures one point of a curve.
    fn curve(&mut self, curve: &Curve) -> Result<()> {
        progress(&format!("{} preparing", curve.name));
        let plan = Plan::new(Family::V4, curve.forward, curve.scheduler, curve.backends);
        let balancer = self.balancer(&vec![plan; curve.services as usize])?;
        let group = Group {
            family: Family::V4,
            protocol: Protocol::Tcp,
            forward: curve.forward,
            scheduler: curve.scheduler,
            gateway: false,
        };
        let vip_mask = curve.services - 1;
        self.establish(&group, &balancer, CURVE_FLOWS, vip_mask)?;
        let frame = group.frame(ACK, 0);
        let case = Case::new(&curve.name, &frame, group.forwarded(Counts::In)).of_curve(vip_mask);
        self.rounds(Some(&balancer), Family::V4, vec![case])
    }

    /// Measures cases and floors, one after the other in each round, prints them and keeps them.
    fn rounds(
        &mut self,
        balancer: Option<&Balancer>,
        family: Family,
        mut cases: Vec<Case>,
    ) -> Result<()> {
        let mut floors = floors(family);
        let is_curve = |case: &Case| case.packets == CURVE_PASSES * CURVE_FLOWS;
        floors.extend(curve_floor(family).filter(|_| cases.iter().any(is_curve)));
        self.call_cost =
            wrapper::call_cost(self.wrapper.program("floor_tx")?, &floors[0].frame.bytes)?;
        for round in 0..self.size.rounds {
            for case in floors.iter_mut().chain(&mut cases) {
                progress(&format!(
                    "{} round {} of {}",
                    case.name,
                    round + 1,
                    self.size.rounds
                ));
                self.once(balancer, family, case)?;
            }
        }
        progress("");
        for case in &cases {
            let own = floors.last().filter(|_| is_curve(case));
            self.conclude(case, own.unwrap_or(&floors[0]).min());
        }
        for floor in floors {
            match self
                .all_floors
                .iter_mut()
                .find(|all| all.name == floor.name)
            {
                Some(all) => all.times.extend(floor.times),
                None => self.all_floors.push(floor),
            }
        }
        Ok(())
    }

    /// Measures a case once, and checks that it did what it should.
    fn once(&self, balancer: Option<&Balancer>, family: Family, case: &mut Case) -> Result<()> {
        let packets = if case.packets == 0 {
            self.size.packets
        } else {
            case.packets
        };
        let counters = |balancer: Option<&Balancer>| match balancer {
            Some(balancer) if case.target == Target::Balancer => balancer.counters(),
            _ => Ok(Counters::default()),
        };
        let before = counters(balancer)?;
        if let (Counts::Flood, Some(balancer)) = (case.expected.counts, balancer) {
            balancer.limit_new_flows(NEW_FLOWS);
        }
        let bytes = &case.frame.bytes;
        let call_cost = self.call_cost;
        let run = if case.wrapped {
            let run = self.wrapper.run(
                case.target,
                family,
                &mut case.stamp,
                bytes,
                packets,
                call_cost,
            );
            run.with_context(|| case.name.clone())?
        } else {
            let program = match (case.target, balancer) {
                (Target::Balancer, Some(balancer)) => balancer.dataplane.program(),
                _ => self.wrapper.program("floor_tx")?,
            };
            wrapper::run(program, bytes, packets, call_cost)?
        };
        if let Some(balancer) = balancer {
            balancer.limit_new_flows(0);
        }
        let after = counters(balancer)?;
        let wrong = case
            .expected
            .judge(run, bytes.len(), packets, before, after);
        if case.failure.is_none() {
            case.failure = wrong;
        }
        case.times.push(run.ns);
        if let (true, Some(balancer)) = (case.clears, balancer) {
            balancer.clear(family)?;
        }
        Ok(())
    }

    fn conclude_floors(&mut self) {
        for case in std::mem::take(&mut self.all_floors) {
            let floor = case.min();
            self.conclude(&case, floor);
        }
    }

    fn conclude(&mut self, case: &Case, floor: f64) {
        let (min, median) = (case.min(), case.median());
        println!(
            "{:<52} {min:>8.1} {median:>8.1} {:>8.1}",
            case.name,
            min - floor
        );
        let mut result = json!({
            "part": "packets",
            "min_ns": min,
            "median_ns": median,
            "floor_ns": floor,
            "rounds": case.times.len(),
            "wrapped": case.wrapped,
        });
        // What the names of such cases begin with.
        let mut words = case.name.splitn(5, ' ');
        let mut forwards = FORWARD.iter().map(|(_, name)| *name).chain([DNAT_GATEWAY]);
        if forwards.any(|name| case.name.starts_with(&format!("{name} "))) {
            for member in ["forward", "family", "protocol", "scheduler", "what"] {
                result[member] = json!(words.next());
            }
        }
        if let Some(failure) = &case.failure {
            println!("    {failure}");
            result["failure"] = json!(failure);
        }
        self.report.add(&case.name, result);
    }
}

/// A backend's packet with these flags; addresses and ports come from map `tuples`.
fn reply(family: Family, flags: u8) -> Frame {
    let host = family.address(Network::Hosts, 1);
    let balancer = family.address(Network::Hosts, 0);
    Frame::new(
        family,
        Transport::Tcp(flags),
        (host, PORT),
        (balancer, FIRST_PORT),
    )
}

impl Expected {
    /// What was wrong with a run, if anything.
    fn judge(
        &self,
        run: Run,
        length: usize,
        packets: u32,
        before: Counters,
        after: Counters,
    ) -> Option<String> {
        let packets = u64::from(packets);
        let (new, drops) = (
            after.connections - before.connections,
            after.drops - before.drops,
        );
        let inward = after.packets_in - before.packets_in;
        let outward = after.packets_out - before.packets_out;
        let counted = (inward, new, outward, drops);
        let as_expected = match self.counts {
            Counts::In => counted == (packets, 0, 0, 0),
            Counts::New => counted == (packets, packets, 0, 0),
            Counts::Out => counted == (0, 0, packets, 0),
            Counts::Drop => drops == packets && (inward, new, outward) == (0, 0, 0),
            Counts::Nothing => counted == (0, 0, 0, 0),
            // The sender may be told, which makes another packet of it.
            Counts::Flood => {
                return (inward + drops < packets).then(|| missed(packets, counted, run.verdict));
            }
        };
        if !as_expected {
            return Some(missed(packets, counted, run.verdict));
        }
        let wanted = i64::try_from(length).unwrap_or(0) + i64::from(self.growth);
        if run.verdict != self.verdict || run.length as i64 != wanted {
            return Some(format!(
                "expected verdict {} with {wanted} bytes, got verdict {} with {}",
                self.verdict, run.verdict, run.length
            ));
        }
        None
    }
}

fn missed(
    packets: u64,
    (inward, new, outward, drops): (u64, u64, u64, u64),
    verdict: u32,
) -> String {
    format!(
        "of {packets} packets {inward} were counted as a client's, {new} as new, {outward} as a backend's, {drops} as dropped; the last one's verdict is {verdict}"
    )
}
