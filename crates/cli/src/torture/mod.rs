//! `gpusvm run torture`: everything that a process can do to its memory, at once, while CPU and
//! device write every word of it and both check every word they read.
//!
//! # Who is there
//!
//! *Writers* and *readers* on both sides ([`visit`]), *churners* that change the address space
//! ([`churn`]), a *migrator* that sends pages to the device and back ([`migrator`]), a *forker*
//! ([`forker`]), a *watchdog* ([`watchdog`]).
//! All of them draw from streams of one seed ([`random`]). What they draw repeats; when they meet
//! does not.
//!
//! # What is checked
//!
//! Every 64th byte begins a word with one owner ([`ledger`]). The owner announces a version, stores
//! it, and says that it did; whoever reads the word looks at the ledger before and after:
//!
//! ```text
//!   owner:    ceiling = 6 ────── store 6 ────── floor = 6
//!   reader:   floor? ─────────── load v ─────── ceiling?      floor <= v <= ceiling, and v > burnt
//! ```
//!
//! A value below the floor is a lost write or a stale read, a second look tells which; one that
//! names another place, or was never announced, is wrong bytes; a *burnt* one came back from the
//! dead. Loads and stores of words are ordered by the processor, so there are no false alarms; and a
//! word is always judged, so there are no blind spots but the ones below.
//!
//! # How content is destroyed
//!
//! Versions never start over. What a page may hold follows from its state, which only the churner
//! that holds the area's lock changes:
//!
//! ```text
//!   stable ──▶ closed ──▶ (wait until every access that began before is over)
//!     ▲                        │ burnt = ceiling, floor = 0       where content will go
//!     │                        ▼
//!     └── operation done ── destroy: any version or none; accesses may be refused
//!     └── operation done ── deny:    the rule as it is;   accesses may be refused
//!     └── operation done ── closed:  nobody accesses it
//! ```
//!
//! An access looks at the state when it begins. Begun in *destroy* it is judged loosely, and a write
//! does not raise the floor: nobody can say whether it came before the destruction or after. But
//! once the page is stable again, the word is empty or holds a version announced since: nothing
//! older. A refused access is an error unless its page changed state meanwhile. An operation that
//! failed leaves the ledger as it was: nothing may have changed.
//!
//! | state | operations |
//! |---|---|
//! | destroy | discard, `discard_all`, `discard_locked`, unmap, `map_over`, resize, guard |
//! | deny | move, `move_away`, `protect_none`, `protect_read` |
//! | closed | free (then settled, page by page: all words or none), `move_keep`, pipe |
//! | stable | collapse, pageout, cold, populate, lock, huge, heap, thread, every migration |
//!
//! # Where changes are seen afterwards
//!
//! With `--brackets events`, and where a raw system call bypasses the brackets (`discard_raw`,
//! `unmap_raw`), a change is known only when its event has been handled. So the page stays in *destroy* until it has. `MADV_DONTNEED` and `MADV_FREE` are told before they happen:
//! pages that leave for the device in between keep their content, so it may come back (it is not
//! burnt). Operations that raise no event, or that fail on a mapping in pieces, are left out
//! ([`op::Op::is_promised`]). Everything else holds: in particular, what was not destroyed is
//! never lost.

mod area;
mod build;
mod churn;
mod forker;
mod ledger;
mod migrator;
pub(crate) mod op;
mod program;
mod promise;
mod random;
mod report;
mod visit;
mod watchdog;
mod world;

use core::sync::atomic::{AtomicBool, Ordering};
use std::io::Write;
use std::sync::Arc;
use std::thread::scope;

use gpusvm::addr::{HostVa, PAGE_2M};
use gpusvm_live::{RuntimeScope, memory_available, probe, thread};
use gpusvm_xe::stats::DeviceStats;
use serde_json::Value;

