//! `gpusvm run`: one workload, or the demo set, on either host.

mod model;

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use gpusvm_abi::bus::Park;
use gpusvm_live::{LiveEnv, RuntimeScope, allocate_for, memory_available, probe};

use crate::args::{CpuFaults, Host, RunArgs};
use crate::atomics::Atomics;
use crate::folder::{self, Folder, FolderError};
use crate::machine::{Machine, MachineError};
use crate::page::Page;
use crate::progress::{Bar, Wanted};
use crate::report::{self, COLUMNS, Clock, Picture, Report};
use crate::size;
use crate::table::Table;
use crate::torture;
use crate::workload::{ALL, Device, Job, JobError, Memory, Order, PrepareError, Workload};

/// Sizes of the demo set: each workload four times larger than device memory, and all of them
/// together within a minute on two processors.
const DEMO: [(&str, u64, u64); 10] = [
    ("stream", 256, 64),
    ("gups", 128, 32),
    ("chase", 128, 32),
    ("stencil", 256, 64),
    ("spmv", 256, 64),
    ("bfs", 128, 32),
    ("hashjoin", 128, 32),
    ("gemm", 24, 6),
    ("pingpong", 256, 64),
    ("sort", 128, 32),
];

/// A workload with its sizes.
struct Planned {
    workload: Workload,
    /// Of its data.
    bytes: u64,
    /// Of device memory.
    vram: u64,
}

/// A run failed.
#[derive(Debug)]
pub enum RunError {
    /// There is no such workload.
    Unknown(String),
    /// The data does not fit into memory.
    Memory {
        /// Bytes that the run needs.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// An option that the workload does not take.
    Needless(&'static str),
    /// An option of the live host.
    LiveOnly(&'static str),
    /// More units than a device of the model host can have.
    ModelUnits(u16),
    /// More data than a process of the model host can have.
    ModelSize(u64),
    /// A rule was broken in a world of the model host.
    World(String),
    /// The folder of `--report` does not do.
    Folder(FolderError),
    /// A report cannot be written after its run.
    Report(FolderError),
    /// The data cannot be prepared.
    Prepare(PrepareError),
    /// The machine cannot be made.
    Machine(MachineError),
    /// The work stopped.
    Job(JobError),
    /// An answer is wrong.
    NotVerified(&'static str),
    /// Torture found something; what it was, in a line.
    Torture(String),
    /// Standard output is closed, or its disk is full.
    Output(std::io::Error),
}

impl RunError {
    /// The process's exit code.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Unknown(_) | Self::Memory { .. } | Self::Needless(_) => 2,
            Self::LiveOnly(_) | Self::ModelUnits(_) | Self::ModelSize(_) => 2,
            Self::Prepare(_) | Self::Folder(_) => 2,
            Self::Machine(MachineError::VramTooSmall(..)) => 2,
            Self::Job(JobError::Interrupted) => 130,
            Self::Job(JobError::Refused(refused)) if refused.is_for_want_of_options() => 2,
            Self::Machine(_) | Self::Job(_) | Self::Report(_) | Self::Output(_) => 1,
            Self::NotVerified(_) | Self::Torture(_) | Self::World(_) => 1,
        }
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "there is no workload `{name}`; there are:")?;
                ALL.iter()
                    .try_for_each(|workload| write!(f, " {}", workload.name))?;
                write!(f, " {}", torture::NAME)
            }
            Self::Memory { needed, available } => write!(
                f,
                "this needs {} of memory and {} are available; use a smaller --size or --vram",
                size::format(*needed),
                size::format(*available)
            ),
            Self::Needless(option) => write!(f, "{option} does not go with this workload"),
            Self::LiveOnly(what) => {
                write!(f, "{what} needs the live host; leave `--host model` out")
            }
            Self::ModelUnits(most) => write!(
                f,
                "a device of the model host has at most {most} units; use --threads {most} or fewer"
            ),
            Self::ModelSize(most) => write!(
                f,
                "a process of the model host has at most {} of data; use a smaller --size",
                size::format(*most)
            ),
            Self::World(what) => write!(
                f,
                "a rule was broken: {what}; this is a bug of gpusvm, and comes again with the same command"
            ),
            Self::Folder(error) | Self::Report(error) => error.fmt(f),
            Self::Prepare(error) => error.fmt(f),
            Self::Machine(error) => error.fmt(f),
            Self::Job(error) => error.fmt(f),
            Self::NotVerified(name) => write!(f, "{name}: the device's answer is wrong"),
            Self::Torture(what) => f.write_str(what),
            Self::Output(why) => write!(f, "standard output: {why}"),
        }
    }
}

