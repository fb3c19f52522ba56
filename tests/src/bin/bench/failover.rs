//! What clients notice of a backend's death.

use crate::{Choice, need_sluice, progress, report::Report};
use anyhow::{Result, ensure};
use serde_json::json;
use sluice_tests::topology::{Options, Topology, VIP4, wait_until};
use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const PORT: u16 = 8080;
/// Clients that keep their connection.
const KEEPING: usize = 12;
/// Clients that make a new connection for every request: they may meet the dead backend until it is taken out.
const RENEWING: usize = 4;
/// How long a client waits for an answer before it gives up and connects anew.
const PATIENCE: Duration = Duration::from_millis(250);
/// Between an answer and the next request.
const PAUSE: Duration = Duration::from_millis(5);

/// How the backend dies.
#[derive(Clone, Copy)]
enum Death {
    /// Its process: the kernel refuses connections.
    Process,
    /// Its host: nothing answers.
    Host,
}

const CASES: [(&str, Death, &str); 4] = [
    ("failover process death, default checks", Death::Process, ""),
    (
        "failover process death, checks every 200 ms",
        Death::Process,
        FAST,
    ),
    ("failover host death, default checks", Death::Host, ""),
    (
        "failover host death, checks every 200 ms",
        Death::Host,
        FAST,
    ),
];

