//! `gpusvm run --host model`: a workload in a world that exists only in memory.
//!
//! The program is an actor, as the device's units are; the scheduler chooses who goes on, by the seed. So the
//! same command gives the same report, to the byte, in virtual time: a nanosecond for each step.

use core::cell::RefCell;
use std::borrow::Cow;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use gpusvm::addr::{HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::{Environment, Ns};
use gpusvm_model::mm::{Shape, Thp};
use gpusvm_model::sched::{KeepTape, ModelEnv, Options, Outcome, Picker, Sim};
use gpusvm_softgpu::{GpuConfig, SmemAtomics};
use gpusvm_xe::stats::DeviceStats;
use gpusvm_xe::vm::NOTIFIER_BYTES;
use serde_json::{Value, json};

use crate::args::{Brackets, Level, RunArgs, Service as Asked};
use crate::machine::{Folds, MachineError};
use crate::notes::Notes;
use crate::progress::Bar;
use crate::report::{self, Clock, Picture, Report};
use crate::run::{Planned, RunError, bar};
use crate::timeline::Timeline;
use crate::workload::{Device, Job, Memory, Order, Workload, index};
use crate::world::machine::Machine;
use crate::world::{Content, NodeConfig, Service};

/// Size of a workload and device memory where nothing is said: a quarter of it.
pub(super) const SIZES: (u64, u64) = (16 << 20, 4 << 20);
/// Smallest device memory: eight ranges, and some page tables.
const VRAM_MIN: u64 = 512 << 10;
/// Most data: page numbers, and what a run of it would take.
const SIZE_MAX: u64 = 4 << 30;
/// Most units: a world has room for no more actors.
const UNITS_MAX: u16 = 32;
/// First address of the process.
const BASE: HostVa = HostVa::new(1 << 40);
/// Memory of the process beyond the data: arrays end inside pages, and some are small.
const SLACK: u64 = 1 << 20;
/// Notifier windows of a device of little memory: no large range fits, so its memory holds many ranges.
const SMALL_WINDOW: u64 = 1 << 20;
/// Device memory from which on ranges are as large as on the live host.
const LARGE_VRAM: u64 = 16 * PAGE_2M;
/// A running actor gives way once in so many chances.
const SWITCH_ONE_IN: u32 = 16;
/// Room of an actor's stack.
const STACK: usize = 1 << 20;

/// Refuses what the model host has not.
pub(super) fn check(args: &RunArgs, plan: &Planned) -> Result<(), RunError> {
    let live_only = [
        (args.live.level != Level::Best, "--level"),
        (args.live.brackets != Brackets::Best, "--brackets"),
    ];
    if let Some((_, option)) = live_only.into_iter().find(|(given, _)| *given) {
        return Err(RunError::LiveOnly(option));
    }
    if args.threads > UNITS_MAX {
        return Err(RunError::ModelUnits(UNITS_MAX));
    }
    if plan.vram < VRAM_MIN {
        let small = MachineError::VramTooSmall(plan.vram, VRAM_MIN);
        return Err(RunError::Machine(small));
    }
    if plan.bytes > SIZE_MAX {
        return Err(RunError::ModelSize(SIZE_MAX));
    }
    Ok(())
}

/// Bytes that a run takes: pages of the process, an array while it is filled, another to verify.
pub(super) const fn needed(plan: &Planned) -> u64 {
    plan.bytes.saturating_mul(4).saturating_add(plan.vram)
}

/// Runs one workload in a world of its own.
pub(super) fn run_one(
    args: &RunArgs,
    plan: &Planned,
    interrupted: &Arc<AtomicBool>,
) -> Result<Report, RunError> {
    gpusvm_model::sched::keep_panics_quiet();
    let timeline = args.report.is_some().then(|| Arc::new(Timeline::new()));
    let counted = (Arc::new(DeviceStats::new(1)), timeline);
    let program = Program {
        workload: plan.workload,
        order: order_of(args, plan),
        folds: Arc::new((counted, Notes::default())),
        interrupted: Arc::clone(interrupted),
        bar: bar(args, plan.workload),
    };
    let data = input_bytes(args.input.as_deref()).max(plan.bytes);
    let (shape, node) = (shape(data), node(args, plan.vram));
    let ended: Rc<RefCell<Option<Result<Done, RunError>>>> = Rc::default();
    let result = Rc::clone(&ended);
    let build = move |sim: &Sim| {
        let machine = Machine::build(sim, shape, &node, Arc::clone(&program.folds));
        sim.spawn("program", move || {
            *result.borrow_mut() = Some(program.run(&machine));
        });
    };
    let mut picker = Picker::sticky(args.seed, SWITCH_ONE_IN);
    let outcome = gpusvm_model::sched::run(&options(args, plan), &mut picker, build);
    if let Some(trouble) = &outcome.trouble {
        return Err(RunError::World(trouble.failure.text.clone()));
    }
    let ended = ended.take();
    let done =
        ended.unwrap_or_else(|| Err(RunError::World("the program did not end".to_owned())))?;
    Ok(report_of(args, plan, done, &outcome))
}

fn order_of(args: &RunArgs, plan: &Planned) -> impl FnOnce(Memory) -> Order + use<> {
    let (size, seed, input) = (plan.bytes, args.seed, args.input.clone());
    let seconds = args.seconds;
    move |memory| Order {
        size,
        seed,
        input,
        seconds,
        memory,
    }
}

/// Bytes of the file that is read; none where there is none, which the workload tells.
fn input_bytes(input: Option<&Path>) -> u64 {
    let facts = input.and_then(|path| std::fs::metadata(path).ok());
    facts.map_or(0, |facts| facts.len())
}

fn options(args: &RunArgs, plan: &Planned) -> Options {
    Options {
        scenario: Cow::Owned(format!("run {}", plan.workload.name)),
        seed: args.seed,
        // As long as it takes.
        safety_steps: u64::MAX,
        keep_tape: KeepTape::Never,
        stack_bytes: STACK,
        ..Options::default()
    }
}

/// A process with room for `bytes` of data, all of it in host memory at once.
fn shape(bytes: u64) -> Shape {
    let pages = |bytes: u64| u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
    Shape {
        base: BASE,
        pages: pages(bytes.saturating_add(SLACK)),
        frames: pages(bytes.saturating_add(bytes / 4).saturating_add(SLACK)),
        slots: 1,
        processes: 1,
        pmd_order: 9,
        words: 512,
        thp: Thp::Madvise,
        ..Shape::default()
    }
}

fn node(args: &RunArgs, vram: u64) -> NodeConfig {
    NodeConfig {
        vram: index(vram / PAGE),
        content: Content::Whole,
        gpu: GpuConfig {
            gts: 1,
            units_per_gt: args.threads,
            tlb_entries: 512,
            fault_ring: 64,
            asids: 2,
            tlb_timeout_ns: 10_000_000_000,
            smem_atomics: SmemAtomics::default(),
            planted: None,
        },
        service: match args.fault_service {
            Asked::Inline => Service::Inline,
            Asked::Queue => Service::Queue,
        },
        window: if vram < LARGE_VRAM {
            SMALL_WINDOW
        } else {
            NOTIFIER_BYTES
        },
        atomics: args.atomics,
        rights: gpusvm_xe::vm::Rights::ReadWrite,
    }
}

/// What the actor of that name does.
struct Program<O> {
    workload: Workload,
    order: O,
    folds: Arc<Folds>,
    interrupted: Arc<AtomicBool>,
    bar: Bar,
}

/// What came of it.
struct Done {
    verified: bool,
    elapsed: Duration,
    bytes: u64,
    traffic: u64,
    answer: Option<String>,
    counts: Option<Value>,
    stats: serde_json::Map<String, Value>,
    gts: Vec<String>,
    picture: Option<Picture>,
}

impl<O: FnOnce(Memory) -> Order> Program<O> {
    fn run(self, machine: &Machine) -> Result<Done, RunError> {
        let ended = self.work(machine);
        if let Err(broken) = machine.close() {
            ModelEnv.fail(broken);
        }
        ended
    }

    fn work(self, machine: &Machine) -> Result<Done, RunError> {
        self.bar.phase("preparing");
        let order = (self.order)(Memory::Model(Arc::clone(machine.space())));
        let mut data = self.workload.prepare(&order).map_err(RunError::Prepare)?;
        let (stats, timeline) = &self.folds.0;
        let start = ModelEnv.now();
        if let Some(timeline) = timeline {
            timeline.begin(start);
        }
        let job = Job {
            device: Device::Model(machine),
            interrupted: &self.interrupted,
            progress: &self.bar,
        };
        data.run(&job).map_err(RunError::Job)?;
        let Ns(elapsed) = ModelEnv.now().since(start);
        let elapsed = Duration::from_nanos(elapsed);
        self.bar.phase("verifying");
        Ok(Done {
            verified: data.verify(),
            elapsed,
            bytes: data.bytes(),
            traffic: data.traffic(),
            answer: data.answer(),
            counts: data.counts(),
            stats: report::stats_json(stats),
            gts: report::stats_text(stats),
            picture: timeline.as_ref().map(|t| Picture::of(t, elapsed)),
        })
    }
}

fn report_of(args: &RunArgs, plan: &Planned, done: Done, outcome: &Outcome) -> Report {
    Report {
        workload: plan.workload.name,
        verified: done.verified,
        elapsed: done.elapsed,
        clock: Clock::Virtual,
        bytes: done.bytes,
        traffic: done.traffic,
        vram: plan.vram,
        answer: done.answer,
        counts: done.counts,
        host: host_json(outcome),
        config: config_json(args, plan),
        stats: done.stats,
        gts: done.gts,
        picture: done.picture,
    }
}

/// The host as JSON. All touches are served and all changes announced, as a kernel would do it.
fn host_json(outcome: &Outcome) -> Value {
    json!({
        "kind": "model",
        "clock": Clock::Virtual.name(),
        "level": "full",
        "bracket": "notifier",
        "thp": "madvise",
        "kernel": "model of Linux 6.18",
        "not_covered": [
            "memory orders weaker than that of one processor",
            "what crates/model/src/mm/mod.rs says is not modelled",
        ],
        "steps": outcome.steps,
        "switches": outcome.switches,
        "hash": format!("{:#018x}", outcome.hash),
    })
}

/// The options as JSON; those of the live host alone are missing.
fn config_json(args: &RunArgs, plan: &Planned) -> Value {
    let mut config = report::config_json(args, plan.bytes, plan.vram);
    // Device memory is the device's own.
    config["migration"] = json!("copy");
    for live in ["cpu_faults", "level", "brackets"] {
        config[live] = Value::Null;
    }
    config
}
