//! Packets per second through one core: XDP live frames, which come from memory and go through everything that a packet from a wire would.

use crate::{
    Choice,
    balancer::{Balancer, Plan},
    cpu,
    end_to_end::median,
    frame::{BACKEND_MAC, BALANCER_MAC, Family, Frame, Network, PORT, Transport},
    plot, progress,
    report::Report,
    wrapper::{Target, Wrapper},
};
use anyhow::{Context as _, Result, anyhow, bail};
use lb_common::{
    bench::FIRST_PORT,
    names::{FORWARD, name_of},
    service::{forward, scheduler},
};
use serde_json::json;
use sluice::{config::Protocol, dataplane::interface_index};
use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// UDP flows that the packets are of.
const FLOWS: u64 = 1024;
/// Backends.
const BACKENDS: u32 = 3;
/// Packets of one call.
const PACKETS: u32 = 1 << 16;

/// What happens to the packets on their way.
#[derive(Clone, Copy)]
enum Way {
    /// The kernel routes them.
    Route,
    /// The kernel translates and routes them.
    Nftables,
    /// They are sent back as they are.
    Floor,
    /// The balancer, in this forward mode.
    Sluice(u8),
}

const WAYS: [Way; 8] = [
    Way::Floor,
    Way::Route,
    Way::Nftables,
    Way::Sluice(forward::NAT),
    Way::Sluice(forward::DNAT),
    Way::Sluice(forward::DSR),
    Way::Sluice(forward::IPIP),
    Way::Sluice(forward::GUE),
];

impl Way {
    fn name(self) -> String {
        match self {
            Self::Floor => "live floor tx".to_owned(),
            Self::Route => "live no balancer, kernel routes".to_owned(),
            Self::Nftables => "live nftables dnat".to_owned(),
            Self::Sluice(mode) => format!("live sluice {}", name_of(FORWARD, mode)),
        }
    }
}

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    let names = WAYS.iter().map(|way| way.name());
    names.filter(|name| choice.wants(name)).collect()
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice, report: &mut Report) -> Result<()> {
    let ways = WAYS.into_iter().filter(|way| choice.wants(&way.name()));
    let ways: Vec<Way> = ways.collect();
    if ways.is_empty() {
        return Ok(());
    }
    let quick = choice.quick;
    // The namespaces belong to a thread, and go with it.
    let results = thread::spawn(move || all(&ways, quick));
    let results = results
        .join()
        .map_err(|_| anyhow!("live frames: failed"))??;
    progress("");
    println!(
        "\n{:<34} {:>14} {:>14} {:>8}",
        "UDP packets of 64 bytes", "packets/s core", "ns each", "lost %"
    );
    for (name, rates, lost) in results {
        let (rate, lost) = (median(rates), median(lost));
        println!("{name:<34} {rate:>14.0} {:>14.0} {lost:>8.2}", 1e9 / rate);
        report.add(
            &name,
            json!({
                "part": "end-to-end",
                "packets_per_second_and_core": rate,
                "lost_percent": lost,
            }),
        );
    }
    Ok(())
}

/// A picture of what a packet takes.
pub fn plot(report: &Report) -> String {
    let group = |way: &Way| plot::Group {
        label: way.name().trim_start_matches("live ").to_owned(),
        values: vec![report.number(&way.name(), "packets_per_second_and_core") / 1e6],
    };
    plot::bars(
        "UDP packets of 64 bytes through one core",
        &["million packets per second"],
        &WAYS.iter().map(group).collect::<Vec<_>>(),
    )
}

/// Names, packets per second of CPU time in each round, and what was lost, in percent.
type Results = Vec<(String, Vec<f64>, Vec<f64>)>;

fn all(ways: &[Way], quick: bool) -> Result<Results> {
    let (rounds, time) = if quick { (1, 500) } else { (5, 1000) };
    let time = Duration::from_millis(time);
    let mut wrapper = Wrapper::load(1)?;
    // The far end's namespace, which a process holds; then this thread's.
    own_network()?;
    let ip = |arguments: &str| command(Command::new("ip").args(arguments.split(' ')));
    let holder = Command::new("sleep").arg("infinity").spawn()?;
    let holder = Holder(holder);
    own_network()?;
    let (lb, peer) = (mac(BALANCER_MAC), mac(BACKEND_MAC));
    ip("link set lo up")?;
    ip(&format!(
        "link add eth0 address {lb} type veth peer name eth0 address {peer} netns {}",
        holder.0.id()
    ))?;
    ip("link set eth0 up")?;
    let far = fs::File::open(format!("/proc/{}/ns/net", holder.0.id()))?;
    thread::scope(|scope| {
        let far_end = scope.spawn(|| -> Result<()> {
            join(&far)?;
            command(Command::new("ip").args(["link", "set", "eth0", "up"]))?;
            wrapper.sink("eth0")
        });
        far_end.join().map_err(|_| anyhow!("the far end: failed"))?
    })?;
    for (setting, value) in [
        ("ip_forward", "1"),
        ("conf/all/rp_filter", "0"),
        ("conf/eth0/rp_filter", "0"),
        ("conf/all/send_redirects", "0"),
        ("conf/eth0/send_redirects", "0"),
    ] {
        let file = format!("/proc/sys/net/ipv4/{setting}");
        fs::write(&file, value).with_context(|| file.clone())?;
    }
    let host = |n| Family::V4.address(Network::Hosts, n);
    ip(&format!("addr add {}/16 dev eth0", host(0)))?;
    ip("route add default dev eth0")?;
    for n in 1..=BACKENDS {
        ip(&format!(
            "neigh add {} lladdr {peer} dev eth0 nud permanent",
            host(n)
        ))?;
    }

    let ifindex = interface_index("eth0")?;
    let mut results: Results = ways
        .iter()
        .map(|way| (way.name(), Vec::new(), Vec::new()))
        .collect();
    for round in 0..rounds {
        for (way, (name, rates, lost)) in ways.iter().zip(&mut results) {
            progress(&format!("{name} round {} of {rounds}", round + 1));
            let (rate, gone) = once(&wrapper, *way, ifindex, time).with_context(|| name.clone())?;
            rates.push(rate);
            lost.push(gone);
        }
    }
    Ok(results)
}

