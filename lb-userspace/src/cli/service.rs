//! `sluice service`.

use super::{
    Context,
    output::{Cell, Colour, Format, Output, Table, ago, bytes, count, json, span},
};
use crate::api::types;
use anyhow::Result;
use serde::Serialize;

/// Services: a VIP and port with its backends.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice service list
  sluice service show web")]
pub(super) enum Command {
    /// List the services.
    #[command(after_help = "\
Examples:
  sluice service list
  sluice service list -o wide
  sluice service list -o json | jq -r '.[].name'")]
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Show one service with its backends.
    #[command(after_help = "\
Examples:
  sluice service show web
  sluice service show 198.51.100.10:80/tcp -o json")]
    Show {
        /// Name or VIP:port/protocol.
        #[arg(value_name = "SERVICE")]
        name: String,
        #[command(flatten)]
        output: Output,
    },
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        match self {
            Self::List { output } => {
                let services = context.client.services().await?;
                match output.format {
                    Format::Json => json(&services),
                    format => Ok(list(&services, format == Format::Wide).render(context.colour)),
                }
            }
            Self::Show { name, output } => {
                let service = context.client.service(&name).await?;
                let backends = context.client.backends(Some(&service.name)).await?;
                match output.format {
                    Format::Json => json(&WithBackends { service, backends }),
                    format => Ok(show(
                        &service,
                        &backends,
                        format == Format::Wide,
                        context.colour,
                    )),
                }
            }
        }
    }
}

/// `service show -o json`.
#[derive(Serialize)]
struct WithBackends {
    #[serde(flatten)]
    service: types::Service,
    backends: Vec<types::Backend>,
}

fn list(services: &[types::Service], wide: bool) -> Table<'static> {
    let mut titles = vec![
        "Name",
        "Listen",
        "Proto",
        "Forward",
        "Scheduler",
        ">Up",
        ">ActiveConn",
        ">InActConn",
        ">Conns",
    ];
    if wide {
        titles.extend(["Health", ">IdleTimeout", ">ConnectTimeout", "Gateway"]);
        titles.extend([">InPkts", ">OutPkts", ">InBytes", ">OutBytes", ">Drops"]);
    }
    let mut table = Table::new(titles);
    for service in services {
        let traffic = &service.traffic;
        let mut row: Vec<Cell> = vec![
            service.name.as_str().into(),
            service.listen.as_str().into(),
            service.protocol.as_str().into(),
            service.forward.as_str().into(),
            service.scheduler.as_str().into(),
            up(service.backends_up, service.backends_total),
            count(traffic.active_connections).into(),
            count(traffic.inactive_connections).into(),
            count(traffic.connections_total).into(),
        ];
        if wide {
            row.extend([
                service.health.as_str().into(),
                span(service.idle_timeout_seconds).into(),
                service
                    .connect_timeout_seconds
                    .map_or("-".to_owned(), span)
                    .into(),
                gateway(service),
                count(traffic.packets_in).into(),
                count(traffic.packets_out).into(),
                bytes(traffic.bytes_in).into(),
                bytes(traffic.bytes_out).into(),
                Cell::from(count(traffic.drops)),
            ]);
        }
        table.row(row);
    }
    table
}

/// `1/2`: how many of the backends take new connections.
fn up(up: u32, total: u32) -> Cell {
    let colour = match up {
        _ if up == total => None,
        0 => Some(Colour::Red),
        _ => Some(Colour::Yellow),
    };
    Cell::coloured(format!("{up}/{total}"), colour)
}

/// Where answers go whose flow is not recorded.
fn gateway(service: &types::Service) -> Cell {
    service.gateway.as_deref().unwrap_or("-").into()
}

