//! Health checks: asks every backend in its rhythm and reports what it found.
//!
//! What results mean for a backend (rise, fall, states) is the model's business, not decided here.
//! See `docs/health-checks.md`.

mod agent;
mod connect;
mod dns;
pub(crate) mod exec;
mod grpc;
mod http;
mod probe;
#[cfg(test)]
mod tests;
mod tls;
mod udp;

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
    sync::{Notify, Semaphore, mpsc, watch},
    task::AbortHandle,
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::{
    config::{Check, Health, Start},
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
    pub health: Arc<Health>,
    /// What a command that checks it finds in its environment.
    pub environment: Vec<(&'static str, String)>,
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

/// How often a target is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// Every `interval`.
    #[default]
    Steady,
    /// Every `fast_interval`: something is about to change.
    Changing,
    /// Every `down_interval`.
    Down,
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
    via: Option<Via>,
    health: Arc<Health>,
    environment: Vec<(&'static str, String)>,
    pace: watch::Sender<Pace>,
    /// Has it checked now.
    ask: Arc<Notify>,
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
    /// Processes that may run at a time.
    processes: Semaphore,
    started: Instant,
    /// Milliseconds after `started` when the host's own trouble was last logged.
    complained: AtomicU64,
}

/// Results that may wait to be taken before checks wait in turn.
const RESULTS: usize = 4096;

/// Commands that run at a time; more than a few for each core only wait for each other.
const PROCESSES: usize = 64;

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
                processes: Semaphore::new(PROCESSES),
                started: Instant::now(),
                complained: AtomicU64::new(0),
            }),
            runtime: runtime::Handle::current(),
            random: RandomState::new(),
        };
        (checker, receiver)
    }

    /// Replaces what is checked. A target that is asked the same as before, equally often, keeps its
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
            let Target {
                id,
                address,
                via,
                health,
                environment,
            } = target;
            let (pace, paces) = watch::channel(Pace::Steady);
            let ask = Arc::new(Notify::new());
            let run = run(
                id.clone(),
                Probe::new(address, via, &health, &environment),
                Rhythm::new(&health, seed),
                paces,
                ask.clone(),
                now + spacing * position,
                self.shared.clone(),
            );
            let running = Running {
                address,
                via,
                health,
                environment,
                pace,
                ask,
                task: self.runtime.spawn(run).abort_handle(),
            };
            self.running.insert(id, running);
        }
    }

    /// From now on `id` is checked this often; its next check may come sooner for it, or later.
    pub fn set_pace(&self, id: &K, pace: Pace) {
        if let Some(running) = self.running.get(id) {
            running
                .pace
                .send_if_modified(|before| std::mem::replace(before, pace) != pace);
        }
    }
}

impl<K: Eq + Hash> Checker<K> {
    /// Checks `id` now, whenever its next check would be.
    pub fn ask_now(&self, id: &K) {
        if let Some(running) = self.running.get(id) {
            running.ask.notify_one();
        }
    }
}

impl Running {
    /// Whether this check serves the target as it is now. Rise, fall and start are not ours.
    fn keeps<K>(&self, target: &Target<K>) -> bool {
        let asks = |health: &Health| Health {
            rise: 0,
            fall: 0,
            start: Start::Unknown,
            flap_limit: 0,
            flap_window: Duration::ZERO,
            eject_after: 0,
            eject_time: Duration::ZERO,
            agent: None,
            ..health.clone()
        };
        self.address == target.address
            && self.via == target.via
            && self.environment == target.environment
            && (Arc::ptr_eq(&self.health, &target.health)
                || asks(&self.health) == asks(&target.health))
    }
}

/// The life of one target's checks.
async fn run<K: Clone>(
    id: K,
    probe: Probe,
    mut rhythm: Rhythm,
    mut pace: watch::Receiver<Pace>,
    ask: Arc<Notify>,
    first: Instant,
    shared: Arc<Shared<K>>,
) {
    sleep_until(first).await;
    loop {
        let room = if probe.forks() {
            &shared.processes
        } else {
            &shared.sockets
        };
        let Ok(permit) = room.acquire().await else {
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
        rhythm.next();
        loop {
            let now = *pace.borrow_and_update();
            tokio::select! {
                () = sleep_until(started + rhythm.pause(now)) => break,
                () = ask.notified() => break,
                changed = pace.changed() => if changed.is_err() {
                    return;
                },
            }
        }
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

/// Start-to-start times: the interval of the pace, give or take the jitter, so that checks of many
/// backends do not fall into step.
struct Rhythm {
    steady: Duration,
    changing: Duration,
    down: Duration,
    /// The largest part by which an interval varies.
    jitter: f64,
    random: u64,
    /// What the present interval is multiplied with.
    factor: f64,
}

impl Rhythm {
    fn new(health: &Health, seed: u64) -> Self {
        Self {
            steady: health.interval,
            changing: health.fast_interval,
            down: health.down_interval,
            jitter: f64::from(health.jitter) / 100.0,
            random: seed,
            factor: 1.0,
        }
    }

    /// Another interval begins.
    fn next(&mut self) {
        // splitmix64 (Steele, Lea, Flood 2014): one addition and two multiplications.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        // The upper 32 bits as a fraction of one.
        let fraction = f64::from(u32::try_from(bits >> 32).unwrap_or(0)) / f64::from(u32::MAX);
        self.factor = 1.0 - self.jitter + 2.0 * self.jitter * fraction;
    }

    fn pause(&self, pace: Pace) -> Duration {
        let interval = match pace {
            Pace::Steady => self.steady,
            Pace::Changing => self.changing,
            Pace::Down => self.down,
        };
        interval.mul_f64(self.factor)
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
