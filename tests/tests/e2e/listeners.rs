//! Services on ranges of ports, on every port, and by the thousand.

use crate::support::{KeptConnection, QUICK_HEALTH, UdpEcho, get, vips};
use sluice_tests::topology::{Options, Topology, VIP4, VIP6, wait_until};
use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

/// A topology with nginx, on port 8080, on each of two backends.
fn topology() -> Topology {
    let topology = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        topology.nginx(host);
    }
    topology
}

/// One `[[service]]` on `ports` of both VIPs, named `name` and `name6`; backends with `port`, or
/// with none.
fn on_ports(
    topology: &Topology,
    name: &str,
    protocol: &str,
    ports: &str,
    port: Option<u16>,
    health: &str,
) -> String {
    let mut text = String::new();
    for (name, vip) in [
        (name.to_owned(), IpAddr::V4(VIP4)),
        (format!("{name}6"), IpAddr::V6(VIP6)),
    ] {
        let host = match vip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let _ = write!(
            text,
            "[[service]]\nname = \"{name}\"\nlisten = \"{host}:{ports}\"\n\
             protocol = \"{protocol}\"\nscheduler = \"round-robin\"\n{health}"
        );
        for backend in ["b1", "b2"] {
            let ip: IpAddr = match vip {
                IpAddr::V4(_) => topology.v4(backend).into(),
                IpAddr::V6(_) => topology.v6(backend).into(),
            };
            let address = match port {
                Some(port) => SocketAddr::new(ip, port).to_string(),
                None => ip.to_string(),
            };
            let _ = write!(text, "[[service.backend]]\naddress = \"{address}\"\n");
        }
    }
    text
}

fn answers(topology: &Topology, port: u16) {
    for vip in vips(port) {
        let body = topology.on("client", move || get(vip, "/"));
        let body = body.unwrap_or_else(|e| panic!("request to {vip}: {e}"));
        assert!(body == "b1\n" || body == "b2\n", "{vip}: {body:?}");
    }
}

/// The ports that services of one map have, by reading the map.
fn keys(topology: &Topology, map: &str) -> Vec<u64> {
    let pins = topology.pin_path();
    let pins = pins.to_str().expect("UTF-8");
    let keys = topology.json(&["map", "dump", map, "--pin-path", pins]);
    let mut ports: Vec<u64> = keys
        .as_array()
        .expect("a dump is an array")
        .iter()
        .filter_map(|key| key["port"].as_u64())
        .collect();
    ports.sort_unstable();
    ports
}

fn reload(topology: &Topology, daemon: u32, config: &Path, text: &str, listen: &str) {
    std::fs::write(config, text).expect("our own file");
    topology.signal(daemon, libc::SIGHUP);
    wait_until("the new configuration to be in force", || {
        let list = topology.json(&["service", "list"]);
        let list = list.as_array().expect("a listing is an array").clone();
        list.iter().any(|service| service["listen"] == listen)
    });
}

#[test]
fn ranges_are_served_and_change_while_connections_live() {
    let topology = topology();
    let with = |ports: &str| {
        topology.daemon_section()
            + &on_ports(&topology, "web", "tcp", ports, Some(8080), QUICK_HEALTH)
    };
    let config = topology.config("sluice.toml", &with("9000-9010"));
    let daemon = topology.daemon(&config);
    topology.wait_backends_up(None, 4);
    for port in [9000, 9005, 9010] {
        answers(&topology, port);
    }
    let mut kept = vips(9005)
        .map(|vip| topology.on("client", move || KeptConnection::open(vip).expect("open")));
    let before = kept.each_mut().map(|c| c.get().expect("an answer"));
    let total = |topology: &Topology| {
        let web = topology.json(&["service", "show", "web"]);
        let web = if web.is_array() { web[0].clone() } else { web };
        web["connections_total"].as_u64().expect("a number")
    };
    assert_eq!(total(&topology), 4);

    // The range moves on, and no backend is out for a moment.
    reload(
        &topology,
        daemon,
        &config,
        &with("9005-9020"),
        &format!("{VIP4}:9005-9020"),
    );
    for port in [9005, 9011, 9020] {
        answers(&topology, port);
    }
    assert_eq!(total(&topology), 7, "the service's counters go on");
    for (connection, before) in kept.iter_mut().zip(&before) {
        assert_eq!(connection.get().expect("the connection lives on"), *before);
    }
    let expected: Vec<u64> = (9005..=9020).collect();
    assert_eq!(keys(&topology, "services4"), expected);
    assert_eq!(keys(&topology, "services6"), expected);
    let listener = format!("{VIP4}:9005-9020/tcp");
    assert_eq!(
        topology.json(&["backend", "list", &listener])[0]["state"],
        "up"
    );

    // It changes again while no daemon is there.
    topology.kill(daemon);
    std::fs::write(&config, with("9004-9006")).expect("our own file");
    topology.daemon(&config);
    topology.wait_backends_up(None, 4);
    answers(&topology, 9004);
    assert_eq!(total(&topology), 8, "adopted, not made anew");
    for (connection, before) in kept.iter_mut().zip(&before) {
        assert_eq!(connection.get().expect("the connection lives on"), *before);
    }
    assert_eq!(keys(&topology, "services4"), [9004, 9005, 9006]);
}

