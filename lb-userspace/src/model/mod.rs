//! The state of the services: what is desired, and what is known of the backends.
//!
//! The model takes events (a configuration, results of checks, next hops, the operator's commands)
//! with the time they happened, and answers for each backend how it stands and which weight it has
//! in force. It does nothing itself and asks no clock.

pub mod agent;
pub mod backend;
pub mod check;
#[cfg(test)]
mod tests;

use backend::Rules;
pub use backend::{Admin, Backend, Inherited, Path, State, Weight};
pub use check::{CheckResult, Code};

use crate::config::{self, Listen, Ports, Protocol};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

/// What identifies a service, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// VIP and ports.
    pub listen: Listen,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// What identifies a backend of a service, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// The service.
    pub service: ServiceKey,
    /// Address and port of the backend.
    pub address: SocketAddr,
}

impl From<&config::Service> for ServiceKey {
    fn from(service: &config::Service) -> Self {
        Self {
            listen: service.listen,
            protocol: service.protocol,
        }
    }
}

/// `VIP:ports/proto`.
impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.listen, self.protocol.name())
    }
}

/// Which service each new one of `after` continues, of those of `before` that are gone: a range of
/// ports that was moved or resized is the same service still. Among several the one that shares
/// most ports; the first asks first.
#[must_use]
pub fn successions(before: &[ServiceKey], after: &[ServiceKey]) -> HashMap<ServiceKey, ServiceKey> {
    let place = |key: &ServiceKey| (key.listen.ip, key.protocol);
    let (old, stay): (HashSet<_>, HashSet<_>) = (before.iter().collect(), after.iter().collect());
    let mut gone: HashMap<_, Vec<ServiceKey>> = HashMap::new();
    for key in before.iter().filter(|key| !stay.contains(key)) {
        if key.listen.ports != Ports::Any {
            gone.entry(place(key)).or_default().push(*key);
        }
    }
    let mut continued = HashMap::new();
    for new in after.iter().filter(|key| !old.contains(key)) {
        let Some(candidates) = gone.get_mut(&place(new)) else {
            continue;
        };
        let shared = |old: &ServiceKey| old.listen.ports.shared(new.listen.ports);
        let best = candidates
            .iter()
            .copied()
            .filter(|old| shared(old) > 0)
            .max_by_key(|old| (shared(old), *old));
        if let Some(best) = best {
            candidates.retain(|old| *old != best);
            continued.insert(*new, best);
        }
    }
    continued
}

/// An event that changed how a backend stands or what the data plane must do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The backend.
    pub backend: BackendKey,
    /// State before.
    pub from: State,
    /// State after; equal to `from` if only the weight in force changed.
    pub to: State,
    /// What the operator, or the agent, wanted before and wants after.
    pub admin: (Admin, Admin),
}

/// A service and its backends.
#[derive(Clone, Debug)]
pub struct Service {
    /// What is configured. Its backends are those of `backends`, in the same order.
    pub config: config::Service,
    /// The backends, in the order of the configuration.
    pub backends: Vec<Backend>,
    /// Whether backends that are down are used too, because too few others are left.
    panics: bool,
}

impl Service {
    /// What identifies the service.
    #[must_use]
    pub fn key(&self) -> ServiceKey {
        ServiceKey::from(&self.config)
    }

    /// The weight in force of each backend: 0 for a backup while another takes new flows.
    pub fn weights(&self) -> impl Iterator<Item = Weight> + '_ {
        let is_primary = |b: &&Backend| !b.config().backup;
        let primaries = self.backends.iter().filter(is_primary);
        let in_reserve = primaries
            .map(Backend::effective_weight)
            .any(|weight| weight > Weight::ZERO);
        self.backends.iter().map(move |backend| {
            if in_reserve && backend.config().backup {
                Weight::ZERO
            } else {
                backend.effective_weight()
            }
        })
    }

    /// Backends that take new flows, or would if they were no backups.
    #[must_use]
    pub fn backends_up(&self) -> usize {
        self.backends
            .iter()
            .filter(|backend| backend.effective_weight() > Weight::ZERO)
            .count()
    }
}

