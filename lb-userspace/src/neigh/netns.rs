//! Network namespaces for tests: each is a thread of its own and goes with it, together with the
//! interfaces inside.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace.
pub(crate) struct Namespace {
    task: i32,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A new namespace, loopback up; `None`, with the reason printed, where that is not allowed.
    pub(crate) fn new() -> Option<Self> {
        let (ready, is_ready) = mpsc::channel();
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = thread::spawn(move || {
            // SAFETY: unshare takes no pointer, and CLONE_NEWNET concerns this thread alone.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            let error = (result != 0).then(std::io::Error::last_os_error);
            // SAFETY: gettid has no preconditions.
            let task = unsafe { libc::gettid() };
            let failed = error.is_some();
            ready.send((task, error)).expect("the test waits");
            if !failed {
                queue.iter().for_each(|job| job());
            }
        });
        let (task, error) = is_ready.recv().expect("the thread reports");
        if let Some(error) = error {
            eprintln!("skipped: cannot make a network namespace: {error} (run as root)");
            return None;
        }
        let namespace = Self {
            task,
            jobs: Some(jobs),
            thread: Some(thread),
        };
        namespace.ip("link set lo up");
        Some(namespace)
    }

    /// Runs a function inside.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, is_done) = mpsc::channel();
        let job = move || {
            let _ = done.send(catch_unwind(AssertUnwindSafe(job)));
        };
        let jobs = self.jobs.as_ref().expect("present until dropped");
        jobs.send(Box::new(job)).expect("the thread lives");
        match is_done.recv().expect("the thread answers") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, arguments: &str) {
        self.command("ip", arguments);
    }

    /// Sets a kernel parameter inside.
    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let value = value.to_owned();
        self.run(move || std::fs::write(&path, value).unwrap_or_else(|e| panic!("{path}: {e}")));
    }

    /// Lays a cable: `here` in this namespace, `there` in the other, both up.
    pub(crate) fn cable(&self, here: &str, other: &Self, there: &str) {
        self.ip(&format!(
            "link add {here} type veth peer name {there} netns {}",
            other.task
        ));
        self.ip(&format!("link set {here} up"));
        other.ip(&format!("link set {there} up"));
    }

    /// Output of a command run inside, which must succeed.
    pub(crate) fn command(&self, program: &str, arguments: &str) -> String {
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace());
        let shown = format!("{program} {arguments}");
        self.run(move || {
            let output = command
                .output()
                .unwrap_or_else(|error| panic!("{shown}: {error}"));
            assert!(
                output.status.success(),
                "{shown}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
