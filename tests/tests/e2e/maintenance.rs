//! Backends that are taken out and brought back, and weights that move by themselves.

use crate::support::{KeptConnection, QUICK_HEALTH, get, service, vips};
use sluice_tests::topology::{Options, Topology, wait_until};
use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

/// A topology with nginx on each backend, the daemon with a service `web`, and the numbers of
/// the servers.
fn web(backends: u8, daemon: &str, keys: &str, health: &str) -> (Topology, Vec<u32>) {
    let topology = Topology::new(Options {
        backends,
        ..Options::default()
    });
    let servers = (1..=backends).map(|n| topology.nginx(&format!("b{n}")));
    let servers = servers.collect();
    let text = topology
        .daemon_section()
        .replace("[limits]", &format!("{daemon}\n[limits]"))
        + &service(
            &topology,
            "web",
            "tcp",
            vips(80)[0],
            (backends, 8080),
            keys,
            &format!("{QUICK_HEALTH}{health}"),
        );
    topology.daemon(&topology.config("sluice.toml", &text));
    topology.wait_backends_up(None, usize::from(backends));
    (topology, servers)
}

fn backend(topology: &Topology, name: &str) -> serde_json::Value {
    let list = topology.json(&["backend", "list", "web"]);
    let found = list
        .as_array()
        .and_then(|l| l.iter().find(|b| b["name"] == name));
    found
        .unwrap_or_else(|| panic!("{name} is listed: {list:#}"))
        .clone()
}

