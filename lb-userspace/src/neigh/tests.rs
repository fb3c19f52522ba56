//! Next hops against the real kernel, in network namespaces.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use tokio::{runtime::Runtime, sync::mpsc};

use super::{Neighbours, NextHop, Resolution, interface, local_addresses, netns::Namespace};

/// Far beyond what anything here takes: the kernel gives up on a neighbour after three seconds.
const DEADLINE: Duration = Duration::from_secs(20);

/// The balancer with its `b0` and a peer with its `p0`, on one segment.
struct Bench {
    balancer: Namespace,
    peer: Namespace,
}

impl Bench {
    fn new() -> Option<Self> {
        let (balancer, peer) = (Namespace::new()?, Namespace::new()?);
        balancer.cable("b0", &peer, "p0");
        balancer.ip("address add 198.18.0.1/24 dev b0");
        balancer.ip("address add 2001:db8::1/64 dev b0 nodad");
        peer.ip("link set p0 address 02:00:00:00:00:02");
        peer.ip("address add 198.18.0.2/24 dev p0");
        peer.ip("address add 2001:db8::2/64 dev p0 nodad");
        Some(Self { balancer, peer })
    }

    fn watch(&self, targets: &[&str]) -> Watch {
        self.watch_all(targets.iter().map(|target| address(target)).collect())
    }

    /// Runs the task on a runtime in the balancer's namespace, in a thread of its own.
    fn watch_all(&self, targets: HashSet<IpAddr>) -> Watch {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (events, heard) = mpsc::unbounded_channel();
        let (jobs, mut queue) = mpsc::unbounded_channel::<Box<dyn FnOnce() + Send>>();
        self.balancer.run(move || {
            // A thread inherits the namespace of the one that makes it.
            std::thread::spawn(move || {
                block_on(async move {
                    let (handle, mut receiver) = Neighbours::spawn(targets).unwrap();
                    sender.send(handle).unwrap();
                    tokio::select! {
                        () = async {
                            while let Some(event) = receiver.recv().await {
                                let _ = events.send(event);
                            }
                        } => {}
                        // Ends with the `Watch`.
                        () = async {
                            while let Some(job) = queue.recv().await {
                                job();
                            }
                        } => {}
                    }
                });
            });
        });
        Watch {
            handle: receiver.recv().unwrap(),
            heard,
            known: HashMap::new(),
            jobs,
            runtime: runtime(),
        }
    }

    fn ask<F, T>(&self, question: F) -> F::Output
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        self.balancer.run(move || block_on(question))
    }
}

struct Watch {
    handle: Neighbours,
    heard: mpsc::UnboundedReceiver<(IpAddr, Resolution)>,
    known: HashMap<IpAddr, Resolution>,
    /// What the task's only thread is to do meanwhile.
    jobs: mpsc::UnboundedSender<Box<dyn FnOnce() + Send>>,
    runtime: Runtime,
}

impl Watch {
    /// Waits until the resolution of `target` satisfies `condition`.
    fn until(&mut self, target: &str, condition: impl Fn(&Resolution) -> bool) -> Resolution {
        let target = address(target);
        self.runtime.block_on(async {
            let wait = async {
                loop {
                    if let Some(known) = self.known.get(&target)
                        && condition(known)
                    {
                        return known.clone();
                    }
                    let (about, resolution) = self.heard.recv().await.expect("the task runs");
                    self.known.insert(about, resolution);
                }
            };
            let result = tokio::time::timeout(DEADLINE, wait).await;
            result.unwrap_or_else(|_| panic!("{target} is still {:?}", self.known.get(&target)))
        })
    }

    fn resolved(&mut self, target: &str) -> NextHop {
        let found = self.until(target, |known| matches!(known, Resolution::Resolved(_)));
        match found {
            Resolution::Resolved(hop) => hop,
            Resolution::Local | Resolution::Unresolved { .. } => unreachable!("just excluded"),
        }
    }

    fn unresolved(&mut self, target: &str) -> String {
        let found = self.until(target, |known| {
            matches!(known, Resolution::Unresolved { .. })
        });
        match found {
            Resolution::Unresolved { reason } => reason,
            Resolution::Local | Resolution::Resolved(_) => unreachable!("just excluded"),
        }
    }

    /// Waits until the target is known to be this host itself.
    fn local(&mut self, target: &str) {
        self.until(target, |known| *known == Resolution::Local);
    }

