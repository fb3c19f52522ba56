//! The daemon: one task that takes events in turn and keeps the maps true to them.
//!
//! Events are results of checks, next hops, the host's addresses, requests from the API, signals,
//! and a timer. Each changes the model; services it touched are then reconciled, however many
//! events came in the meantime. Whatever takes long (listing or sweeping the flow tables) runs
//! beside the task.

mod commands;
mod control;
mod hook;
mod probes;
mod start;
mod told;
mod traffic;
mod views;

use crate::{
    api::{Failure, types},
    config::{self, Check, Config, Endpoint, Health, Listen, Ports, environment},
    dataplane::{self, Dataplane},
    flows::{self, Flows, Sweep, Timeouts},
    health::{Checker, Target},
    model::{
        Admin, Backend, BackendKey, Change, CheckResult, Model, Path as Way, ServiceKey, State,
    },
    neigh::{self, Neighbours, NextHop, Resolution},
    reconcile::{self, Hop, Reconciler, apply},
    scheduler,
};
use anyhow::{Context as _, Result};
use lb_common::{
    abi::Settings,
    addr::{from_ipv4, from_ipv6},
    backend::LOCAL,
    service::forward,
    stats::DropReason,
};
use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};
use tracing::{debug, error, info, warn};

pub use start::run;

use probes::Probes;
use told::Told;

/// Shortest time from one sweep of the flow tables to the next.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How often weights that rise and times that end are looked at.
const TICK: Duration = Duration::from_millis(100);
/// A sweep may take one part in this many of the time.
const SWEEP_SHARE: u32 = 10;
/// How long the flows of a backend that was removed from the configuration may go on.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// Events that are taken before the maps are reconciled.
const BATCH: usize = 4096;

/// What a request does with the daemon, on its task.
type Job = Box<dyn FnOnce(&mut Daemon) + Send>;

/// Everything the daemon owns.
struct Daemon {
    /// The configuration file.
    file: PathBuf,
    config: Config,
    dataplane: Dataplane,
    model: Model,
    reconciler: Reconciler,
    checker: Checker<CheckKey>,
    hook: hook::Hook,
    traffic: traffic::Traffic,
    probes: Probes,
    neighbours: Neighbours,
    /// The way to each address, as the data plane needs it.
    hops: HashMap<IpAddr, Hop>,
    /// The last word about each address, to be judged anew when the set of interfaces changes.
    resolutions: HashMap<IpAddr, Resolution>,
    /// Addresses the kernel holds.
    local: watch::Receiver<Arc<HashSet<IpAddr>>>,
    /// Services whose maps may not be true.
    dirty: HashSet<ServiceKey>,
    /// Gateways of services that cannot be reached, and why, as it was last said.
    lost_gateways: HashMap<ServiceKey, (IpAddr, String)>,
    /// Since when backends that were removed wait for their flows.
    retiring: HashMap<(ServiceKey, SocketAddr), Instant>,
    /// Drops of the kinds that are warned of.
    warned: HashMap<DropReason, Told>,
    /// Flows that began under pressure.
    limited: Told,
    /// Connections that had to make room.
    displaced: Told,
    started: Instant,
    /// Why the last reload was refused, if it was.
    reload_error: Option<String>,
    ended: bool,
}

/// Which check a result is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct CheckKey {
    backend: BackendKey,
    /// Whether it is the agent's, beside the check.
    agent: bool,
}

/// Where events come from.
struct Events {
    results: mpsc::Receiver<(CheckKey, CheckResult)>,
    ways: mpsc::Receiver<(IpAddr, Resolution)>,
    local: watch::Receiver<Arc<HashSet<IpAddr>>>,
    jobs: mpsc::Receiver<Job>,
}

/// A sweep that runs beside the task, or the tables until the next.
enum Sweeper {
    Resting(Box<Flows>, tokio::time::Instant),
    Running(JoinHandle<(Box<Flows>, Result<Sweep>, Duration)>),
}

