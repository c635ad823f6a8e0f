//! What every actor is doing, to which pages, and how far it is: what [coverage](super::coverage)
//! counts.
//!
//! An operation that calls another one, as a load that faults, is where the other one is until that
//! is done.

use std::sync::{Mutex, PoisonError};

use gpusvm::addr::HostSpan;
use gpusvm_model::sched::ModelEnv;

use crate::explore::op::Op;

/// An operation of a CPU, of a unit, or of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// A CPU.
    Cpu(Op),
    /// A unit loads.
    GpuLoad,
    /// A unit stores.
    GpuStore,
    /// A unit compares and exchanges.
    GpuExchange,
    /// The driver takes a page away from the CPU, for a device's atomics.
    TakeAlone,
    /// The driver serves a device fault.
    Serve,
    /// The driver looks pages up.
    LookUp,
    /// Pages move to a device.
    ToDevice,
    /// Pages come home: a CPU touched them, they are evicted, or they are in several places.
    Home,
}

impl Doing {
    /// What is not a CPU's.
    const DRIVER: [Self; 8] = [
        Self::GpuLoad,
        Self::GpuStore,
        Self::GpuExchange,
        Self::Serve,
        Self::LookUp,
        Self::ToDevice,
        Self::Home,
        Self::TakeAlone,
    ];

    /// All of them, in the order of [`index`](Self::index).
    pub(super) fn all() -> impl Iterator<Item = Self> {
        Op::ALL.iter().copied().map(Self::Cpu).chain(Self::DRIVER)
    }

    /// Its place among all.
    pub(super) fn index(self) -> usize {
        match self {
            Self::Cpu(op) => op as usize,
            other => Op::ALL.len() + other.driver_index(),
        }
    }

    const fn driver_index(self) -> usize {
        match self {
            Self::Cpu(_) | Self::GpuLoad => 0,
            Self::GpuStore => 1,
            Self::GpuExchange => 2,
            Self::Serve => 3,
            Self::LookUp => 4,
            Self::ToDevice => 5,
            Self::Home => 6,
            Self::TakeAlone => 7,
        }
    }

    /// Name, as reports show it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Cpu(op) => op.name(),
            Self::GpuLoad => "gpu_load",
            Self::GpuStore => "gpu_store",
            Self::GpuExchange => "gpu_exchange",
            Self::TakeAlone => "take_alone",
            Self::Serve => "serve_fault",
            Self::LookUp => "look_up",
            Self::ToDevice => "to_device",
            Self::Home => "home",
        }
    }
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nobody has to keep away.
    Open,
    /// It has announced a change, which is not complete: inside a notifier bracket.
    Bracket,
    /// It has pages isolated: between `collect` and `finalize` of a migration.
    Isolated,
}

impl Phase {
    pub(super) const ALL: [Self; 3] = [Self::Open, Self::Bracket, Self::Isolated];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Bracket => "bracket",
            Self::Isolated => "isolated",
        }
    }
}

/// One operation under way.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) doing: Doing,
    pub(super) span: HostSpan,
    brackets: u32,
    is_isolated: bool,
}

impl Step {
    pub(super) const fn phase(&self) -> Phase {
        match (self.brackets, self.is_isolated) {
            (0, false) => Phase::Open,
            (0, true) => Phase::Isolated,
            (_, _) => Phase::Bracket,
        }
    }
}

/// What is under way, by actor: the innermost operation last.
#[derive(Debug, Default)]
struct Actors {
    steps: Vec<Vec<Step>>,
    /// Grows with every change.
    changes: u64,
}

/// Takes note of what actors do, in worlds that are watched.
#[derive(Debug, Default)]
pub(super) struct Watch(Option<Mutex<Actors>>);

/// Ends an operation when dropped.
#[derive(Debug)]
pub(super) struct Ends<'a>(Option<&'a Mutex<Actors>>);

impl Watch {
    /// Takes note.
    pub(super) fn on() -> Self {
        Self(Some(Mutex::default()))
    }

    /// Whether it takes note.
    pub(super) const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The running actor begins an operation.
    pub(super) fn begin(&self, doing: Doing, span: HostSpan) -> Ends<'_> {
        if let Some(actors) = &self.0 {
            with(actors, |mine| {
                mine.push(Step {
                    doing,
                    span,
                    brackets: 0,
                    is_isolated: false,
                });
            });
        }
        Ends(self.0.as_ref())
    }

    /// The running actor's operation enters a bracket.
    pub(super) fn open(&self) {
        self.change(|step| step.brackets += 1);
    }

    /// It leaves one.
    pub(super) fn close(&self) {
        self.change(|step| step.brackets = step.brackets.saturating_sub(1));
    }

    /// It has pages isolated.
    pub(super) fn isolate(&self) {
        self.change(|step| step.is_isolated = true);
    }

    fn change(&self, act: impl FnOnce(&mut Step)) {
        if let Some(actors) = &self.0 {
            with(actors, |mine| mine.last_mut().map(act));
        }
    }

    /// Calls `visit` with the innermost operation of every actor, if one has changed since `seen`
    /// or `moved` says that pages have.
    pub(super) fn visit(
        &self,
        seen: &mut Option<(u64, u64)>,
        moved: u64,
        visit: impl FnMut(&Step),
    ) {
        let Some(actors) = &self.0 else { return };
        let actors = lock(actors);
        let now = (actors.changes, moved);
        if seen.replace(now) != Some(now) {
            actors
                .steps
                .iter()
                .filter_map(|mine| mine.last())
                .for_each(visit);
        }
    }
}

/// Never contended: no actor gives way inside.
fn lock(actors: &Mutex<Actors>) -> std::sync::MutexGuard<'_, Actors> {
    actors.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the running actor does.
fn with<R>(actors: &Mutex<Actors>, act: impl FnOnce(&mut Vec<Step>) -> R) -> R {
    let actor = ModelEnv.actor();
    let mut actors = lock(actors);
    actors.changes += 1;
    if actors.steps.len() <= actor {
        actors.steps.resize(actor + 1, Vec::new());
    }
    act(&mut actors.steps[actor])
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if let Some(actors) = self.0 {
            with(actors, Vec::pop);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::plan::page_at;

    #[test]
    fn each_operation_has_its_own_place() {
        let indices: Vec<usize> = Doing::all().map(Doing::index).collect();
        let expected: Vec<usize> = (0..indices.len()).collect();
        assert_eq!(indices, expected);
    }

    #[test]
    fn innermost_operation_counts_until_it_ends() {
        let watch = Watch::on();
        let now = || {
            let mut steps = Vec::new();
            watch.visit(&mut None, 0, |step| steps.push((step.doing, step.phase())));
            steps
        };
        let load = watch.begin(Doing::Cpu(Op::Load), page_at(3));
        let home = watch.begin(Doing::Home, page_at(0));
        assert_eq!(now(), [(Doing::Home, Phase::Open)]);
        watch.open();
        watch.open();
        watch.close();
        assert_eq!(now(), [(Doing::Home, Phase::Bracket)]);
        watch.close();
        watch.isolate();
        assert_eq!(now(), [(Doing::Home, Phase::Isolated)]);
        drop(home);
        assert_eq!(now(), [(Doing::Cpu(Op::Load), Phase::Open)]);
        drop(load);
        assert_eq!(now(), []);
    }
}
