//! `sluice backend`.

use super::{
    Context,
    output::{Cell, Colour, Format, Output, Table, ago, bytes, count, json},
};
use crate::api::types;
use anyhow::Result;

/// Backends: the servers behind a service.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice backend list
  sluice backend list web -o wide")]
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
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        let Self::List { service, output } = self;
        let backends = context.client.backends(service.as_deref()).await?;
        match output.format {
            Format::Json => json(&backends),
            format => Ok(list(&backends, format == Format::Wide).render(context.colour)),
        }
    }
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
            backend.effective_weight.to_string().into(),
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
                        .check_ms
                        .map_or("-".to_owned(), |ms| format!("{ms:.1}ms")),
                ),
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
dns      [2001:db8:1::2]:53  [2001:db8:1::2]:53       1          1  ready  up     7s ago           0          0      0  no check
";
        assert_eq!(list(&sample::backends(), false).render(false), expected);
    }

    #[test]
    fn the_wide_listing_looks_like_this() {
        let expected = "\
Service  Name  Address         Weight  Effective  Admin  State  Since   ActiveConn  InActConn  Conns  InPkts  OutPkts  InBytes  OutBytes  Drops  Check  Reason
web      app1  10.0.0.11:3001       6          6  ready  up     3m ago          24          6  24.7k  197.5k   175.3k  2.4 MiB   1.4 GiB      2  1.2ms  L7OK 200
web      app2  10.0.0.12:3002       4          0  ready  down   7s ago           0          0      0       0        0      0 B       0 B      0      -  L4CON connection refused
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
