//! What runs on an interface and what it has done.

use super::is_vip;
use crate::dataplane::Running;
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::{collections::BTreeMap, net::IpAddr, path::Path};

/// The state of decapsulation on one interface.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The interface.
    pub interface: String,
    /// `driver` or `generic`.
    pub mode: &'static str,
    /// Whether it needs no process.
    pub background: bool,
    /// UDP port of GUE.
    pub port: u16,
    /// Inner destinations that are taken.
    pub vips: Vec<IpAddr>,
    /// Packets by what became of them, those of every outcome.
    pub counters: Vec<OutcomeCount>,
    /// What on this host would keep it from working, each with the command that mends it.
    pub warnings: Vec<String>,
}

/// Encapsulated packets for this host with one outcome.
#[derive(Clone, Debug, Serialize)]
pub struct OutcomeCount {
    /// Its name: see [`lb_common::decap::Outcome`].
    pub outcome: &'static str,
    /// Whether the encapsulation was taken off; packets of other outcomes went to the kernel as they
    /// were.
    pub taken: bool,
    /// Packets.
    pub packets: u64,
    /// Bytes of the IP packets.
    pub bytes: u64,
}

pub(super) fn read(
    running: &Running,
    roles: &BTreeMap<IpAddr, u32>,
    pin_path: &Path,
    warnings: Vec<String>,
) -> Result<Status> {
    let counters = running
        .decap
        .counters()
        .context("cannot read the counters")?;
    let counters = counters.iter().map(|(outcome, counter)| OutcomeCount {
        outcome: outcome.name(),
        taken: outcome.taken(),
        packets: counter.packets,
        bytes: counter.bytes,
    });
    let vips = roles.iter().filter(|(_, bits)| is_vip(**bits));
    Ok(Status {
        interface: running.attached.interface.clone(),
        mode: running.attached.mode.name(),
        background: running.is_pinned(pin_path),
        port: running.decap.port(),
        vips: vips.map(|(address, _)| *address).collect(),
        counters: counters.collect(),
        warnings,
    })
}
