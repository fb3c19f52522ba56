//! The user side: how long changes take, what tables cost and how much of them changes, health checks, memory.

use crate::{
    Choice,
    balancer::{Balancer, LIMITS, Plan},
    frame::Family,
    progress,
    report::Report,
};
use anyhow::{Context as _, Result, bail};
use bytemuck::Zeroable as _;
use lb_common::{
    abi::Settings,
    service::{forward, scheduler},
};
use serde_json::{Value, json};
use sluice::{
    config::{Check, Health, Limits},
    dataplane::Dataplane,
    health::{Checker, Target, raise_open_files},
    reconcile::{Reconciler, apply},
    scheduler::{Member, build},
};
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Services in the balancer that is changed, and backends of each.
const SERVICES: u32 = 1000;
const BACKENDS: u32 = 10;

/// Numbers of changes.
const CHANGES: [usize; 3] = [1, 100, 10_000];
/// Backends of the tables that are built.
const POOLS: [u32; 4] = [10, 100, 1000, 10_000];

/// Health checks: backends, and how often each is checked.
const CHECKED: u32 = 1000;
const INTERVAL: Duration = Duration::from_millis(100);

fn applied(changes: usize) -> String {
    format!("apply {changes} changes of {}", SERVICES * BACKENDS)
}

fn maglev(backends: u32) -> String {
    format!("maglev table of {backends} backends")
}

const FIRST: &str = "apply everything to empty maps";
const RESTART: &str = "read the maps of an earlier daemon";
const HEALTH: &str = "health checks tcp";

/// The limit that is raised.
type Limit = fn(&mut Limits) -> &mut u32;

/// What memory is asked for, with the limit that is raised to find out.
const MEMORY: [(&str, Limit); 4] = [
    ("memory of a flow in both families", |limits| {
        &mut limits.flows
    }),
    ("memory of a service", |limits| &mut limits.services),
    ("memory of a backend", |limits| &mut limits.backends),
    ("memory of a slot", |limits| &mut limits.slots),
];

/// The names of the cases that are wanted.
pub fn names(choice: &Choice) -> Vec<String> {
    let mut names = vec![FIRST.to_owned()];
    names.extend(CHANGES.map(applied));
    names.push(RESTART.to_owned());
    names.extend(POOLS.map(maglev));
    names.push(HEALTH.to_owned());
    names.extend(MEMORY.map(|(name, _)| name.to_owned()));
    names.retain(|name| choice.wants(name));
    names
}

/// Measures the cases that are wanted.
pub fn measure(choice: &Choice) -> Result<Report> {
    let mut report = Report::new();
    let rounds = if choice.quick { 3 } else { 9 };
    let names = names(choice);
    if names
        .iter()
        .any(|name| name.starts_with("apply") || name == RESTART)
    {
        changes(choice, rounds, &mut report)?;
    }
    for backends in POOLS {
        if choice.wants(&maglev(backends)) {
            table(backends, rounds, &mut report)?;
        }
    }
    if choice.wants(HEALTH) {
        progress(HEALTH);
        let seconds = if choice.quick { 1 } else { 4 };
        // In a network of its own: nothing it connects to is anybody else's.
        let result = thread::spawn(move || checks(Duration::from_secs(seconds)));
        let result = result
            .join()
            .map_err(|_| anyhow::anyhow!("{HEALTH}: failed"))?;
        add(&mut report, HEALTH, result.context(HEALTH)?);
    }
    for (name, limit) in MEMORY {
        if choice.wants(name) {
            progress(name);
            memory(name, limit, &mut report)?;
        }
    }
    Ok(report)
}

/// Prints a result and keeps it.
fn add(report: &mut Report, case: &str, mut members: Value) {
    progress("");
    let measured: Vec<String> = members
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| match value.as_f64() {
            Some(number) if value.is_f64() => format!("{name} {number:.3}"),
            _ => format!("{name} {value}"),
        })
        .collect();
    println!("{case:<40} {}", measured.join("  "));
    members["part"] = json!("control-plane");
    report.add(case, members);
}

