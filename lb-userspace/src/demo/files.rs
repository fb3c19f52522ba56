//! The one thing that does not vanish by itself: a directory with the configuration, the control
//! socket and the log.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::fabric::{BACKENDS, INTERFACE, VIP};

/// Directories are called this and the number of their process.
const PREFIX: &str = "sluice-demo-";
/// Lines of the log that an error shows.
const LAST_LINES: usize = 8;

/// The directory; removed when dropped.
pub struct Files(PathBuf);

impl Files {
    /// Makes it, and removes those of processes that are gone.
    pub fn new() -> Result<Self> {
        let parent = Path::new("/run");
        remove_stale(parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("{}: cannot make it", path.display()))?;
        Ok(Self(path))
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.0.join("sluice.toml")
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// What the processes say.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Writes the configuration, with a weight for each of [`BACKENDS`].
    pub fn write_config(&self, weights: &[u32; 3]) -> Result<()> {
        let path = self.config();
        fs::write(&path, configuration(&self.socket(), weights))
            .with_context(|| format!("{}: cannot write it", path.display()))
    }

    /// The end of the log.
    pub fn last_words(&self) -> Vec<String> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let mut lines: Vec<_> = log.lines().map(str::to_owned).collect();
        lines.split_off(lines.len().saturating_sub(LAST_LINES))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn configuration(socket: &Path, weights: &[u32; 3]) -> String {
    let mut text = format!(
        r#"[daemon]
interfaces = ["{INTERFACE}"]
mode = "driver"
socket = {socket:?}
answer_arp = true

[limits]
flows = 65536
services = 16
backends = 64

[[service]]
name = "web"
listen = "{VIP}"
protocol = "tcp"
forward = "nat"
scheduler = "round-robin"
on_backend_down = "reset"

[service.health]
type = "http"
path = "/health"
interval = "100ms"
timeout = "100ms"
rise = 2
fall = 3
"#
    );
    for ((name, address), weight) in BACKENDS.iter().zip(weights) {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n[[service.backend]]\nname = \"{name}\"\naddress = \"{address}\"\nweight = {weight}\n"
        );
    }
    text
}

/// Removes what a killed demonstration could not.
fn remove_stale(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        let gone = fs::metadata(format!("/proc/{pid}"))
            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if gone {
            // Another demonstration may be removing it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
