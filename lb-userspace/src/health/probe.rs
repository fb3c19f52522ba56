//! One check: what is asked, and what the answer is called.

use std::{io, net::SocketAddr, os::fd::AsRawFd, pin::pin, time::Duration};

use http_body_util::{BodyExt, Empty};
use hyper::{
    Method, Request, StatusCode, Uri,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONNECTION, HOST, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout_at},
};

use lb_common::{
    names::{FORWARD, name_of},
    service::forward,
};

use super::Via;
use crate::{
    config::{Check, Health},
    model::check::{CheckResult, Code},
};

const AGENT: &str = concat!("sluice/", env!("CARGO_PKG_VERSION"));

/// Body bytes that are read and thrown away so that the backend can finish its answer.
const BODY: usize = 64 << 10;

/// Room for the answer's head.
const HEAD: usize = 64 << 10;

/// A check made ready: nothing is parsed again when it runs.
pub(super) struct Probe {
    address: SocketAddr,
    timeout: Duration,
    question: Question,
    via: Option<Via>,
}

enum Question {
    Tcp,
    Http {
        /// `Err`: what is wrong with the configured request.
        request: Result<Box<Request<Empty<Bytes>>>, String>,
        expect: Vec<(u16, u16)>,
    },
}

/// How a check ended, but for its time; `Err`: the host could not run it.
type Outcome = io::Result<(Code, String)>;

impl Probe {
    pub(super) fn new(backend: SocketAddr, health: &Health, via: Option<Via>) -> Self {
        let (port, question) = match &health.check {
            // The caller runs nothing for `None`; a connection is the least that can be asked.
            Check::None => (None, Question::Tcp),
            Check::Tcp { port } => (*port, Question::Tcp),
            Check::Http {
                port,
                method,
                path,
                host,
                expect,
            } => {
                let mut address = backend;
                address.set_port(port.unwrap_or(backend.port()));
                let host = host.clone().unwrap_or_else(|| address.to_string());
                let question = Question::Http {
                    request: request(method, path, &host).map(Box::new),
                    expect: expect.clone(),
                };
                (*port, question)
            }
        };
        let mut address = backend;
        address.set_port(port.unwrap_or(backend.port()));
        Self {
            address,
            timeout: health.timeout,
            question,
            via,
        }
    }

    /// Runs the check; an error means that this host could not, whatever the backend's state.
    pub(super) async fn run(&self, started: Instant) -> io::Result<CheckResult> {
        let deadline = started + self.timeout;
        let (code, text) = self.ask(deadline).await?;
        Ok(CheckResult::new(code, text, started.elapsed()))
    }

    async fn ask(&self, deadline: Instant) -> Outcome {
        let stream = match timeout_at(deadline, connect(self.address, self.via)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return connect_failed(error).map(|found| led(found, self.via)),
            Err(_) => {
                let text = format!("no connection within {:?}", self.timeout);
                return Ok(led((Code::L4Timeout, text), self.via));
            }
        };
        let (request, expect) = match &self.question {
            Question::Tcp => return Ok((Code::L4Ok, String::new())),
            Question::Http { request, expect } => (request, expect),
        };
        let request = match request {
            Ok(request) => (**request).clone(),
            Err(wrong) => return Ok((Code::L7Response, wrong.clone())),
        };
        match timeout_at(deadline, exchange(stream, request)).await {
            Ok(Ok(status)) => Ok((judge(status, expect), status.to_string())),
            Ok(Err(error)) => Ok((Code::L7Response, describe(&error))),
            Err(_) => {
                let text = format!("no whole answer within {:?}", self.timeout);
                Ok((Code::L7Timeout, text))
            }
        }
    }
}

/// Connects so that closing sends RST: neither side is left with TIME_WAIT, nor the backend with a
/// finished connection in its accept queue.
async fn connect(address: SocketAddr, via: Option<Via>) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_zero_linger()?;
    if let Some(via) = via {
        option(
            &socket,
            libc::SOL_SOCKET,
            libc::SO_MARK,
            via.mark.cast_signed(),
        )?;
        if forward::encapsulates(via.forward) {
            option(
                &socket,
                libc::IPPROTO_TCP,
                libc::TCP_MAXSEG,
                ENCAPSULATED_SEGMENT,
            )?;
        }
    }
    socket.connect(address).await
}

