//! Many worlds of one scenario: seed after seed on all cores, or all of them.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use crate::sched::dfs::Dfs;
use crate::sched::fail::FailureKind;
use crate::sched::lock::Order;
use crate::sched::options::Options;
use crate::sched::pick::Picker;
use crate::sched::rng::mix;
use crate::sched::script::shrink_by_actor;
use crate::sched::shrink::{Progress, Verdict, shrink};
use crate::sched::sim::{Outcome, Sim, Trouble, keep_panics_quiet, lock_orders, replay, run};
use crate::sched::tape::Tape;

/// Seeds that a thread takes at once.
const CHUNK: u64 = 64;
/// Every so many seeds, a world is run twice and must be the same.
const TWICE_EVERY: u64 = 256;
/// Times that a tape is made short by actor and then as it is.
const SHRINK_ROUNDS: u32 = 3;

/// Runs worlds of one scenario. `B` makes the actors of one.
#[derive(Debug)]
pub struct Explorer<B> {
    /// How worlds run; the seed is replaced by each world's.
    pub options: Options,
    /// Makes the picker of a seed.
    pub picker: fn(u64) -> Picker,
    /// Threads that run worlds.
    pub threads: usize,
    /// Makes a world.
    pub build: B,
}

/// What became of many worlds.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Worlds that were run, up to the first failure.
    pub worlds: u64,
    /// Switch points in them.
    pub steps: u64,
    /// Hash over all of them; the same on any number of threads.
    pub hash: u64,
    /// How many worlds have reached each goal ([`ModelEnv::reach`](crate::sched::ModelEnv::reach)).
    pub reached: Vec<u64>,
    /// Time it took.
    pub elapsed: Duration,
    /// The first seed that failed, and how.
    pub failure: Option<(u64, Box<Trouble>)>,
    /// Cycles among the orders in which locks were taken in different worlds.
    pub lock_cycles: Vec<Vec<Order>>,
}

impl Summary {
    /// Worlds per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "shown to people")]
        let worlds = self.worlds as f64;
        worlds / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Adds what another thread has seen.
    fn add(&mut self, other: Self) {
        self.worlds += other.worlds;
        self.steps += other.steps;
        self.hash = self.hash.wrapping_add(other.hash);
        self.add_reached(&other.reached);
        if let Some((seed, trouble)) = other.failure
            && self.failure.as_ref().is_none_or(|(known, _)| seed < *known)
        {
            self.failure = Some((seed, trouble));
        }
    }

    fn add_reached(&mut self, counts: &[u64]) {
        if self.reached.len() < counts.len() {
            self.reached.resize(counts.len(), 0);
        }
        for (total, count) in self.reached.iter_mut().zip(counts) {
            *total += count;
        }
    }

    /// One more world has reached the goals of these bits.
    fn count_reached(&mut self, bits: &[u64]) {
        if self.reached.len() < 64 * bits.len() {
            self.reached.resize(64 * bits.len(), 0);
        }
        for (counts, word) in self.reached.chunks_mut(64).zip(bits) {
            for (n, count) in counts.iter_mut().enumerate() {
                *count += word >> n & 1;
            }
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} {}, {} steps, {:.0} worlds/s, hash {:#018x}",
            self.worlds,
            if self.worlds == 1 { "world" } else { "worlds" },
            self.steps,
            self.rate(),
            self.hash
        )?;
        for cycle in &self.lock_cycles {
            writeln!(f, "lock order has a cycle:")?;
            for order in cycle {
                writeln!(f, "  {order}")?;
            }
        }
        match &self.failure {
            Some((seed, trouble)) => write!(f, "seed {seed:#x} fails: {trouble}"),
            None => Ok(()),
        }
    }
}

/// What one thread has seen of one chunk of seeds.
struct Chunk {
    start: u64,
    summary: Summary,
}

