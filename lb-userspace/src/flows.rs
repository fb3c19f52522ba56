//! The flow tables from the user side: idle flows end, counts stay true, operators look.
//!
//! The data plane begins flows and follows their state; it never looks for what has gone quiet.
//! [`Flows::sweep`] does, in one pass over each table: it removes flows that were silent for as
//! long as their state allows, and the second entry of flows whose first is gone, and
//! compares the number of flows it saw with the number the data plane counts.

use crate::{
    config,
    dataplane::{FlowTable, Flowing as _, HashMap, Maps, SharedArray, View},
    reconcile::{Settling, Table},
};
use anyhow::Result;
use lb_common::{
    abi::ticks_since,
    addr::{Address, from_ipv4, from_ipv6, to_ip},
    backend::{Backend, Load, NO_BACKEND, Slot},
    client::{Affinity, ClientKey, masked},
    flow::{DIRECTION_BACKEND, Flow, FlowKey, state},
    flow_table::Entry,
    hash,
    service::{Cursor, forward},
};
use std::{
    collections::{HashMap as StdHashMap, HashSet},
    hash::Hash,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    sync::atomic::Ordering,
    time::Duration,
};

/// Nanoseconds in one tick.
const TICK_NS: u64 = 1 << 20;

/// The data plane's clock now.
#[must_use]
pub fn now() -> u32 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes to a timespec of ours. CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let ns = time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs();
    lb_common::abi::ticks_from_ns(ns)
}

/// A time span in ticks, rounded up; a span that the clock cannot hold becomes the longest it can.
#[must_use]
pub fn ticks(span: Duration) -> u32 {
    let ticks = span.as_nanos().div_ceil(u128::from(TICK_NS));
    u32::try_from(ticks).unwrap_or(u32::MAX).min(u32::MAX / 2)
}

/// Ticks in seconds.
#[must_use]
pub fn seconds(ticks: u32) -> f64 {
    f64::from(ticks) * TICK_NS as f64 / 1e9
}

/// How long a flow may be silent in each state, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    opening: u32,
    closing: u32,
    time_wait: u32,
    closed: u32,
}

impl From<&config::Timeouts> for Patience {
    fn from(timeouts: &config::Timeouts) -> Self {
        Self {
            opening: ticks(timeouts.opening),
            closing: ticks(timeouts.closing),
            time_wait: ticks(timeouts.time_wait),
            closed: ticks(timeouts.closed),
        }
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::from(&config::Timeouts::default())
    }
}

impl Patience {
    /// With a flow in `state`; `idle` is for established ones.
    const fn with(&self, state: u8, idle: u32) -> u32 {
        match state {
            state::SYN_SENT | state::SYN_RECEIVED => self.opening,
            state::FIN_CLIENT | state::FIN_BACKEND => self.closing,
            state::TIME_WAIT => self.time_wait,
            state::CLOSED => self.closed,
            _ => idle,
        }
    }
}

/// Connections of one backend: active, inactive, held, in the order of [`Load`].
type Counts = [i64; 3];

/// The counters in [`Counts`] of a flow in `state`.
fn counters(state: u8) -> impl Iterator<Item = usize> {
    let held = state::is_held(state).then_some(2);
    [usize::from(!state::is_active(state))]
        .into_iter()
        .chain(held)
}

fn count<A>(counts: &mut StdHashMap<u32, Counts>, flow: &Flow<A>, change: i64) {
    let of_backend = counts.entry(flow.backend).or_default();
    for counter in counters(flow.state) {
        of_backend[counter] += change;
    }
}

/// Longest time that the data plane takes from announcing that it records a flow to having done so.
const RECORDING: Duration = Duration::from_millis(5);

/// What a sweep finds of the table of a stateless service.
struct Look {
    table: Table,
    /// Flows that were announced before the sweep.
    recorded: u64,
    /// Slots that were closing then.
    closing: Vec<u32>,
    /// Slots that have a flow with another backend than theirs.
    strangers: HashSet<u32>,
}

impl Look {
    /// The place of a flow's slot in the table.
    fn place<A: Address>(&self, key: &FlowKey<A>) -> u32 {
        let hash = if self.table.by_source {
            hash::source_hash(key.src)
        } else {
            hash::flow_hash(key)
        };
        hash::slot_of(hash, self.table.len)
    }
}

