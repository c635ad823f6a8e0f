//! The watchdog: ends the run in time, and tells who waits for whom when nothing moves any more.
//!
//! It runs on a thread of the runtime and looks at memory of the runtime only, so it moves when
//! nobody else does.

use core::sync::atomic::{AtomicBool, Ordering};
use std::io::Write;
use std::sync::Arc;

use gpusvm_live::{LiveSpace, ReaderState, ThreadState, lies_in};
use gpusvm_softgpu::UnitState;
use gpusvm_xe::vm::Vm;

use crate::machine::{LivePlatform, Machine};
use crate::table::Table;
use crate::torture::world::{World, tick};
use crate::workload::index;

/// Time between two looks.
const LOOK_US: u64 = 100_000;
/// Time without any step after which the run counts as dead.
const DEAD_US: u64 = 5_000_000;
/// The same for one actor alone, while others go on.
const STUCK_US: u64 = 20_000_000;

/// What the watchdog looks at besides the world.
pub(super) struct Watchdog<'a> {
    pub(super) world: &'a World,
    pub(super) space: Arc<LiveSpace>,
    pub(super) vm: Arc<Vm<LivePlatform>>,
    pub(super) units: &'a (dyn Fn() -> Vec<UnitState> + Sync),
    /// When the actors are to stop.
    pub(super) deadline_us: u64,
    /// Set when the run is over.
    pub(super) over: &'a AtomicBool,
    pub(super) interrupted: &'a AtomicBool,
}

/// Units of a machine, as the watchdog asks for them.
pub(super) fn units_of(machine: &Machine) -> impl Fn() -> Vec<UnitState> + Sync + use<> {
    machine.unit_viewer()
}

impl Watchdog<'_> {
    /// Watches until the run is over; `Err` with a report when nothing moves.
    pub(super) fn watch(&self) -> Result<(), String> {
        let now = self.world.now_us();
        let mut seen: Vec<(u64, u64)> = vec![(u64::MAX, now); index(self.world.crew())];
        while !self.over.load(Ordering::SeqCst) {
            self.world.sleep_us(LOOK_US);
            let now = self.world.now_us();
            let asked = self.interrupted.load(Ordering::Relaxed);
            if now > self.deadline_us || asked {
                self.world.stop();
            }
            for (actor, (beat, since)) in self.world.actors.iter().zip(&mut seen) {
                let new = actor.beat.load(Ordering::SeqCst);
                if new != *beat {
                    (*beat, *since) = (new, now);
                }
            }
            if let Some(why) = self.verdict(&seen, now) {
                tick(&self.world.tally.watchdog);
                return Err(self.report(why, &seen, now));
            }
        }
        Ok(())
    }

    fn verdict(&self, seen: &[(u64, u64)], now: u64) -> Option<&'static str> {
        let quiet = |since: u64| now.saturating_sub(since);
        if seen.iter().all(|(_, since)| quiet(*since) > DEAD_US) {
            return Some("nothing has moved for 5 seconds");
        }
        // Actors that have ended are quiet, too: they are only stuck while all are at work.
        let stuck = |(beat, since): &(u64, u64)| beat & 1 == 1 && quiet(*since) > STUCK_US;
        let some = seen.iter().any(stuck);
        some.then_some("an actor has been inside one access for 20 seconds")
    }

    fn report(&self, why: &str, seen: &[(u64, u64)], now: u64) -> String {
        let mut actors = Table::new(&["actor", "at", "inside", "for"]);
        for (actor, (beat, since)) in self.world.actors.iter().zip(seen) {
            actors.row(vec![
                actor.name.clone(),
                actor.activity(),
                if beat & 1 == 1 { "yes" } else { "no" }.to_owned(),
                seconds(now.saturating_sub(*since)),
            ]);
        }
        let ReaderState {
            reading,
            led,
            idle,
            queued,
            last_fault,
        } = self.space.reader_state();
        format!(
            "watchdog: {why}\n\n{actors}\n{}\n{}\nfault readers: led {led}, reading {reading}, \
             {idle} idle, {queued} messages queued, last fault at {last_fault}\n",
            self.threads(),
            self.units()
        )
    }

    fn threads(&self) -> Table {
        let threads = gpusvm_live::threads();
        let mut table = Table::new(&[
            "thread",
            "id",
            "in kernel",
            "waits for",
            "of",
            "held by",
            "for",
        ]);
        let name = |id: u32| {
            let known = threads.iter().find(|thread| thread.id == id);
            known.map_or_else(|| id.to_string(), |thread| format!("{} {id}", thread.name))
        };
        for thread in &threads {
            let ThreadState {
                id,
                name: own,
                place,
                wait,
            } = thread;
            let mut row = vec![own.clone(), id.to_string(), place.clone()];
            if let Some(wait) = wait {
                row.push(wait.reason.name().to_owned());
                row.push(self.owner_of(wait.word));
                row.push(wait.holder.map_or_else(|| "-".to_owned(), name));
                row.push(seconds(u64::try_from(wait.since.as_micros()).unwrap_or(0)));
            }
            table.row(row);
        }
        table
    }

    /// Whose a word is.
    fn owner_of(&self, word: u64) -> String {
        let jam = self
            .world
            .jam
            .iter()
            .flatten()
            .position(|lock| lies_in(lock, word));
        if let Some(n) = jam {
            return format!("planted lock {n}");
        }
        if lies_in(&*self.vm, word) {
            return "vm".to_owned();
        }
        if lies_in(&**self.vm.svm(), word) {
            return "notifier".to_owned();
        }
        let area = self.world.areas.iter().find(|area| lies_in(*area, word));
        match (self.space.name_of(word), area) {
            (Some(part), _) => part.to_owned(),
            (None, Some(area)) => format!("area {}", area.id),
            (None, None) => format!("{word:#x}"),
        }
    }

    fn units(&self) -> Table {
        let mut table = Table::new(&["unit", "inside", "awaited", "fault"]);
        for (n, unit) in (self.units)().into_iter().enumerate() {
            table.row(vec![
                n.to_string(),
                if unit.inside { "yes" } else { "no" }.to_owned(),
                if unit.awaited { "yes" } else { "no" }.to_owned(),
                unit.fault
                    .map_or_else(|| "-".to_owned(), |at| format!("{at:#x}")),
            ]);
        }
        table
    }
}

fn seconds(us: u64) -> String {
    format!("{}.{}s", us / 1_000_000, us / 100_000 % 10)
}

/// Says it where nothing has to be waited for.
pub(super) fn say(text: &str) {
    // Nobody is left to tell where standard error is closed, too.
    let _told = writeln!(std::io::stderr(), "{text}");
}
