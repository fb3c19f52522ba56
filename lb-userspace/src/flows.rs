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
    mem::offset_of,
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

/// A backend by its number, and by the generation that tells it from others who had it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Owner {
    number: u32,
    generation: u16,
}

/// Connections of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    recorded: i64,
    active: i64,
    held: i64,
}

impl Counts {
    /// Of one flow in `state`.
    fn of(state: u8) -> Self {
        Self {
            recorded: 1,
            active: state::is_active(state).into(),
            held: state::is_held(state).into(),
        }
    }

    /// As the data plane counts them.
    fn counted(load: &Load) -> Self {
        let difference = |more: u64, less: u64| more.wrapping_sub(less).cast_signed();
        Self {
            recorded: difference(load.begun, load.ended),
            active: difference(load.opened, load.closed),
            held: difference(load.begun, load.released),
        }
    }

    /// How often each has changed between two looks at the counters.
    fn changes(before: &Load, after: &Load) -> Self {
        let more = |before: u64, after: u64| after.wrapping_sub(before).cast_signed();
        let begun = more(before.begun, after.begun);
        Self {
            recorded: begun + more(before.ended, after.ended),
            active: more(before.opened, after.opened) + more(before.closed, after.closed),
            held: begun + more(before.released, after.released),
        }
    }

    fn with(self, other: Self, f: impl Fn(i64, i64) -> i64) -> Self {
        Self {
            recorded: f(self.recorded, other.recorded),
            active: f(self.active, other.active),
            held: f(self.held, other.held),
        }
    }
}

/// By how much the counters of a backend are wrong at least: `seen` are the flows that a sweep saw
/// which began when the counters were `before` and ended when they were `after`, without those it
/// removed itself, which are `removed`.
///
/// Each change in between may have come before the sweep saw its flow, or afterwards.
fn proven_drift(seen: Counts, before: &Load, after: &Load, removed: Counts) -> Counts {
    let wrong = seen.with(Counts::counted(after), |seen, counted| seen - counted);
    let changes = Counts::changes(before, after).with(removed, |all, ours| (all - ours).max(0));
    wrong.with(changes, |wrong, changes| {
        wrong.signum() * (wrong.abs() - changes).max(0)
    })
}

/// What has been wrong in the same direction in two sweeps.
fn repeated(drift: Counts, before: Counts) -> Counts {
    drift.with(before, |now, before| {
        if now.signum() == before.signum() {
            now.signum() * now.abs().min(before.abs())
        } else {
            0
        }
    })
}

