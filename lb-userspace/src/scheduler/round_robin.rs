//! `round-robin`: slots in turn, smoothly interleaved by weight.

use super::{Error, Member, ROUND_ROBIN_SLOTS_MAX, common_divisor, smooth};

/// The sequence of one full cycle, in which every backend comes up exactly as often as its weight
/// says.
pub(super) fn build(pool: &[Member]) -> Result<Vec<u32>, Error> {
    let weights: Vec<u32> = pool.iter().map(|member| member.weight).collect();
    slots(&weights)?;
    let divisor = divisor(&weights).max(1);
    let weights: Vec<u32> = weights.iter().map(|weight| weight / divisor).collect();
    let turns = smooth::turns(&weights);
    Ok(turns
        .into_iter()
        .map(|position| pool[position as usize].backend)
        .collect())
}

/// The length of the sequence: the sum of the weights in their smallest terms.
pub(super) fn slots(weights: &[u32]) -> Result<u32, Error> {
    let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
    let length = total / u64::from(divisor(weights).max(1));
    u32::try_from(length)
        .ok()
        .filter(|length| *length <= ROUND_ROBIN_SLOTS_MAX)
        .ok_or(Error::SequenceTooLong(length))
}

/// The greatest common divisor of all weights; 0 if all are 0.
fn divisor(weights: &[u32]) -> u32 {
    weights.iter().copied().fold(0, common_divisor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn pool(weights: &[u32]) -> Vec<Member> {
        (1_u32..)
            .zip(weights)
            .map(|(number, &weight)| Member {
                identity: SocketAddr::from(([10, 0, 0, 1], number as u16)),
                backend: number,
                weight,
                configured_weight: weight,
            })
            .collect()
    }

    #[test]
    fn six_to_four_is_interleaved() {
        assert_eq!(build(&pool(&[6, 4])), Ok(vec![1, 2, 1, 2, 1]));
    }

    #[test]
    fn equal_weights_take_plain_turns() {
        assert_eq!(build(&pool(&[50, 50, 50])), Ok(vec![1, 2, 3]));
    }

    #[test]
    fn no_weight_no_slot() {
        assert_eq!(build(&[]), Ok(vec![]));
        assert_eq!(build(&pool(&[0, 0])), Ok(vec![]));
        assert_eq!(build(&pool(&[0, 9, 0])), Ok(vec![2]));
    }

    #[test]
    fn ten_thousand_backends_of_many_weights() {
        let weights: Vec<u32> = (0..10_000).map(|number| 1 + number % 10).collect();
        let table = build(&pool(&weights)).unwrap();
        let mut counts = vec![0_u32; weights.len()];
        for backend in table {
            counts[backend as usize - 1] += 1;
        }
        assert_eq!(counts, weights);
    }

    #[test]
    fn a_sequence_that_is_too_long_is_refused() {
        let mut weights = vec![65_535; 17];
        assert_eq!(slots(&weights), Ok(17));
        weights[0] = 65_534;
        let error = Error::SequenceTooLong(17 * 65_535 - 1);
        assert_eq!(build(&pool(&weights)), Err(error.clone()));
        assert_eq!(
            error.to_string(),
            "the weights make a round-robin sequence of 1114094 slots, more than 1048576; \
             use smaller weights, or weights with a common divisor"
        );
    }
}
