//! Makes a failing tape short: fewer interesting choices, lower ones, a shorter way.
//!
//! Delta debugging over the choices. A candidate is taken when it still fails and is simpler: it
//! has fewer choices that are not 0, or as many and is shorter, or as long and lower.

use core::ops::Range;

use crate::sched::rng::Stream;
use crate::sched::tape::Tape;

/// What a replay of a candidate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It fails in the same way; the choices that it really made.
    Fails(Vec<u32>),
    /// It does not.
    Passes,
}

/// How far a shrinker has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Worlds that were run.
    pub runs: u32,
    /// Choices that are not 0.
    pub interesting: usize,
    /// Choices in all.
    pub choices: usize,
}

/// The share of runs that guessing may use.
const GUESSES_ONE_IN: u32 = 3;
/// Most interesting choices of a guess.
const GUESSED_MAX: u32 = 4;

struct Shrinker<'a> {
    best: Tape,
    runs: u32,
    runs_max: u32,
    run: &'a mut dyn FnMut(&Tape) -> Verdict,
    progress: &'a mut dyn FnMut(&Progress),
}

/// Shrinks `tape`, which fails, in at most `runs_max` runs. `run` replays a candidate; `progress`
/// is told after each improvement. The result fails as well.
pub fn shrink(
    tape: &Tape,
    runs_max: u32,
    run: &mut dyn FnMut(&Tape) -> Verdict,
    progress: &mut dyn FnMut(&Progress),
) -> Tape {
    let mut best = tape.with_choices(tape.choices.clone());
    best.trim();
    let mut shrinker = Shrinker {
        best,
        runs: 0,
        runs_max,
        run,
        progress,
    };
    shrinker.guess();
    loop {
        let before = cost(&shrinker.best.choices);
        shrinker.cut_tail();
        shrinker.zero_blocks();
        shrinker.merge_turns();
        shrinker.drop_blocks();
        shrinker.lower();
        if cost(&shrinker.best.choices) == before || shrinker.is_spent() {
            return shrinker.best;
        }
    }
}

/// What is to become smaller, most important first.
pub(super) fn cost(choices: &[u32]) -> (usize, usize, u64) {
    let interesting = choices.iter().filter(|choice| **choice != 0).count();
    let sum = choices.iter().map(|choice| u64::from(*choice)).sum();
    (interesting, choices.len(), sum)
}

