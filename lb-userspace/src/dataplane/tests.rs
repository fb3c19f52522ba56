//! The data plane in a real kernel: as root, below `/sys/fs/bpf`, each test with pins and a
//! network namespace of its own.

use super::*;
use crate::config::{AttachMode, Daemon, Limits};
use bytemuck::Zeroable;
use lb_common::{
    abi::{ABI_VERSION, MAGIC, Settings},
    backend::{BACKEND_ALIVE, BACKEND_RESOLVED, Backend, Load, Slot},
    flow::{Flow, FlowKey, THROUGH_GATEWAY, state},
    service::{GATEWAY_RESOLVED, Gateway, LINKS, Service, ServiceKey, Vip},
    stats::Counters,
};
use std::{
    fs,
    mem::offset_of,
    net::SocketAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

const LIMITS: Limits = Limits {
    flows: 1024,
    services: 16,
    listeners: 64,
    backends: 32,
    slots: 4096,
    fragments: 512,
    clients: 512,
    prefixes: 512,
    opening: 512,
    new_flows_per_cpu: 0,
};

fn root() -> bool {
    // SAFETY: a plain system call.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("skipped: only root may load BPF programs");
    }
    root
}

/// A pin directory that is taken away in the end, whatever is in it.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("/sys/fs/bpf/slc-{}-{number}", std::process::id());
        Self(PathBuf::from(name))
    }

    fn daemon(&self, interfaces: &[&str]) -> Daemon {
        Daemon {
            on_state_change: Vec::new(),
            interfaces: interfaces.iter().map(|i| (*i).to_owned()).collect(),
            mode: AttachMode::Auto,
            pin_path: self.0.clone(),
            socket: PathBuf::new(),
            http: None::<SocketAddr>,
            answer_arp: true,
            nat_ports: None,
            nat_sources: Vec::new(),
            encap_source: crate::config::EncapSource::default(),
            gue_port: 6080,
            local_clients: None,
            cgroup: None,
            probe_mark: 0x51c0_0000,
        }
    }

    fn open(&self, limits: &Limits) -> anyhow::Result<Dataplane> {
        Dataplane::open(&self.daemon(&[]), limits, settings())
    }

    fn open_on(&self, interfaces: &[&str]) -> Dataplane {
        Dataplane::open(&self.daemon(interfaces), &LIMITS, settings()).unwrap()
    }

    fn refused(&self, limits: &Limits) -> String {
        format!("{:#}", self.open(limits).expect_err("should be refused"))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Ok(entries) = fs::read_dir(&self.0) {
            for entry in entries.flatten() {
                let _ = fs::remove_file(entry.path());
            }
            let _ = fs::remove_dir(&self.0);
        }
    }
}

fn settings() -> Settings {
    Settings {
        nat_port_first: 1024,
        nat_port_last: 2047,
        nat_port_seed: 7,
        ..Settings::zeroed()
    }
}

/// Runs `test` in a network namespace of its own, which ends with it.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !root() {
        return;
    }
    let run = move || {
        // SAFETY: a plain system call; it concerns this thread only.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        test();
    };
    thread::spawn(run).join().unwrap();
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

fn veth(name: &str) {
    ip(&format!("link add {name} type veth peer name {name}-p"));
    ip(&format!("link set {name} up"));
    ip(&format!("link set {name}-p up"));
}

fn program_on(name: &str) -> XdpState {
    xdp_state(interface_index(name).unwrap()).unwrap()
}