#[test]
fn draining_waits_for_the_last_flow_and_tells_the_hook() {
    let dir = std::env::temp_dir().join(format!("slc-{}-hook", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory of our own");
    let told = dir.join("told");
    let hook = format!(
        "on_state_change = [\"/bin/sh\", \"-c\", '''echo $SLUICE_SERVICE $SLUICE_BACKEND \
         $SLUICE_STATE $SLUICE_ADMIN $SLUICE_REASON >> {}''']",
        told.display()
    );
    let (topology, servers) = web(2, &hook, "on_backend_down = \"reset\"", "");
    let vip = vips(80)[0];
    let mut to_b1 = topology.on("client", move || {
        let open = || KeptConnection::open(vip).expect("open");
        let mut all: Vec<_> = (0..4).map(|_| open()).collect();
        let mut to_b1 = Vec::new();
        for mut connection in all.drain(..) {
            if connection.get().expect("an answer").trim() == "b1" {
                to_b1.push(connection);
            }
        }
        to_b1
    });
    assert_eq!(to_b1.len(), 2, "the scheduler takes turns");

    let mut command = topology.command("lb", sluice_tests::topology::sluice_bin());
    command
        .env("SLUICE_SOCKET", topology.socket())
        .args(["backend", "drain", "web", "b1", "--wait"]);
    let waiting = topology.spawn("drain", command);
    let says = |line: &str| {
        wait_until(line, || topology.log("drain").contains(line));
    };
    says("service web: backend b1: 2 flows left\n");
    let b1 = backend(&topology, "b1");
    assert_eq!(b1["admin"], "drain", "{b1:#}");
    assert_eq!(b1["state"], "up", "{b1:#}");
    assert_eq!(b1["effective_weight"], 0, "{b1:#}");
    topology.on("client", move || {
        for n in 0..10 {
            let body = get(vip, "/").unwrap_or_else(|e| panic!("request {n}: {e}"));
            assert_eq!(body.trim(), "b2");
        }
    });
    // What is there goes on until it ends.
    assert_eq!(to_b1[0].get().expect("an answer").trim(), "b1");
    assert_eq!(
        topology.exit_code(waiting),
        None,
        "{}",
        topology.log("drain")
    );
    to_b1.pop();
    says("service web: backend b1: 1 flow left\n");
    let late = [
        "backend",
        "drain",
        "web",
        "b1",
        "--wait",
        "--timeout",
        "300ms",
    ];
    let late = topology.sluice(&late);
    assert_eq!(late.code, 1, "{}", late.report());
    assert!(
        late.stderr.contains("1 flow left and the time is over"),
        "{}",
        late.report()
    );
    to_b1.pop();
    assert_eq!(topology.wait_exit(waiting), 0, "{}", topology.log("drain"));
    says("service web: backend b1: 0 flows left\n");

    topology
        .sluice(&["backend", "ready", "web", "b1", "--wait"])
        .ok();
    assert_eq!(backend(&topology, "b1")["effective_weight"], 1);
    topology.kill(servers[1]);
    topology.wait_backends_up(None, 1);
    let expected = [
        "web b1 up drain L7OK 200 OK",
        "web b1 up ready L7OK 200 OK",
        "web b2 down ready L4CON connection refused",
    ];
    wait_until("the hook to be told", || {
        let lines = fs::read_to_string(&told).unwrap_or_default();
        // What came before is the start.
        let lines: Vec<&str> = lines.lines().collect();
        lines.ends_with(&expected)
    });
    fs::remove_dir_all(&dir).expect("a directory of our own");
}

#[test]
fn a_drained_backends_flows_end_when_their_time_is_over() {
    let keys = "on_backend_down = \"reset\"\ndrain_timeout = \"1s\"";
    let (topology, _) = web(1, "", keys, "");
    let vip = vips(80)[0];
    let mut connection = topology.on("client", move || KeptConnection::open(vip).expect("open"));
    connection.get().expect("an answer");
    topology.sluice(&["backend", "drain", "web", "b1"]).ok();
    connection.get().expect("it has a second yet");
    wait_until("the connection to be reset", || {
        connection
            .get()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
    });
}

#[test]
fn a_new_daemon_remembers_what_was_commanded() {
    let (topology, _) = web(2, "", "", "");
    topology.sluice(&["backend", "maint", "web", "b1"]).ok();
    topology.sluice(&["backend", "drain", "web", "b2"]).ok();
    topology.sluice(&["backend", "ready", "web", "b2"]).ok();
    topology.sluice(&["stop"]).ok();
    topology.daemon(&topology.dir().join("sluice.toml"));
    topology.wait_backends_up(None, 1);
    assert_eq!(backend(&topology, "b1")["admin"], "maint");
    assert_eq!(backend(&topology, "b2")["admin"], "ready");
    // Who begins anew begins with the configuration.
    topology
        .sluice(&[
            "detach",
            "--pin-path",
            &topology.pin_path().display().to_string(),
        ])
        .ok();
    topology.daemon(&topology.dir().join("sluice.toml"));
    topology.wait_backends_up(None, 2);
    assert_eq!(backend(&topology, "b1")["admin"], "ready");
}

#[test]
fn a_rolling_deploy_fails_no_request() {
    let (topology, mut servers) = web(3, "", "on_backend_down = \"reset\"", "");
    let vip = vips(80)[0];
    let stop = Arc::new(AtomicBool::new(false));
    let (good, failed) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let (stop, good, failed) = (stop.clone(), good.clone(), failed.clone());
            topology.background("client", move || {
                while !stop.load(Ordering::Relaxed) {
                    match get(vip, "/") {
                        Ok(_) => drop(good.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => failed.lock().expect("no panic").push(error.to_string()),
                    }
                }
            })
        })
        .collect();

    // The restart is the test's to do: the command asks for it and waits.
    let wish = topology.dir().join("restart");
    let restart = format!(
        "echo $1 > {0}.new; mv {0}.new {0}; while test -e {0}; do sleep 0.02; done",
        wish.display()
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/rolling-deploy/deploy.sh");
    let mut command = topology.command("lb", script);
    command
        .env("SLUICE_SOCKET", topology.socket())
        .env("SLUICE", sluice_tests::topology::sluice_bin())
        .args(["web", "sh", "-c", &restart, "restart"]);
    let deploy = topology.spawn("deploy", command);
    let mut restarted = Vec::new();
    while topology.exit_code(deploy).is_none() {
        if let Ok(name) = fs::read_to_string(&wish) {
            let name = name.trim().to_owned();
            let server = &mut servers[restarted.len()];
            topology.kill(*server);
            *server = topology.nginx(&name);
            restarted.push(name);
            fs::remove_file(&wish).expect("it was there");
        }
        thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(
        topology.exit_code(deploy),
        Some(0),
        "{}",
        topology.log("deploy")
    );
    assert_eq!(restarted, ["b1", "b2", "b3"], "{}", topology.log("deploy"));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("clients end");
    }
    let failed = failed.lock().expect("no panic");
    assert!(failed.is_empty(), "{failed:?}");
    assert!(good.load(Ordering::Relaxed) > 100, "{good:?} requests");
    topology.wait_backends_up(None, 3);
}

#[test]
fn a_backend_that_comes_back_gets_its_share_little_by_little() {
    let (topology, servers) = web(2, "", "slow_start = \"3s\"", "");
    assert_eq!(
        backend(&topology, "b2")["effective_weight"],
        1,
        "not at the start"
    );
    topology.kill(servers[1]);
    topology.wait_backends_up(None, 1);
    topology.nginx("b2");
    topology.wait_backends_up(None, 2);
    let mut seen = Vec::new();
    wait_until("the whole weight", || {
        let weight = backend(&topology, "b2")["effective_weight"].as_f64();
        seen.push(weight.expect("a number"));
        weight == Some(1.0)
    });
    assert!(seen.is_sorted(), "{seen:?}");
    assert!(seen[0] <= 0.5, "{seen:?}");
    seen.dedup();
    assert!(seen.len() > 5, "{seen:?}");
    assert!(seen.iter().all(|weight| *weight > 0.0), "{seen:?}");
    assert_eq!(backend(&topology, "b1")["effective_weight"], 1);
}

/// An agent that says the same line to everybody, until it is told another.
fn agent(topology: &Topology, host: &str) -> Arc<Mutex<String>> {
    let line = Arc::new(Mutex::new("up".to_owned()));
    let says = line.clone();
    let (ready, listens) = std::sync::mpsc::channel();
    // It ends with the process.
    drop(topology.background(host, move || {
        let listener = TcpListener::bind("0.0.0.0:9777").expect("a free port in a namespace");
        ready.send(()).expect("the test waits");
        for stream in listener.incoming().flatten() {
            let line = says.lock().expect("no panic").clone();
            let _ = writeln!(&stream, "{line}");
        }
    }));
    listens.recv().expect("the agent listens");
    line
}

#[test]
fn an_agent_sets_weight_and_admin_state() {
    let topology = Topology::new(Options {
        backends: 1,
        ..Options::default()
    });
    topology.nginx("b1");
    let line = agent(&topology, "b1");
    let text = topology.daemon_section()
        + &service(
            &topology,
            "web",
            "tcp",
            vips(80)[0],
            (1, 8080),
            "",
            &format!("{QUICK_HEALTH}agent_port = 9777\n"),
        );
    topology.daemon(&topology.config("sluice.toml", &text));
    topology.wait_backends_up(None, 1);
    for (says, admin, state, weight) in [
        ("75%", "ready", "up", 0.75),
        ("drain", "drain", "up", 0.0),
        ("up 50%", "ready", "up", 0.5),
        ("down # disk full", "ready", "down", 0.0),
        ("maint", "maint", "unknown", 0.0),
        ("up", "ready", "up", 1.0),
    ] {
        says.clone_into(&mut line.lock().expect("no panic"));
        wait_until(says, || {
            let b1 = backend(&topology, "b1");
            b1["admin"] == admin
                && b1["state"] == state
                && b1["effective_weight"].as_f64() == Some(weight)
                && b1["agent"] == says
        });
        if state == "down" {
            let reason = backend(&topology, "b1")["reason"].clone();
            assert_eq!(reason, "its agent says it is down: disk full");
        }
    }
}

#[test]
fn when_too_few_are_up_all_are_used() {
    let (topology, servers) = web(2, "", "panic_threshold = 60", "");
    topology.kill(servers[1]);
    wait_until("both to be used", || {
        let b2 = backend(&topology, "b2");
        b2["state"] == "down" && b2["effective_weight"] == 1
    });
    let reason = backend(&topology, "b2")["reason"].clone();
    let reason = reason.as_str().unwrap_or_default();
    assert!(
        reason.ends_with("; used all the same, by panic_threshold"),
        "{reason}"
    );
    assert!(
        topology
            .log("sluice")
            .contains("fewer backends are up than panic_threshold says")
    );
    topology.nginx("b2");
    wait_until("enough to be up again", || {
        topology
            .log("sluice")
            .contains("enough backends are up again")
    });
    assert_eq!(backend(&topology, "b2")["state"], "up");
}
