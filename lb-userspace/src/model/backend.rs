//! How one backend of one service stands.

use super::{CheckResult, agent};
use crate::{
    config::{self, Check, Start},
    health::Pace,
};
use std::{
    collections::VecDeque,
    fmt,
    time::{Duration, Instant},
};

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

impl std::str::FromStr for Admin {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        [Self::Ready, Self::Drain, Self::Maint]
            .into_iter()
            .find(|admin| admin.name() == word)
            .ok_or_else(|| format!("{word:?} is unknown; use ready, drain or maint"))
    }
}

/// A weight in force, in hundredths: a part of a small configured weight is less than 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Weight(u32);

impl Weight {
    /// No new flows.
    pub const ZERO: Self = Self(0);

    /// `percent` of a configured weight.
    const fn part(configured: u32, percent: u32) -> Self {
        Self(configured * percent)
    }

    /// Hundredths.
    #[must_use]
    pub const fn hundredths(self) -> u32 {
        self.0
    }

    /// As a number.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

/// What of its service concerns each backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) slow_start: Duration,
    pub(super) drain_timeout: Option<Duration>,
}

/// Steps in which the weight rises in a slow start.
const STEPS: u32 = 20;

/// Most times that `rise` is doubled for a backend that flaps.
const DOUBLINGS: u32 = 5;

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

/// Most times that a backend is ejected for longer than the last time, and by how much.
const EJECTIONS: u32 = 10;

