//! Questions to the kernel over netlink, answered in our own types.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    io,
    net::IpAddr,
    pin::Pin,
    time::Duration,
};

use futures_util::{Stream, StreamExt, TryStreamExt, future, stream};
use lb_common::vlan;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::{
            InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
            VlanProtocol,
        },
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags,
            NeighbourMessage, NeighbourState,
        },
        route::{
            RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType,
            RouteVia,
        },
    },
    sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_ROUTE},
};

use super::{
    Error, Interface,
    table::{Entry, Hop, Path, Reachability, Way},
};

/// Marks neighbour entries as asked for by us (`NDA_PROTOCOL`). The kernel only stores it; numbers
/// above 191 are not assigned in `rtnetlink.h` or iproute2's `rt_protos`.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(211);

/// How long an answer may take. The kernel answers at once unless a message was lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// Receive buffer of the socket for events. Ten thousand neighbour events fit; the default of
/// about 200 KiB holds some three hundred.
const EVENT_BUFFER: u32 = 8 << 20;

/// What the kernel tells unasked.
pub(super) enum Heard {
    /// Something changed.
    Message(RouteNetlinkMessage),
    /// A next-hop object changed, and any route may go over it.
    NextHop,
    /// Messages were lost.
    Lost,
    /// No more will be heard.
    Closed,
}

/// What the kernel tells, as it comes.
pub(super) type Events = Pin<Box<dyn Stream<Item = Heard> + Send>>;

/// A netlink socket for questions.
#[derive(Clone)]
pub(super) struct Kernel {
    handle: Handle,
}

