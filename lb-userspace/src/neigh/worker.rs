//! The task that keeps the table true and tells of changes.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tracing::{debug, error, warn};

use super::{
    Error, Resolution,
    kernel::{self, Events, Heard, Kernel},
    table::{Hop, Path, Reachability, Table, contains},
};

/// Questions under way at a time; their answers must fit the socket's receive buffer.
const CONCURRENCY: usize = 64;
/// How often neighbours that did not answer are asked again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a stale entry is confirmed on kernels that do not do so by themselves. The same as
/// the kernel's own `interval_probe_time_ms`.
const CONFIRM: Duration = Duration::from_secs(5);
/// How often everything is asked anew, whatever events said.
const RECONCILE: Duration = Duration::from_secs(30);

pub(super) fn spawn(
    wanted: watch::Receiver<HashSet<IpAddr>>,
    local: watch::Sender<Arc<HashSet<IpAddr>>>,
    events: mpsc::Sender<(IpAddr, Resolution)>,
) -> Result<(), Error> {
    // Listen first: what changes while the tables are read is then not missed.
    let heard = Kernel::listen()?;
    let kernel = Kernel::connect()?;
    let worker = Worker {
        kernel,
        local,
        events,
        table: Table::default(),
        targets: HashMap::new(),
        users: HashMap::new(),
        asked: HashMap::new(),
        reroute: HashSet::new(),
        review: HashSet::new(),
        unused: HashSet::new(),
        stale_tables: true,
        deaf: false,
    };
    tokio::spawn(worker.run(wanted, heard));
    Ok(())
}

#[derive(Default)]
struct Target {
    path: Option<Path>,
    /// Interface of the last usable route.
    through: Option<u32>,
    said: Option<Resolution>,
}

struct Worker {
    kernel: Kernel,
    local: watch::Sender<Arc<HashSet<IpAddr>>>,
    events: mpsc::Sender<(IpAddr, Resolution)>,
    table: Table,
    targets: HashMap<IpAddr, Target>,
    /// Which targets go over a neighbour.
    users: HashMap<Hop, HashSet<IpAddr>>,
    /// When a neighbour was last asked for.
    asked: HashMap<Hop, Instant>,
    /// Targets whose route must be asked anew.
    reroute: HashSet<IpAddr>,
    /// Targets to look at again.
    review: HashSet<IpAddr>,
    /// Neighbours that lost their last target.
    unused: HashSet<Hop>,
    /// Events were lost, or never heard: read everything.
    stale_tables: bool,
    /// Nothing more will be heard.
    deaf: bool,
}