const FAST: &str = "interval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\n";

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    let names = CASES.iter().map(|(name, _, _)| (*name).to_owned());
    names.filter(|name| choice.wants(name)).collect()
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice) -> Result<Report> {
    need_sluice()?;
    let mut report = Report::new();
    let rounds = if choice.quick { 1 } else { 5 };
    let wanted = CASES.iter().filter(|(name, _, _)| choice.wants(name));
    for (row, (name, death, health)) in wanted.enumerate() {
        let mut results = Vec::new();
        for round in 0..rounds {
            progress(&format!("{name} round {} of {rounds}", round + 1));
            results.push(once(*death, health)?);
        }
        progress("");
        let of = |value: fn(&Noticed) -> f64| {
            let mut values: Vec<f64> = results.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let (first, worst) = (of(|result| result.median_ms), of(|result| result.worst_ms));
        let (failed, failed_new) = (
            of(|result| result.failed_kept),
            of(|result| result.failed_new),
        );
        let last = of(|result| result.last_ms);
        if row == 0 {
            println!(
                "{:<46} {:>11} {:>11} {:>11} {:>11} {:>11}",
                "", "median ms", "worst ms", "failed kept", "failed new", "last ms"
            );
        }
        println!(
            "{name:<46} {first:>11.0} {worst:>11.0} {failed:>11.0} {failed_new:>11.0} {last:>11.0}"
        );
        report.add(
            name,
            json!({
                "part": "failover",
                "first_answer_median_ms": first,
                "first_answer_worst_ms": worst,
                "failed_requests_on_kept_connections": failed,
                "failed_requests_on_new_connections": failed_new,
                "last_failure_ms": last,
                "rounds": rounds,
            }),
        );
    }
    Ok(report)
}

/// What was noticed of one death.
struct Noticed {
    /// From the death to the first answer, of the clients of the dead backend.
    median_ms: f64,
    worst_ms: f64,
    /// Requests that failed, of clients that keep their connection and of those that do not.
    failed_kept: f64,
    failed_new: f64,
    /// From the death to the end of the last request that failed.
    last_ms: f64,
}

/// A request: when it began and ended, and who answered.
struct Request {
    start: Instant,
    end: Instant,
    answered: Option<String>,
}

fn once(death: Death, health: &str) -> Result<Noticed> {
    let net = Topology::new(Options::default());
    let servers = ["b1", "b2", "b3"].map(|host| net.nginx(host));
    let mut text = net.daemon_section();
    let _ = write!(
        text,
        "[[service]]\nname = \"web\"\nlisten = \"{VIP4}:{PORT}\"\nprotocol = \"tcp\"\nforward = \"nat\"\n\
         scheduler = \"round-robin\"\non_backend_down = \"reset\"\n\
         [service.health]\ntype = \"tcp\"\n{health}"
    );
    for host in ["b1", "b2", "b3"] {
        let _ = write!(
            text,
            "[[service.backend]]\naddress = \"{}:{PORT}\"\n",
            net.v4(host)
        );
    }
    let config = net.config("sluice.toml", &text);
    net.daemon(&config);
    net.wait_backends_up(None, 3);

    let vip = SocketAddr::new(VIP4.into(), PORT);
    let stop = Arc::new(AtomicBool::new(false));
    let logs: Vec<Arc<Mutex<Vec<Request>>>> =
        (0..KEEPING + RENEWING).map(|_| Arc::default()).collect();
    let clients: Vec<thread::JoinHandle<()>> = logs
        .iter()
        .enumerate()
        .map(|(n, log)| {
            let (stop, log) = (stop.clone(), log.clone());
            net.background("client", move || client(vip, n < KEEPING, &stop, &log))
        })
        .collect();
    let each = |fits: &dyn Fn(&Request) -> bool| {
        logs.iter()
            .all(|log| log.lock().is_ok_and(|log| log.iter().any(fits)))
    };
    wait_until("every client to have an answer", || {
        each(&|r| r.answered.is_some())
    });

    let dead = Instant::now();
    match death {
        Death::Process => net.kill(servers[0]),
        Death::Host => {
            net.run("b1", "ip", &["link", "set", "eth0", "down"]).ok();
        }
    }
    wait_until("every client to have an answer again", || {
        each(&|r| r.start > dead && r.answered.as_deref().is_some_and(|host| host != "b1"))
    });
    // Whoever has an answer may still meet the dead backend with its next connection.
    net.wait_backends_up(None, 2);
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        ensure!(client.join().is_ok(), "a client failed");
    }

    let mut firsts = Vec::new();
    let mut failed = [0_u32; 2];
    let mut last = dead;
    for (n, log) in logs.iter().enumerate() {
        let Ok(log) = log.lock() else { continue };
        let answers = || log.iter().filter(|r| r.answered.is_some());
        for failure in log.iter().filter(|r| r.end > dead && r.answered.is_none()) {
            failed[usize::from(n >= KEEPING)] += 1;
            last = last.max(failure.end);
        }
        let before = answers().rfind(|r| r.end <= dead || r.answered.as_deref() == Some("b1"));
        // While the command that ends it runs, the backend may still answer.
        let after = answers().find(|r| r.start > dead && r.answered.as_deref() != Some("b1"));
        if let (true, Some(before), Some(after)) = (n < KEEPING, before, after)
            && before.answered.as_deref() == Some("b1")
        {
            firsts.push((after.end - dead).as_secs_f64() * 1e3);
        }
    }
    ensure!(!firsts.is_empty(), "no client was at the backend that died");
    firsts.sort_by(f64::total_cmp);
    Ok(Noticed {
        median_ms: firsts[firsts.len() / 2],
        worst_ms: firsts[firsts.len() - 1],
        failed_kept: f64::from(failed[0]),
        failed_new: f64::from(failed[1]),
        last_ms: (last - dead).as_secs_f64() * 1e3,
    })
}

/// Asks again and again, on one connection if it `keeps` it; after a failure, on a new one.
fn client(vip: SocketAddr, keeps: bool, stop: &AtomicBool, log: &Mutex<Vec<Request>>) {
    let mut connection = None;
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let answered = ask(&mut connection, vip).ok();
        if answered.is_none() || !keeps {
            connection = None;
        }
        if let Ok(mut log) = log.lock() {
            log.push(Request {
                start,
                end: Instant::now(),
                answered,
            });
        }
        thread::sleep(PAUSE);
    }
}

/// One request; who answered.
fn ask(connection: &mut Option<TcpStream>, vip: SocketAddr) -> io::Result<String> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect_timeout(&vip, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            connection.insert(stream)
        }
    };
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
    let mut seen = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen.extend(&buffer[..n]);
        let text = String::from_utf8_lossy(&seen);
        // The servers answer with their name and a line's end.
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && let Some(name) = body.strip_suffix('\n')
        {
            return Ok(name.to_owned());
        }
    }
}
