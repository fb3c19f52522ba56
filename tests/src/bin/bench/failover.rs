//! What clients notice of a backend's death.

use crate::{Choice, need_sluice, progress, report::Report};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_tests::{
    backends::{decapsulate, hold_the_vips, route_through_the_balancer},
    topology::{Options, Topology, VIP4, wait_until},
};
use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
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
/// How often a round is repeated because no client was with the server that died.
const TRIES: usize = 5;
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

/// One line of the table.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    mode: &'static str,
    scheduler: &'static str,
    death: Death,
    /// Of section `[service.health]`.
    health: &'static str,
    /// Whether it is measured where it must be quick, too.
    quick: bool,
}

const NAT: Case = Case {
    name: "failover process death, default checks",
    mode: "nat",
    scheduler: "round-robin",
    death: Death::Process,
    health: "",
    quick: true,
};

const CASES: [Case; 8] = [
    NAT,
    Case {
        name: "failover process death, checks every 200 ms",
        health: FAST,
        ..NAT
    },
    Case {
        name: "failover host death, default checks",
        death: Death::Host,
        ..NAT
    },
    Case {
        name: "failover host death, checks every 200 ms",
        death: Death::Host,
        health: FAST,
        ..NAT
    },
    of_mode("failover host death, dnat, default checks", "dnat"),
    of_mode("failover host death, dsr, default checks", "dsr"),
    of_mode("failover host death, ipip, default checks", "ipip"),
    of_mode("failover host death, gue, default checks", "gue"),
];

/// The scheduler that is the default. Where flows are not recorded the daemon must hear of a death without them.
const fn of_mode(name: &'static str, mode: &'static str) -> Case {
    Case {
        name,
        mode,
        scheduler: "maglev",
        death: Death::Host,
        quick: false,
        ..NAT
    }
}

const FAST: &str = "interval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\n";

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    wanted(choice).map(|case| case.name.to_owned()).collect()
}

fn wanted(choice: &Choice) -> impl Iterator<Item = Case> {
    CASES
        .into_iter()
        .filter(|case| (case.quick || !choice.quick) && choice.wants(case.name))
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice) -> Result<Report> {
    need_sluice()?;
    let mut report = Report::new();
    let rounds = if choice.quick { 1 } else { 5 };
    for (row, case) in wanted(choice).enumerate() {
        let name = case.name;
        let mut results = Vec::new();
        for round in 0..rounds {
            progress(&format!("{name} round {} of {rounds}", round + 1));
            // A hash decides who is where: perhaps nobody is with the server that dies.
            let noticed = (0..TRIES).find_map(|_| once(&case).transpose());
            results.push(noticed.context("no client is ever with the server that dies")??);
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

/// The balancer's addresses on the backends' segment, where that is another than the clients'.
const ON_SECOND_SEGMENT: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(198, 18, 1, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
);

/// A network with three servers behind the balancer.
fn serve(case: &Case) -> (Topology, [u32; 3]) {
    let net = Topology::new(Options {
        two_armed: case.mode == "dnat",
        ..Options::default()
    });
    let mut text = net.daemon_section();
    let Case {
        mode,
        scheduler,
        health,
        ..
    } = case;
    let _ = write!(
        text,
        "[[service]]\nname = \"web\"\nlisten = \"{VIP4}:{PORT}\"\nprotocol = \"tcp\"\nforward = \"{mode}\"\n\
         scheduler = \"{scheduler}\"\non_backend_down = \"reset\"\n\
         [service.health]\ntype = \"tcp\"\n{health}"
    );
    let servers = ["b1", "b2", "b3"].map(|host| {
        match *mode {
            "nat" => {}
            "dnat" => route_through_the_balancer(&net, host, ON_SECOND_SEGMENT),
            _ => hold_the_vips(&net, host),
        }
        if matches!(*mode, "ipip" | "gue") {
            decapsulate(&net, host);
        }
        let _ = write!(
            text,
            "[[service.backend]]\naddress = \"{}:{PORT}\"\n",
            net.v4(host)
        );
        net.nginx(host)
    });
    let config = net.config("sluice.toml", &text);
    net.daemon(&config);
    net.wait_backends_up(None, 3);
    (net, servers)
}

/// Nothing if no client was with the server that died.
fn once(case: &Case) -> Result<Option<Noticed>> {
    let (net, servers) = serve(case);
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
    match case.death {
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
    if firsts.is_empty() {
        return Ok(None);
    }
    firsts.sort_by(f64::total_cmp);
    Ok(Some(Noticed {
        median_ms: firsts[firsts.len() / 2],
        worst_ms: firsts[firsts.len() - 1],
        failed_kept: f64::from(failed[0]),
        failed_new: f64::from(failed[1]),
        last_ms: (last - dead).as_secs_f64() * 1e3,
    }))
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