#[test]
fn what_is_pinned_is_taken_over() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    let first = pins.open(&LIMITS).unwrap();
    assert!(!first.adopted());
    let backend = Backend {
        port: 80,
        flags: BACKEND_ALIVE,
        ..Backend::zeroed()
    };
    first.maps.backends.store(3, backend);
    first.maps.vips4.insert(&1, &Vip { flags: 1 }).unwrap();
    let program = first.programs().unwrap()[0].id;
    drop(first);

    let other = Settings {
        nat_port_first: 5000,
        nat_port_last: 6000,
        nat_port_seed: 8,
        ..settings()
    };
    let second = Dataplane::open(&pins.daemon(&[]), &LIMITS, other).unwrap();
    assert!(second.adopted());
    assert_eq!(second.maps.backends.read(3), backend);
    assert_eq!(second.maps.vips4.get(&1).unwrap(), Some(Vip { flags: 1 }));
    let info = &second.programs().unwrap()[0];
    assert_ne!(info.id, program, "the program is a new one");
    assert_eq!(info.name, "sluice_xdp");
    let settings = second.maps.settings.read(0);
    assert_eq!((settings.magic, settings.abi_version), (MAGIC, ABI_VERSION));
    assert_eq!(
        (settings.nat_port_first, settings.nat_port_last),
        (5000, 6000)
    );
    assert_eq!(settings.nat_port_seed, 7, "flows depend on the seed");
    let pinned = bpf::open_pin(&pins.0.join("prog_sluice_xdp")).unwrap();
    assert_eq!(bpf::program_info(pinned.as_fd()).unwrap().id, info.id);
}

#[test]
fn two_daemons_do_not_share_pins() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    let first = pins.open(&LIMITS).unwrap();
    let refused = pins.refused(&LIMITS);
    let expected = format!("another daemon (process {})", std::process::id());
    assert!(refused.contains(&expected), "{refused}");
    let refused = format!("{:#}", detach(&pins.0).unwrap_err());
    assert!(refused.contains("sluice stop"), "{refused}");
    assert!(pins.0.join("settings").exists(), "nothing was removed");
    drop(first);
    pins.open(&LIMITS).unwrap();
}

#[test]
fn detach_leaves_nothing_and_may_be_repeated() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    drop(pins.open(&LIMITS).unwrap());
    let removed = detach(&pins.0).unwrap();
    assert!(removed.contains(&"map flows4".to_owned()), "{removed:?}");
    assert_eq!(removed.len(), NAMES.len() + 1);
    assert!(!pins.0.exists());
    assert!(detach(&pins.0).unwrap().is_empty());
    assert!(!pins.open(&LIMITS).unwrap().adopted());
}

#[test]
fn another_abi_is_refused_and_left_alone() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    let first = pins.open(&LIMITS).unwrap();
    let old = Settings {
        abi_version: ABI_VERSION + 1,
        ..first.maps.settings.read(0)
    };
    first.maps.settings.store(0, old);
    drop(first);
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("ABI version"), "{refused}");
    assert!(refused.contains("sluice detach"), "{refused}");
    assert!(list(&pins.0).is_err(), "not read either");
    assert_eq!(Maps::open(&pins.0).unwrap().settings.read(0), old);

    let unmarked = Settings { magic: 1, ..old };
    Maps::open(&pins.0).unwrap().settings.store(0, unmarked);
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("not Sluice's"), "{refused}");
}

#[test]
fn maps_of_another_shape_are_refused() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    drop(pins.open(&LIMITS).unwrap());
    let path = |name: &str| pins.0.join(name);
    let swap = |name: &str, with: &Path| {
        let stranger = bpf::open_pin(with).unwrap();
        fs::rename(path(name), path("link_kept")).unwrap();
        bpf::pin(stranger.as_fd(), &path(name)).unwrap();
    };
    let restore = |name: &str| fs::rename(path("link_kept"), path(name)).unwrap();

    swap("vips4", &path("vips6"));
    let refused = pins.refused(&LIMITS);
    assert!(
        refused.contains("vips4: key size is 16, not 4"),
        "{refused}"
    );
    restore("vips4");

    swap("flows4", &path("prog_sluice_xdp"));
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("a bpf-prog where a map"), "{refused}");
    restore("flows4");

    swap("settings", &path("flows4"));
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("settings: not Sluice's"), "{refused}");
    restore("settings");

    fs::rename(path("drops"), path("something")).unwrap();
    let refused = pins.refused(&LIMITS);
    assert!(
        refused.contains("\"something\" in it is not Sluice's"),
        "{refused}"
    );
    let refused = format!("{:#}", detach(&pins.0).unwrap_err());
    assert!(refused.contains("\"something\""), "{refused}");
    fs::remove_file(path("something")).unwrap();
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("map \"drops\" is missing"), "{refused}");
}

