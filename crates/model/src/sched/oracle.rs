//! Oracles: what looks at a world between its steps, and when.

/// Looks at the world and says what is wrong.
pub(super) type Look = Box<dyn FnMut() -> Result<(), String>>;

/// When oracles look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// After every step at which no actor is inside a busy operation.
    Quiescent,
    /// After such steps, if [`touch`](crate::sched::ModelEnv::touch) was called since the oracle
    /// last looked: cheaper, where it is known what can break a rule.
    Changed,
    /// After every step.
    EveryStep,
    /// After every step, if a counter has moved since it last looked: see
    /// [`oracle_counting`](crate::sched::Sim::oracle_counting).
    Counted,
    /// When all actors are done.
    AtEnd,
}

/// A set of [`When`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moments(u8);

impl Moments {
    pub(super) const NONE: Self = Self(0);
    pub(super) const AT_END: Self = Self::of(When::AtEnd);

    const fn of(when: When) -> Self {
        Self(match when {
            When::Quiescent => 1,
            When::Changed => 2,
            When::EveryStep => 4,
            When::AtEnd => 8,
            When::Counted => 16,
        })
    }

    /// These and `when`.
    pub(super) const fn and(self, when: When) -> Self {
        Self(self.0 | Self::of(when).0)
    }

    /// Those that are in `others` as well.
    pub(super) const fn among(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    pub(super) const fn has(self, when: When) -> bool {
        self.0 & Self::of(when).0 != 0
    }
}

pub(super) struct Oracle {
    pub(super) when: When,
    pub(super) look: Look,
}