use crate::args::{Planted, RunArgs};
use crate::machine::{Machine, VRAM_MIN};
use crate::on_tile::OnTile;
use crate::report::{COLUMNS, Clock, Report, config_json, host_json, stats_json};
use crate::run::RunError;
use crate::table::Table;
use crate::torture::churn::{AWAY_BYTES, Churner};
use crate::torture::forker::Forker;
use crate::torture::random::Stream;
use crate::torture::visit::{CpuPort, TilePort, Visitor};
use crate::torture::watchdog::Watchdog;
use crate::torture::world::{Fault, World};
use crate::workload::{PrepareError, count};

/// Name on the command line.
pub(crate) const NAME: &str = "torture";

const SECONDS: u64 = 10;
const SIZE: u64 = 64 << 20;
const VRAM: u64 = 16 << 20;
/// Smallest size: a few areas.
const SIZE_MIN: u64 = 4 << 20;
const CPU_WRITERS: usize = 2;
const CPU_READERS: usize = 1;
const CHURNERS: usize = 2;

/// Who is who: indices into the world's actors.
#[derive(Clone, Copy, Debug)]
struct Crew {
    /// Device actors, each a unit and a writer.
    devices: usize,
}

impl Crew {
    const fn first_reader(self) -> usize {
        CPU_WRITERS
    }

    const fn first_device(self) -> usize {
        self.first_reader() + CPU_READERS
    }

    const fn first_churner(self) -> usize {
        self.first_device() + self.devices
    }

    const fn migrator(self) -> usize {
        self.first_churner() + CHURNERS
    }

    const fn forker(self) -> usize {
        self.migrator() + 1
    }

    const fn conductor(self) -> usize {
        self.forker() + 1
    }

    fn writers(self) -> u32 {
        u32::try_from(CPU_WRITERS + self.devices).unwrap_or(1)
    }

    /// Units of the device: its actors', then the churners'.
    fn units(self) -> u16 {
        u16::try_from(self.devices + CHURNERS).unwrap_or(u16::MAX)
    }

    fn names(self) -> Vec<String> {
        let many = |name: &'static str, n: usize| (0..n).map(move |n| format!("{name}-{n}"));
        many("cpu-writer", CPU_WRITERS)
            .chain(many("cpu-reader", CPU_READERS))
            .chain(many("device", self.devices))
            .chain(many("churner", CHURNERS))
            .chain(["migrator", "forker", "conductor"].map(str::to_owned))
            .collect()
    }
}

/// Runs it and prints what came out.
///
/// # Errors
/// [`RunError`]; [`RunError::Torture`] where something was wrong.
pub(crate) fn run(
    args: &RunArgs,
    interrupted: &AtomicBool,
    out: &mut dyn Write,
) -> Result<(), RunError> {
    if args.input.is_some() {
        return Err(RunError::Needless("--input"));
    }
    if args.report.is_some() {
        return Err(RunError::Needless("--report"));
    }
    let (size, vram) = (args.size.unwrap_or(SIZE), args.vram.unwrap_or(VRAM));
    check_size(size, vram)?;
    let crew = Crew {
        devices: usize::from(args.threads),
    };
    let mut config = args.machine(vram);
    config.units = crew.units();
    let machine = Machine::start(config).map_err(RunError::Machine)?;
    plant(args, &machine);
    machine.env().set_jitter(args.jitter.unwrap_or(0));
    let stats = Arc::clone(machine.stats());
    let seconds = args.seconds.unwrap_or(SECONDS);
    let world = {
        let _runtime_memory = RuntimeScope::enter();
        build::build(args, size, crew, &machine)?
    };
    let result = Report {
        workload: NAME,
        verified: false,
        elapsed: world.clock.elapsed(),
        clock: Clock::Real,
        bytes: world.bytes(),
        traffic: 0,
        vram,
        answer: None,
        counts: None,
        host: host_json(world.space.level(), &probe()),
        config: config_json(args, size, vram),
        stats: stats_json(&stats),
        gts: Vec::new(),
        picture: None,
    };
    let play = Play {
        args,
        crew,
        world: &world,
        interrupted,
        seconds,
        repeat: report::repeat(args, seconds, size, vram),
    };
    play.run(machine, &stats, result, out)
}

