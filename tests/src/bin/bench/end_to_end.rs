//! HTTP through namespaces: no balancer, nftables, nginx, HAProxy and Sluice, one after the other on the same network.

use crate::{Choice, cpu, live, need_sluice, plot, progress, report::Report};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_tests::{
    backends::hold_the_vips,
    topology::{Options, Topology, VIP4, sluice_bin, wait_until},
};
use std::{collections::BTreeSet, fmt::Write as _, fs, net::SocketAddr, path::PathBuf};

/// The backends' port, and the VIP's: `dsr` translates none.
const PORT: u16 = 8080;
const BACKENDS: [&str; 3] = ["b1", "b2", "b3"];
/// Connections of the client.
const CONNECTIONS: &str = "32";

/// Who distributes the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    None,
    Nftables,
    Nginx,
    Haproxy,
    Sluice(&'static str),
}

const CONTENDERS: [Contender; 6] = [
    Contender::None,
    Contender::Nftables,
    Contender::Nginx,
    Contender::Haproxy,
    Contender::Sluice("nat"),
    Contender::Sluice("dsr"),
];

impl Contender {
    fn name(self) -> String {
        match self {
            Self::None => "http no balancer".to_owned(),
            Self::Nftables => "http nftables dnat".to_owned(),
            Self::Nginx => "http nginx stream".to_owned(),
            Self::Haproxy => "http haproxy tcp".to_owned(),
            Self::Sluice(mode) => format!("http sluice {mode}"),
        }
    }
}

/// What one run of the client says.
#[derive(Clone, Copy, Default)]
struct Load {
    per_second: f64,
    /// Latency in microseconds: 50, 90 and 99 of 100 were answered sooner.
    percentiles: [f64; 3],
    cpu_seconds_per_million: f64,
    errors: u64,
}

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    let names = CONTENDERS.iter().map(|contender| contender.name());
    let http = names.filter(|name| choice.wants(name));
    http.chain(live::names(choice)).collect()
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice) -> Result<Report> {
    need_sluice()?;
    let mut report = Report::new();
    let contenders: Vec<Contender> = CONTENDERS
        .into_iter()
        .filter(|contender| choice.wants(&contender.name()))
        .collect();
    if !contenders.is_empty() {
        http(choice, &contenders, &mut report)?;
    }
    live::measure(choice, &mut report)?;
    Ok(report)
}

/// Pictures of what a request, a connection and a packet take.
pub fn plots(report: &Report) -> Vec<(&'static str, String)> {
    let group = |contender: &Contender| plot::Group {
        label: contender.name().trim_start_matches("http ").to_owned(),
        values: ["requests", "connections"]
            .map(|what| {
                let member = format!("cpu_seconds_per_million_{what}");
                report.number(&contender.name(), &member)
            })
            .to_vec(),
    };
    let http = plot::bars(
        "CPU seconds per million; client, servers and kernel included",
        &[
            "requests on kept connections",
            "requests on new connections",
        ],
        &CONTENDERS.iter().map(group).collect::<Vec<_>>(),
    );
    vec![("http.svg", http), ("live.svg", live::plot(report))]
}

/// Requests, connections and latency.
fn http(choice: &Choice, contenders: &[Contender], report: &mut Report) -> Result<()> {
    let (rounds, seconds) = if choice.quick { (1, 2) } else { (5, 3) };
    let net = Net::new()?;
    let mut all: Vec<(Vec<Load>, Vec<Load>)> = vec![Default::default(); contenders.len()];
    for round in 0..rounds {
        for (contender, (kept, new)) in contenders.iter().zip(&mut all) {
            progress(&format!(
                "{} round {} of {rounds}",
                contender.name(),
                round + 1
            ));
            let served = net.serve(*contender);
            let served = served.with_context(|| contender.name())?;
            let address = net.address(*contender);
            net.all_backends_answer(*contender, address)?;
            kept.push(net.load(address, seconds, &served.groups, true)?);
            new.push(net.load(address, seconds, &served.groups, false)?);
            net.stop(*contender, served);
        }
    }
    progress("");
    println!(
        "\n{:<22} {:>11} {:>9} {:>9} {:>9} {:>9} {:>11} {:>9} {:>7}",
        "", "requests/s", "p50 us", "p90 us", "p99 us", "CPU s/M", "connect/s", "CPU s/M", "errors"
    );
    for (contender, (kept, new)) in contenders.iter().zip(&all) {
        let of =
            |loads: &[Load], value: fn(&Load) -> f64| median(loads.iter().map(value).collect());
        let requests = of(kept, |load| load.per_second);
        let [p50, p90, p99] =
            [0, 1, 2].map(|i| median(kept.iter().map(|load| load.percentiles[i]).collect()));
        let cpu = of(kept, |load| load.cpu_seconds_per_million);
        let connections = of(new, |load| load.per_second);
        let cpu_new = of(new, |load| load.cpu_seconds_per_million);
        let errors: u64 = kept.iter().chain(new).map(|load| load.errors).sum();
        println!(
            "{:<22} {requests:>11.0} {p50:>9.0} {p90:>9.0} {p99:>9.0} {cpu:>9.1} {connections:>11.0} {cpu_new:>9.1} {errors:>7}",
            contender.name()
        );
        report.add(
            &contender.name(),
            json!({
                "part": "end-to-end",
                "requests_per_second": requests,
                "latency_p50_us": p50,
                "latency_p90_us": p90,
                "latency_p99_us": p99,
                "cpu_seconds_per_million_requests": cpu,
                "connections_per_second": connections,
                "cpu_seconds_per_million_connections": cpu_new,
                "errors": errors,
                "rounds": rounds,
            }),
        );
    }
    Ok(())
}