impl Kernel {
    pub(super) fn connect() -> Result<Self, Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Opens the socket on which the kernel tells of changes. It is apart from the one for
    /// questions, so that a flood of events cannot swallow an answer.
    pub(super) fn listen() -> Result<Events, Error> {
        let (mut connection, _, events) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])
        .map_err(Error::Socket)?;
        let socket = connection.socket_mut().socket_mut();
        // Beyond net.core.rmem_max the kernel clamps silently; an overrun is then noticed and mended.
        let _ = socket.set_rx_buf_sz(EVENT_BUFFER);
        tokio::spawn(connection);
        let heard = events.filter_map(|(message, _)| {
            future::ready(match message.payload {
                NetlinkPayload::InnerMessage(message) => Some(Heard::Message(message)),
                NetlinkPayload::Overrun(_) => Some(Heard::Lost),
                _ => None,
            })
        });
        let heard = heard.chain(stream::once(future::ready(Heard::Closed)));
        Ok(match next_hops() {
            Ok(socket) => stream::select(heard, changes(socket)).boxed(),
            // Linux before 5.3 has no next-hop objects.
            Err(_) => heard.boxed(),
        })
    }

    pub(super) async fn interface(&self, name: &str) -> Result<Interface, Error> {
        // The kernel refuses longer names with ERANGE.
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(Error::NoInterface(name.to_owned()));
        }
        let answer = self.handle.link().get().match_name(name).execute();
        let messages: Result<Vec<_>, _> =
            within("look an interface up", answer.try_collect()).await;
        match messages {
            Ok(messages) => messages
                .iter()
                .find_map(interface)
                .ok_or_else(|| Error::NoInterface(name.to_owned())),
            Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
                Err(Error::NoInterface(name.to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn interfaces(&self) -> Result<HashMap<u32, Interface>, Error> {
        let answer = self.handle.link().get().execute();
        let links = collect("list interfaces", answer, |message| interface(&message)).await?;
        Ok(links.into_iter().map(|link| (link.index, link)).collect())
    }

    pub(super) async fn addresses(&self) -> Result<HashSet<(u32, IpAddr)>, Error> {
        let answer = self.handle.address().get().execute();
        let addresses = collect("list addresses", answer, |message| address(&message)).await?;
        Ok(addresses.into_iter().collect())
    }

    pub(super) async fn neighbours(&self) -> Result<HashMap<Hop, Entry>, Error> {
        let answer = self.handle.neighbours().get().execute();
        let entries = collect("list neighbours", answer, |message| neighbour(&message)).await?;
        Ok(entries.into_iter().collect())
    }

    /// The way the kernel itself would send a packet.
    pub(super) async fn route(&self, target: IpAddr) -> Result<Path, Error> {
        let mut question = RouteMessage::default();
        (
            question.header.address_family,
            question.header.destination_prefix_length,
        ) = match target {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        question
            .attributes
            .push(RouteAttribute::Destination(target.into()));
        let answer = self.handle.route().get(question).execute();
        let messages: Result<Vec<_>, _> = within("look a route up", answer.try_collect()).await;
        match messages {
            Ok(messages) => Ok(messages
                .first()
                .map_or(Path::None, |message| path(target, message))),
            Err(Error::Refused { source, .. }) => Ok(match source.raw_os_error() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Path::None,
                Some(libc::EACCES) => Path::Refused("prohibited"),
                Some(libc::EINVAL) => Path::Refused("a blackhole"),
                _ => {
                    return Err(Error::Refused {
                        action: "look a route up",
                        source,
                    });
                }
            }),
            Err(error) => Err(error),
        }
    }

    /// Makes the kernel find a neighbour's MAC address, and keep looking after it by itself where it
    /// can (`NTF_EXT_MANAGED`, Linux 5.16). Older kernels ignore that attribute and only find it.
    pub(super) async fn ask(&self, hop: Hop) -> Result<(), Error> {
        self.use_neighbour(hop, true).await
    }

    /// The opposite of [`Self::ask`]: the entry stays, but ages as any other.
    pub(super) async fn release(&self, hop: Hop) -> Result<(), Error> {
        self.use_neighbour(hop, false).await
    }

    async fn use_neighbour(&self, hop: Hop, managed: bool) -> Result<(), Error> {
        let mut entry = NeighbourMessage::default();
        entry.header.family = match hop.address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        entry.header.ifindex = hop.ifindex;
        entry.header.state = NeighbourState::None;
        entry.header.flags = NeighbourFlags::Use;
        entry
            .attributes
            .push(NeighbourAttribute::Destination(hop.address.into()));
        entry
            .attributes
            .push(NeighbourAttribute::Protocol(PROTOCOL));
        if managed {
            entry
                .attributes
                .push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        }
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let action = "ask for a neighbour";
        let mut answer = self
            .handle
            .clone()
            .request(request)
            .map_err(|error| refused(action, error))?;
        within(action, async move {
            while let Some(message) = answer.next().await {
                if let NetlinkPayload::Error(error) = message.payload
                    && error.code.is_some()
                {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
            }
            Ok(())
        })
        .await
    }
}

/// A socket on which the kernel tells of next-hop objects (`ip nexthop`): they change routes, and
/// with `net.ipv4.nexthop_compat_mode=0` without a route event. The netlink library cannot read these
/// messages; that there was one is enough.
fn next_hops() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    socket
        .socket_ref()
        .add_membership(MulticastGroup::Nexthop as u32)?;
    Ok(socket)
}

fn changes(socket: TokioSocket) -> impl Stream<Item = Heard> {
    stream::unfold(socket, |socket| async {
        match socket.recv_from_full().await {
            Ok(_) => Some((Heard::NextHop, socket)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                Some((Heard::NextHop, socket))
            }
            Err(_) => None,
        }
    })
}

async fn collect<M, T>(
    action: &'static str,
    answer: impl Stream<Item = Result<M, rtnetlink::Error>>,
    read: impl Fn(M) -> Option<T>,
) -> Result<Vec<T>, Error> {
    let read = &read;
    let items = answer.try_filter_map(|message| async move { Ok(read(message)) });
    within(action, items.try_collect()).await
}

async fn within<T>(
    action: &'static str,
    answer: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|error| refused(action, error)),
        Err(_) => Err(Error::Refused {
            action,
            source: io::ErrorKind::TimedOut.into(),
        }),
    }
}

fn refused(action: &'static str, error: rtnetlink::Error) -> Error {
    let source = match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io(),
        error => io::Error::other(error.to_string()),
    };
    Error::Refused { action, source }
}

/// An interface, unless the message is about a bridge port or carries no name.
pub(super) fn interface(message: &LinkMessage) -> Option<Interface> {
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let mut name = None;
    let mut mac = None;
    let mut mtu = 0;
    let mut kind = None;
    let (mut below, mut elsewhere) = (None, false);
    let (mut id, mut service) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(value) => below = Some(*value),
            // The index is one of another namespace.
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Address(value) => mac = value.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(value) => kind = Some(value.to_string()),
                        LinkInfo::Data(InfoData::Vlan(infos)) => {
                            for info in infos {
                                match info {
                                    InfoVlan::Id(value) => id = Some(*value),
                                    InfoVlan::Protocol(value) => {
                                        service = *value == VlanProtocol::Ieee8021Ad;
                                    }
                                    _ => {}
                                }
                            }
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let layer = message.header.link_layer_type;
    Some(Interface {
        index: message.header.index,
        name: name?,
        mac: mac.filter(|_| layer == LinkLayerType::Ether),
        mtu,
        kind: kind.unwrap_or_else(|| {
            let kind = match layer {
                LinkLayerType::Loopback => "loopback",
                _ => "physical",
            };
            kind.to_owned()
        }),
        up: message
            .header
            .flags
            .contains(LinkFlags::Up | LinkFlags::LowerUp),
        vlan: id
            .map(|id| vlan::tag(id, service))
            .and_then(|tag| below.filter(|_| !elsewhere).map(|below| (below, tag))),
    })
}

/// An address and the interface that holds it.
pub(super) fn address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    let mut local = None;
    let mut any = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Address(value) => any = Some(*value),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the other end; IPv6 has no IFA_LOCAL elsewhere.
    Some((message.header.index, local.or(any)?))
}

