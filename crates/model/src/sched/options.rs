//! What may differ between worlds of one scenario.

use std::borrow::Cow;

use gpusvm::seam::env::Ns;

/// What an actor is about to do, or has just done: a place where another one may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Before a lock is taken.
    Lock,
    /// After a lock was released.
    Unlock,
    /// Before a wait on a word.
    Wait,
    /// After sleepers on a word were woken.
    Wake,
    /// After work was deferred.
    Defer,
    /// A place that the framework names ([`Point`](gpusvm::seam::env::Point)).
    Seam,
    /// A page-table entry was written.
    Pte,
    /// A TLB message was sent or answered.
    Tlb,
    /// A fence was signalled or is looked at.
    Fence,
    /// A load or store of an actor.
    Access,
    /// Anything else.
    Other,
    /// The actor looks again at something that only others can change: it gives way.
    Spin,
}

/// A set of [`Kind`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Points(u32);

impl Points {
    /// All kinds.
    pub const ALL: Self = Self(u32::MAX);

    /// These kinds alone.
    #[must_use]
    pub const fn only(kinds: &[Kind]) -> Self {
        let (mut set, mut at) = (0, 0);
        while at < kinds.len() {
            set |= Self::bit(kinds[at]);
            at += 1;
        }
        Self(set)
    }

    /// All but these.
    #[must_use]
    pub const fn without(self, kinds: &[Kind]) -> Self {
        Self(self.0 & !Self::only(kinds).0)
    }

    /// Whether the set has this kind.
    #[inline]
    #[must_use]
    pub const fn has(self, kind: Kind) -> bool {
        self.0 & Self::bit(kind) != 0
    }

    const fn bit(kind: Kind) -> u32 {
        1 << match kind {
            Kind::Lock => 0,
            Kind::Unlock => 1,
            Kind::Wait => 2,
            Kind::Wake => 3,
            Kind::Defer => 4,
            Kind::Seam => 5,
            Kind::Pte => 6,
            Kind::Tlb => 7,
            Kind::Fence => 8,
            Kind::Access => 9,
            Kind::Other => 10,
            Kind::Spin => 11,
        }
    }
}

/// What chaos does in the safety phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Chaos {
    /// Nothing.
    #[default]
    Off,
    /// Every site fails or is delayed once in so many visits, at random.
    OneIn(u32),
    /// Exactly one visit of one site fails, counted from 0.
    Nth {
        /// Which site.
        site: Cow<'static, str>,
        /// Which visit.
        n: u32,
    },
}

/// Whether events keep their texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Texts {
    /// No text is made: fastest.
    #[default]
    Dropped,
    /// Texts are made and kept, for people.
    Kept,
}

/// When the tape of a world is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepTape {
    /// When it failed.
    #[default]
    OnFailure,
    /// Always.
    Always,
    /// Never, not even of a failure: for long worlds that follow from their seed.
    Never,
}

/// What happens when the order of locks has a cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockRules {
    /// The world has failed.
    #[default]
    Forbid,
    /// Nothing: only real deadlocks fail.
    Ignore,
}

/// How a world runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the scenario, for tapes. A new name makes the scheduler forget lock orders.
    pub scenario: Cow<'static, str>,
    /// Planted bug, for tapes.
    pub mutant: Option<String>,
    /// What else the scenario wants to find on a tape.
    pub notes: String,
    /// Seed of the random streams.
    pub seed: u64,
    /// What chaos does in the safety phase.
    pub chaos: Chaos,
    /// Which points are switch points.
    pub points: Points,
    /// In one of so many worlds, by their seeds, every kind is. 0: in none.
    pub all_points_one_in: u32,
    /// Steps after which the liveness phase begins.
    pub safety_steps: u64,
    /// Steps within which all actors must then be done.
    pub calm_steps: u64,
    /// Virtual time that a step takes.
    pub tick: Ns,
    /// Once in so many points, time jumps to the next deadline although somebody can run: slow
    /// machines exist. 0: never.
    pub jump_one_in: u32,
    /// Events that are kept.
    pub events: usize,
    /// Whether events keep their texts.
    pub texts: Texts,
    /// When the tape is wanted.
    pub keep_tape: KeepTape,
    /// What happens when locks are taken out of order.
    pub lock_rules: LockRules,
    /// Room of an actor's stack, in bytes. Worlds of one thread share stacks: the first world of
    /// a thread decides.
    pub stack_bytes: usize,
}

impl Options {
    /// The usual ones.
    pub(super) const USUAL: Self = {
        Self {
            scenario: Cow::Borrowed("unnamed"),
            mutant: None,
            notes: String::new(),
            seed: 0,
            chaos: Chaos::Off,
            points: Points::ALL,
            all_points_one_in: 0,
            safety_steps: 50_000,
            calm_steps: 50_000,
            tick: Ns(1),
            jump_one_in: 0,
            events: 64,
            texts: Texts::Dropped,
            keep_tape: KeepTape::OnFailure,
            lock_rules: LockRules::Forbid,
            stack_bytes: 256 << 10,
        }
    };
}

impl Default for Options {
    fn default() -> Self {
        Self::USUAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_points_have_what_was_put_in() {
        let set = Points::ALL.without(&[Kind::Unlock]);
        assert!(set.has(Kind::Lock) && !set.has(Kind::Unlock));
        let only = Points::only(&[Kind::Pte]);
        assert!(only.has(Kind::Pte) && !only.has(Kind::Spin));
    }
}