#[test]
fn running_maps_keep_their_size() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    drop(pins.open(&LIMITS).unwrap());
    for (limits, expected) in [
        (
            Limits {
                flows: 2048,
                ..LIMITS
            },
            "limits.flows is 2048 but the running map flows4 was made for 1024",
        ),
        (
            Limits {
                services: 17,
                ..LIMITS
            },
            "limits.services is 17 but the running map vips4 was made for 16",
        ),
        (
            Limits {
                listeners: 65,
                ..LIMITS
            },
            "limits.listeners is 65 but the running map services4 was made for 64",
        ),
        (
            Limits {
                backends: 31,
                ..LIMITS
            },
            "limits.backends is 31 but the running map backends was made for 32",
        ),
        (
            Limits {
                slots: 8192,
                ..LIMITS
            },
            "limits.slots is 8192 but the running map slots was made for 4096",
        ),
    ] {
        let refused = pins.refused(&limits);
        assert!(refused.starts_with(expected), "{refused}");
    }
    assert!(pins.open(&LIMITS).unwrap().adopted());
}

#[test]
fn a_half_made_set_is_made_anew() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    drop(pins.open(&LIMITS).unwrap());
    // As after a crash before the last map was pinned.
    fs::remove_file(pins.0.join("settings")).unwrap();
    fs::remove_file(pins.0.join("flows6")).unwrap();
    let again = pins.open(&LIMITS).unwrap();
    assert!(!again.adopted());
    drop(again);
    assert!(pins.open(&LIMITS).unwrap().adopted());

    // Somebody else's map under one of our names is not removed.
    fs::remove_file(pins.0.join("settings")).unwrap();
    fs::rename(pins.0.join("vips6"), pins.0.join("vips4")).unwrap();
    let refused = pins.refused(&LIMITS);
    assert!(refused.contains("vips4: key size is 16"), "{refused}");
    assert!(pins.0.join("vips4").exists());
}

#[test]
fn a_path_that_cannot_hold_pins_is_refused() {
    if !root() {
        return;
    }
    for (path, expected) in [
        ("/proc/self/pins", "not on a BPF file system"),
        ("/sys/fs/bpf/slc.dot", "no dots in names"),
    ] {
        let pins = Pins(PathBuf::from(path));
        let refused = pins.refused(&LIMITS);
        assert!(refused.contains(expected), "{refused}");
    }
}

#[test]
fn a_table_the_kernel_cannot_make_names_its_limit() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    let refused = pins.refused(&Limits {
        flows: u32::MAX,
        ..LIMITS
    });
    assert!(refused.contains("map flows"), "{refused}");
    assert!(refused.contains("lower limits.flows"), "{refused}");
}

#[test]
fn stores_are_seen_by_the_kernel() {
    if !root() {
        return;
    }
    let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
    let maps = &dataplane.maps;
    let seen = |index: u32| {
        let mut value = Service::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut value);
        assert!(bpf::lookup(maps.services.as_fd(), &index.to_ne_bytes(), bytes).unwrap());
        value
    };
    let service = Service {
        connect_timeout: 9,
        scheduler: 1,
        ..Service::zeroed()
    };
    maps.services.store(LIMITS.services, service);
    assert_eq!(seen(LIMITS.services), service);
    assert_eq!(seen(LIMITS.services - 1), Service::zeroed());
    let table = Service::pack_table(5, 6);
    let word = maps
        .services
        .atomic_u64(LIMITS.services, offset_of!(Service, table));
    word.store(table, Ordering::Release);
    assert_eq!(seen(LIMITS.services), Service { table, ..service });

    let slots: Vec<Slot> = (0..4096)
        .map(|n| Slot {
            backend: n,
            previous: n + 1,
        })
        .collect();
    maps.slots.write_slice(0, &slots);
    let mut value = Slot::zeroed();
    let bytes = bytemuck::bytes_of_mut(&mut value);
    assert!(bpf::lookup(maps.slots.as_fd(), &4095u32.to_ne_bytes(), bytes).unwrap());
    assert_eq!(value, slots[4095]);
    assert_eq!(maps.slots.read(77), slots[77]);
}

