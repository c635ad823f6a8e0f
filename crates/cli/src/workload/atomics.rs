//! `atomics`: CPU and device add one to the same words at the same time, by atomics. None may be lost,
//! wherever the page is and while it moves.
//!
//! Every other addition hits one of a few words, the rest any. The device's additions are bounded in each
//! round: nearly each faults. The CPU goes on as long as the device does, and meanwhile a
//! [storm](Storm) moves the words about. Rounds follow each other for as long as was asked for.

use std::cell::OnceCell;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Kernel, Stop, Tile};
use serde_json::{Value, json};

use crate::run::Stopwatch;
use crate::size::counted;
use crate::workload::{
    Job, JobError, Order, PrepareError, Prepared, Storm, Words, below, count, elements, groups,
    mix, part,
};

/// Rounds, where no time was asked for.
const ROUNDS: usize = 4;
/// Additions by the device in one round: at most this many, at most an eighth of the words.
const ADDITIONS_MAX: usize = 1 << 12;
/// Words that every other addition hits.
const HOT: usize = 16;
const GROUP: usize = 256;

struct Atomics {
    words: Words,
    plan: Plan,
    seconds: Option<u64>,
    /// Additions by the CPU, in each round.
    by_cpu: Vec<u64>,
    /// How often pages were moved meanwhile.
    gusts: u64,
    /// What the words lack, once somebody has looked.
    wrong: OnceCell<Wrong>,
}

/// What is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wrong {
    /// Words that do not hold what was added to them.
    words: u64,
    /// Additions that all words together lack.
    lost: i128,
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
        let random = mix(mix(self.seed.wrapping_add(stream)).wrapping_add(k));
        let hot = k.is_multiple_of(2);
        below(random, if hot { self.n.min(HOT) } else { self.n })
    }

    /// What every word must be in the end.
    fn sums(&self, by_cpu: &[u64]) -> Vec<u64> {
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
        seconds: order.seconds,
        by_cpu: Vec::new(),
        gusts: 0,
        wrong: OnceCell::new(),
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

impl Atomics {
    /// Adds on both sides, round after round; returns the CPU's additions in each.
    fn rounds(&self, job: &Job<'_>) -> Result<Vec<u64>, JobError> {
        let (words, plan) = (&self.words, self.plan);
        let clock = Stopwatch::start();
        let mut by_cpu = Vec::new();
        let goes_on = |round: usize| match self.seconds {
            None => round < ROUNDS,
            Some(seconds) => clock.elapsed().as_secs() < seconds,
        };
        while goes_on(by_cpu.len()) {
            let round = by_cpu.len();
            let kernel = Add {
                words: words.address(),
                plan,
                round,
            };
            let add = |k: u64| words.add(plan.word(Side::Cpu, round, k), 1);
            let groups = groups(plan.additions, GROUP);
            by_cpu.push(job.launch_beside("additions", &kernel, groups, add)?);
        }
        Ok(by_cpu)
    }

    /// Whole pages of the words.
    fn span(&self) -> HostSpan {
        let start = HostVa::new(self.words.address());
        let end = start.plus(self.bytes()).align_down(PAGE);
        let first = start.plus(PAGE - 1).align_down(PAGE);
        HostSpan::new(first, end.max(first.plus(PAGE)))
    }

    fn wrong(&self) -> Wrong {
        *self.wrong.get_or_init(|| {
            let sums = self.plan.sums(&self.by_cpu);
            let found = |word| self.words.get(word);
            let lacks = |(word, sum): (usize, &u64)| i128::from(*sum) - i128::from(found(word));
            let all = sums.iter().enumerate().map(lacks);
            all.fold(Wrong { words: 0, lost: 0 }, |wrong, lacks| Wrong {
                words: wrong.words + u64::from(lacks != 0),
                lost: wrong.lost + lacks,
            })
        })
    }

    fn additions(&self) -> (u64, u64) {
        let by_device = count(self.plan.additions * self.by_cpu.len());
        (self.by_cpu.iter().sum(), by_device)
    }
}

impl Prepared for Atomics {
    fn bytes(&self) -> u64 {
        count(self.plan.n) * 8
    }

    fn traffic(&self) -> u64 {
        self.additions().1 * 16
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let storm = Storm {
            span: self.span(),
            seed: self.plan.seed,
        };
        let (by_cpu, gusts) = job.in_storm(storm, || self.rounds(job));
        self.by_cpu = by_cpu?;
        self.gusts = gusts;
        Ok(())
    }

    fn answer(&self) -> Option<String> {
        let (by_cpu, by_device) = self.additions();
        let lost = self.wrong().lost;
        Some(format!(
            "{} by the CPU, {by_device} by the device, {lost} lost",
            counted(by_cpu, "addition", "additions")
        ))
    }

    fn counts(&self) -> Option<Value> {
        let (by_cpu, by_device) = self.additions();
        let Wrong { words, lost } = self.wrong();
        Some(json!({
            "rounds": self.by_cpu.len(),
            "cpu_additions": by_cpu,
            "device_additions": by_device,
            "storm_moves": self.gusts,
            "lost_additions": i64::try_from(lost).unwrap_or(i64::MAX),
            "wrong_words": words,
        }))
    }

    fn verify(&self) -> bool {
        self.wrong().words == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Memory;

    /// Words to which everything was added that two rounds add.
    fn added() -> Atomics {
        let plan = Plan {
            n: 100,
            additions: 50,
            seed: 5,
        };
        let words = Memory::Process.words(plan.n);
        let by_cpu = vec![9; 2];
        for (word, sum) in plan.sums(&by_cpu).into_iter().enumerate() {
            words.add(word, sum);
        }
        Atomics {
            words,
            plan,
            seconds: None,
            by_cpu,
            gusts: 0,
            wrong: OnceCell::new(),
        }
    }

    #[test]
    fn one_lost_addition_is_noticed() {
        let right = added();
        assert!(right.verify());
        let wrong = added();
        wrong.words.add(7, u64::MAX);
        assert!(!wrong.verify());
        assert_eq!(wrong.wrong(), Wrong { words: 1, lost: 1 });
        let answer = "18 additions by the CPU, 100 by the device, 1 lost";
        assert_eq!(wrong.answer().as_deref(), Some(answer));
    }
}
