//! `sluice status`.

use super::{
    Context,
    output::{Cell, Colour, Format, Output, Table, count, json, paint, plural, printable, span},
};
use crate::api::types;
use anyhow::Result;
use std::fmt::Write as _;

/// Show the daemon, its interfaces, programs and maps, and how many backends are up.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sluice status
  sluice status -o json | jq '.interfaces'")]
pub(super) struct Args {
    #[command(flatten)]
    output: Output,
}

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        let status = context.client.status().await?;
        match self.output.format {
            Format::Json => json(&status),
            format => Ok(show(&status, format == Format::Wide, context.colour)),
        }
    }
}

/// From this share of its room on, a map is about to be full.
const NEARLY_FULL: u64 = 90;

fn show(status: &types::Status, wide: bool, colour: bool) -> String {
    let mut text = format!(
        "sluice {}, pid {}, up {}\n",
        status.version,
        status.pid,
        span(status.uptime.round())
    );
    let _ = writeln!(text, "Configuration: {}", printable(&status.config));
    if let Some(error) = &status.reload_error {
        let line = format!("Reload refused: {}", printable(error));
        let _ = writeln!(text, "{}", paint(&line, Some(Colour::Red), colour));
    }
    let origin = if status.adopted {
        "taken over from an earlier daemon"
    } else {
        "loaded by this daemon"
    };
    let _ = writeln!(text, "Data plane: {origin}");
    let health = if status.backends_up == status.backends_total {
        None
    } else if status.backends_up == 0 {
        Some(Colour::Red)
    } else {
        Some(Colour::Yellow)
    };
    let backends = format!(
        "{} of {} up",
        status.backends_up,
        plural(status.backends_total as usize, "backend")
    );
    let _ = writeln!(
        text,
        "Health: {}, {}",
        plural(status.services as usize, "service"),
        paint(&backends, health, colour)
    );

    if status.flows_displaced != 0 {
        let displaced = format!(
            "{} connections had to make room for others since it was made",
            count(status.flows_displaced)
        );
        let displaced = paint(&displaced, Some(Colour::Yellow), colour);
        let _ = writeln!(text, "Flow table: {displaced}");
    }

    let mut interfaces = Table::new(["Interface", "Mode"]);
    for interface in &status.interfaces {
        // Works, but costs a socket buffer for each packet.
        let slow = (interface.mode == "generic").then_some(Colour::Yellow);
        interfaces.row(vec![
            interface.name.as_str().into(),
            Cell::coloured(interface.mode.as_str(), slow),
        ]);
    }
    let mut programs = Table::new(["Program", ">Id", ">Verified"]);
    for program in &status.programs {
        programs.row(vec![
            program.name.as_str().into(),
            program.id.to_string().into(),
            count(program.verified_instructions.into()).into(),
        ]);
    }
    let shown: Vec<_> = status
        .maps
        .iter()
        .filter(|map| wide || says_something(map))
        .cloned()
        .collect();
    for table in [interfaces, programs, maps(&shown, wide)] {
        let _ = write!(text, "\n{}", table.render(colour));
    }
    text
}

/// Whether a map is one of those that fill with use and are sized by `[limits]`; the others follow
/// from these, or cannot be full.
fn says_something(map: &types::MapStatus) -> bool {
    [
        "flows4",
        "flows6",
        "services",
        "services4",
        "services6",
        "backends",
        "slots",
    ]
    .contains(&map.name.as_str())
}

/// How full the maps are; `wide` gives exact numbers.
pub(super) fn maps(maps: &[types::MapStatus], wide: bool) -> Table<'static> {
    let mut table = Table::new(["Map", ">Entries", ">Max", ">Full"]);
    for map in maps {
        let percent = map.entries.saturating_mul(100) / map.max_entries.max(1);
        let exact = |n: u64| if wide { n.to_string() } else { count(n) };
        // Sets of flows are in use long before their table is full.
        let may_fill = map.max_entries > 1 && !map.name.starts_with("flow_sets");
        let full = (percent >= NEARLY_FULL && may_fill).then_some(Colour::Red);
        table.row(vec![
            map.name.as_str().into(),
            exact(map.entries).into(),
            exact(map.max_entries).into(),
            Cell::coloured(format!("{percent}%"), full),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    #[test]
    fn the_summary_looks_like_this() {
        let expected = "\
sluice 0.1.0, pid 4711, up 1h2m
Configuration: /etc/sluice/sluice.toml
Data plane: taken over from an earlier daemon
Health: 2 services, 2 of 3 backends up
Flow table: 12 connections had to make room for others since it was made

Interface  Mode
eth0       driver

Program  Id  Verified
ingress  42      8123

Map       Entries   Max  Full
flows4     262.1k  1.0M   25%
services        2  4096    0%
";
        assert_eq!(show(&sample::status(), false, false), expected);
    }

    #[test]
    fn a_refused_reload_is_told() {
        let status = types::Status {
            reload_error: Some("sluice.toml:3: unknown key".into()),
            ..sample::status()
        };
        let text = show(&status, false, false);
        assert!(
            text.contains("\nReload refused: sluice.toml:3: unknown key\n"),
            "{text}"
        );
    }

    #[test]
    fn json_has_the_fields_of_the_contract() {
        let status: serde_json::Value =
            serde_json::from_str(&json(&sample::status()).unwrap()).unwrap();
        for field in ["version", "pid", "uptime", "interfaces", "programs", "maps"] {
            assert!(status.get(field).is_some(), "{field}");
        }
        for field in ["name", "mode"] {
            assert!(status["interfaces"][0].get(field).is_some(), "{field}");
        }
        for field in ["name", "entries", "max_entries"] {
            assert!(status["maps"][0].get(field).is_some(), "{field}");
        }
    }
}
