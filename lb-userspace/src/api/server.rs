//! The server: the same routes on the control socket and, for reading only, on TCP.

use super::{ClientFilter, ConnectionFilter, Control, Failure, Reply, types};
use crate::{
    config::{BackendSelector, Endpoint, SelectError, ServiceSelector},
    metrics,
    model::Admin,
};
use anyhow::{Context as _, Result, anyhow, bail};
use axum::{
    Json, Router,
    extract::{
        Path as UrlPath, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use lb_common::names;
use serde::Deserialize;
use std::{
    fs::{self, File, Permissions},
    future::Future,
    io::ErrorKind,
    net::SocketAddr,
    os::{
        fd::AsFd as _,
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener, UnixSocket, UnixStream},
    sync::watch,
};

/// The document behind `GET /v1/openapi.json`.
const OPENAPI: &str = include_str!("openapi.json");

/// How long requests in progress may go on once the server is told to end.
const GRACE: Duration = Duration::from_secs(2);

/// Connections the kernel keeps waiting on the control socket.
const BACKLOG: u32 = 128;

/// Every route but `/metrics`, as the OpenAPI document must list them.
#[cfg(test)]
const ROUTES: [(&str, &str); 14] = [
    ("get", "/v1/services"),
    ("get", "/v1/services/{name}"),
    ("get", "/v1/backends"),
    ("get", "/v1/services/{name}/backends/{backend}/flows"),
    ("post", "/v1/services/{name}/backends/{backend}/{admin}"),
    ("get", "/v1/connections"),
    ("get", "/v1/connections/count"),
    ("get", "/v1/drops"),
    ("get", "/v1/status"),
    ("get", "/v1/openapi.json"),
    ("post", "/v1/connections/flush"),
    ("post", "/v1/stop"),
    ("post", "/v1/reload"),
    ("get", "/metrics"),
];

/// A server whose sockets are open, so that a second daemon is refused before the first packet
/// is touched.
#[derive(Debug)]
pub struct Server {
    // Before the listener, so that it goes first.
    file: SocketFile,
    unix: UnixListener,
    tcp: Option<TcpListener>,
}

impl Server {
    /// Opens the control socket and, if wanted, the TCP address.
    ///
    /// A socket file that nobody answers on is replaced; one that a daemon answers on is refused.
    pub async fn bind(socket: &Path, http: Option<SocketAddr>) -> Result<Self> {
        // First of all: a second daemon with the same configuration is to hear of the first.
        let unix = bind_control_socket(socket).await?;
        let file = SocketFile(socket.to_owned());
        let tcp = match http {
            Some(address) => Some(TcpListener::bind(address).await.map_err(|error| {
                anyhow!("daemon.http {address}: cannot listen: {error}; is the address this host's, and the port free?")
            })?),
            None => None,
        };
        Ok(Self { file, unix, tcp })
    }

    /// The TCP address in use, if any.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok())
    }

    /// Answers requests until `end` completes, then removes the socket file and gives requests in
    /// progress a moment to finish.
    pub async fn serve<C: Control>(
        self,
        control: Arc<C>,
        end: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        let (end_sender, end_receiver) = watch::channel(false);
        let routes = router(control);
        let unix = axum::serve(self.unix, routes.clone())
            .with_graceful_shutdown(ended(end_receiver.clone()))
            .into_future();
        let tcp = async {
            match self.tcp {
                Some(tcp) => {
                    let routes = routes.layer(middleware::from_fn(only_reading));
                    axum::serve(tcp, routes)
                        .with_graceful_shutdown(ended(end_receiver))
                        .await
                }
                None => Ok(()),
            }
        };
        let serving = async { tokio::try_join!(unix, tcp) };
        tokio::pin!(serving);
        tokio::select! {
            result = &mut serving => result.map(drop).context("the API server failed"),
            () = end => {
                drop(self.file);
                end_sender.send_replace(true);
                // A client that does not read must not keep the daemon alive.
                let _ = tokio::time::timeout(GRACE, serving).await;
                Ok(())
            }
        }
    }
}

async fn ended(mut end: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is an end too.
    let _ = end.wait_for(|end| *end).await;
}

/// The file of a control socket that listens; dropping it removes it.
///
/// Always before the listener closes: a daemon that starts then finds either no file or one that
/// answers, never one that is removed under its feet.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("{}: cannot remove: {error}", self.0.display());
        }
    }
}

