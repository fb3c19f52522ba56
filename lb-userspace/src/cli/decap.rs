//! `sluice decap`.

use super::output::{Cell, Colour, Format, Output, Table, bytes, count, json, paint};
use crate::{
    config::AttachMode,
    decap::{self, Options, PIN_PATH, Status},
};
use anyhow::Result;
use clap::ValueEnum;
use lb_common::decap::GUE_PORT;
use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    net::IpAddr,
    path::PathBuf,
};

/// On a backend: take encapsulation off the balancer's packets, without a tunnel interface.
///
/// Packets in IP-in-IP (IPv4 and IPv6 in either) and GUE that were sent to this host and carry a packet
/// for one of its VIPs reach the kernel as the client sent them; it answers the client directly. All
/// others pass as they are. Runs until SIGTERM or Ctrl-C, then detaches, and follows the
/// host's addresses meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sluice decap eth0
  sudo sluice decap eth0 --vip 198.51.100.10 --background
  sudo sluice decap eth0 --status -o json
  sudo sluice decap eth0 --detach")]
pub(super) struct Args {
    /// Interface that the balancer's packets come in by.
    #[arg(value_name = "IFACE")]
    interface: String,

    /// How to attach: auto tries the driver first.
    #[arg(long, value_enum, default_value = "auto", value_name = "MODE")]
    mode: Mode,

    /// Take only packets for this address; may be repeated [default: every address of this host].
    #[arg(long = "vip", value_name = "ADDRESS")]
    vips: Vec<IpAddr>,

    /// UDP port that GUE arrives at.
    #[arg(long, value_name = "PORT", default_value_t = GUE_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,

    /// Attach, and leave the program in the kernel without a process; addresses are those of now.
    #[arg(long)]
    background: bool,

    /// Take the program off the interface, whether in the background or not.
    #[arg(long, conflicts_with_all = ["background", "status", "vips", "port", "mode"])]
    detach: bool,

    /// Show what runs on the interface and what it has counted.
    #[arg(long, conflicts_with_all = ["background", "vips", "port", "mode"])]
    status: bool,

    /// Directory of the pin that --background makes; another one for each network namespace.
    #[arg(long, value_name = "PATH", default_value = PIN_PATH)]
    pin_path: PathBuf,

    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Auto,
    Driver,
    Generic,
}

impl Args {
    pub(super) async fn run(self, colour: bool) -> Result<String> {
        if self.status {
            let status = decap::status(&self.interface, &self.pin_path).await?;
            return match self.output.format {
                Format::Json => json(&status),
                format => Ok(show(&status, format == Format::Wide, colour)),
            };
        }
        if self.detach {
            let removed = decap::detach(&self.interface, &self.pin_path)?;
            return Ok(if removed {
                format!("detached from {}\n", self.interface)
            } else {
                format!("nothing to detach from {}\n", self.interface)
            });
        }
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .init();
        let options = Options {
            interface: self.interface,
            mode: match self.mode {
                Mode::Auto => AttachMode::Auto,
                Mode::Driver => AttachMode::Driver,
                Mode::Generic => AttachMode::Generic,
            },
            vips: self.vips,
            port: self.port,
            pin_path: self.pin_path,
        };
        if self.background {
            decap::start_background(&options).await?;
        } else {
            decap::run(&options).await?;
        }
        Ok(String::new())
    }
}

fn show(status: &Status, exact: bool, colour: bool) -> String {
    let process = if status.background {
        "in the background"
    } else {
        "as long as its process runs"
    };
    let vips: Vec<String> = status.vips.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "Interface: {} in {} mode, {process}\nVIPs: {}\nGUE port: {}\n",
        status.interface,
        status.mode,
        vips.join(" "),
        status.port
    );
    for warning in &status.warnings {
        let line = format!("Warning: {warning}");
        let _ = writeln!(text, "{}", paint(&line, Some(Colour::Yellow), colour));
    }
    let mut table = Table::new(["Outcome", ">Packets", ">Bytes", "Kernel gets"]);
    for counter in &status.counters {
        if !counter.taken && counter.packets == 0 {
            continue;
        }
        let (packets, size) = if exact {
            (counter.packets.to_string(), counter.bytes.to_string())
        } else {
            (count(counter.packets), bytes(counter.bytes))
        };
        let (gets, shade) = if counter.taken {
            ("the inner packet", None)
        } else {
            ("the packet as it came", Some(Colour::Yellow))
        };
        table.row(vec![
            Cell::coloured(counter.outcome, shade),
            packets.into(),
            size.into(),
            gets.into(),
        ]);
    }
    let _ = write!(text, "\n{}", table.render(colour));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decap::OutcomeCount;

    #[test]
    fn the_status_looks_like_this() {
        let counter = |outcome, taken, packets, bytes| OutcomeCount {
            outcome,
            taken,
            packets,
            bytes,
        };
        let status = Status {
            interface: "eth0".into(),
            mode: "driver",
            background: true,
            port: 6080,
            vips: vec!["203.0.113.80".parse().unwrap()],
            counters: vec![
                counter("ipip", true, 123_456, 9_000_000),
                counter("gue", true, 0, 0),
                counter("malformed", false, 0, 0),
                counter("not_vip", false, 3, 180),
            ],
            warnings: vec!["mend it".into()],
        };
        let expected = "\
Interface: eth0 in driver mode, in the background
VIPs: 203.0.113.80
GUE port: 6080
Warning: mend it

Outcome  Packets    Bytes  Kernel gets
ipip      123.5k  8.6 MiB  the inner packet
gue            0      0 B  the inner packet
not_vip        3    180 B  the packet as it came
";
        assert_eq!(show(&status, false, false), expected);
        let exact = show(&status, true, false);
        assert!(exact.contains("123456  9000000"), "{exact}");
    }
}