/// Clients of services with affinity who have flows, and the backend of one of these with its
/// generation.
type Clients<A> = StdHashMap<ClientKey<A>, (u32, u32)>;

/// What a sweep gathers.
struct Gathered<'a> {
    sweep: &'a mut Sweep,
    counts: &'a mut StdHashMap<u32, Counts>,
    looks: &'a mut StdHashMap<u32, Look>,
}

/// Ticks between two notes that a client still has flows.
const AFFINITY_INTERVAL: u32 = 953;

/// Notes that clients still have flows with the backends they return to.
fn refresh<A>(affinity: &HashMap<ClientKey<A>, Affinity>, clients: Clients<A>) -> Result<()>
where
    ClientKey<A>: bytemuck::Pod,
{
    let now = now();
    for (client, (backend, generation)) in clients {
        let Some(entry) = affinity.get(&client)? else {
            continue;
        };
        // A client that was sent elsewhere meanwhile returns there.
        let same = (entry.backend, entry.generation) == (backend, generation);
        if same && ticks_since(now, entry.last_seen) >= AFFINITY_INTERVAL {
            let last_seen = now;
            affinity.insert(&client, &Affinity { last_seen, ..entry })?;
        }
    }
    Ok(())
}

/// What the sweep must know of each service.
#[derive(Clone, Debug, Default)]
pub struct Timeouts {
    /// For flows that are not established.
    pub patience: Patience,
    /// Ticks an established flow may be silent, by service number; flows of others have no service
    /// any more and are removed.
    pub idle: StdHashMap<u32, u32>,
    /// The tables of stateless services, by service number.
    pub stateless: StdHashMap<u32, Table>,
    /// Bits of a client's address that affinity goes by, by the number of a service that has it.
    pub affinity: StdHashMap<u32, [u32; 4]>,
}

/// What a sweep found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows seen, both entries counted once.
    pub flows: u64,
    /// Flows that were silent for too long.
    pub expired: u64,
    /// Entries whose other half, service or backend was gone.
    pub orphans: u64,
    /// Connections by which the counts were wrong, and are not any more.
    pub drift: u64,
    /// What the flows say of the tables of stateless services, by their numbers.
    pub settling: StdHashMap<u32, Settling>,
}

/// A client's flow as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// IP protocol number.
    pub protocol: u8,
    /// One of [`state`].
    pub state: u8,
    /// Client.
    pub client: SocketAddr,
    /// VIP.
    pub vip: SocketAddr,
    /// The source that the backend sees: in `nat` the balancer's, else the client's.
    pub nat_source: SocketAddr,
    /// Backend.
    pub backend: SocketAddr,
    /// Backend's number.
    pub backend_number: u32,
    /// Service's number.
    pub service_number: u32,
    /// Ticks since a packet was last noted in either direction.
    pub silent: u32,
}

impl Connection {
    /// Ticks until it expires.
    #[must_use]
    pub fn expires(&self, patience: &Patience, idle: u32) -> u32 {
        patience.with(self.state, idle).saturating_sub(self.silent)
    }
}

/// The flow tables, through descriptors of their own.
#[derive(Debug)]
pub struct Flows {
    flows4: FlowTable<u32>,
    flows6: FlowTable<[u32; 4]>,
    opening4: HashMap<FlowKey<u32>, Flow<u32>>,
    opening6: HashMap<FlowKey<[u32; 4]>, Flow<[u32; 4]>>,
    backends: SharedArray<Backend>,
    load: SharedArray<Load>,
    slots: SharedArray<Slot>,
    cursors: SharedArray<Cursor>,
    affinity4: HashMap<ClientKey<u32>, Affinity>,
    affinity6: HashMap<ClientKey<[u32; 4]>, Affinity>,
    /// By how much the counts of each backend were wrong in the sweep before.
    drift: StdHashMap<u32, Counts>,
}

