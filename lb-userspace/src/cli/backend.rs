//! `sluice backend`.

use super::{
    Context,
    output::{Cell, Colour, Format, Output, Stdout, Table, ago, bytes, count, json},
};
use crate::{api::types, config, model::Admin};
use anyhow::{Result, bail};
use std::{
    io::Write as _,
    time::{Duration, Instant},
};

/// Backends: the servers behind a service.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice backend list
  sluice backend list web -o wide
  sluice backend drain web app1 --wait
  sluice backend ready web app1 --wait")]
pub(super) enum Command {
    /// List the backends of one service or of all.
    #[command(after_help = "\
Examples:
  sluice backend list
  sluice backend list web -o wide
  sluice backend list -o json | jq '.[] | select(.state == \"down\")'")]
    List {
        /// Name or VIP:port/protocol of a service; all services if left out.
        service: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Give a backend no new flows; those it has go on, and it is still checked.
    ///
    /// With --wait, prints how many flows are left as they become fewer, and returns when the last
    /// has ended.
    #[command(after_help = "\
Examples:
  sluice backend drain web app1
  sluice backend drain web 10.0.0.11:3001 --wait --timeout 5m")]
    Drain(Change),
    /// Let a backend take new flows again, once its checks find it up.
    ///
    /// With --wait, returns when it takes them.
    #[command(after_help = "\
Examples:
  sluice backend ready web app1
  sluice backend ready web app1 --wait --timeout 1m")]
    Ready(Change),
    /// Take a backend out: no new flows, those it has end as on_backend_down says, and it is not
    /// checked.
    ///
    /// With --wait, prints how many flows are left as they become fewer, and returns when the last
    /// has ended.
    #[command(after_help = "\
Examples:
  sluice backend maint web app1
  sluice backend maint 198.51.100.10:80/tcp app1 --wait")]
    Maint(Change),
}

/// Which backend, and whether to wait.
#[derive(Debug, clap::Args)]
pub(super) struct Change {
    /// Name or VIP:port/protocol of the service.
    service: String,
    /// Name or address:port of the backend.
    backend: String,
    /// Wait until it is done.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most, such as 30s or 5m; for ever if left out.
    #[arg(long, value_name = "TIME", requires = "wait", value_parser = time)]
    timeout: Option<Duration>,
}

fn time(text: &str) -> Result<Duration, String> {
    config::duration(text)
}

/// Shortest time between two questions while waiting.
const POLL: Duration = Duration::from_millis(100);
/// Waiting takes one part in this many of the daemon's time at most.
const SHARE: u32 = 5;

impl Change {
    async fn run(self, context: &Context, admin: Admin) -> Result<String> {
        let Self {
            service, backend, ..
        } = &self;
        let now = context.client.set_admin(service, backend, admin).await?;
        let name = format!("service {}: backend {}", now.service, now.name);
        if self.wait {
            match admin {
                Admin::Ready => self.until_up(context, &name).await?,
                Admin::Drain | Admin::Maint => self.until_empty(context, &name).await?,
            }
            return Ok(String::new());
        }
        Ok(format!(
            "{name} is in {admin}; it is {}: {}\n",
            now.state, now.reason
        ))
    }

