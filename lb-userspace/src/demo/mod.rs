//! `sluice demo`: the whole thing at work, on one machine, in a few seconds.
//!
//! A client, a balancer and three backends, each in a network namespace without a name, on one
//! bridge ([`fabric`]). The balancer is `sluice run`, this binary again, with the real program on
//! a veth in driver mode; the backends are this binary again too ([`node`]). Nothing needs to be
//! cleaned up but one directory of temporary files: namespaces, links, programs, pins and
//! processes all end with the process that runs the demonstration, even if it is killed. The
//! directory of one that was killed is removed by the next.

mod client;
mod fabric;
mod files;
mod netns;
mod node;
mod report;

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

pub use node::{SUBCOMMAND, serve};

use crate::api::{client::Client, types::Backend};
use client::{Connection, Load, Outcome};
use fabric::{BACKENDS, BALANCER, CLIENT, Fabric, INTERFACE, VIP};
use files::Files;
use node::{Mounts, Node};
use report::{Report, milliseconds};

const SERVICE: &str = "web";
/// Requests of each step that only looks at the distribution.
const REQUESTS: usize = 300;
/// Clients that send requests at the same time while a backend dies.
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(1);
/// Something that is waited for and has not happened by then never will.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs the demonstration; with `keep`, leaves it up until Ctrl-C and says what to try.
///
/// # Errors
/// When it lacks privileges, something fails on the way, or it is interrupted. Nothing is left
/// behind in any of these cases.
pub fn run(keep: bool) -> Result<()> {
    // SAFETY: takes and returns plain numbers.
    if unsafe { libc::geteuid() } != 0 {
        bail!("demo: makes network namespaces and loads an XDP program; run it with sudo");
    }
    // A thread of its own, that lives as long as the demonstration: the children ask to be killed
    // when the thread that started them ends, and the caller may have a runtime already.
    std::thread::Builder::new()
        .name("demo".to_owned())
        .spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start a runtime")?
                .block_on(until_interrupted(keep))
        })
        .context("cannot start a thread")?
        .join()
        .map_err(|_| anyhow!("demo: panicked"))?
}