/// The service in ipvsadm's manner, with what ipvsadm does not know: health.
fn show(service: &types::Service, backends: &[types::Backend], wide: bool, colour: bool) -> String {
    let mut heading = Table::new([
        "Prot",
        "LocalAddress:Port",
        "Scheduler",
        "Forward",
        "Health",
        "IdleTimeout",
        "ConnectTimeout",
        "Gateway",
        "Name",
    ]);
    heading.row(vec![
        service.protocol.to_ascii_uppercase().into(),
        service.listen.as_str().into(),
        service.scheduler.as_str().into(),
        service.forward.as_str().into(),
        service.health.as_str().into(),
        span(service.idle_timeout_seconds).into(),
        service
            .connect_timeout_seconds
            .map_or("-".to_owned(), span)
            .into(),
        gateway(service),
        service.name.as_str().into(),
    ]);
    let mut titles = vec![
        "  -> RemoteAddress:Port",
        "Forward",
        ">Weight",
        ">ActiveConn",
        ">InActConn",
        "Admin",
        "State",
        "Since",
        "Name",
        "Reason",
    ];
    if wide {
        titles.extend([
            ">Effective",
            ">Conns",
            ">InPkts",
            ">OutPkts",
            ">InBytes",
            ">OutBytes",
        ]);
    }
    let mut table = Table::new(titles);
    for backend in backends {
        let traffic = &backend.traffic;
        let mut row: Vec<Cell> = vec![
            format!("  -> {}", backend.address).into(),
            service.forward.as_str().into(),
            backend.weight.to_string().into(),
            count(traffic.active_connections).into(),
            count(traffic.inactive_connections).into(),
            super::backend::admin(&backend.admin),
            super::backend::state(&backend.state),
            ago(backend.state_seconds).into(),
            backend.name.as_str().into(),
            backend.reason.as_str().into(),
        ];
        if wide {
            row.extend([
                super::backend::weight(backend.effective_weight).into(),
                count(traffic.connections_total).into(),
                count(traffic.packets_in).into(),
                count(traffic.packets_out).into(),
                bytes(traffic.bytes_in).into(),
                Cell::from(bytes(traffic.bytes_out)),
            ]);
        }
        table.row(row);
    }
    heading.render(colour) + &table.render(colour)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    #[test]
    fn the_listing_looks_like_this() {
        let expected = "\
Name  Listen             Proto  Forward  Scheduler     Up  ActiveConn  InActConn  Conns
web   198.51.100.10:80   tcp    nat      round-robin  1/2          24          6  24.7k
dns   [2001:db8::53]:53  udp    nat      maglev       1/1           0          0      0
";
        assert_eq!(list(&sample::services(), false).render(false), expected);
    }

    #[test]
    fn the_wide_listing_looks_like_this() {
        let expected = "\
Name  Listen             Proto  Forward  Scheduler     Up  ActiveConn  InActConn  Conns  Health  IdleTimeout  ConnectTimeout  Gateway  InPkts  OutPkts  InBytes  OutBytes  Drops
web   198.51.100.10:80   tcp    nat      round-robin  1/2          24          6  24.7k  http            15m              1s  -        197.5k   175.3k  2.4 MiB   1.4 GiB      2
dns   [2001:db8::53]:53  udp    nat      maglev       1/1           0          0      0  none            30s               -  -             0        0      0 B       0 B      0
";
        assert_eq!(list(&sample::services(), true).render(false), expected);
    }

    #[test]
    fn one_service_looks_as_ipvsadm_shows_it() {
        let expected = "\
Prot  LocalAddress:Port  Scheduler    Forward  Health  IdleTimeout  ConnectTimeout  Gateway  Name
TCP   198.51.100.10:80   round-robin  nat      http    15m          1s              -        web
  -> RemoteAddress:Port  Forward  Weight  ActiveConn  InActConn  Admin  State  Since   Name  Reason
  -> 10.0.0.11:3001      nat           6          24          6  ready  up     3m ago  app1  L7OK 200
  -> 10.0.0.12:3002      nat           4           0          0  ready  down   7s ago  app2  L4CON connection refused
";
        let (service, backends) = (&sample::services()[0], &sample::backends()[..2]);
        assert_eq!(show(service, backends, false, false), expected);
    }

    #[test]
    fn lost_backends_are_coloured() {
        let line = list(&sample::services(), false).render(true);
        assert!(
            line.contains("\x1b[33m1/2\x1b[0m") && !line.contains("m1/1"),
            "{line}"
        );
    }

    #[test]
    fn json_has_the_fields_of_the_contract() {
        let services: Vec<serde_json::Value> =
            serde_json::from_str(&json(&sample::services()).unwrap()).unwrap();
        for field in [
            "name",
            "listen",
            "protocol",
            "forward",
            "scheduler",
            "backends_up",
            "backends_total",
            "active_connections",
            "inactive_connections",
            "connections_total",
            "packets_in",
            "bytes_in",
            "packets_out",
            "bytes_out",
        ] {
            assert!(
                services.iter().all(|service| service.get(field).is_some()),
                "{field}"
            );
        }
        assert_eq!(
            services[0]["connections_total"], 24_690,
            "numbers are exact"
        );
        let one = WithBackends {
            service: sample::services().remove(0),
            backends: sample::backends(),
        };
        let one = serde_json::to_value(one).unwrap();
        assert_eq!(
            (&one["name"], &one["backends"][1]["name"]),
            (&"web".into(), &"app2".into())
        );
    }
}
