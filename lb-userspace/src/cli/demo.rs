//! `sluice demo`.

use crate::demo;
use anyhow::Result;
use std::net::SocketAddr;

/// See a balancer at work: client, balancer and backends in network namespaces of their own.
///
/// Takes a few seconds and leaves nothing behind. Needs root, no network and no configuration.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sluice demo
  sudo sluice demo --keep")]
pub(super) struct Args {
    /// Stay up afterwards, and print commands to try.
    #[arg(long)]
    keep: bool,
}

impl Args {
    pub(super) fn run(&self) -> Result<()> {
        demo::run(self.keep)
    }
}

/// One server of the demonstration, which starts it itself.
#[derive(Debug, clap::Args)]
pub(super) struct Backend {
    /// What it answers.
    #[arg(long)]
    name: String,
    /// Where it listens.
    #[arg(long)]
    listen: SocketAddr,
}

impl Backend {
    pub(super) async fn run(self) -> Result<()> {
        demo::serve(self.name, self.listen).await
    }
}