#[test]
fn counters_are_summed_over_all_cpus() {
    if !root() {
        return;
    }
    let limits = Limits {
        backends: 40_000, // more than one batch
        ..LIMITS
    };
    let dataplane = Dataplane::load_unpinned(&limits, settings()).unwrap();
    let stats = &dataplane.maps.backend_stats;
    let cpus = possible_cpus().unwrap() as u64;
    let copies: Vec<Counters> = (1..=cpus)
        .map(|n| Counters {
            packets_in: n,
            drops: 1,
            ..Counters::default()
        })
        .collect();
    for index in [0u32, 39_999, 40_000] {
        let bytes = bytemuck::cast_slice(&copies);
        bpf::update(stats.as_fd(), &index.to_ne_bytes(), bytes, 0).unwrap();
    }
    let expected = Counters {
        packets_in: cpus * (cpus + 1) / 2,
        drops: cpus,
        ..Counters::default()
    };
    assert_eq!(stats.sum(39_999).unwrap(), expected);
    assert!(stats.sum(40_001).is_err());
    let sums = stats.sums().unwrap();
    assert_eq!(sums.len(), 40_001);
    for (index, sum) in sums.iter().enumerate() {
        let set = [0, 39_999, 40_000].contains(&index);
        let expected = if set { expected } else { Counters::default() };
        assert_eq!(*sum, expected, "element {index}");
    }
    stats.reset(39_999).unwrap();
    assert_eq!(stats.sum(39_999).unwrap(), Counters::default());
    assert_eq!(stats.sum(40_000).unwrap(), expected);
}

#[test]
fn batches_show_every_entry_once() {
    if !root() {
        return;
    }
    const ENTRIES: u32 = 100_000;
    let limits = Limits {
        services: ENTRIES,
        ..LIMITS
    };
    let dataplane = Dataplane::load_unpinned(&limits, settings()).unwrap();
    let vips = &dataplane.maps.vips4;
    assert!(vips.is_empty().unwrap());
    for address in 0..ENTRIES {
        vips.insert(&address, &Vip { flags: !address }).unwrap();
    }
    let mut seen = vec![false; ENTRIES as usize];
    vips.iter_batches(|address, vip| {
        assert_eq!(vip.flags, !address);
        assert!(
            !std::mem::replace(&mut seen[*address as usize], true),
            "{address} twice"
        );
    })
    .unwrap();
    assert!(seen.iter().all(|seen| *seen));
    assert_eq!(vips.len().unwrap(), u64::from(ENTRIES));
    assert!(!vips.is_empty().unwrap());

    // Taking entries out while they are shown misses none.
    let mut taken = 0;
    vips.iter_batches(|address, _| {
        taken += u32::from(vips.take(address).unwrap().is_some());
    })
    .unwrap();
    assert_eq!(taken, ENTRIES);
    assert_eq!(vips.len().unwrap(), 0);
}

#[test]
fn single_entries() {
    if !root() {
        return;
    }
    let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
    let flows = &dataplane.maps.opening6;
    let key = FlowKey {
        src: [1; 4],
        dst: [2; 4],
        sport: 3,
        dport: 4,
        protocol: 6,
    };
    let flow = Flow {
        backend: 5,
        ..Flow::zeroed()
    };
    assert_eq!(flows.get(&key).unwrap(), None);
    assert_eq!(flows.take(&key).unwrap(), None);
    assert!(!flows.remove(&key).unwrap());
    assert!(flows.insert_new(&key, &flow).unwrap());
    assert!(!flows.insert_new(&key, &Flow::zeroed()).unwrap());
    assert_eq!(flows.get(&key).unwrap(), Some(flow));
    assert_eq!(flows.take(&key).unwrap(), Some(flow));
    assert_eq!(flows.get(&key).unwrap(), None);
}

