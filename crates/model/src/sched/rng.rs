//! Numbers that depend on a seed alone: random streams and the hash of a world.
//!
//! Our own few lines, so that no upgrade of a library changes what a seed means.

/// Odd constants with well-mixed bits (from the golden ratio and from `wyhash`).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const FOLD: u64 = 0xe703_7ed1_a0b4_28db;

/// Multiplies to 128 bits and folds the halves: one step of every hash here.
#[inline]
#[must_use]
pub const fn mix(a: u64, b: u64) -> u64 {
    let wide = (a ^ STEP).wrapping_add(b) as u128 * (FOLD ^ b.rotate_left(29)) as u128;
    #[expect(clippy::cast_possible_truncation, reason = "the halves are wanted")]
    let (low, high) = (wide as u64, (wide >> 64) as u64);
    low ^ high ^ b
}

/// The hash of a text, the same on every machine.
#[must_use]
pub fn hash_text(text: &str) -> u64 {
    let mut hash = text.len() as u64;
    for chunk in text.as_bytes().chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = mix(hash, u64::from_le_bytes(word));
    }
    hash
}

/// A stream of random numbers (`splitmix64`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// A stream for where none is asked.
    pub(super) const ZERO: Self = Self { state: 0 };

    /// The stream called `name` of a seed. Draws from one stream do not shift another.
    #[must_use]
    pub fn named(seed: u64, name: &str) -> Self {
        Self {
            state: mix(seed, hash_text(name)),
        }
    }

    /// Any number.
    #[inline]
    pub const fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 where `n` is 0.
    #[inline]
    pub const fn below(&mut self, n: u32) -> u32 {
        let scaled = (self.draw() >> 32) * n as u64;
        (scaled >> 32) as u32
    }

    /// True once in `n` times; never where `n` is 0.
    #[inline]
    pub const fn one_in(&mut self, n: u32) -> bool {
        n != 0 && self.below(n) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_name_and_seed_and_repeat() {
        let first = |seed, name| Stream::named(seed, name).draw();
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_ne!(first(1, "a"), first(2, "a"));
    }

    #[test]
    fn numbers_below_a_bound_are_spread_evenly() {
        let mut stream = Stream::named(7, "spread");
        let mut counts = [0_u32; 5];
        for _ in 0..50_000 {
            counts[stream.below(5) as usize] += 1;
        }
        assert!(counts.iter().all(|&n| (9_000..11_000).contains(&n)));
    }
}
