//! `sluice run`.

use anyhow::Result;
use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};
use tracing_subscriber::EnvFilter;

/// Run the daemon in the foreground.
///
/// SIGHUP reads the configuration again; SIGTERM and Ctrl-C end the daemon and leave the data plane in
/// the kernel, where traffic flows on. "sluice detach" removes it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sluice run --config /etc/sluice/sluice.toml
  sudo sluice run --config sluice.toml --log debug")]
pub(super) struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// What to log: error, warn, info, debug or trace, or a filter such as sluice::health=debug.
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG", default_value = "info")]
    log: String,
}

impl Args {
    pub(super) fn run(self) -> Result<()> {
        let filter = EnvFilter::builder()
            .parse(&self.log)
            .map_err(|error| anyhow::anyhow!("--log {}: {error}; use info or debug", self.log))?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .init();
        crate::daemon::run(&self.config)
    }
}