async fn until_interrupted(keep: bool) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let end = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    };
    tokio::pin!(end);
    let started = Instant::now();
    let demo = tokio::select! {
        demo = show() => demo?,
        () = &mut end => bail!("demo: interrupted; nothing is left behind"),
    };
    if keep {
        demo.invite()?;
        end.await;
        println!();
    }
    drop(demo);
    println!(
        "\nDone in {:.1} s. Namespaces, links, programs and processes are gone.",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Everything that is up. Dropped in this order: processes first, their files last.
struct Demo {
    balancer: Node,
    /// Holds the pins while no daemon does.
    mounts: Mounts,
    backends: [Node; 3],
    fabric: Fabric,
    api: Client,
    files: Files,
    report: Report,
}

/// The whole demonstration. Dropping what it returns ends everything.
async fn show() -> Result<Demo> {
    let mut demo = Demo::start().await?;
    let outcome = async {
        demo.distribution().await?;
        demo.table().await?;
        demo.failover().await?;
        demo.recovery().await?;
        demo.drain().await?;
        demo.restart().await
    };
    let outcome = outcome.await;
    demo.explained(outcome)?;
    Ok(demo)
}

impl Demo {
    async fn start() -> Result<Self> {
        let files = Files::new()?;
        let mut report = Report::new();
        report.step("Six network namespaces, one bridge, real packets");
        let fabric = Fabric::new().await?;
        let backends = start_backends(&fabric, &files)?;
        files.write_config(&[1, 1, 1])?;
        let balancer = Node::daemon(&fabric.balancer, None, &files.config(), &files.log())?;
        let mounts = balancer.mounts()?;
        let api = Client::new(files.socket());
        let mut demo = Self {
            balancer,
            mounts,
            backends,
            fabric,
            api,
            files,
            report,
        };
        let ready = demo.wait("all backends are up", |backends| {
            backends.len() == BACKENDS.len() && backends.iter().all(is_up)
        });
        let ready = ready.await;
        demo.explained(ready)?;
        demo.introduce().await?;
        Ok(demo)
    }

    /// Where a step has failed, the log often says why, and it is about to be removed.
    fn explained(&self, outcome: Result<()>) -> Result<()> {
        if outcome.is_err() {
            for line in self.files.last_words() {
                eprintln!("  {line}");
            }
        }
        outcome.context("demo")
    }

    async fn introduce(&self) -> Result<()> {
        let status = self.api.status().await?;
        let mode = status
            .interfaces
            .first()
            .map_or("no", |interface| interface.mode.as_str());
        let first = BACKENDS[0].1;
        self.report.line(format_args!(
            "client {CLIENT}  →  sluice {BALANCER}: XDP on {INTERFACE}, {mode} mode  →  app1 app2 app3 at {}…{}:{}",
            first.ip(),
            BACKENDS[2].1.ip().octets()[3],
            first.port(),
        ));
        self.report.line(format_args!(
            "service {SERVICE}: {VIP}/tcp, full NAT, round robin, HTTP checks every 100 ms, three failures are a death"
        ));
        Ok(())
    }

    /// Steady traffic, and who gets it.
    async fn distribution(&mut self) -> Result<()> {
        self.report.step(&format!(
            "{REQUESTS} requests for http://{}/, a connection each",
            VIP.ip()
        ));
        let outcomes = self.requests(REQUESTS).await?;
        self.report.answers(&names(), &outcomes);
        Ok(())
    }

    /// The command line's own table.
    async fn table(&mut self) -> Result<()> {
        self.report.step("The live table");
        let arguments = ["backend", "list", SERVICE];
        let output = tokio::process::Command::new("/proc/self/exe")
            .arg("--socket")
            .arg(self.files.socket())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .await
            .context("cannot run the command line")?;
        if !output.status.success() {
            bail!(
                "sluice {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        self.report
            .command(&format!("sluice {}", arguments.join(" ")), &text);
        Ok(())
    }

    /// Kills a backend under load.
    async fn failover(&mut self) -> Result<()> {
        let (name, _) = BACKENDS[1];
        self.report.step(&format!(
            "{name} is killed while {CLIENTS} clients send requests"
        ));
        let (load, running) = self.load()?;
        more_requests(&load).await?;
        let death = Instant::now();
        self.backends[1].signal(libc::SIGKILL)?;
        self.wait("the death is noticed", |backends| {
            backends.iter().any(|b| b.name == name && b.state == "down")
        })
        .await?;
        let noticed = Instant::now();
        more_requests(&load).await?;
        load.stop();
        let outcomes = running.await?;

        let seen = client::failover(&outcomes, death, noticed);
        let reason = self.reason(name).await?;
        self.report.line(format_args!(
            "marked down after {} ({reason})",
            self.report.paint("1", milliseconds(noticed - death))
        ));
        let unnoticed = format!(
            "until then {} of {} requests failed",
            seen.unnoticed.failed, seen.unnoticed.sent
        );
        match seen.last_failure {
            Some(last) => self.report.line(format_args!(
                "{unnoticed}, the last one sent {} after the kill",
                milliseconds(last)
            )),
            None => self.report.line(unnoticed),
        }
        if seen.cut > 0 {
            self.report.line(format_args!(
                "{} more had been sent before it and were cut off",
                seen.cut
            ));
        }
        if let Some(first) = seen.first_answer {
            self.report.line(format_args!(
                "the first answer came {} after the kill, from another backend",
                milliseconds(first)
            ));
        }
        if let Some(slowest) = seen.slowest {
            self.report.line(format_args!(
                "the slowest was answered after {}: a SYN that {name} refuses is repeated, and goes \
                 elsewhere",
                milliseconds(slowest)
            ));
        }
        self.report.span("since it was marked down", seen.noticed);
        Ok(())
    }

    /// Starts the dead one again.
    async fn recovery(&mut self) -> Result<()> {
        let (name, address) = BACKENDS[1];
        self.report.step(&format!("{name} comes back"));
        let start = Instant::now();
        self.backends[1] = Node::backend(
            &self.fabric.backends[1],
            name,
            address.into(),
            &self.files.log(),
        )?;
        self.wait("the backend is up again", |backends| {
            backends.iter().all(is_up)
        })
        .await?;
        self.report.line(format_args!(
            "in use again {} after its start",
            self.report.paint("1", milliseconds(start.elapsed()))
        ));
        let outcomes = self.requests(REQUESTS).await?;
        self.report.answers(&names(), &outcomes);
        Ok(())
    }

    /// Takes the new connections off a backend and leaves it the one it has.
    async fn drain(&mut self) -> Result<()> {
        let (name, _) = BACKENDS[2];
        self.report.step(&format!(
            "{name} is drained: weight 0 in the configuration, then SIGHUP"
        ));
        let (opened, is_open) = oneshot::channel();
        let (drained, is_drained) = oneshot::channel();
        let client = self.fabric.client.spawn("client", async move || {
            let mut kept = connection_to(VIP.into(), name).await?;
            // The demonstration has failed if nobody listens; then this ends with it.
            let _ = opened.send(());
            is_drained.await?;
            let outcomes = client::in_sequence(VIP.into(), REQUESTS).await;
            Ok((outcomes, kept.ask().await))
        })?;
        if is_open.await.is_err() {
            let why = client.await.err();
            return Err(why.unwrap_or_else(|| anyhow!("{name}: no connection to it")));
        }
        self.files.write_config(&[1, 1, 0])?;
        self.balancer.signal(libc::SIGHUP)?;
        self.wait("the backend is drained", |backends| {
            backends.iter().any(|b| b.name == name && b.weight == 0)
        })
        .await?;
        let _ = drained.send(());
        let (outcomes, kept) = client.await?;
        self.report.answers(&names(), &outcomes);
        self.report.line(match kept {
            Ok(answer) if answer == name => {
                format!("a connection that {name} had before is still answered by it")
            }
            Ok(answer) => bail!("{name}: its connection was answered by {answer}"),
            Err(error) => return Err(error.context(format!("{name}: its connection was lost"))),
        });
        Ok(())
    }

    /// Kills the daemon under load, and starts another.
    async fn restart(&mut self) -> Result<()> {
        self.report.step(&format!(
            "The daemon is killed while {CLIENTS} clients send requests"
        ));
        let (load, running) = self.load()?;
        more_requests(&load).await?;
        let death = Instant::now();
        self.balancer.signal(libc::SIGKILL)?;
        more_requests(&load).await?;
        let start = Instant::now();
        self.balancer = Node::daemon(
            &self.fabric.balancer,
            Some(&self.mounts),
            &self.files.config(),
            &self.files.log(),
        )?;
        self.wait("a new daemon answers", |backends| {
            backends.iter().all(is_up)
        })
        .await?;
        let took = start.elapsed();
        let adopted = self.api.status().await?.adopted;
        more_requests(&load).await?;
        load.stop();
        let outcomes = running.await?;

        self.report
            .span("with no daemon", client::span(&outcomes, death..start));
        let how = if adopted {
            "took over the program and its maps"
        } else {
            "started afresh"
        };
        self.report.line(format_args!(
            "a new one {how} in {}",
            self.report.paint("1", milliseconds(took))
        ));
        self.report
            .span("meanwhile and after", client::span(&outcomes, start..));
        Ok(())
    }

    /// What to try while it is up.
    fn invite(&self) -> Result<()> {
        let client_thread = self.fabric.client.hold()?;
        let socket = self.files.socket();
        let socket = socket.display();
        let sluice = std::env::current_exe()?;
        let sluice = sluice.display();
        println!("\n{}", self.report.paint("1", "It stays up. Try:"));
        for (command, what) in [
            (
                format!(
                    "sudo nsenter -t {client_thread} -n curl -s http://{}/",
                    VIP.ip()
                ),
                "a request from the client",
            ),
            (
                format!("sudo {sluice} --socket {socket} backend list"),
                "the table; also: stats, conn list, status",
            ),
            (
                format!("sudo kill -STOP {}", self.backends[0].pid()),
                "app1 hangs; kill -CONT wakes it",
            ),
            (
                format!(
                    "sudo nsenter -t {} -n -m bpftool map dump pinned /sys/fs/bpf/sluice/services",
                    self.balancer.pid()
                ),
                "what the kernel sees",
            ),
            (
                format!("sudo tail -f {}", self.files.log().display()),
                "what the daemon says",
            ),
        ] {
            self.report
                .line(self.report.paint("2", format_args!("# {what}")));
            self.report.line(command);
        }
        println!("\nCtrl-C ends it.");
        Ok(())
    }

    /// Starts requests that keep coming.
    fn load(
        &self,
    ) -> Result<(
        Arc<Load>,
        impl Future<Output = Result<Vec<Outcome>>> + use<>,
    )> {
        let load = Arc::new(Load::default());
        let requests = Arc::clone(&load);
        let running = self.fabric.client.spawn("client", async move || {
            Ok(requests.run(VIP.into(), CLIENTS, PAUSE).await)
        })?;
        Ok((load, running))
    }

    async fn requests(&self, count: usize) -> Result<Vec<Outcome>> {
        self.fabric
            .client
            .run("client", async move || {
                Ok(client::in_sequence(VIP.into(), count).await)
            })
            .await
    }

    /// Waits until the daemon's table is as `wanted`.
    async fn wait(&mut self, what: &str, wanted: impl Fn(&[Backend]) -> bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(end) = self.balancer.ended()? {
                bail!("{end} before {what}");
            }
            let table = self.api.backends(Some(SERVICE)).await;
            match table {
                Ok(backends) if wanted(&backends) => return Ok(()),
                Ok(backends) if Instant::now() > deadline => {
                    let states: Vec<_> = backends
                        .iter()
                        .map(|b| format!("{} {} ({})", b.name, b.state, b.reason))
                        .collect();
                    bail!("waited in vain until {what}: {}", states.join(", "));
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("waited in vain until {what}")));
                }
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }

    async fn reason(&self, name: &str) -> Result<String> {
        let backends = self.api.backends(Some(SERVICE)).await?;
        let backend = backends.into_iter().find(|backend| backend.name == name);
        Ok(backend.map(|backend| backend.reason).unwrap_or_default())
    }
}

/// Waits until many more requests have been answered or have failed.
async fn more_requests(load: &Load) -> Result<()> {
    let target = load.done() + REQUESTS;
    let deadline = Instant::now() + DEADLINE;
    while load.done() < target {
        if Instant::now() > deadline {
            bail!("client: {REQUESTS} requests took longer than {DEADLINE:?}");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// A connection that `backend` answers: round robin reaches it within one turn.
async fn connection_to(server: SocketAddr, backend: &str) -> Result<Connection> {
    for _ in BACKENDS {
        let mut connection = Connection::open(server).await?;
        if connection.ask().await? == backend {
            return Ok(connection);
        }
    }
    bail!(
        "{backend}: got none of {} connections in a row",
        BACKENDS.len()
    )
}

fn start_backends(fabric: &Fabric, files: &Files) -> Result<[Node; 3]> {
    let start = |i: usize| {
        let (name, address) = BACKENDS[i];
        Node::backend(&fabric.backends[i], name, address.into(), &files.log())
    };
    Ok([start(0)?, start(1)?, start(2)?])
}

fn is_up(backend: &Backend) -> bool {
    backend.state == "up"
}

fn names() -> [&'static str; 3] {
    BACKENDS.map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The network, the servers and the client by themselves, without a balancer.
    #[test]
    fn the_client_reaches_each_backend_directly() {
        // SAFETY: takes and returns plain numbers.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root to make network namespaces");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let fabric = Fabric::new().await.expect("the namespaces and the bridge");
            for ((name, address), namespace) in BACKENDS.into_iter().zip(&fabric.backends) {
                let server = async move || serve(name.to_owned(), address.into()).await;
                drop(namespace.spawn(name, server).expect("a thread"));
                let ask = async move || {
                    let deadline = Instant::now() + DEADLINE;
                    loop {
                        let outcome = client::request(address.into()).await;
                        if outcome.backend.is_some() || Instant::now() > deadline {
                            return Ok(outcome.backend);
                        }
                    }
                };
                let answer = fabric.client.run("client", ask).await.expect("a client");
                assert_eq!(answer.as_deref(), Some(name));
            }
        });
    }
}