impl Flows {
    /// The flow tables of `maps`.
    ///
    /// # Errors
    ///
    /// When the kernel gives no second descriptor.
    pub fn new(maps: &Maps) -> Result<Self> {
        Ok(Self {
            flows4: <u32>::flow_table(maps)?,
            flows6: <[u32; 4]>::flow_table(maps)?,
            opening4: HashMap::from_fd(maps.opening4.as_fd().try_clone_to_owned()?)?,
            opening6: HashMap::from_fd(maps.opening6.as_fd().try_clone_to_owned()?)?,
            backends: SharedArray::from_fd(maps.backends.as_fd().try_clone_to_owned()?)?,
            load: SharedArray::from_fd(maps.backend_load.as_fd().try_clone_to_owned()?)?,
            slots: SharedArray::from_fd(maps.slots.as_fd().try_clone_to_owned()?)?,
            cursors: SharedArray::from_fd(maps.cursors.as_fd().try_clone_to_owned()?)?,
            affinity4: HashMap::from_fd(maps.affinity4.as_fd().try_clone_to_owned()?)?,
            affinity6: HashMap::from_fd(maps.affinity6.as_fd().try_clone_to_owned()?)?,
            drift: StdHashMap::new(),
        })
    }

    /// Removes what is over, and corrects the counts. Takes time in proportion to the number of
    /// flows.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list or remove entries.
    pub fn sweep(&mut self, timeouts: &Timeouts) -> Result<Sweep> {
        let mut sweep = Sweep::default();
        let mut counts = StdHashMap::new();
        let mut looks = self.looks(timeouts);
        if looks.values().any(|look| !look.closing.is_empty()) {
            // A flow whose recording had begun can be found when this is over.
            std::thread::sleep(RECORDING);
        }
        let mut gathered = Gathered {
            sweep: &mut sweep,
            counts: &mut counts,
            looks: &mut looks,
        };
        let clients = self.sweep_table(&self.flows4, timeouts, &mut gathered)?;
        refresh(&self.affinity4, clients)?;
        let clients = self.sweep_table(&self.flows6, timeouts, &mut gathered)?;
        refresh(&self.affinity6, clients)?;
        self.sweep_opening(&self.opening4, timeouts, &mut sweep)?;
        self.sweep_opening(&self.opening6, timeouts, &mut sweep)?;
        self.correct(&counts, &mut sweep);
        for (number, look) in looks {
            sweep.settling.insert(number, self.settling(number, look));
        }
        Ok(sweep)
    }

    fn sweep_table<A>(
        &self,
        table: &FlowTable<A>,
        timeouts: &Timeouts,
        gathered: &mut Gathered<'_>,
    ) -> Result<Clients<A>>
    where
        A: Address + Hash,
        Entry<A>: bytemuck::Pod,
        FlowKey<A>: bytemuck::Pod,
        Flow<A>: bytemuck::Pod,
    {
        let Gathered {
            sweep,
            counts,
            looks,
        } = gathered;
        let mut clients = Clients::new();
        let now = now();
        let mut over = Vec::new();
        let mut halves = Vec::new();
        table.sweep(|key, flow| {
            let idle = timeouts.idle.get(&flow.service).copied();
            let belongs = idle.is_some() && self.belongs(flow);
            let silent = ticks_since(now, flow.last_seen);
            if flow.direction == DIRECTION_BACKEND {
                // Its client's entry ends it. Looked at only if nothing came for longer than that
                // one can live without it.
                if !belongs || silent > idle.unwrap_or(0).max(timeouts.patience.closing) {
                    halves.push((*key, *flow));
                }
                return;
            }
            sweep.flows += 1;
            if belongs {
                count(counts, flow, 1);
                if let Some(look) = looks.get_mut(&flow.service) {
                    let place = look.place(key);
                    if self.slot(look.table.first + place).backend != flow.backend {
                        look.strangers.insert(place);
                    }
                }
            }
            if let Some(mask) = timeouts.affinity.get(&flow.service)
                && belongs
                && state::is_held(flow.state)
            {
                let client = ClientKey {
                    service: flow.service,
                    addr: masked(key.src, mask),
                };
                clients.insert(client, (flow.backend, flow.generation));
            }
            if !belongs || silent > timeouts.patience.with(flow.state, idle.unwrap_or(0)) {
                over.push((*key, *flow, belongs));
            }
        })?;
        let flows = table.view();
        for (key, flow, belongs) in over {
            let opposite = flow.opposite(key.protocol);
            if belongs {
                // A client that only listens is not silent: its backend speaks.
                let heard = flows.get(&opposite)?.map(|reply| reply.last_seen);
                let limit = timeouts.patience.with(
                    flow.state,
                    timeouts.idle.get(&flow.service).copied().unwrap_or(0),
                );
                if heard.is_some_and(|heard| ticks_since(now, heard) <= limit) {
                    continue;
                }
            }
            flows.remove(&opposite)?;
            if let Some(last) = flows.remove(&key)? {
                if belongs && self.belongs(&last) {
                    for counter in counters(last.state) {
                        self.add(last.backend, counter, -1);
                    }
                    count(counts, &last, -1);
                }
                if belongs {
                    sweep.expired += 1;
                } else {
                    sweep.orphans += 1;
                }
            }
        }
        for (key, flow) in halves {
            let opposite = flow.opposite(key.protocol);
            if flows.get(&opposite)?.is_none() && flows.remove(&key)?.is_some() {
                sweep.orphans += 1;
            }
        }
        Ok(clients)
    }

