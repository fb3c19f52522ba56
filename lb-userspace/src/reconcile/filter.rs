//! The address filter's lanes, and what they stand for.

use lb_common::{
    addr::{from_ipv4, from_ipv6},
    filter,
};
use std::{collections::HashMap, net::IpAddr};

/// The lane of an address.
pub fn lane_of(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => filter::lane_of(from_ipv4(address)),
        IpAddr::V6(address) => filter::lane_of(from_ipv6(address)),
    }
}

/// How often each bit of each lane is wanted.
#[derive(Debug, Default)]
pub struct Filter {
    wanted: HashMap<(u32, u8), u32>,
    /// Bits that stay whoever wants them, by element.
    kept: HashMap<u32, u64>,
}

impl Filter {
    /// One more address wants `bit`; the lane's element and its new value if that changes it.
    pub fn add(&mut self, address: IpAddr, bit: u8) -> Option<(u32, u64)> {
        let lane = lane_of(address);
        let count = self.wanted.entry((lane, bit)).or_default();
        *count += 1;
        (*count == 1).then(|| self.element(lane))
    }

    /// One address less wants `bit`; the lane's element and its new value if that changes it.
    pub fn remove(&mut self, address: IpAddr, bit: u8) -> Option<(u32, u64)> {
        let lane = lane_of(address);
        let count = self.wanted.get_mut(&(lane, bit))?;
        *count -= 1;
        if *count > 0 {
            return None;
        }
        self.wanted.remove(&(lane, bit));
        Some(self.element(lane))
    }

    /// Keeps a bit for good, in each lane of an element that has it.
    pub fn keep(&mut self, element: u32, lanes: u64, bit: u8) {
        let kept = lanes & u64::from_ne_bytes([bit; 8]);
        if kept != 0 {
            *self.kept.entry(element).or_default() |= kept;
        }
    }

    /// The element that holds `lane`, and its value.
    fn element(&self, lane: u32) -> (u32, u64) {
        let (element, _) = filter::place(lane);
        let mut value = self.kept.get(&element).copied().unwrap_or_default();
        for lane in element * 8..element * 8 + 8 {
            let (_, shift) = filter::place(lane);
            for bit in (0..u8::BITS).map(|n| 1 << n) {
                if self.wanted.contains_key(&(lane, bit)) {
                    value |= u64::from(bit) << shift;
                }
            }
        }
        (element, value)
    }

    /// Every element that is not zero, with its value.
    pub fn elements(&self) -> HashMap<u32, u64> {
        self.wanted
            .keys()
            .map(|(lane, _)| self.element(*lane))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::filter::{LANE_NAT_SOURCE, LANE_VIP};

    #[test]
    fn every_bit_of_a_lane_reaches_the_map() {
        let mut filter = Filter::default();
        let address = IpAddr::from([203, 0, 113, 1]);
        let mut value = 0;
        for bit in (0..u8::BITS).map(|n| 1 << n) {
            value = filter.add(address, bit).expect("a change").1;
        }
        let (_, shift) = filter::place(lane_of(address));
        assert_eq!(value >> shift & 0xff, 0xff);
    }

    #[test]
    fn a_bit_stays_until_nobody_wants_it() {
        let mut filter = Filter::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let (element, shift) = filter::place(lane_of(address));
        assert_eq!(
            filter.add(address, LANE_VIP),
            Some((element, u64::from(LANE_VIP) << shift))
        );
        assert_eq!(filter.add(address, LANE_VIP), None);
        assert_eq!(
            filter.add(address, LANE_NAT_SOURCE),
            Some((element, u64::from(LANE_VIP | LANE_NAT_SOURCE) << shift))
        );
        assert_eq!(filter.remove(address, LANE_VIP), None);
        assert_eq!(
            filter.remove(address, LANE_VIP),
            Some((element, u64::from(LANE_NAT_SOURCE) << shift))
        );
        assert_eq!(filter.remove(address, LANE_NAT_SOURCE), Some((element, 0)));
        assert!(filter.elements().is_empty());
    }
}
