//! The daemon's life: death, return, detachment, and pins that are not its own.

use crate::support::{KeptConnection, get, vips, web, web_topology};
use sluice_tests::topology::{Options, Topology, sluice_bin, wait_until};
use std::path::Path;

fn options() -> Options {
    Options {
        backends: 2,
        ..Options::default()
    }
}

fn answers(topology: &Topology) {
    for vip in vips(80) {
        topology.on("client", move || {
            for n in 0..10 {
                get(vip, "/").unwrap_or_else(|e| panic!("request {n} to {vip}: {e}"));
            }
        });
    }
}

#[test]
fn traffic_survives_the_daemon_and_the_next_one_adopts_it() {
    let (topology, first) = web_topology(options(), "");
    let open = || {
        vips(80).map(|vip| topology.on("client", move || KeptConnection::open(vip).expect("open")))
    };
    let mut kept = open();
    let before = kept.each_mut().map(|c| c.get().expect("an answer"));
    let counted = |topology: &Topology| {
        topology
            .json(&["backend", "list"])
            .as_array()
            .map_or(0, |l| {
                l.iter()
                    .filter_map(|b| b["connections_total"].as_u64())
                    .sum::<u64>()
            })
    };
    let total = counted(&topology);
    assert_eq!(topology.json(&["status"])["adopted"], false);

    // Killed without a word.
    topology.kill(first);
    answers(&topology);
    let same = |kept: &mut [KeptConnection; 2], before: &[String; 2]| {
        for (connection, before) in kept.iter_mut().zip(before) {
            assert_eq!(connection.get().expect("the connection lives on"), *before);
        }
    };
    same(&mut kept, &before);

    // The next one takes over: connections and counters live on.
    let config = topology.dir().join("sluice.toml");
    let second = topology.daemon(&config);
    topology.wait_backends_up(None, 4);
    assert_eq!(topology.json(&["status"])["adopted"], true);
    same(&mut kept, &before);
    answers(&topology);
    assert_eq!(
        counted(&topology),
        total + 40,
        "nothing was counted anew or lost"
    );

    // Stopped in order, with the same result.
    topology.sluice(&["stop"]).ok();
    assert_eq!(topology.wait_exit(second), 0, "{}", topology.log("sluice"));
    same(&mut kept, &before);
    answers(&topology);

    // SIGTERM is the same.
    let third = topology.daemon(&config);
    topology.signal(third, libc::SIGTERM);
    assert_eq!(topology.wait_exit(third), 0, "{}", topology.log("sluice"));
    same(&mut kept, &before);
}

#[test]
fn a_reload_changes_what_it_says_and_a_bad_one_changes_nothing() {
    let (topology, pid) = web_topology(options(), "");
    let config = topology.dir().join("sluice.toml");
    let text = std::fs::read_to_string(&config).expect("our own file");
    let mut kept = topology.on("client", || {
        KeptConnection::open(vips(80)[0]).expect("open")
    });
    kept.get().expect("an answer");

    std::fs::write(
        &config,
        text.replace("scheduler = \"round-robin\"", "scheduler = \"nonsense\""),
    )
    .expect("our own file");
    topology.signal(pid, libc::SIGHUP);
    wait_until("the daemon to say what is wrong", || {
        topology.log("sluice").contains("nonsense")
    });
    answers(&topology);
    kept.get().expect("the connection lives on");

    std::fs::write(
        &config,
        text.replace("scheduler = \"round-robin\"", "scheduler = \"maglev\""),
    )
    .expect("our own file");
    topology.signal(pid, libc::SIGHUP);
    wait_until("the new scheduler", || {
        topology
            .json(&["service", "list"])
            .as_array()
            .is_some_and(|l| l.iter().all(|s| s["scheduler"] == "maglev"))
    });
    answers(&topology);
    kept.get().expect("the connection lives on");
}