/// The one in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A client, a balancer's host, and three servers.
struct Net {
    topology: Topology,
    servers: Vec<u32>,
    script: PathBuf,
}

/// What was started for a contender.
struct Served {
    /// The balancer's process, if it has one.
    process: Option<u32>,
    /// Process groups that serve: the balancer's and those of the servers.
    groups: Vec<u32>,
}

impl Net {
    fn new() -> Result<Self> {
        let topology = Topology::new(Options::default());
        let servers = BACKENDS.map(|host| topology.nginx(host)).to_vec();
        for host in BACKENDS {
            // What `dsr` needs; it disturbs nobody else.
            hold_the_vips(&topology, host);
        }
        sysctl(&topology, "lb", "net.ipv4.ip_forward=1");
        // Client and servers share a segment: the kernel would tell them so.
        sysctl(&topology, "lb", "net.ipv4.conf.all.send_redirects=0");
        sysctl(&topology, "lb", "net.ipv4.conf.eth0.send_redirects=0");
        let script = topology.config("result.lua", SCRIPT);
        Ok(Self {
            topology,
            servers,
            script,
        })
    }

    /// Where the client sends to.
    fn address(&self, contender: Contender) -> SocketAddr {
        match contender {
            Contender::None => SocketAddr::new(self.topology.v4("b1").into(), PORT),
            _ => SocketAddr::new(VIP4.into(), PORT),
        }
    }

    /// Starts a contender.
    fn serve(&self, contender: Contender) -> Result<Served> {
        let net = &self.topology;
        let process = match contender {
            Contender::None => None,
            Contender::Nftables => {
                self.hold_vip("add");
                let rules = net.config("rules.nft", &self.nftables());
                net.run("lb", "nft", &["-f", path(&rules)?]).ok();
                None
            }
            Contender::Nginx => {
                self.hold_vip("add");
                let config = net.config("stream.conf", &self.nginx());
                let mut command = net.command("lb", "nginx");
                command.arg("-c").arg(config);
                Some(net.spawn("stream", command))
            }
            Contender::Haproxy => {
                self.hold_vip("add");
                let config = net.config("haproxy.cfg", &self.haproxy());
                let mut command = net.command("lb", "haproxy");
                command.arg("-db").arg("-f").arg(config);
                Some(net.spawn("haproxy", command))
            }
            Contender::Sluice(mode) => {
                let config = net.config("sluice.toml", &self.sluice(mode));
                let daemon = net.daemon(&config);
                net.wait_backends_up(None, BACKENDS.len());
                Some(daemon)
            }
        };
        let groups = self.servers.iter().copied().chain(process).collect();
        Ok(Served { process, groups })
    }

    /// Takes a contender away.
    fn stop(&self, contender: Contender, served: Served) {
        let net = &self.topology;
        match contender {
            Contender::None => {}
            Contender::Nftables => {
                net.run("lb", "nft", &["delete", "table", "ip", "balance"])
                    .ok();
                self.hold_vip("del");
            }
            Contender::Nginx | Contender::Haproxy => {
                served.process.into_iter().for_each(|pid| net.kill(pid));
                self.hold_vip("del");
            }
            Contender::Sluice(_) => {
                served.process.into_iter().for_each(|pid| net.kill(pid));
                let config = net.dir().join("sluice.toml");
                let mut command = net.command("lb", sluice_bin());
                command.arg("detach").arg("--config").arg(config);
                sluice_tests::topology::finish(&mut command).ok();
            }
        }
        // Whoever holds the VIP next has the same Ethernet address, or the client has to ask anew.
        let flush = ["neigh", "flush", "dev", "eth0"];
        net.run("client", "ip", &flush).ok();
    }

    /// Gives the VIP to the kernel of the balancer's host, or takes it.
    fn hold_vip(&self, what: &str) {
        let vip = format!("{VIP4}/32");
        self.topology
            .run("lb", "ip", &["addr", what, &vip, "dev", "eth0"])
            .ok();
    }

