//! `sluice stop`.

use super::Context;
use crate::api::client::Client;
use anyhow::{Context as _, Result, bail};
use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

/// Stop the daemon; traffic flows on.
///
/// The programs stay attached and forward by the tables as they are; health is no longer checked
/// until the next "sluice run". Returns when the daemon has ended. To take the programs off the
/// interfaces as well, use "sluice detach" instead.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sluice stop
  sluice stop --socket /run/sluice/other.sock")]
pub(super) struct Args {}

/// How long the daemon may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

impl Args {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        let stopped = stop(&context.client).await?;
        Ok(format!("{stopped}; traffic flows on\n"))
    }
}

/// Stops the daemon, waits for its end and says so.
pub(super) async fn stop(client: &Client) -> Result<String> {
    let pid = client.daemon_pid().await?;
    // Opened before the daemon is told, so that the number cannot belong to another process.
    let process = pid.map(open_process).transpose()?;
    client.stop().await?;
    let Some((pid, process)) = pid.zip(process) else {
        return Ok("daemon is stopping".to_owned());
    };
    if !ends_within(&process, PATIENCE).context("cannot watch the daemon")? {
        bail!(
            "daemon (pid {pid}): told to stop but still running after {} s; see its log, or end it with: kill -9 {pid}",
            PATIENCE.as_secs()
        );
    }
    Ok(format!("daemon (pid {pid}) stopped"))
}

/// A descriptor that becomes readable when the process ends.
fn open_process(pid: i32) -> Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of this process.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(descriptor)
        .ok()
        .filter(|descriptor| *descriptor >= 0)
        .ok_or_else(io::Error::last_os_error)
        .with_context(|| format!("daemon (pid {pid}): cannot watch it"))?;
    // SAFETY: the kernel has just returned this descriptor and nothing else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Waits until the process ends, or `time` has passed.
fn ends_within(process: &OwnedFd, time: Duration) -> io::Result<bool> {
    let mut descriptor = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the pointer is to one `pollfd`, as the count says, and outlives the call.
    match unsafe { libc::poll(&raw mut descriptor, 1, milliseconds) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_end_of_a_process_is_seen_before_its_parent_waits() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = open_process(i32::try_from(child.id()).unwrap()).unwrap();
        let early = ends_within(&process, Duration::from_millis(20)).unwrap();
        assert!(!early, "the process has not ended yet");
        drop(child.stdin.take());
        assert!(ends_within(&process, PATIENCE).unwrap());
        assert!(child.wait().unwrap().success());
    }
}