impl Daemon {
    /// Takes events until one of them ends the daemon.
    async fn serve(mut self, mut events: Events) -> Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sweeper = Sweeper::Resting(
            Box::new(Flows::new(&self.dataplane.maps)?),
            tokio::time::Instant::now() + SWEEP_INTERVAL,
        );
        while !self.ended {
            tokio::select! {
                Some((key, result)) = events.results.recv() => self.checked(key, result),
                Some((address, resolution)) = events.ways.recv() => self.resolved(address, resolution),
                Ok(()) = events.local.changed() => self.touch_all(),
                Some(job) = events.jobs.recv() => job(&mut self),
                _ = hangup.recv() => {
                    if let Err(failure) = self.reload() {
                        error!("{failure}; the running configuration stays in force");
                    }
                }
                _ = terminate.recv() => self.ended = true,
                _ = interrupt.recv() => self.ended = true,
                _ = ticks.tick() => self.tick(),
                () = sweeper.turn() => {
                    sweeper = self.sweep_turn(sweeper).await?;
                }
            }
            self.take_waiting(&mut events);
            self.reconcile();
        }
        info!("stopped; the data plane stays in the kernel and traffic flows on");
        Ok(())
    }

    /// Takes the events that came while another was dealt with: one reconciliation serves all.
    fn take_waiting(&mut self, events: &mut Events) {
        for _ in 0..BATCH {
            if let Ok((key, result)) = events.results.try_recv() {
                self.checked(key, result);
            } else if let Ok((address, resolution)) = events.ways.try_recv() {
                self.resolved(address, resolution);
            } else {
                break;
            }
        }
    }

    fn checked(&mut self, key: CheckKey, result: CheckResult) {
        let CheckKey { backend, agent } = key;
        let now = Instant::now();
        let change = if agent {
            self.model.agent_result(backend, &result, now)
        } else {
            self.model.check_result(backend, result, now)
        };
        let rewatch = change.is_some_and(|change| change.admin.0 != change.admin.1);
        self.note(change);
        if rewatch {
            // In maintenance nobody asks but the agent.
            self.watch_backends();
        }
        if !agent && let Some(backend) = self.model.backend(backend) {
            self.checker.set_pace(&key, backend.pace());
        }
    }

    /// Time went by.
    fn tick(&mut self) {
        for change in self.model.tick(Instant::now()) {
            self.note(Some(change));
        }
        self.watch_traffic();
    }

    /// What the operator wants of a backend; new flows follow it when this returns.
    fn set_admin(
        &mut self,
        service: &str,
        backend: &str,
        admin: Admin,
    ) -> Result<types::Backend, Failure> {
        let (key, _) = self.find(service, backend)?;
        let change = self.model.set_admin(key, admin, Instant::now());
        self.note(change);
        if let Err(error) = self.keep_commands() {
            warn!("what is commanded will be forgotten when the daemon restarts: {error}");
        }
        self.watch_backends();
        self.dirty.insert(key.service);
        self.judge_panics();
        self.reconcile_dirty()?;
        let address = Endpoint(key.address).to_string();
        let views = self.backend_views(Some(service))?;
        let view = views.into_iter().find(|view| view.address == address);
        view.ok_or_else(|| Failure::internal(format!("backend {backend:?} is gone")))
    }

    /// The backend of the service called `service` that is listed with this name or address.
    fn find(&self, service: &str, backend: &str) -> Result<(BackendKey, &Backend), Failure> {
        let services = self.model.services().iter();
        let mut of_name = services.filter(|s| s.config.name == service);
        let found = of_name.next().and_then(|service| {
            let is_meant = |b: &&Backend| {
                b.config().name == backend || Endpoint(b.config().address).to_string() == backend
            };
            let backend = service.backends.iter().find(is_meant)?;
            let key = BackendKey {
                service: service.key(),
                address: backend.config().address,
            };
            Some((key, backend))
        });
        found.ok_or_else(|| {
            Failure::not_found(format!(
                "service {service:?}: backend {backend:?} is not configured; it may be on its way \
                 out, see: sluice backend list {service}"
            ))
        })
    }

    /// What is needed to count the flows of a backend beside this task: the flow tables, its number
    /// if it has any flow, whether its answers pass here, and whether others may belong to it.
    fn open_flows(
        &self,
        service: &str,
        backend: &str,
    ) -> Result<(views::FlowNames, Option<u32>, bool, bool), Failure> {
        let (key, _) = self.find(service, backend)?;
        let number = self.reconciler.backend_number(&key.service, &key.address);
        let number = number.filter(|number| {
            let load = self.dataplane.maps.backend_load.read(*number);
            load.recorded() > 0
        });
        let services = self.model.services().iter();
        let sees_replies = services
            .filter(|service| service.key() == key.service)
            .any(|service| forward::translates(service.config.forward));
        let others = self.reconciler.remembers(&key.service, &key.address);
        Ok((self.flow_names()?, number, sees_replies, others))
    }

    /// Uses all backends of services that have too few healthy ones, and says so.
    fn judge_panics(&mut self) {
        for (name, begins) in self.model.judge_panics(&self.dirty, Instant::now()) {
            if begins {
                warn!(
                    "service {name}: fewer backends are up than panic_threshold says; those that \
                     are down are used as well"
                );
            } else {
                info!("service {name}: enough backends are up again; only these are used");
            }
        }
    }

    /// The way to an address became known or changed.
    fn resolved(&mut self, address: IpAddr, resolution: Resolution) {
        let (way, hop) = self.judge(address, &resolution);
        self.resolutions.insert(address, resolution);
        let before = match hop {
            Some(hop) => self.hops.insert(address, hop),
            None => self.hops.remove(&address),
        };
        if before != hop {
            let sharing = |service: &crate::model::Service| {
                let backends = &service.config.backends;
                service.config.gateway == Some(address)
                    || backends.iter().any(|b| b.address.ip() == address)
            };
            for service in self.model.services() {
                if sharing(service) {
                    self.dirty.insert(service.key());
                }
            }
            for (service, retiring, _) in self.reconciler.retiring() {
                if retiring.ip() == address {
                    self.dirty.insert(service);
                }
            }
        }
        self.note_gateway(address, &way);
        // Only `dsr` needs the backend itself to be the next hop.
        let direct = match self.resolutions.get(&address) {
            Some(Resolution::Resolved(hop)) => hop.direct,
            _ => true,
        };
        let local = matches!(self.resolutions.get(&address), Some(Resolution::Local));
        let except = |service: &config::Service| {
            if local && !forward::translates(service.forward) {
                return Some(Way::Blocked(format!(
                    "{address} is an address of this host, which takes only nat or dnat"
                )));
            }
            (!direct && service.forward == forward::DSR).then(|| {
                Way::Blocked(format!(
                    "{address} is behind a gateway, and forward \"dsr\" reaches only hosts on the \
                     balancer's own segment; use ipip, gue or nat"
                ))
            })
        };
        let changes = self.model.set_path(address, way, except, Instant::now());
        for change in changes {
            self.note(Some(change));
        }
    }

    /// Says of services whose gateway this is whether it can be reached, once.
    fn note_gateway(&mut self, address: IpAddr, way: &Way) {
        let is_local = matches!(self.resolutions.get(&address), Some(Resolution::Local));
        let blocked = match way {
            Way::Blocked(reason) => Some(reason.clone()),
            _ if is_local => Some(format!("{address} is an address of this host")),
            _ => None,
        };
        for service in self.model.services() {
            if service.config.gateway != Some(address) {
                continue;
            }
            let (key, name) = (service.key(), &service.config.name);
            match &blocked {
                Some(reason) => {
                    let lost = (address, reason.clone());
                    if self.lost_gateways.insert(key, lost.clone()) != Some(lost) {
                        warn!(
                            "service {name}: gateway {address} cannot be reached: {reason}; until it can, new \
                             flows are recorded, and answers of those that are not are dropped, or go to \
                             the gateway that was configured before"
                        );
                    }
                }
                None => {
                    if self.lost_gateways.remove(&key).is_some() {
                        info!("service {name}: gateway {address} can be reached again");
                    }
                }
            }
        }
    }

    /// Whether packets can be sent to an address, for all we know.
    fn judge(&self, address: IpAddr, resolution: &Resolution) -> (Way, Option<Hop>) {
        match resolution {
            Resolution::Unresolved { reason } => (Way::Blocked(reason.clone()), None),
            Resolution::Local => (
                Way::Open,
                Some(Hop {
                    destination: [0; 6],
                    source: [0; 6],
                    ifindex: LOCAL,
                    tags: 0,
                    address,
                    mtu: 0,
                }),
            ),
            Resolution::Resolved(hop) => {
                let ours = &self.config.daemon.interfaces;
                if ours.contains(&hop.ifname) {
                    return (Way::Open, Some(leave(hop, hop.ifindex, 0)));
                }
                // Tags are written by whoever is above the interface that packets leave by.
                if let Some(below) = hop.below.iter().find(|b| ours.contains(&b.ifname)) {
                    return (Way::Open, Some(leave(hop, below.ifindex, below.tags)));
                }
                let mut names = vec![hop.ifname.as_str()];
                names.extend(hop.below.iter().map(|below| below.ifname.as_str()));
                let reason = format!(
                    "{address} is behind {}, which is not in daemon.interfaces",
                    names.join(" on ")
                );
                (Way::Blocked(reason), None)
            }
        }
    }

    /// Says what changed, once.
    fn note(&mut self, change: Option<Change>) {
        let Some(change) = change else {
            return;
        };
        self.dirty.insert(change.backend.service);
        let (admin_before, admin) = change.admin;
        if change.from == change.to && admin_before == admin {
            return;
        }
        let Some(backend) = self.model.backend(change.backend) else {
            return;
        };
        let service = self.service_name(change.backend.service);
        let (name, address) = (&backend.config().name, change.backend.address);
        let listed = Endpoint(address).to_string();
        let shown = if *name == listed {
            name.clone()
        } else {
            format!("{name} ({listed})")
        };
        let (from, to, reason) = (change.from.name(), change.to.name(), backend.reason());
        if admin_before != admin {
            info!(
                "service {service}: backend {shown} is in {admin}, was in {admin_before}; it is {to}: \
                 {reason}"
            );
        } else if change.to == State::Down {
            warn!("service {service}: backend {shown} is {to}, was {from}: {reason}");
        } else {
            info!("service {service}: backend {shown} is {to}, was {from}: {reason}");
        }
        let environment = vec![
            ("SLUICE_SERVICE", service),
            ("SLUICE_BACKEND", name.clone()),
            ("SLUICE_ADDRESS", address.ip().to_string()),
            ("SLUICE_PORT", address.port().to_string()),
            ("SLUICE_STATE", to.to_owned()),
            ("SLUICE_STATE_BEFORE", from.to_owned()),
            ("SLUICE_ADMIN", admin.to_string()),
            ("SLUICE_ADMIN_BEFORE", admin_before.to_string()),
            ("SLUICE_REASON", reason),
        ];
        let command = &self.config.daemon.on_state_change;
        self.hook.tell(command, environment);
    }

    fn service_name(&self, key: ServiceKey) -> String {
        self.model
            .services()
            .iter()
            .find(|service| service.key() == key)
            .map_or_else(|| key.to_string(), |service| service.config.name.clone())
    }

    fn touch_all(&mut self) {
        let keys = self.model.services().iter().map(crate::model::Service::key);
        self.dirty.extend(keys);
    }

    /// Makes the maps of every service that was touched what the model says.
    fn reconcile(&mut self) {
        self.judge_panics();
        if let Err(error) = self.reconcile_dirty() {
            // The old tables are live. What is wished is tried again with the next change.
            error!("{error:#}");
        }
    }

    fn reconcile_dirty(&mut self) -> Result<()> {
        if self.dirty.is_empty() {
            return Ok(());
        }
        let dirty = std::mem::take(&mut self.dirty);
        self.reconcile_services(|key| dirty.contains(&key), &[])
    }

    fn reconcile_services(
        &mut self,
        which: impl Fn(ServiceKey) -> bool,
        removed: &[ServiceKey],
    ) -> Result<()> {
        // Before the first packet for a local backend.
        for name in self.config.daemon.interfaces.clone() {
            self.serve_local(&name)?;
        }
        let local = Arc::clone(&self.local.borrow());
        // Before a service that does not record its flows can take a connection of the host's own for one.
        let held = self.reconciler.hold(&local);
        self.carry_out(&held)?;
        let wanted: Vec<reconcile::Service> = self
            .model
            .services()
            .iter()
            .filter(|service| which(service.key()))
            .map(|service| wanted(service, &self.config, &local))
            .collect();
        let hops = &self.hops;
        let hop = |address: IpAddr| hops.get(&address).copied();
        let ops = self
            .reconciler
            .plan(&wanted, removed, hop, Instant::now())?;
        self.carry_out(&ops)
    }

    /// Carries out a plan. If the kernel refuses a part, what the maps hold is read anew, so that
    /// the next plan starts from the truth.
    fn carry_out(&mut self, ops: &[reconcile::Op]) -> Result<()> {
        debug!("{} operations", ops.len());
        let result = apply::apply(&self.dataplane.maps, ops);
        if result.is_err() {
            let limits = &self.config.limits;
            let mut reconciler = Reconciler::new(limits.services, limits.backends, limits.slots);
            // What adoption makes of the filter knows these already.
            reconciler.hold(&self.local.borrow());
            reconciler.add_nat_sources(&self.config.daemon.nat_sources);
            let repairs = reconciler.adopt(apply::find(&self.dataplane.maps)?);
            self.reconciler = reconciler;
            apply::apply(&self.dataplane.maps, &repairs)?;
        }
        result.context("cannot change the data plane")
    }

    /// Reads the configuration file again and puts it into force, or leaves everything as it is.
    fn reload(&mut self) -> Result<(), Failure> {
        let result = self.replace_config();
        self.reload_error = result.as_ref().err().map(ToString::to_string);
        result
    }

    fn replace_config(&mut self) -> Result<(), Failure> {
        let config = Config::load(&self.file).map_err(|e| Failure::refused(e.to_string()))?;
        self.unchangeable(&config).map_err(Failure::refused)?;
        start::settings(&config).map_err(|e| Failure::refused(format!("{e:#}")))?;
        let before = std::mem::replace(&mut self.config, config);
        match self.take_up(&before) {
            Ok(()) => {
                let (services, backends) = start::size(&self.config);
                info!(
                    "configuration reloaded: {}, {}",
                    start::counted(services, "service"),
                    start::counted(backends, "backend")
                );
                Ok(())
            }
            Err(error) => {
                let refused = std::mem::replace(&mut self.config, before);
                if let Err(error) = self.take_up(&refused) {
                    error!("cannot return to the configuration before: {error:#}");
                }
                Err(Failure::refused(format!("{error:#}")))
            }
        }
    }

    /// Why a configuration cannot follow the running one.
    fn unchangeable(&self, config: &Config) -> Result<(), String> {
        let (old, new) = (&self.config.daemon, &config.daemon);
        let file = self.file.display();
        for (same, key) in [
            (old.pin_path == new.pin_path, "daemon.pin_path"),
            (old.socket == new.socket, "daemon.socket"),
            (old.http == new.http, "daemon.http"),
        ] {
            if !same {
                return Err(format!(
                    "{file}: {key} cannot change while the daemon runs; stop it and start it again"
                ));
            }
        }
        let sizes = |limits: &config::Limits| config::Limits {
            new_flows_per_cpu: 0,
            ..*limits
        };
        if sizes(&self.config.limits) != sizes(&config.limits) {
            return Err(format!(
                "{file}: limits are fixed when the maps are made; to change them: sluice stop, \
                 sluice detach, sluice run"
            ));
        }
        Ok(())
    }

    /// Puts `self.config` into force where `before` was.
    fn take_up(&mut self, before: &Config) -> Result<()> {
        let settings = start::settings(&self.config)?;
        for name in self.config.daemon.interfaces.clone() {
            self.attach(&name)?;
        }
        self.model.configure(&self.config.services, Instant::now());
        let keys: HashSet<ServiceKey> = self.config.services.iter().map(ServiceKey::from).collect();
        let removed: Vec<ServiceKey> = self
            .reconciler
            .service_ids()
            .filter(|key| !keys.contains(key))
            .collect();
        self.judge_all();
        self.touch_all();
        self.judge_panics();
        self.reconcile_services(|_| true, &removed)?;
        self.dirty.clear();
        self.announce_settings(settings)?;
        self.serve_clients()?;
        for name in &before.daemon.interfaces {
            if !self.config.daemon.interfaces.contains(name) {
                self.detach(name)?;
            }
        }
        self.watch_backends();
        self.warn_of_taken_ports();
        self.warn_of_answers_past_us();
        Ok(())
    }

    /// Warns of services that take ports the host's own connections begin at.
    fn warn_of_taken_ports(&self) {
        let Ok((first, last)) = neigh::ephemeral_port_range() else {
            return;
        };
        let local = self.local.borrow();
        for service in &self.config.services {
            let Listen { ip, ports } = service.listen;
            let takes = ports == Ports::Any || ports.shared(Ports::span(first, last)) > 0;
            if takes && local.contains(&ip) {
                warn!(
                    "service {}: {} takes the answers to connections that this host makes from {ip}; \
                     listen on an address of its own, or on ports outside {first}-{last}",
                    service.name, service.listen
                );
            }
        }
    }

    /// Warns of services in `dnat` whose backends would answer clients in their own network past the
    /// balancer.
    fn warn_of_answers_past_us(&self) {
        let Ok(networks) = neigh::networks() else {
            return;
        };
        for service in &self.config.services {
            if service.forward != forward::DNAT {
                continue;
            }
            let vip = service.vip();
            let shared = service.backends.iter().find_map(|backend| {
                let ip = backend.address.ip();
                // This host's own answers pass it in any case.
                let own = networks.iter().any(|n| n.address == ip);
                let mut networks = networks.iter().filter(|_| !own);
                let network = networks.find(|n| n.contains(vip) && n.contains(ip))?;
                Some((backend, network))
            });
            if let Some((backend, network)) = shared {
                warn!(
                    "service {}: backend {} and the VIP are both in {network}: in forward \"dnat\" \
                     clients there are answered past the balancer and get no connection; use \
                     \"nat\" if there are any",
                    service.name, backend.name
                );
            }
        }
    }

    /// Puts what is common to all packets into force, with the addresses that `nat` sends from.
    fn announce_settings(&mut self, settings: Settings) -> Result<()> {
        let sources = self.config.daemon.nat_sources.clone();
        let local = Arc::clone(&self.local.borrow());
        for source in sources.iter().filter(|source| !local.contains(source)) {
            warn!(
                "daemon.nat_sources {source} is not an address of this host: answers to it get \
                 lost unless they are routed here; see \"ip address\""
            );
        }
        let ops = self.reconciler.add_nat_sources(&sources);
        self.carry_out(&ops)?;
        let maps = &self.dataplane.maps;
        let before = maps.settings.read(0);
        let settings = Settings {
            magic: before.magic,
            abi_version: before.abi_version,
            nat_port_seed: before.nat_port_seed,
            flow_sets: before.flow_sets,
            ..settings
        };
        // None in use while they are written.
        maps.settings.store(0, settings);
        let (mut v4, mut v6) = (0_u8, 0_u8);
        for source in sources {
            match source {
                IpAddr::V4(source) => {
                    maps.nat_sources4.store(v4.into(), from_ipv4(source));
                    v4 += 1;
                }
                IpAddr::V6(source) => {
                    maps.nat_sources6.store(v6.into(), from_ipv6(source));
                    v6 += 1;
                }
            }
        }
        let settings = Settings {
            nat_sources4: v4,
            nat_sources6: v6,
            ..settings
        };
        maps.settings.store(0, settings);
        Ok(())
    }

    /// Judges every known way anew, as after a change of interfaces.
    fn judge_all(&mut self) {
        for (address, resolution) in self.resolutions.clone() {
            self.resolved(address, resolution);
        }
    }

    /// Tells checks and neighbours which backends there are.
    fn watch_backends(&mut self) {
        let ways = self.ways_of_checks();
        let targets: Vec<Target<CheckKey>> = self
            .model
            .services()
            .iter()
            .flat_map(|service| {
                let key = service.key();
                service
                    .backends
                    .iter()
                    .flat_map(|backend| {
                        let id = BackendKey {
                            service: key,
                            address: backend.config().address,
                        };
                        let environment = match backend.config().health.check {
                            Check::Exec(_) => environment(&service.config, backend.config()),
                            _ => Vec::new(),
                        };
                        let target = |agent, health: &Arc<Health>| Target {
                            id: CheckKey { backend: id, agent },
                            address: id.address,
                            health: health.clone(),
                            via: ways.get(&id).copied().filter(|_| !agent),
                            environment: if agent {
                                Vec::new()
                            } else {
                                environment.clone()
                            },
                        };
                        let health = &backend.config().health;
                        let check = backend.is_checked().then(|| target(false, health));
                        let agent = health.agent.as_ref().filter(|_| backend.has_agent());
                        check
                            .into_iter()
                            .chain(agent.map(|agent| target(true, agent)))
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        self.checker.set(targets);
        let mut addresses = self.model.addresses();
        // Also of those that are configured no longer, and wait for their flows to end.
        addresses.extend(self.reconciler.records().map(|(_, a, _)| a.ip()));
        let services = self.model.services().iter();
        let gateways: HashMap<ServiceKey, IpAddr> = services
            .filter_map(|service| Some((service.key(), service.config.gateway?)))
            .collect();
        addresses.extend(gateways.values());
        self.lost_gateways
            .retain(|service, (gateway, _)| gateways.get(service) == Some(gateway));
        self.resolutions.retain(|a, _| addresses.contains(a));
        self.hops.retain(|a, _| addresses.contains(a));
        self.neighbours.set_targets(addresses);
    }

    /// Attaches the program to an interface, and lets it send there.
    fn attach(&mut self, name: &str) -> Result<()> {
        let was = self
            .dataplane
            .interfaces()?
            .into_iter()
            .find(|attached| attached.interface == name);
        self.serve_local(name)?;
        // Before the first packet comes. What is wrong shows behind it.
        if let Ok(ifindex) = dataplane::interface_index(name)
            && let Err(error) = self.announce_interface(name, ifindex)
        {
            debug!("{error:#}");
        }
        let attached = self.dataplane.attach(name, self.config.daemon.mode)?;
        self.announce_interface(name, attached.ifindex)?;
        if was.as_ref().map(|was| (was.ifindex, was.mode))
            != Some((attached.ifindex, attached.mode))
        {
            match &attached.fallback {
                None => info!("interface {name}: attached in {} mode", attached.mode),
                Some(why) => warn!(
                    "interface {name}: attached in {} mode, which is slower: {why}",
                    attached.mode
                ),
            }
        }
        Ok(())
    }

    /// Sees to it that answers of backends on this host leave by an interface with the VIP as their
    /// source; takes the program away where there are none.
    fn serve_local(&mut self, name: &str) -> Result<()> {
        self.serve_own_packets(name)?;
        let mut addresses = self.hops.keys();
        if addresses.any(|a| a.is_ipv4() && a.is_loopback()) {
            start::open_loopback(name)?;
        }
        Ok(())
    }

    /// Leads clients on this host to the services, where that is wanted and there are services that
    /// they can be led to.
    fn serve_clients(&mut self) -> Result<()> {
        let daemon = &self.config.daemon;
        let mut services = self.config.services.iter();
        let wanted = daemon.local_clients != Some(false)
            && services.any(|service| forward::translates(service.forward));
        if !wanted {
            if self.dataplane.set_local(None)? {
                info!("clients on this host are not led to the services any more");
            }
            return Ok(());
        }
        let cgroup = match &daemon.cgroup {
            Some(path) => dataplane::check_cgroup(path).map(|()| path.clone()),
            None => dataplane::root_cgroup(),
        };
        match cgroup.and_then(|path| Ok((self.dataplane.set_local(Some(&path))?, path))) {
            Ok((true, path)) => info!(
                "clients on this host are led to the services: programs attached to cgroup {}",
                path.display()
            ),
            Ok((false, _)) => {}
            Err(error) if self.config.daemon.asks_for_local_clients() => {
                return Err(error.context("daemon.local_clients"));
            }
            Err(error) => warn!(
                "clients on this host do not reach the services: {error:#}; \
                 daemon.local_clients = false spares this message"
            ),
        }
        Ok(())
    }

    /// Writes what the data plane must know of an interface, and lets it send there.
    fn announce_interface(&self, name: &str, ifindex: u32) -> Result<()> {
        self.describe_interface(name, ifindex)?;
        let redirect = crate::dataplane::Redirect {
            ifindex,
            program: 0,
        };
        self.dataplane.maps.redirects.insert(&ifindex, &redirect)?;
        // The driver of a bond hands the program packets as those of the interfaces below it.
        for (below, ifindex) in start::interfaces_below(name) {
            self.describe_interface(&below, ifindex)?;
        }
        Ok(())
    }

    /// Writes what the data plane must know of an interface that packets come from.
    fn describe_interface(&self, name: &str, ifindex: u32) -> Result<()> {
        let maps = &self.dataplane.maps;
        let mut interface = start::interface(name).with_context(|| {
            format!("interface {name}: cannot read its Ethernet address and MTU")
        })?;
        interface.link = self.dataplane.link(ifindex, interface.mac)?;
        // What is replaced may be another interface's at once, while a packet reads it.
        if maps.interfaces.get(&ifindex)? != Some(interface) {
            maps.interfaces.insert(&ifindex, &interface)?;
        }
        Ok(())
    }

    fn detach(&mut self, name: &str) -> Result<()> {
        let attached = self.dataplane.interfaces()?;
        if self.dataplane.detach(name)? {
            info!("interface {name}: detached");
        }
        if let Some(attached) = attached.iter().find(|a| a.interface == name) {
            self.dataplane.maps.interfaces.remove(&attached.ifindex)?;
            self.dataplane.maps.redirects.remove(&attached.ifindex)?;
        }
        Ok(())
    }

    /// What has to be looked at from time to time: interfaces that came back, backends that have
    /// no flow left, and packets that could not be placed.
    fn look_after(&mut self) {
        let present = self.dataplane.interfaces().unwrap_or_default();
        for name in self.config.daemon.interfaces.clone() {
            match present.iter().find(|attached| attached.interface == name) {
                Some(attached) => {
                    if let Err(error) = self.announce_interface(&name, attached.ifindex) {
                        debug!("{error:#}");
                    }
                }
                None => match self.attach(&name) {
                    Ok(()) => {}
                    Err(error) => debug!("{error:#}"),
                },
            }
        }
        if let Err(error) = self.forget_interfaces() {
            debug!("interfaces that are gone: {error:#}");
        }
        self.retire();
        self.warn_of_drops();
        self.warn_of_pressure();
    }

    /// Takes interfaces that are gone out of the maps.
    fn forget_interfaces(&self) -> Result<()> {
        let maps = &self.dataplane.maps;
        let mut gone = Vec::new();
        maps.interfaces.iter_batches(|ifindex, _| {
            if dataplane::interface_name(*ifindex).is_none() {
                gone.push(*ifindex);
            }
        })?;
        for ifindex in gone {
            maps.interfaces.remove(&ifindex)?;
            // The kernel has taken it out of this one itself.
            maps.redirects.remove(&ifindex)?;
        }
        Ok(())
    }

    /// Forgets backends that were removed from the configuration and have no flow left.
    fn retire(&mut self) {
        let waiting: Vec<(ServiceKey, SocketAddr, u32)> = self.reconciler.retiring().collect();
        let mut ops = Vec::new();
        let mut since = HashMap::new();
        for (service, address, number) in waiting {
            let begun = self
                .retiring
                .get(&(service, address))
                .copied()
                .unwrap_or_else(Instant::now);
            let load = self.dataplane.maps.backend_load.read(number);
            let drained = load.recorded() == 0 && !self.reconciler.remembers(&service, &address);
            // At least one whole sweep, so that a flow that was just being placed is counted.
            let settled = self.retiring.contains_key(&(service, address));
            if settled && drained || begun.elapsed() >= self.drain_timeout(service) {
                let name = self.service_name(service);
                let why = if drained {
                    "its last flow has ended"
                } else {
                    "the time for its flows is over"
                };
                info!(
                    "service {name}: backend {} is gone, {why}",
                    Endpoint(address)
                );
                ops.extend(self.reconciler.forget_backend(&service, &address));
            } else {
                since.insert((service, address), begun);
            }
        }
        self.retiring = since;
        if ops.is_empty() {
            return;
        }
        if let Err(error) = self.carry_out(&ops) {
            error!("{error:#}");
        }
        self.watch_backends();
    }

    /// How long flows of a backend that was removed may go on.
    fn drain_timeout(&self, service: ServiceKey) -> Duration {
        let mut services = self.model.services().iter();
        let service = services.find(|s| s.key() == service);
        let configured = service.and_then(|service| service.config.drain_timeout);
        configured.unwrap_or(DRAIN_TIMEOUT)
    }

    /// Warns of full tables and exhausted ports, at a bounded rate.
    fn warn_of_drops(&mut self) {
        for (reason, remedy) in [
            (DropReason::TableFull, "raise limits.flows"),
            (
                DropReason::PortExhausted,
                "widen daemon.nat_ports or add backends",
            ),
            (
                DropReason::BackendFull,
                "add backends or raise their max_connections",
            ),
            (
                DropReason::RateLimited,
                "\"sluice map dump sources4\" shows whose; raise max_new_per_source if they may",
            ),
        ] {
            let Ok(count) = self.dataplane.maps.drops.sum(reason as u32) else {
                continue;
            };
            let told = self.warned.entry(reason).or_default();
            if let Some(new) = told.news(count, Instant::now()) {
                warn!("{new} packets dropped: {}; {remedy}", reason.name());
            }
        }
    }

    /// Warns of new flows that came faster than the CPUs may record them, and of those that had to make room.
    fn warn_of_pressure(&mut self) {
        let Ok(pressure) = self.dataplane.maps.pressure.sum(0) else {
            return;
        };
        let now = Instant::now();
        if let Some(new) = self.limited.news(pressure.flows, now) {
            warn!(
                "{new} new flows came faster than limits.new_flows_per_cpu; connections that live are \
                 not affected"
            );
        }
        if let Some(new) = self.displaced.news(pressure.displaced, now) {
            warn!(
                "{new} connections had to make room for others in the flow table; raise limits.flows, or lower \
                 limits.new_flows_per_cpu if it is a flood"
            );
        }
    }

    fn timeouts(&self) -> Timeouts {
        let idle = self
            .model
            .services()
            .iter()
            .filter_map(|service| {
                let number = self.reconciler.service_number(&service.key())?;
                Some((number, flows::ticks(service.config.idle_timeout)))
            })
            .collect();
        Timeouts {
            patience: flows::Patience::from(&self.config.timeouts),
            idle,
            stateless: self.reconciler.stateless_tables(),
            affinity: self.reconciler.affinity_masks(),
        }
    }

    async fn sweep_turn(&mut self, sweeper: Sweeper) -> Result<Sweeper> {
        match sweeper {
            Sweeper::Resting(mut flows, _) => {
                let timeouts = self.timeouts();
                Ok(Sweeper::Running(tokio::task::spawn_blocking(move || {
                    let begun = Instant::now();
                    let result = flows.sweep(&timeouts);
                    (flows, result, begun.elapsed())
                })))
            }
            Sweeper::Running(task) => {
                let (flows, result, took) = task.await.context("the sweep of the flow tables")?;
                match result {
                    Ok(sweep) => {
                        if sweep.drift > 0 {
                            info!("connection counts corrected by {}", sweep.drift);
                        }
                        debug!("{sweep:?} in {took:?}");
                        let ops = self.reconciler.settle(&sweep.settling, Instant::now());
                        if let Err(error) = self.carry_out(&ops) {
                            error!("{error:#}");
                        }
                        self.look_after();
                    }
                    Err(error) => warn!("cannot sweep the flow tables: {error:#}"),
                }
                let pause = SWEEP_INTERVAL.max(took * SWEEP_SHARE);
                Ok(Sweeper::Resting(flows, tokio::time::Instant::now() + pause))
            }
        }
    }
}

impl Sweeper {
    /// Waits until something is to be done.
    async fn turn(&mut self) {
        match self {
            Self::Resting(_, until) => tokio::time::sleep_until(*until).await,
            Self::Running(task) => {
                while !task.is_finished() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    }
}

/// A service as the maps shall hold it.
fn wanted(
    service: &crate::model::Service,
    config: &Config,
    local: &HashSet<IpAddr>,
) -> reconcile::Service {
    let own: &config::Service = &service.config;
    reconcile::Service {
        id: service.key(),
        name: own.name.clone(),
        forward: own.forward,
        scheduler: own.scheduler,
        on_no_backend: own.on_no_backend,
        on_backend_down: own.on_backend_down,
        connect_timeout: own.connect_timeout.map_or(0, flows::ticks),
        affinity: match own.affinity {
            Duration::ZERO => 0,
            time => flows::ticks(time),
        },
        affinity_mask: mask(own.vip(), own.affinity_mask),
        source_rate: own.max_new_per_source,
        access: own.rules().collect(),
        table_size: own.table_size,
        stateless: own.is_stateless(),
        gateway: own.gateway,
        idle_timeout: own.idle_timeout,
        answer_arp: config.daemon.answer_arp && !local.contains(&own.vip()),
        held: local.contains(&own.vip()),
        backends: service
            .backends
            .iter()
            .zip(shares(service))
            .map(
                |(backend, (weight, configured_weight))| reconcile::Backend {
                    address: backend.config().address,
                    weight,
                    configured_weight,
                    max_connections: backend.config().max_connections,
                    alive: backend.may_keep_flows(),
                },
            )
            .collect(),
    }
}

/// The weight in force and the configured one of each backend, in whole numbers that stand to each
/// other as the weights do.
fn shares(service: &crate::model::Service) -> Vec<(u32, u32)> {
    let configured = service.backends.iter().map(|b| b.config().weight * 100);
    let weights: Vec<(u32, u32)> = service
        .weights()
        .map(crate::model::Weight::hundredths)
        .zip(configured)
        .collect();
    let all = || {
        weights
            .iter()
            .flat_map(|(weight, configured)| [*weight, *configured])
    };
    if all().all(|weight| weight % 100 == 0) {
        let whole = |(weight, configured): (u32, u32)| (weight / 100, configured / 100);
        return weights.into_iter().map(whole).collect();
    }
    // Small numbers make short tables; and none must be larger than a configured one may be.
    let common = all().fold(0, scheduler::common_divisor).max(1);
    let largest = all().max().unwrap_or(0) / common;
    let divisor = common * largest.div_ceil(u32::from(u16::MAX)).max(1);
    let share = |weight: u32| match weight {
        0 => 0,
        weight => (weight / divisor).max(1),
    };
    let small = |(weight, configured)| (share(weight), share(configured));
    weights.into_iter().map(small).collect()
}

/// The first `bits` of an address of the family of `vip`, as the data plane has them.
fn mask(vip: IpAddr, bits: u8) -> [u32; 4] {
    match vip {
        IpAddr::V4(_) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            [mask.to_be(), 0, 0, 0]
        }
        IpAddr::V6(_) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            from_ipv6(mask.into())
        }
    }
}

/// The way to a next hop by an interface of ours, with these VLAN tags.
fn leave(hop: &NextHop, ifindex: u32, tags: u32) -> Hop {
    Hop {
        destination: hop.destination,
        source: hop.source,
        ifindex,
        tags,
        address: hop.address,
        mtu: hop.mtu,
    }
}
