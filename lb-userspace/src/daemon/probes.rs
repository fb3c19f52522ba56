//! Which health checks take the traffic's way, and the marks that their packets carry.
//!
//! `docs/health-checks.md` says how it works.

use super::Daemon;
use crate::{dataplane::Direction, health::Via, model::BackendKey};
use anyhow::{Context as _, Result};
use lb_common::{
    addr::{FAMILY_V4, FAMILY_V6, from_ip},
    probe::{ProbeTarget, TARGET_MASK},
    service::forward,
};
use std::collections::{HashMap, HashSet};
use tracing::{info, warn};

/// The numbers of checks that take the traffic's way.
#[derive(Debug, Default)]
pub(super) struct Probes {
    numbers: HashMap<BackendKey, u32>,
    /// Why such checks go straight to the backend, as it was last said.
    refused: Option<String>,
}

impl Probes {
    /// Whether there is any such check.
    pub(super) fn any(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// Numbers `backends`, at most `last` of them; who has a number keeps it.
    fn number(&mut self, backends: &[BackendKey], last: u32) {
        let wanted: HashSet<&BackendKey> = backends.iter().collect();
        self.numbers.retain(|key, _| wanted.contains(key));
        let taken: HashSet<u32> = self.numbers.values().copied().collect();
        let mut free = (1..=last).filter(|number| !taken.contains(number));
        for key in backends {
            if !self.numbers.contains_key(key)
                && let Some(number) = free.next()
            {
                self.numbers.insert(*key, number);
            }
        }
    }
}

impl Daemon {
    /// Prepares the kernel for checks that take the traffic's way, and says by which way each goes;
    /// whoever is left out is asked directly.
    pub(super) fn ways_of_checks(&mut self) -> HashMap<BackendKey, Via> {
        let mut modes = HashMap::new();
        let mut backends = Vec::new();
        for service in self.model.services() {
            let (key, vip) = (service.key(), service.config.vip());
            if forward::translates(service.config.forward) {
                continue;
            }
            for backend in service.backends.iter().filter(|b| b.is_checked()) {
                let address = backend.config().address;
                // The socket is connected to the backend's address, and sends packets of its family.
                if address.is_ipv4() == vip.is_ipv4() {
                    let key = BackendKey {
                        service: key,
                        address,
                    };
                    modes.insert(key, service.config.forward);
                    backends.push(key);
                }
            }
        }
        let targets = &self.dataplane.maps.probe_targets;
        let last = (targets.len() - 1).min(TARGET_MASK);
        self.probes.number(&backends, last);
        if let Err(error) = self.serve_checks() {
            let reason = format!("{error:#}");
            if self.probes.refused.as_ref() != Some(&reason) {
                warn!(
                    "checks of dsr, ipip and gue services go straight to the backend and do not \
                     show that it takes the VIP's packets: {reason}"
                );
                self.probes.refused = Some(reason);
            }
            self.probes.numbers.clear();
            return HashMap::new();
        }
        self.probes.refused = None;
        let base = self.config.daemon.probe_mark;
        self.dataplane.set_probe_mark(base);
        let mut ways = HashMap::new();
        for (key, number) in &self.probes.numbers {
            let forward = modes[key];
            let vip = key.service.listen.ip;
            let target = ProbeTarget {
                vip: from_ip(vip),
                backend: from_ip(key.address.ip()),
                family: if vip.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 },
                forward,
                reserved: 0,
            };
            self.dataplane.maps.probe_targets.store(*number, target);
            let mark = base | number;
            ways.insert(*key, Via { mark, forward });
        }
        ways
    }

    /// Sees to it that checks' packets are led where they belong.
    fn serve_checks(&mut self) -> Result<()> {
        for name in self.config.daemon.interfaces.clone() {
            self.serve_own_packets(&name)?;
        }
        Ok(())
    }

    /// Puts the programs for the host's own packets on an interface, as far as they are needed:
    /// for backends on this host, and for checks that take the traffic's way.
    pub(super) fn serve_own_packets(&mut self, name: &str) -> Result<()> {
        let probing = self.probes.any();
        let local = self.hops.values().any(|hop| hop.ifindex == super::LOCAL);
        for (direction, wanted) in [
            (Direction::Egress, local || probing),
            (Direction::Ingress, probing),
        ] {
            let changed = self
                .dataplane
                .set_tcx(direction, name, wanted)
                .with_context(|| match (local, probing) {
                    (true, false) => "backends on this host",
                    _ => "checks through the VIP",
                })?;
            if changed {
                let direction = direction.name();
                let what = if wanted { "attached" } else { "detached" };
                info!("interface {name}: {direction} program for the host's own packets {what}");
            }
        }
        Ok(())
    }
}
