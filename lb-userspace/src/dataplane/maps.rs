//! The maps of the data plane, each with its types.

use super::{
    bpf,
    flow_table::{FlowEntries, FlowTable},
    listeners::{Bucketed, Listeners},
    map::{HashMap, PerCpuArray, Redirect, SharedArray, is_zero},
};
use crate::api::types::MapStatus;
use anyhow::{Context as _, Result};
use bytemuck::Pod;
use lb_common::{
    abi::{Pressure, Settings},
    addr::Address,
    backend::{Backend, Load, Slot},
    client::{AccessKey, Affinity, ClientKey, Source},
    flow::{Flow, FlowKey},
    flow_table::Entry,
    fragment::{Datagram, FragmentKey},
    local::{LocalSettings, Peer, PeerKey},
    probe::ProbeTarget,
    service::{ClientLink, Cursor, Gateway, Interface, Service, Vip},
    stats::Counters,
};
use std::{
    io,
    ops::AddAssign,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// An IPv6 address as a key: see [`lb_common::addr::Address`].
type V6 = [u32; 4];

macro_rules! maps {
    ($($(#[$doc:meta])* $name:ident: $type:ty),+ $(,)?) => {
        /// Every map that outlives the daemon, open and checked.
        ///
        /// `docs/architecture.md` says who writes which.
        #[derive(Debug)]
        pub struct Maps {
            $($(#[$doc])* pub $name: $type),+
        }

        /// The names of the maps that are pinned. The object may have others, which belong to one
        /// loaded program and go with it.
        pub const NAMES: &[&str] = &[$(stringify!($name)),+];

        impl Maps {
            /// Takes the descriptors that `fd` gives for each name.
            pub(super) fn from_fds(mut fd: impl FnMut(&str) -> Result<OwnedFd>) -> Result<Self> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        <$type>::from_fd(fd(name)?).with_context(|| format!("map {name}"))?
                    }),+
                })
            }

            /// The descriptor of every map, by its name.
            pub(super) fn fds(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
                vec![$((stringify!($name), self.$name.as_fd())),+]
            }

            /// How full each map is.
            pub fn status(&self) -> io::Result<Vec<MapStatus>> {
                Ok(vec![$(MapStatus {
                    name: stringify!($name).to_owned(),
                    entries: self.$name.entries(self)?,
                    max_entries: self.$name.max_entries().into(),
                }),+])
            }
        }
    };
}

maps! {
    /// What is common to all packets, and the ABI version.
    settings: SharedArray<Settings>,
    /// IPv4 addresses that `nat` sends from.
    nat_sources4: SharedArray<u32>,
    /// IPv6 addresses that `nat` sends from.
    nat_sources6: SharedArray<V6>,
    /// Lanes by a hash of the destination address: see [`lb_common::filter`].
    address_filter: SharedArray<u64>,
    /// IPv4 VIPs.
    vips4: HashMap<u32, Vip>,
    /// IPv6 VIPs.
    vips6: HashMap<V6, Vip>,
    /// Number of an IPv4 service.
    services4: Listeners<u32>,
    /// Number of an IPv6 service.
    services6: Listeners<V6>,
    /// Services by number.
    services: SharedArray<Service>,
    /// The way of answers that no flow is recorded for, by service number.
    gateways: SharedArray<Gateway>,
    /// Backends by number.
    backends: SharedArray<Backend>,
    /// Selection tables, one after the other.
    slots: SharedArray<Slot>,
    /// Round-robin positions by service number.
    cursors: SharedArray<Cursor>,
    /// IPv4 flows.
    flows4: FlowEntries<u32>,
    /// IPv6 flows.
    flows6: FlowEntries<V6>,
    /// The tags of sets of IPv4 flows: see [`lb_common::flow_table::Tags`].
    flow_sets4: SharedArray<u64>,
    /// The tags of sets of IPv6 flows.
    flow_sets6: SharedArray<u64>,
    /// IPv4 flows that began under pressure and are half open.
    opening4: HashMap<FlowKey<u32>, Flow<u32>>,
    /// IPv6 flows that began under pressure and are half open.
    opening6: HashMap<FlowKey<V6>, Flow<V6>>,
    /// Tick at which the last of these began.
    last_opening: SharedArray<u32>,
    /// How fast flows begin on each CPU.
    pressure: PerCpuArray<Pressure>,
    /// Fragmented datagrams in IPv4.
    fragments4: HashMap<FragmentKey<u32>, Datagram<u32>>,
    /// Fragmented datagrams in IPv6.
    fragments6: HashMap<FragmentKey<V6>, Datagram<V6>>,
    /// The backend that an IPv4 client returns to.
    affinity4: HashMap<ClientKey<u32>, Affinity>,
    /// The backend that an IPv6 client returns to.
    affinity6: HashMap<ClientKey<V6>, Affinity>,
    /// How fast an IPv4 client begins flows.
    sources4: HashMap<ClientKey<u32>, Source>,
    /// How fast an IPv6 client begins flows.
    sources6: HashMap<ClientKey<V6>, Source>,
    /// IPv4 clients that are allowed or denied.
    access4: HashMap<AccessKey<u32>, u32>,
    /// IPv6 clients that are allowed or denied.
    access6: HashMap<AccessKey<V6>, u32>,
    /// Live connections by backend number.
    backend_load: SharedArray<Load>,
    /// Counters by service number.
    service_stats: PerCpuArray<Counters>,
    /// Counters by backend number.
    backend_stats: PerCpuArray<Counters>,
    /// Packets by [`lb_common::stats::DropReason`].
    drops: PerCpuArray<u64>,
    /// Attached interfaces by index.
    interfaces: HashMap<u32, Interface>,
    /// These interfaces, as flows name them.
    links: SharedArray<ClientLink>,
    /// Interfaces that packets may be sent on.
    redirects: HashMap<u32, Redirect>,
    /// What concerns the host's own sockets: clients on it, and health checks.
    local_settings: SharedArray<LocalSettings>,
    /// Whom the sockets of clients on this host talk to.
    local_peers: HashMap<PeerKey, Peer>,
    /// What becomes of the packets of health checks, by their mark.
    probe_targets: SharedArray<ProbeTarget>,
    /// Which backend answers a health check.
    probes: HashMap<FlowKey<V6>, V6>,
}