#[test]
fn flows_are_found_shown_and_removed() {
    if !root() {
        return;
    }
    let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
    let table = <[u32; 4]>::flow_table(&dataplane.maps).unwrap();
    let key = |client: u32| FlowKey {
        src: [1, 2, 3, client],
        dst: [4; 4],
        sport: 5,
        dport: 6,
        protocol: 6,
    };
    let flow = |client| Flow {
        src: [client; 4],
        backend: client,
        ..Flow::zeroed()
    };
    let clients: Vec<u32> = (0..200).collect();
    let view = table.view();
    for &client in &clients {
        assert_eq!(view.get(&key(client)).unwrap(), None);
        assert!(view.add(&key(client), &flow(client)).unwrap());
        assert_eq!(view.get(&key(client)).unwrap(), Some(flow(client)));
    }
    let shown = |sweep: bool| {
        let mut shown = Vec::new();
        let mut note = |found: &FlowKey<[u32; 4]>, value: &Flow<[u32; 4]>| {
            assert_eq!(*found, key(value.backend));
            assert_eq!(*value, flow(value.backend));
            shown.push(value.backend);
        };
        if sweep {
            table.sweep(note).unwrap();
        } else {
            table.each(|_, key, value| note(key, value)).unwrap();
        }
        shown.sort_unstable();
        shown
    };
    assert_eq!(shown(true), clients);
    assert_eq!(shown(false), clients, "a sweep changes nothing");
    for &client in &clients {
        assert_eq!(view.remove(&key(client)).unwrap(), Some(flow(client)));
        assert_eq!(view.remove(&key(client)).unwrap(), None);
    }
    assert!(shown(true).is_empty());
    let tags = &dataplane.maps.flow_sets6;
    assert!((0..tags.len()).all(|set| tags.read(set) == 0));
    // Somebody was killed before it had filled an entry.
    tags.store(3, 5 << 16);
    assert!(shown(true).is_empty());
    assert_eq!(tags.read(3), 5 << 16, "it may still be filled");
    assert!(shown(true).is_empty());
    assert_eq!(tags.read(3), 0);
    assert_eq!(table.len(), 0);
}

#[test]
fn device_maps_have_no_batches_and_are_shown_all_the_same() {
    in_namespace(|| {
        let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
        let redirects = &dataplane.maps.redirects;
        for name in ["slc1", "slc2"] {
            veth(name);
            let ifindex = interface_index(name).unwrap();
            let redirect = Redirect {
                ifindex,
                program: 0,
            };
            redirects.insert(&ifindex, &redirect).unwrap();
        }
        let mut names = Vec::new();
        redirects
            .iter_batches(|index, to| {
                assert_eq!(*index, to.ifindex);
                names.push(interface_name(*index).unwrap());
            })
            .unwrap();
        names.sort();
        assert_eq!(names, ["slc1", "slc2"]);
        assert_eq!(redirects.len().unwrap(), 2);
    });
}

#[test]
fn attachments_outlive_the_daemon_and_are_replaced_in_place() {
    in_namespace(|| {
        let pins = Pins::new();
        for name in ["slc1", "slc.2", "slc3"] {
            veth(name); // one with a dot, as VLANs have
        }
        let mut first = pins.open_on(&["slc1", "slc.2", "slc3"]);
        for name in ["slc1", "slc.2", "slc3"] {
            let attached = first.attach(name, AttachMode::Driver).unwrap();
            assert_eq!((attached.mode, attached.fallback), (Mode::Driver, None));
        }
        let old = first.programs().unwrap()[0].id;
        drop(first);
        assert_eq!(program_on("slc1").driver, Some(old), "the daemon has died");

        // Meanwhile an interface is renamed, and another one left out of the configuration.
        ip("link set slc1 down");
        ip("link set slc1 name slc9");
        ip("link set slc9 up");
        let mut second = pins.open_on(&["slc9", "slc.2"]);
        let new = second.programs().unwrap()[0].id;
        assert_ne!(old, new);
        assert_eq!(program_on("slc9").driver, Some(new));
        assert_eq!(program_on("slc.2").driver, Some(new));
        assert_eq!(program_on("slc3"), XdpState::default());
        assert!(pins.0.join("link_slc9").exists() && pins.0.join("link_slc:2").exists());
        assert!(!pins.0.join("link_slc1").exists() && !pins.0.join("link_slc3").exists());
        let attached = second.attach("slc9", AttachMode::Auto).unwrap();
        assert_eq!(attached.mode, Mode::Driver);
        assert_eq!(second.interfaces().unwrap().len(), 2);

        assert!(second.detach("slc.2").unwrap());
        assert!(!second.detach("slc.2").unwrap());
        assert_eq!(program_on("slc.2"), XdpState::default());
        drop(second);
        let removed = detach(&pins.0).unwrap();
        assert!(removed.contains(&"link on slc9".to_owned()), "{removed:?}");
        assert_eq!(program_on("slc9"), XdpState::default());
        assert!(!pins.0.exists());
    });
}