    /// Waits until the backend takes new flows.
    async fn until_up(&self, context: &Context, name: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let backends = context.client.backends(Some(&self.service)).await?;
            let prefix = format!("{name} ");
            let found = backends
                .into_iter()
                .find(|b| format!("service {}: backend {} ", b.service, b.name) == prefix);
            let Some(found) = found else {
                bail!("{name} was removed while it was waited for");
            };
            if found.state == "up" && found.admin == "ready" {
                say(&format!("{name} is up: {}", found.reason))?;
                return Ok(());
            }
            if self.is_over(begun) {
                let reason = found.reason;
                bail!(
                    "{name} is {} and not up in time: {reason}; see its log",
                    found.state
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the backend has no flow left, and says how many it has whenever that changes.
    async fn until_empty(&self, context: &Context, name: &str) -> Result<()> {
        let begun = Instant::now();
        let mut said = None;
        loop {
            let asked = Instant::now();
            let flows = context
                .client
                .open_flows(&self.service, &self.backend)
                .await?;
            if said != Some(flows) {
                let others = if flows.others {
                    ", and maybe some that are silent"
                } else {
                    ""
                };
                say(&format!("{name}: {} left{others}", counted(flows.open)))?;
                said = Some(flows);
            }
            if flows.open == 0 && !flows.others {
                return Ok(());
            }
            if self.is_over(begun) {
                bail!(
                    "{name}: {} left and the time is over; wait longer, or end them with: \
                     sluice backend maint {} {}",
                    counted(flows.open),
                    self.service,
                    self.backend
                );
            }
            tokio::time::sleep(POLL.max(asked.elapsed() * SHARE)).await;
        }
    }

    fn is_over(&self, begun: Instant) -> bool {
        self.timeout
            .is_some_and(|timeout| begun.elapsed() >= timeout)
    }
}

/// `1 flow`, `2 flows`.
fn counted(flows: u64) -> String {
    format!("{flows} flow{}", if flows == 1 { "" } else { "s" })
}

/// Prints a line at once.
fn say(line: &str) -> Result<()> {
    let mut stdout = Stdout::new();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        let (service, output) = match self {
            Self::List { service, output } => (service, output),
            Self::Drain(change) => return change.run(context, Admin::Drain).await,
            Self::Ready(change) => return change.run(context, Admin::Ready).await,
            Self::Maint(change) => return change.run(context, Admin::Maint).await,
        };
        let backends = context.client.backends(service.as_deref()).await?;
        match output.format {
            Format::Json => json(&backends),
            format => Ok(list(&backends, format == Format::Wide).render(context.colour)),
        }
    }
}

/// A weight in force: whole, or with the digits that it has.
pub(super) fn weight(weight: f64) -> String {
    let text = format!("{weight:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// What the checks found.
pub(super) fn state(state: &str) -> Cell {
    let colour = match state {
        "up" => Colour::Green,
        "down" => Colour::Red,
        _ => Colour::Yellow,
    };
    Cell::coloured(state, Some(colour))
}

/// What the operator wants.
pub(super) fn admin(admin: &str) -> Cell {
    Cell::coloured(admin, (admin != "ready").then_some(Colour::Yellow))
}

fn list(backends: &[types::Backend], wide: bool) -> Table<'static> {
    let mut titles = vec![
        "Service",
        "Name",
        "Address",
        ">Weight",
        ">Effective",
        "Admin",
        "State",
    ];
    titles.extend(["Since", ">ActiveConn", ">InActConn", ">Conns"]);
    if wide {
        titles.extend([
            ">InPkts",
            ">OutPkts",
            ">InBytes",
            ">OutBytes",
            ">Drops",
            ">Check",
            "Agent",
        ]);
    }
    titles.push("Reason");
    let mut table = Table::new(titles);
    for backend in backends {
        let traffic = &backend.traffic;
        let mut row: Vec<Cell> = vec![
            backend.service.as_str().into(),
            backend.name.as_str().into(),
            backend.address.as_str().into(),
            backend.weight.to_string().into(),
            weight(backend.effective_weight).into(),
            admin(&backend.admin),
            state(&backend.state),
            ago(backend.state_seconds).into(),
            count(traffic.active_connections).into(),
            count(traffic.inactive_connections).into(),
            count(traffic.connections_total).into(),
        ];
        if wide {
            row.extend([
                count(traffic.packets_in).into(),
                count(traffic.packets_out).into(),
                bytes(traffic.bytes_in).into(),
                bytes(traffic.bytes_out).into(),
                count(traffic.drops).into(),
                Cell::from(
                    backend
                        .check_duration
                        .map_or("-".to_owned(), |seconds| format!("{:.1}ms", seconds * 1e3)),
                ),
                Cell::from(backend.agent.as_deref().unwrap_or("-")),
            ]);
        }
        row.push(backend.reason.as_str().into());
        table.row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    #[test]
    fn the_listing_looks_like_this() {
        let expected = "\
Service  Name                Address             Weight  Effective  Admin  State  Since   ActiveConn  InActConn  Conns  Reason
web      app1                10.0.0.11:3001           6          6  ready  up     3m ago          24          6  24.7k  L7OK 200
web      app2                10.0.0.12:3002           4          0  ready  down   7s ago           0          0      0  L4CON connection refused
dns      [2001:db8:1::2]:53  [2001:db8:1::2]:53       1       0.35  ready  up     7s ago           0          0      0  no check
";
        assert_eq!(list(&sample::backends(), false).render(false), expected);
    }

    #[test]
    fn the_wide_listing_looks_like_this() {
        let expected = "\
Service  Name  Address         Weight  Effective  Admin  State  Since   ActiveConn  InActConn  Conns  InPkts  OutPkts  InBytes  OutBytes  Drops  Check  Agent  Reason
web      app1  10.0.0.11:3001       6          6  ready  up     3m ago          24          6  24.7k  197.5k   175.3k  2.4 MiB   1.4 GiB      2  1.2ms  100%   L7OK 200
web      app2  10.0.0.12:3002       4          0  ready  down   7s ago           0          0      0       0        0      0 B       0 B      0      -  -      L4CON connection refused
";
        assert_eq!(list(&sample::backends()[..2], true).render(false), expected);
    }

    #[test]
    fn states_are_coloured() {
        let text = list(&sample::backends(), false).render(true);
        assert!(
            text.contains("\x1b[32mup\x1b[0m") && text.contains("\x1b[31mdown\x1b[0m"),
            "{text}"
        );
    }

    #[test]
    fn json_has_the_fields_of_the_contract() {
        let backends: Vec<serde_json::Value> =
            serde_json::from_str(&json(&sample::backends()).unwrap()).unwrap();
        for field in [
            "service",
            "name",
            "address",
            "weight",
            "effective_weight",
            "admin",
            "state",
            "reason",
            "active_connections",
            "inactive_connections",
            "connections_total",
            "packets_in",
            "bytes_in",
            "packets_out",
            "bytes_out",
        ] {
            assert!(
                backends.iter().all(|backend| backend.get(field).is_some()),
                "{field}"
            );
        }
    }
}
