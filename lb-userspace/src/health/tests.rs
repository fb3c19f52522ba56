//! Checks against real sockets on the loopback interface.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    body::{Bytes, Frame, Incoming},
    header::{HeaderMap, HeaderName, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::mpsc,
    time::{Instant, timeout},
};

use tokio_rustls::TlsAcceptor;

use super::{Checker, Pace, Rhythm, Target};
use crate::{
    config::{Check, Config, Health},
    model::check::{CheckResult, Code},
};

const DEADLINE: Duration = Duration::from_secs(20);

type Results = mpsc::Receiver<(u32, CheckResult)>;

/// The check of a service with these lines in its section, and of its only backend.
fn parse(lines: &str) -> Health {
    let text = format!(
        "[daemon]\ninterfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\n\
         listen = \"198.51.100.10:80\"\n[service.health]\n{lines}\n"
    );
    let config = Config::parse(&text, Path::new("lb.toml")).unwrap();
    Health {
        interval: Duration::from_millis(200),
        fast_interval: Duration::from_millis(200),
        down_interval: Duration::from_millis(200),
        timeout: Duration::from_millis(150),
        ..(*config.services[0].health).clone()
    }
}

fn tcp() -> Health {
    parse("type = \"tcp\"")
}

fn http(path: &str) -> Health {
    parse(&format!("type = \"http\"\npath = \"{path}\""))
}

fn target(id: u32, address: SocketAddr, health: Health) -> Target<u32> {
    Target {
        id,
        address,
        via: None,
        health: Arc::new(health),
        environment: Vec::new(),
    }
}

async fn next(results: &mut Results) -> (u32, CheckResult) {
    timeout(DEADLINE, results.recv())
        .await
        .expect("a result in time")
        .expect("the checker runs")
}

/// The first result of one target.
async fn check(address: SocketAddr, health: Health) -> CheckResult {
    let (mut checker, mut results) = Checker::spawn();
    checker.set(vec![target(1, address, health)]);
    next(&mut results).await.1
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A server that reads a request head and then does as the function says.
async fn serve<F, R>(answer: F) -> SocketAddr
where
    F: Fn(TcpStream, String) -> R + Send + Sync + 'static,
    R: Future<Output = io::Result<()>> + Send + 'static,
{
    let (listener, address) = listen().await;
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let _ = answer(stream, String::from_utf8_lossy(&head).into_owned()).await;
            });
        }
    });
    address
}

/// A server that sends the same bytes to everybody and hangs up.
async fn serve_text(text: &'static str) -> SocketAddr {
    serve(move |mut stream, _| async move { stream.write_all(text.as_bytes()).await }).await
}

/// An address where nobody listens.
async fn closed() -> SocketAddr {
    listen().await.1
}

/// A listener whose queue is full, so that the kernel ignores further connections.
async fn stuffed() -> (tokio::net::TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut streams = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        streams.push(stream.unwrap());
    }
    (listener, streams, address)
}

#[tokio::test]
async fn a_connection_is_made_and_reset() {
    let (listener, address) = listen().await;
    let result = check(address, tcp()).await;
    assert_eq!((result.code, result.text.as_str()), (Code::L4Ok, ""));
    assert!(result.duration < Duration::from_millis(150));
    let (mut stream, _) = listener.accept().await.unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn ipv6_works_too() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        eprintln!("skipped: no IPv6 on the loopback interface");
        return;
    };
    let result = check(listener.local_addr().unwrap(), tcp()).await;
    assert_eq!(result.code, Code::L4Ok);
}

#[tokio::test]
async fn another_port_can_be_asked() {
    let (listener, open) = listen().await;
    let health = parse(&format!("type = \"tcp\"\nport = {}", open.port()));
    assert_eq!(check(closed().await, health).await.code, Code::L4Ok);
    drop(listener);
}

#[tokio::test]
async fn refusal() {
    let expected = (Code::L4Connection, "connection refused");
    for health in [tcp(), http("/")] {
        let result = check(closed().await, health).await;
        assert_eq!((result.code, result.text.as_str()), expected);
    }
}