/// What to add to a backend's counters so that its connections are `step` more. The counters only grow: what
/// is too much in one of them goes into another.
fn correction(step: Counts) -> Load {
    let more = |n: i64| n.max(0).unsigned_abs();
    let held = step.held - step.recorded;
    Load {
        begun: more(step.recorded) + more(held),
        ended: more(-step.recorded) + more(held),
        opened: more(step.active),
        closed: more(-step.active),
        released: more(-step.recorded) + more(-held),
        ..bytemuck::Zeroable::zeroed()
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
    /// Slots that have a flow which only its record leads right.
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

/// Whether a flow would not go on as it does if it had no record: `slot` has another backend, the service
/// another forward mode than once, or in `dnat` the client's port was changed, because another flow had
/// it.
fn is_stranger<A>(slot: Slot, mode: u8, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    let has_other_port = mode == forward::DNAT && flow.sport != key.sport;
    slot.backend != flow.backend || flow.forward != mode || has_other_port
}

/// When a flow began, or had its last answer.
const fn begun<A>(flow: &Flow<A>) -> u32 {
    if flow.direction == DIRECTION_BACKEND {
        flow.last_seen
    } else {
        flow.created()
    }
}

/// Clients of services with affinity who have flows, and the backend of one of these with its
/// generation.
type Clients<A> = StdHashMap<ClientKey<A>, (u32, u32)>;

/// What a sweep gathers.
struct Gathered<'a> {
    sweep: &'a mut Sweep,
    seen: &'a mut StdHashMap<u32, Counts>,
    removed: &'a mut StdHashMap<u32, Counts>,
    looks: &'a mut StdHashMap<u32, Look>,
}

/// Ticks within which a flow has begun that a sweep need not know the service of.
const FRESH: u32 = 2 * lb_common::abi::TICKS_PER_SECOND;

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
    drift: StdHashMap<Owner, Counts>,
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
        let (mut seen, mut removed) = (StdHashMap::new(), StdHashMap::new());
        let before = self.loads();
        let mut looks = self.looks(timeouts);
        if looks.values().any(|look| !look.closing.is_empty()) {
            // A flow whose recording had begun can be found when this is over.
            std::thread::sleep(RECORDING);
        }
        let mut gathered = Gathered {
            sweep: &mut sweep,
            seen: &mut seen,
            removed: &mut removed,
            looks: &mut looks,
        };
        let clients = self.sweep_table(&self.flows4, timeouts, &mut gathered)?;
        refresh(&self.affinity4, clients)?;
        let clients = self.sweep_table(&self.flows6, timeouts, &mut gathered)?;
        refresh(&self.affinity6, clients)?;
        self.sweep_opening(&self.opening4, timeouts, &mut sweep)?;
        self.sweep_opening(&self.opening6, timeouts, &mut sweep)?;
        self.correct(&before, &seen, &removed, &mut sweep);
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
            seen,
            removed,
            looks,
        } = gathered;
        let mut clients = Clients::new();
        let now = now();
        let mut over = Vec::new();
        let mut halves = Vec::new();
        table.sweep(|key, flow| {
            let idle = timeouts.idle.get(&flow.service).copied();
            let has_backend = self.belongs(flow);
            if idle.is_none() && has_backend && ticks_since(now, begun(flow)) < FRESH {
                // Perhaps of a service that has come since the sweep began.
                return;
            }
            let belongs = idle.is_some() && has_backend;
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
                let seen = seen.entry(flow.backend).or_default();
                *seen = seen.with(Counts::of(flow.state), |sum, one| sum + one);
                if let Some(look) = looks.get_mut(&flow.service) {
                    let place = look.place(key);
                    let slot = self.slot(look.table.first + place);
                    if is_stranger(slot, look.table.forward, key, flow) {
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
                clients.insert(client, (flow.backend, flow.generation.into()));
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
                    self.count_end(&last);
                    let one = Counts::of(last.state);
                    let seen = seen.entry(last.backend).or_default();
                    *seen = seen.with(one, |sum, one| sum - one);
                    let removed = removed.entry(last.backend).or_default();
                    *removed = removed.with(one, |sum, one| sum + one);
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
            // As in `sweep_table`.
            let known =
                timeouts.idle.contains_key(&flow.service) || ticks_since(now, begun(flow)) < FRESH;
            let belongs = known && self.belongs(flow);
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
        backend.service == flow.service && backend.generation == flow.generation
    }

    /// The counters of each backend's connections.
    fn loads(&self) -> Vec<(Owner, Load)> {
        let owners = (1..self.load.len()).filter_map(|number| self.owner(number));
        owners
            .map(|owner| (owner, self.load.read(owner.number)))
            .collect()
    }

    /// Who has a number now.
    fn owner(&self, number: u32) -> Option<Owner> {
        let backend = self.backends.read(number);
        (backend.service != 0).then_some(Owner {
            number,
            generation: backend.generation,
        })
    }

    /// Corrects what has been wrong in two sweeps in a row. One alone proves little: a CPU writes an
    /// entry and its backend's counters one after the other.
    fn correct(
        &mut self,
        before: &[(Owner, Load)],
        seen: &StdHashMap<u32, Counts>,
        removed: &StdHashMap<u32, Counts>,
        sweep: &mut Sweep,
    ) {
        let mut drifts = StdHashMap::new();
        for (owner, before) in before {
            let number = owner.number;
            // Another one's counters begin at zero.
            if self.owner(number) != Some(*owner) {
                continue;
            }
            let of =
                |counts: &StdHashMap<u32, Counts>| counts.get(&number).copied().unwrap_or_default();
            let drift = proven_drift(of(seen), before, &self.load.read(number), of(removed));
            if drift == Counts::default() {
                continue;
            }
            let step = repeated(drift, self.drift.get(owner).copied().unwrap_or_default());
            self.add_all(number, &correction(step));
            sweep.drift += step.recorded.unsigned_abs()
                + step.active.unsigned_abs()
                + step.held.unsigned_abs();
            drifts.insert(*owner, drift.with(step, |drift, step| drift - step));
        }
        self.drift = drifts;
    }

    /// Counts that a flow is recorded no more.
    fn count_end<A>(&self, flow: &Flow<A>) {
        let end = Load {
            ended: 1,
            closed: state::is_active(flow.state).into(),
            released: state::is_held(flow.state).into(),
            ..bytemuck::Zeroable::zeroed()
        };
        self.add_all(flow.backend, &end);
    }

    /// Adds to the counters of a backend's connections.
    fn add_all(&self, backend: u32, more: &Load) {
        for (offset, more) in [
            (offset_of!(Load, begun), more.begun),
            (offset_of!(Load, ended), more.ended),
            (offset_of!(Load, opened), more.opened),
            (offset_of!(Load, closed), more.closed),
            (offset_of!(Load, released), more.released),
        ] {
            if more != 0 {
                self.load
                    .atomic_u64(backend, offset)
                    .fetch_add(more, Ordering::Relaxed);
            }
        }
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
                self.count_end(&flow);
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
        && backend.generation == flow.generation
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
    fn flows_that_only_their_record_leads_right_are_strangers() {
        use bytemuck::Zeroable as _;
        let key = FlowKey {
            sport: 1000,
            ..FlowKey::<u32>::zeroed()
        };
        let is_stranger = |mode, change: fn(&mut Flow<u32>)| {
            let mut flow = Flow {
                backend: 3,
                forward: mode,
                sport: key.sport,
                ..Flow::zeroed()
            };
            change(&mut flow);
            is_stranger(Slot::settled(3), mode, &key, &flow)
        };
        for mode in [forward::DNAT, forward::DSR, forward::IPIP, forward::GUE] {
            assert!(!is_stranger(mode, |_| {}));
            assert!(is_stranger(mode, |flow| flow.backend = 4));
            assert!(is_stranger(mode, |flow| flow.forward = forward::NAT));
        }
        assert!(is_stranger(forward::DNAT, |flow| flow.sport = 1001));
        assert!(!is_stranger(forward::GUE, |flow| flow.sport = 1001));
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

    /// Counters of a backend that has `recorded` connections, all of them active.
    fn load(begun: u64, ended: u64) -> Load {
        Load {
            begun,
            ended,
            opened: begun,
            closed: ended,
            released: ended,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn counts(n: i64) -> Counts {
        Counts {
            recorded: n,
            active: n,
            held: n,
        }
    }

    #[test]
    fn what_changes_during_a_sweep_proves_no_drift() {
        let none = counts(0);
        // Three came and two went; the sweep may have seen any of them.
        let (before, after) = (load(10, 3), load(13, 5));
        for seen in 3..=13 {
            assert_eq!(proven_drift(counts(seen), &before, &after, none), none);
        }
        assert_eq!(proven_drift(counts(14), &before, &after, none), counts(1));
        assert_eq!(proven_drift(counts(2), &before, &after, none), counts(-1));
        // A connection that comes and goes again and again is counted as it was, and was seen.
        assert_eq!(
            proven_drift(counts(1), &load(7, 7), &load(8, 8), none),
            none
        );
    }

    #[test]
    fn each_count_has_changes_of_its_own() {
        let before: Load = bytemuck::Zeroable::zeroed();
        // Eight came, one went; three opened, of which two closed; four were released.
        let after = Load {
            begun: 8,
            ended: 1,
            opened: 3,
            closed: 2,
            released: 4,
            ..before
        };
        let (nothing, seen) = (counts(0), |recorded, active, held| Counts {
            recorded,
            active,
            held,
        });
        assert_eq!(Counts::counted(&after), seen(7, 1, 4));
        assert_eq!(Counts::changes(&before, &after), seen(9, 5, 12));
        let drift = proven_drift(seen(17, -5, 17), &before, &after, nothing);
        assert_eq!(drift, seen(1, -1, 1));
    }

    #[test]
    fn what_the_sweep_removes_itself_hides_no_drift() {
        let (before, after) = (load(10, 3), load(10, 5));
        assert_eq!(
            proven_drift(counts(5), &before, &after, counts(2)),
            counts(0)
        );
        assert_eq!(
            proven_drift(counts(4), &before, &after, counts(2)),
            counts(-1)
        );
        assert_eq!(
            proven_drift(counts(4), &before, &after, counts(0)),
            counts(0)
        );
    }

    #[test]
    fn a_correction_is_the_difference_it_is_made_for() {
        for recorded in -3..=3 {
            for active in -3..=3 {
                for held in -3..=3 {
                    let step = Counts {
                        recorded,
                        active,
                        held,
                    };
                    assert_eq!(Counts::counted(&correction(step)), step);
                }
            }
        }
    }

    #[test]
    fn only_what_is_wrong_twice_is_corrected() {
        assert_eq!(repeated(counts(3), counts(2)), counts(2));
        assert_eq!(repeated(counts(-1), counts(-4)), counts(-1));
        for before in [-2, 0] {
            assert_eq!(repeated(counts(3), counts(before)), counts(0));
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
