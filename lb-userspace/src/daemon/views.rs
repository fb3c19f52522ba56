//! What the API shows: the model and the counters of one moment.

use super::Daemon;
use crate::{
    api::{ConnectionFilter, types},
    config::Endpoint,
    flows::{self, Connection, Flows},
    model::{Admin, ServiceKey, State},
};
use anyhow::Result;
use lb_common::{
    flow::state::is_over,
    names,
    stats::{Counters, DropReason},
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Instant, SystemTime},
};

impl Daemon {
    pub(super) fn service_views(&self) -> Result<Vec<types::Service>> {
        let maps = &self.dataplane.maps;
        let mut views = Vec::new();
        for service in self.model.services() {
            let (key, config) = (service.key(), &service.config);
            let counters = match self.reconciler.service_number(&key) {
                Some(number) => maps.service_stats.sum(number)?,
                None => Counters::default(),
            };
            let mut traffic = traffic(&counters);
            for backend in &service.backends {
                let address = backend.config().address;
                if let Some(number) = self.reconciler.backend_number(&key, &address) {
                    let load = maps.backend_load.read(number);
                    traffic.active_connections += load.active();
                    traffic.inactive_connections += load.inactive();
                }
            }
            views.push(types::Service {
                name: config.name.clone(),
                listen: config.listen.to_string(),
                protocol: config.protocol.name().to_owned(),
                forward: names::name_of(names::FORWARD, config.forward).to_owned(),
                scheduler: names::name_of(names::SCHEDULER, config.scheduler).to_owned(),
                backends_up: u32::try_from(service.backends_up()).unwrap_or(u32::MAX),
                backends_total: u32::try_from(service.backends.len()).unwrap_or(u32::MAX),
                idle_timeout_seconds: config.idle_timeout.as_secs_f64(),
                connect_timeout_seconds: config.connect_timeout.map(|t| t.as_secs_f64()),
                gateway: config.gateway.map(|gateway| gateway.to_string()),
                health: config.health.check.name().to_owned(),
                traffic,
            });
        }
        Ok(views)
    }

    pub(super) fn backend_views(&self, only: Option<&str>) -> Result<Vec<types::Backend>> {
        let maps = &self.dataplane.maps;
        let mut views = Vec::new();
        for service in self.model.services() {
            if only.is_some_and(|name| name != service.config.name) {
                continue;
            }
            let key = service.key();
            for (backend, effective_weight) in service.backends.iter().zip(service.weights()) {
                let address = backend.config().address;
                let traffic = match self.reconciler.backend_number(&key, &address) {
                    Some(number) => {
                        let load = maps.backend_load.read(number);
                        types::Traffic {
                            active_connections: load.active(),
                            inactive_connections: load.inactive(),
                            ..traffic(&maps.backend_stats.sum(number)?)
                        }
                    }
                    None => types::Traffic::default(),
                };
                let check = backend.last_check();
                views.push(types::Backend {
                    service: service.config.name.clone(),
                    name: backend.config().name.clone(),
                    address: Endpoint(address).to_string(),
                    weight: backend.config().weight,
                    effective_weight: effective_weight.as_f64(),
                    admin: backend.admin().name().to_owned(),
                    state: backend.state().name().to_owned(),
                    reason: backend.reason(),
                    state_seconds: backend.since().elapsed().as_secs_f64(),
                    last_change: unix_time(backend.since()),
                    check_code: check.map(|check| check.code.name().to_owned()),
                    check_text: check.map(|check| check.text.clone()),
                    check_duration: check.map(|check| check.duration.as_secs_f64()),
                    agent: backend.last_agent().map(|said| match said.report {
                        Some(_) => said.text.clone(),
                        None => said.to_string(),
                    }),
                    traffic,
                });
            }
            for (_, address, number) in self.reconciler.retiring().filter(|(of, ..)| *of == key) {
                views.push(self.retiring_view(&service.config.name, key, address, number)?);
            }
        }
        Ok(views)
    }

    /// A backend that was removed from the configuration and still has flows.
    fn retiring_view(
        &self,
        service: &str,
        key: ServiceKey,
        address: SocketAddr,
        number: u32,
    ) -> Result<types::Backend> {
        let maps = &self.dataplane.maps;
        let load = maps.backend_load.read(number);
        let since = self.retiring.get(&(key, address));
        Ok(types::Backend {
            service: service.to_owned(),
            name: Endpoint(address).to_string(),
            address: Endpoint(address).to_string(),
            weight: 0,
            effective_weight: 0.0,
            admin: Admin::Drain.name().to_owned(),
            state: State::Stopping.name().to_owned(),
            reason: "removed from the configuration; its last flows may end".to_owned(),
            state_seconds: since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
            last_change: since.map_or_else(|| unix_time(Instant::now()), |since| unix_time(*since)),
            check_code: None,
            check_text: None,
            check_duration: None,
            agent: None,
            traffic: types::Traffic {
                active_connections: load.active(),
                inactive_connections: load.inactive(),
                ..traffic(&maps.backend_stats.sum(number)?)
            },
        })
    }

    pub(super) fn drop_views(&self) -> Result<Vec<types::Drops>> {
        let drops = &self.dataplane.maps.drops;
        DropReason::ALL
            .iter()
            .map(|reason| {
                Ok(types::Drops {
                    reason: reason.name().to_owned(),
                    packets: drops.sum(*reason as u32)?,
                })
            })
            .collect()
    }

