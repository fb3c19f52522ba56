//! `grpc`: `grpc.health.v1.Health/Check` over HTTP/2 without TLS.
//!
//! The messages are two fields long, so they are written and read here by hand:
//! `HealthCheckRequest { string service = 1; }` and `HealthCheckResponse { ServingStatus status = 1; }`
//! (<https://github.com/grpc/grpc/blob/master/doc/health-checking.md>).

use super::probe::{Outcome, describe};
use crate::{config::Grpc, model::check::Code};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Version,
    body::Bytes,
    client::conn::http2,
    header::{CONTENT_TYPE, HeaderMap, TE},
    rt::Executor,
};
use hyper_util::rt::TokioIo;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout_at},
};

/// Bytes of an answer that are read; two are enough.
const ANSWER: usize = 4096;

/// Bytes before each message: whether it is compressed, and its length
/// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
const PREFIX: usize = 5;

/// A request made ready.
pub(super) struct Question {
    request: Request<Full<Bytes>>,
}

/// What the backend said.
struct Answer {
    http: hyper::StatusCode,
    /// `grpc-status`, and `grpc-message` if any.
    grpc: Option<(u32, String)>,
    body: Vec<u8>,
}

/// Runs what hyper wants to have run, no longer than the check.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(task);
    }
}

impl Question {
    /// `Err`: what is wrong with the configured request.
    pub(super) fn new(want: &Grpc, address: SocketAddr) -> Result<Self, String> {
        let host = want.host.clone().unwrap_or_else(|| address.to_string());
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{host}/grpc.health.v1.Health/Check"))
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .body(Full::new(Bytes::from(message(&want.service))))
            .map_err(|_| format!("health.host {host:?} is not a host name"))?;
        Ok(Self { request })
    }

    pub(super) async fn ask(
        &self,
        stream: TcpStream,
        deadline: Instant,
        timeout: Duration,
    ) -> Outcome {
        let tasks = Tasks::default();
        let exchange = exchange(stream, self.request.clone(), tasks.clone());
        let answer = timeout_at(deadline, exchange).await;
        // The connection's own task holds another clone of these, so they would not end by
        // themselves.
        let mut tasks = tasks.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.abort_all();
        Ok(match answer {
            Ok(Ok(answer)) => judge(&answer),
            Ok(Err(error)) => (Code::L7Response, describe(&error)),
            Err(_) => (
                Code::L7Timeout,
                format!("no whole answer within {timeout:?}"),
            ),
        })
    }
}

async fn exchange(
    stream: TcpStream,
    request: Request<Full<Bytes>>,
    tasks: Tasks,
) -> hyper::Result<Answer> {
    let (mut sender, connection) = http2::handshake(tasks.clone(), TokioIo::new(stream)).await?;
    tasks.execute(async {
        // What ends it is seen by whoever waits for the answer.
        let _ = connection.await;
    });
    let answer = sender.send_request(request).await?;
    let http = answer.status();
    // An answer without a body has its status among the headers.
    let mut grpc = status(answer.headers());
    let (mut body, mut bytes) = (answer.into_body(), Vec::new());
    while bytes.len() < ANSWER
        && let Some(frame) = body.frame().await
    {
        match frame?.into_data() {
            Ok(data) => bytes.extend_from_slice(&data),
            Err(frame) => grpc = frame.trailers_ref().and_then(status).or(grpc),
        }
    }
    Ok(Answer {
        http,
        grpc,
        body: bytes,
    })
}

fn status(headers: &HeaderMap) -> Option<(u32, String)> {
    let number = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message");
    let message = message.and_then(|message| message.to_str().ok());
    Some((number, message.unwrap_or_default().to_owned()))
}

fn judge(answer: &Answer) -> (Code, String) {
    if !answer.http.is_success() {
        return (Code::L7Status, format!("HTTP {}", answer.http));
    }
    match &answer.grpc {
        None => {
            let text = "the answer is not gRPC: it has no grpc-status".to_owned();
            return (Code::L7Response, text);
        }
        Some((0, _)) => {}
        Some((number, message)) => {
            let text = format!("grpc-status {number} {message}");
            return (Code::L7Status, text.trim_end().to_owned());
        }
    }
    match serving(&answer.body) {
        Some(1) => (Code::L7Ok, "SERVING".to_owned()),
        Some(0) => (Code::L7Status, "UNKNOWN".to_owned()),
        Some(2) => (Code::L7Status, "NOT_SERVING".to_owned()),
        Some(3) => (Code::L7Status, "SERVICE_UNKNOWN".to_owned()),
        Some(other) => (Code::L7Status, format!("status {other}")),
        None => (
            Code::L7Response,
            "the answer is not a HealthCheckResponse".to_owned(),
        ),
    }
}

/// `HealthCheckRequest`, with its prefix.
fn message(service: &str) -> Vec<u8> {
    let mut message = Vec::new();
    if !service.is_empty() {
        // Field 1, length-delimited.
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut whole = vec![0];
    whole.extend_from_slice(&(message.len() as u32).to_be_bytes());
    whole.extend(message);
    whole
}

/// The status in a `HealthCheckResponse`; a field that is left out is 0.
fn serving(bytes: &[u8]) -> Option<u64> {
    let (prefix, message) = bytes.split_at_checked(PREFIX)?;
    let length = u32::from_be_bytes(prefix.get(1..)?.try_into().ok()?);
    let message = message.get(..usize::try_from(length).ok()?)?;
    match message {
        _ if prefix[0] != 0 => None,
        [] => Some(0),
        // Field 1, a number of one byte.
        [0x08, value] if *value < 0x80 => Some(u64::from(*value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_protobuf_writes_them() {
        assert_eq!(message(""), [0, 0, 0, 0, 0]);
        assert_eq!(message("a.B"), *b"\0\0\0\0\x05\x0a\x03a.B");
        let long = "x".repeat(300);
        assert_eq!(message(&long)[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
    }

    #[test]
    fn answers_are_read_or_refused() {
        assert_eq!(serving(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(serving(&[0, 0, 0, 0, 0]), Some(0));
        for bad in [
            &[][..],
            &[0, 0, 0, 0],
            &[0, 0, 0, 0, 2, 8],
            &[1, 0, 0, 0, 2, 8, 1],
            &[0, 0, 0, 0, 2, 16, 1],
        ] {
            assert_eq!(serving(bad), None, "{bad:?}");
        }
    }
}
