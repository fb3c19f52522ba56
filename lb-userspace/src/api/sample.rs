//! A small daemon's answers, for tests.

use super::{ConnectionFilter, Control, Failure, Reply, types};
use crate::model::Admin;
use std::sync::atomic::{AtomicBool, Ordering};

fn traffic(scale: u64) -> types::Traffic {
    types::Traffic {
        active_connections: 12 * scale,
        inactive_connections: 3 * scale,
        connections_total: 12_345 * scale,
        packets_in: 98_765 * scale,
        bytes_in: 1_258_291 * scale,
        packets_out: 87_654 * scale,
        bytes_out: 734_003_200 * scale,
        drops: scale,
    }
}

pub(crate) fn services() -> Vec<types::Service> {
    let web = types::Service {
        name: "web".into(),
        listen: "198.51.100.10:80".into(),
        protocol: "tcp".into(),
        forward: "nat".into(),
        scheduler: "round-robin".into(),
        backends_up: 1,
        backends_total: 2,
        idle_timeout_seconds: 900.0,
        connect_timeout_seconds: Some(1.0),
        gateway: None,
        health: "http".into(),
        traffic: traffic(2),
    };
    let dns = types::Service {
        name: "dns".into(),
        listen: "[2001:db8::53]:53".into(),
        protocol: "udp".into(),
        forward: "nat".into(),
        scheduler: "maglev".into(),
        backends_up: 1,
        backends_total: 1,
        idle_timeout_seconds: 30.0,
        connect_timeout_seconds: None,
        gateway: None,
        health: "none".into(),
        traffic: types::Traffic::default(),
    };
    vec![web, dns]
}

pub(crate) fn backends() -> Vec<types::Backend> {
    let app1 = types::Backend {
        service: "web".into(),
        name: "app1".into(),
        address: "10.0.0.11:3001".into(),
        weight: 6,
        effective_weight: 6.0,
        admin: "ready".into(),
        state: "up".into(),
        reason: "L7OK 200".into(),
        state_seconds: 185.0,
        last_change: 1_800_000_000,
        check_code: Some("L7OK".into()),
        check_text: Some("200".into()),
        check_duration: Some(0.00125),
        agent: Some("100%".into()),
        traffic: traffic(2),
    };
    let app2 = types::Backend {
        name: "app2".into(),
        address: "10.0.0.12:3002".into(),
        weight: 4,
        effective_weight: 0.0,
        state: "down".into(),
        reason: "L4CON connection refused".into(),
        state_seconds: 7.5,
        check_duration: None,
        check_code: None,
        check_text: None,
        agent: None,
        traffic: types::Traffic::default(),
        ..app1.clone()
    };
    let ns = types::Backend {
        service: "dns".into(),
        name: "[2001:db8:1::2]:53".into(),
        address: "[2001:db8:1::2]:53".into(),
        weight: 1,
        effective_weight: 0.35,
        state: "up".into(),
        reason: "no check".into(),
        ..app2.clone()
    };
    vec![app1, app2, ns]
}

pub(crate) fn connections() -> Vec<types::Connection> {
    let one = types::Connection {
        protocol: "tcp".into(),
        expires_seconds: 894.4,
        state: "ESTABLISHED".into(),
        source: "203.0.113.7:51234".into(),
        virtual_address: "198.51.100.10:80".into(),
        destination: "10.0.0.11:3001".into(),
        nat_source: "10.0.0.1:1024".into(),
        service: "web".into(),
        backend: "app1".into(),
    };
    let two = types::Connection {
        protocol: "udp".into(),
        expires_seconds: 29.0,
        state: "UDP".into(),
        source: "[2001:db8::7]:40000".into(),
        virtual_address: "[2001:db8::53]:53".into(),
        destination: "[2001:db8:1::2]:53".into(),
        nat_source: "[2001:db8:1::1]:1025".into(),
        service: "dns".into(),
        backend: "[2001:db8:1::2]:53".into(),
    };
    vec![one, two]
}