#[test]
fn detach_leaves_nothing() {
    for running in [true, false] {
        let (topology, pid) = web_topology(options(), "");
        answers(&topology);
        let attached = topology
            .run("lb", "ip", &["-d", "link", "show", "eth0"])
            .ok();
        assert!(attached.contains("prog/xdp"), "{attached}");
        if !running {
            topology.kill(pid);
        }
        let config = topology.dir().join("sluice.toml");
        topology
            .sluice(&["detach", "--config", config.to_str().expect("UTF-8")])
            .ok();
        let link = topology
            .run("lb", "ip", &["-d", "link", "show", "eth0"])
            .ok();
        assert!(!link.contains("xdp"), "{link}");
        assert!(
            !topology.pin_path().exists(),
            "{} should be gone",
            topology.pin_path().display()
        );
        let vip = vips(80)[0];
        topology
            .on("client", move || {
                std::net::TcpStream::connect_timeout(&vip, std::time::Duration::from_millis(300))
            })
            .expect_err("nobody answers for the VIP");
    }
}

/// Runs a second daemon to its end and returns its log.
#[track_caller]
fn refused(topology: &Topology, label: &str, config: &Path) -> String {
    let pid = topology.start_daemon(label, config);
    let code = topology.wait_exit(pid);
    let log = topology.log(label);
    assert_eq!(code, 1, "{log}");
    log
}

/// The last line, which must be the only complaint.
fn complaint(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|l| l.starts_with("sluice: ")).collect();
    assert_eq!(lines.len(), 1, "one line says what is wrong:\n{log}");
    lines[0].to_owned()
}

#[test]
fn a_second_daemon_is_refused() {
    let (topology, _) = web_topology(options(), "");
    let config = topology.dir().join("sluice.toml");
    let line = complaint(&refused(&topology, "second", &config));
    assert!(line.contains("daemon"), "{line}");
    // Another socket does not help: the pins are taken too.
    let other = web(&topology, 2, "").replace("control.sock", "other.sock");
    let other = topology.config("other.toml", &other);
    let line = complaint(&refused(&topology, "third", &other));
    assert!(
        line.contains(topology.pin_path().to_str().expect("UTF-8")),
        "{line}"
    );
    answers(&topology);
}

#[test]
fn pins_of_somebody_else_are_refused() {
    let topology = Topology::new(options());
    let config = topology.config("sluice.toml", &web(&topology, 2, ""));
    std::fs::create_dir(topology.pin_path()).expect("a directory on the BPF file system");
    let pin = topology.pin_path().join("settings");
    topology
        .run(
            "lb",
            "bpftool",
            &[
                "map",
                "create",
                pin.to_str().expect("UTF-8"),
                "type",
                "array",
                "key",
                "4",
                "value",
                "8",
                "entries",
                "1",
                "name",
                "foreign",
            ],
        )
        .ok();
    let line = complaint(&refused(&topology, "sluice", &config));
    assert!(line.contains("settings"), "{line}");
    assert!(pin.exists(), "what is not ours is not removed");
    let link = topology
        .run("lb", "ip", &["-d", "link", "show", "eth0"])
        .ok();
    assert!(!link.contains("prog/xdp"), "nothing was attached: {link}");
}

#[test]
fn pins_of_another_version_are_refused() {
    let (topology, pid) = web_topology(options(), "");
    topology.kill(pid);
    let pin = topology.pin_path().join("settings");
    let pin = pin.to_str().expect("UTF-8");
    let key = ["key", "hex", "00", "00", "00", "00"];
    let lookup = [&["-j", "map", "lookup", "pinned", pin][..], &key].concat();
    let record: serde_json::Value =
        serde_json::from_str(&topology.run("lb", "bpftool", &lookup).ok()).expect("JSON");
    let mut value: Vec<String> = record["value"]
        .as_array()
        .expect("bytes")
        .iter()
        .map(|b| {
            b.as_str()
                .expect("a byte")
                .trim_start_matches("0x")
                .to_owned()
        })
        .collect();
    // The version follows the eight bytes of the magic number.
    assert_eq!(
        value[8..12].join(""),
        format!("{:02x}000000", lb_common::abi::ABI_VERSION)
    );
    value[8] = "63".into();
    let mut update = vec!["map", "update", "pinned", pin];
    update.extend(key);
    update.extend(["value", "hex"]);
    update.extend(value.iter().map(String::as_str));
    topology.run("lb", "bpftool", &update).ok();

    let config = topology.dir().join("sluice.toml");
    let line = complaint(&refused(&topology, "stale", &config));
    assert!(line.contains("99"), "the version it found: {line}");
    assert!(line.contains("detach"), "what to do: {line}");
    answers(&topology);
}

