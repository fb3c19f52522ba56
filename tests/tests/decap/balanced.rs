//! The whole way: client, balancer in `ipip` or `gue`, backends with `sluice decap`, and their answers
//! straight to the client.

use super::{client_address, peer_seen_by_backend, start, transfer};
use sluice_tests::topology::{Options, Topology, sluice_bin, url};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A VIP, and whether its backends are addressed by IPv6: each family in each.
fn services() -> [(IpAddr, bool); 4] {
    let v4 = |host| IpAddr::V4(Ipv4Addr::new(203, 0, 113, host));
    let v6 = |host| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x80, 0, 0, 0, 0, host));
    [
        (v4(80), false),
        (v4(81), true),
        (v6(0x80), true),
        (v6(0x81), false),
    ]
}

fn config(net: &Topology, forward: &str) -> String {
    let mut text = net.daemon_section();
    for (n, (vip, outer6)) in services().into_iter().enumerate() {
        // At 9000 only one backend, so that a server on it sees the client.
        for (port, hosts) in [(8080, &["b1", "b2"][..]), (9000, &["b1"])] {
            let listen = std::net::SocketAddr::new(vip, port);
            let _ = write!(
                text,
                "[[service]]\nname = \"s{n}-{port}\"\nlisten = \"{listen}\"\nprotocol = \"tcp\"\n\
                 forward = \"{forward}\"\nscheduler = \"round-robin\"\n"
            );
            for host in hosts {
                let address: IpAddr = if outer6 {
                    net.v6(host).into()
                } else {
                    net.v4(host).into()
                };
                let address = std::net::SocketAddr::new(address, port);
                let _ = write!(text, "[[service.backend]]\naddress = \"{address}\"\n");
            }
        }
    }
    text
}

fn prepare_backend(net: &Topology, host: &str, mode: &str) {
    for (vip, _) in services() {
        let vip = format!("{vip}/{}", if vip.is_ipv4() { 32 } else { 128 });
        net.run(host, "ip", &["addr", "add", &vip, "dev", "lo"])
            .ok();
    }
    for (key, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        let setting = format!("net.ipv4.conf.all.{key}={value}");
        net.run(host, "sysctl", &["-w", &setting]).ok();
    }
    net.nginx(host);
    start(net, host, &["--mode", mode]);
}

/// Packets by outcome on a backend; those that are zero are left out.
fn counted(net: &Topology, host: &str) -> BTreeMap<String, u64> {
    let text = net
        .run(
            host,
            sluice_bin(),
            &["decap", "eth0", "--status", "-o", "json"],
        )
        .ok();
    let status: serde_json::Value = serde_json::from_str(&text).expect("status is JSON");
    let counters = status["counters"].as_array().expect("counters").iter();
    counters
        .map(|c| {
            let name = c["outcome"].as_str().expect("a name").to_owned();
            (name, c["packets"].as_u64().expect("a number"))
        })
        .filter(|(_, packets)| *packets != 0)
        .collect()
}

fn serve(forward: &str, tx_offload: bool, mode: &str) {
    let net = Topology::new(Options {
        backends: 2,
        tx_offload,
        ..Options::default()
    });
    for host in ["b1", "b2"] {
        prepare_backend(&net, host, mode);
    }
    let config = net.config("sluice.toml", &config(&net, forward));
    net.daemon(&config);
    net.wait_backends_up(None, 12);
    for (vip, outer6) in services() {
        let page = url(vip, 8080, "/");
        let answers: Vec<String> = (0..10)
            .map(|_| net.curl("client", &[&page]).ok().trim().to_owned())
            .collect();
        for host in ["b1", "b2"] {
            let count = answers.iter().filter(|a| *a == host).count();
            assert_eq!(count, 5, "{vip}, IPv6 outside: {outer6}: {answers:?}");
        }
        transfer(&net, vip);
        assert_eq!(peer_seen_by_backend(&net, vip), client_address(&net, vip));
    }
    for host in ["b1", "b2"] {
        let counted = counted(&net, host);
        let outcomes: Vec<&str> = counted.keys().map(String::as_str).collect();
        assert_eq!(outcomes, [forward], "{host}: {counted:?}");
    }
}

#[test]
fn ipip_reaches_backends_of_both_families() {
    serve("ipip", true, "driver");
}

#[test]
fn gue_reaches_backends_of_both_families() {
    serve("gue", true, "driver");
}

#[test]
fn ipip_with_finished_checksums_in_generic_mode() {
    serve("ipip", false, "generic");
}

#[test]
fn gue_with_finished_checksums_in_generic_mode() {
    serve("gue", false, "generic");
}
