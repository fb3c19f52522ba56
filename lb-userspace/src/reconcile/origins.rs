//! The backends that answers are known by whose flow is not recorded.

use super::Op;
use crate::config::Protocol;
use std::{collections::HashMap, net::SocketAddr};

/// Where answers come from: address and port of a backend, and the protocol of its service.
pub type Origin = (SocketAddr, Protocol);

/// The backend's number by what its answers come from.
///
/// No two services have the same backend configured where one of them needs to know answers by it. But one may still
/// have it until its flows are gone while another has it anew, whose it is then.
#[derive(Debug, Default)]
pub struct Origins(HashMap<Origin, u32>);

impl Origins {
    /// Takes note of an origin that was found in the maps.
    pub fn adopt(&mut self, origin: Origin, number: u32) {
        self.0.insert(origin, number);
    }

    /// Lets answers be known by a backend; by one that is `retiring` only if they are by no other.
    pub fn publish(&mut self, origin: Origin, number: u32, retiring: bool) -> Option<Op> {
        let owner = self.0.get(&origin).copied();
        if owner == Some(number) || owner.is_some() && retiring {
            return None;
        }
        self.0.insert(origin, number);
        let (address, protocol) = origin;
        Some(Op::PublishOrigin {
            address,
            protocol,
            number,
        })
    }

    /// Answers are not known by a backend any more; if they are by another one meanwhile, they go on to be.
    pub fn withdraw(&mut self, origin: Origin, number: u32) -> Option<Op> {
        if self.0.get(&origin) != Some(&number) {
            return None;
        }
        self.0.remove(&origin);
        let (address, protocol) = origin;
        Some(Op::WithdrawOrigin { address, protocol })
    }
}