impl Maps {
    /// Opens the maps pinned in `pins`, without the lock: for looking, beside a daemon or without
    /// one.
    pub fn open(pins: &Path) -> Result<Self> {
        Self::from_fds(|name| {
            let path = pins.join(name);
            bpf::open_pin(&path).with_context(|| path.display().to_string())
        })
    }
}

/// A family that has a flow table.
pub trait Flowing: Address {
    /// Its flow table in `maps`.
    ///
    /// # Errors
    ///
    /// When the kernel gives no second descriptor, or refuses to map the tags.
    fn flow_table(maps: &Maps) -> io::Result<FlowTable<Self>>;
}

impl Flowing for u32 {
    fn flow_table(maps: &Maps) -> io::Result<FlowTable<Self>> {
        let settings = maps.settings.as_fd();
        FlowTable::new(maps.flows4.as_fd(), maps.flow_sets4.as_fd(), settings)
    }
}

impl Flowing for V6 {
    fn flow_table(maps: &Maps) -> io::Result<FlowTable<Self>> {
        let settings = maps.settings.as_fd();
        FlowTable::new(maps.flows6.as_fd(), maps.flow_sets6.as_fd(), settings)
    }
}

/// How full a map is. An element of an array counts when it is not all zero.
trait Fill {
    fn entries(&self, maps: &Maps) -> io::Result<u64>;
    fn max_entries(&self) -> u32;
}

impl<K: Pod, V: Pod> Fill for HashMap<K, V> {
    fn entries(&self, _: &Maps) -> io::Result<u64> {
        self.len()
    }

    fn max_entries(&self) -> u32 {
        self.max_entries()
    }
}

impl<A: Flowing> Fill for FlowEntries<A>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    fn entries(&self, maps: &Maps) -> io::Result<u64> {
        Ok(A::flow_table(maps)?.len())
    }

    fn max_entries(&self) -> u32 {
        self.flows()
    }
}

impl<A: Bucketed> Fill for Listeners<A> {
    fn entries(&self, _: &Maps) -> io::Result<u64> {
        let mut count = 0;
        self.each(|_, _| count += 1);
        Ok(count)
    }

    fn max_entries(&self) -> u32 {
        self.buckets()
    }
}

impl<T: Pod> Fill for SharedArray<T> {
    fn entries(&self, _: &Maps) -> io::Result<u64> {
        let used = (0..self.len()).filter(|i| !is_zero(&self.read(*i)));
        Ok(used.count() as u64)
    }

    fn max_entries(&self) -> u32 {
        self.len()
    }
}

impl<V: Pod + AddAssign> Fill for PerCpuArray<V> {
    fn entries(&self, _: &Maps) -> io::Result<u64> {
        let sums = self.sums()?;
        Ok(sums.iter().filter(|sum| !is_zero(*sum)).count() as u64)
    }

    fn max_entries(&self) -> u32 {
        self.len()
    }
}
