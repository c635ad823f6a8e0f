//! What fails or comes late, to see what the others make of it.

use crate::sched::fail::FailureKind;
use crate::sched::options::Chaos;
use crate::sched::pick::{Candidates, Picker, What};
use crate::sched::rng::mix;
use crate::sched::world::World;

/// Whether chaos is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Chaos may strike; nothing bad may happen.
    Safety,
    /// Chaos is off; everything good must happen.
    Liveness,
}

/// What chaos wants of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Go,
    /// It fails, in a way that its caller must expect.
    Fail,
}

impl World {
    /// Starts the liveness phase when it is due; whether its time is up.
    #[cold]
    pub(super) fn is_late(&mut self) -> bool {
        self.calm();
        let late = self.steps > self.phase_ends;
        if late {
            let text = self.describe_waiting("the actors are not done in time");
            self.fail(FailureKind::Stuck, text);
        }
        late
    }

    /// Starts the liveness phase.
    pub(super) fn calm(&mut self) {
        if self.phase == Phase::Safety {
            self.phase = Phase::Liveness;
            let began = self.steps.min(self.phase_ends);
            self.phase_ends = began.saturating_add(self.options.calm_steps);
            if let Picker::Pct(_) = self.picker {
                self.picker = Picker::uniform(mix(self.options.seed, self.steps));
            }
        }
    }

    /// Nobody is chosen: the running actor is told something.
    #[inline]
    pub(super) fn nobody(&self) -> Candidates {
        Candidates {
            ready: 0,
            first: u32::try_from(self.current).unwrap_or(0),
        }
    }

    /// One answer of chaos at a site.
    pub(super) fn chaos(&mut self, site: &'static str, n: u32) -> u32 {
        if self.phase() == Phase::Liveness || !self.is_live() {
            return 0;
        }
        let nobody = self.nobody();
        match self.options.chaos {
            Chaos::Off => 0,
            Chaos::OneIn(one_in) => self.choose(n, What::Rare(one_in), nobody),
            Chaos::Nth {
                site: ref wanted,
                n: nth,
            } => {
                let hit = *wanted == site && self.visits(site) == nth;
                u32::from(hit)
            }
        }
    }

    /// Counts a visit of a chaos site; how many there were before.
    fn visits(&mut self, site: &'static str) -> u32 {
        if let Some((_, visits)) = self.chaos_sites.iter_mut().find(|(name, _)| *name == site) {
            *visits += 1;
            return *visits - 1;
        }
        self.chaos_sites.push((site, 1));
        0
    }
}