/// Bytes of a segment that leave room for any encapsulation in the smallest MTU of IPv6.
const ENCAPSULATED_SEGMENT: libc::c_int = 1152;

fn option(socket: &impl AsRawFd, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the option's value is a live int of the length that is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What no connection means for a check that was led to the VIP.
fn led((code, text): (Code, String), via: Option<Via>) -> (Code, String) {
    let Some(via) = via else {
        return (code, text);
    };
    let mode = name_of(FORWARD, via.forward);
    let question = match code {
        Code::L4Timeout if forward::encapsulates(via.forward) => {
            "does the backend take the encapsulation off and hold the VIP?"
        }
        Code::L4Timeout => "does the backend hold the VIP?",
        _ => "does the server listen on the VIP?",
    };
    (code, format!("{text} through {mode}: {question}"))
}

fn connect_failed(error: io::Error) -> Outcome {
    let text = match error.raw_os_error() {
        // This host is out of files, ports or memory.
        Some(
            libc::EMFILE
            | libc::ENFILE
            | libc::EADDRNOTAVAIL
            | libc::EAGAIN
            | libc::ENOBUFS
            | libc::ENOMEM,
        ) => return Err(error),
        Some(libc::ETIMEDOUT) => return Ok((Code::L4Timeout, String::new())),
        Some(libc::ECONNREFUSED) => "connection refused".to_owned(),
        Some(libc::ECONNRESET) => "connection reset".to_owned(),
        Some(libc::EHOSTUNREACH) => "no route to host".to_owned(),
        Some(libc::ENETUNREACH) => "network is unreachable".to_owned(),
        _ => error.to_string(),
    };
    Ok((Code::L4Connection, text))
}

fn request(method: &str, path: &str, host: &str) -> Result<Request<Empty<Bytes>>, String> {
    let uri: Uri = path
        .parse()
        .map_err(|_| format!("health.path {path:?} is not a request target"))?;
    let method = Method::from_bytes(method.as_bytes())
        .map_err(|_| format!("health.method {method:?} is not an HTTP method"))?;
    let host = HeaderValue::from_str(host)
        .map_err(|_| format!("health.host {host:?} is not a host name"))?;
    let mut request = Request::new(Empty::new());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    headers.insert(HOST, host);
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(request)
}

/// Sends the request and takes the answer.
async fn exchange(stream: TcpStream, request: Request<Empty<Bytes>>) -> hyper::Result<StatusCode> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    let answer = async move {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        drain(answer.into_body()).await?;
        Ok(status)
    };
    let mut answer = pin!(answer);
    tokio::select! {
        biased;
        status = &mut answer => status,
        // The connection moves the bytes. When it ends, for better or worse, the answer knows why.
        _ = connection => answer.await,
    }
}

async fn drain(mut body: Incoming) -> hyper::Result<()> {
    let mut taken = 0;
    while taken < BODY
        && let Some(frame) = body.frame().await
    {
        taken += frame?.data_ref().map_or(0, Bytes::len);
    }
    Ok(())
}

fn judge(status: StatusCode, expect: &[(u16, u16)]) -> Code {
    let status = status.as_u16();
    let good = expect
        .iter()
        .any(|&(low, high)| (low..=high).contains(&status));
    if good { Code::L7Ok } else { Code::L7Status }
}

fn describe(error: &hyper::Error) -> String {
    let system = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    if error.is_parse_too_large() {
        format!("the answer's head is longer than {HEAD} bytes")
    } else if error.is_parse() {
        "the answer is not HTTP".to_owned()
    } else if error.is_incomplete_message() {
        "hung up before the answer was whole".to_owned()
    } else if let Some(system) = system {
        match io::Error::kind(system) {
            io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
            io::ErrorKind::BrokenPipe => "hung up before the answer was whole".to_owned(),
            _ => system.to_string(),
        }
    } else {
        error.to_string()
    }
}
