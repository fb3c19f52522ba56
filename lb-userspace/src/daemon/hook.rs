//! The operator's command that is run when the state of a backend changes.

use crate::health::exec::Group;
use std::{process::Stdio, time::Duration};
use tokio::{process::Command, sync::mpsc, time::timeout};
use tracing::warn;

/// Changes that may wait for the command; later ones are left out, and that is logged.
const WAITING: usize = 1024;
/// How long the command may run.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

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
    /// With nothing to run yet. Each run may take `time`.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(super) fn spawn(time: Duration) -> Self {
        let (runs, mut waiting) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            while let Some(run) = waiting.recv().await {
                run_one(run, time).await;
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

async fn run_one(run: Run, time: Duration) {
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
    match timeout(time, group.wait()).await {
        Ok(Ok(status)) => {
            group.release();
            if !status.success() {
                warn!("daemon.on_state_change: {program} ended with {status}");
            }
        }
        Ok(Err(error)) => warn!("daemon.on_state_change: {program}: {error}"),
        // Dropping the group kills it.
        Err(_) => warn!("daemon.on_state_change: {program} was killed after {time:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path, time::Instant};

    async fn written(path: &Path) -> String {
        let begun = Instant::now();
        loop {
            match fs::read_to_string(path) {
                Ok(text) if text.ends_with('\n') => return text,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{path:?} is not written"
            );
        }
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_and_the_next_runs() {
        let dir = std::env::temp_dir().join(format!("slc-{}-hook", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (first, second) = (dir.join("first"), dir.join("second"));
        let shell = |text: String| ["/bin/sh", "-c", &text].map(str::to_owned);
        let hook = Hook::spawn(Duration::from_millis(500));
        let hang = format!("sleep 1000 & echo $$ $! > {}; wait", first.display());
        let begun = Instant::now();
        hook.tell(&shell(hang), vec![]);
        hook.tell(&["/nowhere/tell".to_owned()], vec![]);
        let tell = format!("echo $SLUICE_STATE > {}", second.display());
        hook.tell(&shell(tell), vec![("SLUICE_STATE", "down".to_owned())]);
        assert!(begun.elapsed() < Duration::from_millis(400), "nobody waits");
        assert_eq!(written(&second).await, "down\n");
        for number in written(&first).await.split_whitespace() {
            // A process that only waits to be asked for by its parent has no command line.
            let line = format!("/proc/{number}/cmdline");
            while fs::read(&line).is_ok_and(|line| !line.is_empty()) {
                assert!(begun.elapsed() < Duration::from_secs(20), "{line} is there");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
