//! Checks against real sockets on the loopback interface.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{Checker, Rhythm, Target};
use crate::{
    config::{Check, Health},
    model::check::{CheckResult, Code},
};

const DEADLINE: Duration = Duration::from_secs(20);

type Results = mpsc::Receiver<(u32, CheckResult)>;

fn health(check: Check) -> Health {
    Health {
        check,
        interval: Duration::from_millis(200),
        timeout: Duration::from_millis(150),
        rise: 2,
        fall: 3,
    }
}

fn tcp() -> Health {
    health(Check::Tcp { port: None })
}

fn http(path: &str) -> Health {
    health(Check::Http {
        port: None,
        method: "GET".to_owned(),
        path: path.to_owned(),
        host: None,
        expect: vec![(200, 399)],
    })
}

fn target(id: u32, address: SocketAddr, health: Health) -> Target<u32> {
    Target {
        id,
        address,
        health,
        via: None,
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
    let health = health(Check::Tcp {
        port: Some(open.port()),
    });
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
    let health = health(Check::Http {
        port: None,
        method: "HEAD".to_owned(),
        path: "/".to_owned(),
        host: Some("app.example".to_owned()),
        expect: vec![(200, 200), (404, 404)],
    });
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
    let result = check(address, http("/a b")).await;
    assert_eq!(result.code, Code::L7Response);
    assert_eq!(result.text, "health.path \"/a b\" is not a request target");
}

#[tokio::test]
async fn nothing_is_asked_where_nothing_is_to_be_checked() {
    let (listener, address) = listen().await;
    let (_other, reference) = listen().await;
    let (mut checker, mut results) = Checker::spawn();
    checker.set(vec![
        target(1, address, health(Check::None)),
        target(2, reference, tcp()),
    ]);
    for _ in 0..3 {
        assert_eq!(next(&mut results).await.0, 2);
    }
    assert!(timeout(Duration::ZERO, listener.accept()).await.is_err());
}

#[tokio::test]
async fn the_interval_is_kept_give_or_take_a_tenth() {
    let mut rhythm = Rhythm {
        interval: Duration::from_secs(1),
        random: 1,
    };
    let pauses: Vec<_> = (0..1000).map(|_| rhythm.pause().as_millis()).collect();
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
    health.interval = Duration::from_secs(2);
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
