//! `pingpong`: CPU and device take turns adding one to every word of one buffer.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, count, elements, groups, part,
};

const ROUNDS: u64 = 4;
const GROUP: usize = 128 << 10;
const TILE: usize = 4096;

struct PingPong {
    words: Array<u64>,
}

/// One buffer of words that hold their index.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 8, 1)?;
    Ok(Box::new(PingPong {
        words: order.memory.array(n, count),
    }))
}

#[derive(Clone)]
struct AddOne {
    words: u64,
    n: usize,
}

impl Kernel for AddOne {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut words = vec![0_u64; TILE];
        let range = part(group, GROUP, self.n);
        for start in range.clone().step_by(TILE) {
            let words = &mut words[..TILE.min(range.end - start)];
            let at = self.words + count(start) * 8;
            tile.load(at, words)?;
            add_one(words);
            tile.store(at, words)?;
        }
        Ok(())
    }
}

fn add_one(words: &mut [u64]) {
    words.iter_mut().for_each(|word| *word += 1);
}

impl Prepared for PingPong {
    fn bytes(&self) -> u64 {
        count(self.words.len()) * 8
    }

    fn traffic(&self) -> u64 {
        self.bytes() * 2 * ROUNDS
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let n = self.words.len();
        for _round in 0..ROUNDS {
            self.words.change(add_one);
            let kernel = AddOne {
                words: self.words.address_mut(),
                n,
            };
            job.launch("round", &kernel, groups(n, GROUP))?;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let words = self.words.view();
        words
            .iter()
            .zip(0..)
            .all(|(word, i)| *word == i + 2 * ROUNDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_turn_is_noticed() {
        let mut game = PingPong {
            words: (0..10).collect::<Vec<_>>().into(),
        };
        (0..2 * ROUNDS).for_each(|_| game.words.change(add_one));
        assert!(game.verify());
        game.words.change(|words| words[4] -= 1);
        assert!(!game.verify());
    }
}