async fn bind_control_socket(path: &Path) -> Result<UnixListener> {
    let shown = path.display();
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    if let Err(error) = fs::create_dir_all(directory) {
        if error.kind() == ErrorKind::PermissionDenied {
            bail!("control socket {shown}: no permission; run as root");
        }
        return Err(error)
            .with_context(|| format!("control socket {shown}: cannot make its directory"));
    }
    // Two daemons that start at once must not both find the file stale: whoever holds the
    // directory's lock looks and binds in one go.
    let lock = File::open(directory)
        .and_then(|directory| directory.lock().map(|()| directory))
        .with_context(|| format!("control socket {shown}: cannot lock its directory"))?;
    match UnixStream::connect(path).await {
        Ok(stream) => {
            let pid = stream
                .peer_cred()
                .ok()
                .and_then(|peer| peer.pid())
                .filter(|pid| *pid > 0);
            let pid = pid.map_or("in another process namespace".to_owned(), |pid| {
                format!("pid {pid}")
            });
            bail!("another daemon ({pid}) is running on {shown}; stop it with: sluice stop");
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            let is_socket =
                fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
            if !is_socket {
                bail!(
                    "control socket {shown}: something else is there; remove it or set daemon.socket"
                );
            }
            if error.kind() == ErrorKind::PermissionDenied {
                bail!("control socket {shown}: no permission; run as root");
            }
            if error.kind() != ErrorKind::ConnectionRefused {
                return Err(error).with_context(|| {
                    format!("control socket {shown}: cannot tell whether it is in use")
                });
            }
            fs::remove_file(path)
                .with_context(|| format!("control socket {shown}: cannot remove the stale file"))?;
        }
    }
    let socket = UnixSocket::new_stream().context("cannot make a Unix socket")?;
    // Linux gives the file the mode of the unbound socket, so at no moment is it open to others.
    let descriptor = socket
        .as_fd()
        .try_clone_to_owned()
        .context("cannot duplicate a descriptor")?;
    File::from(descriptor)
        .set_permissions(Permissions::from_mode(0o600))
        .with_context(|| format!("control socket {shown}: cannot set its mode"))?;
    socket
        .bind(path)
        .with_context(|| format!("control socket {shown}: cannot bind"))?;
    let listener = socket
        .listen(BACKLOG)
        .with_context(|| format!("control socket {shown}: cannot listen"))?;
    drop(lock);
    Ok(listener)
}

/// Over TCP nobody has said who they are.
async fn only_reading(request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        next.run(request).await
    } else {
        Failure {
            status: 403,
            message: format!(
                "{} {}: TCP is for reading only; use the control socket",
                request.method(),
                request.uri().path()
            ),
        }
        .into_response()
    }
}

