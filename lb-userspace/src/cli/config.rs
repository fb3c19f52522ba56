//! `sluice config`.

use super::output::plural;
use crate::config::Config;
use anyhow::Result;
use std::path::PathBuf;

/// The configuration file.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice config check /etc/sluice/sluice.toml")]
pub(super) enum Command {
    /// Validate a configuration file; nothing is changed and no daemon is needed.
    #[command(after_help = "\
Examples:
  sluice config check /etc/sluice/sluice.toml
  sluice config check sluice.toml && sudo systemctl reload sluice")]
    Check {
        /// The configuration file.
        file: PathBuf,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<String> {
        let Self::Check { file } = self;
        let config = Config::load(&file)?;
        let backends = config
            .services
            .iter()
            .map(|service| service.backends.len())
            .sum();
        Ok(format!(
            "{}: ok, {}, {}\n",
            file.display(),
            plural(config.services.len(), "service"),
            plural(backends, "backend")
        ))
    }
}
