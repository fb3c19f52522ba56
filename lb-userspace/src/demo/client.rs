//! The client: HTTP requests, each on a connection of its own, and what became of them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::RangeBounds,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// A request that has taken longer has failed: a SYN that nobody answers is repeated after one
/// second, and after two more.
const PATIENCE: Duration = Duration::from_secs(5);

/// One request and its outcome.
pub struct Outcome {
    /// When it was sent.
    pub sent: Instant,
    /// When it was answered, or had failed.
    pub done: Instant,
    /// Who answered; `None`: it failed.
    pub backend: Option<String>,
}

/// A connection that stays open from request to request.
pub struct Connection(SendRequest<Empty<Bytes>>);

impl Connection {
    /// Connects.
    pub async fn open(server: SocketAddr) -> Result<Self> {
        let stream = timeout(PATIENCE, TcpStream::connect(server)).await??;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Its errors reach the request that is waiting.
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// Asks for `/`: the name of whoever answers.
    pub async fn ask(&mut self) -> Result<String> {
        let request = Request::get("/")
            .header(header::HOST, "demo")
            .body(Empty::new())?;
        let answer = timeout(PATIENCE, async {
            let answer = self.0.send_request(request).await?;
            ensure!(answer.status().is_success(), "status {}", answer.status());
            let body = answer.into_body().collect().await?.to_bytes();
            let text = std::str::from_utf8(&body).context("the answer is not text")?;
            Ok(text.trim_end().to_owned())
        });
        answer.await?
    }
}

/// One request on a connection of its own.
pub async fn request(server: SocketAddr) -> Outcome {
    let sent = Instant::now();
    let answer = async { Connection::open(server).await?.ask().await };
    let backend = answer.await.ok();
    Outcome {
        sent,
        done: Instant::now(),
        backend,
    }
}

/// `count` requests, one after the other.
pub async fn in_sequence(server: SocketAddr, count: usize) -> Vec<Outcome> {
    let mut outcomes = Vec::with_capacity(count);
    for _ in 0..count {
        outcomes.push(request(server).await);
    }
    outcomes
}

/// Requests that keep coming, seen and stopped from outside.
#[derive(Default)]
pub struct Load {
    done: AtomicUsize,
    stop: AtomicBool,
}

impl Load {
    /// Requests that have been answered or have failed.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// No further requests.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Sends requests from `clients` at once, each with `pause` between two, until stopped.
    pub async fn run(&self, server: SocketAddr, clients: usize, pause: Duration) -> Vec<Outcome> {
        let one = async || {
            let mut outcomes = Vec::new();
            while !self.stop.load(Ordering::Relaxed) {
                outcomes.push(request(server).await);
                self.done.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(pause).await;
            }
            outcomes
        };
        let all = futures_util::future::join_all((0..clients).map(|_| one())).await;
        let mut outcomes: Vec<_> = all.into_iter().flatten().collect();
        outcomes.sort_by_key(|outcome| outcome.sent);
        outcomes
    }
}

/// Answers of each backend.
pub fn by_backend(outcomes: &[Outcome]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for name in outcomes.iter().filter_map(|o| o.backend.as_deref()) {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// The time that `share` (0 to 1) of the answered requests stayed within.
pub fn quantile(outcomes: &[Outcome], share: f64) -> Option<Duration> {
    let mut times: Vec<_> = outcomes
        .iter()
        .filter(|o| o.backend.is_some())
        .map(|o| o.done - o.sent)
        .collect();
    times.sort_unstable();
    let rank = (times.len() as f64 * share).ceil() as usize;
    times.get(rank.saturating_sub(1)).copied()
}

/// Requests of one span of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Sent in it.
    pub sent: usize,
    /// Of those, failed.
    pub failed: usize,
}

/// The requests that were sent in a span of time.
pub fn span(outcomes: &[Outcome], time: impl RangeBounds<Instant>) -> Span {
    let mut span = Span::default();
    for outcome in outcomes.iter().filter(|o| time.contains(&o.sent)) {
        span.sent += 1;
        span.failed += usize::from(outcome.backend.is_none());
    }
    span
}

/// What happened when a backend died.
#[derive(Debug, PartialEq, Eq)]
pub struct Failover {
    /// Requests sent before the death that failed: it cut them off.
    pub cut: usize,
    /// Requests sent from the death until it was noticed.
    pub unnoticed: Span,
    /// Requests sent after it was noticed.
    pub noticed: Span,
    /// From the death to the first answer.
    pub first_answer: Option<Duration>,
    /// From the death to the moment the last failed request was sent.
    pub last_failure: Option<Duration>,
    /// The longest that an answer took to a request which was sent before it was noticed.
    pub slowest: Option<Duration>,
}

/// Reads the figures of a failover off requests that were sent throughout it.
pub fn failover(outcomes: &[Outcome], death: Instant, noticed: Instant) -> Failover {
    let after = || outcomes.iter().filter(|o| o.sent >= death);
    let answers = after().filter(|o| o.backend.is_some());
    let failures = after().filter(|o| o.backend.is_none());
    Failover {
        cut: span(outcomes, ..death).failed,
        unnoticed: span(outcomes, death..noticed),
        noticed: span(outcomes, noticed..),
        first_answer: answers.map(|o| o.done - death).min(),
        last_failure: failures.map(|o| o.sent - death).max(),
        slowest: after()
            .filter(|o| o.sent < noticed && o.backend.is_some())
            .map(|o| o.done - o.sent)
            .max(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(epoch: Instant, sent_ms: u64, backend: Option<&str>) -> Outcome {
        let sent = epoch + Duration::from_millis(sent_ms);
        Outcome {
            sent,
            done: sent + Duration::from_millis(1),
            backend: backend.map(str::to_owned),
        }
    }

    #[test]
    fn failover_tells_before_during_and_after_apart() {
        let epoch = Instant::now();
        let ms = Duration::from_millis;
        let outcomes = [
            outcome(epoch, 0, Some("a")),
            outcome(epoch, 9, None),
            outcome(epoch, 11, None),
            outcome(epoch, 12, Some("a")),
            outcome(epoch, 30, None),
            outcome(epoch, 40, Some("a")),
            outcome(epoch, 41, Some("b")),
        ];
        assert_eq!(
            failover(&outcomes, epoch + ms(10), epoch + ms(35)),
            Failover {
                cut: 1,
                unnoticed: Span { sent: 3, failed: 2 },
                noticed: Span { sent: 2, failed: 0 },
                first_answer: Some(ms(3)),
                last_failure: Some(ms(20)),
                slowest: Some(ms(1)),
            }
        );
    }

    #[test]
    fn a_failover_nobody_saw_has_no_figures() {
        let epoch = Instant::now();
        let failover = failover(&[], epoch, epoch);
        assert_eq!(failover.unnoticed, Span::default());
        assert_eq!(failover.first_answer, None);
        assert_eq!(failover.last_failure, None);
        assert_eq!(failover.slowest, None);
    }

    #[test]
    fn quantiles_leave_failures_out() {
        let epoch = Instant::now();
        let mut outcomes: Vec<_> = (0..10).map(|i| outcome(epoch, i, Some("a"))).collect();
        assert_eq!(quantile(&outcomes, 0.5), Some(Duration::from_millis(1)));
        outcomes.clear();
        outcomes.push(outcome(epoch, 0, None));
        assert_eq!(quantile(&outcomes, 0.5), None);
        assert!(by_backend(&outcomes).is_empty());
    }
}
