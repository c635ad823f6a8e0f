//! What fails or comes late in worlds of the kind `chaos`, and which refusals that excuses.
//!
//! A world draws the sites at which chaos strikes: worlds in which one kind of call fails often find
//! more than worlds in which all do a little. In the liveness phase nothing fails.
//!
//! Where pages could not be moved to a device they are used where they are, so that excuses nothing;
//! where they could not be had, or could not come home, the access that wanted them may be refused.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm_model::kernel::Kernel;
use gpusvm_model::sched::{Fate, ModelEnv};

/// Allocations among which one is refused.
const PATIENCE: u32 = 8;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    /// Looking a mapping up is slow.
    FindVma,
    /// Subscribing fails.
    Subscribe,
    /// Pages that are looked up are busy.
    LookUp,
    /// Pages that are to move are busy, or refuse.
    Collect,
    /// Pages stay isolated for long, or are given up.
    Isolated,
    /// A copy fails.
    Copy,
    /// Memory is short.
    Memory,
    /// A fault is slow to be served.
    Serve,
}

impl Site {
    const ALL: [Self; 8] = [
        Self::FindVma,
        Self::Subscribe,
        Self::LookUp,
        Self::Collect,
        Self::Isolated,
        Self::Copy,
        Self::Memory,
        Self::Serve,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::FindVma => "find vma",
            Self::Subscribe => "subscribe",
            Self::LookUp => "look up",
            Self::Collect => "collect",
            Self::Isolated => "isolated",
            Self::Copy => "copy",
            Self::Memory => "memory",
            Self::Serve => "serve",
        }
    }
}

/// Chaos in one world.
#[derive(Debug, Default)]
pub(super) struct Chaos {
    /// Sites at which it strikes, one bit each.
    sites: u32,
    /// Failures so far because of which an access may be refused.
    excuses: AtomicU32,
}

impl Chaos {
    /// Strikes at some sites, which the world draws: at all of them, where it is at its dullest.
    pub(super) fn drawn() -> Self {
        let spared = ModelEnv.choose(1 << Site::ALL.len());
        Self {
            sites: !spared,
            ..Self::default()
        }
    }

    const fn is_at(&self, site: Site) -> bool {
        self.sites >> site as u32 & 1 == 1
    }

    /// Whether a call is to fail; it may be late already. No lock but `vm` may be held.
    pub(super) fn strikes(&self, site: Site) -> bool {
        let fails = self.is_at(site) && ModelEnv.may_fail(site.name()) == Fate::Fail;
        if fails {
            tell(site);
        }
        fails
    }

    /// As [`strikes`](Self::strikes), where locks may be held: it is never late.
    pub(super) fn fails(&self, site: Site) -> bool {
        let fails = self.is_at(site) && ModelEnv.fails(site.name());
        if fails {
            tell(site);
        }
        fails
    }

    /// Makes a call that cannot fail late.
    pub(super) fn delays(&self, site: Site) {
        if self.is_at(site) {
            ModelEnv.may_delay(site.name());
        }
    }

    /// Has one of the next allocations refused, at times.
    pub(super) fn starve(&self, kernel: &Kernel<ModelEnv>) {
        if self.fails(Site::Memory) {
            kernel.refuse(1 + ModelEnv.choose(PATIENCE));
        }
    }

    /// Says that something cannot be had, for good.
    pub(super) fn excuse(&self, failed: Failed) -> Interrupted {
        self.excuses.fetch_add(1, Ordering::Relaxed);
        failed.into()
    }

    /// Excuses so far.
    pub(super) fn excuses(&self) -> u32 {
        self.excuses.load(Ordering::Relaxed)
    }

    /// One of two reasons why somebody has to try again.
    pub(super) fn stale(&self) -> Interrupted {
        match ModelEnv.choose(2) {
            0 => Stale::PagesBusy.into(),
            _ => Stale::PagesRefused.into(),
        }
    }

    /// Fails the world where the running actor does something that an invalidation must not do.
    pub(super) fn must_be_outside(&self, what: &str) {
        if ModelEnv.is_invalidating() {
            ModelEnv.fail(format!("{what} inside an invalidation"));
        }
    }
}

fn tell(site: Site) {
    let name = site.name();
    ModelEnv.tell("fails", [site as u64, 0], || format!("{name} fails"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::doing::Watch;
    use crate::explore::plan::Plan;
    use crate::explore::{options, world};
    use gpusvm_model::sched::{self, Options, Picker};

    /// Visits of a site, one of which fails.
    const VISITS: u32 = 24;

    #[test]
    fn any_single_failure_leaves_all_well() {
        let plan = Plan::named("chaos").expect("it is there");
        let wait = "wait";
        for site in Site::ALL.map(Site::name).into_iter().chain([wait]) {
            for n in 0..VISITS {
                let options = Options {
                    seed: n.into(),
                    chaos: sched::Chaos::Nth {
                        site: site.into(),
                        n,
                    },
                    ..options(plan, None)
                };
                let mut picker = Picker::sticky(n.into(), 8);
                let outcome = sched::run(&options, &mut picker, |sim| {
                    world::build(plan, Watch::default(), sim);
                });
                if let Some(trouble) = outcome.trouble {
                    panic!("visit {n} of {site} fails: {trouble}");
                }
            }
        }
    }
}
