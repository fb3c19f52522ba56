//! The demonstration's processes: the backends' HTTP servers and the daemon. Each is this binary
//! again, in its own network namespace, and dies with the process that started it.

use std::{
    ffi::CStr,
    fs::File,
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};
use axum::{Router, http::header, routing::get};

use super::netns::{Namespace, check, enter};

/// The hidden subcommand that runs [`serve`].
pub const SUBCOMMAND: &str = "demo-backend";

/// Serves HTTP at `listen` until killed: `/` says `name`, `/health` says that all is well.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(name: String, listen: SocketAddr) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("backend {name}: cannot listen on {listen}"))?;
    let router = Router::new()
        .route(
            "/",
            get(async move || ([(header::SERVER, "sluice-demo")], format!("{name}\n"))),
        )
        .route("/health", get(async || "ok"));
    axum::serve(listener, router)
        .await
        .with_context(|| format!("cannot serve on {listen}"))
}

/// A mount namespace without a name: its BPF file system, and the pins on it, exist as long as
/// this value or a process in it.
pub struct Mounts(File);

/// A child process; dropping it kills it.
pub struct Node {
    name: String,
    child: Child,
}

impl Node {
    /// Starts a backend's server.
    pub fn backend(
        namespace: &Namespace,
        name: &str,
        listen: SocketAddr,
        log: &Path,
    ) -> Result<Self> {
        let mut command = this_binary();
        command.args([SUBCOMMAND, "--name", name, "--listen", &listen.to_string()]);
        Self::start(command, namespace, name, log, || Ok(()))
    }

    /// Starts the daemon, with a BPF file system of its own for its pins: a new one, or that of a
    /// former daemon.
    pub fn daemon(
        namespace: &Namespace,
        mounts: Option<&Mounts>,
        config: &Path,
        log: &Path,
    ) -> Result<Self> {
        let mut command = this_binary();
        command.args(["run", "--config"]).arg(config);
        let mounts = mounts.map(|mounts| mounts.0.try_clone()).transpose()?;
        Self::start(
            command,
            namespace,
            "sluice run",
            log,
            move || match &mounts {
                None => private_bpf_fs(),
                Some(mounts) => enter_mounts(mounts),
            },
        )
    }

    /// What it has mounted.
    pub fn mounts(&self) -> Result<Mounts> {
        let path = format!("/proc/{}/ns/mnt", self.pid());
        let file = File::open(&path).with_context(|| format!("{}: its mounts", self.name))?;
        Ok(Mounts(file))
    }

    fn start(
        mut command: Command,
        namespace: &Namespace,
        name: &str,
        log: &Path,
        prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let namespace = namespace.as_fd().try_clone_to_owned()?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the demonstration, which then ends its processes itself.
            .process_group(0);
        // SAFETY: between fork and exec only system calls are made; nothing allocates.
        unsafe {
            command.pre_exec(move || {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                enter(namespace.as_fd())?;
                prepare()
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("{name}: cannot start it"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        // SAFETY: no pointers; the process is our child and has not been waited for, so its
        // number cannot have been given to another.
        check(unsafe { libc::kill(self.pid().cast_signed(), signal) })
            .with_context(|| format!("{}: cannot signal it", self.name))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<String>> {
        let status = self.child.try_wait()?;
        Ok(status.map(|status| match (status.code(), status.signal()) {
            (Some(code), _) => format!("{} ended with exit code {code}", self.name),
            (None, Some(signal)) => format!("{} was killed by signal {signal}", self.name),
            (None, None) => format!("{} ended", self.name),
        }))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn this_binary() -> Command {
    Command::new("/proc/self/exe")
}

/// Between fork and exec: into the mount namespace of another.
fn enter_mounts(mounts: &File) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is open as long as the borrow lasts.
    check(unsafe { libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS) })
}

/// Between fork and exec: a mount namespace of its own, with a new BPF file system in the usual
/// place.
fn private_bpf_fs() -> io::Result<()> {
    const ROOT: &CStr = c"/";
    const BPF: &CStr = c"bpf";
    const BPF_DIRECTORY: &CStr = c"/sys/fs/bpf";
    let nothing = std::ptr::null();
    // SAFETY: all pointers are to constants that end in NUL, or null where mount(2) ignores them.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(
            nothing,
            ROOT.as_ptr(),
            nothing,
            libc::MS_REC | libc::MS_PRIVATE,
            nothing.cast(),
        ))?;
        check(libc::mount(
            BPF.as_ptr(),
            BPF_DIRECTORY.as_ptr(),
            BPF.as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            nothing.cast(),
        ))
    }
}