impl<B: Fn(&Sim) + Sync> Explorer<B> {
    /// Runs the worlds of `seeds` until one fails. `progress` is told how many are done, by
    /// whichever thread did some.
    ///
    /// # Panics
    /// When a world run twice is not the same: something in it depends on more than its choices.
    pub fn run_seeds(&self, seeds: Range<u64>, progress: &(dyn Fn(u64) + Sync)) -> Summary {
        keep_panics_quiet();
        let mut found = Vec::new();
        let elapsed = timed(|| found = self.run_threads(&seeds, progress));
        let (chunks, orders): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let chunks: Vec<Chunk> = chunks.into_iter().flatten().collect();
        let failed = |chunk: &&Chunk| chunk.summary.failure.is_some();
        let last = chunks.iter().filter(failed).map(|chunk| chunk.start).min();
        let mut summary = Summary::default();
        for chunk in chunks {
            // What other threads saw of later seeds is chance.
            if last.is_none_or(|last| chunk.start <= last) {
                summary.add(chunk.summary);
            }
        }
        summary.elapsed = elapsed;
        summary.lock_cycles = cycles(orders.into_iter().flatten());
        summary
    }

    fn run_threads(
        &self,
        seeds: &Range<u64>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Vec<(Vec<Chunk>, Vec<Order>)> {
        let next = AtomicU64::new(seeds.start);
        let failed = AtomicU64::new(u64::MAX);
        let work = || {
            let mut chunks = Vec::new();
            loop {
                let start = next.fetch_add(CHUNK, Ordering::Relaxed);
                if start >= seeds.end || start > failed.load(Ordering::Relaxed) {
                    return (chunks, lock_orders());
                }
                let chunk = self.run_chunk(start..seeds.end.min(start.saturating_add(CHUNK)));
                if let Some((seed, _)) = &chunk.summary.failure {
                    failed.fetch_min(*seed, Ordering::Relaxed);
                }
                progress(chunk.summary.worlds);
                chunks.push(chunk);
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads.max(1))
                .map(|_| scope.spawn(work))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(found) => found,
                Err(payload) => std::panic::resume_unwind(payload),
            };
            threads.into_iter().map(join).collect()
        })
    }

    fn run_chunk(&self, seeds: Range<u64>) -> Chunk {
        let mut chunk = Chunk {
            start: seeds.start,
            summary: Summary::default(),
        };
        for seed in seeds {
            let outcome = self.run_seed(seed);
            if seed % TWICE_EVERY == 0 {
                let again = self.run_seed(seed).hash;
                assert_eq!(
                    outcome.hash, again,
                    "seed {seed:#x} makes two different worlds"
                );
            }
            let summary = &mut chunk.summary;
            summary.worlds += 1;
            summary.steps += outcome.steps;
            summary.hash = summary.hash.wrapping_add(mix(seed, outcome.hash));
            summary.count_reached(&outcome.reached);
            if let Some(trouble) = outcome.trouble {
                summary.failure = Some((seed, trouble));
                break;
            }
        }
        chunk
    }

    /// Runs the world of one seed.
    pub fn run_seed(&self, seed: u64) -> Outcome {
        let options = Options {
            seed,
            ..self.options.clone()
        };
        run(&options, &mut (self.picker)(seed), &self.build)
    }

    /// Runs all worlds with at most `preemptions_max` preemptions, and at most `worlds_max`, until
    /// one fails.
    pub fn run_all(&self, preemptions_max: u32, worlds_max: u64) -> Summary {
        keep_panics_quiet();
        let mut summary = Summary::default();
        let mut picker = Picker::Dfs(Dfs::new(preemptions_max));
        let elapsed = timed(|| {
            while summary.worlds < worlds_max {
                let outcome = run(&self.options, &mut picker, &self.build);
                summary.hash = mix(summary.hash, outcome.hash);
                summary.count_reached(&outcome.reached);
                summary.steps += outcome.steps;
                summary.worlds += 1;
                if let Some(trouble) = outcome.trouble {
                    summary.failure = Some((self.options.seed, trouble));
                    break;
                }
                if !picker.advance() {
                    break;
                }
            }
        });
        summary.elapsed = elapsed;
        summary.lock_cycles = cycles(lock_orders().into_iter());
        summary
    }

    /// Shrinks the tape of a failure to one that fails in the same way, in at most
    /// `6 * runs_max` runs.
    ///
    /// Looks first for a simpler way to the same failure, by pickers that switch rarely: from
    /// there it is not far.
    pub fn shrink(
        &self,
        trouble: &Trouble,
        runs_max: u32,
        progress: &mut dyn FnMut(&Progress),
    ) -> Tape {
        keep_panics_quiet();
        let kind = trouble.failure.kind;
        let simpler = self.simpler(trouble, runs_max / 4);
        let trouble = simpler.as_deref().unwrap_or(trouble);
        let mut verdict = |tape: &Tape| match replay(&self.options, tape, &self.build).trouble {
            Some(found) if found.failure.kind == kind => Verdict::Fails(found.tape.choices),
            _ => Verdict::Passes,
        };
        let mut tape = trouble.tape.clone();
        for _round in 0..SHRINK_ROUNDS {
            let before = tape.interesting();
            let by_actor = self.shrink_by_actor(&tape, kind, runs_max);
            tape = shrink(&by_actor, runs_max, &mut verdict, progress);
            if tape.interesting() == before {
                break;
            }
        }
        tape.hash = Some(replay(&self.options, &tape, &self.build).hash);
        tape
    }
}

