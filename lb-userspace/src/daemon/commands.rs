//! What the operator commanded, kept for the next daemon.
//!
//! A file beside the control socket holds the backends that are in `drain` or `maint`. It counts
//! only for a daemon that takes over the maps of an earlier one: whoever begins anew begins with
//! what the configuration says.

use super::Daemon;
use crate::{
    config::Endpoint,
    model::{Admin, BackendKey},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};
use tracing::{info, warn};

/// One backend that was taken out.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Command {
    /// `VIP:ports/protocol`.
    service: String,
    /// `address:port`, as it is listed.
    backend: String,
    /// `drain` or `maint`.
    admin: String,
}

/// The file for a daemon with this control socket.
fn file(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".admin");
    PathBuf::from(name)
}

impl Daemon {
    /// Gives backends the state in which an earlier daemon had them.
    pub(super) fn remember_commands(&mut self) {
        let file = file(&self.config.daemon.socket);
        if !self.dataplane.adopted() {
            let _ = fs::remove_file(&file);
            return;
        }
        let commands: Vec<Command> = match fs::read(&file) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(commands) => commands,
                Err(error) => {
                    warn!(
                        "{}: not readable, all backends are ready: {error}",
                        file.display()
                    );
                    return;
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                warn!("{}: {error}; all backends are ready", file.display());
                return;
            }
        };
        let found: Vec<(BackendKey, Admin)> = self
            .model
            .backends()
            .filter_map(|(key, _)| {
                let (service, backend) =
                    (key.service.to_string(), Endpoint(key.address).to_string());
                let is_meant = |c: &&Command| c.service == service && c.backend == backend;
                let command = commands.iter().find(is_meant)?;
                Some((key, command.admin.parse().ok()?))
            })
            .collect();
        for (key, admin) in found {
            self.model.set_admin(key, admin, Instant::now());
            let service = self.service_name(key.service);
            let backend = Endpoint(key.address);
            info!(
                "service {service}: backend {backend} is in {admin}, as before the daemon started"
            );
        }
    }

    /// Keeps what was commanded for the next daemon.
    pub(super) fn keep_commands(&self) -> io::Result<()> {
        let commands: Vec<Command> = self
            .model
            .backends()
            .filter(|(_, backend)| backend.commanded() != Admin::Ready)
            .map(|(key, backend)| Command {
                service: key.service.to_string(),
                backend: Endpoint(key.address).to_string(),
                admin: backend.commanded().to_string(),
            })
            .collect();
        let file = file(&self.config.daemon.socket);
        if commands.is_empty() {
            return match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        // Whole or not at all.
        let new = file.with_extension("admin.new");
        fs::write(&new, serde_json::to_vec(&commands)?)?;
        fs::rename(&new, &file)
    }
}
