//! Decapsulation on a backend: which packets are taken, and for how long.
//!
//! The program is [`crate::dataplane::Decap`]; `docs/decap.md` says what it does with a packet.

mod advice;
mod status;

pub use self::status::{OutcomeCount, Status};

use crate::{
    config::AttachMode,
    dataplane::{Decap, Running},
    neigh::{self, Neighbours},
};
use anyhow::{Context as _, Result, bail, ensure};
use lb_common::decap::{HELD, VIP};
use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// Where links of programs that need no process are pinned.
pub const PIN_PATH: &str = "/sys/fs/bpf/sluice-decap";

/// How often it is looked whether the program is still on its interface.
const WATCH: Duration = Duration::from_secs(1);

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interface that encapsulated packets come in by.
    pub interface: String,
    /// How to attach.
    pub mode: AttachMode,
    /// Inner destinations that are taken; empty: every address the host holds.
    pub vips: Vec<IpAddr>,
    /// UDP port of GUE.
    pub port: u16,
    /// Directory of pins.
    pub pin_path: PathBuf,
}

/// Takes encapsulation off until SIGTERM or Ctrl-C, then detaches. Follows the host's addresses.
pub async fn run(options: &Options) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (watcher, _resolutions) = Neighbours::spawn(HashSet::new())?;
    let mut held = watcher.local_addresses();
    let running = start(options).await?;
    running.own(&options.pin_path)?;
    let mut tick = tokio::time::interval(WATCH);
    loop {
        tokio::select! {
            Ok(()) = held.changed() => {
                let wanted = roles(&held.borrow_and_update(), &options.vips);
                if running.decap.set_addresses(&wanted)? {
                    tell_vips(&wanted);
                }
            }
            _ = tick.tick() => ensure!(
                running.is_attached(),
                "interface {}: it was removed, or somebody took decapsulation off it",
                options.interface
            ),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    running.detach(&options.pin_path)?;
    info!("detached from {}", options.interface);
    Ok(())
}

/// Attaches the program so that it stays, with the addresses the host holds now.
pub async fn start_background(options: &Options) -> Result<()> {
    let running = start(options).await?;
    running.persist(&options.pin_path)
}

/// Takes the program off an interface, whoever started it; `false` if there was none.
pub fn detach(interface: &str, pin_path: &Path) -> Result<bool> {
    let Some(running) = Running::find(interface)? else {
        return Ok(false);
    };
    running.detach(pin_path)?;
    Ok(true)
}

/// Loads and attaches, or takes the place of a program that needs no process.
async fn start(options: &Options) -> Result<Running> {
    let name = &options.interface;
    check_vips(&options.vips)?;
    let before = Running::find(name)?;
    if let Some(before) = &before {
        ensure!(
            before.is_pinned(&options.pin_path),
            "interface {name}: another \"sluice decap\" runs there already; end it, or run \"sluice \
             decap {name} --detach\""
        );
    }
    let wanted = roles(&neigh::local_addresses().await?, &options.vips);
    let decap = Decap::load(options.port, wanted.len())?;
    decap.set_addresses(&wanted)?;
    let running = match before {
        Some(before) if before.satisfies(options.mode) => before.replace(decap)?,
        Some(before) => {
            // The kernel allows one mode at a time.
            before.detach(&options.pin_path)?;
            decap.attach(name, options.mode)?
        }
        None => decap.attach(name, options.mode)?,
    };
    let mode = running.attached.mode;
    match &running.attached.fallback {
        Some(reason) => warn!("attached to {name} in {mode} mode: {reason}"),
        None => info!("attached to {name} in {mode} mode"),
    }
    tell_vips(&wanted);
    for warning in advice::warnings(name, &wanted).await? {
        warn!("{warning}");
    }
    Ok(running)
}

/// What the program needs to know of each address: those the host holds may be the outer destination,
/// `vips` the inner; without `vips` it is the same set.
///
/// Loopback and link-local addresses are in neither: no balancer sends to them.
fn roles(held: &HashSet<IpAddr>, vips: &[IpAddr]) -> BTreeMap<IpAddr, u32> {
    let inside = if vips.is_empty() { VIP } else { 0 };
    let mut roles: BTreeMap<IpAddr, u32> = held
        .iter()
        .filter(|address| !address.is_loopback() && !is_link_local(**address))
        .map(|address| (*address, HELD | inside))
        .collect();
    for vip in vips {
        *roles.entry(*vip).or_default() |= VIP;
    }
    roles
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn check_vips(vips: &[IpAddr]) -> Result<()> {
    for vip in vips {
        let nobodys = vip.is_loopback() || vip.is_unspecified() || vip.is_multicast();
        if nobodys || is_link_local(*vip) {
            bail!("--vip {vip}: not an address a service can have for clients on other hosts");
        }
    }
    Ok(())
}

fn is_vip(bits: u32) -> bool {
    bits & VIP != 0
}

fn tell_vips(roles: &BTreeMap<IpAddr, u32>) {
    let vips = roles.iter().filter(|(_, bits)| is_vip(**bits));
    let vips: Vec<String> = vips.map(|(address, _)| address.to_string()).collect();
    info!("taking packets for {}", vips.join(", "));
}

/// What runs on `interface`.
pub async fn status(interface: &str, pin_path: &Path) -> Result<Status> {
    let running = Running::find(interface)?.with_context(|| {
        format!("interface {interface}: no decapsulation runs there; \"sluice decap {interface}\" starts it")
    })?;
    let roles = running.decap.addresses().context("cannot read the maps")?;
    let warnings = advice::warnings(interface, &roles).await?;
    status::read(&running, &roles, pin_path, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(addresses: &[&str]) -> HashSet<IpAddr> {
        addresses.iter().map(|a| a.parse().unwrap()).collect()
    }

    fn ip(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn without_vips_every_address_of_the_host_is_one() {
        let held = set(&[
            "127.0.0.1",
            "::1",
            "fe80::1",
            "169.254.0.1",
            "198.18.0.11",
            "203.0.113.80",
        ]);
        let roles = roles(&held, &[]);
        assert_eq!(
            roles,
            BTreeMap::from([
                (ip("198.18.0.11"), HELD | VIP),
                (ip("203.0.113.80"), HELD | VIP)
            ])
        );
    }

    #[test]
    fn with_vips_no_other_is_one() {
        let held = set(&["127.0.0.1", "198.18.0.11", "203.0.113.80"]);
        let roles = roles(&held, &[ip("203.0.113.80"), ip("2001:db8::80")]);
        assert_eq!(
            roles,
            BTreeMap::from([
                (ip("198.18.0.11"), HELD),
                (ip("203.0.113.80"), HELD | VIP),
                (ip("2001:db8::80"), VIP)
            ])
        );
    }

    #[test]
    fn addresses_that_nobody_can_ask_for_are_refused() {
        for bad in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "fe80::1",
        ] {
            let error = check_vips(&[ip(bad)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--vip {bad}: ")), "{error}");
        }
        assert!(check_vips(&[ip("203.0.113.80")]).is_ok());
    }
}