#[test]
fn the_mode_can_be_changed() {
    in_namespace(|| {
        let pins = Pins::new();
        veth("slc1");
        let mut dataplane = pins.open_on(&["slc1"]);
        let program = Some(dataplane.programs().unwrap()[0].id);
        let attached = dataplane.attach("slc1", AttachMode::Generic).unwrap();
        assert_eq!(attached.mode, Mode::Generic);
        assert_eq!(program_on("slc1").generic, program);
        let attached = dataplane.attach("slc1", AttachMode::Auto).unwrap();
        assert_eq!(attached.mode, Mode::Generic, "auto leaves what works");
        let attached = dataplane.attach("slc1", AttachMode::Driver).unwrap();
        assert_eq!(attached.mode, Mode::Driver);
        assert_eq!(program_on("slc1").driver, program);
        assert_eq!(program_on("slc1").generic, None);
        assert_eq!(dataplane.interfaces().unwrap()[0].mode, Mode::Driver);
    });
}

#[test]
fn a_driver_without_xdp_gets_generic_mode() {
    in_namespace(|| {
        let pins = Pins::new();
        ip("link set lo up");
        let mut dataplane = pins.open_on(&["lo"]);
        let attached = dataplane.attach("lo", AttachMode::Auto).unwrap();
        assert_eq!(attached.mode, Mode::Generic);
        assert_eq!(attached.fallback.as_deref(), Some("its driver has no XDP"));
        let refused = dataplane.attach("lo", AttachMode::Driver).unwrap_err();
        assert!(
            format!("{refused:#}").contains("its driver has no XDP"),
            "{refused:#}"
        );
        let program = Some(dataplane.programs().unwrap()[0].id);
        assert_eq!(program_on("lo").generic, program, "what worked stays");
        assert!(pins.0.join("link_lo").exists());
    });
}

#[test]
fn an_interface_that_went_and_came_back() {
    in_namespace(|| {
        let pins = Pins::new();
        veth("slc1");
        let mut first = pins.open_on(&["slc1"]);
        first.attach("slc1", AttachMode::Auto).unwrap();
        ip("link del slc1");
        assert!(first.interfaces().unwrap().is_empty());
        let refused = format!("{:#}", first.attach("slc1", AttachMode::Auto).unwrap_err());
        assert!(refused.contains("slc1: no such interface"), "{refused}");
        veth("slc1");
        first.attach("slc1", AttachMode::Auto).unwrap();
        let program = first.programs().unwrap()[0].id;
        assert_eq!(program_on("slc1").generic, Some(program));
        ip("link del slc1");
        drop(first);

        veth("slc1");
        let mut second = pins.open_on(&["slc1"]);
        assert!(second.adopted());
        second.attach("slc1", AttachMode::Auto).unwrap();
        let program = second.programs().unwrap()[0].id;
        assert_eq!(program_on("slc1").generic, Some(program));
    });
}

#[test]
fn auto_does_not_send_into_a_veth_that_takes_nothing() {
    in_namespace(|| {
        let pins = Pins::new();
        veth("slc1");
        let mut dataplane = pins.open_on(&["slc1"]);
        let attached = dataplane.attach("slc1", AttachMode::Auto).unwrap();
        let why = attached.fallback.unwrap();
        assert_eq!(attached.mode, Mode::Generic);
        assert!(why.starts_with("it is a veth, and the other end"), "{why}");
        dataplane.detach("slc1").unwrap();

        let stub = attach_stub("slc1-p").unwrap();
        let attached = dataplane.attach("slc1", AttachMode::Auto).unwrap();
        assert_eq!((attached.mode, attached.fallback), (Mode::Driver, None));
        dataplane.detach("slc1").unwrap();
        drop(stub);

        // The other end is elsewhere, as a container's host end is.
        let (tell, hear) = std::sync::mpsc::channel();
        let (moved, go_on) = std::sync::mpsc::channel();
        let (done, end) = std::sync::mpsc::channel();
        let elsewhere = thread::spawn(move || {
            // SAFETY: a plain system call; it concerns this thread only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            // SAFETY: always succeeds.
            tell.send(unsafe { libc::gettid() }).unwrap();
            for _ in 0..2 {
                let _: () = go_on.recv().unwrap();
            }
            ip("link set slc1-p up");
            let stub = attach_stub("slc1-p").unwrap();
            done.send(()).unwrap();
            let _ = go_on.recv();
            drop(stub);
        });
        let place = format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            hear.recv().unwrap()
        );
        ip(&format!("link set slc1-p netns {place}"));
        moved.send(()).unwrap();
        let attached = dataplane.attach("slc1", AttachMode::Auto).unwrap();
        assert_eq!(attached.mode, Mode::Generic);
        dataplane.detach("slc1").unwrap();
        moved.send(()).unwrap();
        end.recv().unwrap();
        let attached = dataplane.attach("slc1", AttachMode::Auto).unwrap();
        assert_eq!(attached.mode, Mode::Driver);
        drop(moved);
        elsewhere.join().unwrap();
    });
}

