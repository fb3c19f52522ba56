//! The command line against a running daemon: JSON that scripts can rely on, tables for people,
//! and one line for what is wrong.

use crate::support::{KeptConnection, get, vips, web_topology};
use serde_json::Value;
use sluice_tests::topology::{Options, Topology};

fn options() -> Options {
    Options {
        backends: 2,
        ..Options::default()
    }
}

#[track_caller]
fn has(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(!value[key].is_null(), "{key} is missing: {value:#}");
    }
}

fn list(topology: &Topology, args: &[&str]) -> Vec<Value> {
    match topology.json(args) {
        Value::Array(list) => list,
        other => panic!("{args:?}: a listing is an array: {other:#}"),
    }
}

#[test]
fn json_has_the_documented_fields() {
    let (topology, pid) = web_topology(options(), "");
    topology.on("client", || get(vips(80)[0], "/").expect("an answer"));
    let counters = [
        "active_connections",
        "inactive_connections",
        "connections_total",
        "packets_in",
        "bytes_in",
        "packets_out",
        "bytes_out",
    ];
    let backends = list(&topology, &["backend", "list", "web"]);
    assert_eq!(backends.len(), 2);
    assert_eq!(list(&topology, &["backend", "list"]).len(), 4);
    for backend in &backends {
        has(
            backend,
            &[
                "service",
                "name",
                "address",
                "weight",
                "effective_weight",
                "admin",
                "state",
                "reason",
            ],
        );
        has(backend, &counters);
        assert_eq!(
            (&backend["service"], &backend["admin"]),
            (&"web".into(), &"ready".into())
        );
        assert_eq!(
            backend["reason"].as_str().map(|r| r.starts_with("L7OK")),
            Some(true)
        );
    }
    let services = list(&topology, &["service", "list"]);
    assert_eq!(services.len(), 2);
    for service in &services {
        has(
            service,
            &[
                "name",
                "listen",
                "protocol",
                "forward",
                "scheduler",
                "backends_up",
                "backends_total",
            ],
        );
        has(service, &counters);
    }
    assert_eq!(services[0]["listen"], "203.0.113.80:80");
    let by_address = topology.json(&["service", "show", "203.0.113.80:80/tcp"]);
    assert!(by_address.to_string().contains("\"web\""), "{by_address:#}");

    let status = topology.json(&["status"]);
    has(
        &status,
        &["version", "pid", "uptime", "interfaces", "programs", "maps"],
    );
    assert_eq!(status["pid"], pid);
    assert_eq!(status["interfaces"][0]["name"], "eth0");
    assert_eq!(status["interfaces"][0]["mode"], "driver");
    assert!(
        status["programs"].as_array().is_some_and(|p| !p.is_empty()),
        "{status:#}"
    );
    for map in status["maps"].as_array().expect("maps") {
        has(map, &["name", "entries", "max_entries"]);
    }

    let _kept = topology.on("client", || {
        let mut c = KeptConnection::open(vips(80)[0]).expect("open");
        c.get().expect("an answer");
        c
    });
    let established = list(&topology, &["conn", "list", "--state", "ESTABLISHED"]);
    assert_eq!(established.len(), 1, "{established:#?}");
    assert_eq!(established[0]["virtual_address"], "203.0.113.80:80");
    assert_eq!(established[0]["service"], "web");
    let count = topology.json(&["conn", "count"]);
    assert!(
        count.to_string().chars().any(|c| c.is_ascii_digit()),
        "{count:#}"
    );

    let flushed = topology.sluice(&["conn", "flush", "--state", "ESTABLISHED"]);
    assert_eq!(flushed.ok().trim(), "1");
    let left = list(&topology, &["conn", "list", "--state", "ESTABLISHED"]);
    assert!(left.is_empty(), "{left:#?}");
    let unnamed = topology.sluice(&["conn", "flush"]);
    assert_eq!(unnamed.code, 1, "{}", unnamed.report());
    assert!(unnamed.stderr.contains("--all"), "{}", unnamed.report());

    assert!(!list(&topology, &["stats"]).is_empty());
    let pins = topology.pin_path();
    let pins = pins.to_str().expect("UTF-8");
    let maps = topology.sluice(&["map", "list", "--pin-path", pins, "-o", "json"]);
    let maps: Value = serde_json::from_str(&maps.ok()).expect("JSON");
    assert!(maps.as_array().is_some_and(|l| l.len() > 10), "{maps:#}");
    let dump = topology.sluice(&["map", "dump", "backends", "--pin-path", pins, "-o", "json"]);
    let dump: Value = serde_json::from_str(&dump.ok()).expect("JSON");
    let text = dump.to_string();
    for host in ["b1", "b2"] {
        let ip = topology.v4(host).to_string();
        assert!(text.contains(&ip), "{ip} is in {text}");
    }
}

#[test]
fn tables_name_what_they_show() {
    let (topology, _) = web_topology(options(), "");
    for (args, words) in [
        (
            &["service", "list"][..],
            &["web", "web6", "203.0.113.80:80", "round-robin"][..],
        ),
        (&["backend", "list"], &["b1", "b2", "up", "L7OK"]),
        (&["backend", "list", "web"], &["b1", "b2"]),
        (&["stats"], &["InPkts", "OutBytes", "web"]),
        (&["status"], &["eth0", "driver"]),
        (&["service", "show", "web"], &["web", "b1"]),
    ] {
        let table = topology.sluice(args).ok();
        for word in words {
            assert!(table.contains(word), "{args:?} shows {word}:\n{table}");
        }
        assert!(
            !table.contains('\x1b'),
            "no colour where there is no terminal:\n{table}"
        );
    }
}

#[test]
fn what_does_not_exist_is_named_in_one_line() {
    let (topology, _) = web_topology(options(), "");
    for (args, word) in [
        (&["service", "show", "wep"][..], "wep"),
        (&["backend", "list", "wep"], "wep"),
        (&["conn", "list", "--service", "wep"], "wep"),
    ] {
        let ran = topology.sluice(args);
        assert_eq!(ran.code, 1, "{}", ran.report());
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{}", ran.report());
        assert!(ran.stderr.contains(word), "{}", ran.report());
    }
    let ran = topology.sluice(&["servise", "list"]);
    assert_eq!(ran.code, 2, "wrong usage: {}", ran.report());
}

#[test]
fn without_a_daemon_the_command_line_says_so() {
    let topology = Topology::new(options());
    let ran = topology.sluice(&["status"]);
    assert_eq!(ran.code, 1, "{}", ran.report());
    assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{}", ran.report());
    let socket = topology.socket();
    assert!(
        ran.stderr.contains(socket.to_str().expect("UTF-8")),
        "{}",
        ran.report()
    );
}
