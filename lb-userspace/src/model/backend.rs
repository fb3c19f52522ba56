//! How one backend of one service stands.

use super::CheckResult;
use crate::{
    config::{self, Check, Start},
    health::Pace,
};
use std::{fmt, time::Instant};

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Admin {
    /// It takes new flows while it is up.
    #[default]
    Ready,
    /// It keeps its flows and takes no new ones.
    Drain,
    /// It takes no new flows, may not keep those it has, and is not checked.
    Maint,
}

impl Admin {
    /// `ready`, `drain` or `maint`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Drain => "drain",
            Self::Maint => "maint",
        }
    }
}

impl fmt::Display for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a backend is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It can take flows.
    Up,
    /// It failed its checks, or there is no way to it.
    Down,
    /// Nothing is known yet: it was not checked, or the way to it is still being asked for.
    Starting,
    /// It was removed and still has flows.
    Stopping,
    /// It is in maintenance, so nobody asks.
    Unknown,
}

impl State {
    /// `up`, `down`, `starting`, `stopping` or `unknown`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The way to a backend's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Still being asked for.
    #[default]
    Pending,
    /// The next hop is known.
    Open,
    /// Packets cannot be sent, for this reason.
    Blocked(String),
}

/// What an earlier daemon left in the maps about a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// It was not found dead.
    pub alive: bool,
    /// Its next hop was known.
    pub resolved: bool,
}

/// What the checks say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// No check ended yet.
    None,
    Good,
    Bad,
}

impl Verdict {
    const fn at_start(start: Start) -> Self {
        match start {
            Start::Unknown => Self::None,
            Start::Up => Self::Good,
            Start::Down => Self::Bad,
        }
    }
}

/// One backend: what is configured, what the operator wants, what the checks and the way to it
/// say.
#[derive(Clone, Debug)]
pub struct Backend {
    config: config::Backend,
    admin: Admin,
    verdict: Verdict,
    /// Results in a row that speak against `verdict`.
    against: u32,
    last: Option<CheckResult>,
    inherited: bool,
    path: Path,
    state: State,
    since: Instant,
}

impl Backend {
    /// A backend of which nothing is known but the way to it.
    pub(super) fn new(config: config::Backend, path: Path, now: Instant) -> Self {
        let verdict = Verdict::at_start(config.health.start);
        let mut backend = Self {
            config,
            admin: Admin::Ready,
            verdict,
            against: 0,
            last: None,
            inherited: false,
            path,
            state: State::Starting,
            since: now,
        };
        backend.settle(now);
        backend
    }

    /// What is configured.
    #[must_use]
    pub const fn config(&self) -> &config::Backend {
        &self.config
    }

    /// What the operator wants.
    #[must_use]
    pub const fn admin(&self) -> Admin {
        self.admin
    }

    /// How it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// When `state` last changed.
    #[must_use]
    pub const fn since(&self) -> Instant {
        self.since
    }

    /// The last check's result, if there was one since the check was configured.
    #[must_use]
    pub const fn last_check(&self) -> Option<&CheckResult> {
        self.last.as_ref()
    }

    /// Whether it is to be checked.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.check() != &Check::None && self.admin != Admin::Maint
    }

    /// The weight it has by itself: 0 unless it takes new flows. Of a backup that is held back
    /// [`super::Service::weights`] knows.
    #[must_use]
    pub fn effective_weight(&self) -> u32 {
        match (self.admin, self.state) {
            (Admin::Ready, State::Up) => self.config.weight,
            _ => 0,
        }
    }

    /// Whether flows may stay with it: it was neither found dead nor taken out for maintenance.
    #[must_use]
    pub fn may_keep_flows(&self) -> bool {
        self.admin != Admin::Maint && self.state != State::Down
    }

    /// Why it stands as it does: what the last check found, or why no traffic can be sent.
    #[must_use]
    pub fn reason(&self) -> String {
        if self.admin == Admin::Maint {
            return "in maintenance".to_owned();
        }
        match &self.path {
            Path::Blocked(reason) => return reason.clone(),
            Path::Pending => return "next hop not known yet".to_owned(),
            Path::Open => {}
        }
        match &self.last {
            Some(result) => result.to_string(),
            None if self.check() == &Check::None => "no check".to_owned(),
            None if self.inherited => "not checked since the daemon started".to_owned(),
            None => "not checked yet".to_owned(),
        }
    }

    fn check(&self) -> &Check {
        &self.config.health.check
    }

    /// How often it is to be checked.
    #[must_use]
    pub fn pace(&self) -> Pace {
        match self.verdict {
            _ if self.against > 0 || self.last.is_none() => Pace::Changing,
            Verdict::Bad => Pace::Down,
            Verdict::None | Verdict::Good => Pace::Steady,
        }
    }

    pub(super) fn configure(&mut self, config: config::Backend, now: Instant) {
        if *self.check() != config.health.check {
            // The verdict stays until the new check contradicts it often enough: a service must not
            // lose all its backends for a moment because its check is edited.
            if *self.check() == Check::None {
                self.verdict = Verdict::Good;
            }
            self.against = 0;
            self.last = None;
        }
        self.config = config;
        self.settle(now);
    }

    pub(super) fn check_result(&mut self, result: CheckResult, now: Instant) {
        if !self.is_checked() {
            return;
        }
        let (found, needed) = if result.is_ok() {
            (Verdict::Good, self.config.health.rise)
        } else {
            (Verdict::Bad, self.config.health.fall)
        };
        if found == self.verdict {
            self.against = 0;
        } else {
            self.against += 1;
            if self.verdict == Verdict::None || self.against >= needed {
                self.verdict = found;
                self.against = 0;
            }
        }
        self.last = Some(result);
        self.settle(now);
    }

    pub(super) fn set_admin(&mut self, admin: Admin, now: Instant) {
        if self.admin == Admin::Maint && admin != Admin::Maint {
            // Nobody asked in the meantime, so what was found before counts for nothing.
            self.verdict = Verdict::at_start(self.config.health.start);
            self.against = 0;
            self.last = None;
            self.inherited = false;
        }
        self.admin = admin;
        self.settle(now);
    }

    pub(super) fn set_path(&mut self, path: Path, now: Instant) {
        self.path = path;
        self.settle(now);
    }

    pub(super) fn inherit(&mut self, inherited: Inherited, now: Instant) {
        // Known better than what is only assumed at the start.
        if self.last.is_none() {
            self.verdict = if inherited.alive {
                Verdict::Good
            } else {
                Verdict::Bad
            };
            self.inherited = true;
        }
        if inherited.resolved && self.path == Path::Pending {
            self.path = Path::Open;
        }
        self.settle(now);
    }

    /// Derives the state from all that is known.
    fn settle(&mut self, now: Instant) {
        let verdict = if *self.check() == Check::None {
            Verdict::Good
        } else {
            self.verdict
        };
        let state = match (self.admin, &self.path, verdict) {
            (Admin::Maint, _, _) => State::Unknown,
            (_, Path::Blocked(_), _) | (_, _, Verdict::Bad) => State::Down,
            (_, Path::Pending, _) | (_, _, Verdict::None) => State::Starting,
            (_, Path::Open, Verdict::Good) => State::Up,
        };
        if state != self.state {
            self.state = state;
            self.since = now;
        }
    }
}