#[test]
fn every_port_is_served_where_nobody_else_listens() {
    let topology = topology();
    let health = "[service.health]\ntype = \"tcp\"\nport = 8080\ninterval = \"200ms\"\n";
    let text = topology.daemon_section()
        + &on_ports(&topology, "rest", "tcp", "*", None, health)
        + &on_ports(&topology, "web", "tcp", "80", Some(8080), QUICK_HEALTH)
        + &on_ports(&topology, "any", "udp", "*", None, "");
    let config = topology.config("sluice.toml", &text);
    let daemon = topology.daemon(&config);
    topology.wait_backends_up(None, 12);
    answers(&topology, 80);
    answers(&topology, 8080);
    let echoes: Vec<UdpEcho> = ["b1", "b2"]
        .iter()
        .flat_map(|host| [5000, 6000].map(|port| UdpEcho::start(&topology, host, port)))
        .collect();
    for port in [5000, 6000] {
        for vip in vips(port) {
            let answer = topology.on("client", move || {
                let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                socket.connect(vip)?;
                let mut buffer = [0; 64];
                // The echo servers may still be on their way up.
                for _ in 0..20 {
                    if socket.send(b"hello").is_ok()
                        && let Ok(n) = socket.recv(&mut buffer)
                    {
                        return Ok(String::from_utf8_lossy(&buffer[..n]).into_owned());
                    }
                }
                Err(std::io::Error::other("no answer"))
            });
            let answer = answer.unwrap_or_else(|e| panic!("{vip}: {e}"));
            assert!(answer == "b1 hello" || answer == "b2 hello", "{answer:?}");
        }
    }
    drop(echoes);
    let list = topology.json(&["service", "list"]);
    let listen = |name: &str| {
        let list = list.as_array().expect("a listing is an array");
        let service = list.iter().find(|s| s["name"] == name);
        service.expect("a service of this name")["listen"].clone()
    };
    assert_eq!(listen("rest"), format!("{VIP4}:*"));
    assert_eq!(listen("rest6"), format!("[{VIP6}]:*"));
    let backends = topology.json(&["backend", "list", &format!("[{VIP6}]:*/tcp")]);
    assert_eq!(backends[0]["address"], topology.v6("b1").to_string());
    let one = topology.v4("b2").to_string();
    let count = topology.sluice(&["conn", "count", "--service", "rest", "--backend", &one]);
    count.ok();

    // On an address of the host's own this would take its connections from it.
    let address = format!("{VIP4}/32");
    topology
        .run("lb", "ip", &["address", "add", &address, "dev", "lo"])
        .ok();
    wait_until("the daemon to warn", || {
        topology.signal(daemon, libc::SIGHUP);
        let warning = format!("service rest: {VIP4}:* takes the answers");
        topology.log("sluice").contains(&warning)
    });
}

/// Thousands of services beside the largest range there is, and a reload that changes all of them.
#[test]
fn thousands_of_services_are_served() {
    const EACH: u16 = 2048;
    const FIRST: u16 = 10_000;
    let topology = topology();
    let head = topology
        .daemon_section()
        .replace("services = 64", "services = 4098\nlisteners = 70000")
        .replace("backends = 256", "backends = 16384")
        .replace("slots = 1048576", "slots = 4194304");
    let text = |scheduler: &str| {
        let mut text = head.clone() + &format!("[defaults]\nscheduler = \"{scheduler}\"\n");
        for n in 0..EACH {
            let service = on_ports(
                &topology,
                &format!("s{n}-"),
                "tcp",
                &(FIRST + n).to_string(),
                Some(8080),
                "",
            );
            text += &service.replace("scheduler = \"round-robin\"\n", "");
        }
        text + &on_ports(&topology, "all", "udp", "1-65535", None, "")
    };
    let config = topology.config("sluice.toml", &text("round-robin"));
    let daemon = topology.daemon(&config);
    topology.wait_backends_up(None, 4 * usize::from(EACH) + 4);
    let list = topology.json(&["service", "list"]);
    assert_eq!(
        list.as_array().map_or(0, Vec::len),
        2 * usize::from(EACH) + 2
    );
    for port in [FIRST, FIRST + EACH / 2, FIRST + EACH - 1] {
        answers(&topology, port);
    }
    let ports = usize::from(EACH) + 65535;
    assert_eq!(keys(&topology, "services6").len(), ports);

    std::fs::write(&config, text("source-hash")).expect("our own file");
    topology.signal(daemon, libc::SIGHUP);
    wait_until("the new scheduler everywhere", || {
        let list = topology.json(&["service", "list"]);
        let list = list.as_array().expect("a listing is an array").clone();
        list.iter()
            .filter(|s| s["protocol"] == "tcp")
            .all(|s| s["scheduler"] == "source-hash")
    });
    answers(&topology, FIRST + EACH - 1);

    // The next daemon finds all of it.
    topology.kill(daemon);
    topology.daemon(&config);
    topology.wait_backends_up(None, 4 * usize::from(EACH) + 4);
    answers(&topology, FIRST + 1);
    assert_eq!(topology.json(&["status"])["adopted"], true);
}