/// A neighbour entry of IPv4 or IPv6; proxy entries are none.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(Hop, Entry)> {
    let header = &message.header;
    if header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    let mut managed = false;
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => {
                address = Some(IpAddr::V4(*value));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                address = Some(IpAddr::V6(*value));
            }
            NeighbourAttribute::LinkLayerAddress(value) => mac = value.as_slice().try_into().ok(),
            NeighbourAttribute::ExtFlags(flags) => {
                managed = flags.contains(NeighbourExtFlags::Managed);
            }
            NeighbourAttribute::Protocol(protocol) => ours = *protocol == PROTOCOL,
            _ => {}
        }
    }
    let reachability = match (header.state, mac) {
        (NeighbourState::Failed, _) => Reachability::Failed,
        (NeighbourState::Incomplete | NeighbourState::None, _) | (_, None) => Reachability::Pending,
        (NeighbourState::Stale, Some(mac)) => Reachability::Stale(mac),
        (_, Some(mac)) => Reachability::Known(mac),
    };
    let hop = Hop {
        ifindex: header.ifindex,
        address: address?,
    };
    let entry = Entry {
        reachability,
        managed,
        kept_by_us: managed && ours,
    };
    Some((hop, entry))
}

/// The destinations that a change of this route concerns: an address and a prefix length.
pub(super) fn concerned(message: &RouteMessage) -> Option<(IpAddr, u8)> {
    let default = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let destination = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(address) => plain(address),
            _ => None,
        });
    Some((
        destination.unwrap_or(default),
        message.header.destination_prefix_length,
    ))
}

fn path(target: IpAddr, message: &RouteMessage) -> Path {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Path::Local,
        RouteType::Anycast | RouteType::Broadcast | RouteType::Multicast => {
            return Path::NotOneHost;
        }
        RouteType::BlackHole => return Path::Refused("a blackhole"),
        RouteType::Prohibit => return Path::Refused("prohibited"),
        _ => return Path::None,
    }
    let mut ifindex = None;
    let mut gateway = None;
    let mut source = None;
    let mut mtu = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(address) => gateway = plain(address),
            // An IPv4 route through an IPv6 gateway (RFC 5549).
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(address) => source = plain(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match ifindex {
        Some(ifindex) => Path::Way(Way {
            hop: Hop {
                ifindex,
                address: gateway.unwrap_or(target),
            },
            source,
            mtu,
        }),
        None => Path::None,
    }
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::link::InfoKind;

    /// What the kernel says of an interface of VLAN 100 on interface 7.
    fn told(protocol: VlanProtocol) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 8;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = vec![
            LinkAttribute::IfName("eth0.100".to_owned()),
            LinkAttribute::Link(7),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(vec![
                    InfoVlan::Protocol(protocol),
                    InfoVlan::Id(100),
                ])),
            ]),
        ];
        message
    }

    #[test]
    fn the_interface_of_a_vlan_tells_its_tag_and_what_is_below_it() {
        let of = |message: &LinkMessage| interface(message).and_then(|link| link.vlan);
        let customer = told(VlanProtocol::Ieee8021Q);
        assert_eq!(of(&customer), Some((7, vlan::tag(100, false))));
        let service = told(VlanProtocol::Ieee8021Ad);
        assert_eq!(of(&service), Some((7, vlan::tag(100, true))));
        // The number is that of an interface in another namespace.
        let mut elsewhere = customer;
        elsewhere.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert_eq!(of(&elsewhere), None);
        // A veth names its other end.
        let mut veth = told(VlanProtocol::Ieee8021Q);
        veth.attributes.pop();
        assert_eq!(of(&veth), None);
    }
}