impl<B: Fn(&Sim) + Sync> Explorer<B> {
    /// A tape that fails in the same way, where actors that do not matter do less.
    pub(super) fn shrink_by_actor(&self, tape: &Tape, kind: FailureKind, runs: u32) -> Tape {
        let options = Options {
            seed: tape.seed,
            ..self.options.clone()
        };
        shrink_by_actor(tape, runs, &mut |scripted| {
            let mut picker = Picker::Scripted(Box::new(scripted));
            let found = run(&options, &mut picker, &self.build).trouble?;
            let Picker::Scripted(scripted) = picker else {
                return None;
            };
            let same = found.failure.kind == kind;
            same.then(|| (found.tape, scripted.played()))
        })
    }

    /// The simplest of some more worlds of the same seed that fail in the same way, if it is
    /// simpler than `trouble`.
    fn simpler(&self, trouble: &Trouble, runs: u32) -> Option<Box<Trouble>> {
        let options = Options {
            seed: trouble.tape.seed,
            ..self.options.clone()
        };
        let choices = u32::try_from(trouble.tape.choices.len()).unwrap_or(u32::MAX);
        let mut best: Option<Box<Trouble>> = None;
        for n in 0..runs {
            let mut picker = Picker::pct(u64::from(n), 1 + n % 3, choices.max(1));
            let found = run(&options, &mut picker, &self.build).trouble;
            let Some(found) = found.filter(|found| found.failure.kind == trouble.failure.kind)
            else {
                continue;
            };
            let bar = best.as_deref().unwrap_or(trouble);
            if found.tape.interesting() < bar.tape.interesting() {
                best = Some(found);
            }
        }
        best
    }
}

/// How long something takes, for people: no world sees it.
#[expect(
    clippy::disallowed_methods,
    reason = "the explorer stands outside of worlds"
)]
fn timed(act: impl FnOnce()) -> Duration {
    let start = std::time::Instant::now();
    act();
    start.elapsed()
}

/// Shortest cycles through each order that lies on one, each cycle once.
fn cycles(orders: impl Iterator<Item = Order>) -> Vec<Vec<Order>> {
    let mut all: Vec<Order> = orders.collect();
    all.sort_by(|a, b| (&a.outer, &a.inner, a.seed).cmp(&(&b.outer, &b.inner, b.seed)));
    all.dedup_by(|a, b| a.outer == b.outer && a.inner == b.inner);
    let mut found: Vec<Vec<Order>> = Vec::new();
    for order in &all {
        let known = found.iter().flatten().any(|known| known == order);
        if !known && let Some(mut way) = way(&all, &order.inner, &order.outer) {
            way.insert(0, order.clone());
            found.push(way);
        }
    }
    found
}

/// Orders that lead from one lock to another, if there are any.
fn way(all: &[Order], from: &str, to: &str) -> Option<Vec<Order>> {
    let mut reached: Vec<(&str, Vec<Order>)> = vec![(from, Vec::new())];
    let mut at = 0;
    while let Some((lock, path)) = reached.get(at).cloned() {
        if lock == to {
            return Some(path);
        }
        at += 1;
        for order in all.iter().filter(|order| order.outer == lock) {
            if reached.iter().all(|(known, _)| *known != order.inner) {
                let longer = path.iter().chain([order]).cloned().collect();
                reached.push((&order.inner, longer));
            }
        }
    }
    None
}