#[tokio::test]
async fn no_connection_in_time() {
    let (_listener, _streams, address) = stuffed().await;
    for health in [tcp(), http("/")] {
        let result = check(address, health).await;
        assert_eq!(result.code, Code::L4Timeout);
        assert_eq!(result.text, "no connection within 150ms");
        assert!(result.duration >= Duration::from_millis(150));
    }
}

#[tokio::test]
async fn a_good_answer_and_the_request_for_it() {
    let (heads, mut seen) = mpsc::unbounded_channel();
    let address = serve(move |mut stream, head| {
        heads.send(head).unwrap();
        async move {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await
        }
    })
    .await;
    let result = check(address, http("/health?full=1")).await;
    assert_eq!((result.code, result.text.as_str()), (Code::L7Ok, "200 OK"));
    let head = seen.recv().await.unwrap();
    assert!(
        head.starts_with("GET /health?full=1 HTTP/1.1\r\n"),
        "{head}"
    );
    let head = head.to_ascii_lowercase();
    for line in [
        format!("host: {address}"),
        format!("user-agent: sluice/{}", env!("CARGO_PKG_VERSION")),
        "connection: close".to_owned(),
    ] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{head}");
    }
}

#[tokio::test]
async fn a_wrong_status() {
    let address = serve_text("HTTP/1.1 503 Service Unavailable\r\n\r\n").await;
    let result = check(address, http("/")).await;
    let expected = (Code::L7Status, "503 Service Unavailable");
    assert_eq!((result.code, result.text.as_str()), expected);
}

#[tokio::test]
async fn expected_statuses_can_be_chosen() {
    let address = serve_text("HTTP/1.0 404 Not Found\r\n\r\n").await;
    let health =
        parse("type = \"http\"\nmethod = \"HEAD\"\nhost = \"app.example\"\nexpect = \"200,404\"");
    assert_eq!(check(address, health).await.code, Code::L7Ok);
}

#[tokio::test]
async fn answers_that_are_none() {
    for (answer, text) in [
        ("SSH-2.0-OpenSSH_9.2p1\r\n\r\n", "the answer is not HTTP"),
        ("\u{0}\u{1}\u{2}garbage", "the answer is not HTTP"),
        ("", "hung up before the answer was whole"),
        (
            "HTTP/1.1 200 OK\r\nX-Ha",
            "hung up before the answer was whole",
        ),
    ] {
        let result = check(serve_text(answer).await, http("/")).await;
        let expected = (Code::L7Response, text);
        assert_eq!((result.code, result.text.as_str()), expected, "{answer:?}");
    }
    // A body shorter than announced.
    let short = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nok").await;
    assert_eq!(check(short, http("/")).await.code, Code::L7Response);
}