/// A backend is taken for dead because of what its clients meet.
#[derive(Clone, Debug)]
struct Ejection {
    until: Instant,
    reason: String,
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

/// What the backend's agent said, put together from its lines.
#[derive(Clone, Debug)]
struct Agent {
    percent: u32,
    admin: Admin,
    down: bool,
    comment: String,
}

impl Agent {
    /// Nothing was said.
    const fn silent() -> Self {
        Self {
            percent: 100,
            admin: Admin::Ready,
            down: false,
            comment: String::new(),
        }
    }
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
    rules: Rules,
    /// What the operator wants.
    admin: Admin,
    agent: Agent,
    /// The last result of its agent, asked beside the check.
    last_agent: Option<CheckResult>,
    verdict: Verdict,
    /// When checks took it down, as far back as matters.
    falls: VecDeque<Instant>,
    /// Whether it is used although it is down: too few others are left.
    pressed: bool,
    /// Since when it takes no new flows by the operator's or the agent's word.
    drained: Option<Instant>,
    /// Whether its last flows may end, the time for them being over.
    expired: bool,
    /// Whether it takes new flows at once when it can: it may have done so before the daemon began.
    warm: bool,
    /// Whether it took no new flows when it was last looked at.
    cold: bool,
    /// When a slow start began, and the percent of the weight that it has come to.
    rising: Option<(Instant, u32)>,
    /// What traffic says of it, whatever checks find.
    ejection: Option<Ejection>,
    /// How often it was ejected of late, and when that last ended.
    ejections: u32,
    returned: Option<Instant>,
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
    ///
    /// `warm`: the daemon begins with it, so that it may have served until now.
    pub(super) fn new(
        config: config::Backend,
        rules: Rules,
        path: Path,
        warm: bool,
        now: Instant,
    ) -> Self {
        let verdict = Verdict::at_start(config.health.start);
        let mut backend = Self {
            config,
            rules,
            admin: Admin::Ready,
            agent: Agent::silent(),
            last_agent: None,
            verdict,
            falls: VecDeque::new(),
            pressed: false,
            drained: None,
            expired: false,
            warm,
            cold: true,
            rising: None,
            ejection: None,
            ejections: 0,
            returned: None,
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

    /// What the operator wants, or its agent, if that is more.
    #[must_use]
    pub fn admin(&self) -> Admin {
        self.admin.max(self.agent.admin)
    }

    /// What the operator wants.
    #[must_use]
    pub const fn commanded(&self) -> Admin {
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

    /// The last result of the agent that is asked beside the check.
    #[must_use]
    pub const fn last_agent(&self) -> Option<&CheckResult> {
        self.last_agent.as_ref()
    }

    /// Whether it is to be checked.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        match self.check() {
            Check::None => false,
            // Who else would say when the maintenance is over?
            Check::Agent => self.admin != Admin::Maint,
            _ => self.admin() != Admin::Maint,
        }
    }

    /// Whether its agent is to be asked beside the check.
    #[must_use]
    pub fn has_agent(&self) -> bool {
        self.config.health.agent.is_some() && self.admin != Admin::Maint
    }

    /// Whether it takes new flows, its weight aside.
    fn takes_flows(&self) -> bool {
        self.admin() == Admin::Ready && (self.state == State::Up || self.pressed)
    }

    /// The weight it has by itself: 0 unless it takes new flows. Of a backup that is held back
    /// [`super::Service::weights`] knows.
    #[must_use]
    pub fn effective_weight(&self) -> Weight {
        if !self.takes_flows() {
            return Weight::ZERO;
        }
        let rising = self.rising.map_or(100, |(_, percent)| percent);
        let percent = (self.agent.percent * rising).div_ceil(100);
        Weight::part(self.config.weight, percent)
    }

    /// Whether flows may stay with it: it was neither found dead nor taken out for maintenance, and
    /// the time for a drained one's is not over.
    #[must_use]
    pub fn may_keep_flows(&self) -> bool {
        self.admin() != Admin::Maint && (self.state != State::Down || self.pressed) && !self.expired
    }

    /// Whether it counts when the service's healthy share is asked for, and whether it is healthy.
    pub(super) fn health(&self) -> Option<bool> {
        let counts = self.admin() == Admin::Ready && self.config.weight > 0;
        counts.then_some(self.state == State::Up)
    }

    /// It is used although checks find it down, or no longer.
    pub(super) fn press(&mut self, pressed: bool, now: Instant) {
        // Without a next hop nothing can be sent to it.
        self.pressed = pressed
            && self.state == State::Down
            && matches!(self.path, Path::Open)
            && !self.agent.down;
        self.settle(now);
    }

    /// Why it stands as it does: what the last check found, or why no traffic can be sent.
    #[must_use]
    pub fn reason(&self) -> String {
        let comment = match self.agent.comment.as_str() {
            "" => String::new(),
            comment => format!(": {comment}"),
        };
        if self.admin() == Admin::Maint {
            return match self.admin {
                Admin::Maint => "in maintenance".to_owned(),
                _ => format!("in maintenance by its agent{comment}"),
            };
        }
        match &self.path {
            Path::Blocked(reason) => return reason.clone(),
            Path::Pending => return "next hop not known yet".to_owned(),
            Path::Open => {}
        }
        if let Some(ejection) = &self.ejection {
            return ejection.reason.clone();
        }
        if self.agent.down && *self.check() != Check::Agent {
            return format!("its agent says it is down{comment}");
        }
        let mut reason = self.found();
        if self.agent.admin == Admin::Drain {
            reason = format!("{reason}; drained by its agent{comment}");
        }
        if self.pressed {
            reason = format!("{reason}; used all the same, by panic_threshold");
        }
        let (rise, needed) = (self.config.health.rise, self.rise());
        if self.verdict == Verdict::Bad && needed > rise && self.against > 0 {
            reason = format!(
                "{reason}; flapping: {} of {needed} good checks",
                self.against
            );
        }
        reason
    }

    /// What the last check found.
    fn found(&self) -> String {
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

    pub(super) fn configure(&mut self, config: config::Backend, rules: Rules, now: Instant) {
        let listens =
            |health: &config::Health| health.agent.is_some() || health.check == Check::Agent;
        if !listens(&config.health) {
            self.agent = Agent::silent();
            self.last_agent = None;
        }
        self.rules = rules;
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

    /// Successes in a row that bring it up; more than configured if it goes up and down all the
    /// time.
    fn rise(&self) -> u32 {
        let health = &self.config.health;
        let falls = u32::try_from(self.falls.len()).unwrap_or(u32::MAX);
        match health.flap_limit {
            0 => health.rise,
            limit if falls < limit => health.rise,
            limit => {
                let doublings = (falls - limit + 1).min(DOUBLINGS);
                health.rise.saturating_mul(1 << doublings)
            }
        }
    }

    /// The agent was asked beside the check; silence changes nothing.
    pub(super) fn agent_result(&mut self, result: &CheckResult, now: Instant) {
        if self.has_agent() {
            self.hear(result);
            self.last_agent = Some(result.clone());
            self.settle(now);
        }
    }

    fn hear(&mut self, result: &CheckResult) {
        let Some(report) = &result.report else {
            return;
        };
        let agent::Report {
            percent,
            admin,
            up,
            comment,
        } = report;
        self.agent.percent = percent.unwrap_or(match up {
            Some(true) => 100,
            _ => self.agent.percent,
        });
        self.agent.admin = admin.unwrap_or(self.agent.admin);
        self.agent.down = up.map_or(self.agent.down, |up| !up);
        self.agent.comment.clone_from(comment);
        if self.admin() == Admin::Maint && *self.check() != Check::Agent {
            self.forget();
        }
    }

    /// Nobody asks for the time being, so what was found before will count for nothing.
    fn forget(&mut self) {
        self.verdict = Verdict::at_start(self.config.health.start);
        self.against = 0;
        self.last = None;
        self.inherited = false;
    }

    /// Whether the time matters to it.
    pub(super) fn is_ticking(&self) -> bool {
        let draining = self.drained.is_some() && !self.expired;
        let limited = draining && self.rules.drain_timeout.is_some();
        self.rising.is_some() || limited || !self.falls.is_empty() || self.ejection.is_some()
    }

    /// Whether it may be ejected for so many failures of late.
    pub(super) fn is_failing(&self, failures: u64) -> bool {
        let threshold = u64::from(self.config.health.eject_after);
        threshold != 0 && failures >= threshold && self.state == State::Up
    }

    /// It does not answer its clients, or refuses them: it is down for a time that grows.
    pub(super) fn eject(&mut self, failures: u64, now: Instant) {
        let time = self.config.health.eject_time;
        if self
            .returned
            .is_some_and(|at| now.duration_since(at) >= time * EJECTIONS)
        {
            self.ejections = 0;
        }
        self.ejections = (self.ejections + 1).min(EJECTIONS);
        let time = time * (1 << (self.ejections - 1)).min(EJECTIONS);
        self.ejection = Some(Ejection {
            until: now + time,
            reason: format!(
                "L4TOUT {failures} connections of clients unanswered or refused; ejected for {}",
                config::Human(time)
            ),
        });
        self.settle(now);
    }

    /// Time went by.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.ejection.as_ref().is_some_and(|e| now >= e.until) {
            self.ejection = None;
            self.returned = Some(now);
            // Its clients and its check say the same.
            if self.last.as_ref().is_some_and(CheckResult::is_failed) {
                self.verdict = Verdict::Bad;
                self.against = 0;
            }
            self.settle(now);
        }
        let window = self.config.health.flap_window;
        while let Some(first) = self.falls.front()
            && now.duration_since(*first) >= window
        {
            self.falls.pop_front();
        }
        self.settle(now);
    }

    pub(super) fn check_result(&mut self, result: CheckResult, now: Instant) {
        if !self.is_checked() {
            return;
        }
        self.hear(&result);
        let (found, needed) = if result.is_ok() {
            (Verdict::Good, self.rise())
        } else {
            (Verdict::Bad, self.config.health.fall)
        };
        if found == self.verdict {
            self.against = 0;
        } else {
            self.against += 1;
            if self.verdict == Verdict::None || self.against >= needed {
                if self.verdict == Verdict::Good {
                    self.falls.push_back(now);
                }
                self.verdict = found;
                self.against = 0;
            }
        }
        self.last = Some(result);
        self.settle(now);
    }

    pub(super) fn set_admin(&mut self, admin: Admin, now: Instant) {
        if self.admin == Admin::Maint && admin != Admin::Maint {
            self.forget();
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
        let verdict = match self.check() {
            _ if self.ejection.is_some() => Verdict::Bad,
            // The agent's word counts at once, whatever the check finds.
            _ if self.agent.down => Verdict::Bad,
            Check::None => Verdict::Good,
            _ => self.verdict,
        };
        let state = match (self.admin(), &self.path, verdict) {
            (Admin::Maint, _, _) => State::Unknown,
            (_, Path::Blocked(_), _) | (_, _, Verdict::Bad) => State::Down,
            (_, Path::Pending, _) | (_, _, Verdict::None) => State::Starting,
            (_, Path::Open, Verdict::Good) => State::Up,
        };
        if state != self.state {
            self.state = state;
            self.since = now;
        }
        if state != State::Down {
            self.pressed = false;
        }
        let failed = self.last.as_ref().is_some_and(CheckResult::is_failed);
        if state == State::Unknown || (state == State::Down && failed) {
            self.warm = false;
        }
        self.drained = match self.admin() {
            Admin::Ready => None,
            Admin::Drain | Admin::Maint => self.drained.or(Some(now)),
        };
        self.expired = self
            .drained
            .zip(self.rules.drain_timeout)
            .is_some_and(|(since, timeout)| now.duration_since(since) >= timeout);
        self.rise_slowly(now);
    }

    /// Begins, goes on with or ends a slow start.
    fn rise_slowly(&mut self, now: Instant) {
        let time = self.rules.slow_start;
        if !self.takes_flows() || time.is_zero() {
            // Whoever takes flows now did so without a slow start.
            self.rising = None;
            self.warm = self.warm && !self.takes_flows();
            self.cold = !self.takes_flows();
            return;
        }
        if std::mem::take(&mut self.cold) && !std::mem::take(&mut self.warm) {
            self.rising = Some((now, 0));
        }
        if let Some((since, _)) = self.rising {
            let passed = now.duration_since(since).as_secs_f64() / time.as_secs_f64();
            // The first step is there at once: without any flow nothing would get warm.
            let step = 1 + (passed * f64::from(STEPS)) as u32;
            self.rising = (step < STEPS).then_some((since, 100 * step / STEPS));
        }
    }
}