/// Every service.
#[derive(Clone, Debug, Default)]
pub struct Model {
    services: Vec<Service>,
    /// Where in `services`, and where in its backends, each backend is.
    places: HashMap<BackendKey, (usize, usize)>,
    /// The backends that share an address, and so the way to it.
    sharing: HashMap<IpAddr, Vec<(usize, usize)>>,
    /// The way to each address. Known apart from the backends, because what is known of it is told
    /// only once, and a backend may be added later.
    paths: HashMap<IpAddr, Path>,
    /// Whether there was a configuration before.
    begun: bool,
}

impl Model {
    /// A model without any service.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces what is configured. Backends that stay, by service and address, keep their state;
    /// also where the service's ports were changed (see [`successions`]).
    pub fn configure(&mut self, services: &[config::Service], now: Instant) {
        let old: Vec<ServiceKey> = self.services.iter().map(Service::key).collect();
        let new: Vec<ServiceKey> = services.iter().map(ServiceKey::from).collect();
        let continued = successions(&old, &new);
        // What the daemon begins with may have served until now; what is added later is cold.
        let warm = !std::mem::replace(&mut self.begun, true);
        let panicking: HashSet<ServiceKey> = self
            .services
            .iter()
            .filter(|service| service.panics)
            .map(Service::key)
            .collect();
        let mut before: HashMap<BackendKey, Backend> = std::mem::take(&mut self.services)
            .into_iter()
            .flat_map(|service| {
                let key = service.key();
                service.backends.into_iter().map(move |backend| {
                    let address = backend.config().address;
                    (
                        BackendKey {
                            service: key,
                            address,
                        },
                        backend,
                    )
                })
            })
            .collect();
        let addresses: HashSet<IpAddr> = services
            .iter()
            .flat_map(|service| &service.backends)
            .map(|backend| backend.address.ip())
            .collect();
        self.paths.retain(|address, _| addresses.contains(address));
        self.places.clear();
        self.sharing.clear();
        for (index, config) in services.iter().enumerate() {
            let service = ServiceKey::from(config);
            let rules = Rules {
                slow_start: config.slow_start,
                drain_timeout: config.drain_timeout,
            };
            let mut backends = Vec::with_capacity(config.backends.len());
            for (position, backend) in config.backends.iter().enumerate() {
                let address = backend.address;
                let key = BackendKey { service, address };
                self.places.insert(key, (index, position));
                let sharing = self.sharing.entry(address.ip()).or_default();
                sharing.push((index, position));
                let former = BackendKey {
                    service: continued.get(&service).copied().unwrap_or(service),
                    address,
                };
                backends.push(match before.remove(&former) {
                    Some(mut kept) => {
                        kept.configure(backend.clone(), rules, now);
                        kept
                    }
                    None => {
                        let path = self.paths.get(&address.ip()).cloned().unwrap_or_default();
                        Backend::new(backend.clone(), rules, path, warm, now)
                    }
                });
            }
            self.services.push(Service {
                config: config.clone(),
                backends,
                panics: panicking.contains(&service),
            });
        }
    }

    /// The services, in the order of the configuration.
    #[must_use]
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// The backend `key`, unless there is none.
    #[must_use]
    pub fn backend(&self, key: BackendKey) -> Option<&Backend> {
        let (service, backend) = *self.places.get(&key)?;
        self.services.get(service)?.backends.get(backend)
    }

    /// Every backend, and what identifies it.
    pub fn backends(&self) -> impl Iterator<Item = (BackendKey, &Backend)> {
        self.services.iter().flat_map(|service| {
            let key = service.key();
            service.backends.iter().map(move |backend| {
                let address = backend.config().address;
                (
                    BackendKey {
                        service: key,
                        address,
                    },
                    backend,
                )
            })
        })
    }

    /// The addresses whose next hops must be known.
    #[must_use]
    pub fn addresses(&self) -> HashSet<IpAddr> {
        self.sharing.keys().copied().collect()
    }

    /// A check of `key` ended. Results for backends that are gone, or in maintenance, change
    /// nothing.
    pub fn check_result(
        &mut self,
        key: BackendKey,
        result: CheckResult,
        now: Instant,
    ) -> Option<Change> {
        self.change(key, |backend| backend.check_result(result, now))
    }

    /// The agent of `key` was asked beside the check.
    pub fn agent_result(
        &mut self,
        key: BackendKey,
        result: &CheckResult,
        now: Instant,
    ) -> Option<Change> {
        self.change(key, |backend| backend.agent_result(result, now))
    }

