//! Health checks that take the traffic's way, as `docs/health-checks.md` says.

use crate::support::QUICK_HEALTH;
use serde_json::Value;
use sluice_tests::{
    backends::{decapsulate, hold_the_vips, ip},
    topology::{Options, Topology, VIP4, VIP6, wait_until},
};
use std::{fmt::Write as _, net::SocketAddr};

/// Where nginx listens: nothing of the packet is rewritten.
const PORT: u16 = 8080;

/// Two backends in `mode`; `more` are further services.
fn config(net: &Topology, mode: &str, more: &str) -> String {
    let mut text = net.daemon_section();
    for vip in [
        SocketAddr::new(VIP4.into(), PORT),
        SocketAddr::new(VIP6.into(), PORT),
    ] {
        let _ = write!(
            text,
            "[[service]]\nname = \"s{}\"\nlisten = \"{vip}\"\nforward = \"{mode}\"\n{QUICK_HEALTH}",
            if vip.is_ipv4() { 4 } else { 6 }
        );
        for host in ["b1", "b2"] {
            let address = match vip {
                SocketAddr::V4(_) => net.v4(host).to_string(),
                SocketAddr::V6(_) => net.v6(host).to_string(),
            };
            let _ = write!(
                text,
                "[[service.backend]]\nname = \"{host}\"\naddress = \"{address}\"\n"
            );
        }
    }
    text + more
}

/// Waits until a backend is `state` for this reason in both families.
#[track_caller]
fn wait_for(net: &Topology, name: &str, state: &str, reason: &str) {
    wait_until(&format!("{name} to be {state}: {reason}"), || {
        let list = net.json(&["backend", "list"]);
        let lines = list.as_array().expect("a listing").iter();
        let so = |b: &&Value| b["name"] == name && b["state"] == state && b["reason"] == reason;
        lines.filter(so).count() == 2
    });
}

const GOOD: &str = "L7OK 200 OK";
const NO_VIP: &str =
    "L4TOUT no connection within 200ms through dsr: does the backend hold the VIP?";

fn drop_the_vips(net: &Topology, host: &str) {
    for vip in [format!("{VIP4}/32"), format!("{VIP6}/128")] {
        ip(net, host, &["addr", "del", &vip, "dev", "lo"]);
    }
}

#[test]
fn in_dsr_a_backend_without_the_vip_is_down() {
    let net = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        net.nginx(host);
    }
    hold_the_vips(&net, "b1");
    // What the balancer's own address is otherwise used for must not be in the way.
    let more = format!(
        "[[service]]\nname = \"own\"\nlisten = \"{}:81\"\n[[service.backend]]\naddress = \"{}:{PORT}\"\n",
        net.v4("lb"),
        net.v4("b1"),
    );
    net.daemon(&net.config("sluice.toml", &config(&net, "dsr", &more)));
    wait_for(&net, "b1", "up", GOOD);
    wait_for(&net, "b2", "down", NO_VIP);
    hold_the_vips(&net, "b2");
    wait_for(&net, "b2", "up", GOOD);
    // A balancer that holds the VIP itself would take no packets from there.
    for vip in [format!("{VIP4}/32"), format!("{VIP6}/128")] {
        ip(&net, "lb", &["addr", "add", &vip, "dev", "lo"]);
    }
    drop_the_vips(&net, "b1");
    wait_for(&net, "b1", "down", NO_VIP);
    hold_the_vips(&net, "b1");
    wait_for(&net, "b1", "up", GOOD);
    wait_for(&net, "b2", "up", GOOD);
}

#[test]
fn a_server_that_does_not_listen_on_the_vip_is_down() {
    let net = Topology::new(Options {
        backends: 2,
        tx_offload: false,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        hold_the_vips(&net, host);
    }
    net.nginx("b1");
    net.daemon(&net.config("sluice.toml", &config(&net, "dsr", "")));
    wait_for(&net, "b1", "up", GOOD);
    let nobody = "L4CON connection refused through dsr: does the server listen on the VIP?";
    wait_for(&net, "b2", "down", nobody);
}

#[test]
fn a_backend_that_lacks_the_vip_or_its_decapsulation_is_down() {
    for (mode, two_armed) in [("ipip", false), ("gue", true)] {
        let net = Topology::new(Options {
            backends: 2,
            two_armed,
            ..Options::default()
        });
        for host in ["b1", "b2"] {
            net.nginx(host);
            hold_the_vips(&net, host);
        }
        decapsulate(&net, "b1");
        let prefix = "encap_source = [\"10.99.0.0/16\", \"2001:db8:99::/96\"]\n";
        let text = config(&net, mode, "").replace("[limits]\n", &format!("{prefix}[limits]\n"));
        net.daemon(&net.config("sluice.toml", &text));
        wait_for(&net, "b1", "up", GOOD);
        let expected = format!(
            "L4TOUT no connection within 200ms through {mode}: does the backend take the \
             encapsulation off and hold the VIP?"
        );
        wait_for(&net, "b2", "down", &expected);
        decapsulate(&net, "b2");
        wait_for(&net, "b2", "up", GOOD);
        drop_the_vips(&net, "b1");
        wait_for(&net, "b1", "down", &expected);
    }
}

#[test]
fn the_programs_come_and_go_with_what_needs_them() {
    let net = Topology::new(Options {
        backends: 2,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        net.nginx(host);
        hold_the_vips(&net, host);
    }
    // The first check of each decides; it must not come before what leads it.
    let patient = config(&net, "dsr", "")
        .replace("timeout = \"200ms\"", "timeout = \"2s\"")
        .replace("interval = \"200ms\"", "interval = \"2s\"");
    net.daemon(&net.config("sluice.toml", &patient));
    net.wait_backends_up(None, 4);
    let log = net.log("sluice");
    assert_eq!(log.matches("is up, was starting").count(), 4, "{log}");
    assert_eq!(net.sluice(&["stop"]).code, 0);
    wait_until("the daemon to end", || net.sluice(&["status"]).code != 0);

    let dsr = config(&net, "dsr", "");
    let daemon = net.daemon(&net.config("sluice.toml", &dsr));
    net.wait_backends_up(None, 4);
    let pins = ["ingress_eth0", "egress_eth0"].map(|pin| net.pin_path().join(pin));
    assert!(pins.iter().all(|pin| pin.exists()));
    net.kill(daemon);
    let daemon = net.daemon(&net.dir().join("sluice.toml"));
    net.wait_backends_up(None, 4);
    drop_the_vips(&net, "b1");
    wait_for(&net, "b1", "down", NO_VIP);
    net.config("sluice.toml", &config(&net, "nat", ""));
    net.signal(daemon, libc::SIGHUP);
    // It does not need the VIP there.
    wait_for(&net, "b1", "up", GOOD);
    assert!(!pins.iter().any(|pin| pin.exists()), "nobody needs them");
    net.config("sluice.toml", &dsr);
    net.signal(daemon, libc::SIGHUP);
    wait_for(&net, "b1", "down", NO_VIP);
    assert!(pins.iter().all(|pin| pin.exists()));
}