    /// Removes half-open flows that nobody completes. They are in no count of connections.
    fn sweep_opening<A>(
        &self,
        opening: &HashMap<FlowKey<A>, Flow<A>>,
        timeouts: &Timeouts,
        sweep: &mut Sweep,
    ) -> Result<()>
    where
        A: Address,
        FlowKey<A>: bytemuck::Pod,
        Flow<A>: bytemuck::Pod,
    {
        if opening.is_empty()? {
            return Ok(());
        }
        let now = now();
        let mut over = Vec::new();
        opening.iter_batches(|key, flow| {
            sweep.flows += u64::from(flow.direction != DIRECTION_BACKEND);
            let belongs = timeouts.idle.contains_key(&flow.service) && self.belongs(flow);
            // UDP has shown no more than one packet.
            let limit = timeouts
                .patience
                .with(flow.state, timeouts.patience.opening)
                .min(timeouts.patience.opening);
            if !belongs || ticks_since(now, flow.last_seen) > limit {
                over.push((*key, flow.direction != DIRECTION_BACKEND));
            }
        })?;
        for (key, is_client) in over {
            if opening.remove(&key)? {
                sweep.expired += u64::from(is_client);
            }
        }
        Ok(())
    }

    /// The tables of stateless services before a sweep.
    fn looks(&self, timeouts: &Timeouts) -> StdHashMap<u32, Look> {
        let of_table = |(number, table): (&u32, &Table)| {
            let is_closing = |place: &u32| {
                let slot = self.slot(table.first + place);
                slot.previous == NO_BACKEND && slot.backend != NO_BACKEND
            };
            let look = Look {
                table: *table,
                recorded: self.recorded(*number),
                closing: (0..table.len).filter(is_closing).collect(),
                strangers: HashSet::new(),
            };
            (*number, look)
        };
        timeouts.stateless.iter().map(of_table).collect()
    }

    /// What a sweep has shown of a table.
    fn settling(&self, number: u32, look: Look) -> Settling {
        let is_settled = |place: &u32| self.slot(look.table.first + place).is_settled();
        let strayed = look.strangers.iter().copied().filter(is_settled).collect();
        let mut settled = look.closing;
        // One more may have come behind the sweep's back: another time, then.
        if self.recorded(number) != look.recorded {
            settled.clear();
        }
        settled.retain(|place| !look.strangers.contains(place));
        Settling {
            version: look.table.version,
            settled,
            strayed,
        }
    }

    fn slot(&self, number: u32) -> Slot {
        self.slots.read(number)
    }

    fn recorded(&self, service: u32) -> u64 {
        let offset = std::mem::offset_of!(Cursor, recorded);
        self.cursors
            .atomic_u64(service, offset)
            .load(Ordering::Acquire)
    }

    /// Whether the flow's backend is still the one it was placed on.
    fn belongs<A>(&self, flow: &Flow<A>) -> bool {
        if flow.backend >= self.backends.len() {
            return false;
        }
        let backend = self.backends.read(flow.backend);
        backend.service == flow.service && u32::from(backend.generation) == flow.generation
    }

    /// Corrects what has been wrong in two sweeps in a row. One alone proves nothing: the tables
    /// change while they are read.
    fn correct(&mut self, counts: &StdHashMap<u32, Counts>, sweep: &mut Sweep) {
        let mut drift = StdHashMap::new();
        for number in 1..self.load.len() {
            if self.backends.read(number).service == 0 {
                continue;
            }
            let load = self.load.read(number);
            let seen = counts.get(&number).copied().unwrap_or_default();
            let mut wrong = [
                seen[0] - load.active.cast_signed(),
                seen[1] - load.inactive.cast_signed(),
                seen[2] - load.held.cast_signed(),
            ];
            if wrong == [0; 3] {
                continue;
            }
            let before = self.drift.get(&number).copied().unwrap_or_default();
            for (counter, (wrong, before)) in wrong.iter_mut().zip(before).enumerate() {
                if *wrong * before > 0 {
                    let step = wrong.signum() * wrong.abs().min(before.abs());
                    self.add(number, counter, step);
                    *wrong -= step;
                    sweep.drift += step.unsigned_abs();
                }
            }
            drift.insert(number, wrong);
        }
        self.drift = drift;
    }