/// Least and median of times, in milliseconds.
fn times(mut times: Vec<Duration>) -> Value {
    times.sort();
    let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    json!({"min_ms": ms(times.first()), "median_ms": ms(times.get(times.len() / 2))})
}

/// Time that `work` takes.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let value = work()?;
    Ok((value, start.elapsed()))
}

/// Changes of weights: what a drain, a slow start or a death amounts to.
fn changes(choice: &Choice, rounds: usize, report: &mut Report) -> Result<()> {
    progress(FIRST);
    let plan = Plan::new(Family::V4, forward::DSR, scheduler::MAGLEV, BACKENDS);
    let mut balancer = Balancer::load(LIMITS.flows, &[])?;
    let mut services = Balancer::services(&vec![plan; SERVICES as usize]);
    for service in &mut services {
        for backend in &mut service.backends {
            (backend.weight, backend.configured_weight) = (FULL, FULL);
        }
    }
    let ((), time) = timed(|| balancer.apply(&services))?;
    if choice.wants(FIRST) {
        add(report, FIRST, times(vec![time]));
    }
    for changes in CHANGES {
        let name = applied(changes);
        if !choice.wants(&name) {
            continue;
        }
        let mut taken = Vec::new();
        for round in 0..rounds {
            progress(&format!("{name} round {} of {rounds}", round + 1));
            // At most one change of a service, until there are more changes than services.
            let touched = changes.min(services.len());
            for n in 0..changes {
                let backend = &mut services[n % touched].backends[n / touched];
                // Another weight in each round, and for some other weights than for others.
                backend.weight = FULL - 1 - (n / touched + round) as u32 % (FULL - 1);
            }
            taken.push(timed(|| balancer.apply(&services[..touched]))?.1);
        }
        add(report, &name, times(taken));
    }
    if choice.wants(RESTART) {
        let mut taken = Vec::new();
        for round in 0..rounds {
            progress(&format!("{RESTART} round {} of {rounds}", round + 1));
            let mut reconciler = Reconciler::new(LIMITS.services, LIMITS.backends, LIMITS.slots);
            taken.push(
                timed(|| {
                    let found = apply::find(&balancer.dataplane.maps)?;
                    reconciler.adopt(found);
                    Ok(())
                })?
                .1,
            );
        }
        add(report, RESTART, times(taken));
    }
    Ok(())
}

/// The weight of a backend that nothing has been changed of.
const FULL: u32 = 4;

/// A Maglev table, and what becomes of it when one backend goes.
fn table(backends: u32, rounds: usize, report: &mut Report) -> Result<()> {
    let name = maglev(backends);
    progress(&name);
    let pool = |gone: Option<u32>| -> Vec<Member> {
        let members = (0..backends).map(|n| Member {
            identity: SocketAddr::new(Ipv4Addr::from_bits(0xc612_0001 + n).into(), 80),
            backend: n + 1,
            weight: u32::from(gone != Some(n)),
            configured_weight: 1,
        });
        members.collect()
    };
    let mut taken = Vec::new();
    let mut whole = Vec::new();
    for _ in 0..rounds {
        let (table, time) = timed(|| Ok(build(scheduler::MAGLEV, &pool(None), 0)?))?;
        taken.push(time);
        whole = table;
    }
    let gone = backends / 2;
    let without = build(scheduler::MAGLEV, &pool(Some(gone)), 0)?;
    let staying = whole
        .iter()
        .zip(&without)
        .filter(|(old, _)| **old != gone + 1);
    let moved = staying.clone().filter(|(old, new)| old != new).count();
    let mut shares = vec![0_u32; backends as usize + 1];
    whole
        .iter()
        .for_each(|backend| shares[*backend as usize] += 1);
    let mut result = times(taken);
    result["slots"] = json!(whole.len());
    result["moved_percent_when_one_goes"] = json!(moved as f64 / staying.count() as f64 * 100.0);
    let [least, most] = [shares[1..].iter().min(), shares[1..].iter().max()];
    result["largest_share_over_smallest"] = json!(
        most.map_or(0.0, |most| f64::from(*most)) / least.map_or(1.0, |least| f64::from(*least))
    );
    add(report, &name, result);
    Ok(())
}

