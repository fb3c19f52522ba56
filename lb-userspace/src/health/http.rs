//! `http` and `https`: a request over HTTP/1.1.

use super::probe::{Outcome, describe};
use crate::{config::Http, model::check::Code};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Method, Request, StatusCode, Uri,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONNECTION, HOST, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use std::{net::SocketAddr, pin::pin, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};

const AGENT: &str = concat!("sluice/", env!("CARGO_PKG_VERSION"));

/// Body bytes that are read, so that the backend can finish its answer. What a pattern is to be
/// found in must be among them.
const BODY: usize = 64 << 10;

/// Room for the answer's head.
const HEAD: usize = 64 << 10;

/// A request made ready.
pub(super) struct Question {
    request: Request<Empty<Bytes>>,
    want: Http,
}

impl Question {
    /// `Err`: what is wrong with the configured request.
    pub(super) fn new(want: &Http, address: SocketAddr) -> Result<Self, String> {
        let Http {
            method, path, host, ..
        } = want;
        let host = host.clone().unwrap_or_else(|| address.to_string());
        Ok(Self {
            request: request(method, path, &host)?,
            want: want.clone(),
        })
    }

    pub(super) async fn ask(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        deadline: Instant,
        timeout: Duration,
    ) -> Outcome {
        let keep = self.want.body.is_some();
        Ok(
            match timeout_at(deadline, exchange(stream, self.request.clone(), keep)).await {
                Ok(Ok((status, body))) => self.judge(status, &body),
                Ok(Err(error)) => (Code::L7Response, explain(&error)),
                Err(_) => (
                    Code::L7Timeout,
                    format!("no whole answer within {timeout:?}"),
                ),
            },
        )
    }

    fn judge(&self, status: StatusCode, body: &[u8]) -> (Code, String) {
        let number = status.as_u16();
        let good = |&(low, high): &(u16, u16)| (low..=high).contains(&number);
        if !self.want.expect.iter().any(good) {
            return (Code::L7Status, status.to_string());
        }
        match &self.want.body {
            Some(pattern) if !pattern.is_in(body) => (
                Code::L7Response,
                format!(
                    "{status}, but the body does not match \"{}\"",
                    pattern.as_str()
                ),
            ),
            _ => (Code::L7Ok, status.to_string()),
        }
    }
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

/// Sends the request and takes the answer; its body only if it is to be kept.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Empty<Bytes>>,
    keep: bool,
) -> hyper::Result<(StatusCode, Vec<u8>)> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    let answer = async move {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = read(answer.into_body(), keep).await?;
        Ok((status, body))
    };
    let mut answer = pin!(answer);
    tokio::select! {
        biased;
        status = &mut answer => status,
        // The connection moves the bytes. When it ends, for better or worse, the answer knows why.
        _ = connection => answer.await,
    }
}

async fn read(mut body: Incoming, keep: bool) -> hyper::Result<Vec<u8>> {
    let (mut taken, mut kept) = (0, Vec::new());
    while taken < BODY
        && let Some(frame) = body.frame().await
    {
        let frame = frame?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        taken += data.len();
        if keep {
            kept.extend_from_slice(data);
        }
    }
    kept.truncate(BODY);
    Ok(kept)
}

fn explain(error: &hyper::Error) -> String {
    if error.is_parse_too_large() {
        format!("the answer's head is longer than {HEAD} bytes")
    } else if error.is_parse() {
        "the answer is not HTTP".to_owned()
    } else if error.is_incomplete_message() {
        "hung up before the answer was whole".to_owned()
    } else {
        describe(error)
    }
}
