//! `sluice detach`.

use super::{Context, output::plural, stop};
use crate::{
    api::client::{Client, NoDaemon},
    config::{Config, Daemon},
    dataplane, neigh,
};
use anyhow::{Context as _, Result};
use std::path::PathBuf;

/// Remove the programs from the interfaces, and their maps: traffic of all services ends.
///
/// A daemon that runs is stopped first. Without a configuration file, what that daemon made is
/// removed; without a daemon, what is pinned in /sys/fs/bpf/sluice.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sluice detach
  sudo sluice detach --config /etc/sluice/sluice.toml")]
pub(super) struct Args {
    /// Configuration that says where the pins and the control socket are.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the pins.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pin_path: Option<PathBuf>,
}

impl Args {
    pub(super) async fn run(self, mut context: Context) -> Result<String> {
        let mut wanted = self.pin_path;
        if let Some(file) = self.config {
            let daemon = Config::load(&file)?.daemon;
            wanted = Some(daemon.pin_path);
            if !context.socket_given {
                context.client = Client::new(daemon.socket);
            }
        }
        let mut text = String::new();
        let path = match context.client.status().await {
            Ok(status) => {
                let path = PathBuf::from(status.pin_path);
                // A daemon with other pins has nothing to do with these.
                if wanted.as_ref().is_none_or(|wanted| *wanted == path) {
                    text = stop::stop(&context.client).await? + "\n";
                }
                wanted.unwrap_or(path)
            }
            Err(error) if error.is::<NoDaemon>() => wanted.unwrap_or(Daemon::PIN_PATH.into()),
            // Whatever answers there, somebody has to look at it; if it holds the pins, they
            // would be refused anyway.
            Err(error) => return Err(error.context("cannot tell whether a daemon runs")),
        };
        let removed = dataplane::detach(&path)?;
        neigh::release_all()
            .await
            .context("cannot hand the neighbour entries back to the kernel")?;
        if removed.is_empty() {
            text.push_str(&format!("nothing to remove in {}\n", path.display()));
        }
        let (maps, others): (Vec<_>, Vec<_>) = removed
            .iter()
            .partition(|object| object.starts_with("map "));
        for object in others {
            text.push_str(&format!("removed {object}\n"));
        }
        if !maps.is_empty() {
            let maps = plural(maps.len(), "map");
            text.push_str(&format!("removed {maps} from {}\n", path.display()));
        }
        Ok(text)
    }
}
