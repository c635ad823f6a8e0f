//! Named streams of random numbers: one per actor, all from one seed.

use crate::workload::{below, mix};

/// A stream.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    state: u64,
}

impl Stream {
    /// The stream `name` number `n` of `seed`.
    pub(super) fn named(seed: u64, name: &str, n: usize) -> Self {
        let start = name
            .bytes()
            .fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)));
        Self {
            state: mix(start ^ u64::try_from(n).unwrap_or(0)),
        }
    }

    /// The next number.
    pub(super) const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number of `low..=high`.
    pub(super) fn between(&mut self, low: u32, high: u32) -> u32 {
        let room = u64::from(high.saturating_sub(low)) + 1;
        let more = u64::try_from((u128::from(self.next()) * u128::from(room)) >> 64);
        low + u32::try_from(more.unwrap_or(0)).unwrap_or(0)
    }

    /// An index below `bound`.
    pub(super) fn index(&mut self, bound: usize) -> usize {
        below(self.next(), bound)
    }

    /// True once in `n` times.
    pub(super) fn one_in(&mut self, n: u32) -> bool {
        self.between(1, n) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ_by_name_number_and_seed() {
        let first = |seed, name, n| Stream::named(seed, name, n).next();
        assert_eq!(first(1, "writer", 0), first(1, "writer", 0));
        assert_ne!(first(1, "writer", 0), first(1, "writer", 1));
        assert_ne!(first(1, "writer", 0), first(1, "reader", 0));
        assert_ne!(first(1, "writer", 0), first(2, "writer", 0));
    }

    #[test]
    fn numbers_reach_both_ends() {
        let mut stream = Stream::named(1, "ends", 0);
        let seen: Vec<u32> = (0..200).map(|_| stream.between(3, 5)).collect();
        for n in 3..=5 {
            assert!(seen.contains(&n));
        }
        assert!(seen.iter().all(|n| (3..=5).contains(n)));
    }
}
