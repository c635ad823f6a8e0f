//! `atomics`: CPU and device add one to the same words at the same time, by atomics. None may be lost,
//! wherever the page is and while it moves.
//!
//! Every other addition hits one of a few words, the rest any. The device's additions are bounded: nearly
//! each faults. The CPU goes on as long as the device does, and throws everything out of device memory now
//! and then.

use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Job, JobError, Order, PrepareError, Prepared, Words, below, count, elements, groups, mix, part,
};

const ROUNDS: usize = 4;
/// Additions by the device in one round: at most this many, at most an eighth of the words.
const ADDITIONS_MAX: usize = 1 << 12;
/// Words that every other addition hits.
const HOT: usize = 16;
/// Additions by the CPU between two evictions.
const EVICTS_EVERY: u64 = 1 << 12;
const GROUP: usize = 256;

struct Atomics {
    words: Words,
    plan: Plan,
    /// Additions by the CPU, in each round.
    by_cpu: [u64; ROUNDS],
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
    fn word(&self, side: Side, round: usize, k: u64) -> usize {
        let stream = 2 * count(round) + side as u64;
        let random = mix(self.seed.wrapping_add(stream << 48).wrapping_add(k));
        let hot = k.is_multiple_of(2);
        below(random, if hot { self.n.min(HOT) } else { self.n })
    }

    /// What every word must be in the end.
    fn sums(&self, by_cpu: &[u64; ROUNDS]) -> Vec<u64> {
        let mut sums = vec![0; self.n];
        for (round, by_cpu) in by_cpu.iter().enumerate() {
            (0..*by_cpu).for_each(|k| sums[self.word(Side::Cpu, round, k)] += 1);
            let by_device = 0..count(self.additions);
            by_device.for_each(|k| sums[self.word(Side::Device, round, k)] += 1);
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
        by_cpu: [0; ROUNDS],
    }))
}

#[derive(Clone)]
struct Add {
    words: u64,
    plan: Plan,
    round: usize,
}

impl Kernel for Add {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        for k in part(group, GROUP, self.plan.additions) {
            let word = self.plan.word(Side::Device, self.round, count(k));
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
        count(self.plan.additions * ROUNDS) * 16
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let (words, plan) = (&self.words, self.plan);
        for (round, by_cpu) in self.by_cpu.iter_mut().enumerate() {
            let kernel = Add {
                words: words.address(),
                plan,
                round,
            };
            let add = |k: u64| {
                words.add(plan.word(Side::Cpu, round, k), 1);
                if k.is_multiple_of(EVICTS_EVERY) {
                    job.evict_all();
                }
            };
            let groups = groups(plan.additions, GROUP);
            *by_cpu = job.launch_beside("additions", &kernel, groups, add)?;
        }
        Ok(())
    }

    fn answer(&self) -> Option<String> {
        let (by_cpu, by_device) = (
            self.by_cpu.iter().sum::<u64>(),
            self.plan.additions * ROUNDS,
        );
        Some(format!(
            "{by_cpu} additions by the CPU, {by_device} by the device"
        ))
    }

    fn verify(&self) -> bool {
        let sums = self.plan.sums(&self.by_cpu);
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
        let by_cpu = [9; ROUNDS];
        for (word, sum) in plan.sums(&by_cpu).into_iter().enumerate() {
            words.add(word, sum);
        }
        let atomics = Atomics {
            words,
            plan,
            by_cpu,
        };
        assert!(atomics.verify());
        atomics.words.add(7, u64::MAX);
        assert!(!atomics.verify());
    }
}
