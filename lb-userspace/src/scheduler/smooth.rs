//! Smooth weighted turns: each member comes up in proportion to its weight, spread as evenly as
//! possible.

use std::collections::BTreeMap;

/// The full cycle of turns: positions in `weights`, each as often as its weight says.
///
/// The sequence is that of nginx's smooth weighted round robin
/// (`ngx_http_upstream_get_round_robin_peer`): with every turn each member gains its weight, the
/// one that has most (the first of several) takes the turn and pays the sum of all weights. Done
/// literally, each turn costs a walk over all members, which is too slow for thousands of them.
/// Here members of one weight stand as a group, and a [`Tournament`] finds the richest group.
pub(super) fn turns(weights: &[u32]) -> Vec<u32> {
    let mut by_weight: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (position, &weight) in (0_u32..).zip(weights) {
        if weight > 0 {
            by_weight.entry(weight).or_default().push(position);
        }
    }
    if by_weight.is_empty() {
        return Vec::new();
    }
    let total: i64 = weights.iter().map(|&weight| i64::from(weight)).sum();
    let groups = by_weight
        .into_iter()
        .map(|(weight, members)| Group {
            gain: i64::from(weight),
            paid: 0,
            members,
            next: 0,
        })
        .collect();
    let mut tournament = Tournament::new(groups);
    (1..=total)
        .map(|turn| tournament.take(turn, total))
        .collect()
}

/// Members of one weight. They are alike but for their position, so they take turns among
/// themselves in order, and only the one whose turn is next competes.
struct Group {
    /// What that one gains with every turn of anybody.
    gain: i64,
    /// What it has paid so far.
    paid: i64,
    members: Vec<u32>,
    next: usize,
}

impl Group {
    fn credit(&self, turn: i64) -> i64 {
        self.gain * turn - self.paid
    }

    fn position(&self) -> u32 {
        self.members[self.next]
    }
}

/// A kinetic tournament: a binary tree in which every node knows the richer of the groups below
/// it, and until which turn that stays so.
///
/// Credits grow along straight lines, so the turn at which one overtakes another is known in
/// advance, and until then nothing needs to be compared.
struct Tournament {
    groups: Vec<Group>,
    /// Node 1 is the root, the children of node `n` are `2n` and `2n + 1`, and the last
    /// `groups.len()` nodes are the groups.
    nodes: Vec<Node>,
}

#[derive(Clone, Copy)]
struct Node {
    richest: usize,
    /// The first turn at which it has to be asked again.
    until: i64,
}

impl Tournament {
    fn new(groups: Vec<Group>) -> Self {
        let leaves = groups.len();
        let nodes = (0..2 * leaves)
            .map(|node| Node {
                richest: node.saturating_sub(leaves),
                until: i64::MAX,
            })
            .collect();
        let mut tournament = Self { groups, nodes };
        for node in (1..leaves).rev() {
            tournament.compare(node, 1);
        }
        tournament
    }

    /// The position that takes `turn` and pays `price`.
    fn take(&mut self, turn: i64, price: i64) -> u32 {
        self.renew(1, turn);
        let richest = self.nodes[1].richest;
        let group = &mut self.groups[richest];
        let position = group.position();
        group.next += 1;
        if group.next == group.members.len() {
            // The next to come is the first again, which has paid once more.
            group.next = 0;
            group.paid += price;
        }
        let mut node = (self.groups.len() + richest) / 2;
        while node > 0 {
            self.compare(node, turn);
            node /= 2;
        }
        position
    }

    /// Compares again wherever an overtaking is due by `turn`.
    fn renew(&mut self, node: usize, turn: i64) {
        if self.nodes[node].until <= turn {
            self.renew(2 * node, turn);
            self.renew(2 * node + 1, turn);
            self.compare(node, turn);
        }
    }

    /// Decides an inner node from its children.
    fn compare(&mut self, node: usize, turn: i64) {
        let (left, right) = (self.nodes[2 * node], self.nodes[2 * node + 1]);
        let rank = |number: usize| {
            let group = &self.groups[number];
            (group.credit(turn), std::cmp::Reverse(group.position()))
        };
        let (richer, poorer) = if rank(left.richest) > rank(right.richest) {
            (left.richest, right.richest)
        } else {
            (right.richest, left.richest)
        };
        let (ahead, behind) = (&self.groups[richer], &self.groups[poorer]);
        let speed = behind.gain - ahead.gain;
        let overtaking = if speed > 0 {
            // Drawing level is enough for the one that comes first.
            let level = i64::from(behind.position() > ahead.position());
            let distance = ahead.credit(turn) - behind.credit(turn) + level;
            turn + (distance + speed - 1) / speed
        } else {
            i64::MAX
        };
        self.nodes[node] = Node {
            richest: richer,
            until: overtaking.min(left.until).min(right.until),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// nginx's algorithm, literally.
    fn reference(weights: &[u32]) -> Vec<u32> {
        let total: i64 = weights.iter().map(|&weight| i64::from(weight)).sum();
        let mut credits = vec![0_i64; weights.len()];
        (0..total)
            .map(|_| {
                let mut best = 0;
                for position in 0..weights.len() {
                    credits[position] += i64::from(weights[position]);
                    if credits[position] > credits[best] {
                        best = position;
                    }
                }
                credits[best] -= total;
                best as u32
            })
            .collect()
    }

    /// The example of the commit that brought the algorithm to nginx.
    #[test]
    fn five_one_one() {
        assert_eq!(turns(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn nothing_without_weight() {
        assert!(turns(&[]).is_empty());
        assert!(turns(&[0, 0]).is_empty());
        assert_eq!(turns(&[0, 1]), [1]);
    }

    proptest! {
        #[test]
        fn equals_the_algorithm_of_nginx(
            weights in prop::collection::vec(0_u32..30, 0..25),
        ) {
            prop_assert_eq!(turns(&weights), reference(&weights));
        }

        #[test]
        fn equals_it_with_few_distinct_weights(
            weights in prop::collection::vec(prop_oneof![Just(0), Just(1), Just(7), Just(100)], 0..40),
        ) {
            prop_assert_eq!(turns(&weights), reference(&weights));
        }
    }
}
