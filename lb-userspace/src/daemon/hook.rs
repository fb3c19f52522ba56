//! The operator's command that is run when the state of a backend changes.

use crate::health::exec::Group;
use std::{process::Stdio, time::Duration};
use tokio::{process::Command, sync::mpsc, time::timeout};
use tracing::warn;

/// Changes that may wait for the command; later ones are left out, and that is logged.
const WAITING: usize = 1024;
/// How long the command may run.
const TIMEOUT: Duration = Duration::from_secs(10);

/// One run of the command.
struct Run {
    /// Program and arguments.
    command: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

/// Runs the command for one change after the other, beside the daemon.
pub(super) struct Hook {
    runs: mpsc::Sender<Run>,
}

impl Hook {
    /// With nothing to run yet.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(super) fn spawn() -> Self {
        let (runs, mut waiting) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            while let Some(run) = waiting.recv().await {
                run_one(run).await;
            }
        });
        Self { runs }
    }

    /// Has `command` run, if there is one; does not wait for it.
    pub(super) fn tell(&self, command: &[String], environment: Vec<(&'static str, String)>) {
        if command.is_empty() {
            return;
        }
        let run = Run {
            command: command.to_vec(),
            environment,
        };
        if self.runs.try_send(run).is_err() {
            warn!(
                "daemon.on_state_change: {WAITING} changes wait for the command; one is left out"
            );
        }
    }
}

async fn run_one(run: Run) {
    let Some((program, arguments)) = run.command.split_first() else {
        return;
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(run.environment)
        .current_dir("/")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut group = match Group::spawn(&mut command) {
        Ok(group) => group,
        Err(error) => {
            warn!("daemon.on_state_change: {program} cannot be run: {error}");
            return;
        }
    };
    match timeout(TIMEOUT, group.wait()).await {
        Ok(Ok(status)) => {
            group.release();
            if !status.success() {
                warn!("daemon.on_state_change: {program} ended with {status}");
            }
        }
        Ok(Err(error)) => warn!("daemon.on_state_change: {program}: {error}"),
        // Dropping the group kills it.
        Err(_) => warn!("daemon.on_state_change: {program} was killed after {TIMEOUT:?}"),
    }
}
