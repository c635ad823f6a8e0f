//! Who decides: the pickers behind every choice of a world.
//!
//! A choice has `n` possible answers. Answer 0 is always the dullest one: the running actor goes
//! on, nothing fails. So a world whose choices are all 0 is the simplest one, and shrinking means
//! zeroing.

use crate::sched::dfs::Dfs;
use crate::sched::rng::{Stream, mix};

/// Actors that one world can have.
pub const ACTORS_MAX: usize = 64;

/// What a choice is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Who runs next. Answer 0: the running actor goes on; any other is a preemption.
    Stay,
    /// Who runs next, when the running actor gives way: it comes last.
    Yield,
    /// Who runs next, when the running actor cannot go on.
    Next,
    /// Whether something rare happens; 0 when not. Random pickers let it happen once in so many
    /// times; 0 means never.
    Rare(u32),
    /// Anything else that a scenario wants to vary.
    Data,
}

/// The actors among which a choice is made: answer `i` is the `i`-th one in cyclic order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates {
    /// One bit per actor.
    pub(super) ready: u64,
    /// Where counting starts.
    pub(super) first: u32,
}

impl Candidates {
    /// How many there are.
    pub(super) const fn count(self) -> u32 {
        self.ready.count_ones()
    }

    /// The actor that answer `index` means.
    pub(super) const fn actor(self, index: u32) -> usize {
        let mut rest = self.ready.rotate_right(self.first);
        let mut n = 0;
        while n < index {
            rest &= rest - 1;
            n += 1;
        }
        ((rest.trailing_zeros() + self.first) % 64) as usize
    }

    /// All of them, in the order of answers.
    fn actors(self) -> impl Iterator<Item = usize> {
        let mut rest = self.ready.rotate_right(self.first);
        core::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(((bit + self.first) % 64) as usize)
        })
    }
}

/// How the choices of a world are made.
#[derive(Clone, Debug)]
pub enum Picker {
    /// At random.
    Random(Random),
    /// By priorities that change at random points.
    Pct(Box<Pct>),
    /// As recorded; 0 where the record ends.
    Tape(Playback),
    /// All possible worlds, one after the other.
    Dfs(Dfs),
}

impl Picker {
    /// For where nothing is asked: always 0.
    pub(super) const NONE: Self = Self::Tape(Playback {
        choices: Vec::new(),
        at: 0,
    });

    /// Every answer equally likely.
    #[must_use]
    pub fn uniform(seed: u64) -> Self {
        Self::sticky(seed, 0)
    }

    /// A running actor is preempted once in `switch_one_in` chances.
    #[must_use]
    pub fn sticky(seed: u64, switch_one_in: u32) -> Self {
        Self::Random(Random {
            stream: Stream::named(seed, "schedule"),
            switch_one_in,
        })
    }

    /// Probabilistic concurrency testing: finds a bug that needs `depth` ordered points among
    /// `actors` actors and `choices` choices with probability at least
    /// `1 / (actors * choices^(depth - 1))`.
    #[must_use]
    pub fn pct(seed: u64, depth: u32, choices: u32) -> Self {
        Self::Pct(Box::new(Pct::new(seed, depth, choices)))
    }

    /// One of the pickers above, by the seed: a mix finds more than its best part.
    #[must_use]
    pub fn swarm(seed: u64) -> Self {
        let mut stream = Stream::named(seed, "swarm");
        match stream.below(4) {
            0 => Self::uniform(seed),
            1 => Self::sticky(seed, 2 << stream.below(5)),
            _ => Self::pct(seed, 1 + stream.below(4), 16 << stream.below(7)),
        }
    }

    /// The recorded answers.
    #[must_use]
    pub fn playback(choices: &[u32]) -> Self {
        Self::Tape(Playback {
            choices: choices.to_vec(),
            at: 0,
        })
    }

    /// Turns a search to its next world; `false` when there is none left, or no search.
    #[must_use]
    pub fn advance(&mut self) -> bool {
        match self {
            Self::Dfs(dfs) => dfs.advance(),
            Self::Random(_) | Self::Pct(_) | Self::Tape(_) => false,
        }
    }

    /// Answers a question with `n >= 2` answers.
    #[inline]
    pub(super) fn pick(&mut self, n: u32, what: What, among: Candidates) -> u32 {
        match self {
            Self::Random(random) => random.pick(n, what),
            Self::Pct(pct) => pct.pick(n, what, among),
            Self::Tape(playback) => playback.pick(n),
            Self::Dfs(dfs) => dfs.pick(n, what),
        }
    }
}

/// Picks at random.
#[derive(Clone, Debug)]
pub struct Random {
    stream: Stream,
    /// 0: no preference.
    switch_one_in: u32,
}

