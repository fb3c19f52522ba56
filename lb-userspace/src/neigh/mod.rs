//! Next hops: to which MAC address, through which interface and from which address a packet for a
//! backend leaves.
//!
//! The data plane never looks a route or a neighbour up. [`Neighbours`] asks the kernel once for
//! each target, listens for changes of routes, neighbours, links and addresses, and reports when
//! an answer changes. See `docs/neighbours.md`.

mod kernel;
mod networks;
mod ports;
mod table;
mod worker;

#[cfg(test)]
pub(crate) mod netns;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, io, net::IpAddr, sync::Arc};

use tokio::sync::{mpsc, watch};

pub use self::networks::{Network, networks};
pub use self::ports::{ephemeral_port_range, nat_port_range};

/// How packets reach a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the interface they leave through.
    pub ifindex: u32,
    /// Its name.
    pub ifname: String,
    /// MAC address of the next hop: the target itself, or the gateway towards it.
    pub destination: [u8; 6],
    /// MAC address of the interface.
    pub source: [u8; 6],
    /// The host's own address towards the target, of the target's family.
    pub address: IpAddr,
    /// Largest IP packet that fits: the smaller of the interface's MTU and the route's.
    pub mtu: u32,
    /// Whether the next hop is the target itself, not a gateway.
    pub direct: bool,
    /// Where they may leave instead if the interface is that of a VLAN: the interfaces below it,
    /// the next one first.
    pub below: Vec<Below>,
}

/// An interface below that of a VLAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Below {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub ifname: String,
    /// VLAN tags that packets leave it with, packed as in [`lb_common::vlan`].
    pub tags: u32,
}

/// What is known about the way to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Packets can be sent.
    Resolved(NextHop),
    /// It is an address of this host: the kernel delivers packets itself.
    Local,
    /// They cannot.
    Unresolved {
        /// Why, and what to look at, in one line.
        reason: String,
    },
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The kernel's number for it.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MAC address; `None` where the link is not Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet that fits.
    pub mtu: u32,
    /// Kind as `ip -d link` names it (`veth`, `bridge`, `vlan`, ...); `physical` for a NIC, `loopback`
    /// for the loopback interface.
    pub kind: String,
    /// Whether it is switched on and has a carrier.
    pub up: bool,
    /// For an interface of a VLAN: the index of the one below it, and the tag that packets get
    /// there, packed as in [`lb_common::vlan`].
    pub vlan: Option<(u32, u16)>,
}

/// What can go wrong with netlink.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel refused a request.
    #[error("netlink: cannot {action}: {source}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No interface of that name.
    #[error("interface {0} does not exist; see \"ip link\"")]
    NoInterface(String),
}

/// A handle to the task that keeps next hops fresh. Dropping it ends the task.
#[derive(Debug)]
pub struct Neighbours {
    targets: watch::Sender<HashSet<IpAddr>>,
    local: watch::Receiver<Arc<HashSet<IpAddr>>>,
}

impl Neighbours {
    /// Starts the task on the current runtime, in the network namespace of the calling thread.
    ///
    /// The receiver gets an item when the resolution of a target becomes known and whenever it
    /// changes. A target that is still being asked for the first time has none yet; silence ends
    /// after about three seconds with [`Resolution::Unresolved`].
    ///
    /// # Errors
    ///
    /// When no netlink socket can be opened.
    pub fn spawn(
        targets: HashSet<IpAddr>,
    ) -> Result<(Self, mpsc::Receiver<(IpAddr, Resolution)>), Error> {
        let (targets, wanted) = watch::channel(targets);
        let (local_sender, local) = watch::channel(Arc::default());
        let (events, receiver) = mpsc::channel(1024);
        worker::spawn(wanted, local_sender, events)?;
        Ok((Self { targets, local }, receiver))
    }

    /// Replaces the set of targets. Those that stay are not asked again.
    pub fn set_targets(&self, targets: HashSet<IpAddr>) {
        self.targets.send_if_modified(|current| {
            let changed = *current != targets;
            *current = targets;
            changed
        });
    }

    /// All addresses that an interface of this host holds, now and whenever the set changes.
    ///
    /// Empty until the task has asked for the first time; [`local_addresses`] asks at once.
    #[must_use]
    pub fn local_addresses(&self) -> watch::Receiver<Arc<HashSet<IpAddr>>> {
        self.local.clone()
    }
}

/// Asks the kernel for an interface by its name.
///
/// # Errors
///
/// When it does not exist, or netlink fails.
pub async fn interface(name: &str) -> Result<Interface, Error> {
    kernel::Kernel::connect()?.interface(name).await
}

/// Asks the kernel for all addresses that interfaces of this host hold.
///
/// # Errors
///
/// When netlink fails.
pub async fn local_addresses() -> Result<HashSet<IpAddr>, Error> {
    let held = kernel::Kernel::connect()?.addresses().await?;
    Ok(held.into_iter().map(|(_, address)| address).collect())
}

/// Asks the kernel for all addresses, each with the index of the interface that holds it.
///
/// # Errors
///
/// When netlink fails.
pub async fn interface_addresses() -> Result<HashSet<(u32, IpAddr)>, Error> {
    kernel::Kernel::connect()?.addresses().await
}

/// Ends the kernel's care for every neighbour entry that a [`Neighbours`] of this or an earlier
/// process asked it to keep. The entries themselves age as usual.
///
/// # Errors
///
/// When netlink fails.
pub async fn release_all() -> Result<(), Error> {
    let kernel = kernel::Kernel::connect()?;
    for (hop, entry) in kernel.neighbours().await? {
        if entry.kept_by_us {
            kernel.release(hop).await?;
        }
    }
    Ok(())
}
