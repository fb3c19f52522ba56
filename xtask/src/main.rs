//! `cargo xtask`: set-up, build, demonstration, test, measurement and lint of Sluice.

mod artifacts;
mod bench;
mod bpf;
mod demo;
mod leftovers;
mod libtest;
mod lint;
mod old_kernel;
mod run;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, build, demonstration, test, measurement and lint of Sluice
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and running needs; does nothing where all is there
    Setup {
        /// Also what the tests run against: nginx, MariaDB, Node.js, curl, wrk and others
        #[arg(long)]
        tests: bool,
        /// Also what `bench` compares with: nginx, HAProxy, nftables, and wrk
        #[arg(long)]
        bench: bool,
        /// Also what `lint` needs: rustfmt, and clippy for both targets
        #[arg(long)]
        lint: bool,
    },
    /// Build the binary `sluice`, the kernel side inside
    Build {
        /// Optimised
        #[arg(long)]
        release: bool,
    },
    /// Show the balancer at work in network namespaces that are made and removed for it
    Demo {
        /// Passed on to `sluice demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the whole test suite
    Test(test::Options),
    /// Measure: nanoseconds per packet, and end to end beside other balancers
    #[command(disable_help_flag = true)]
    Bench {
        /// See `cargo xtask bench --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Check format, and run clippy on both sides with warnings denied
    Lint,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Setup { tests, bench, lint } => setup::command(tests, bench, lint),
        Task::Build { release } => artifacts::build(release).map(drop),
        Task::Demo { arguments } => demo::command(&arguments),
        Task::Test(options) => test::command(&options),
        Task::Bench { arguments } => bench::command(&arguments),
        Task::Lint => lint::command(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
