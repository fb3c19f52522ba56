//! What the kernel said, and what follows from it. Pure: no socket, no clock.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use lb_common::vlan;

use super::{Below, Interface, NextHop, Resolution};

/// A neighbour: the key of the kernel's neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Hop {
    pub(super) ifindex: u32,
    pub(super) address: IpAddr,
}

/// An entry of the kernel's neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) reachability: Reachability,
    /// The kernel probes it by itself.
    pub(super) managed: bool,
    /// It does so because we asked.
    pub(super) kept_by_us: bool,
}

/// Neighbour states, as far as they differ for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reachability {
    /// Confirmed or configured, or being confirmed again.
    Known([u8; 6]),
    /// Good to use, but not confirmed for a while.
    Stale([u8; 6]),
    /// Being asked.
    Pending,
    /// Asked and did not answer.
    Failed,
}

/// The kernel's answer to the question for a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Path {
    Way(Way),
    /// An address of this host.
    Local,
    /// A broadcast or multicast address.
    NotOneHost,
    /// A route that says no, and how.
    Refused(&'static str),
    None,
}

/// A usable route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) hop: Hop,
    pub(super) source: Option<IpAddr>,
    pub(super) mtu: Option<u32>,
}

/// Links, neighbours and addresses, as last heard.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) links: HashMap<u32, Interface>,
    pub(super) neighbours: HashMap<Hop, Entry>,
    pub(super) addresses: HashSet<(u32, IpAddr)>,
    /// Why the kernel would not even ask for a neighbour.
    pub(super) refused: HashMap<Hop, String>,
}

impl Table {
    /// The interfaces below `link` that packets for it leave with no more tags than are supported.
    fn below(&self, link: &Interface) -> Vec<Below> {
        let mut found = Vec::new();
        let (mut link, mut tags) = (link, 0);
        while let Some((index, tag)) = link.vlan
            && let (Some(below), Some(all)) = (self.links.get(&index), vlan::push(tags, tag))
        {
            (link, tags) = (below, all);
            found.push(Below {
                ifindex: below.index,
                ifname: below.name.clone(),
                tags,
            });
        }
        found
    }

    /// What to say about a target; `None` while its neighbour is being asked and nothing has been
    /// said that this would make wrong.
    ///
    /// `before` is what was said last and `through` the interface it went through last.
    pub(super) fn resolve(
        &self,
        target: IpAddr,
        path: &Path,
        before: Option<&Resolution>,
        through: Option<u32>,
    ) -> Option<Resolution> {
        let way = match path {
            Path::Way(way) => way,
            Path::Local => return Some(Resolution::Local),
            Path::NotOneHost => {
                return unresolved(format!("{target} is a broadcast or multicast address"));
            }
            Path::Refused(how) => {
                return unresolved(format!(
                    "the route to {target} is {how}; see \"ip route get {target}\""
                ));
            }
            Path::None => {
                // A link that goes down takes its routes along; name the cause, not the consequence.
                let link = through.and_then(|index| self.links.get(&index));
                return match link {
                    Some(link) if !link.up => unresolved(down(link)),
                    _ => unresolved(format!(
                        "no route to {target}; see \"ip route get {target}\""
                    )),
                };
            }
        };
        let Some(link) = self.links.get(&way.hop.ifindex) else {
            return unresolved(format!(
                "the interface towards {target} is gone; see \"ip route get {target}\""
            ));
        };
        if !link.up {
            return unresolved(down(link));
        }
        let Some(mac) = link.mac else {
            return unresolved(format!(
                "{target} is behind {}, which is not Ethernet",
                link.name
            ));
        };
        let Some(address) = way.source else {
            return unresolved(format!(
                "interface {} has no address to reach {target} from; see \"ip address show {}\"",
                link.name, link.name
            ));
        };
        let entry = self.neighbours.get(&way.hop);
        match entry.map(|entry| entry.reachability) {
            Some(Reachability::Known(destination) | Reachability::Stale(destination)) => {
                Some(Resolution::Resolved(NextHop {
                    ifindex: link.index,
                    ifname: link.name.clone(),
                    destination,
                    source: mac,
                    address,
                    mtu: way.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu)),
                    direct: way.hop.address == target,
                    below: self.below(link),
                }))
            }
            Some(Reachability::Failed) => unresolved(silent(target, way.hop.address, &link.name)),
            Some(Reachability::Pending) | None => {
                if let Some(why) = self.refused.get(&way.hop) {
                    return unresolved(why.clone());
                }
                // Do not flap while the kernel asks again, but do not send into a dead link either.
                match before {
                    Some(Resolution::Resolved(hop))
                        if !self.links.get(&hop.ifindex).is_some_and(|link| link.up) =>
                    {
                        unresolved(format!("asking for {target} on {}", link.name))
                    }
                    _ => None,
                }
            }
        }
    }
}

