//! What backends need in each forward mode, as `docs/forward-modes.md` tells people.

use crate::topology::{Topology, VIP4, VIP6, sluice_bin, wait_until};
use std::net::{Ipv4Addr, Ipv6Addr};

/// `ip` with these arguments, on a host.
///
/// # Panics
///
/// If it fails.
#[track_caller]
pub fn ip(net: &Topology, host: &str, args: &[&str]) {
    net.run(host, "ip", args).ok();
}

/// What a backend needs in `dnat`: a way back to the clients that leads through the balancer.
pub fn route_through_the_balancer(net: &Topology, host: &str, balancer: (Ipv4Addr, Ipv6Addr)) {
    let (v4, v6) = (balancer.0.to_string(), balancer.1.to_string());
    ip(net, host, &["route", "add", "default", "via", &v4]);
    ip(net, host, &["-6", "route", "add", "default", "via", &v6]);
}

/// What a backend needs in the other modes: the VIPs, without answering ARP for them.
pub fn hold_the_vips(net: &Topology, host: &str) {
    for vip in [format!("{VIP4}/32"), format!("{VIP6}/128")] {
        ip(net, host, &["addr", "add", &vip, "dev", "lo"]);
    }
    for setting in ["arp_ignore=1", "arp_announce=2"] {
        let setting = format!("net.ipv4.conf.all.{setting}");
        net.run(host, "sysctl", &["-w", &setting]).ok();
    }
}

/// What takes packets out of `ipip` and `gue`.
///
/// # Panics
///
/// If it ends.
pub fn decapsulate(net: &Topology, host: &str) {
    let label = format!("decap-{host}");
    let mut command = net.command(host, sluice_bin());
    command.args(["decap", "eth0"]);
    let pid = net.spawn(&label, command);
    wait_until("decap to be attached", || {
        assert_eq!(net.exit_code(pid), None, "{}", net.log(&label));
        let link = net.run(host, "ip", &["link", "show", "eth0"]).ok();
        link.contains("xdp")
    });
}