    /// Waits until every server has answered through the contender.
    fn all_backends_answer(&self, contender: Contender, address: SocketAddr) -> Result<()> {
        let url = format!("http://{address}/");
        let expected = if contender == Contender::None {
            1
        } else {
            BACKENDS.len()
        };
        let mut seen = BTreeSet::new();
        wait_until(&format!("answers through {}", contender.name()), || {
            let ran = self.topology.curl("client", &["--max-time", "1", &url]);
            if ran.code == 0 {
                seen.insert(ran.stdout.trim().to_owned());
            }
            seen.len() == expected
        });
        Ok(())
    }

    /// Lets the client work, with connections that are kept or with a new one for every request.
    fn load(&self, address: SocketAddr, seconds: u32, groups: &[u32], keep: bool) -> Result<Load> {
        let (url, duration) = (format!("http://{address}/"), format!("-d{seconds}s"));
        let mut arguments = vec![
            "-t1",
            "-c",
            CONNECTIONS,
            &duration,
            "-s",
            path(&self.script)?,
        ];
        if !keep {
            arguments.extend(["-H", "Connection: close"]);
        }
        arguments.push(&url);
        let before = cpu::seconds(groups);
        let said = self.topology.run("client", "wrk", &arguments).ok();
        let cpu = cpu::seconds(groups) - before;
        let result = said.lines().find_map(|line| line.strip_prefix("RESULT "));
        let numbers: Vec<f64> = result
            .unwrap_or_default()
            .split(' ')
            .filter_map(|number| number.parse().ok())
            .collect();
        let [requests, microseconds, p50, p90, p99, errors] = numbers[..] else {
            anyhow::bail!("wrk says no result:\n{said}");
        };
        ensure!(requests > 0.0, "no request was answered:\n{said}");
        Ok(Load {
            per_second: requests / microseconds * 1e6,
            percentiles: [p50, p90, p99],
            cpu_seconds_per_million: cpu / requests * 1e6,
            errors: errors as u64,
        })
    }

    /// Destination and source translation, one server after the other.
    fn nftables(&self) -> String {
        let mut servers = String::new();
        for (n, host) in BACKENDS.iter().enumerate() {
            let comma = if n > 0 { ", " } else { "" };
            let _ = write!(servers, "{comma}{n} : {} . {PORT}", self.topology.v4(host));
        }
        format!(
            "table ip balance {{\n\
             chain pre {{\ntype nat hook prerouting priority -100;\n\
             ip daddr {VIP4} tcp dport {PORT} dnat ip addr . port to numgen inc mod {} map {{ {servers} }}\n}}\n\
             chain post {{\ntype nat hook postrouting priority 100;\n\
             ip daddr {{ {} }} masquerade\n}}\n}}\n",
            BACKENDS.len(),
            BACKENDS
                .map(|host| self.topology.v4(host).to_string())
                .join(", ")
        )
    }

    fn nginx(&self) -> String {
        let module = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"]
            .map(|folder| format!("{folder}/ngx_stream_module.so"))
            .into_iter()
            .find(|file| fs::exists(file).unwrap_or(false))
            .map_or_else(String::new, |file| format!("load_module {file};\n"));
        let dir = self.topology.dir().display();
        let servers = BACKENDS.map(|host| format!("server {}:{PORT};\n", self.topology.v4(host)));
        format!(
            "{module}user root;\ndaemon off;\nworker_processes auto;\npid {dir}/stream.pid;\n\
             error_log {dir}/stream-error.log;\nevents {{ worker_connections 8192; }}\n\
             stream {{\nupstream servers {{\n{}}}\n\
             server {{\nlisten {VIP4}:{PORT} backlog=8192;\nproxy_pass servers;\n}}\n}}\n",
            servers.concat()
        )
    }

    fn haproxy(&self) -> String {
        let servers =
            BACKENDS.map(|host| format!("    server {host} {}:{PORT}\n", self.topology.v4(host)));
        format!(
            "global\n    maxconn 8192\ndefaults\n    mode tcp\n    timeout connect 5s\n    timeout client 60s\n    \
             timeout server 60s\nlisten balance\n    bind {VIP4}:{PORT}\n    balance roundrobin\n{}",
            servers.concat()
        )
    }

    fn sluice(&self, mode: &str) -> String {
        let mut text = self.topology.daemon_section();
        let _ = write!(
            text,
            "[[service]]\nname = \"web\"\nlisten = \"{VIP4}:{PORT}\"\nprotocol = \"tcp\"\nforward = \"{mode}\"\n"
        );
        for host in BACKENDS {
            let address = self.topology.v4(host);
            let _ = write!(
                text,
                "[[service.backend]]\nname = \"{host}\"\naddress = \"{address}:{PORT}\"\n"
            );
        }
        text
    }
}

fn sysctl(net: &Topology, host: &str, setting: &str) {
    net.run(host, "sysctl", &["-q", "-w", setting]).ok();
}

fn path(file: &std::path::Path) -> Result<&str> {
    file.to_str().context("a path that is not UTF-8")
}

/// Prints what wrk has counted, with percentiles, so that a program can read it.
const SCRIPT: &str = r#"done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(90), latency:percentile(99),
    e.connect + e.read + e.write + e.timeout + e.status))
end
"#;