    /// So many of the connections that went to `key` of late were not answered, or refused. It is
    /// ejected if that is too many, and at least half of the service's backends stay up without it.
    pub fn failed_in_traffic(
        &mut self,
        key: BackendKey,
        failures: u64,
        now: Instant,
    ) -> Option<Change> {
        if !self.backend(key)?.is_failing(failures) {
            return None;
        }
        let service = self.services.iter().find(|s| s.key() == key.service)?;
        let health: Vec<bool> = service
            .backends
            .iter()
            .filter_map(Backend::health)
            .collect();
        let up = health.iter().filter(|up| **up).count();
        if (up - up.min(1)) * 2 < health.len() {
            return None;
        }
        self.change(key, |backend| backend.eject(failures, now))
    }

    /// Time went by: weights rise, and the time for flows of drained backends ends.
    pub fn tick(&mut self, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        for service in &mut self.services {
            let key = service.key();
            for backend in service.backends.iter_mut().filter(|b| b.is_ticking()) {
                changes.extend(change(key, backend, |backend| backend.tick(now)));
            }
        }
        changes
    }

    /// Of the services in `which`: uses all backends while fewer of them are up than
    /// `panic_threshold` says. Returns the names of those for which this began or ended, and whether
    /// it began.
    pub fn judge_panics(
        &mut self,
        which: &HashSet<ServiceKey>,
        now: Instant,
    ) -> Vec<(String, bool)> {
        let mut changes = Vec::new();
        for service in &mut self.services {
            let threshold = u64::from(service.config.panic_threshold);
            if (threshold == 0 && !service.panics) || !which.contains(&service.key()) {
                continue;
            }
            let health = service.backends.iter().filter_map(Backend::health);
            let (up, all) =
                health.fold((0, 0), |(up, all), is_up| (up + u64::from(is_up), all + 1));
            let panics = up * 100 < threshold * all;
            for backend in &mut service.backends {
                backend.press(panics, now);
            }
            if std::mem::replace(&mut service.panics, panics) != panics {
                changes.push((service.config.name.clone(), panics));
            }
        }
        changes
    }

    /// The operator's will for `key`.
    pub fn set_admin(&mut self, key: BackendKey, admin: Admin, now: Instant) -> Option<Change> {
        self.change(key, |backend| backend.set_admin(admin, now))
    }

    /// What an earlier daemon knew of `key`, so that a restart does not begin with empty tables.
    /// Later events correct it.
    pub fn inherit(
        &mut self,
        key: BackendKey,
        inherited: Inherited,
        now: Instant,
    ) -> Option<Change> {
        if inherited.resolved {
            self.paths.entry(key.address.ip()).or_insert(Path::Open);
        }
        self.change(key, |backend| backend.inherit(inherited, now))
    }

    /// The way to `address` became known or changed; `except` tells services for which it is
    /// another.
    pub fn set_path(
        &mut self,
        address: IpAddr,
        path: Path,
        except: impl Fn(&config::Service) -> Option<Path>,
        now: Instant,
    ) -> Vec<Change> {
        let Some(places) = self.sharing.get(&address) else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        for &(service, backend) in places {
            let service = &mut self.services[service];
            let key = service.key();
            changes.extend(change(key, &mut service.backends[backend], |backend| {
                backend.set_path(except(&service.config).unwrap_or_else(|| path.clone()), now);
            }));
        }
        self.paths.insert(address, path);
        changes
    }

    fn change(&mut self, key: BackendKey, event: impl FnOnce(&mut Backend)) -> Option<Change> {
        let (service, backend) = *self.places.get(&key)?;
        change(
            key.service,
            &mut self.services[service].backends[backend],
            event,
        )
    }
}

/// Lets `event` happen to `backend`, and tells whether anybody needs to know.
fn change(
    service: ServiceKey,
    backend: &mut Backend,
    event: impl FnOnce(&mut Backend),
) -> Option<Change> {
    let outside = |b: &Backend| {
        let weight = b.effective_weight();
        (b.state(), b.admin(), weight, b.may_keep_flows())
    };
    let before = outside(backend);
    event(backend);
    let after = outside(backend);
    (before != after).then(|| Change {
        backend: BackendKey {
            service,
            address: backend.config().address,
        },
        from: before.0,
        to: after.0,
        admin: (before.1, after.1),
    })
}
