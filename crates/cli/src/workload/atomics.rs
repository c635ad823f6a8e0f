//! `atomics`: CPU and device add one to the same words at the same time, by atomics. None may be lost,
//! wherever the page is and while it moves.
//!
//! Every other addition hits one of a few words, the rest any. The CPU throws everything out of device
//! memory now and then. The number of additions is bounded: nearly each faults.

use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Job, JobError, Order, PrepareError, Prepared, Words, below, count, elements, groups, mix, part,
};

const ROUNDS: u64 = 4;
/// Additions by each side in one round: at most this many, at most an eighth of the words.
const ADDITIONS_MAX: usize = 1 << 12;
/// Words that every other addition hits.
const HOT: usize = 16;
/// Additions by the CPU between two evictions.
const EVICTS_EVERY: usize = 512;
const GROUP: usize = 256;

struct Atomics {
    words: Words,
    plan: Plan,
}

/// Which words are added to.
#[derive(Clone, Copy)]
struct Plan {
    n: usize,
    additions: usize,
    seed: u64,
}

/// Whose additions.
#[derive(Clone, Copy)]
enum Side {
    Cpu,
    Device,
}

impl Plan {
    /// The word of the `k`th addition of a round.
    fn word(&self, side: Side, round: u64, k: usize) -> usize {
        let stream = 2 * round + side as u64;
        let random = mix(self.seed.wrapping_add(stream << 32).wrapping_add(count(k)));
        let among = if k.is_multiple_of(2) {
            self.n.min(HOT)
        } else {
            self.n
        };
        below(random, among)
    }

    /// What every word must be in the end.
    fn sums(&self) -> Vec<u64> {
        let mut sums = vec![0; self.n];
        for round in 0..ROUNDS {
            for k in 0..self.additions {
                sums[self.word(Side::Cpu, round, k)] += 1;
                sums[self.word(Side::Device, round, k)] += 1;
            }
        }
        sums
    }
}

/// One array of words that hold nothing, but have been written.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 8, 8)?;
    Ok(Box::new(Atomics {
        words: order.memory.words(n),
        plan: Plan {
            n,
            additions: (n / 8).min(ADDITIONS_MAX),
            seed: order.seed,
        },
    }))
}

#[derive(Clone)]
struct Add {
    words: u64,
    plan: Plan,
    round: u64,
}

impl Kernel for Add {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        for k in part(group, GROUP, self.plan.additions) {
            let word = self.plan.word(Side::Device, self.round, k);
            tile.atomic(self.words + count(word) * 8, AtomicOp::Add(1))?;
        }
        Ok(())
    }
}

impl Prepared for Atomics {
    fn bytes(&self) -> u64 {
        count(self.plan.n) * 8
    }

    fn traffic(&self) -> u64 {
        count(self.plan.additions) * 16 * ROUNDS
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let (words, plan) = (&self.words, self.plan);
        for round in 0..ROUNDS {
            let kernel = Add {
                words: words.address(),
                plan,
                round,
            };
            let add = |k| {
                words.add(plan.word(Side::Cpu, round, k), 1);
                if k.is_multiple_of(EVICTS_EVERY) {
                    job.evict_all();
                }
            };
            let on_the_cpu = || (0..plan.additions).for_each(add);
            let groups = groups(plan.additions, GROUP);
            job.launch_beside("additions", &kernel, groups, Some(on_the_cpu))?;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let sums = self.plan.sums();
        let mut words = sums.iter().enumerate();
        words.all(|(word, sum)| self.words.get(word) == *sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Memory;

    #[test]
    fn one_lost_addition_is_noticed() {
        let plan = Plan {
            n: 100,
            additions: 50,
            seed: 5,
        };
        let words = Memory::Process.words(plan.n);
        for (word, sum) in plan.sums().into_iter().enumerate() {
            words.add(word, sum);
        }
        let atomics = Atomics { words, plan };
        assert!(atomics.verify());
        atomics.words.add(7, u64::MAX);
        assert!(!atomics.verify());
    }
}
