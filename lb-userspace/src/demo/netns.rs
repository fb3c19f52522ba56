//! Network namespaces without names: each is held by a file descriptor and by what runs in it, so
//! it vanishes with this process, however the process ends.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use anyhow::{Context, Result, anyhow};
use tokio::sync::oneshot;

/// A network namespace that exists as long as this value or a process in it.
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Makes an empty one; the calling thread stays where it is.
    pub fn new() -> Result<Self> {
        let made = std::thread::spawn(|| {
            // SAFETY: takes no pointers; only this thread, which ends here, changes its namespace.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = made
            .join()
            .map_err(|_| anyhow!("network namespace: the thread that makes it panicked"))?
            .context("network namespace: cannot make one; run it with sudo")?;
        Ok(Self(file.into()))
    }

    /// Runs `work` on a thread of its own inside the namespace, with a runtime that never leaves
    /// that thread: sockets belong to the namespace of the thread that opens them.
    pub fn spawn<T, F>(
        &self,
        name: &str,
        work: F,
    ) -> Result<impl Future<Output = Result<T>> + use<T, F>>
    where
        T: Send + 'static,
        F: AsyncFnOnce() -> Result<T> + Send + 'static,
    {
        let namespace = self.0.try_clone().context("network namespace")?;
        let (result, finished) = oneshot::channel();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // The receiver is gone only when nobody wants the result any more.
                let _ = result.send(enter_and_run(namespace.as_fd(), work));
            })
            .context("cannot start a thread")?;
        let name = name.to_owned();
        Ok(async move {
            finished
                .await
                .unwrap_or_else(|_| Err(anyhow!("{name}: its thread panicked")))
        })
    }

    /// Leaves a thread in the namespace, so that `nsenter -t NUMBER -n` can enter it; the number
    /// is returned.
    pub fn hold(&self) -> Result<i32> {
        let namespace = self.0.try_clone().context("network namespace")?;
        let (entered, number) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("held open".to_owned())
            .spawn(move || {
                let number = enter(namespace.as_fd()).map(|()| {
                    // SAFETY: takes nothing, cannot fail.
                    unsafe { libc::gettid() }
                });
                // Only a caller that is gone does not listen.
                let _ = entered.send(number);
                loop {
                    std::thread::park();
                }
            })
            .context("cannot start a thread")?;
        Ok(number.recv()??)
    }

    /// [`Namespace::spawn`] and wait for the result.
    pub async fn run<T: Send + 'static>(
        &self,
        name: &str,
        work: impl AsyncFnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.spawn(name, work)?.await
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn enter_and_run<T>(namespace: BorrowedFd<'_>, work: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
    enter(namespace).context("cannot enter a network namespace")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?
        .block_on(work())
}

/// Moves the calling thread into `namespace`. Safe to call between fork and exec.
pub fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as the borrow lasts; no pointers are passed.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// The error of a C call that failed.
pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
