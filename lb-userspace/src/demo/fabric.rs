//! The demonstration's network: one Ethernet segment, a bridge in a namespace of its own, with a
//! port for every node.
//!
//! ```text
//!    client          balancer         app1           app2           app3
//!  198.18.0.10     198.18.0.1     198.18.0.11    198.18.0.12    198.18.0.13
//!   eth0 │           eth0 │           eth0 │         eth0 │         eth0 │
//!  ──────┴────────────────┴────────────────┴──────────────┴──────────────┴── bridge
//! ```
//!
//! The balancer is one-armed, as most are: packets arrive and leave by the same interface. The VIP
//! is on link for the client (a route without a gateway), so the client asks for it by ARP and the
//! XDP program answers, as it would for any host on the balancer's segment.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netns::Namespace;
use crate::dataplane::{OwnedLink, attach_stub};

/// Where the client is.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 10);
/// Where the balancer is.
pub const BALANCER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// What the client asks for.
pub const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 10), 80);
/// Backends, by name.
pub const BACKENDS: [(&str, SocketAddrV4); 3] = [
    (
        "app1",
        SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 11), 8080),
    ),
    (
        "app2",
        SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 12), 8080),
    ),
    (
        "app3",
        SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 13), 8080),
    ),
];
/// The one interface of every node.
pub const INTERFACE: &str = "eth0";
/// The bridge's port to the balancer.
const PORT: &str = "balancer";
const PREFIX: u8 = 24;

/// The namespaces, wired and addressed.
pub struct Fabric {
    /// Holds the bridge.
    _bridge: Namespace,
    /// Holds the client.
    pub client: Namespace,
    /// Holds the daemon.
    pub balancer: Namespace,
    /// One for each of [`BACKENDS`].
    pub backends: [Namespace; 3],
    /// The program on the bridge's port to the balancer: a veth delivers what XDP sends back only
    /// if its peer runs XDP as well. The namespaces are dropped first; the link goes with them.
    _stub: OwnedLink,
}

impl Fabric {
    /// Makes all of it.
    pub async fn new() -> Result<Self> {
        let [bridge, client, balancer] = [Namespace::new()?, Namespace::new()?, Namespace::new()?];
        let backends = [Namespace::new()?, Namespace::new()?, Namespace::new()?];
        let mut nodes = vec![("client", CLIENT, &client), (PORT, BALANCER, &balancer)];
        for ((name, address), node) in BACKENDS.iter().zip(&backends) {
            nodes.push((name, *address.ip(), node));
        }
        let ends = nodes
            .iter()
            .map(|&(name, _, node)| Ok((name, node.as_fd().try_clone_to_owned()?)))
            .collect::<Result<Vec<_>>>()?;
        let connected = bridge.run("fabric", async || {
            connect(ends).await?;
            attach_stub(PORT)
        });
        let stub = connected.await?;
        for (name, address, node) in nodes {
            node.run(name, async move || configure(name, address).await)
                .await?;
        }
        Ok(Self {
            _bridge: bridge,
            client,
            balancer,
            backends,
            _stub: stub,
        })
    }
}

/// In the bridge's namespace: the bridge, and a veth pair into each node's namespace.
async fn connect(nodes: Vec<(&'static str, OwnedFd)>) -> Result<()> {
    let netlink = netlink()?;
    netlink
        .link()
        .add(LinkBridge::new("bridge").build())
        .execute()
        .await
        .context("cannot make a bridge; is the kernel built with CONFIG_BRIDGE?")?;
    let bridge = index(&netlink, "bridge").await?;
    for (name, namespace) in nodes {
        let port = LinkVeth::new(name, INTERFACE).controller(bridge).up();
        netlink
            .link()
            .add(port.build())
            .execute()
            .await
            .with_context(|| format!("cannot make the veth pair of {name}"))?;
        let end = LinkUnspec::new_with_name(INTERFACE).setns_by_fd(namespace.as_raw_fd());
        netlink
            .link()
            .set(end.build())
            .execute()
            .await
            .with_context(|| format!("cannot move the veth of {name} into its namespace"))?;
    }
    Ok(())
}

/// In a node's namespace: addresses, links up, and the client's route to the VIP.
async fn configure(name: &str, address: Ipv4Addr) -> Result<()> {
    let netlink = netlink()?;
    let context = || format!("cannot set up the interface of {name}");
    for interface in ["lo", INTERFACE] {
        let up = LinkUnspec::new_with_name(interface).up().build();
        netlink
            .link()
            .set(up)
            .execute()
            .await
            .with_context(context)?;
    }
    let interface = index(&netlink, INTERFACE).await?;
    netlink
        .address()
        .add(interface, address.into(), PREFIX)
        .execute()
        .await
        .with_context(context)?;
    if address == CLIENT {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(*VIP.ip(), 32)
            .output_interface(interface)
            .build();
        netlink
            .route()
            .add(route)
            .execute()
            .await
            .with_context(context)?;
    }
    Ok(())
}

fn netlink() -> Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open rtnetlink")?;
    tokio::spawn(connection);
    Ok(handle)
}

async fn index(netlink: &Handle, name: &str) -> Result<u32> {
    let link = netlink
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
        .with_context(|| format!("interface {name}"))?
        .with_context(|| format!("interface {name}: there is none"))?;
    Ok(link.header.index)
}
