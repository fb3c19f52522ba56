//! `cargo xtask bench`: measures, prints tables, and writes JSON. `docs/performance.md` describes the methods.

mod balancer;
mod control_plane;
mod cpu;
mod end_to_end;
mod failover;
mod frame;
mod live;
mod machine;
mod packets;
mod plot;
mod report;
mod wrapper;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use report::Report;
use std::{
    fs,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

/// Measure the balancer: print tables, and write a JSON file for each part
#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    after_help = "Examples:
  cargo xtask bench                                  everything
  cargo xtask bench --quick                          everything, less exactly, in under three minutes
  cargo xtask bench packets --only \"dsr v4\"          some cases; --list shows their names
  cargo xtask bench packets --baseline before.json   what has changed since"
)]
struct Options {
    /// What to measure; everything if nothing is named
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Fewer rounds and fewer sizes
    #[arg(long)]
    quick: bool,
    /// Only cases that have each of these words in their names; may be given more than once, and then either will do
    #[arg(long, value_name = "WORDS")]
    only: Vec<String>,
    /// Print the names of the cases and measure nothing
    #[arg(long)]
    list: bool,
    /// Print how the result differs from that of an earlier run
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Where the JSON files go
    #[arg(
        long,
        value_name = "DIRECTORY",
        env = "SLUICE_BENCH_OUT",
        default_value = "target/bench"
    )]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Nanoseconds per packet
    Packets,
    /// Requests, connections and latency through namespaces, beside nftables, nginx and HAProxy
    EndToEnd,
    /// Changes, tables, health checks, memory
    ControlPlane,
    /// What clients notice of a backend's death
    Failover,
}

/// A part: what it is called, the names of its cases, and its measurement.
struct Measure {
    part: Part,
    name: &'static str,
    names: fn(&Choice) -> Vec<String>,
    measure: fn(&Choice) -> Result<Report>,
    /// Pictures of the results, by file name.
    plots: fn(&Report) -> Vec<(&'static str, String)>,
}

const PARTS: [Measure; 4] = [
    Measure {
        part: Part::Packets,
        name: "packets",
        names: packets::names,
        measure: packets::measure,
        plots: packets::plots,
    },
    Measure {
        part: Part::EndToEnd,
        name: "end-to-end",
        names: end_to_end::names,
        measure: end_to_end::measure,
        plots: end_to_end::plots,
    },
    Measure {
        part: Part::ControlPlane,
        name: "control-plane",
        names: control_plane::names,
        measure: control_plane::measure,
        plots: |_| Vec::new(),
    },
    Measure {
        part: Part::Failover,
        name: "failover",
        names: failover::names,
        measure: failover::measure,
        plots: |_| Vec::new(),
    },
];

/// Which cases are wanted, and how exactly.
pub struct Choice {
    /// Fewer rounds and fewer sizes.
    pub quick: bool,
    only: Vec<String>,
}

impl Choice {
    /// Whether the case of this name is wanted.
    pub fn wants(&self, name: &str) -> bool {
        let has: Vec<&str> = name.split([' ', ',']).collect();
        let fits = |words: &String| words.split_whitespace().all(|word| has.contains(&word));
        self.only.is_empty() || self.only.iter().any(fits)
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let choice = Choice {
        quick: options.quick,
        only: options.only.clone(),
    };
    let chosen = |one: &&Measure| options.parts.is_empty() || options.parts.contains(&one.part);
    let has_cases = |one: &&Measure| !(one.names)(&choice).is_empty();
    let parts: Vec<&Measure> = PARTS.iter().filter(chosen).filter(has_cases).collect();
    if parts.is_empty() {
        bail!("no case has these words in its name; see --list");
    }
    if options.list {
        let names = parts.iter().flat_map(|one| (one.names)(&choice));
        names.for_each(|name| println!("{name}"));
        return Ok(());
    }
    let baseline = options.baseline.as_deref().map(report::read).transpose()?;
    let out = &options.out;
    fs::create_dir_all(out).with_context(|| format!("{}: cannot be made", out.display()))?;
    let mut failures = 0;
    for one in parts {
        let report = (one.measure)(&choice)?;
        let file = out.join(format!("{}.json", one.name));
        report.write(&file)?;
        // Of some cases only, a picture would be of holes.
        let plots = if choice.only.is_empty() {
            (one.plots)(&report)
        } else {
            Vec::new()
        };
        for (name, svg) in plots {
            let file = out.join(name);
            fs::write(&file, svg).with_context(|| file.display().to_string())?;
        }
        if let Some(baseline) = &baseline {
            report.compare(baseline);
        }
        println!("\n{} results in {}\n", report.len(), file.display());
        failures += report.failures();
    }
    if failures > 0 {
        bail!("{failures} cases did not do what they should; see above");
    }
    Ok(())
}

/// Makes sure that it is known which `sluice` is measured.
fn need_sluice() -> Result<()> {
    if std::env::var_os("SLUICE_BIN").is_none_or(|file| file.is_empty()) {
        bail!("SLUICE_BIN names no binary `sluice`; run `cargo xtask bench`, which builds one");
    }
    Ok(())
}

/// Shows what is being done, on a terminal.
fn progress(what: &str) {
    let mut terminal = std::io::stderr();
    if terminal.is_terminal() {
        let _ = write!(terminal, "\r\x1b[K{what}");
        let _ = terminal.flush();
    }
}
