//! Migrations while another arena makes events: sharded against one userfaultfd for everything.

use std::sync::atomic::{AtomicBool, Ordering};

use gpusvm::addr::{HostSpan, PAGE_2M};
use gpusvm::error::{Interrupted, Stale};
use gpusvm::seam::env::{Environment, Ns};
use gpusvm_abi::bus::SystemBus;
use gpusvm_live::{
    Advise, BracketChoice, Huge, LiveBus, LiveConfig, LiveEnv, Sharding, Territory, VramMode,
    thread,
};

use super::measure::Touch;
use super::{BenchError, Samples};
use crate::machine::{Machine, MachineConfig};
use crate::run::Stopwatch;

/// Mappings that start so far apart are in different shards.
const APART: u64 = 64 << 20;
/// What is discarded again and again.
const CHURNED: u64 = 64 << 10;
const CHURNED_BYTES: usize = 64 << 10;
/// Between two events, so that there are some thousands in a second. Without a pause migrations into
/// memory of the only userfaultfd may never find a moment without news.
const PAUSE: Ns = Ns(100_000);
/// Machines of each kind, in turn, and migrations on each.
const ROUNDS: usize = 6;
const MIGRATIONS: usize = 50;

/// Where the two arenas are.
struct Land {
    territory: Territory,
    data: HostSpan,
    churned: HostSpan,
}

impl Land {
    fn new() -> Result<Self, BenchError> {
        let territory = Territory::reserve(2 * APART).map_err(BenchError::Io)?;
        let start = territory.span().start();
        let (data, churned) = (
            HostSpan::at(start.plus(APART), PAGE_2M),
            HostSpan::at(start, CHURNED),
        );
        for (span, huge) in [(data, Huge::Advise), (churned, Huge::Never)] {
            territory.map(span, huge).map_err(BenchError::Io)?;
        }
        Ok(Self {
            territory,
            data,
            churned,
        })
    }

    /// Makes events until it is told to stop.
    fn churn(&self, stop: &AtomicBool) {
        let env = LiveEnv::new(0);
        while !stop.load(Ordering::Relaxed) {
            // Both go on where the other would fail: there is nothing to keep.
            let _filled = LiveBus.write(self.churned.start().get(), &[1; CHURNED_BYTES]);
            let _dropped = self.territory.advise(self.churned, Advise::Discard);
            // Asleep: the processors are for those who are measured.
            env.sleep_until(env.now().after(PAUSE));
        }
    }
}

/// Times of one 2 MiB block out and home, in nanoseconds, while events arrive.
fn migrate_under_churn(land: &Land, sharding: Sharding) -> Result<Vec<f64>, BenchError> {
    let machine = Machine::start(MachineConfig {
        units: 1,
        migration: VramMode::Copy,
        live: LiveConfig {
            brackets: BracketChoice::Events,
            sharding,
            ..LiveConfig::default()
        },
        ..MachineConfig::default()
    })
    .map_err(BenchError::Machine)?;
    let touch = Touch(land.churned.start().get());
    machine.launch(&touch, 1).map_err(BenchError::Device)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| land.churn(&stop));
        let times: Result<Vec<f64>, _> = thread::run(|| {
            (0..MIGRATIONS)
                .map(|_| {
                    // Present and huge at the start of each trip.
                    let _filled = LiveBus.write(land.data.start().get(), &[1]);
                    let clock = Stopwatch::start();
                    send(&machine, land.data)?;
                    machine.evict_all();
                    Ok(clock.elapsed().as_secs_f64() * 1e9)
                })
                .collect()
        });
        stop.store(true, Ordering::Relaxed);
        times
    })
    .map_err(BenchError::Refused)
}

/// Sends the pages as soon as they can be sent.
fn send(machine: &Machine, span: HostSpan) -> Result<(), Interrupted> {
    loop {
        match machine.send(span) {
            Ok(_time) => return Ok(()),
            Err(Interrupted::Stale(Stale::PagesBusy)) => std::thread::yield_now(),
            Err(why) => return Err(why),
        }
    }
}

/// Adds pairs of the same trip, sharded and not.
pub(super) fn migrate(samples: &mut Samples) -> Result<(), BenchError> {
    let land = Land::new()?;
    for _round in 0..ROUNDS {
        let sharded = migrate_under_churn(&land, Sharding::Arenas)?;
        let single = migrate_under_churn(&land, Sharding::None)?;
        let pairs = sharded.into_iter().zip(single);
        pairs.for_each(|(sharded, single)| samples.add(sharded, single));
    }
    Ok(())
}