    fn set(&self, targets: &[&str]) {
        self.handle
            .set_targets(targets.iter().map(|target| address(target)).collect());
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

fn block_on<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[test]
fn a_neighbour_is_found_in_both_families() {
    let Some(bench) = Bench::new() else { return };
    bench.balancer.ip("link set b0 mtu 1400");
    let b0 = bench.ask(interface("b0")).unwrap();
    let mut watch = bench.watch(&["198.18.0.2", "2001:db8::2"]);
    for (target, source) in [("198.18.0.2", "198.18.0.1"), ("2001:db8::2", "2001:db8::1")] {
        let expected = NextHop {
            ifindex: b0.index,
            ifname: "b0".to_owned(),
            destination: PEER,
            source: b0.mac.unwrap(),
            address: address(source),
            mtu: 1400,
            direct: true,
            below: Vec::new(),
        };
        assert_eq!(watch.resolved(target), expected);
    }
}

#[test]
fn an_announced_change_of_mac_is_noticed() {
    let Some(bench) = Bench::new() else { return };
    bench.peer.sysctl("net.ipv4.conf.p0.arp_notify", "1");
    let mut watch = bench.watch(&["198.18.0.2"]);
    assert_eq!(watch.resolved("198.18.0.2").destination, PEER);
    bench.peer.ip("link set p0 address 02:00:00:00:00:03");
    watch.until("198.18.0.2", has_mac([2, 0, 0, 0, 0, 3]));
    // The balancer's own.
    bench.balancer.ip("link set b0 address 02:00:00:00:00:04");
    watch.until(
        "198.18.0.2",
        |known| matches!(known, Resolution::Resolved(hop) if hop.source == [2, 0, 0, 0, 0, 4]),
    );
}

#[test]
fn a_silent_change_of_mac_is_noticed_by_the_kernels_probes() {
    let Some(bench) = Bench::new() else { return };
    for (name, value) in [
        ("base_reachable_time_ms", "500"),
        ("interval_probe_time_ms", "200"),
        ("retrans_time_ms", "100"),
        ("delay_first_probe_time", "1"),
    ] {
        bench
            .balancer
            .sysctl(&format!("net.ipv4.neigh.b0.{name}"), value);
    }
    let mut watch = bench.watch(&["198.18.0.2"]);
    assert_eq!(watch.resolved("198.18.0.2").destination, PEER);
    bench.peer.ip("link set p0 address 02:00:00:00:00:03");
    watch.until("198.18.0.2", has_mac([2, 0, 0, 0, 0, 3]));
}

fn has_mac(mac: [u8; 6]) -> impl Fn(&Resolution) -> bool {
    move |known| matches!(known, Resolution::Resolved(hop) if hop.destination == mac)
}

#[test]
fn a_link_that_goes_down_is_noticed() {
    let Some(bench) = Bench::new() else { return };
    let mut watch = bench.watch(&["198.18.0.2"]);
    let reason = "interface b0 is down; see \"ip link show b0\"";
    watch.resolved("198.18.0.2");
    // The other end: no carrier.
    bench.peer.ip("link set p0 down");
    assert_eq!(watch.unresolved("198.18.0.2"), reason);
    bench.peer.ip("link set p0 up");
    watch.resolved("198.18.0.2");
    // This end.
    bench.balancer.ip("link set b0 down");
    assert_eq!(watch.unresolved("198.18.0.2"), reason);
    bench.balancer.ip("link set b0 up");
    watch.resolved("198.18.0.2");
    // The whole interface, which goes down on its way out.
    bench.balancer.ip("link del b0");
    watch.until("198.18.0.2", |known| {
        let no_route = "no route to 198.18.0.2; see \"ip route get 198.18.0.2\"";
        matches!(known, Resolution::Unresolved { reason } if reason == no_route)
    });
}

#[test]
fn routes_come_change_and_go() {
    let Some(bench) = Bench::new() else { return };
    bench.balancer.cable("b1", &bench.peer, "p1");
    bench.balancer.ip("address add 198.19.0.1/24 dev b1");
    bench.peer.ip("link set p1 address 02:00:00:00:00:12");
    bench.peer.ip("address add 198.19.0.2/24 dev p1");
    let mut watch = bench.watch(&["203.0.113.9"]);
    let no_route = "no route to 203.0.113.9; see \"ip route get 203.0.113.9\"";
    assert_eq!(watch.unresolved("203.0.113.9"), no_route);
    bench.balancer.ip("route add 203.0.113.0/24 via 198.18.0.2");
    let first = watch.resolved("203.0.113.9");
    assert_eq!((first.destination, first.ifname.as_str()), (PEER, "b0"));
    bench
        .balancer
        .ip("route replace 203.0.113.0/24 via 198.19.0.2 mtu 1300");
    watch.until("203.0.113.9", has_mac([2, 0, 0, 0, 0, 0x12]));
    let second = watch.resolved("203.0.113.9");
    assert_eq!(second.ifname, "b1");
    assert_eq!(second.address, address("198.19.0.1"));
    assert_eq!(second.mtu, 1300);
    // An IPv4 route through an IPv6 gateway.
    bench
        .balancer
        .ip("route replace 203.0.113.0/24 via inet6 2001:db8::2 dev b0");
    watch.until("203.0.113.9", has_mac(PEER));
    bench.balancer.ip("route replace blackhole 203.0.113.0/24");
    assert_eq!(
        watch.unresolved("203.0.113.9"),
        "the route to 203.0.113.9 is a blackhole; see \"ip route get 203.0.113.9\""
    );
    bench.balancer.ip("route del blackhole 203.0.113.0/24");
    watch.until(
        "203.0.113.9",
        |known| matches!(known, Resolution::Unresolved { reason } if reason == no_route),
    );
    bench
        .balancer
        .ip("route add 203.0.113.0/24 via 198.18.0.77");
    watch.until("203.0.113.9", |known| {
        let silent = "gateway 198.18.0.77 towards 203.0.113.9 does not answer ARP on b0";
        matches!(known, Resolution::Unresolved { reason } if reason == silent)
    });
}

#[test]
fn routes_over_next_hop_objects_are_followed() {
    let Some(bench) = Bench::new() else { return };
    bench.balancer.cable("b1", &bench.peer, "p1");
    bench.balancer.ip("address add 198.19.0.1/24 dev b1");
    bench.peer.ip("link set p1 address 02:00:00:00:00:12");
    bench.peer.ip("address add 198.19.0.2/24 dev p1");
    bench.balancer.ip("nexthop add id 7 via 198.18.0.2 dev b0");
    bench.balancer.ip("route add 203.0.113.0/24 nhid 7");
    let mut watch = bench.watch(&["203.0.113.9"]);
    assert_eq!(watch.resolved("203.0.113.9").destination, PEER);
    bench
        .balancer
        .ip("nexthop replace id 7 via 198.19.0.2 dev b1");
    watch.until("203.0.113.9", has_mac([2, 0, 0, 0, 0, 0x12]));
    // The kernel then tells of the object only, not of its routes.
    bench.balancer.sysctl("net.ipv4.nexthop_compat_mode", "0");
    bench
        .balancer
        .ip("nexthop replace id 7 via 198.18.0.2 dev b0");
    watch.until("203.0.113.9", has_mac(PEER));
    bench.balancer.ip("nexthop del id 7");
    watch.unresolved("203.0.113.9");
}

#[test]
fn silence_is_reported_and_asked_again() {
    let Some(bench) = Bench::new() else { return };
    let mut watch = bench.watch(&["198.18.0.77", "2001:db8::77"]);
    assert_eq!(
        watch.unresolved("198.18.0.77"),
        "198.18.0.77 does not answer ARP on b0"
    );
    assert_eq!(
        watch.unresolved("2001:db8::77"),
        "2001:db8::77 does not answer neighbour discovery on b0"
    );
    bench.peer.ip("address add 198.18.0.77/24 dev p0");
    bench.peer.ip("address add 2001:db8::77/64 dev p0 nodad");
    assert_eq!(watch.resolved("198.18.0.77").destination, PEER);
    assert_eq!(watch.resolved("2001:db8::77").destination, PEER);
}

#[test]
fn own_and_broadcast_addresses_have_no_next_hop() {
    let Some(bench) = Bench::new() else { return };
    let mut watch = bench.watch(&["198.18.0.1", "198.18.0.255"]);
    watch.local("198.18.0.1");
    assert_eq!(
        watch.unresolved("198.18.0.255"),
        "198.18.0.255 is a broadcast or multicast address"
    );
}

#[test]
fn local_addresses_are_followed() {
    let Some(bench) = Bench::new() else { return };
    let held = bench.ask(local_addresses()).unwrap();
    for own in ["198.18.0.1", "2001:db8::1", "127.0.0.1", "::1"] {
        assert!(held.contains(&address(own)), "{own} is not in {held:?}");
    }
    let watch = bench.watch(&[]);
    let mut local = watch.handle.local_addresses();
    let vip = address("203.0.113.80");
    let mut wait = |present: bool| {
        block_on(async {
            let change = local.wait_for(|held| !held.is_empty() && held.contains(&vip) == present);
            tokio::time::timeout(DEADLINE, change)
                .await
                .expect("noticed in time")
                .expect("the task runs");
        });
    };
    wait(false);
    bench.balancer.ip("address add 203.0.113.80/32 dev lo");
    wait(true);
    bench.balancer.ip("address del 203.0.113.80/32 dev lo");
    wait(false);
}

#[test]
fn a_target_that_is_dropped_is_given_back_to_the_kernel() {
    let Some(bench) = Bench::new() else { return };
    let mut watch = bench.watch(&["198.18.0.2"]);
    watch.resolved("198.18.0.2");
    let managed = || {
        let entries = bench.balancer.command("ip", "neighbour show dev b0");
        let entry = entries.lines().find(|line| line.starts_with("198.18.0.2 "));
        entry.is_some_and(|entry| entry.contains("managed"))
    };
    if !managed() {
        eprintln!("skipped: managed neighbour entries need Linux 5.16");
        return;
    }
    watch.set(&["2001:db8::2"]);
    watch.resolved("2001:db8::2");
    let deadline = std::time::Instant::now() + DEADLINE;
    while managed() {
        assert!(std::time::Instant::now() < deadline, "still managed");
        std::thread::yield_now();
    }
    // The same at the end of the data plane, for all of them.
    bench.ask(super::release_all()).unwrap();
    let entries = bench.balancer.command("ip", "neighbour show dev b0");
    assert!(!entries.contains("managed"), "{entries}");
}

#[test]
fn lost_events_are_made_up_for() {
    let Some(bench) = Bench::new() else { return };
    let mut watch = bench.watch(&["198.18.0.2"]);
    assert_eq!(watch.resolved("198.18.0.2").destination, PEER);
    // Hold the task up until the socket has lost events, the one that matters among them.
    let (resume, resumed) = std::sync::mpsc::channel::<()>();
    let held = watch.jobs.send(Box::new(move || {
        let _ = resumed.recv();
    }));
    assert!(held.is_ok());
    let many: String = (0..20_000u32)
        .map(|number| {
            let base = Ipv4Addr::new(198, 19, 0, 1).to_bits();
            let address = Ipv4Addr::from_bits(base + number);
            format!("neighbour add {address} lladdr 02:00:00:00:00:99 nud permanent dev b0\n")
        })
        .collect();
    let path = std::env::temp_dir().join(format!("slc-{}-flood", std::process::id()));
    std::fs::write(&path, many).unwrap();
    bench.balancer.ip(&format!("-batch {}", path.display()));
    std::fs::remove_file(&path).unwrap();
    bench
        .balancer
        .ip("neighbour replace 198.18.0.2 lladdr 02:00:00:00:00:05 nud permanent dev b0");
    let sockets = bench.balancer.command("cat", "/proc/net/netlink");
    let lost = sockets.lines().skip(1).any(|line| {
        let drops = line.split_whitespace().nth(8);
        drops.is_some_and(|drops| drops != "0")
    });
    assert!(lost, "the flood was too small to lose events:\n{sockets}");
    resume.send(()).unwrap();
    watch.until("198.18.0.2", has_mac([2, 0, 0, 0, 0, 5]));
}

#[test]
fn an_interface_is_described() {
    let Some(bench) = Bench::new() else { return };
    let b0 = bench.ask(interface("b0")).unwrap();
    assert_eq!((b0.kind.as_str(), b0.mtu, b0.up), ("veth", 1500, true));
    assert!(b0.mac.is_some());
    let lo = bench.ask(interface("lo")).unwrap();
    assert_eq!((lo.kind.as_str(), lo.mac), ("loopback", None));
    for missing in ["b9", "", "a-name-that-no-interface-can-have"] {
        let error = bench.ask(interface(missing)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("interface {missing} does not exist; see \"ip link\"")
        );
    }
}

#[test]
fn ten_thousand_targets() {
    let Some(bench) = Bench::new() else { return };
    bench.balancer.ip("route add 198.19.0.0/16 via 198.18.0.2");
    let targets: HashSet<IpAddr> = (0..10_000u32)
        .map(|number| {
            let base = Ipv4Addr::new(198, 19, 0, 1).to_bits();
            IpAddr::V4(Ipv4Addr::from_bits(base + number))
        })
        .collect();
    let mut watch = bench.watch_all(targets.clone());
    for target in &targets {
        assert_eq!(watch.resolved(&target.to_string()).destination, PEER);
    }
    // One event moves them all.
    bench.peer.sysctl("net.ipv4.conf.p0.arp_notify", "1");
    bench.peer.ip("link set p0 address 02:00:00:00:00:03");
    for target in &targets {
        watch.until(&target.to_string(), has_mac([2, 0, 0, 0, 0, 3]));
    }
}