#[test]
fn maps_are_readable_with_bpftool() {
    let (topology, _) = web_topology(options(), "");
    answers(&topology);
    for (map, fields) in [
        ("settings", &["nat_port_first", "abi_version"][..]),
        ("services", &["scheduler", "table"]),
        ("services4", &["vip", "port", "protocol"]),
        ("backends", &["addr", "ifindex", "generation"]),
        ("flows4", &["sport", "state", "last_seen"]),
        ("flows6", &["sport", "state", "last_seen"]),
        ("backend_stats", &["connections", "packets_in", "bytes_out"]),
    ] {
        let pin = topology.pin_path().join(map);
        let dump = topology
            .run(
                "lb",
                "bpftool",
                &["map", "dump", "pinned", pin.to_str().expect("UTF-8")],
            )
            .ok();
        for field in fields {
            assert!(
                dump.contains(&format!("\"{field}\"")),
                "field {field} of map {map}: {}",
                dump.chars().take(600).collect::<String>()
            );
        }
    }
}

#[test]
fn generic_mode_works_and_is_named() {
    for tx_offload in [true, false] {
        let topology = Topology::new(Options {
            tx_offload,
            ..options()
        });
        for host in ["b1", "b2"] {
            topology.nginx(host);
        }
        let text = web(&topology, 2, "").replace("mode = \"driver\"", "mode = \"generic\"");
        topology.daemon(&topology.config("sluice.toml", &text));
        topology.wait_backends_up(None, 4);
        assert_eq!(
            topology.json(&["status"])["interfaces"][0]["mode"],
            "generic"
        );
        answers(&topology);
        let link = topology.run("lb", "ip", &["link", "show", "eth0"]).ok();
        assert!(link.contains("xdpgeneric"), "{link}");
    }
}

#[test]
fn driver_mode_is_taken_where_there_is_one_and_named() {
    let topology = Topology::new(options());
    let text = web(&topology, 2, "").replace("mode = \"driver\"", "mode = \"auto\"");
    topology.daemon(&topology.config("sluice.toml", &text));
    assert_eq!(
        topology.json(&["status"])["interfaces"][0]["mode"],
        "driver"
    );
}

#[test]
fn a_daemon_that_cannot_start_says_why_in_one_line() {
    let topology = Topology::new(options());
    let good = web(&topology, 2, "");
    let cases = [
        ("interface", good.replace("\"eth0\"", "\"eth7\""), "eth7"),
        (
            "key",
            good.replace("scheduler =", "schedular ="),
            "schedular",
        ),
        ("syntax", good.replace("[limits]", "[limits"), "bad.toml"),
        (
            "address",
            good.replace("203.0.113.80:80", "203.0.113.800:80"),
            "203.0.113.800",
        ),
        (
            "mode",
            good.replace("forward = \"nat\"", "forward = \"dsr\""),
            "dsr",
        ),
    ];
    for (label, text, word) in cases {
        assert_ne!(text, good, "case {label} changes something");
        let config = topology.config("bad.toml", &text);
        let line = complaint(&refused(&topology, label, &config));
        assert!(line.contains(word), "case {label}: {line}");
        let link = topology
            .run("lb", "ip", &["-d", "link", "show", "eth0"])
            .ok();
        assert!(!link.contains("prog/xdp"), "nothing stays attached: {link}");
    }
    let missing = refused(&topology, "missing", &topology.dir().join("nowhere.toml"));
    assert!(complaint(&missing).contains("nowhere.toml"), "{missing}");
    assert!(sluice_bin().exists());
}