/// Packets per second of CPU time, and percent lost.
fn once(wrapper: &Wrapper, way: Way, ifindex: u32, time: Duration) -> Result<(f64, f64)> {
    let family = Family::V4;
    let frame = match way {
        Way::Route => {
            let client = (family.address(Network::Clients, 0), FIRST_PORT);
            let backend = (family.address(Network::Hosts, 1), PORT);
            Frame::new(family, Transport::Udp, client, backend)
        }
        _ => Frame::to_vip(family, Transport::Udp, 0),
    };
    let mut balancer = None;
    let target = match way {
        Way::Floor => Target::FloorTx,
        Way::Route => Target::Pass,
        Way::Nftables => {
            nft(&rules())?;
            Target::Pass
        }
        Way::Sluice(mode) => {
            let plan = Plan {
                protocol: Protocol::Udp,
                ..Plan::new(family, mode, scheduler::MAGLEV, BACKENDS)
            };
            let loaded = balancer.insert(Balancer::load_on(ifindex, 1 << 16, &[plan])?);
            wrapper.set(Target::Balancer, loaded.dataplane.program())?;
            Target::Balancer
        }
    };
    let mut case = frame.case(true);
    case.mask = FLOWS - 1;
    let send = |packets| wrapper.send(target, family, &case, &frame.bytes, (ifindex, packets));
    // Flows begin.
    send(4 * FLOWS as u32)?;
    // SAFETY: plain system call.
    let group = unsafe { libc::getpgrp() }.cast_unsigned();
    let (sunk, cpu, start) = (wrapper.sunk()?, cpu::seconds(&[group]), Instant::now());
    let mut sent = 0;
    while start.elapsed() < time {
        send(PACKETS)?;
        sent += u64::from(PACKETS);
    }
    let (sunk, cpu) = (wrapper.sunk()? - sunk, cpu::seconds(&[group]) - cpu);
    if let Way::Nftables = way {
        nft("delete table ip balance")?;
    }
    // The kernel may have sent some of its own.
    let lost = (1.0 - sunk as f64 / sent as f64).max(0.0) * 100.0;
    if lost > 50.0 {
        bail!("of {sent} packets {sunk} arrived");
    }
    Ok((sunk as f64 / cpu, lost))
}

/// Destination and source translation, one backend after the other.
fn rules() -> String {
    let host = |n| Family::V4.address(Network::Hosts, n);
    let servers: Vec<String> = (0..BACKENDS)
        .map(|n| format!("{n} : {} . {PORT}", host(n + 1)))
        .collect();
    format!(
        "table ip balance {{\n\
         chain pre {{\ntype nat hook prerouting priority -100;\n\
         ip daddr {} udp dport {PORT} dnat ip addr . port to numgen inc mod {BACKENDS} map {{ {} }}\n}}\n\
         chain post {{\ntype nat hook postrouting priority 100;\noif eth0 masquerade\n}}\n}}\n",
        Family::V4.address(Network::Vips, 0),
        servers.join(", ")
    )
}

/// Has nft read rules.
fn nft(rules: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("a pipe was asked for")?;
    input.write_all(rules.as_bytes())?;
    drop(input);
    let status = child.wait()?;
    if !status.success() {
        bail!("nft refuses ({status}):\n{rules}");
    }
    Ok(())
}

/// A process that keeps a namespace, and ends with this value.
struct Holder(std::process::Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives this thread a network namespace of its own, which goes when nobody is in it.
fn own_network() -> Result<()> {
    // SAFETY: plain system call; it concerns this thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        bail!("no network namespace: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// Takes this thread into a namespace.
fn join(namespace: &fs::File) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: plain system call; it concerns this thread only.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        bail!(
            "no way into a namespace: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

/// Runs a command to its end.
fn command(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}

/// As `ip` writes it.
fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
