//! Health checks: asks every backend in its rhythm and reports what it found.
//!
//! What results mean for a backend (rise, fall, states) is the model's business, not decided here.
//! See `docs/health-checks.md`.

mod probe;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime,
    sync::{Semaphore, mpsc},
    task::AbortHandle,
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::{
    config::{Check, Health},
    model::check::CheckResult,
};
use probe::Probe;

/// One backend to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target<K> {
    /// Whatever its results are to be known by; one target per id.
    pub id: K,
    /// The backend's address and port.
    pub address: SocketAddr,
    /// How it is checked. Nothing is done or reported for [`Check::None`].
    pub health: Health,
    /// How its checks go where the VIP's packets go; `None`: straight to the address.
    pub via: Option<Via>,
}

/// The way of a check that is led to the VIP on a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Via {
    /// The mark of its packets, by which the data plane knows them.
    pub mark: u32,
    /// The forward mode: one of [`lb_common::service::forward`].
    pub forward: u8,
}

/// Runs the checks. Dropping it ends them.
#[derive(Debug)]
pub struct Checker<K> {
    running: HashMap<K, Running>,
    shared: Arc<Shared<K>>,
    runtime: runtime::Handle,
    random: RandomState,
}

#[derive(Debug)]
struct Running {
    address: SocketAddr,
    health: Health,
    via: Option<Via>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Shared<K> {
    results: mpsc::Sender<(K, CheckResult)>,
    /// Sockets that may be open at a time.
    sockets: Semaphore,
    started: Instant,
    /// Milliseconds after `started` when the host's own trouble was last logged.
    complained: AtomicU64,
}

/// Results that may wait to be taken before checks wait in turn.
const RESULTS: usize = 4096;

/// First checks of targets that are set together start at least this far apart, if a tenth of the interval
/// has room for that.
const SPACING: Duration = Duration::from_millis(1);

/// Milliseconds between log lines about the host's own trouble.
const COMPLAIN_EVERY: u64 = 10_000;

impl<K: Clone + Eq + Hash + Send + Sync + 'static> Checker<K> {
    /// A checker with nothing to check yet, and where its results arrive. Checks run on the current
    /// runtime, in the network namespace of its threads.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn spawn() -> (Self, mpsc::Receiver<(K, CheckResult)>) {
        let (results, receiver) = mpsc::channel(RESULTS);
        let checker = Self {
            running: HashMap::new(),
            shared: Arc::new(Shared {
                results,
                sockets: Semaphore::new(sockets()),
                started: Instant::now(),
                complained: AtomicU64::new(0),
            }),
            runtime: runtime::Handle::current(),
            random: RandomState::new(),
        };
        (checker, receiver)
    }

    /// Replaces what is checked. A target whose address, check, interval and timeout stay keeps its
    /// rhythm; others are checked at once.
    ///
    /// A result that was already on its way may still arrive for a target that is gone.
    pub fn set(&mut self, targets: Vec<Target<K>>) {
        let mut before = std::mem::take(&mut self.running);
        let mut new = Vec::new();
        for target in targets {
            if target.health.check == Check::None {
                continue;
            }
            match before.remove(&target.id) {
                Some(running) if running.keeps(&target) => {
                    self.running.insert(target.id, running);
                }
                _ => new.push(target),
            }
        }
        // Ends what is not wanted any more before anything new starts.
        drop(before);
        let now = Instant::now();
        let count = u32::try_from(new.len()).unwrap_or(u32::MAX).max(1);
        for (position, target) in (0u32..).zip(new) {
            let spacing = (target.health.interval / 10 / count).min(SPACING);
            let seed = self.random.hash_one(position) ^ self.random.hash_one(&target.id);
            let run = run(
                target.id.clone(),
                Probe::new(target.address, &target.health, target.via),
                Rhythm {
                    interval: target.health.interval,
                    random: seed,
                },
                now + spacing * position,
                self.shared.clone(),
            );
            let running = Running {
                address: target.address,
                health: target.health,
                via: target.via,
                task: self.runtime.spawn(run).abort_handle(),
            };
            self.running.insert(target.id, running);
        }
    }
}

impl Running {
    /// Whether this check serves the target as it is now. Rise and fall are not ours.
    fn keeps<K>(&self, target: &Target<K>) -> bool {
        self.address == target.address
            && self.via == target.via
            && self.health.check == target.health.check
            && self.health.interval == target.health.interval
            && self.health.timeout == target.health.timeout
    }
}

/// The life of one target's checks.
async fn run<K: Clone>(
    id: K,
    probe: Probe,
    mut rhythm: Rhythm,
    mut next: Instant,
    shared: Arc<Shared<K>>,
) {
    loop {
        sleep_until(next).await;
        let Ok(permit) = shared.sockets.acquire().await else {
            return;
        };
        let started = Instant::now();
        let outcome = probe.run(started).await;
        drop(permit);
        match outcome {
            Ok(result) => {
                if shared.results.send((id.clone(), result)).await.is_err() {
                    return;
                }
            }
            Err(error) => shared.complain(&error),
        }
        next = started + rhythm.pause();
    }
}

impl<K> Shared<K> {
    /// Logs that the host, not the backend, made a check impossible. Such checks have no result: a
    /// balancer short of descriptors must not declare its backends dead.
    fn complain(&self, error: &io::Error) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.complained.load(Ordering::Relaxed);
        if (last == 0 || now.saturating_sub(last) >= COMPLAIN_EVERY)
            && self
                .complained
                .compare_exchange(last, now.max(1), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            warn!(
                "health checks cannot run on this host: {error}; \
                 see \"ulimit -n\" and \"sysctl net.ipv4.ip_local_port_range\""
            );
        }
    }
}

/// Start-to-start times: the interval, give or take a tenth, so that checks of many backends do
/// not fall into step.
struct Rhythm {
    interval: Duration,
    random: u64,
}

impl Rhythm {
    fn pause(&mut self) -> Duration {
        // splitmix64 (Steele, Lea, Flood 2014): one addition and two multiplications.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        // The upper 32 bits as a fraction of one.
        let fraction = f64::from(u32::try_from(bits >> 32).unwrap_or(0)) / f64::from(u32::MAX);
        self.interval.mul_f64(0.9 + 0.2 * fraction)
    }
}

/// How many sockets checks may hold: three quarters of the process's open files, the rest being for
/// everything else.
fn sockets() -> usize {
    let (soft, _) = open_files().unwrap_or((1024, 1024));
    usize::try_from(soft - soft / 4)
        .unwrap_or(usize::MAX)
        .clamp(16, Semaphore::MAX_PERMITS)
}

/// Raises the number of files this process may have open to what the system allows it, and returns
/// that number. Thousands of backends that do not answer mean thousands of open sockets; the
/// usual soft limit is 1024. To be called before [`Checker::spawn`].
///
/// # Errors
///
/// When the system refuses.
pub fn raise_open_files() -> io::Result<u64> {
    let (soft, hard) = open_files()?;
    if soft < hard {
        let limit = libc::rlimit {
            rlim_cur: hard,
            rlim_max: hard,
        };
        // SAFETY: the pointer is to a live, initialised rlimit; the kernel only reads it.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(hard)
}

/// Soft and hard limit.
fn open_files() -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live rlimit that the kernel fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((limit.rlim_cur, limit.rlim_max))
}