/// TCP checks of many backends, all on this thread.
fn checks(time: Duration) -> Result<Value> {
    // SAFETY: plain system call; it concerns this thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        bail!("no network namespace: {}", std::io::Error::last_os_error());
    }
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    if !up.success() {
        bail!("`ip link set lo up` failed ({up})");
    }
    raise_open_files()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80))?;
    // Of this network namespace.
    fs::write("/proc/sys/net/core/somaxconn", "8192")?;
    // SAFETY: plain system call on a socket that listens; it only lengthens its queue.
    unsafe { libc::listen(listener.as_raw_fd(), 8192) };
    // Until the process ends: it sleeps when nobody comes.
    thread::spawn(move || listener.incoming().for_each(drop));
    let health = Arc::new(Health {
        check: Check::Tcp,
        interval: INTERVAL,
        fast_interval: INTERVAL,
        down_interval: INTERVAL,
        timeout: INTERVAL,
        ..Health::default()
    });
    let targets: Vec<Target<u32>> = (0..CHECKED)
        .map(|id| Target {
            id,
            address: SocketAddr::new(Ipv4Addr::from_bits(0x7f00_0001 + id).into(), 80),
            via: None,
            health: health.clone(),
            environment: Vec::new(),
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (checks, good, cpu, wall) = runtime.block_on(async {
        let (mut checker, mut results) = Checker::spawn();
        checker.set(targets);
        // The first ones begin one after the other; then there is a rhythm.
        tokio::time::sleep(Duration::from_secs(1)).await;
        while results.try_recv().is_ok() {}
        let (start, before) = (Instant::now(), thread_time());
        let (mut checks, mut good) = (0_u64, 0_u64);
        while let Ok(Some((_, result))) =
            tokio::time::timeout(time.saturating_sub(start.elapsed()), results.recv()).await
        {
            checks += 1;
            good += u64::from(result.is_ok());
        }
        (checks, good, thread_time() - before, start.elapsed())
    });
    Ok(json!({
        "backends": CHECKED,
        "checks": checks,
        "successful": good,
        "checks_per_second": checks as f64 / wall.as_secs_f64(),
        "checks_per_second_and_core": checks as f64 / cpu.as_secs_f64(),
    }))
}

/// Time that this thread has spent on a CPU.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the record it is given; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// How much more memory the maps take when a limit is raised, for each that it is raised by.
fn memory(name: &str, limit: Limit, report: &mut Report) -> Result<()> {
    // Hash tables have buckets for a power of two.
    let mut small = LIMITS;
    let value = *limit(&mut small);
    let mut large = small;
    *limit(&mut large) = value * 2;
    let [small, large] = [small, large].map(|limits| -> Result<u64> {
        let dataplane = Dataplane::load_unpinned(&limits, Settings::zeroed())?;
        let bytes = locked()?;
        drop(dataplane);
        Ok(bytes)
    });
    let bytes = (large? - small?) as f64 / f64::from(value);
    add(report, name, json!({"bytes": bytes}));
    Ok(())
}

/// Bytes of all maps that this process holds, as the kernel accounts for them.
fn locked() -> Result<u64> {
    let mut maps = std::collections::BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")?.flatten() {
        // The descriptor of this listing is gone by now.
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let value = |name: &str| -> Option<u64> {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse().ok()
        };
        if let (Some(id), Some(bytes)) = (value("map_id:"), value("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.into_values().sum())
}
