//! Metrics for Prometheus, in the OpenMetrics text format.
//!
//! Built from the same views as the API, at the moment they are asked for: nothing is counted
//! twice and nothing can disagree.

use crate::api::types;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};
use std::fmt;

/// Media type of [`encode`]'s result.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the metrics are made from.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Every service.
    pub services: Vec<types::Service>,
    /// Every backend.
    pub backends: Vec<types::Backend>,
    /// Packets dropped, by reason.
    pub drops: Vec<types::Drops>,
    /// The daemon.
    pub status: types::Status,
}

/// The metrics of one moment as text.
pub fn encode(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// The labels of one sample.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// One metric family: its name, what it means, and a value for each set of labels.
fn family<'a, V>(
    encoder: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    (name, help): (&str, &str),
    samples: impl IntoIterator<Item = (Labels<'a>, V)>,
    write: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in samples {
        if labels.is_empty() {
            write(&mut metric, value)?;
        } else {
            write(&mut metric.encode_family(&labels)?, value)?;
        }
    }
    Ok(())
}

/// A counter; the format appends `_total` to its name.
fn counter<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: (&str, &str),
    samples: impl IntoIterator<Item = (Labels<'a>, u64)>,
) -> fmt::Result {
    family(
        encoder,
        MetricType::Counter,
        name,
        samples,
        |metric, value| metric.encode_counter::<NoLabelSet, u64, u64>(&value, None),
    )
}

fn gauge<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: (&str, &str),
    samples: impl IntoIterator<Item = (Labels<'a>, f64)>,
) -> fmt::Result {
    family(
        encoder,
        MetricType::Gauge,
        name,
        samples,
        |metric, value| metric.encode_gauge(&value),
    )
}

#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are doubles by definition of the format"
)]
const fn float(value: u64) -> f64 {
    value as f64
}

const fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_services(&mut encoder)?;
        self.encode_backends(&mut encoder)?;
        self.encode_drops(&mut encoder)?;
        self.encode_daemon(&mut encoder)
    }
}

/// A counter of [`types::Traffic`], one sample or one for each direction.
type Reading = fn(&types::Traffic) -> Vec<(Option<&'static str>, u64)>;

/// Name behind `sluice_service_` and `sluice_backend_`, meaning, values.
const TRAFFIC: [(&str, &str, Reading); 4] = [
    ("connections", "Connections placed", |t| {
        vec![(None, t.connections_total)]
    }),
    (
        "packets",
        "Packets forwarded, from clients (in) and to them (out)",
        |t| vec![(Some("in"), t.packets_in), (Some("out"), t.packets_out)],
    ),
    (
        "bytes",
        "Bytes of IP packets forwarded, from clients (in) and to them (out)",
        |t| vec![(Some("in"), t.bytes_in), (Some("out"), t.bytes_out)],
    ),
    (
        "dropped_packets",
        "Packets dropped or refused; sluice_drop_total has the reasons",
        |t| vec![(None, t.drops)],
    ),
];

/// The counters of services or backends.
fn traffic<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    kind: &str,
    objects: &[(Labels<'a>, types::Traffic)],
) -> fmt::Result {
    for (name, help, read) in TRAFFIC {
        let samples = objects.iter().flat_map(|(labels, traffic)| {
            read(traffic).into_iter().map(|(direction, value)| {
                let mut labels = labels.clone();
                labels.extend(direction.map(|direction| ("direction", direction)));
                (labels, value)
            })
        });
        counter(encoder, (&format!("sluice_{kind}_{name}"), help), samples)?;
    }
    Ok(())
}

fn service_labels(service: &types::Service) -> Labels<'_> {
    vec![("service", &service.name)]
}

fn backend_labels(backend: &types::Backend) -> Labels<'_> {
    vec![
        ("service", &backend.service),
        ("backend", &backend.name),
        ("address", &backend.address),
    ]
}

impl Snapshot {
    fn encode_services(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let objects: Vec<_> = self
            .services
            .iter()
            .map(|s| (service_labels(s), s.traffic))
            .collect();
        traffic(encoder, "service", &objects)?;
        let each = |value: fn(&types::Service) -> f64| {
            self.services
                .iter()
                .map(move |service| (service_labels(service), value(service)))
        };
        gauge(
            encoder,
            ("sluice_service_backends", "Backends configured"),
            each(|s| s.backends_total.into()),
        )?;
        gauge(
            encoder,
            (
                "sluice_service_backends_up",
                "Backends that take new connections",
            ),
            each(|s| s.backends_up.into()),
        )
    }

    fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let objects: Vec<_> = self
            .backends
            .iter()
            .map(|b| (backend_labels(b), b.traffic))
            .collect();
        traffic(encoder, "backend", &objects)?;
        type Read = fn(&types::Backend) -> Option<f64>;
        let gauges: [(&str, &str, Read); 7] = [
            (
                "sluice_backend_active_connections",
                "Established connections, and UDP flows",
                |b| Some(float(b.traffic.active_connections)),
            ),
            (
                "sluice_backend_inactive_connections",
                "Connections being opened or closed",
                |b| Some(float(b.traffic.inactive_connections)),
            ),
            (
                "sluice_backend_up",
                "Whether the health checks find the backend up",
                |b| Some(flag(b.state == "up")),
            ),
            ("sluice_backend_weight", "Weight configured", |b| {
                Some(b.weight.into())
            }),
            ("sluice_backend_effective_weight", "Weight in force", |b| {
                Some(b.effective_weight)
            }),
            (
                "sluice_backend_last_change_timestamp_seconds",
                "When the state last changed, as Unix time",
                |b| Some(float(b.last_change)),
            ),
            (
                "sluice_backend_check_duration_seconds",
                "Time the last health check took",
                |b| b.check_duration,
            ),
        ];
        for (name, help, value) in gauges {
            let samples = self
                .backends
                .iter()
                .filter_map(|b| Some((backend_labels(b), value(b)?)));
            gauge(encoder, (name, help), samples)?;
        }
        let results = self.backends.iter().filter_map(|backend| {
            let mut labels = backend_labels(backend);
            labels.push(("result", backend.check_code.as_deref()?));
            Some((labels, 1.0))
        });
        gauge(
            encoder,
            (
                "sluice_backend_check_result",
                "1 for the last check's result",
            ),
            results,
        )?;
        let states = self.backends.iter().flat_map(|backend| {
            ["up", "down", "starting", "stopping", "unknown"].map(|state| {
                let mut labels = backend_labels(backend);
                labels.push(("state", state));
                (labels, flag(backend.state == state))
            })
        });
        gauge(
            encoder,
            ("sluice_backend_state", "1 for the state the backend is in"),
            states,
        )?;
        let states = self.backends.iter().flat_map(|backend| {
            ["ready", "drain", "maint"].map(|state| {
                let mut labels = backend_labels(backend);
                labels.push(("state", state));
                (labels, flag(backend.admin == state))
            })
        });
        gauge(
            encoder,
            (
                "sluice_backend_admin_state",
                "1 for the state the operator has put the backend in",
            ),
            states,
        )
    }

    fn encode_drops(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let samples = self
            .drops
            .iter()
            .map(|drops| (vec![("reason", drops.reason.as_str())], drops.packets));
        counter(
            encoder,
            ("sluice_drop", "Packets dropped or refused"),
            samples,
        )
    }

    fn encode_daemon(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.status;
        let flows = || {
            let family = |name: &str| match name {
                "flows4" => Some("ipv4"),
                "flows6" => Some("ipv6"),
                _ => None,
            };
            status
                .maps
                .iter()
                .filter_map(move |map| Some((vec![("family", family(&map.name)?)], map)))
        };
        gauge(
            encoder,
            ("sluice_flows", "Entries of the flow table"),
            flows().map(|(labels, map)| (labels, float(map.entries))),
        )?;
        gauge(
            encoder,
            (
                "sluice_flows_max",
                "Entries the flow table is made for; it has room for half as many more",
            ),
            flows().map(|(labels, map)| (labels, float(map.max_entries))),
        )?;
        counter(
            encoder,
            (
                "sluice_flows_displaced",
                "Established connections and UDP flows that had to make room for others in the flow table",
            ),
            [(Vec::new(), status.flows_displaced)],
        )?;
        counter(
            encoder,
            (
                "sluice_flows_limited",
                "Flows that began while more did than may be recorded",
            ),
            [(Vec::new(), status.flows_limited)],
        )?;
        gauge(
            encoder,
            (
                "sluice_map_pressure",
                "Part of a map's room that is in use, 0 to 1; of a flow table's limit, to 1.5",
            ),
            // A map of one element is always full, and sets are in use long before the table is full.
            status
                .maps
                .iter()
                .filter(|map| map.max_entries > 1 && !map.name.starts_with("flow_sets"))
                .map(|map| {
                    let pressure = float(map.entries) / float(map.max_entries);
                    (vec![("map", map.name.as_str())], pressure)
                }),
        )?;
        gauge(
            encoder,
            (
                "sluice_xdp_attach_mode",
                "1 for the mode the program is attached in",
            ),
            status.interfaces.iter().map(|interface| {
                (
                    vec![
                        ("interface", interface.name.as_str()),
                        ("mode", &interface.mode),
                    ],
                    1.0,
                )
            }),
        )?;
        gauge(
            encoder,
            (
                "sluice_config_reload_success",
                "Whether the last reload was accepted",
            ),
            [(vec![], flag(status.reload_error.is_none()))],
        )?;
        gauge(
            encoder,
            ("sluice_uptime_seconds", "Time since the daemon started"),
            [(vec![], status.uptime)],
        )?;
        gauge(
            encoder,
            ("sluice_build_info", "1, with the daemon's version"),
            [(vec![("version", status.version.as_str())], 1.0)],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    fn text() -> String {
        encode(Snapshot {
            services: sample::services(),
            backends: sample::backends(),
            drops: sample::drops(),
            status: sample::status(),
        })
        .unwrap()
    }

    #[test]
    fn every_conventional_name_is_there_with_its_value() {
        let text = text();
        for line in [
            "sluice_service_connections_total{service=\"web\"} 24690",
            "sluice_service_packets_total{service=\"web\",direction=\"in\"} 197530",
            "sluice_service_bytes_total{service=\"web\",direction=\"out\"} 1468006400",
            "sluice_service_dropped_packets_total{service=\"web\"} 2",
            "sluice_service_backends{service=\"web\"} 2.0",
            "sluice_service_backends_up{service=\"web\"} 1.0",
            "sluice_backend_connections_total{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\"} 24690",
            "sluice_backend_active_connections{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\"} 24.0",
            "sluice_backend_up{service=\"web\",backend=\"app2\",address=\"10.0.0.12:3002\"} 0.0",
            "sluice_backend_weight{service=\"web\",backend=\"app2\",address=\"10.0.0.12:3002\"} 4.0",
            "sluice_backend_effective_weight{service=\"web\",backend=\"app2\",address=\"10.0.0.12:3002\"} 0.0",
            "sluice_backend_state{service=\"web\",backend=\"app2\",address=\"10.0.0.12:3002\",state=\"down\"} 1.0",
            "sluice_backend_check_result{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\",result=\"L7OK\"} 1.0",
            "sluice_backend_last_change_timestamp_seconds{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\"} 1800000000.0",
            "sluice_backend_admin_state{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\",state=\"ready\"} 1.0",
            "sluice_backend_check_duration_seconds{service=\"web\",backend=\"app1\",address=\"10.0.0.11:3001\"} 0.00125",
            "sluice_drop_total{reason=\"no_flow\"} 34567",
            "sluice_flows{family=\"ipv4\"} 262144.0",
            "sluice_flows_max{family=\"ipv4\"} 1048576.0",
            "sluice_flows_displaced_total 12",
            "sluice_flows_limited_total 3456",
            "sluice_map_pressure{map=\"flows4\"} 0.25",
            "sluice_xdp_attach_mode{interface=\"eth0\",mode=\"driver\"} 1.0",
            "sluice_config_reload_success 1.0",
            "sluice_uptime_seconds 3725.0",
            "sluice_build_info{version=\"0.1.0\"} 1.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_backend_without_a_check_has_no_duration() {
        let text = text();
        let durations = text
            .lines()
            .filter(|l| l.starts_with("sluice_backend_check_duration_seconds{"));
        assert_eq!(durations.count(), 1);
    }

    #[test]
    fn every_family_has_a_type_and_its_meaning_once() {
        let text = text();
        let of = |what: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|l| l.strip_prefix(what));
            lines
                .map(|l| l.split(' ').next().unwrap().to_owned())
                .collect()
        };
        let (types, helps) = (of("# TYPE "), of("# HELP "));
        assert_eq!(types, helps);
        let distinct: std::collections::BTreeSet<_> = types.iter().collect();
        assert_eq!(distinct.len(), types.len());
        for sample in text.lines().filter(|l| !l.starts_with('#')) {
            let name = sample.split(['{', ' ']).next().unwrap();
            let family = name.strip_suffix("_total").unwrap_or(name);
            assert!(types.iter().any(|t| t == family), "{sample}");
        }
    }
}