#[test]
fn an_interface_that_is_taken_names_its_holder() {
    in_namespace(|| {
        let pins = Pins::new();
        veth("slc1");
        let stub = attach_stub("slc1").unwrap();
        let holder = program_on("slc1").driver.unwrap();
        let mut dataplane = pins.open_on(&["slc1"]);
        for mode in [AttachMode::Auto, AttachMode::Driver, AttachMode::Generic] {
            let refused = format!("{:#}", dataplane.attach("slc1", mode).unwrap_err());
            let expected = format!("interface slc1: XDP program {holder} (stub_pass) is attached");
            assert!(refused.starts_with(&expected), "{refused}");
            assert!(refused.contains("bpftool link detach id "), "{refused}");
        }
        assert!(!pins.0.join("link_slc1").exists());
        drop(stub);
        dataplane.attach("slc1", AttachMode::Auto).unwrap();
    });
}

#[test]
fn pins_of_another_namespace_are_not_used() {
    in_namespace(|| {
        let pins = Pins::new();
        veth("slc1");
        let mut first = pins.open_on(&["slc1"]);
        first.attach("slc1", AttachMode::Driver).unwrap();
        let program = first.programs().unwrap()[0].id;
        drop(first);
        let daemon = pins.daemon(&["slc1"]);
        let refused = thread::spawn(move || {
            // SAFETY: a plain system call; it concerns this thread only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            veth("slc1"); // the same name and, in a new namespace, the same index
            let error = Dataplane::open(&daemon, &LIMITS, settings()).unwrap_err();
            format!("{error:#}")
        });
        let refused = refused.join().unwrap();
        assert!(refused.contains("another network namespace"), "{refused}");
        assert_eq!(program_on("slc1").driver, Some(program), "left alone");
    });
}

