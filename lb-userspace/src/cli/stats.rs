//! `sluice stats`.

use super::{
    Context,
    output::{Cell, Format, Output, Table, bytes, count, json, rate},
};
use crate::api::{client::Client, types};
use anyhow::Result;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Show what services and backends have carried.
///
/// The columns are ipvsadm's. Bytes are those of IP packets. Below the table stands what was
/// dropped and why.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sluice stats
  sluice stats web --rate
  sluice stats --drops
  sluice stats -o json | jq '.[] | select(.backend == null)'")]
pub(super) struct Args {
    /// Name or VIP:port/protocol of a service; all services if left out.
    service: Option<String>,
    /// Show rates per second, measured during one second.
    #[arg(long)]
    rate: bool,
    /// Show packets dropped, by reason, of all services.
    #[arg(long, conflicts_with_all = ["rate", "service"])]
    drops: bool,
    #[command(flatten)]
    output: Output,
}

/// How long rates are measured.
const SAMPLE: Duration = Duration::from_secs(1);

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        let client = &context.client;
        let wide = self.output.format == Format::Wide;
        let as_json = self.output.format == Format::Json;
        if self.drops {
            let drops = client.drops().await?;
            return if as_json {
                json(&drops)
            } else {
                Ok(drop_table(&drops).render(context.colour))
            };
        }
        if self.rate {
            let before = rows(client, self.service.as_deref()).await?;
            let start = Instant::now();
            tokio::time::sleep(SAMPLE).await;
            let after = rows(client, self.service.as_deref()).await?;
            let rates = rates(&before, &after, start.elapsed());
            return if as_json {
                json(&rates)
            } else {
                Ok(rate_table(&rates).render(context.colour))
            };
        }
        let rows = rows(client, self.service.as_deref()).await?;
        if as_json {
            return json(&rows);
        }
        let mut text = table(&rows, wide).render(context.colour);
        // Reasons are counted for the whole data plane, not for each service.
        if self.service.is_none() {
            text.push_str(&drop_line(&client.drops().await?));
        }
        Ok(text)
    }
}

/// The counters of a service, or of one of its backends.
#[derive(Clone, Debug, Serialize)]
struct Row {
    service: String,
    /// Name of the backend; null for the service itself.
    backend: Option<String>,
    /// `VIP:port` or `address:port`.
    address: String,
    #[serde(flatten)]
    traffic: types::Traffic,
}

/// Rates per second of a service, or of one of its backends.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Rate {
    service: String,
    /// Name of the backend; null for the service itself.
    backend: Option<String>,
    /// `VIP:port` or `address:port`.
    address: String,
    connections_per_second: f64,
    packets_in_per_second: f64,
    packets_out_per_second: f64,
    bytes_in_per_second: f64,
    bytes_out_per_second: f64,
}

async fn rows(client: &Client, service: Option<&str>) -> Result<Vec<Row>> {
    let services = match service {
        Some(service) => vec![client.service(service).await?],
        None => client.services().await?,
    };
    Ok(arrange(services, client.backends(service).await?))
}

/// Each service followed by its backends.
fn arrange(services: Vec<types::Service>, backends: Vec<types::Backend>) -> Vec<Row> {
    let mut rows = Vec::with_capacity(services.len() + backends.len());
    let mut by_service = std::collections::HashMap::<String, Vec<types::Backend>>::new();
    for backend in backends {
        by_service
            .entry(backend.service.clone())
            .or_default()
            .push(backend);
    }
    for service in services {
        let backends = by_service.remove(&service.name).unwrap_or_default();
        rows.push(Row {
            service: service.name,
            backend: None,
            address: service.listen,
            traffic: service.traffic,
        });
        rows.extend(backends.into_iter().map(|backend| Row {
            service: backend.service,
            backend: Some(backend.name),
            address: backend.address,
            traffic: backend.traffic,
        }));
    }
    rows
}

/// The rates of every row that is in both samples.
fn rates(before: &[Row], after: &[Row], elapsed: Duration) -> Vec<Rate> {
    let key = |row: &Row| (row.service.clone(), row.backend.clone());
    let earlier: std::collections::HashMap<_, _> =
        before.iter().map(|row| (key(row), row.traffic)).collect();
    let rate = |row: &Row| {
        let (a, b) = (earlier.get(&key(row))?, &row.traffic);
        // Counters begin anew when the data plane is loaded again between the samples.
        let per_second = |a: u64, b: u64| b.saturating_sub(a) as f64 / elapsed.as_secs_f64();
        Some(Rate {
            service: row.service.clone(),
            backend: row.backend.clone(),
            address: row.address.clone(),
            connections_per_second: per_second(a.connections_total, b.connections_total),
            packets_in_per_second: per_second(a.packets_in, b.packets_in),
            packets_out_per_second: per_second(a.packets_out, b.packets_out),
            bytes_in_per_second: per_second(a.bytes_in, b.bytes_in),
            bytes_out_per_second: per_second(a.bytes_out, b.bytes_out),
        })
    };
    after.iter().filter_map(rate).collect()
}

fn label(service: &str, backend: Option<&str>) -> Cell {
    backend.map_or_else(
        || service.into(),
        |backend| format!("  -> {backend}").into(),
    )
}

