//! `exec`: a program of the operator's.

use super::probe::Outcome;
use crate::{config::Exec, model::check::Code};
use std::{
    io,
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    time::{Instant, timeout_at},
};

/// Bytes of output that are read; the first line of them is shown.
const OUTPUT: usize = 4096;

/// Characters of the first line that are shown.
const SHOWN: usize = 200;

/// A program that runs in a process group of its own, which goes when this does.
pub(crate) struct Group {
    child: Child,
    /// Its number; `None` once it has ended and the number may be another's.
    number: Option<i32>,
}

impl Group {
    /// Starts `command`, with no standard input.
    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        let child = command.process_group(0).stdin(Stdio::null()).spawn()?;
        let number = child.id().and_then(|id| i32::try_from(id).ok());
        Ok(Self { child, number })
    }

    /// Waits until the program has ended; others of its group may live on.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Leaves alone what is left of the group.
    pub(crate) fn release(mut self) {
        self.number = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            // SAFETY: plain system call. The kernel gives the number to nobody else as long as the
            // group has a member or its leader was not waited for.
            unsafe { libc::kill(-number, libc::SIGKILL) };
        }
    }
}

pub(super) async fn ask(
    question: &Exec,
    environment: &[(&'static str, String)],
    deadline: Instant,
    timeout: Duration,
) -> Outcome {
    let mut command = Command::new(&question.command);
    command
        .args(&question.args)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .env("SLUICE_TIMEOUT", timeout.as_secs_f64().to_string())
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if effective_user() != question.user.uid {
        command.uid(question.user.uid).gid(question.user.gid);
    }
    let mut group = match Group::spawn(&mut command) {
        Ok(group) => group,
        Err(error) => return not_run(question, error),
    };
    let output = group.child.stdout.take();
    let mut line = String::new();
    let mut status = None;
    // What it left running may hold on to its output; that is its own loss, at the deadline.
    let whole = async {
        let wait = async { status = Some(group.wait().await) };
        tokio::join!(wait, first_line(output, &mut line));
    };
    let late = timeout_at(deadline, whole).await.is_err();
    if !late {
        group.release();
    }
    match status {
        Some(status) => Ok(judge(status?, &line)),
        None => Ok((Code::L7Timeout, format!("killed after {timeout:?}"))),
    }
}

fn effective_user() -> u32 {
    // SAFETY: plain system call.
    unsafe { libc::geteuid() }
}

fn not_run(question: &Exec, error: io::Error) -> Outcome {
    match error.raw_os_error() {
        // This host is out of processes, files or memory.
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => Err(error),
        _ => {
            let (command, user) = (question.command.display(), &question.user.name);
            let text = format!("{command} cannot be run as {user}: {error}");
            Ok((Code::L7Response, text))
        }
    }
}

fn judge(status: ExitStatus, line: &str) -> (Code, String) {
    let how = match (status.code(), status.signal()) {
        (Some(0), _) => return (Code::L7Ok, line.to_owned()),
        (Some(code), _) => format!("exit {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => status.to_string(),
    };
    let text = if line.is_empty() {
        how
    } else {
        format!("{how}: {line}")
    };
    (Code::L7Status, text)
}

/// Reads what there is, to its end, and keeps the first line.
async fn first_line(output: Option<impl AsyncRead + Unpin>, line: &mut String) {
    let Some(mut output) = output else { return };
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        match output.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(read) if bytes.len() < OUTPUT => {
                bytes.extend_from_slice(&chunk[..read]);
                *line = shown(&bytes);
            }
            // The rest is read so that the program can go on.
            Ok(_) => {}
        }
    }
}

/// The first line, as far as it is fit to be shown.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.trim_start().lines().next().unwrap_or_default();
    let printable = line.chars().filter(|c| !c.is_control());
    printable.take(SHOWN).collect::<String>().trim().to_owned()
}