#[test]
fn maps_are_dumped_by_field() {
    if !root() {
        return;
    }
    let pins = Pins::new();
    let dataplane = pins.open(&LIMITS).unwrap();
    let maps = &dataplane.maps;
    maps.backends.store(
        1,
        Backend {
            addr: [u32::from_ne_bytes([10, 0, 0, 11]), 0, 0, 0],
            port: 3001u16.to_be(),
            family: 2,
            flags: BACKEND_RESOLVED,
            ..Backend::zeroed()
        },
    );
    maps.backend_load.store(
        1,
        Load {
            opened: 4,
            ..Load::zeroed()
        },
    );
    let key = FlowKey {
        src: u32::from_ne_bytes([203, 0, 113, 7]),
        dst: u32::from_ne_bytes([198, 51, 100, 10]),
        sport: 40_000u16.to_be(),
        dport: 80u16.to_be(),
        protocol: 6,
    };
    let flow = Flow {
        state: state::ESTABLISHED,
        backend: 1,
        ..Flow::zeroed()
    };
    assert!(
        <u32>::flow_table(maps)
            .unwrap()
            .view()
            .add(&key, &flow)
            .unwrap()
    );
    let gateway = Gateway {
        vip: [key.dst, 0, 0, 0],
        port: key.dport,
        flags: GATEWAY_RESOLVED,
        ..Gateway::zeroed()
    };
    maps.gateways.store(2, gateway);
    let origin = ServiceKey::origin(u32::from_ne_bytes([10, 0, 0, 11]), 3001u16.to_be(), 6);
    maps.services4.insert(&origin, 1).unwrap();

    let dumped = |name: &str| {
        let mut values = Vec::new();
        dump(&pins.0, name, &mut |value| {
            values.push(value);
            Ok(())
        })
        .unwrap();
        values
    };
    let backends = dumped("backends");
    assert_eq!(backends.len(), 1);
    assert_eq!(backends[0]["backend"], 1);
    assert_eq!(backends[0]["address"], "10.0.0.11");
    assert_eq!(backends[0]["port"], 3001);
    assert_eq!(backends[0]["resolved"], true);
    let flows = dumped("flows4");
    assert_eq!(flows.len(), 1);
    assert_eq!(flows[0]["source"], "203.0.113.7");
    assert_eq!(flows[0]["destination_port"], 80);
    assert_eq!(flows[0]["protocol"], "tcp");
    assert_eq!(flows[0]["state"], "ESTABLISHED");
    assert_eq!(dumped("backend_load")[0]["opened"], 4);
    let gateways = dumped("gateways");
    assert_eq!(gateways[0]["service"], 2);
    assert_eq!(gateways[0]["vip"], "198.51.100.10");
    assert_eq!(gateways[0]["port"], 80);
    assert_eq!(gateways[0]["resolved"], true);
    let origin = &dumped("services4")[0];
    assert_eq!(origin["address"], "10.0.0.11");
    assert_eq!(origin["protocol"], "tcp");
    assert_eq!(origin["backend"], 1);
    assert!(origin.get("service").is_none(), "{origin}");
    for name in NAMES {
        dumped(name);
    }
    let maps = list(&pins.0).unwrap();
    let entries = |name: &str| {
        let map = maps.iter().find(|map| map.name == name).unwrap();
        (map.entries, map.max_entries)
    };
    assert_eq!(entries("flows4"), (1, 1024));
    assert_eq!(entries("backends"), (1, 33));
    assert_eq!(entries("slots"), (0, 4096));

    let refused = format!("{:#}", dump(&pins.0, "flow", &mut |_| Ok(())).unwrap_err());
    assert!(
        refused.contains("no map \"flow\"; there are settings"),
        "{refused}"
    );
    let refused = format!("{:#}", list(Path::new("/sys/fs/bpf/slc-none")).unwrap_err());
    assert!(refused.contains("no data plane in"), "{refused}");
}

#[test]
fn packets_run_through_the_program_without_an_interface() {
    if !root() {
        return;
    }
    let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
    // An Ethernet frame of no protocol the balancer knows.
    let mut frame = [0u8; 64];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let run = dataplane.test_run(&frame, 0, 1).unwrap();
    assert_eq!(run.verdict, 2, "XDP_PASS");
    assert_eq!(run.data, frame);
    let run = dataplane.test_run(&frame, 1, 1).unwrap();
    assert_eq!(
        run.verdict, 2,
        "XDP_PASS, come in on the loopback interface"
    );
}

#[test]
fn an_interface_keeps_its_place_among_the_links() {
    const FIRST_GONE: u32 = 0x7000_0000;
    if !root() {
        return;
    }
    let dataplane = Dataplane::load_unpinned(&LIMITS, settings()).unwrap();
    let loopback = interface_index("lo").unwrap();
    let (mac, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let place = dataplane.link(loopback, mac).unwrap();
    assert_ne!(place, u32::from(THROUGH_GATEWAY));
    // None of these is there.
    for n in 0..LINKS - 2 {
        assert_ne!(dataplane.link(FIRST_GONE + n, mac).unwrap(), place);
    }
    assert_eq!(dataplane.link(loopback, other).unwrap(), place);
    let link = dataplane.maps.links.read(place);
    assert_eq!((link.ifindex, link.mac()), (loopback, other));
    // No place is free any more, so one that is gone gives way.
    let next = dataplane.link(FIRST_GONE + LINKS, mac).unwrap();
    assert_ne!(next, place);
    assert_eq!(dataplane.maps.links.read(next).ifindex, FIRST_GONE + LINKS);
}