    /// Adds to one of the counters of a backend, in the order of [`Load`].
    fn add(&self, backend: u32, counter: usize, change: i64) {
        self.load
            .atomic_u64(backend, counter * 8)
            .fetch_add(change.cast_unsigned(), Ordering::Relaxed);
    }

    /// Calls `f` for every client's flow until it returns `false`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list the entries.
    pub fn each(&self, mut f: impl FnMut(&Connection) -> bool) -> Result<()> {
        let mut go_on = true;
        self.each_recorded(&self.flows4, &mut go_on, &mut f)?;
        self.each_opening(&self.opening4, &mut go_on, &mut f)?;
        self.each_recorded(&self.flows6, &mut go_on, &mut f)?;
        self.each_opening(&self.opening6, &mut go_on, &mut f)
    }
}

impl Flows {
    /// Calls `f` for the clients' entries of a flow table, while it returns `true`.
    fn each_recorded<A>(
        &self,
        table: &FlowTable<A>,
        go_on: &mut bool,
        f: &mut impl FnMut(&Connection) -> bool,
    ) -> Result<()>
    where
        A: Address,
        Entry<A>: bytemuck::Pod,
        FlowKey<A>: bytemuck::Pod,
        Flow<A>: bytemuck::Pod,
    {
        if !*go_on {
            return Ok(());
        }
        let now = now();
        let flows = table.view();
        table.each(|_, key, flow| {
            if *go_on && flow.direction != DIRECTION_BACKEND {
                let reply = flows.get(&flow.opposite(key.protocol)).ok().flatten();
                let heard = reply.map(|reply| reply.last_seen);
                *go_on = f(&connection(&self.backends, now, (key, flow), heard));
            }
        })?;
        Ok(())
    }

    /// The same for a table of half-open flows.
    fn each_opening<A>(
        &self,
        opening: &HashMap<FlowKey<A>, Flow<A>>,
        go_on: &mut bool,
        f: &mut impl FnMut(&Connection) -> bool,
    ) -> Result<()>
    where
        A: Address,
        FlowKey<A>: bytemuck::Pod,
        Flow<A>: bytemuck::Pod,
    {
        if !*go_on {
            return Ok(());
        }
        let now = now();
        opening.iter_batches(|key, flow| {
            if *go_on && flow.direction != DIRECTION_BACKEND {
                let reply = opening.get(&flow.opposite(key.protocol)).ok().flatten();
                let heard = reply.map(|reply| reply.last_seen);
                *go_on = f(&connection(&self.backends, now, (key, flow), heard));
            }
        })?;
        Ok(())
    }

    /// Removes the flows that `wanted` says of, and returns how many.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list or remove entries.
    pub fn flush(&self, mut wanted: impl FnMut(&Connection) -> bool) -> Result<u64> {
        let mut found = Vec::new();
        self.each(|flow| {
            if wanted(flow) {
                found.push((u32::from(flow.protocol), flow.client, flow.vip));
            }
            true
        })?;
        let mut flushed = 0;
        let (flows4, flows6) = (self.flows4.view(), self.flows6.view());
        for (protocol, client, vip) in found {
            let (sport, dport) = (client.port().to_be(), vip.port().to_be());
            let removed = match (client.ip(), vip.ip()) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let key = FlowKey {
                        src: from_ipv4(src),
                        dst: from_ipv4(dst),
                        sport,
                        dport,
                        protocol,
                    };
                    self.remove(&flows4, &self.opening4, &key)?
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let key = FlowKey {
                        src: from_ipv6(src),
                        dst: from_ipv6(dst),
                        sport,
                        dport,
                        protocol,
                    };
                    self.remove(&flows6, &self.opening6, &key)?
                }
                _ => false,
            };
            flushed += u64::from(removed);
        }
        Ok(flushed)
    }

    /// Removes a client's flow from the first of the tables that has it; only what is in the flow
    /// table itself is counted as a connection.
    fn remove<A>(
        &self,
        flows: &View<'_, A>,
        opening: &HashMap<FlowKey<A>, Flow<A>>,
        key: &FlowKey<A>,
    ) -> Result<bool>
    where
        A: Address,
        Entry<A>: bytemuck::Pod,
        FlowKey<A>: bytemuck::Pod,
        Flow<A>: bytemuck::Pod,
    {
        if let Some(flow) = flows.remove(key)? {
            flows.remove(&flow.opposite(key.protocol))?;
            if self.belongs(&flow) {
                for counter in counters(flow.state) {
                    self.add(flow.backend, counter, -1);
                }
            }
            return Ok(true);
        }
        let Some(flow) = opening.take(key)? else {
            return Ok(false);
        };
        opening.remove(&flow.opposite(key.protocol))?;
        Ok(true)
    }
}