#[tokio::test]
async fn answers_that_take_too_long() {
    // Says nothing; a header every now and then; a body without end, but slow.
    let silent = serve(|stream, _| async move {
        let _stream = stream;
        std::future::pending().await
    });
    let slow_head = serve(|mut stream, _| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
        loop {
            stream.write_all(b"X-More: coming\r\n").await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let slow_body = serve(|mut stream, _| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        loop {
            stream.write_all(b"x").await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    for address in [silent.await, slow_head.await, slow_body.await] {
        let result = check(address, http("/")).await;
        assert_eq!(result.code, Code::L7Timeout);
        assert_eq!(result.text, "no whole answer within 150ms");
        assert!(result.duration < Duration::from_millis(1000));
    }
}

#[tokio::test]
async fn of_a_long_body_only_the_beginning_is_read() {
    let address = serve(|mut stream, _| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        loop {
            stream.write_all(&[b'x'; 4096]).await?;
        }
    })
    .await;
    let mut health = http("/");
    health.timeout = Duration::from_secs(10);
    assert_eq!(check(address, health).await.code, Code::L7Ok);
}

#[tokio::test]
async fn a_request_that_cannot_be_made_says_why() {
    let address = serve_text("HTTP/1.1 200 OK\r\n\r\n").await;
    let result = check(address, http("/a<b")).await;
    assert_eq!(result.code, Code::L7Response);
    assert_eq!(result.text, "health.path \"/a<b\" is not a request target");
}

#[tokio::test]
async fn nothing_is_asked_where_nothing_is_to_be_checked() {
    let (listener, address) = listen().await;
    let (_other, reference) = listen().await;
    let (mut checker, mut results) = Checker::spawn();
    checker.set(vec![
        target(1, address, parse("type = \"none\"")),
        target(2, reference, tcp()),
    ]);
    for _ in 0..3 {
        assert_eq!(next(&mut results).await.0, 2);
    }
    assert!(timeout(Duration::ZERO, listener.accept()).await.is_err());
}

#[tokio::test]
async fn the_interval_is_kept_give_or_take_a_tenth() {
    let mut rhythm = Rhythm::new(&Health::default(), 1);
    let pauses: Vec<_> = (0..1000)
        .map(|_| {
            rhythm.next();
            rhythm.pause(Pace::Steady).as_millis()
        })
        .collect();
    assert!(pauses.iter().all(|pause| (900..=1100).contains(pause)));
    assert!(pauses.iter().any(|pause| *pause < 920));
    assert!(pauses.iter().any(|pause| *pause > 1080));

    // Start to start, also where a check uses up its timeout.
    let (_listener, _streams, address) = stuffed().await;
    let (mut checker, mut results) = Checker::spawn();
    let mut health = tcp();
    health.interval = Duration::from_millis(400);
    health.timeout = Duration::from_millis(390);
    checker.set(vec![target(1, address, health)]);
    next(&mut results).await;
    let first = Instant::now();
    for _ in 0..5 {
        next(&mut results).await;
    }
    let taken = first.elapsed();
    // Five times 400 ms, less a tenth; were they counted from the end, it would be 3.75 s at least.
    assert!(taken >= Duration::from_millis(1790), "{taken:?}");
    assert!(taken < Duration::from_millis(3700), "{taken:?}");
}

#[tokio::test]
async fn the_set_changes_while_checks_run() {
    let (_one, first) = listen().await;
    let (_two, second) = listen().await;
    let (mut checker, mut results) = Checker::spawn();
    checker.set(vec![target(1, first, tcp())]);
    assert_eq!(next(&mut results).await.0, 1);
    // Another comes, and one moves to where nobody listens.
    checker.set(vec![
        target(1, closed().await, tcp()),
        target(2, second, tcp()),
    ]);
    let mut moved = false;
    let mut came = false;
    while !(moved && came) {
        let (id, result) = next(&mut results).await;
        moved |= id == 1 && result.code == Code::L4Connection;
        came |= id == 2 && result.code == Code::L4Ok;
    }
    // One goes. A result may have been on its way, but not two.
    checker.set(vec![target(2, second, tcp())]);
    let mut late = 0;
    for _ in 0..5 {
        late += u32::from(next(&mut results).await.0 == 1);
    }
    assert!(late <= 1);
    // None is left: the channel falls silent, and closes with the checker.
    checker.set(Vec::new());
    drop(checker);
    let rest = async { while results.recv().await.is_some() {} };
    timeout(DEADLINE, rest).await.expect("the checks end");
}

#[tokio::test]
async fn what_stays_keeps_its_rhythm() {
    let accepted = Arc::new(AtomicU32::new(0));
    let (listener, address) = listen().await;
    let counter = accepted.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (_other, reference) = listen().await;
    let mut steady = tcp();
    steady.interval = Duration::from_secs(3600);
    let (mut checker, mut results) = Checker::spawn();
    checker.set(vec![target(1, address, steady.clone())]);
    assert_eq!(next(&mut results).await.0, 1);
    // Were it started anew each time, it would be checked at once each time.
    for round in 0..20 {
        steady.rise = 2 + round;
        checker.set(vec![
            target(1, address, steady.clone()),
            target(100 + round, reference, tcp()),
        ]);
        assert_eq!(next(&mut results).await.0, 100 + round);
    }
    assert_eq!(accepted.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn thousands_are_checked() {
    // A thread of its own and a long queue, so that the test's own load costs no connection.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener = socket.listen(4096).unwrap().into_std().unwrap();
    listener.set_nonblocking(false).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || while listener.accept().is_ok() {});
    let (mut checker, mut results) = Checker::spawn();
    let mut health = tcp();
    (health.interval, health.fast_interval) = (Duration::from_secs(2), Duration::from_secs(2));
    health.timeout = Duration::from_secs(1);
    let targets = |id| target(id, address, health.clone());
    checker.set((0..2000).map(targets).collect());
    let mut rounds: HashMap<u32, u32> = HashMap::new();
    let mut twice = HashSet::new();
    while twice.len() < 2000 {
        let (id, result) = next(&mut results).await;
        assert_eq!(result.code, Code::L4Ok, "{result}");
        let round = rounds.entry(id).or_default();
        *round += 1;
        if *round == 2 {
            twice.insert(id);
        }
    }
}

#[tokio::test]
async fn a_body_must_match() {
    let health = || parse("type = \"http\"\nexpect_body = '\\bfine\\b'");
    let fine = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nall fine").await;
    assert_eq!(check(fine, health()).await.code, Code::L7Ok);
    let other = serve_text("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nunrefined").await;
    let result = check(other, health()).await;
    let text = r#"200 OK, but the body does not match "\bfine\b""#;
    assert_eq!(
        (result.code, result.text.as_str()),
        (Code::L7Response, text)
    );
}

/// A certificate authority and a certificate of its for `localhost`, in files of their own.
struct Certificates {
    dir: PathBuf,
    server: Arc<rustls::ServerConfig>,
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Certificates {
    /// `strict`: clients must show a certificate of the same authority.
    fn new(name: &str, strict: bool) -> Self {
        let dir = std::env::temp_dir().join(format!("slc-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, name.to_owned());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&ca_key).unwrap();
        let issuer = Issuer::from_params(&params, &ca_key);
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        fs::write(dir.join("ca"), ca.pem()).unwrap();
        fs::write(dir.join("cert"), cert.pem()).unwrap();
        fs::write(dir.join("key"), key.serialize_pem()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if strict {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(ca.der().clone()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots),
                provider,
            );
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let server = builder
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        Self {
            dir,
            server: Arc::new(server),
        }
    }

    /// A server that answers one request over TLS with 200; sends the names it is asked for.
    async fn serve(&self) -> (SocketAddr, mpsc::UnboundedReceiver<Option<String>>) {
        let (listener, address) = listen().await;
        let acceptor = TlsAcceptor::from(self.server.clone());
        let (names, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let name = stream.get_ref().1.server_name().map(str::to_owned);
                let _ = names.send(name);
                let mut head = [0; 1024];
                if stream.read(&mut head).await.is_ok_and(|read| read > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                    let _ = stream.write_all(answer).await;
                    let _ = stream.shutdown().await;
                }
            }
        });
        (address, seen)
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

/// A check with room for a handshake of an unoptimised build.
fn slow(lines: &str) -> Health {
    Health {
        timeout: Duration::from_secs(10),
        ..parse(lines)
    }
}

#[tokio::test]
async fn https_asks_by_name_and_takes_any_certificate_unless_told() {
    let certificates = Certificates::new("any", false);
    let (address, mut names) = certificates.serve().await;
    let result = check(address, slow("type = \"https\"")).await;
    assert_eq!((result.code, result.text.as_str()), (Code::L7Ok, "200 OK"));
    assert_eq!(names.recv().await, Some(None));
    let result = check(address, slow("type = \"https\"\nhost = \"a.example:8443\"")).await;
    assert_eq!(result.code, Code::L7Ok);
    assert_eq!(names.recv().await, Some(Some("a.example".to_owned())));
    let result = check(address, slow("type = \"tls\"\nsni = \"b.example\"")).await;
    assert_eq!((result.code, result.text.as_str()), (Code::L6Ok, "TLSv1.3"));
    assert_eq!(names.recv().await, Some(Some("b.example".to_owned())));
}

#[tokio::test]
async fn a_certificate_is_verified_where_an_authority_is_named() {
    let certificates = Certificates::new("verify", false);
    let others = Certificates::new("others", false);
    let (address, _names) = certificates.serve().await;
    let (ca, other) = (certificates.file("ca"), others.file("ca"));
    let wrong_name = "the certificate is for another name than sni";
    let wrong_issuer = "the certificate is of an authority that is not in ca";
    for (ca, name, code, text) in [
        (&ca, "localhost", Code::L7Ok, "200 OK"),
        (&ca, "a.example", Code::L6Response, wrong_name),
        (&other, "localhost", Code::L6Response, wrong_issuer),
    ] {
        let health = slow(&format!(
            "type = \"https\"\nca = \"{ca}\"\nsni = \"{name}\""
        ));
        let result = check(address, health).await;
        assert_eq!((result.code, result.text.as_str()), (code, text));
    }
}

#[tokio::test]
async fn a_client_certificate_is_shown() {
    let certificates = Certificates::new("client", true);
    let (address, _names) = certificates.serve().await;
    let (cert, key) = (certificates.file("cert"), certificates.file("key"));
    let health = slow(&format!(
        "type = \"https\"\ncert = \"{cert}\"\nkey = \"{key}\""
    ));
    assert_eq!(check(address, health).await.code, Code::L7Ok);
    let result = check(address, slow("type = \"https\"")).await;
    assert!(result.is_failed(), "{result}");
}

#[tokio::test]
async fn what_does_not_speak_tls() {
    let (listener, speaks) = listen().await;
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
            open.push(stream);
        }
    });
    // This one waits for the end of a request's head, which does not come.
    let waits = serve_text("").await;
    for (address, text) in [
        (waits, "no TLS handshake in time"),
        (speaks, "the answer is not TLS"),
    ] {
        let result = check(address, parse("type = \"https\"")).await;
        assert_eq!(
            (result.code, result.text.as_str()),
            (Code::L6Response, text)
        );
    }
    let refused = check(closed().await, parse("type = \"https\"")).await;
    assert_eq!(refused.code, Code::L4Connection);
}

/// A UDP server that answers each datagram as the function says.
async fn serve_udp(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            if let Some(answer) = answer(&buffer[..length]) {
                let _ = socket.send_to(&answer, from).await;
            }
        }
    });
    address
}

#[tokio::test]
async fn datagrams() {
    let echo = serve_udp(|datagram| Some(datagram.to_vec())).await;
    let silent = serve_udp(|_| None).await;
    // Bound and closed again: the kernel answers with port unreachable.
    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let refusing = nobody.local_addr().unwrap();
    drop(nobody);
    let bytes = "payload_hex = \"00 ff\"\nexpect_body = '^(?-u:\\x00\\xff)$'";
    let other = "payload = \"ping\"\nexpect_body = \"pong\"";
    let patient = "must_answer = false";
    for (address, lines, code, text) in [
        (echo, "payload = \"ping\"", Code::L7Ok, "4 bytes"),
        (echo, bytes, Code::L7Ok, "2 bytes"),
        (
            echo,
            other,
            Code::L7Response,
            "the answer does not match \"pong\"",
        ),
        (echo, "", Code::L7Ok, "0 bytes"),
        (silent, "", Code::L7Timeout, "no answer within 150ms"),
        (silent, patient, Code::L4Ok, "silent, and nobody refused"),
        (refusing, "", Code::L4Connection, "port unreachable"),
        (refusing, patient, Code::L4Connection, "port unreachable"),
    ] {
        let result = check(address, parse(&format!("type = \"udp\"\n{lines}"))).await;
        assert_eq!((result.code, result.text.as_str()), (code, text), "{lines}");
    }
}

#[tokio::test]
async fn questions_to_a_name_server() {
    // Written by hand after RFC 1035, section 4.1: the question comes back with QR and an rcode.
    let answer = |rcode: u8| {
        move |question: &[u8]| {
            let mut answer = question.to_vec();
            answer[2] |= 0x80;
            answer[3] = rcode;
            let asked = b"\x03www\x07example\x03com\0\0\x1c\0\x01";
            assert_eq!(&question[12..], asked);
            assert_eq!(question[2] & 1, 1, "recursion is desired");
            Some(answer)
        }
    };
    let health = |lines: &str| {
        parse(&format!(
            "type = \"dns\"\nname = \"www.example.com\"\nrecord = \"AAAA\"\n{lines}"
        ))
    };
    let (good, missing) = (serve_udp(answer(0)).await, serve_udp(answer(3)).await);
    let garbage = serve_udp(|_| Some(b"no".to_vec())).await;
    let late = serve_udp(|question| {
        let mut answer = question.to_vec();
        answer[0] ^= 1;
        answer[2] |= 0x80;
        Some(answer)
    })
    .await;
    let both = "rcode = [\"NOERROR\", \"NXDOMAIN\"]";
    for (address, lines, code, text) in [
        (good, "", Code::L7Ok, "NOERROR, 0 records"),
        (missing, "", Code::L7Status, "NXDOMAIN"),
        (missing, both, Code::L7Ok, "NXDOMAIN, 0 records"),
        (garbage, "", Code::L7Response, "the answer is not DNS"),
        (late, "", Code::L7Timeout, "no answer within 150ms"),
    ] {
        let result = check(address, health(lines)).await;
        assert_eq!((result.code, result.text.as_str()), (code, text), "{lines}");
    }
}

/// A gRPC server that answers each request with this message and this status.
async fn serve_grpc(message: &'static [u8], status: &'static str) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(move |request: hyper::Request<Incoming>| async move {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                assert_eq!(request.headers()["content-type"], "application/grpc");
                let asked = request.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(&asked[..], b"\0\0\0\0\x05\x0a\x03a.B");
                let trailers = HeaderMap::from_iter([(
                    HeaderName::from_static("grpc-status"),
                    HeaderValue::from_static(status),
                )]);
                let frames = [
                    Frame::data(Bytes::from_static(message)),
                    Frame::trailers(trailers),
                ];
                let frames = frames.map(Ok::<_, Infallible>);
                let body = StreamBody::new(futures_util::stream::iter(frames));
                Ok::<_, Infallible>(hyper::Response::new(body))
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    address
}

#[tokio::test]
async fn grpc_servers() {
    let health = || slow("type = \"grpc\"\nservice = \"a.B\"");
    let none = "the answer is not a HealthCheckResponse";
    for (message, status, code, text) in [
        (&b"\0\0\0\0\x02\x08\x01"[..], "0", Code::L7Ok, "SERVING"),
        (b"\0\0\0\0\x02\x08\x02", "0", Code::L7Status, "NOT_SERVING"),
        (b"\0\0\0\0\0", "0", Code::L7Status, "UNKNOWN"),
        (b"", "5", Code::L7Status, "grpc-status 5"),
        (b"", "0", Code::L7Response, none),
    ] {
        let result = check(serve_grpc(message, status).await, health()).await;
        assert_eq!((result.code, result.text.as_str()), (code, text));
    }
    // Another protocol: whatever it answers to the preface of HTTP/2 is no HTTP/2.
    let other = serve_text("HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let result = check(other, health()).await;
    assert_eq!(result.code, Code::L7Response, "{result}");
}

/// A check by a shell script; the caller's own user runs it, who need not be root.
fn script(text: &str) -> Health {
    let mut health = slow("type = \"exec\"\ncommand = \"/bin/sh\"");
    if let Check::Exec(exec) = &mut health.check {
        exec.args = vec!["-c".to_owned(), text.to_owned()];
        // SAFETY: plain system call.
        exec.user.uid = unsafe { libc::geteuid() };
    }
    health
}

#[tokio::test]
async fn commands() {
    let nowhere = closed().await;
    for (text, code, expected) in [
        ("echo all well; echo more", Code::L7Ok, "all well"),
        ("exit 0", Code::L7Ok, ""),
        ("echo no room; exit 3", Code::L7Status, "exit 3: no room"),
        ("kill -9 $$", Code::L7Status, "ended by signal 9"),
        ("head -c 1000000 /dev/zero", Code::L7Ok, ""),
        ("echo $(pwd) $HOME$USER $SLUICE_TIMEOUT", Code::L7Ok, "/ 10"),
    ] {
        let result = check(nowhere, script(text)).await;
        assert_eq!(
            (result.code, result.text.as_str()),
            (code, expected),
            "{text}"
        );
    }
    let mut missing = script("");
    if let Check::Exec(exec) = &mut missing.check {
        exec.command = "/nowhere/check".into();
    }
    let result = check(nowhere, missing).await;
    assert_eq!(result.code, Code::L7Response);
    let start = "/nowhere/check cannot be run as nobody: No such file";
    assert!(result.text.starts_with(start), "{result}");
}

#[tokio::test]
async fn a_command_is_told_whom_it_is_about() {
    let (mut checker, mut results) = Checker::spawn();
    let text = "echo $SLUICE_BACKEND at $SLUICE_PORT";
    let mut one = target(1, closed().await, script(text));
    one.environment = vec![
        ("SLUICE_BACKEND", "app1".into()),
        ("SLUICE_PORT", "81".into()),
    ];
    checker.set(vec![one]);
    assert_eq!(next(&mut results).await.1.text, "app1 at 81");
}

#[tokio::test]
async fn a_command_that_hangs_is_killed_with_what_it_started() {
    let file = std::env::temp_dir().join(format!("slc-{}-children", std::process::id()));
    // The next check may begin before this one's numbers are read: it leaves them as they are.
    let mut health = script(&format!(
        "set -C; sleep 1000 & echo $$ $! > {}; wait",
        file.display()
    ));
    health.timeout = Duration::from_secs(1);
    let result = check(closed().await, health).await;
    assert_eq!(
        (result.code, result.text.as_str()),
        (Code::L7Timeout, "killed after 1s")
    );
    let numbers = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    let numbers: Vec<i32> = numbers
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert_eq!(numbers.len(), 2);
    for number in numbers {
        let gone = async {
            // A process that only waits to be asked for by its parent has no command line.
            while fs::read(format!("/proc/{number}/cmdline")).is_ok_and(|line| !line.is_empty()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, gone).await.expect("the process is gone");
    }
}

#[tokio::test]
async fn the_pace_decides_how_often() {
    let (_listener, address) = listen().await;
    let (mut checker, mut results) = Checker::spawn();
    let mut health = tcp();
    health.interval = Duration::from_secs(1000);
    health.fast_interval = Duration::from_millis(1);
    health.down_interval = Duration::from_secs(1000);
    checker.set(vec![target(1, address, health)]);
    next(&mut results).await;
    // Were it not heeded at once, the next check would be far off.
    checker.set_pace(&1, Pace::Changing);
    for _ in 0..5 {
        next(&mut results).await;
    }
    checker.set_pace(&1, Pace::Down);
    // Results that were on their way may still come, but they end.
    let rest = async {
        while timeout(Duration::from_millis(200), results.recv())
            .await
            .is_ok()
        {}
    };
    timeout(DEADLINE, rest).await.expect("the checks pause");
}

#[tokio::test]
async fn agents_say_a_line() {
    let speak = |line: &'static str| async move {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(line.as_bytes()).await;
                // One that ends its line may leave the connection open.
                if line.ends_with('\n') {
                    open.push(stream);
                } else {
                    let _ = stream.shutdown().await;
                }
            }
        });
        address
    };
    let health = || parse("type = \"agent\"\nport = 1");
    for (line, code, text, percent) in [
        ("75%\r\n", Code::L7Ok, "75%", Some(75)),
        ("up 50%", Code::L7Ok, "up 50%", Some(50)),
        (
            "down # disk full\n",
            Code::L7Status,
            "down # disk full",
            None,
        ),
        ("", Code::L7Response, "the agent says nothing", None),
    ] {
        let mut health = health();
        let address = speak(line).await;
        health.port = Some(address.port());
        let result = check(address, health).await;
        assert_eq!(
            (result.code, result.text.as_str()),
            (code, text),
            "{line:?}"
        );
        assert_eq!(
            result.report.is_some(),
            code != Code::L7Response,
            "{line:?}"
        );
        assert_eq!(result.report.and_then(|report| report.percent), percent);
    }
    let mut health = health();
    let (_listener, silent) = listen().await;
    health.port = Some(silent.port());
    let result = check(silent, health).await;
    let expected = (Code::L7Timeout, "no line within 150ms");
    assert_eq!((result.code, result.text.as_str()), expected);
}