impl Random {
    #[inline]
    fn pick(&mut self, n: u32, what: What) -> u32 {
        match what {
            What::Stay if self.switch_one_in > 0 => self.rarely(n, self.switch_one_in),
            What::Rare(one_in) => self.rarely(n, one_in),
            What::Stay | What::Yield | What::Next | What::Data => self.stream.below(n),
        }
    }

    fn rarely(&mut self, n: u32, one_in: u32) -> u32 {
        if self.stream.one_in(one_in) {
            1 + self.stream.below(n - 1)
        } else {
            0
        }
    }
}

/// Picks by priorities (PCT: Burckhardt et al., ASPLOS 2010).
#[derive(Clone, Debug)]
pub struct Pct {
    data: Random,
    /// Higher runs first.
    priorities: [u64; ACTORS_MAX],
    /// Choices after which the actor that runs falls to a low priority; ascending.
    changes: Vec<u32>,
    changed: usize,
    count: u32,
    /// The next priority for who gives way: lower each time, so that spinning actors take turns.
    lowest: u64,
    /// Who could run at the last pick, and the one of them that was picked.
    last: (u64, usize),
}

/// Starting priorities lie above; those of change points and of giving way below.
const STARTING: u64 = 1 << 63;
const CHANGED: u64 = 1 << 62;

impl Pct {
    fn new(seed: u64, depth: u32, choices: u32) -> Self {
        let mut stream = Stream::named(seed, "priorities");
        let key = stream.draw();
        let mut changes: Vec<u32> = (1..depth).map(|_| stream.below(choices)).collect();
        changes.sort_unstable();
        let priority = |actor: usize| STARTING | mix(key, actor as u64);
        Self {
            data: Random {
                stream,
                switch_one_in: 0,
            },
            priorities: core::array::from_fn(priority),
            changes,
            changed: 0,
            count: 0,
            lowest: CHANGED - 1,
            last: (0, 0),
        }
    }

    fn pick(&mut self, n: u32, what: What, among: Candidates) -> u32 {
        let running = match what {
            What::Stay => Some(among.actor(0)),
            What::Yield => Some(among.actor(n - 1)),
            What::Next => None,
            What::Rare(_) | What::Data => return self.data.pick(n, what),
        };
        if what == What::Stay && !self.is_change_due() && running == self.goes_on(among.ready) {
            self.count += 1;
            return 0;
        }
        if let Some(running) = running {
            self.lower(running, what);
        }
        self.count += 1;
        let highest = |(_, actor): &(u32, usize)| self.priorities[*actor];
        let best = (0..n).zip(among.actors()).max_by_key(highest);
        let (index, actor) = best.unwrap_or_default();
        self.last = (among.ready, actor);
        index
    }

    /// Who was picked last, if the same actors can run as then.
    fn goes_on(&self, ready: u64) -> Option<usize> {
        (ready == self.last.0).then_some(self.last.1)
    }

    fn is_change_due(&self) -> bool {
        let next = self.changes.get(self.changed);
        next.is_some_and(|at| *at <= self.count)
    }

    /// Applies the change points that are due, and puts who gives way behind all others.
    fn lower(&mut self, running: usize, what: What) {
        // A change that fell on a choice without a running actor is due now.
        while self.is_change_due() {
            self.changed += 1;
            self.priorities[running] = CHANGED + (self.changes.len() - self.changed) as u64;
        }
        if what == What::Yield {
            self.priorities[running] = self.lowest;
            self.lowest -= 1;
        }
    }
}

/// Plays a record back.
#[derive(Clone, Debug)]
pub struct Playback {
    choices: Vec<u32>,
    at: usize,
}

impl Playback {
    /// The next recorded answer. One that is too high for its question is lowered: tapes that
    /// were cut or changed still mean a world.
    fn pick(&mut self, n: u32) -> u32 {
        let choice = self.choices.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        choice.min(n - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_counted_in_a_circle() {
        let among = Candidates {
            ready: 0b1011,
            first: 1,
        };
        let order: Vec<usize> = (0..among.count()).map(|n| among.actor(n)).collect();
        assert_eq!(order, [1, 3, 0]);
    }

    #[test]
    fn playback_lowers_what_is_too_high_and_goes_on_with_zero() {
        let mut picker = Picker::playback(&[5, 1]);
        let among = Candidates { ready: 3, first: 0 };
        let picked = [0; 3].map(|_| picker.pick(3, What::Data, among));
        assert_eq!(picked, [2, 1, 0]);
    }

    #[test]
    fn rare_things_are_rare() {
        let mut picker = Picker::uniform(3);
        let among = Candidates { ready: 0, first: 0 };
        let happened = |n: &u32| *n != 0;
        let picks: Vec<u32> = (0..10_000)
            .map(|_| picker.pick(2, What::Rare(10), among))
            .collect();
        let count = picks.iter().filter(|n| happened(n)).count();
        assert!((850..1150).contains(&count), "{count}");
        assert_eq!(picker.pick(2, What::Rare(0), among), 0);
    }
}