/// A client's flow as an operator sees it; `heard` is when its backend was last seen.
fn connection<A: Address>(
    backends: &SharedArray<Backend>,
    now: u32,
    (key, flow): (&FlowKey<A>, &Flow<A>),
    heard: Option<u32>,
) -> Connection {
    let silent = ticks_since(now, flow.last_seen)
        .min(heard.map_or(u32::MAX, |heard| ticks_since(now, heard)));
    Connection {
        protocol: key.protocol as u8,
        state: flow.state,
        client: address(key.src, key.sport),
        vip: address(key.dst, key.dport),
        nat_source: address(flow.src, flow.sport),
        backend: destination(flow, || {
            (flow.backend < backends.len()).then(|| backends.read(flow.backend))
        }),
        backend_number: flow.backend,
        service_number: flow.service,
        silent,
    }
}

/// Where the packets of a client's flow go. Where they keep the VIP as their destination, the
/// backend's record knows; unless it is another backend's by now.
fn destination<A: Address>(flow: &Flow<A>, record: impl Fn() -> Option<Backend>) -> SocketAddr {
    if !forward::translates(flow.forward)
        && let Some(backend) = record()
        && u32::from(backend.generation) == flow.generation
    {
        let port = u16::from_be(flow.dport);
        return SocketAddr::new(to_ip(backend.family, &backend.addr), port);
    }
    address(flow.dst, flow.dport)
}

fn address<A: Address>(address: A, port: u16) -> SocketAddr {
    let ip: IpAddr = to_ip(A::FAMILY, &address.widen());
    SocketAddr::new(ip, u16::from_be(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_become_ticks_and_never_wrap() {
        assert_eq!(ticks(Duration::from_nanos(TICK_NS)), 1);
        assert_eq!(ticks(Duration::from_nanos(TICK_NS + 1)), 2);
        assert_eq!(ticks(Duration::from_secs(1)), 954);
        assert_eq!(ticks(Duration::MAX), u32::MAX / 2);
        assert!((seconds(ticks(Duration::from_secs(900))) - 900.0).abs() < 0.01);
    }

    #[test]
    fn a_flow_that_keeps_the_vip_shows_its_backend() {
        use bytemuck::Zeroable as _;
        use lb_common::addr::{FAMILY_V6, from_ip, from_ipv4};
        let vip = from_ipv4("198.51.100.10".parse().unwrap());
        let flow = |forward| Flow {
            dst: vip,
            dport: 80_u16.to_be(),
            generation: 7,
            forward,
            ..Flow::zeroed()
        };
        let record = |generation| Backend {
            addr: from_ip("2001:db8::11".parse().unwrap()),
            family: FAMILY_V6,
            generation,
            ..Backend::zeroed()
        };
        let shown =
            |mode, generation| destination(&flow(mode), || Some(record(generation))).to_string();
        for mode in [forward::DSR, forward::IPIP, forward::GUE] {
            assert_eq!(shown(mode, 7), "[2001:db8::11]:80");
            assert_eq!(
                shown(mode, 8),
                "198.51.100.10:80",
                "another's record by now"
            );
        }
        for mode in [forward::NAT, forward::DNAT] {
            assert_eq!(shown(mode, 7), "198.51.100.10:80");
        }
    }

    #[test]
    fn the_clock_is_the_data_planes() {
        let before = now();
        std::thread::sleep(Duration::from_millis(30));
        let passed = ticks_since(now(), before);
        assert!((10..10_000).contains(&passed), "{passed}");
    }
}