fn router<C: Control>(control: Arc<C>) -> Router {
    Router::new()
        .route("/v1/services", get(services::<C>))
        .route("/v1/services/{name}", get(service::<C>))
        .route("/v1/backends", get(backends::<C>))
        .route(
            "/v1/services/{name}/backends/{backend}/flows",
            get(open_flows::<C>),
        )
        .route(
            "/v1/services/{name}/backends/{backend}/{admin}",
            post(set_admin::<C>),
        )
        .route("/v1/connections", get(connections::<C>))
        .route("/v1/connections/count", get(connection_count::<C>))
        .route("/v1/connections/flush", post(connection_flush::<C>))
        .route("/v1/drops", get(drops::<C>))
        .route("/v1/status", get(status::<C>))
        .route("/v1/openapi.json", get(openapi))
        .route("/v1/stop", post(stop::<C>))
        .route("/v1/reload", post(reload::<C>))
        .route("/metrics", get(metrics_page::<C>))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(control)
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (
            status,
            Json(types::Error {
                error: self.message,
            }),
        )
            .into_response()
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BackendQuery {
    service: Option<String>,
}

async fn services<C: Control>(State(control): State<Arc<C>>) -> Reply<Json<Vec<types::Service>>> {
    Ok(Json(control.services().await?))
}

async fn service<C: Control>(
    State(control): State<Arc<C>>,
    name: Result<UrlPath<String>, PathRejection>,
) -> Reply<Json<types::Service>> {
    find_service(control.services().await?, &name?).map(Json)
}

async fn backends<C: Control>(
    State(control): State<Arc<C>>,
    query: Result<Query<BackendQuery>, QueryRejection>,
) -> Reply<Json<Vec<types::Backend>>> {
    let Query(query) = query?;
    let service = service_name(&*control, query.service).await?;
    Ok(Json(control.backends(service).await?))
}

async fn open_flows<C: Control>(
    State(control): State<Arc<C>>,
    path: Result<UrlPath<(String, String)>, PathRejection>,
) -> Reply<Json<types::OpenFlows>> {
    let UrlPath((service, backend)) = path?;
    let (service, backend) = find(&*control, &service, &backend).await?;
    Ok(Json(control.open_flows(service, backend).await?))
}

async fn set_admin<C: Control>(
    State(control): State<Arc<C>>,
    path: Result<UrlPath<(String, String, String)>, PathRejection>,
) -> Reply<Json<types::Backend>> {
    let UrlPath((service, backend, admin)) = path?;
    let admin: Admin = admin.parse().map_err(Failure::bad_request)?;
    let (service, backend) = find(&*control, &service, &backend).await?;
    Ok(Json(control.set_admin(service, backend, admin).await?))
}

/// The name of a service, and the name or address of one of its backends, from what an operator
/// calls them.
async fn find<C: Control>(control: &C, service: &str, backend: &str) -> Reply<(String, String)> {
    let service = find_service(control.services().await?, service)?.name;
    let backends = control.backends(Some(service.clone())).await?;
    let backend = find_backend(&backends, Some(&service), backend)?;
    Ok((service, backend))
}

async fn connections<C: Control>(
    State(control): State<Arc<C>>,
    query: Result<Query<types::ConnectionQuery>, QueryRejection>,
) -> Reply<Json<Vec<types::Connection>>> {
    let Query(query) = query?;
    let filter = connection_filter(&*control, query).await?;
    Ok(Json(control.connections(filter).await?))
}

async fn connection_count<C: Control>(
    State(control): State<Arc<C>>,
    query: Result<Query<types::ConnectionQuery>, QueryRejection>,
) -> Reply<Json<types::Count>> {
    let Query(query) = query?;
    let filter = connection_filter(&*control, query).await?;
    let connections = control.connection_count(filter).await?;
    Ok(Json(types::Count { connections }))
}

async fn connection_flush<C: Control>(
    State(control): State<Arc<C>>,
    query: Result<Query<types::ConnectionQuery>, QueryRejection>,
) -> Reply<Json<types::Count>> {
    let Query(query) = query?;
    let filter = connection_filter(&*control, query).await?;
    let connections = control.connection_flush(filter).await?;
    Ok(Json(types::Count { connections }))
}

async fn drops<C: Control>(State(control): State<Arc<C>>) -> Reply<Json<Vec<types::Drops>>> {
    Ok(Json(control.drops().await?))
}

async fn status<C: Control>(State(control): State<Arc<C>>) -> Reply<Json<types::Status>> {
    Ok(Json(control.status().await?))
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

async fn stop<C: Control>(State(control): State<Arc<C>>) -> Reply<StatusCode> {
    control.stop().await?;
    Ok(StatusCode::ACCEPTED)
}

async fn reload<C: Control>(State(control): State<Arc<C>>) -> Reply<StatusCode> {
    control.reload().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn metrics_page<C: Control>(State(control): State<Arc<C>>) -> Reply<impl IntoResponse> {
    let snapshot = metrics::Snapshot {
        services: control.services().await?,
        backends: control.backends(None).await?,
        drops: control.drops().await?,
        status: control.status().await?,
    };
    let text = metrics::encode(snapshot).map_err(|error| Failure::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

async fn no_such_path(request: Request) -> Failure {
    Failure::not_found(format!(
        "{}: no such path; GET /v1/openapi.json lists them all",
        request.uri().path()
    ))
}

async fn wrong_method(request: Request) -> Failure {
    Failure {
        status: 405,
        message: format!(
            "{} {}: not with this method; GET /v1/openapi.json tells which",
            request.method(),
            request.uri().path()
        ),
    }
}

/// Most services an error message lists.
const LISTED: usize = 20;

fn find_service(services: Vec<types::Service>, wanted: &str) -> Reply<types::Service> {
    let selector: ServiceSelector = wanted
        .parse()
        .map_err(|error: SelectError| Failure::bad_request(error.to_string()))?;
    let is_wanted = |service: &types::Service| match &selector {
        ServiceSelector::Name(name) => *name == service.name,
        ServiceSelector::Listener(address, protocol) => {
            service.listen == address.to_string() && service.protocol == protocol.name()
        }
    };
    let mut known: Vec<_> = services
        .iter()
        .take(LISTED)
        .map(|s| s.name.clone())
        .collect();
    if services.len() > LISTED {
        known.push("...".to_owned());
    }
    services.into_iter().find(is_wanted).ok_or_else(|| {
        Failure::not_found(if known.is_empty() {
            format!("service {wanted:?}: no service is configured")
        } else {
            format!(
                "service {wanted:?}: not configured; known: {}",
                known.join(", ")
            )
        })
    })
}

/// Translates what an operator calls a backend to the name or the address it is listed with.
fn find_backend(backends: &[types::Backend], service: Option<&str>, wanted: &str) -> Reply<String> {
    let selector = BackendSelector::from(wanted);
    let found = backends.iter().find_map(|backend| match &selector {
        BackendSelector::Name(name) => (*name == backend.name).then_some(&backend.name),
        BackendSelector::Address(address) => {
            let shown = Endpoint(*address).to_string();
            (backend.address == shown || backend.name == shown).then_some(&backend.address)
        }
    });
    found.cloned().ok_or_else(|| {
        let of = service.map_or("any service".to_owned(), |name| format!("service {name:?}"));
        Failure::not_found(format!(
            "backend {wanted:?}: not one of {of}; list them with: sluice backend list"
        ))
    })
}

/// Translates what an operator calls a service to its name.
async fn service_name<C: Control>(control: &C, wanted: Option<String>) -> Reply<Option<String>> {
    match wanted {
        Some(wanted) => Ok(Some(find_service(control.services().await?, &wanted)?.name)),
        None => Ok(None),
    }
}

async fn connection_filter<C: Control>(
    control: &C,
    query: types::ConnectionQuery,
) -> Reply<ConnectionFilter> {
    let client = query.client.map(|text| text.parse::<ClientFilter>());
    let client = client.transpose().map_err(Failure::bad_request)?;
    let state = query.state.map(|text| state_number(&text)).transpose()?;
    let service = service_name(control, query.service).await?;
    let backend = match query.backend {
        Some(wanted) => {
            let backends = control.backends(service.clone()).await?;
            Some(find_backend(&backends, service.as_deref(), &wanted)?)
        }
        None => None,
    };
    Ok(ConnectionFilter {
        service,
        backend,
        client,
        state,
        limit: query.limit,
    })
}

fn state_number(text: &str) -> Reply<u8> {
    names::number_of(names::STATE, &text.to_ascii_uppercase()).ok_or_else(|| {
        let known: Vec<_> = names::STATE.iter().map(|(_, name)| *name).collect();
        Failure::bad_request(format!(
            "state {text:?}: unknown; known: {}",
            known.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{client::Client, sample};
    use serde_json::Value;
    use std::{
        collections::BTreeSet,
        sync::atomic::{AtomicU32, Ordering},
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        sync::oneshot,
        task::JoinHandle,
    };

    /// A directory of its own for each test, removed at its end.
    struct Directory(PathBuf);

    impl Directory {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!(
                "sluice-api-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("control.sock")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    struct Running {
        directory: Directory,
        daemon: Arc<sample::Daemon>,
        http: SocketAddr,
        end: oneshot::Sender<()>,
        task: JoinHandle<Result<()>>,
    }

    impl Running {
        async fn start() -> Self {
            let directory = Directory::new();
            let http = "127.0.0.1:0".parse().unwrap();
            let server = Server::bind(&directory.socket(), Some(http)).await.unwrap();
            let http = server.http_address().unwrap();
            let daemon = Arc::new(sample::Daemon::default());
            let (end, ended) = oneshot::channel();
            let task = tokio::spawn(server.serve(daemon.clone(), async {
                let _ = ended.await;
            }));
            Self {
                directory,
                daemon,
                http,
                end,
                task,
            }
        }

        fn client(&self) -> Client {
            Client::new(self.directory.socket())
        }

        /// Status code and body of the answer over TCP.
        async fn over_tcp(&self, method: &str, path: &str) -> (u16, String) {
            let mut stream = TcpStream::connect(self.http).await.unwrap();
            let request =
                format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            (
                head.split(' ').nth(1).unwrap().parse().unwrap(),
                body.to_owned(),
            )
        }

        async fn finish(self) {
            self.end.send(()).unwrap();
            self.task.await.unwrap().unwrap();
            assert!(
                !self.directory.socket().exists(),
                "the socket file is left behind"
            );
        }
    }

    #[tokio::test]
    async fn what_the_daemon_says_reaches_the_client() {
        let running = Running::start().await;
        let client = running.client();
        assert_eq!(client.services().await.unwrap(), sample::services());
        assert_eq!(client.backends(None).await.unwrap(), sample::backends());
        assert_eq!(client.drops().await.unwrap(), sample::drops());
        assert_eq!(client.status().await.unwrap(), sample::status());
        let all = types::ConnectionQuery::default();
        assert_eq!(
            client.connections(&all).await.unwrap(),
            sample::connections()
        );
        assert_eq!(client.connection_count(&all).await.unwrap().connections, 2);
        assert_eq!(
            client.daemon_pid().await.unwrap(),
            i32::try_from(std::process::id()).ok()
        );
        running.finish().await;
    }

    #[tokio::test]
    async fn services_are_addressed_by_name_and_by_listener() {
        let running = Running::start().await;
        let client = running.client();
        for (wanted, name) in [
            ("web", "web"),
            ("198.51.100.10:80/tcp", "web"),
            ("dns", "dns"),
            ("[2001:db8::53]:53/udp", "dns"),
            ("[2001:0db8:0:0::53]:53/udp", "dns"),
        ] {
            assert_eq!(client.service(wanted).await.unwrap().name, name);
            let backends = client.backends(Some(wanted)).await.unwrap();
            assert!(
                !backends.is_empty() && backends.iter().all(|b| b.service == name),
                "{wanted}"
            );
        }
        for unknown in ["mail", "198.51.100.10:80/udp", "we b/%&?#"] {
            let expected = format!("service {unknown:?}: not configured; known: web, dns");
            let error = client.service(unknown).await.unwrap_err();
            assert_eq!(error.to_string(), expected);
            let error = client.backends(Some(unknown)).await.unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        running.finish().await;
    }

    #[tokio::test]
    async fn backends_are_taken_out_by_name_and_by_address() {
        let running = Running::start().await;
        let client = running.client();
        for (service, backend) in [("web", "app1"), ("198.51.100.10:80/tcp", "10.0.0.11:3001")] {
            let now = client.set_admin(service, backend, Admin::Drain).await;
            let now = now.unwrap();
            assert_eq!((now.name.as_str(), now.admin.as_str()), ("app1", "drain"));
            assert_eq!(client.open_flows(service, backend).await.unwrap().open, 3);
        }
        let error = client.set_admin("web", "app9", Admin::Maint).await;
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("backend \"app9\": not one of"), "{error}");
        let path = "/v1/services/web/backends/app1/maint";
        assert_eq!(running.over_tcp("POST", path).await.0, 403);
        running.finish().await;
    }

    #[tokio::test]
    async fn connections_are_filtered_and_bad_filters_named() {
        let running = Running::start().await;
        let client = running.client();
        let query = |key: &str, value: &str| {
            let mut query = types::ConnectionQuery::default();
            let value = Some(value.to_owned());
            match key {
                "service" => query.service = value,
                "backend" => query.backend = value,
                "client" => query.client = value,
                "state" => query.state = value,
                _ => unreachable!(),
            }
            query
        };
        for (key, value) in [
            ("service", "198.51.100.10:80/tcp"),
            ("backend", "app1"),
            ("backend", "10.0.0.11:3001"),
            ("client", "203.0.113.7:51234"),
            ("client", "203.0.113.0/24"),
            ("state", "established"),
        ] {
            let query = query(key, value);
            let found = client.connections(&query).await.unwrap();
            assert_eq!(found, sample::connections()[..1], "{key}={value}");
            assert_eq!(
                client.connection_count(&query).await.unwrap().connections,
                1
            );
        }
        for (key, value, remedy) in [
            ("service", "mail", "known: web, dns"),
            ("service", "198.51.100.10:80", "write 198.51.100.10:80/tcp"),
            ("backend", "app9", "sluice backend list"),
            ("client", "nobody", "192.0.2.0/24"),
            ("state", "open", "known: UDP, SYN_SENT"),
        ] {
            let error = client
                .connections(&query(key, value))
                .await
                .unwrap_err()
                .to_string();
            let named = format!("{key} {value:?}: ");
            assert!(
                error.starts_with(&named) && error.contains(remedy),
                "{error}"
            );
        }
        let limited = types::ConnectionQuery {
            limit: Some(1),
            ..Default::default()
        };
        assert_eq!(client.connections(&limited).await.unwrap().len(), 1);
        assert_eq!(
            client.connection_count(&limited).await.unwrap().connections,
            2
        );
        running.finish().await;
    }

    #[tokio::test]
    async fn stop_and_reload_reach_the_daemon() {
        let running = Running::start().await;
        let error = running.client().reload().await.unwrap_err().to_string();
        assert!(error.contains("sluice.toml:3"), "{error}");
        assert!(!running.daemon.stopped.load(Ordering::SeqCst));
        running.client().stop().await.unwrap();
        assert!(running.daemon.stopped.load(Ordering::SeqCst));
        running.finish().await;
    }

    #[tokio::test]
    async fn tcp_is_for_reading_only() {
        let running = Running::start().await;
        let (status, body) = running.over_tcp("GET", "/v1/services").await;
        assert_eq!(status, 200);
        assert_eq!(
            serde_json::from_str::<Vec<types::Service>>(&body).unwrap(),
            sample::services()
        );
        for method in ["POST", "PUT", "DELETE"] {
            let (status, body) = running.over_tcp(method, "/v1/stop").await;
            assert_eq!(status, 403);
            assert!(body.contains("use the control socket"), "{body}");
        }
        assert!(!running.daemon.stopped.load(Ordering::SeqCst));
        running.finish().await;
    }

    #[tokio::test]
    async fn failures_are_one_line_of_json() {
        let running = Running::start().await;
        for (path, expected) in [
            ("/v1/nothing", 404),
            ("/v1/services/mail", 404),
            ("/v1/backends?servce=web", 400),
            ("/v1/connections?limit=many", 400),
            ("/v1/services/%FF", 400),
            ("/v1/stop", 405),
        ] {
            let (status, body) = running.over_tcp("GET", path).await;
            let error: types::Error = serde_json::from_str(&body).unwrap();
            assert_eq!(status, expected, "{path}: {body}");
            assert!(
                !error.error.is_empty() && !error.error.contains('\n'),
                "{body}"
            );
        }
        running.finish().await;
    }

    #[tokio::test]
    async fn metrics_are_served() {
        let running = Running::start().await;
        let (status, body) = running.over_tcp("GET", "/metrics").await;
        assert_eq!(status, 200);
        assert!(
            body.contains("sluice_service_connections_total{service=\"web\"} 24690\n"),
            "{body}"
        );
        assert!(body.ends_with("# EOF\n"));
        running.finish().await;
    }

    #[tokio::test]
    async fn the_socket_belongs_to_its_owner_and_to_one_daemon() {
        let running = Running::start().await;
        let socket = running.directory.socket();
        assert_eq!(
            fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let taken = Server::bind(&socket, Some(running.http)).await;
        let error = taken.unwrap_err().to_string();
        let expected = format!(
            "another daemon (pid {}) is running on {}; stop it with: sluice stop",
            std::process::id(),
            socket.display()
        );
        assert_eq!(error, expected);
        assert_eq!(
            running.client().status().await.unwrap().pid,
            4711,
            "the first one still answers"
        );
        running.finish().await;
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_anything_else_is_kept() {
        let directory = Directory::new();
        let socket = directory.socket();
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(socket.exists());
        drop(Server::bind(&socket, None).await.unwrap());

        assert!(
            !socket.exists(),
            "a server that never served leaves its file"
        );
        fs::write(&socket, "precious").unwrap();
        let error = Server::bind(&socket, None).await.unwrap_err().to_string();
        assert!(error.contains("something else is there"), "{error}");
        assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_taken_tcp_address_is_named_and_leaves_no_socket() {
        let running = Running::start().await;
        let directory = Directory::new();
        let taken = Server::bind(&directory.socket(), Some(running.http)).await;
        let error = taken.unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("daemon.http {}: ", running.http)),
            "{error}"
        );
        assert!(!directory.socket().exists());
        running.finish().await;
    }

    #[tokio::test]
    async fn a_client_that_never_reads_does_not_keep_the_server() {
        let running = Running::start().await;
        let mut silent = UnixStream::connect(running.directory.socket())
            .await
            .unwrap();
        silent
            .write_all(b"GET /v1/status HTTP/1.1\r\n")
            .await
            .unwrap();
        running.finish().await;
    }

    #[tokio::test]
    async fn without_a_daemon_the_client_says_how_to_start_one() {
        let directory = Directory::new();
        let client = Client::new(directory.socket());
        let error = client.status().await.unwrap_err().to_string();
        let expected = format!(
            "no daemon answers on {}; start it with: sudo sluice run --config FILE",
            directory.socket().display()
        );
        assert_eq!(error, expected);
    }

    fn keys(object: &Value) -> BTreeSet<&str> {
        object
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[tokio::test]
    async fn the_openapi_document_lists_the_routes_that_are_there() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut listed = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            listed.extend(
                keys(methods)
                    .into_iter()
                    .map(|method| (method, path.as_str())),
            );
        }
        assert_eq!(listed, BTreeSet::from(ROUTES));

        let running = Running::start().await;
        for (method, path) in ROUTES.iter().filter(|(method, _)| *method == "get") {
            let path = path.replace("{name}", "web").replace("{backend}", "app1");
            let (status, body) = running.over_tcp(&method.to_uppercase(), &path).await;
            assert_eq!(status, 200, "{path}: {body}");
        }
        running.finish().await;
    }

    #[test]
    fn the_openapi_document_describes_the_types() {
        fn value(sample: impl serde::Serialize) -> Value {
            serde_json::to_value(sample).unwrap()
        }
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let schemas = &document["components"]["schemas"];
        let status = sample::status();
        let samples = [
            ("Service", value(sample::services())),
            ("Backend", value(sample::backends())),
            ("Connection", value(sample::connections())),
            ("Count", value([types::Count { connections: 1 }])),
            ("Drops", value(sample::drops())),
            (
                "OpenFlows",
                value([types::OpenFlows {
                    open: 1,
                    others: true,
                }]),
            ),
            ("Status", value([&status])),
            ("InterfaceStatus", value(&status.interfaces)),
            ("ProgramStatus", value(&status.programs)),
            ("MapStatus", value(&status.maps)),
            (
                "Error",
                value([types::Error {
                    error: String::new(),
                }]),
            ),
        ];
        assert_eq!(
            keys(schemas),
            samples.iter().map(|(name, _)| *name).collect()
        );
        for (name, samples) in &samples {
            let schema = &schemas[name];
            let properties = &schema["properties"];
            let required = schema["required"].as_array().unwrap();
            let required: BTreeSet<_> = required.iter().map(|r| r.as_str().unwrap()).collect();
            assert_eq!(
                keys(properties),
                required,
                "{name}: every field is always there"
            );
            for sample in samples.as_array().unwrap() {
                assert_eq!(keys(sample), required, "{name}");
                for (field, value) in sample.as_object().unwrap() {
                    let allowed = &properties[field]["type"];
                    let allowed = match allowed {
                        Value::Array(several) => several.clone(),
                        one => vec![one.clone()],
                    };
                    let is = match value {
                        Value::Null => "null",
                        Value::Bool(_) => "boolean",
                        Value::Number(n) if n.is_u64() => "integer",
                        Value::Number(_) => "number",
                        Value::String(_) => "string",
                        Value::Array(_) => "array",
                        Value::Object(_) => "object",
                    };
                    assert!(
                        allowed.iter().any(|a| a == is),
                        "{name}.{field} is {is}, not {allowed:?}"
                    );
                    if let Some(words) = properties[field]["enum"].as_array() {
                        assert!(
                            words.contains(value),
                            "{name}.{field}: {value} is not in {words:?}"
                        );
                    }
                }
            }
        }
    }
}