impl Shrinker<'_> {
    const fn is_spent(&self) -> bool {
        self.runs >= self.runs_max
    }

    /// Tries other choices; whether they are now the best.
    fn attempt(&mut self, choices: Vec<u32>) -> bool {
        let mut candidate = self.best.with_choices(choices);
        candidate.trim();
        if self.is_spent() || cost(&candidate.choices) >= cost(&self.best.choices) {
            return false;
        }
        self.runs += 1;
        let Verdict::Fails(made) = (self.run)(&candidate) else {
            return false;
        };
        // What the world really asked may be even less.
        let mut made = self.best.with_choices(made);
        made.trim();
        self.best = if cost(&made.choices) < cost(&candidate.choices) {
            made
        } else {
            candidate
        };
        self.report();
        true
    }

    fn report(&mut self) {
        let progress = Progress {
            runs: self.runs,
            interesting: self.best.interesting(),
            choices: self.best.choices.len(),
        };
        (self.progress)(&progress);
    }

    /// Guesses tapes with few interesting choices. Most races need few; where the tape comes from
    /// a picker that switches all the time, cutting it down ends far above that.
    fn guess(&mut self) {
        let mut stream = Stream::named(self.best.seed, "shrink");
        let highest = self.best.choices.iter().max().copied().unwrap_or(0);
        let length = u32::try_from(self.best.choices.len()).unwrap_or(u32::MAX);
        for n in 0..self.runs_max / GUESSES_ONE_IN {
            if self.best.interesting() <= 2 * GUESSED_MAX as usize {
                // What follows is surer.
                return;
            }
            let few = 1 + n % GUESSED_MAX;
            let mut choices = vec![0; length as usize];
            for _ in 0..few {
                choices[stream.below(length) as usize] = 1 + stream.below(highest);
            }
            self.attempt(choices);
        }
    }

    /// Finds the shortest beginning that fails, by halves.
    fn cut_tail(&mut self) {
        let (mut low, mut high) = (0, self.best.choices.len());
        while low < high && !self.is_spent() {
            let middle = low.midpoint(high);
            if self.attempt(self.best.choices[..middle].to_vec()) {
                high = middle.min(self.best.choices.len());
            } else {
                low = middle + 1;
            }
        }
    }

    /// Sets blocks of interesting choices to 0: large blocks first, single ones last.
    fn zero_blocks(&mut self) {
        self.by_blocks(
            |choices| (0..choices.len()).filter(|at| choices[*at] != 0).collect(),
            |choices, block| {
                for at in block {
                    choices[*at] = 0;
                }
            },
        );
    }

    /// Swaps what lies behind two switches, so that an actor has two turns in one. Simply zeroing
    /// the switches would also change who does what follows.
    fn merge_turns(&mut self) {
        let mut at = 0;
        while !self.is_spent() {
            let choices = &self.best.choices;
            let switches: Vec<usize> = (0..choices.len()).filter(|n| choices[*n] != 0).collect();
            let Some([first, second]) = switches.get(at..at + 2) else {
                return;
            };
            let third = switches.get(at + 2).copied().unwrap_or(choices.len());
            let merged = [
                &choices[..*first],
                &choices[*second + 1..third],
                &choices[*first..*second],
            ]
            .concat();
            let rest = choices.get(third + 1..).unwrap_or_default();
            let both = [&merged, rest].concat();
            let one = [&merged, &choices[third..]].concat();
            if !self.attempt(both) && !self.attempt(one) {
                at += 1;
            }
        }
    }

    /// Takes blocks of choices out; what follows moves forward.
    fn drop_blocks(&mut self) {
        self.by_blocks(
            |choices| (0..choices.len()).collect(),
            |choices, block| {
                if let (Some(first), Some(last)) = (block.first(), block.last()) {
                    choices.drain(*first..=*last);
                }
            },
        );
    }

    /// Applies `change` to blocks of the positions that `positions` lists, of all sizes.
    fn by_blocks(
        &mut self,
        positions: fn(&[u32]) -> Vec<usize>,
        change: fn(&mut Vec<u32>, &[usize]),
    ) {
        let mut size = positions(&self.best.choices).len();
        while size > 0 && !self.is_spent() {
            let mut at = 0;
            loop {
                let all = positions(&self.best.choices);
                let Some(block) = all.get(block_at(at, size, all.len())) else {
                    break;
                };
                let mut choices = self.best.choices.clone();
                change(&mut choices, block);
                // Where it worked, other positions have moved here.
                if block.is_empty() || !self.attempt(choices) {
                    at += size;
                }
                if block_at(at, size, all.len()).is_empty() || self.is_spent() {
                    break;
                }
            }
            size /= 2;
        }
    }

    /// Lowers the choices that must not be 0.
    fn lower(&mut self) {
        let mut at = 0;
        while at < self.best.choices.len() && !self.is_spent() {
            let value = self.best.choices[at];
            for lower in [1, value / 2, value.saturating_sub(1)] {
                let mut choices = self.best.choices.clone();
                if lower == 0 || lower >= value || at >= choices.len() {
                    continue;
                }
                choices[at] = lower;
                if self.attempt(choices) {
                    break;
                }
            }
            at += 1;
        }
    }
}

fn block_at(at: usize, size: usize, len: usize) -> Range<usize> {
    at.min(len)..(at + size).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world that fails when its choices contain a 2 and, later, a 3 or more.
    fn fails(tape: &Tape) -> Verdict {
        let first = tape.choices.iter().position(|choice| *choice == 2);
        let second = first.and_then(|at| tape.choices[at..].iter().position(|n| *n >= 3));
        match second {
            Some(_) => Verdict::Fails(tape.choices.clone()),
            None => Verdict::Passes,
        }
    }

    #[test]
    fn only_what_matters_is_left() {
        let choices: Vec<u32> = (0..500).map(|n| n * 7 % 11).collect();
        let tape = Tape {
            choices,
            ..Tape::default()
        };
        let mut steps = 0;
        let shrunk = shrink(&tape, 10_000, &mut fails, &mut |_| steps += 1);
        assert_eq!(shrunk.choices, [2, 3]);
        assert!(steps > 0);
    }

    #[test]
    fn effort_is_bounded() {
        let choices: Vec<u32> = (0..500).map(|n| n * 7 % 11).collect();
        let tape = Tape {
            choices,
            ..Tape::default()
        };
        let mut runs = 0;
        let mut run = |tape: &Tape| {
            runs += 1;
            fails(tape)
        };
        let shrunk = shrink(&tape, 5, &mut run, &mut |_| {});
        assert!(runs <= 5);
        assert!(matches!(fails(&shrunk), Verdict::Fails(_)));
    }
}
