//! `sluice conn`.

use super::{
    Context,
    output::{Cell, Format, Output, Table, json},
};
use crate::api::types;
use anyhow::{Result, bail};

/// Connections: the flow table.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice conn list --service web
  sluice conn count --state ESTABLISHED
  sluice conn flush --backend 10.0.0.11:3001")]
pub(super) enum Command {
    /// List connections.
    #[command(after_help = "\
Examples:
  sluice conn list --service web --limit 20
  sluice conn list --client 192.0.2.0/24 --state ESTABLISHED
  sluice conn list --backend 10.0.0.11:3001 -o json")]
    List {
        #[command(flatten)]
        filter: Filter,
        /// How many at most; all if left out.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        #[command(flatten)]
        output: Output,
    },
    /// Count connections.
    #[command(after_help = "\
Examples:
  sluice conn count
  sluice conn count --service web --state ESTABLISHED")]
    Count {
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        output: Output,
    },
    /// Forget connections: their next packets are those of unknown ones.
    #[command(after_help = "\
Examples:
  sluice conn flush --backend 10.0.0.11:3001
  sluice conn flush --service dns --state UDP
  sluice conn flush --all")]
    Flush {
        #[command(flatten)]
        filter: Filter,
        /// Every connection; needed where no filter is given.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        output: Output,
    },
}

/// Which connections; all that is given must match.
#[derive(Debug, clap::Args)]
pub(super) struct Filter {
    /// Name or VIP:port/protocol of a service.
    #[arg(long)]
    service: Option<String>,
    /// Name or address:port of a backend.
    #[arg(long)]
    backend: Option<String>,
    /// Client's address, prefix such as 192.0.2.0/24, or address:port.
    #[arg(long)]
    client: Option<String>,
    /// State, such as ESTABLISHED, TIME_WAIT or UDP.
    #[arg(long)]
    state: Option<String>,
}

impl Filter {
    const fn is_empty(&self) -> bool {
        self.service.is_none()
            && self.backend.is_none()
            && self.client.is_none()
            && self.state.is_none()
    }

    fn query(self, limit: Option<usize>) -> types::ConnectionQuery {
        let Self {
            service,
            backend,
            client,
            state,
        } = self;
        types::ConnectionQuery {
            service,
            backend,
            client,
            state,
            limit,
        }
    }
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        match self {
            Self::List {
                filter,
                limit,
                output,
            } => {
                let connections = context.client.connections(&filter.query(limit)).await?;
                match output.format {
                    Format::Json => json(&connections),
                    format => Ok(list(&connections, format == Format::Wide).render(context.colour)),
                }
            }
            Self::Count { filter, output } => {
                let count = context.client.connection_count(&filter.query(None)).await?;
                match output.format {
                    Format::Json => json(&count),
                    // A bare number is what scripts want and people can read.
                    Format::Table | Format::Wide => Ok(format!("{}\n", count.connections)),
                }
            }
            Self::Flush {
                filter,
                all,
                output,
            } => {
                if filter.is_empty() && !all {
                    bail!(
                        "nothing says which connections; give --service, --backend, --client or \
                         --state, or --all"
                    );
                }
                let count = context.client.connection_flush(&filter.query(None)).await?;
                match output.format {
                    Format::Json => json(&count),
                    Format::Table | Format::Wide => Ok(format!("{}\n", count.connections)),
                }
            }
        }
    }
}

fn list(connections: &[types::Connection], wide: bool) -> Table<'static> {
    let mut titles = vec![
        "pro",
        ">expire",
        "state",
        "source",
        "virtual",
        "destination",
    ];
    if wide {
        titles.extend(["nat-source", "service", "backend"]);
    }
    let mut table = Table::new(titles);
    for connection in connections {
        let mut row: Vec<Cell> = vec![
            connection.protocol.to_ascii_uppercase().into(),
            expire(connection.expires_seconds).into(),
            connection.state.as_str().into(),
            connection.source.as_str().into(),
            connection.virtual_address.as_str().into(),
            connection.destination.as_str().into(),
        ];
        if wide {
            row.extend([
                Cell::from(connection.nat_source.as_str()),
                connection.service.as_str().into(),
                connection.backend.as_str().into(),
            ]);
        }
        table.row(row);
    }
    table
}

/// Minutes and seconds, as ipvsadm writes them.
fn expire(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    format!("{:02}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    #[test]
    fn the_listing_looks_as_ipvsadm_shows_it() {
        let expected = "\
pro  expire  state        source               virtual            destination
TCP   14:54  ESTABLISHED  203.0.113.7:51234    198.51.100.10:80   10.0.0.11:3001
UDP   00:29  UDP          [2001:db8::7]:40000  [2001:db8::53]:53  [2001:db8:1::2]:53
";
        assert_eq!(list(&sample::connections(), false).render(false), expected);
    }

    #[test]
    fn the_wide_listing_tells_the_balancers_own_side() {
        let expected = "\
pro  expire  state        source             virtual           destination     nat-source     service  backend
TCP   14:54  ESTABLISHED  203.0.113.7:51234  198.51.100.10:80  10.0.0.11:3001  10.0.0.1:1024  web      app1
";
        assert_eq!(
            list(&sample::connections()[..1], true).render(false),
            expected
        );
    }

    #[test]
    fn times_beyond_an_hour_stay_minutes() {
        assert_eq!(expire(7265.0), "121:05");
        assert_eq!(expire(-1.0), "00:00");
    }
}