impl std::error::Error for RunError {}

/// Runs what `args` ask for, prints it to `out`, and writes the report where one is wanted.
///
/// # Errors
/// [`RunError`]; with its exit code.
pub fn run(
    args: &RunArgs,
    interrupted: &Arc<AtomicBool>,
    out: &mut dyn Write,
) -> Result<(), RunError> {
    if args.workload.as_deref() == Some(torture::NAME) {
        if args.host == Host::Model {
            return Err(RunError::LiveOnly(torture::NAME));
        }
        // Some of its memory can be nowhere else than it is.
        if args.atomics != Atomics::System {
            return Err(RunError::Needless("--atomics"));
        }
        return torture::run(args, interrupted, out);
    }
    let jobs = plan(args)?;
    let folder = args.report.as_deref().map(Folder::open).transpose();
    let folder = folder.map_err(RunError::Folder)?;
    let mut reports = Vec::new();
    let ended = run_all(args, jobs, interrupted, folder.as_ref(), &mut reports);
    if let (Err(why), Some(folder)) = (&ended, &folder) {
        let page = Page {
            runs: &reports,
            ended: Some(&why.to_string()),
        };
        // The first error is the one to tell.
        let _second = folder.write_page(&page);
    }
    let why = ended.as_ref().err().map(ToString::to_string);
    // What a demo set has done until it ended is worth to be seen.
    let printed = if ended.is_ok() || !reports.is_empty() {
        print(args, (&reports, why.as_deref()), out)
    } else {
        Ok(())
    };
    ended?;
    printed.map_err(RunError::Output)?;
    let wrong = reports.iter().rfind(|report| !report.verified);
    wrong.map_or(Ok(()), |wrong| Err(RunError::NotVerified(wrong.workload)))
}

/// Runs one after the other until one fails; those that finished are in `reports`, and in `folder`.
fn run_all(
    args: &RunArgs,
    jobs: Vec<Planned>,
    interrupted: &Arc<AtomicBool>,
    folder: Option<&Folder>,
    reports: &mut Vec<Report>,
) -> Result<(), RunError> {
    for plan in jobs {
        check_memory(args.host, &plan)?;
        reports.push(match args.host {
            Host::Live => run_one(args, &plan, interrupted)?,
            Host::Model => model::run_one(args, &plan, interrupted)?,
        });
        if let Some(folder) = folder {
            folder.add_last(reports).map_err(RunError::Report)?;
        }
    }
    Ok(())
}

/// Workloads with their sizes.
fn plan(args: &RunArgs) -> Result<Vec<Planned>, RunError> {
    let jobs = select(args)?;
    if args.host == Host::Model {
        jobs.iter().try_for_each(|plan| model::check(args, plan))?;
    }
    Ok(jobs)
}

fn select(args: &RunArgs) -> Result<Vec<Planned>, RunError> {
    if args.seconds.is_some() && args.workload.as_deref() != Some("atomics") {
        return Err(RunError::Needless("--seconds"));
    }
    if args.planted.is_some() {
        return Err(RunError::Needless("--break"));
    }
    if !args.ops.is_empty() {
        return Err(RunError::Needless("--ops"));
    }
    if args.jitter.is_some() {
        return Err(RunError::Needless("--jitter"));
    }
    if args.cpu_faults == CpuFaults::InThread {
        return Err(RunError::Needless("--cpu-faults in-thread"));
    }
    let sized = |name: &str, size: u64, vram: u64| {
        let workload = Workload::named(name).ok_or_else(|| RunError::Unknown(name.to_owned()))?;
        let (size, vram) = match args.host {
            Host::Live => (size << 20, vram << 20),
            Host::Model => model::SIZES,
        };
        Ok(Planned {
            workload,
            bytes: args.size.unwrap_or(size),
            vram: args.vram.unwrap_or(vram),
        })
    };
    let Some(name) = &args.workload else {
        if args.input.is_some() {
            return Err(RunError::Needless("--input"));
        }
        return DEMO
            .into_iter()
            .map(|(name, size, vram)| sized(name, size, vram))
            .collect();
    };
    let needless = match name.as_str() {
        "wordcount" => args.size.map(|_| "--size"),
        _ => args.input.as_ref().map(|_| "--input"),
    };
    if let Some(option) = needless {
        return Err(RunError::Needless(option));
    }
    let demo = DEMO.into_iter().find(|(other, ..)| other == name);
    let (_, size, vram) = demo.unwrap_or(("", 256, 64));
    Ok(vec![sized(name, size, vram)?])
}