fn check_size(size: u64, vram: u64) -> Result<(), RunError> {
    if size < SIZE_MIN {
        return Err(RunError::Prepare(PrepareError::TooSmall {
            least: SIZE_MIN,
        }));
    }
    // The ledger takes a fifth, the places that things move to are used one at a time.
    let needed = size
        .saturating_add(size / 2)
        .saturating_add(vram.max(VRAM_MIN));
    let available = memory_available().unwrap_or(u64::MAX);
    if needed > available {
        return Err(RunError::Memory { needed, available });
    }
    Ok(())
}

fn plant(args: &RunArgs, machine: &Machine) {
    match args.planted {
        Some(Planted::Recheck) => machine.vm().svm().plant_missing_recheck(),
        Some(Planted::Freeze) => machine.space().plant_missing_freeze(),
        Some(Planted::Tlb | Planted::Hang) | None => {}
    }
}

/// One run, ready to begin.
struct Play<'a> {
    args: &'a RunArgs,
    crew: Crew,
    world: &'a World,
    interrupted: &'a AtomicBool,
    seconds: u64,
    repeat: String,
}

impl Play<'_> {
    fn run(
        &self,
        machine: Machine,
        stats: &DeviceStats,
        mut result: Report,
        out: &mut dyn Write,
    ) -> Result<(), RunError> {
        let over = AtomicBool::new(false);
        let units = watchdog::units_of(&machine);
        let dog = Watchdog {
            world: self.world,
            space: Arc::clone(machine.space()),
            vm: Arc::clone(machine.vm()),
            units: &units,
            deadline_us: self.seconds * 1_000_000,
            over: &over,
            interrupted: self.interrupted,
        };
        scope(|scope| {
            scope.spawn(|| {
                // The calling thread only waits: the watch is kept by a thread of the runtime.
                let dead =
                    thread::run_scoped(1, &|_| dog.watch().map_err(|why| self.end(&why, stats)));
                drop(dead);
            });
            self.act(&machine);
            self.sweep(&machine);
            machine.close();
            self.sweep_cpu();
            over.store(true, Ordering::SeqCst);
        });
        result.elapsed = self.world.clock.elapsed();
        result.verified = self.world.finding().is_none();
        result.stats = stats_json(stats);
        self.print(&result, stats, out).map_err(RunError::Output)?;
        self.outcome()
    }

    /// All actors, until the watchdog or a finding stops them.
    fn act(&self, machine: &Machine) {
        let (world, crew, seed) = (self.world, self.crew, self.args.seed);
        scope(|scope| {
            for n in 0..CPU_WRITERS + CPU_READERS {
                let writer = u32::try_from(n).ok().filter(|_| n < CPU_WRITERS);
                let random = Stream::named(seed, "cpu", n);
                scope.spawn(move || {
                    let port = CpuPort(world.bus);
                    let (me, random) = (n, random);
                    Visitor {
                        world,
                        me,
                        writer,
                        port,
                        random,
                    }
                    .work();
                });
            }
            for unit in 0..crew.devices {
                scope.spawn(move || run_device(world, machine, crew, seed, unit));
            }
            for n in 0..CHURNERS {
                let mut churner = Churner {
                    world,
                    machine,
                    me: crew.first_churner() + n,
                    unit: crew.devices + n,
                    away: away(world, n),
                    ops: &self.args.ops,
                    random: Stream::named(seed, "churner", n),
                };
                scope.spawn(move || churner.work());
            }
            scope.spawn(move || migrator::work(world, machine, crew.migrator(), seed));
            let mut forker = Forker {
                world,
                me: crew.forker(),
                random: Stream::named(seed, "forker", 0),
            };
            if self.args.ops.is_empty() || self.args.ops.iter().any(|op| !op.is_churned()) {
                scope.spawn(move || forker.work());
            }
        });
    }

    /// Every word, on both sides.
    fn sweep(&self, machine: &Machine) {
        self.sweep_cpu();
        let (world, me) = (self.world, self.crew.conductor());
        let sweep = OnTile(|tile: &mut gpusvm_softgpu::Tile<'_>| {
            if world.finding().is_none() {
                let (port, random) = (TilePort(tile), Stream::named(0, "sweep", 0));
                Visitor {
                    world,
                    me,
                    writer: None,
                    port,
                    random,
                }
                .sweep();
            }
        });
        // Refusals are findings, and nothing else ends the sweep.
        let _swept = machine.launch_on(0, &sweep);
    }

    fn sweep_cpu(&self) {
        let (world, me) = (self.world, self.crew.conductor());
        if world.finding().is_none() {
            let (port, random) = (CpuPort(world.bus), Stream::named(0, "sweep", 0));
            Visitor {
                world,
                me,
                writer: None,
                port,
                random,
            }
            .sweep();
        }
    }

    fn print(
        &self,
        result: &Report,
        stats: &DeviceStats,
        out: &mut dyn Write,
    ) -> std::io::Result<()> {
        if self.args.output.json {
            return writeln!(out, "{:#}", self.object(result, stats));
        }
        let mut table = Table::new(&COLUMNS);
        table.row(result.row());
        writeln!(out, "{table}\n{}", report::tables(self.world, stats))
    }

    fn object(&self, result: &Report, stats: &DeviceStats) -> Value {
        let mut object = result.json();
        object["torture"] = report::json(self.world, stats, &self.repeat);
        object
    }

    fn outcome(&self) -> Result<(), RunError> {
        if let Some(finding) = self.world.finding() {
            watchdog::say(&report::explain(self.world, &finding, &self.repeat));
            let all = Fault::ALL
                .into_iter()
                .map(|fault| (fault, self.world.faults(fault)));
            let all = all.filter(|(_, n)| *n > 0);
            let list: Vec<_> = all
                .map(|(fault, n)| format!("{} {n}", fault.name()))
                .collect();
            return Err(RunError::Torture(format!("torture: {}", list.join(", "))));
        }
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(RunError::Job(crate::workload::JobError::Interrupted));
        }
        Ok(())
    }

    /// Nothing moves: what is known is said, and the process ends, because its threads cannot.
    fn end(&self, why: &str, stats: &DeviceStats) {
        watchdog::say(why);
        if let Some(finding) = self.world.finding() {
            watchdog::say(&report::explain(self.world, &finding, &self.repeat));
        }
        watchdog::say(&report::tables(self.world, stats));
        watchdog::say(&report::counters(stats));
        watchdog::say(&format!(
            "gpusvm: torture: nothing moves; repeat: {}",
            self.repeat
        ));
        std::process::exit(1);
    }
}

/// A churner's own place, behind the homes.
fn away(world: &World, n: usize) -> HostVa {
    let end = world.land.span().end();
    HostVa::new(end.get() - AWAY_BYTES * count(n + 1)).align_down(PAGE_2M)
}

/// One device actor: a kernel of one group that visits pages until the end.
fn run_device(world: &World, machine: &Machine, crew: Crew, seed: u64, unit: usize) {
    let me = crew.first_device() + unit;
    let writer = u32::try_from(CPU_WRITERS + unit).ok();
    let random = Stream::named(seed, "device", unit);
    let kernel = OnTile(|tile: &mut gpusvm_softgpu::Tile<'_>| {
        let (port, random) = (TilePort(tile), random.clone());
        Visitor {
            world,
            me,
            writer,
            port,
            random,
        }
        .work();
    });
    // The kernel passes no refusal on: it judges each.
    let _ended = machine.launch_on(unit, &kernel);
}
