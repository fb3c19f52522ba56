//! What on this host would keep decapsulated packets from working.

use super::is_vip;
use crate::neigh;
use anyhow::Result;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

/// Index of the loopback interface, the same in every network namespace.
const LOOPBACK: u32 = 1;

/// Each problem with the command that mends it.
pub(super) async fn warnings(
    interface: &str,
    roles: &BTreeMap<IpAddr, u32>,
) -> Result<Vec<String>> {
    let held = neigh::interface_addresses().await?;
    let mut warnings = Vec::new();
    let on_loopback: BTreeSet<IpAddr> = held
        .iter()
        .filter(|(index, address)| *index == LOOPBACK && address.is_ipv4())
        .map(|(_, address)| *address)
        .filter(|address| roles.get(address).is_some_and(|bits| is_vip(*bits)))
        .collect();
    if let Some(vip) = on_loopback.first() {
        // The kernel takes the larger of the two values.
        let value = |key| sysctl("all", key).max(sysctl(interface, key));
        if value("arp_ignore") == 0 {
            warnings.push(format!(
                "this host answers ARP for {vip}, which is the balancer's to answer: \
                 \"sysctl -w net.ipv4.conf.all.arp_ignore=1\""
            ));
        }
        if value("arp_announce") < 2 {
            warnings.push(format!(
                "this host may send ARP requests from {vip}, which takes it from the balancer: \
                 \"sysctl -w net.ipv4.conf.all.arp_announce=2\""
            ));
        }
    }
    for (vip, _) in roles.iter().filter(|(_, bits)| is_vip(**bits)) {
        if !held.iter().any(|(_, address)| address == vip) {
            warnings.push(format!(
                "no interface of this host holds {vip}, so the kernel will not take its packets: \
                 \"ip addr add {vip}/{} dev lo\"",
                if vip.is_ipv4() { 32 } else { 128 }
            ));
        }
    }
    Ok(warnings)
}

fn sysctl(interface: &str, key: &str) -> u32 {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/{key}");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