    /// The status, but for the maps: counting their entries takes time.
    pub(super) fn status_view(&self) -> Result<types::Status> {
        let backends = || self.model.backends().map(|(_, backend)| backend);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let pressure = self.dataplane.maps.pressure.sum(0)?;
        Ok(types::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime: self.started.elapsed().as_secs_f64(),
            config: self.file.display().to_string(),
            pin_path: self.config.daemon.pin_path.display().to_string(),
            reload_error: self.reload_error.clone(),
            adopted: self.dataplane.adopted(),
            interfaces: self
                .dataplane
                .interfaces()?
                .into_iter()
                .map(|attached| types::InterfaceStatus {
                    name: attached.interface,
                    mode: attached.mode.name().to_owned(),
                })
                .collect(),
            programs: self
                .dataplane
                .programs()?
                .into_iter()
                .map(|program| types::ProgramStatus {
                    name: program.name,
                    id: program.id,
                    verified_instructions: program.verified_instructions,
                })
                .collect(),
            maps: Vec::new(),
            flows_displaced: pressure.displaced,
            flows_limited: pressure.flows,
            services: count(self.model.services().len()),
            backends_up: count(backends().filter(|b| b.state() == State::Up).count()),
            backends_total: count(backends().count()),
        })
    }

    /// What is needed to list flows beside the daemon's task.
    pub(super) fn flow_names(&self) -> Result<FlowNames> {
        let mut names = FlowNames {
            flows: Flows::new(&self.dataplane.maps)?,
            services: HashMap::new(),
            patience: flows::Patience::from(&self.config.timeouts),
            backends: HashMap::new(),
        };
        for service in self.model.services() {
            let key = service.key();
            if let Some(number) = self.reconciler.service_number(&key) {
                let idle = flows::ticks(service.config.idle_timeout);
                names
                    .services
                    .insert(number, (service.config.name.clone(), idle));
            }
            for backend in &service.backends {
                let address = backend.config().address;
                if let Some(number) = self.reconciler.backend_number(&key, &address) {
                    let name = backend.config().name.clone();
                    let shown = Endpoint(address).to_string();
                    names.backends.insert(number, (name, shown));
                }
            }
        }
        Ok(names)
    }
}

/// A moment as seconds since 1970.
fn unix_time(moment: Instant) -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since
        .unwrap_or_default()
        .saturating_sub(moment.elapsed())
        .as_secs()
}

fn traffic(counters: &Counters) -> types::Traffic {
    types::Traffic {
        active_connections: 0,
        inactive_connections: 0,
        connections_total: counters.connections,
        packets_in: counters.packets_in,
        bytes_in: counters.bytes_in,
        packets_out: counters.packets_out,
        bytes_out: counters.bytes_out,
        drops: counters.drops,
    }
}

/// The flow tables, and the names of the numbers in them.
pub(super) struct FlowNames {
    flows: Flows,
    /// Name and ticks of idle timeout by service number.
    services: HashMap<u32, (String, u32)>,
    patience: flows::Patience,
    /// Name and address as it is listed by backend number.
    backends: HashMap<u32, (String, String)>,
}

impl FlowNames {
    /// The flows that pass `filter`, at most as many as it asks for.
    pub(super) fn connections(&self, filter: &ConnectionFilter) -> Result<Vec<types::Connection>> {
        let limit = filter.limit.unwrap_or(usize::MAX);
        let mut found = Vec::new();
        if limit == 0 {
            return Ok(found);
        }
        self.flows.each(|flow| {
            if self.passes(filter, flow) {
                found.push(self.view(flow));
            }
            found.len() < limit
        })?;
        Ok(found)
    }

    /// How many flows pass `filter`.
    pub(super) fn count(&self, filter: &ConnectionFilter) -> Result<u64> {
        let mut count = 0;
        self.flows.each(|flow| {
            count += u64::from(self.passes(filter, flow));
            true
        })?;
        Ok(count)
    }

    /// How many flows of the backend with this number have not ended; `sees_replies`: whether what
    /// it answers passes here.
    pub(super) fn open(&self, backend: u32, sees_replies: bool) -> Result<u64> {
        let mut open = 0;
        self.flows.each(|flow| {
            let ours = flow.backend_number == backend && !is_over(flow.state, sees_replies);
            open += u64::from(ours);
            true
        })?;
        Ok(open)
    }

    /// Removes the flows that pass `filter`; how many there were.
    pub(super) fn flush(&self, filter: &ConnectionFilter) -> Result<u64> {
        self.flows.flush(|flow| self.passes(filter, flow))
    }

    fn passes(&self, filter: &ConnectionFilter, flow: &Connection) -> bool {
        let service = filter.service.as_ref().is_none_or(|wanted| {
            let service = self.services.get(&flow.service_number);
            service.is_some_and(|(name, _)| name == wanted)
        });
        let backend = filter.backend.as_ref().is_none_or(|wanted| {
            let backend = self.backends.get(&flow.backend_number);
            wanted.parse() == Ok(flow.backend)
                || backend.is_some_and(|(name, address)| name == wanted || address == wanted)
        });
        let client = filter
            .client
            .is_none_or(|client| client.matches(flow.client.ip(), flow.client.port()));
        let state = filter.state.is_none_or(|state| state == flow.state);
        service && backend && client && state
    }

    fn view(&self, flow: &Connection) -> types::Connection {
        let (service, idle) = self
            .services
            .get(&flow.service_number)
            .cloned()
            .unwrap_or_default();
        let text = |address: SocketAddr| address.to_string();
        types::Connection {
            protocol: if flow.protocol == 17 { "udp" } else { "tcp" }.to_owned(),
            expires_seconds: flows::seconds(flow.expires(&self.patience, idle)),
            state: names::name_of(names::STATE, flow.state).to_owned(),
            source: text(flow.client),
            virtual_address: text(flow.vip),
            destination: text(flow.backend),
            nat_source: text(flow.nat_source),
            service,
            backend: self
                .backends
                .get(&flow.backend_number)
                .map_or_else(|| text(flow.backend), |(name, _)| name.clone()),
        }
    }
}