fn table(rows: &[Row], wide: bool) -> Table<'static> {
    let mut titles = vec![
        "Service/Backend",
        ">Conns",
        ">InPkts",
        ">OutPkts",
        ">InBytes",
        ">OutBytes",
    ];
    if wide {
        titles.extend([">ActiveConn", ">InActConn", ">Drops", "Address"]);
    }
    let mut table = Table::new(titles);
    for row in rows {
        let traffic = &row.traffic;
        let mut cells = vec![
            label(&row.service, row.backend.as_deref()),
            count(traffic.connections_total).into(),
            count(traffic.packets_in).into(),
            count(traffic.packets_out).into(),
            bytes(traffic.bytes_in).into(),
            bytes(traffic.bytes_out).into(),
        ];
        if wide {
            cells.extend([
                count(traffic.active_connections).into(),
                count(traffic.inactive_connections).into(),
                count(traffic.drops).into(),
                Cell::from(row.address.as_str()),
            ]);
        }
        table.row(cells);
    }
    table
}

fn rate_table(rates: &[Rate]) -> Table<'static> {
    let mut table = Table::new([
        "Service/Backend",
        ">CPS",
        ">InPPS",
        ">OutPPS",
        ">InBPS",
        ">OutBPS",
    ]);
    for row in rates {
        table.row(vec![
            label(&row.service, row.backend.as_deref()),
            rate(row.connections_per_second).into(),
            rate(row.packets_in_per_second).into(),
            rate(row.packets_out_per_second).into(),
            bytes(row.bytes_in_per_second.round() as u64).into(),
            bytes(row.bytes_out_per_second.round() as u64).into(),
        ]);
    }
    table
}

fn drop_table(drops: &[types::Drops]) -> Table<'static> {
    let mut table = Table::new(["Reason", ">Packets"]);
    for drop in drops {
        table.row(vec![
            drop.reason.as_str().into(),
            count(drop.packets).into(),
        ]);
    }
    table
}

fn drop_line(drops: &[types::Drops]) -> String {
    let happened: Vec<_> = drops
        .iter()
        .filter(|drop| drop.packets > 0)
        .map(|drop| format!("{} {}", drop.reason, count(drop.packets)))
        .collect();
    if happened.is_empty() {
        "Dropped: nothing\n".to_owned()
    } else {
        format!("Dropped: {}\n", happened.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    fn sample_rows() -> Vec<Row> {
        arrange(sample::services(), sample::backends())
    }

    #[test]
    fn the_table_looks_like_this() {
        let expected = "\
Service/Backend          Conns  InPkts  OutPkts  InBytes  OutBytes
web                      24.7k  197.5k   175.3k  2.4 MiB   1.4 GiB
  -> app1                24.7k  197.5k   175.3k  2.4 MiB   1.4 GiB
  -> app2                    0       0        0      0 B       0 B
dns                          0       0        0      0 B       0 B
  -> [2001:db8:1::2]:53      0       0        0      0 B       0 B
";
        assert_eq!(table(&sample_rows(), false).render(false), expected);
        assert_eq!(
            drop_line(&sample::drops()),
            "Dropped: no_backend 12, no_flow 34.6k\n"
        );
        assert_eq!(drop_line(&[]), "Dropped: nothing\n");
    }

    #[test]
    fn drops_look_like_this() {
        let expected = "\
Reason      Packets
malformed         0
no_backend       12
no_flow       34.6k
";
        assert_eq!(drop_table(&sample::drops()).render(false), expected);
    }

    #[test]
    fn rates_are_per_second_of_the_time_that_passed() {
        let before = sample_rows();
        let mut after = before.clone();
        after[0].traffic.connections_total += 1000;
        after[0].traffic.packets_in += 50_000;
        after[0].traffic.bytes_out += 4 << 20;
        after[1].traffic = types::Traffic::default();
        let rates = rates(&before, &after, Duration::from_secs(2));
        let expected = "\
Service/Backend          CPS  InPPS  OutPPS   InBPS  OutBPS
web                      500  25.0k       0     0 B  2.0 MiB
";
        let lines: Vec<_> = rate_table(&rates)
            .render(false)
            .lines()
            .take(2)
            .map(normal)
            .collect();
        assert_eq!(lines, expected.lines().map(normal).collect::<Vec<_>>());
        assert_eq!(
            rates[1].connections_per_second, 0.0,
            "counters that began anew give no rate"
        );
    }

    fn normal(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_backend_that_appears_between_the_samples_waits_for_the_next() {
        let after = sample_rows();
        let rates = rates(&after[..1], &after, Duration::from_secs(1));
        assert_eq!(rates.len(), 1);
    }

    #[test]
    fn json_is_flat_and_marks_services() {
        let rows: Vec<serde_json::Value> =
            serde_json::from_str(&json(&sample_rows()).unwrap()).unwrap();
        assert_eq!(rows.len(), 5);
        assert_eq!(rows[0]["backend"], serde_json::Value::Null);
        assert_eq!(rows[1]["backend"], "app1");
        for field in [
            "service",
            "backend",
            "address",
            "active_connections",
            "inactive_connections",
            "connections_total",
            "packets_in",
            "bytes_in",
            "packets_out",
            "bytes_out",
            "drops",
        ] {
            assert!(rows.iter().all(|row| row.get(field).is_some()), "{field}");
        }
    }
}