impl Worker {
    async fn run(mut self, mut wanted: watch::Receiver<HashSet<IpAddr>>, mut heard: Events) {
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reconcile = tokio::time::interval(RECONCILE);
        reconcile.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let first = wanted.borrow_and_update().clone();
        self.set_targets(first);
        loop {
            tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = wanted.borrow_and_update().clone();
                    self.set_targets(targets);
                }
                Some(event) = heard.next() => {
                    self.hear(event);
                    // All that is there before anything is said: only the last state counts.
                    while let Some(Some(event)) = heard.next().now_or_never() {
                        self.hear(event);
                    }
                    if self.deaf {
                        error!("the netlink socket closed; next hops are no longer kept fresh");
                        return;
                    }
                }
                _ = retry.tick() => self.retry().await,
                _ = reconcile.tick() => self.stale_tables = true,
                () = self.events.closed() => return,
            }
            if self.stale_tables {
                match self.read_tables().await {
                    Ok(()) => self.stale_tables = false,
                    // The next round, a second away at most, tries again.
                    Err(error) => {
                        warn!("{error}");
                        continue;
                    }
                }
            }
            if self.settle().await.is_err() {
                return;
            }
        }
    }

    fn set_targets(&mut self, wanted: HashSet<IpAddr>) {
        let gone: Vec<_> = self
            .targets
            .keys()
            .filter(|target| !wanted.contains(target))
            .copied()
            .collect();
        for target in gone {
            self.leave_hop(target);
            self.targets.remove(&target);
            self.reroute.remove(&target);
            self.review.remove(&target);
        }
        for target in wanted {
            if let std::collections::hash_map::Entry::Vacant(entry) = self.targets.entry(target) {
                entry.insert(Target::default());
                self.reroute.insert(target);
            }
        }
    }

    fn hear(&mut self, event: Heard) {
        let message = match event {
            Heard::Message(message) => message,
            Heard::NextHop => return self.reroute_all(),
            Heard::Lost => {
                debug!("netlink events were lost; reading everything");
                self.stale_tables = true;
                return;
            }
            Heard::Closed => {
                self.deaf = true;
                return;
            }
        };
        match message {
            RouteNetlinkMessage::NewNeighbour(message) => {
                if let Some((hop, entry)) = kernel::neighbour(&message) {
                    self.table.neighbours.insert(hop, entry);
                    self.review_users(hop);
                }
            }
            RouteNetlinkMessage::DelNeighbour(message) => {
                if let Some((hop, _)) = kernel::neighbour(&message) {
                    self.table.neighbours.remove(&hop);
                    self.review_users(hop);
                }
            }
            RouteNetlinkMessage::NewLink(message) => {
                let Some(link) = kernel::interface(&message) else {
                    return;
                };
                let index = link.index;
                let up = link.up;
                let before = self.table.links.insert(index, link);
                if before.as_ref().map(|link| link.up) != Some(up) {
                    // The kernel says nothing of the routes it drops with a link.
                    self.reroute_all();
                } else if before.as_ref() != self.table.links.get(&index) {
                    self.review_interface(index);
                }
            }
            RouteNetlinkMessage::DelLink(message) => {
                if kernel::interface(&message).is_some() {
                    self.table.links.remove(&message.header.index);
                    self.reroute_all();
                }
            }
            RouteNetlinkMessage::NewAddress(message) => {
                if let Some(held) = kernel::address(&message) {
                    if self.table.addresses.insert(held) {
                        self.say_addresses();
                    }
                    self.reroute_all();
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                if let Some(held) = kernel::address(&message) {
                    if self.table.addresses.remove(&held) {
                        self.say_addresses();
                    }
                    self.reroute_all();
                }
            }
            RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
                if let Some((prefix, length)) = kernel::concerned(&message) {
                    let concerned = self
                        .targets
                        .keys()
                        .filter(|target| contains(prefix, length, **target));
                    self.reroute.extend(concerned);
                }
            }
            // Rules: whatever they change, all routes may be others now.
            _ => self.reroute_all(),
        }
    }

    fn reroute_all(&mut self) {
        self.reroute.extend(self.targets.keys());
    }

    fn review_users(&mut self, hop: Hop) {
        if let Some(users) = self.users.get(&hop) {
            self.review.extend(users);
        }
    }

    fn review_interface(&mut self, index: u32) {
        for (hop, users) in &self.users {
            let link = self.table.links.get(&hop.ifindex);
            // What is below the interface of a VLAN belongs to the answer too.
            if hop.ifindex == index || link.is_some_and(|link| link.vlan.is_some()) {
                self.review.extend(users);
            }
        }
    }

    fn say_addresses(&self) {
        let now: HashSet<_> = self.table.addresses.iter().map(|held| held.1).collect();
        self.local.send_if_modified(|said| {
            let changed = **said != now;
            *said = Arc::new(now);
            changed
        });
    }

    /// Reads links, addresses and neighbours whole.
    async fn read_tables(&mut self) -> Result<(), Error> {
        self.table.links = self.kernel.interfaces().await?;
        self.table.addresses = self.kernel.addresses().await?;
        self.table.neighbours = self.kernel.neighbours().await?;
        self.say_addresses();
        self.reroute_all();
        // Entries of targets long gone, or of an earlier process with other targets.
        let ours = self.table.neighbours.iter().filter(|(_, e)| e.kept_by_us);
        self.unused.extend(ours.map(|(hop, _)| *hop));
        Ok(())
    }

    /// Asks the routes that may have changed, says what follows, asks for missing neighbours.
    async fn settle(&mut self) -> Result<(), Closed> {
        let questions = std::mem::take(&mut self.reroute);
        if !questions.is_empty() {
            let kernel = &self.kernel;
            let answers: Vec<_> = stream::iter(questions)
                .map(|target| async move { (target, kernel.route(target).await) })
                .buffer_unordered(CONCURRENCY)
                .collect()
                .await;
            for (target, answer) in answers {
                match answer {
                    Ok(path) => self.set_path(target, path),
                    Err(error) => {
                        debug!("{target}: {error}");
                        self.reroute.insert(target);
                    }
                }
            }
        }
        let mut missing = HashSet::new();
        for target in std::mem::take(&mut self.review) {
            let Some(state) = self.targets.get_mut(&target) else {
                continue;
            };
            let Some(path) = &state.path else { continue };
            if let Path::Way(way) = path
                && !self.table.neighbours.contains_key(&way.hop)
            {
                missing.insert(way.hop);
            }
            let now = self
                .table
                .resolve(target, path, state.said.as_ref(), state.through);
            if let Some(now) = now
                && state.said.as_ref() != Some(&now)
            {
                state.said = Some(now.clone());
                self.events.send((target, now)).await.map_err(|_| Closed)?;
            }
        }
        // The answer may only be on its way.
        missing.retain(|hop| self.not_asked_for(*hop, RETRY / 2));
        self.ask(missing).await;
        self.release().await;
        Ok(())
    }

    fn set_path(&mut self, target: IpAddr, path: Path) {
        self.review.insert(target);
        let Some(state) = self.targets.get(&target) else {
            return;
        };
        if state.path.as_ref() == Some(&path) {
            return;
        }
        self.leave_hop(target);
        if let Path::Way(way) = &path {
            self.users.entry(way.hop).or_default().insert(target);
        }
        if let Some(state) = self.targets.get_mut(&target) {
            if let Path::Way(way) = &path {
                state.through = Some(way.hop.ifindex);
            }
            state.path = Some(path);
        }
    }

    fn leave_hop(&mut self, target: IpAddr) {
        let state = self.targets.get(&target);
        let Some(Path::Way(way)) = state.and_then(|state| state.path.as_ref()) else {
            return;
        };
        let Some(users) = self.users.get_mut(&way.hop) else {
            return;
        };
        users.remove(&target);
        if users.is_empty() {
            self.users.remove(&way.hop);
            self.asked.remove(&way.hop);
            self.table.refused.remove(&way.hop);
            self.unused.insert(way.hop);
        }
    }

    /// Asks again for neighbours that are missing or silent, and confirms those that age.
    async fn retry(&mut self) {
        let due = self.users.keys().copied().filter(|hop| {
            let usable = self.table.links.get(&hop.ifindex);
            if !usable.is_some_and(|link| link.up && link.mac.is_some()) {
                return false;
            }
            let Some(entry) = self.table.neighbours.get(hop) else {
                return true;
            };
            match entry.reachability {
                Reachability::Failed => true,
                Reachability::Stale(_) => !entry.managed && self.not_asked_for(*hop, CONFIRM),
                Reachability::Known(_) | Reachability::Pending => false,
            }
        });
        let due: HashSet<_> = due.collect();
        self.ask(due).await;
    }

    fn not_asked_for(&self, hop: Hop, time: Duration) -> bool {
        let asked = self.asked.get(&hop);
        asked.is_none_or(|asked| asked.elapsed() > time)
    }

    async fn ask(&mut self, hops: HashSet<Hop>) {
        if hops.is_empty() {
            return;
        }
        let now = Instant::now();
        let kernel = &self.kernel;
        let answers: Vec<_> = stream::iter(hops)
            .map(|hop| async move { (hop, kernel.ask(hop).await) })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (hop, answer) in answers {
            self.asked.insert(hop, now);
            let changed = match answer {
                Ok(()) => self.table.refused.remove(&hop).is_some(),
                Err(error) => {
                    let reason = self.refusal(hop, &error);
                    self.table.refused.insert(hop, reason.clone()) != Some(reason)
                }
            };
            if changed {
                // Looked at in the next round; a refusal is no emergency.
                self.review_users(hop);
            }
        }
    }

    fn refusal(&self, hop: Hop, error: &Error) -> String {
        let family = if hop.address.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        };
        match error {
            Error::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOBUFS) => {
                format!(
                    "the kernel's neighbour table is full; raise it with \
                     \"sysctl net.{family}.neigh.default.gc_thresh3=32768\""
                )
            }
            Error::Refused { source, .. } => {
                let link = self.table.links.get(&hop.ifindex);
                let name = link.map_or("an interface that is gone", |link| &link.name);
                format!("cannot ask for {} on {name}: {source}", hop.address)
            }
            error => error.to_string(),
        }
    }

    /// Lets neighbours age that nobody uses any more.
    async fn release(&mut self) {
        for hop in std::mem::take(&mut self.unused) {
            let kept = self.table.neighbours.get(&hop);
            if !self.users.contains_key(&hop)
                && kept.is_some_and(|entry| entry.kept_by_us)
                && let Err(error) = self.kernel.release(hop).await
            {
                debug!("{}: {error}", hop.address);
            }
        }
    }
}

/// Nobody listens any more.
struct Closed;