/// Shows how far a workload is, where somebody looks.
fn bar(args: &RunArgs, workload: Workload) -> Bar {
    let wanted = if args.output.json {
        Wanted::No
    } else {
        Wanted::Yes
    };
    Bar::new(workload.name, wanted)
}

/// Runs one workload on a live machine of its own.
fn run_one(args: &RunArgs, plan: &Planned, interrupted: &AtomicBool) -> Result<Report, RunError> {
    let (workload, bytes, vram) = (plan.workload, plan.bytes, plan.vram);
    let bar = bar(args, workload);
    bar.phase("preparing");
    let order = Order {
        size: bytes,
        seed: args.seed,
        input: args.input.clone(),
        seconds: args.seconds,
        memory: Memory::Process,
    };
    // Where only the program's own allocations migrate, the data has to be some.
    let refused = |error| RunError::Machine(MachineError::Host(error));
    allocate_for(&args.live.config()).map_err(refused)?;
    let mut data = workload.prepare(&order).map_err(RunError::Prepare)?;
    let machine = Machine::start(args.machine(vram)).map_err(RunError::Machine)?;
    let clock = Stopwatch::start();
    let job = Job {
        device: Device::Live(&machine),
        interrupted,
        progress: &bar,
    };
    data.run(&job).map_err(RunError::Job)?;
    let elapsed = clock.elapsed();
    bar.phase("verifying");
    let verified = data.verify();
    let report = Report {
        workload: workload.name,
        verified,
        elapsed,
        clock: Clock::Real,
        bytes: data.bytes(),
        traffic: data.traffic(),
        vram,
        answer: data.answer(),
        counts: data.counts(),
        host: report::host_json(machine.space().level(), &probe()),
        config: report::config_json(args, bytes, vram),
        stats: report::stats_json(machine.stats()),
        gts: report::stats_text(machine.stats()),
        picture: machine.timeline().map(|t| Picture::of(t, elapsed)),
    };
    machine.close();
    Ok(report)
}

/// Refuses what would not fit, before the system does so in a worse way.
fn check_memory(host: Host, plan: &Planned) -> Result<(), RunError> {
    let needed = match host {
        Host::Live => needed(plan),
        Host::Model => model::needed(plan),
    };
    let available = memory_available().unwrap_or(u64::MAX);
    if needed > available {
        Err(RunError::Memory { needed, available })
    } else {
        Ok(())
    }
}

/// Bytes that a run takes on the live host.
fn needed(plan: &Planned) -> u64 {
    // A file is mapped in place; verification of some workloads computes a second copy.
    let copies = match plan.workload.name {
        "wordcount" => 0,
        "stencil" | "bfs" => 2,
        _ => 1,
    };
    plan.bytes.saturating_mul(copies).saturating_add(plan.vram)
}

/// Prints runs, and why there are no others.
fn print(
    args: &RunArgs,
    (reports, ended): (&[Report], Option<&str>),
    out: &mut dyn Write,
) -> std::io::Result<()> {
    if !args.output.json {
        let mut table = Table::new(&COLUMNS);
        reports.iter().for_each(|report| table.row(report.row()));
        write!(out, "{table}")?;
        for report in reports {
            if let Some(answer) = &report.answer {
                writeln!(out, "{}: {answer}", report.workload)?;
            }
        }
        if let Some(folder) = &args.report {
            writeln!(out, "report: {}", folder.join(folder::PAGE).display())?;
        }
        return Ok(());
    }
    match reports {
        [only] if args.workload.is_some() => writeln!(out, "{:#}", only.json()),
        all => {
            let verified = ended.is_none() && all.iter().all(|report| report.verified);
            let runs: Vec<_> = all.iter().map(Report::json).collect();
            let object = serde_json::json!({
                "schema": 1, "workload": "demo", "verified": verified, "ended": ended, "runs": runs,
            });
            writeln!(out, "{object:#}")
        }
    }
}

/// Measures real time through the host's clock.
#[derive(Debug)]
pub struct Stopwatch {
    clock: Arc<LiveEnv>,
    start: u64,
}

impl Stopwatch {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        let in_runtime = RuntimeScope::enter();
        let clock = LiveEnv::new(0);
        drop(in_runtime);
        let start = clock.now_ns();
        Self { clock, start }
    }

    /// Time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.clock.now_ns() - self.start)
    }
}
