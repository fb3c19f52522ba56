//! From a configuration file to a daemon that serves.

use super::{
    Daemon, Events,
    control::Handle,
    hook::{self, Hook},
    probes::Probes,
    told::Told,
};
use crate::{
    api::server::Server,
    config::Config,
    dataplane::{self, Dataplane},
    health::{self, Checker},
    model::{BackendKey, Inherited, Model, ServiceKey, State, successions},
    neigh::{self, Neighbours},
    reconcile::{Hop, Reconciler, apply},
};
use anyhow::{Context as _, Result, bail, ensure};
use lb_common::{
    abi::Settings,
    addr::{from_ipv4, from_ipv6, to_ip},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED},
    service::{GATEWAY_RESOLVED, Interface},
};
use std::{
    collections::{HashMap, HashSet},
    fs,
    hash::{BuildHasher as _, RandomState},
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// Longest time that the start waits for first checks and next hops. What is not known by then
/// takes no traffic until it is.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Runs the daemon in the foreground until it is told to stop.
///
/// # Errors
///
/// When it cannot start: one line that names the object and the remedy. A data plane that an
/// earlier daemon left runs on as it is.
pub fn run(file: &Path) -> Result<()> {
    let config = Config::load(file)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(serve(file, config))
}

async fn serve(file: &Path, config: Config) -> Result<()> {
    let started = Instant::now();
    let server = Server::bind(&config.daemon.socket, config.daemon.http).await?;
    for name in &config.daemon.interfaces {
        let interface = neigh::interface(name).await?;
        ensure!(
            interface.mac.is_some(),
            "interface {name} is not Ethernet; use another in daemon.interfaces"
        );
        if !interface.up {
            warn!("interface {name} is down; see \"ip link show {name}\"");
        }
    }
    if let Err(error) = health::raise_open_files() {
        warn!("cannot raise the limit of open files: {error}");
    }
    let dataplane = Dataplane::open(&config.daemon, &config.limits, settings(&config)?)?;
    let adopted = dataplane.adopted();
    let pin_path = config.daemon.pin_path.clone();
    let (jobs, job_events) = mpsc::channel(64);
    let result = prepare(file, config, dataplane, started).await;
    let (daemon, mut events) = match result {
        Ok(ready) => ready,
        Err(error) => {
            // A data plane of our own making that never served is nothing to leave behind.
            if !adopted {
                drop(server);
                let _ = dataplane::detach(&pin_path);
            }
            return Err(error);
        }
    };
    events.jobs = job_events;
    let (services, backends) = size(&daemon.config);
    info!(
        "ready: {}, {}, {}; control socket {}",
        counted(services, "service"),
        counted(backends, "backend"),
        if adopted {
            "data plane of an earlier daemon taken over"
        } else {
            "new data plane"
        },
        daemon.config.daemon.socket.display(),
    );
    let (end, ending) = watch::channel(false);
    let control = Arc::new(Handle::new(jobs));
    let api = tokio::spawn(server.serve(control, async move {
        let mut ending = ending;
        let _ = ending.wait_for(|end| *end).await;
    }));
    let result = daemon.serve(events).await;
    end.send_replace(true);
    api.await.context("the API server")??;
    result
}

/// Everything from the maps to the first packet.
async fn prepare(
    file: &Path,
    config: Config,
    dataplane: Dataplane,
    started: Instant,
) -> Result<(Daemon, Events)> {
    let limits = &config.limits;
    let mut reconciler = Reconciler::new(limits.services, limits.backends, limits.slots);
    let held = Arc::new(neigh::local_addresses().await?);
    if dataplane.adopted() {
        // What adoption makes of the filter knows these already.
        reconciler.hold(&held);
        let found = apply::find(&dataplane.maps).context("cannot read the adopted maps")?;
        let repairs = reconciler.adopt(found);
        apply::apply(&dataplane.maps, &repairs)?;
    }
    let mut model = Model::new();
    model.configure(&config.services, Instant::now());
    let (checker, results) = Checker::spawn();
    let (neighbours, ways) = Neighbours::spawn(model.addresses())?;
    let mut local = neighbours.local_addresses();
    let mut daemon = Daemon {
        file: file.to_owned(),
        config,
        dataplane,
        model,
        reconciler,
        checker,
        hook: Hook::spawn(hook::TIMEOUT),
        traffic: super::traffic::Traffic::default(),
        probes: Probes::default(),
        neighbours,
        hops: HashMap::new(),
        resolutions: HashMap::new(),
        local: watch::channel(held).1,
        dirty: HashSet::new(),
        lost_gateways: HashMap::new(),
        retiring: HashMap::new(),
        warned: HashMap::new(),
        limited: Told::default(),
        displaced: Told::default(),
        started,
        reload_error: None,
        ended: false,
    };
    let mut events = Events {
        results,
        ways,
        local: local.clone(),
        jobs: mpsc::channel(1).1,
    };
    inherit(&mut daemon);
    daemon.remember_commands();
    daemon.watch_backends();
    first_look(&mut daemon, &mut events).await;
    // From here on the task's own word counts.
    if local.borrow_and_update().is_empty() {
        let _ = tokio::time::timeout(FIRST_LOOK, local.changed()).await;
    }
    if !local.borrow().is_empty() {
        daemon.local = local;
    }

    let keys: HashSet<ServiceKey> = daemon
        .config
        .services
        .iter()
        .map(ServiceKey::from)
        .collect();
    let removed: Vec<ServiceKey> = daemon
        .reconciler
        .service_ids()
        .filter(|key| !keys.contains(key))
        .collect();
    daemon.touch_all();
    daemon.judge_panics();
    daemon.reconcile_services(|_| true, &removed)?;
    daemon.dirty.clear();
    daemon.warn_of_taken_ports();
    daemon.warn_of_answers_past_us();
    daemon.announce_settings(settings(&daemon.config)?)?;
    daemon.serve_clients()?;
    // Last: the first packet finds everything in place.
    for name in daemon.config.daemon.interfaces.clone() {
        daemon.attach(&name)?;
    }
    Ok((daemon, events))
}

/// Believes the maps of an earlier daemon until checks and neighbours say otherwise, so that a
/// restart takes no backend out.
fn inherit(daemon: &mut Daemon) {
    let now = Instant::now();
    let held: Vec<ServiceKey> = daemon.reconciler.service_ids().collect();
    let configured: Vec<ServiceKey> = daemon.config.services.iter().map(Into::into).collect();
    let continued: HashMap<ServiceKey, ServiceKey> = successions(&held, &configured)
        .into_iter()
        .map(|(new, old)| (old, new))
        .collect();
    for (service, address, record) in daemon.reconciler.records() {
        let resolved = record.flags & BACKEND_RESOLVED != 0;
        if resolved {
            let hop = Hop {
                address: to_ip(record.family, &record.source),
                mtu: match record.mtu {
                    0 => 0,
                    mtu => u32::from(mtu) + daemon.reconciler.overhead(&service, record.family),
                },
                ..way(record.l2, record.ifindex, record.tags)
            };
            daemon.hops.insert(address.ip(), hop);
        }
        let alive = record.flags & BACKEND_ALIVE != 0;
        let service = continued.get(&service).copied().unwrap_or(service);
        let key = BackendKey { service, address };
        daemon
            .model
            .inherit(key, Inherited { alive, resolved }, now);
    }
    let mut backends = daemon.model.addresses();
    backends.extend(daemon.reconciler.records().map(|(_, a, _)| a.ip()));
    for (service, record) in daemon.reconciler.gateways() {
        let service = continued.get(&service).copied().unwrap_or(service);
        let mut services = daemon.config.services.iter();
        let gateway = services
            .find(|config| ServiceKey::from(*config) == service)
            .and_then(|config| config.gateway);
        let Some(gateway) = gateway.filter(|gateway| !backends.contains(gateway)) else {
            continue;
        };
        if record.flags & GATEWAY_RESOLVED != 0 {
            let hop = Hop {
                mtu: record.mtu.into(),
                ..way(record.l2, record.ifindex, record.tags)
            };
            daemon.hops.insert(gateway, hop);
        }
    }
}

/// A next hop as a record in the maps has it. Neither the balancer's address towards it nor its MTU is known.
fn way(l2: [u32; 3], ifindex: u32, tags: u32) -> Hop {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = bytemuck::cast::<_, [u8; 12]>(l2);
    Hop {
        destination: [d0, d1, d2, d3, d4, d5],
        source: [s0, s1, s2, s3, s4, s5],
        ifindex,
        tags,
        address: Ipv4Addr::UNSPECIFIED.into(),
        mtu: 0,
    }
}

/// Waits until every backend is known to be up or down, but not for ever.
async fn first_look(daemon: &mut Daemon, events: &mut Events) {
    let deadline = tokio::time::Instant::now() + FIRST_LOOK;
    let waiting = |daemon: &Daemon| {
        let mut backends = daemon.model.backends();
        backends.any(|(_, backend)| backend.state() == State::Starting)
    };
    while waiting(daemon) {
        tokio::select! {
            Some((key, result)) = events.results.recv() => daemon.checked(key, result),
            Some((address, resolution)) = events.ways.recv() => daemon.resolved(address, resolution),
            () = tokio::time::sleep_until(deadline) => break,
        }
        daemon.take_waiting(events);
    }
}

/// What is common to all packets, as configured.
pub(super) fn settings(config: &Config) -> Result<Settings> {
    let daemon = &config.daemon;
    let ephemeral = neigh::ephemeral_port_range()
        .context("cannot read net.ipv4.ip_local_port_range; set daemon.nat_ports")?;
    let (first, last) = match daemon.nat_ports {
        Some((first, last)) => {
            if first <= ephemeral.1 && last >= ephemeral.0 {
                bail!(
                    "daemon.nat_ports {first}-{last} overlaps the host's own ports {}-{}; choose \
                     others, or change net.ipv4.ip_local_port_range",
                    ephemeral.0,
                    ephemeral.1
                );
            }
            (first, last)
        }
        None => neigh::nat_port_range(ephemeral).with_context(|| {
            format!(
                "the host's own ports {}-{} leave none for nat; narrow \
                 net.ipv4.ip_local_port_range",
                ephemeral.0, ephemeral.1
            )
        })?,
    };
    let (encap4, encap6) = (daemon.encap_source.v4, daemon.encap_source.v6);
    let host4 = |bits: u8| (u32::MAX >> bits).to_be();
    // The hash is one word: at most the last of the address.
    let host6 = |bits: u8| (u32::MAX >> bits.saturating_sub(96)).to_be();
    Ok(Settings {
        encap_source4: encap4.map_or(0, |(address, _)| from_ipv4(address)),
        encap_mask4: encap4.map_or(0, |(_, bits)| host4(bits)),
        encap_source6: encap6.map_or([0; 4], |(address, _)| from_ipv6(address)),
        encap_mask6: encap6.map_or(0, |(_, bits)| host6(bits)),
        gue_port: daemon.gue_port.to_be(),
        nat_port_first: first,
        nat_port_last: last,
        nat_port_seed: RandomState::new().hash_one(std::process::id()) as u32,
        new_flows: config.limits.new_flows_per_cpu,
        ..bytemuck::Zeroable::zeroed()
    })
}

/// Lets the kernel deliver packets for 127.0.0.1 that come in by interface `name`; the data plane
/// drops those that were sent to such an address.
///
/// Its ARP requests would otherwise name 127.0.0.1 as the asker, whom no host answers.
pub(super) fn open_loopback(name: &str) -> Result<()> {
    for (setting, value) in [("route_localnet", "1"), ("arp_announce", "2")] {
        let file = format!("/proc/sys/net/ipv4/conf/{name}/{setting}");
        let is = fs::read_to_string(&file).with_context(|| file.clone())?;
        if is.trim() != value {
            fs::write(&file, value).with_context(|| {
                format!("interface {name}: backends on 127.0.0.1 need {setting}={value}: {file}")
            })?;
            info!("interface {name}: {setting} set to {value} for backends on 127.0.0.1");
        }
    }
    Ok(())
}

/// The interfaces directly below one, such as those of a bond, with their index, as far as /sys shows them.
pub(super) fn interfaces_below(name: &str) -> Vec<(String, u32)> {
    let entries = fs::read_dir(format!("/sys/class/net/{name}")).into_iter();
    entries
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let below = entry
                .file_name()
                .to_str()?
                .strip_prefix("lower_")?
                .to_owned();
            let ifindex = dataplane::interface_index(&below).ok()?;
            Some((below, ifindex))
        })
        .collect()
}

/// What the data plane must know of an interface in the network namespace of this process, which is
/// not always the one that /sys shows; all but its place in map `links`.
pub(super) fn interface(name: &str) -> io::Result<Interface> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero, and ends the name.
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from.cast_signed();
    }
    let mut ask = |what: libc::Ioctl| {
        // SAFETY: the request is of the type that the call reads and writes.
        match unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) } {
            0 => Ok(request.ifr_ifru),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the call that just succeeded wrote this member.
    let mac = unsafe { ask(libc::SIOCGIFHWADDR)?.ifru_hwaddr.sa_data };
    // SAFETY: as above.
    let mtu = unsafe { ask(libc::SIOCGIFMTU)?.ifru_mtu };
    Ok(Interface {
        mac: std::array::from_fn(|i| mac[i].cast_unsigned()),
        // That of the loopback interface is 65536.
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        link: 0,
    })
}

/// `1 service`, `2 services`.
pub(super) fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Services and backends of a configuration.
pub(super) fn size(config: &Config) -> (usize, usize) {
    let backends = config.services.iter().map(|s| s.backends.len()).sum();
    (config.services.len(), backends)
}
