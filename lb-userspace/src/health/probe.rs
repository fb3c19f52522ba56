//! One check: what is asked, and what the answer is called.

use super::{Via, agent, connect, dns, exec, grpc, http, tls, udp};
use crate::{
    config::{Check, Dns, Exec, Health, Tls, Udp},
    model::{
        agent::Report,
        check::{CheckResult, Code},
    },
};
use std::{error::Error, io, net::SocketAddr, time::Duration};
use tokio::time::{Instant, timeout_at};

/// A check made ready: nothing is parsed again when it runs.
pub(super) struct Probe {
    address: SocketAddr,
    timeout: Duration,
    question: Question,
    via: Option<Via>,
}

enum Question {
    Tcp,
    Tls(Tls),
    Http(http::Question, Option<Tls>),
    Udp(Udp),
    Dns(Dns),
    Grpc(grpc::Question),
    Exec(Box<Exec>, Vec<(&'static str, String)>),
    Agent,
    /// The configured request cannot be made, for this reason.
    Wrong(String),
}

/// How a check ended, but for its time; `Err`: the host could not run it.
pub(super) type Outcome = io::Result<(Code, String)>;

impl Probe {
    pub(super) fn new(
        backend: SocketAddr,
        via: Option<Via>,
        health: &Health,
        environment: &[(&'static str, String)],
    ) -> Self {
        let mut address = backend;
        address.set_port(health.port.unwrap_or(backend.port()));
        let question = match &health.check {
            // The caller runs nothing for `None`; a connection is the least that can be asked.
            Check::None | Check::Tcp => Question::Tcp,
            Check::Tls(tls) => Question::Tls(tls.clone()),
            Check::Http(want, tls) => match http::Question::new(want, address) {
                Ok(question) => Question::Http(question, tls.clone()),
                Err(wrong) => Question::Wrong(wrong),
            },
            Check::Udp(udp) => Question::Udp(udp.clone()),
            Check::Dns(dns) => Question::Dns(dns.clone()),
            Check::Grpc(want) => match grpc::Question::new(want, address) {
                Ok(question) => Question::Grpc(question),
                Err(wrong) => Question::Wrong(wrong),
            },
            Check::Exec(exec) => Question::Exec(exec.clone(), environment.to_vec()),
            Check::Agent => Question::Agent,
        };
        Self {
            address,
            via,
            timeout: health.timeout,
            question,
        }
    }

    /// Whether it starts a process.
    pub(super) const fn forks(&self) -> bool {
        matches!(self.question, Question::Exec(..))
    }

    /// Runs the check; an error means that this host could not, whatever the backend's state.
    pub(super) async fn run(&self, started: Instant) -> io::Result<CheckResult> {
        let deadline = started + self.timeout;
        let (code, text, report) = match self.question {
            Question::Agent => self.ask_agent(deadline).await?,
            _ => {
                let (code, text) = self.ask(deadline).await?;
                (code, text, None)
            }
        };
        Ok(CheckResult {
            report,
            ..CheckResult::new(code, text, started.elapsed())
        })
    }

    /// Agents sit at the backend's own address, whatever the way of the traffic.
    async fn ask_agent(&self, deadline: Instant) -> io::Result<(Code, String, Option<Report>)> {
        match timeout_at(deadline, connect::tcp(self.address, None)).await {
            Ok(Ok(stream)) => Ok(agent::ask(stream, deadline, self.timeout).await),
            Ok(Err(error)) => connect::failed(error).map(|(code, text)| (code, text, None)),
            Err(_) => {
                let text = format!("no connection within {:?}", self.timeout);
                Ok((Code::L4Timeout, text, None))
            }
        }
    }

    async fn ask(&self, deadline: Instant) -> Outcome {
        let (address, via, timeout) = (self.address, self.via, self.timeout);
        match &self.question {
            Question::Wrong(wrong) => return Ok((Code::L7Response, wrong.clone())),
            Question::Udp(question) => {
                return udp::ask(question, (address, via), deadline, timeout).await;
            }
            Question::Dns(question) => {
                return dns::ask(question, (address, via), deadline, timeout).await;
            }
            Question::Exec(question, environment) => {
                return exec::ask(question, environment, deadline, timeout).await;
            }
            _ => {}
        }
        let stream = match timeout_at(deadline, connect::tcp(address, via)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return connect::failed(error).map(|found| connect::led(found, via)),
            Err(_) => {
                let text = format!("no connection within {timeout:?}");
                return Ok(connect::led((Code::L4Timeout, text), via));
            }
        };
        match &self.question {
            Question::Tls(tls) => Ok(match tls::handshake(stream, tls, address, deadline).await {
                Ok(stream) => {
                    let version = tls::version(&stream);
                    tls::part(stream, deadline).await;
                    (Code::L6Ok, version)
                }
                Err(found) => found,
            }),
            Question::Http(question, None) => question.ask(stream, deadline, timeout).await,
            Question::Http(question, Some(tls)) => {
                match tls::handshake(stream, tls, address, deadline).await {
                    Ok(stream) => question.ask(stream, deadline, timeout).await,
                    Err(found) => Ok(found),
                }
            }
            Question::Grpc(question) => question.ask(stream, deadline, timeout).await,
            // All others were asked before.
            _ => Ok((Code::L4Ok, String::new())),
        }
    }
}

/// What went wrong below HTTP.
pub(super) fn describe(error: &hyper::Error) -> String {
    let system = error.source().and_then(|source| source.downcast_ref());
    match system.map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionReset) => "connection reset".to_owned(),
        Some(io::ErrorKind::BrokenPipe) => "hung up before the answer was whole".to_owned(),
        _ => match (system, error.source()) {
            (Some(system), _) => system.to_string(),
            (None, Some(source)) => format!("{error}: {source}"),
            (None, None) => error.to_string(),
        },
    }
}
