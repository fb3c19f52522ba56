//! The client of the control socket.
//!
//! One connection for each request: a command line asks one or two questions and ends.

use super::types;
use crate::model::Admin;
use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Method, Request,
    body::{Body, Bytes},
    header,
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::UnixStream;

/// How long the daemon may take for an answer. Listing a flow table of millions takes seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// No daemon listens on the control socket; anything else that fails is another error.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no daemon answers on {}; start it with: sudo sluice run --config FILE", socket.display())]
pub struct NoDaemon {
    socket: PathBuf,
}

/// Speaks to the daemon behind one control socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon on `socket`; connects with each request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Every service.
    pub async fn services(&self) -> Result<Vec<types::Service>> {
        self.get("/v1/services").await
    }

    /// One service, by name or `VIP:port/protocol`.
    pub async fn service(&self, service: &str) -> Result<types::Service> {
        self.get(&format!("/v1/services/{}", encode(service))).await
    }

    /// Every backend, or those of one service.
    pub async fn backends(&self, service: Option<&str>) -> Result<Vec<types::Backend>> {
        self.get(&with_query("/v1/backends", &[("service", service)]))
            .await
    }

    /// What the operator wants of a backend: `ready`, `drain` or `maint`.
    pub async fn set_admin(
        &self,
        service: &str,
        backend: &str,
        admin: Admin,
    ) -> Result<types::Backend> {
        let path = format!("{}/{admin}", backend_path(service, backend));
        let body = self.request(Method::POST, &path).await?;
        self.parse(&path, &body)
    }

    /// The flows of a backend that have not ended.
    pub async fn open_flows(&self, service: &str, backend: &str) -> Result<types::OpenFlows> {
        self.get(&format!("{}/flows", backend_path(service, backend)))
            .await
    }

    /// The flows that match `query`.
    pub async fn connections(
        &self,
        query: &types::ConnectionQuery,
    ) -> Result<Vec<types::Connection>> {
        self.get(&connection_path("/v1/connections", query)).await
    }

    /// How many flows match `query`.
    pub async fn connection_count(&self, query: &types::ConnectionQuery) -> Result<types::Count> {
        self.get(&connection_path("/v1/connections/count", query))
            .await
    }

    /// Forgets the flows that match `query`; how many there were.
    pub async fn connection_flush(&self, query: &types::ConnectionQuery) -> Result<types::Count> {
        let path = connection_path("/v1/connections/flush", query);
        self.parse(&path, &self.request(Method::POST, &path).await?)
    }

    /// Packets dropped, by reason.
    pub async fn drops(&self) -> Result<Vec<types::Drops>> {
        self.get("/v1/drops").await
    }

    /// The daemon and what it has put into the kernel.
    pub async fn status(&self) -> Result<types::Status> {
        self.get("/v1/status").await
    }

    /// Has the daemon read its configuration again.
    pub async fn reload(&self) -> Result<()> {
        self.request(Method::POST, "/v1/reload").await.map(drop)
    }

    /// Begins the end of the daemon, and does not wait for it.
    pub async fn stop(&self) -> Result<()> {
        self.request(Method::POST, "/v1/stop").await.map(drop)
    }

    /// Process number of the daemon as the kernel tells it, without asking the daemon; `None`
    /// where it lives in another process namespace.
    pub async fn daemon_pid(&self) -> Result<Option<i32>> {
        let credentials = self
            .connect()
            .await?
            .peer_cred()
            .context("cannot ask who answers")?;
        Ok(credentials.pid().filter(|pid| *pid > 0))
    }

    /// Body of the answer to `GET path`.
    pub async fn get_bytes(&self, path: &str) -> Result<Bytes> {
        self.request(Method::GET, path).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let body = self.get_bytes(path).await?;
        self.parse(path, &body)
    }

    fn parse<T: DeserializeOwned>(&self, path: &str, body: &[u8]) -> Result<T> {
        serde_json::from_slice(body).map_err(|error| {
            anyhow!(
                "the daemon on {} answers {path} in a form this version does not know ({error}); \
                 restart it with this version: sluice stop, then sluice run",
                self.socket.display()
            )
        })
    }

    async fn connect(&self) -> Result<UnixStream> {
        let socket = self.socket.display();
        UnixStream::connect(&self.socket)
            .await
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => NoDaemon {
                    socket: self.socket.clone(),
                }
                .into(),
                ErrorKind::PermissionDenied => {
                    anyhow!("{socket}: permission denied; run the command with sudo")
                }
                _ => anyhow!("{socket}: {error}; is it the daemon's control socket?"),
            })
    }

    async fn request(&self, method: Method, path: &str) -> Result<Bytes> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.exchange(method, path))
            .await
            .unwrap_or_else(|_| {
                bail!(
                    "the daemon on {} gave no answer within {} s; see its log",
                    self.socket.display(),
                    ANSWER_TIMEOUT.as_secs()
                )
            })
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<Bytes> {
        let broken = || format!("the daemon on {} broke off", self.socket.display());
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .with_context(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .with_context(|| format!("cannot ask for {path}"))?;
        // The connection makes progress only while it is polled; it outlives this function when
        // the daemon keeps it open, and ends with the runtime.
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.with_context(broken)?;
        let status = response.status();
        let body = read(response.into_body()).await.with_context(broken)?;
        connection.abort();
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<types::Error>(&body) {
            Ok(error) => bail!("{}", error.error),
            Err(_) => bail!(
                "the daemon on {} answers {path} with {status}",
                self.socket.display()
            ),
        }
    }
}

async fn read<B>(body: B) -> Result<Bytes, B::Error>
where
    B: Body<Data = Bytes>,
{
    Ok(body.collect().await?.to_bytes())
}

fn backend_path(service: &str, backend: &str) -> String {
    let (service, backend) = (encode(service), encode(backend));
    format!("/v1/services/{service}/backends/{backend}")
}

fn connection_path(path: &str, query: &types::ConnectionQuery) -> String {
    let limit = query.limit.map(|n| n.to_string());
    with_query(
        path,
        &[
            ("service", query.service.as_deref()),
            ("backend", query.backend.as_deref()),
            ("client", query.client.as_deref()),
            ("state", query.state.as_deref()),
            ("limit", limit.as_deref()),
        ],
    )
}

fn with_query(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let query: Vec<String> = parameters
        .iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", encode((*value)?))))
        .collect();
    if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", query.join("&"))
    }
}

/// Percent-encodes everything but the unreserved characters of RFC 3986 section 2.3.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_into_an_address() {
        assert_eq!(
            encode("[2001:db8::1]:443/udp"),
            "%5B2001%3Adb8%3A%3A1%5D%3A443%2Fudp"
        );
        assert_eq!(
            with_query("/v1/backends", &[("service", None)]),
            "/v1/backends"
        );
        assert_eq!(
            with_query("/v1/backends", &[("service", Some("a&b=c d"))]),
            "/v1/backends?service=a%26b%3Dc%20d"
        );
    }
}
