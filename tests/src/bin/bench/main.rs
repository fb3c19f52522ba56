//! `cargo xtask bench`: measures, prints tables, and writes JSON. `docs/performance.md` describes the methods.

mod cpu;
mod end_to_end;
mod machine;
mod packets;
mod report;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use report::Report;
use std::{
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
    /// Only cases whose names contain each of these words; may be given more than once, and then either will do
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
}

/// How each part is called, its cases and its measurement.
type Measure = (
    Part,
    &'static str,
    fn(&Choice) -> Vec<String>,
    fn(&Choice) -> Result<Report>,
);

const PARTS: [Measure; 2] = [
    (Part::Packets, "packets", packets::names, packets::measure),
    (
        Part::EndToEnd,
        "end-to-end",
        end_to_end::names,
        end_to_end::measure,
    ),
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
        let fits = |words: &String| words.split_whitespace().all(|word| name.contains(word));
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
    let wants = |part| options.parts.is_empty() || options.parts.contains(&part);
    let baseline = options.baseline.as_deref().map(report::read).transpose()?;
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("{}: cannot be made", options.out.display()))?;
    let mut failures = 0;
    let mut finish = |name: &str, report: Report| -> Result<()> {
        let file = options.out.join(format!("{name}.json"));
        report.write(&file)?;
        if let Some(baseline) = &baseline {
            report.compare(baseline);
        }
        println!("\n{} results in {}", report.len(), file.display());
        failures += report.failures();
        Ok(())
    };
    for (part, name, names, measure) in PARTS {
        if !wants(part) {
            continue;
        }
        if options.list {
            names(&choice).iter().for_each(|name| println!("{name}"));
        } else {
            finish(name, measure(&choice)?)?;
        }
    }
    if failures > 0 {
        bail!("{failures} cases did not do what they should; see above");
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