pub(crate) fn drops() -> Vec<types::Drops> {
    let drops = |reason: &str, packets| types::Drops {
        reason: reason.into(),
        packets,
    };
    vec![
        drops("malformed", 0),
        drops("no_backend", 12),
        drops("no_flow", 34_567),
    ]
}

pub(crate) fn status() -> types::Status {
    types::Status {
        version: "0.1.0".into(),
        pid: 4711,
        uptime: 3725.0,
        config: "/etc/sluice/sluice.toml".into(),
        pin_path: "/sys/fs/bpf/sluice".into(),
        reload_error: None,
        adopted: true,
        interfaces: vec![types::InterfaceStatus {
            name: "eth0".into(),
            mode: "driver".into(),
        }],
        programs: vec![types::ProgramStatus {
            name: "ingress".into(),
            id: 42,
            verified_instructions: 8123,
        }],
        maps: vec![
            types::MapStatus {
                name: "flows4".into(),
                entries: 262_144,
                max_entries: 1_048_576,
            },
            types::MapStatus {
                name: "services".into(),
                entries: 2,
                max_entries: 4096,
            },
        ],
        flows_displaced: 12,
        flows_limited: 3456,
        services: 2,
        backends_up: 2,
        backends_total: 3,
    }
}

/// Answers with the samples of this module.
#[derive(Debug, Default)]
pub(crate) struct Daemon {
    pub(crate) stopped: AtomicBool,
}

impl Control for Daemon {
    async fn services(&self) -> Reply<Vec<types::Service>> {
        Ok(services())
    }

    async fn backends(&self, service: Option<String>) -> Reply<Vec<types::Backend>> {
        let wanted = |b: &types::Backend| service.as_ref().is_none_or(|name| *name == b.service);
        Ok(backends().into_iter().filter(wanted).collect())
    }

    async fn connections(&self, filter: ConnectionFilter) -> Reply<Vec<types::Connection>> {
        let matches = |c: &types::Connection| {
            let source: std::net::SocketAddr = c.source.parse().unwrap();
            filter
                .service
                .as_ref()
                .is_none_or(|name| *name == c.service)
                && filter
                    .backend
                    .as_ref()
                    .is_none_or(|b| *b == c.backend || *b == c.destination)
                && filter
                    .client
                    .is_none_or(|client| client.matches(source.ip(), source.port()))
                && filter.state.is_none_or(|state| {
                    lb_common::names::name_of(lb_common::names::STATE, state) == c.state
                })
        };
        let limit = filter.limit.unwrap_or(usize::MAX);
        Ok(connections()
            .into_iter()
            .filter(matches)
            .take(limit)
            .collect())
    }

    async fn connection_count(&self, filter: ConnectionFilter) -> Reply<u64> {
        let all = ConnectionFilter {
            limit: None,
            ..filter
        };
        Ok(self.connections(all).await?.len() as u64)
    }

    async fn connection_flush(&self, filter: ConnectionFilter) -> Reply<u64> {
        self.connection_count(filter).await
    }

    async fn drops(&self) -> Reply<Vec<types::Drops>> {
        Ok(drops())
    }

    async fn status(&self) -> Reply<types::Status> {
        Ok(status())
    }

    async fn set_admin(
        &self,
        service: String,
        backend: String,
        admin: Admin,
    ) -> Reply<types::Backend> {
        let backends = self.backends(Some(service)).await?;
        let found = backends
            .into_iter()
            .find(|b| b.name == backend || b.address == backend);
        let mut found = found.unwrap();
        found.admin = admin.name().to_owned();
        Ok(found)
    }

    async fn open_flows(&self, _: String, _: String) -> Reply<types::OpenFlows> {
        Ok(types::OpenFlows {
            open: 3,
            others: false,
        })
    }

    async fn stop(&self) -> Reply<()> {
        self.stopped.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn reload(&self) -> Reply<()> {
        Err(Failure::refused(
            "sluice.toml:3: unknown key \"intefaces\"; did you mean \"interfaces\"?",
        ))
    }
}