fn unresolved(reason: String) -> Option<Resolution> {
    Some(Resolution::Unresolved { reason })
}

fn down(link: &Interface) -> String {
    format!(
        "interface {} is down; see \"ip link show {}\"",
        link.name, link.name
    )
}

fn silent(target: IpAddr, hop: IpAddr, interface: &str) -> String {
    let what = if hop.is_ipv4() {
        "ARP"
    } else {
        "neighbour discovery"
    };
    if hop == target {
        format!("{target} does not answer {what} on {interface}")
    } else {
        format!("gateway {hop} towards {target} does not answer {what} on {interface}")
    }
}

/// Whether `address` lies in `prefix/length`.
pub(super) fn contains(prefix: IpAddr, length: u8, address: IpAddr) -> bool {
    let length = u32::from(length);
    match (prefix, address) {
        (IpAddr::V4(prefix), IpAddr::V4(address)) => {
            let mask = u32::MAX.checked_shl(32 - length.min(32)).unwrap_or(0);
            (prefix.to_bits() ^ address.to_bits()) & mask == 0
        }
        (IpAddr::V6(prefix), IpAddr::V6(address)) => {
            let mask = u128::MAX.checked_shl(128 - length.min(128)).unwrap_or(0);
            (prefix.to_bits() ^ address.to_bits()) & mask == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 18, 0, 2));
    const HOP: Hop = Hop {
        ifindex: 7,
        address: TARGET,
    };

    fn table(up: bool, reachability: Option<Reachability>) -> Table {
        let link = Interface {
            index: 7,
            name: "eth0".to_owned(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            kind: "veth".to_owned(),
            up,
            vlan: None,
        };
        let mut table = Table::default();
        table.links.insert(7, link);
        if let Some(reachability) = reachability {
            let entry = Entry {
                reachability,
                managed: true,
                kept_by_us: true,
            };
            table.neighbours.insert(HOP, entry);
        }
        table
    }

    fn way(mtu: Option<u32>) -> Path {
        Path::Way(Way {
            hop: HOP,
            source: Some("198.18.0.1".parse().unwrap()),
            mtu,
        })
    }

    fn reason(resolution: Option<Resolution>) -> String {
        match resolution {
            Some(Resolution::Unresolved { reason }) => reason,
            other => panic!("not unresolved: {other:?}"),
        }
    }

    #[test]
    fn stale_is_as_good_as_reachable() {
        let mac = [2, 0, 0, 0, 0, 2];
        let known = table(true, Some(Reachability::Known(mac)));
        let stale = table(true, Some(Reachability::Stale(mac)));
        let first = known.resolve(TARGET, &way(None), None, None);
        assert!(matches!(&first, Some(Resolution::Resolved(hop)) if hop.destination == mac));
        assert_eq!(first, stale.resolve(TARGET, &way(None), None, None));
    }

    #[test]
    fn the_smaller_mtu_counts() {
        let known = table(true, Some(Reachability::Known([2; 6])));
        for (route, expected) in [(None, 1500), (Some(1400), 1400), (Some(9000), 1500)] {
            match known.resolve(TARGET, &way(route), None, None) {
                Some(Resolution::Resolved(hop)) => assert_eq!(hop.mtu, expected),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_interface_of_a_vlan_has_others_below_it() {
        let mut known = table(true, Some(Reachability::Known([2; 6])));
        let lowest = known.links[&7].clone();
        let above = |index, name: &str, below, tag| Interface {
            index,
            name: name.to_owned(),
            vlan: Some((below, tag)),
            ..lowest.clone()
        };
        let below = |ifindex, ifname: &str, tags| Below {
            ifindex,
            ifname: ifname.to_owned(),
            tags,
        };
        let (outer, inner) = (vlan::tag(100, true), vlan::tag(20, false));
        let two = u32::from(inner) << 16 | u32::from(outer);
        for link in [
            above(7, "eth0.100.20", 8, inner),
            above(8, "eth0.100", 9, outer),
            Interface {
                index: 9,
                ..lowest.clone()
            },
        ] {
            known.links.insert(link.index, link);
        }
        let ways = |table: &Table| match table.resolve(TARGET, &way(None), None, None) {
            Some(Resolution::Resolved(hop)) => hop.below,
            other => panic!("{other:?}"),
        };
        let expected = [below(8, "eth0.100", inner.into()), below(9, "eth0", two)];
        assert_eq!(ways(&known), expected);
        // A third tag, or an interface below that is not in this namespace, ends the list.
        known
            .links
            .insert(9, above(9, "eth0", 10, vlan::tag(1, false)));
        assert_eq!(ways(&known), expected);
        known.links.insert(
            10,
            Interface {
                index: 10,
                ..lowest
            },
        );
        assert_eq!(ways(&known), expected);
    }

    #[test]
    fn asking_again_changes_nothing() {
        let known = table(true, Some(Reachability::Known([2; 6])));
        let before = known.resolve(TARGET, &way(None), None, None);
        for pending in [None, Some(Reachability::Pending)] {
            let table = table(true, pending);
            assert_eq!(
                table.resolve(TARGET, &way(None), before.as_ref(), Some(7)),
                None
            );
        }
    }

    #[test]
    fn reasons_name_the_cause() {
        let failed = table(true, Some(Reachability::Failed));
        assert_eq!(
            reason(failed.resolve(TARGET, &way(None), None, None)),
            "198.18.0.2 does not answer ARP on eth0"
        );
        let off = table(false, Some(Reachability::Known([2; 6])));
        let eth0_is_down = "interface eth0 is down; see \"ip link show eth0\"";
        assert_eq!(
            reason(off.resolve(TARGET, &way(None), None, None)),
            eth0_is_down
        );
        assert_eq!(
            reason(off.resolve(TARGET, &Path::None, None, Some(7))),
            eth0_is_down
        );
        assert_eq!(
            reason(failed.resolve(TARGET, &Path::None, None, Some(7))),
            "no route to 198.18.0.2; see \"ip route get 198.18.0.2\""
        );
        let gateway = silent(TARGET, "2001:db8::1".parse().unwrap(), "eth0");
        assert_eq!(
            gateway,
            "gateway 2001:db8::1 towards 198.18.0.2 does not answer neighbour discovery on eth0"
        );
    }

    #[test]
    fn prefixes() {
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(contains(at("0.0.0.0"), 0, TARGET));
        assert!(contains(at("198.18.0.0"), 15, TARGET));
        assert!(!contains(at("198.20.0.0"), 15, TARGET));
        assert!(contains(TARGET, 32, TARGET));
        assert!(!contains(at("198.18.0.3"), 32, TARGET));
        assert!(contains(at("::"), 0, at("2001:db8::1")));
        assert!(contains(at("2001:db8::"), 64, at("2001:db8::1")));
        assert!(!contains(at("2001:db8:1::"), 64, at("2001:db8::1")));
        assert!(!contains(at("::"), 0, TARGET));
    }
}
