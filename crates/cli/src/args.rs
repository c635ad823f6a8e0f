//! The command line.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::atomics::Atomics;
use crate::conformance::ConformanceArgs;
use crate::machine::{MachineConfig, ServiceMode};
use crate::size;
use crate::torture::op::Op;
use crate::workload;
use gpusvm_live::{BracketChoice, FaultLevel, LevelChoice, LiveConfig, VramMode};

/// Seeds begin below this number and are at most as many, so that the last one can be counted to.
pub const MOST_SEEDS: u64 = 1 << 63;

/// GPU shared virtual memory in user space.
#[derive(Debug, Parser)]
#[command(name = "gpusvm", bin_name = "gpusvm", version)]
#[command(
    after_help = "Examples:\n  gpusvm                                   the demo set\n  \
    gpusvm run stream --size 1G --vram 256M  one workload\n  \
    gpusvm run wordcount --input FILE        words of a mapped file\n  \
    gpusvm info                              what this machine allows"
)]
pub struct Cli {
    /// What to do; the demo set if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run workloads on the software GPU and check every answer against the CPU.
    #[command(after_help = "Examples:\n  gpusvm run\n  \
        gpusvm run stream --size 1G --vram 256M --json\n  \
        gpusvm run gups --migration copy --fault-service queue\n  \
        gpusvm run sort --report out   pictures over time, in out/report.html\n  \
        gpusvm run bfs --host model    in a world that exists only in memory, the same each time\n  \
        gpusvm run torture --seconds 60 --seed 7  whatever a process can do, at once")]
    Run(RunArgs),
    /// Run worlds that exist only in memory under a scheduler that tries every order of events.
    #[command(after_help = "Examples:\n  gpusvm explore --seeds 10000\n  \
        gpusvm explore --scenario all\n  gpusvm explore --mutant all     does it find known bugs?\n  \
        gpusvm explore --tape FILE      what failed, again")]
    Explore(ExploreArgs),
    /// Check that a host does what Linux and its drivers do. The last line counts.
    #[command(
        arg_required_else_help = false,
        after_help = "Examples:\n  gpusvm conformance scenarios --host live\n  \
        gpusvm conformance hmm --host model --json"
    )]
    Conformance(ConformanceArgs),
    /// Show what this machine and kernel allow, and what follows for you.
    Info(InfoArgs),
    /// Measure against yardsticks taken in the same run, as ratios.
    #[command(after_help = "Examples:\n  gpusvm bench\n  gpusvm bench migrate-out --json")]
    Bench(BenchArgs),
}

/// How results are shown.
#[derive(Args, Clone, Copy, Debug)]
pub struct OutputArgs {
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

/// What is asked of the live host.
#[derive(Args, Clone, Copy, Debug)]
pub struct LiveArgs {
    /// Which touches of memory that is on the device are served.
    #[arg(long, value_enum, default_value_t = Level::Best)]
    pub level: Level,
    /// How address-space changes are seen.
    #[arg(long, value_enum, default_value_t = Brackets::Best)]
    pub brackets: Brackets,
}

/// Options of `info`.
#[derive(Args, Clone, Copy, Debug)]
pub struct InfoArgs {
    /// The host's levels.
    #[command(flatten)]
    pub live: LiveArgs,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// The workload; without one, the demo set.
    #[arg(help = workloads())]
    pub workload: Option<String>,
    /// Bytes of the workload's data in all, with K, M or G. The model host is made for little: it takes
    /// its time for more than some 64M.
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// Bytes of device memory, with K, M or G.
    #[arg(long, value_parser = parse_size)]
    pub vram: Option<u64>,
    /// File to read, for wordcount.
    #[arg(long)]
    pub input: Option<PathBuf>,
    /// Execution units of the device, each one thread.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,
    /// The host whose memory is shared.
    #[arg(long, value_enum, default_value_t = Host::Live)]
    pub host: Host,
    /// How pages move: handed over, or copied.
    #[arg(long, value_enum, default_value_t = Migration::Remap)]
    pub migration: Migration,
    /// Where faults are served: on the faulting unit, or by a thread.
    #[arg(long, value_enum, default_value_t = Service::Inline)]
    pub fault_service: Service,
    /// Where CPU faults on torture's memory are served: by a thread that reads userfaultfd, or on the
    /// thread that faults. Memory of other workloads is also the system calls', which can only wait.
    #[arg(long, value_enum, default_value_t = CpuFaults::Monitor)]
    pub cpu_faults: CpuFaults,
    /// The host's levels.
    #[command(flatten)]
    pub live: LiveArgs,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Write into this folder: report.html with pictures over time, and per workload NAME.json
    /// and NAME.gt0.stats. Made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Where the device does its atomics. Torture has memory that can be nowhere else than it is, and the bus
    /// for it.
    #[arg(long, value_enum, default_value_t = Atomics::System)]
    pub atomics: Atomics,
    /// How long torture lasts, or at least lasts what atomics adds. Seconds of the wall's clock, on the
    /// model host, too: there the rounds of additions are the same each time, but for how many there are.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub seconds: Option<u64>,
    /// What torture does to the address space, of all that it can do.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "OP,...")]
    pub(crate) ops: Vec<Op>,
    /// Let torture's threads sleep for a moment at one of N places where others may meet them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub jitter: Option<u32>,
    /// Plant a bug, to see torture find it.
    #[arg(long = "break", value_enum, value_name = "BUG")]
    pub planted: Option<Planted>,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `explore`.
#[derive(Args, Clone, Debug)]
pub struct ExploreArgs {
    /// Kind of world, or all of them; swarm, if nothing is said, and all for known bugs.
    #[arg(long, value_name = "NAME|all", conflicts_with = "tape")]
    pub scenario: Option<String>,
    /// How many worlds of each kind.
    #[arg(long, default_value_t = 1000, conflicts_with_all = ["tape", "mutant"],
        value_parser = clap::value_parser!(u64).range(1..=MOST_SEEDS))]
    pub seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0, conflicts_with = "tape",
        value_parser = clap::value_parser!(u64).range(..MOST_SEEDS))]
    pub seed: u64,
    /// Run the one world of this tape.
    #[arg(long, value_name = "FILE")]
    pub tape: Option<PathBuf>,
    /// Write the tape of a failure there (gpusvm.tape, if nothing is said); the tapes of several bugs
    /// into this folder.
    #[arg(long, value_name = "FILE|DIR", conflicts_with = "tape")]
    pub save: Option<PathBuf>,
    /// Re-introduce known bugs one after the other: each must be found. With --tape, run the tape's
    /// world with this bug, or with none.
    #[arg(long, value_name = "NAME,...|all")]
    pub mutant: Option<String>,
    /// Watch all worlds, not one in sixteen, and show which operations met which entries.
    #[arg(long, conflicts_with_all = ["tape", "mutant"])]
    pub coverage: bool,
    /// Threads that run worlds; one for each processor, if nothing is said.
    #[arg(long, conflicts_with_all = ["tape", "mutant"], value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// One row only.
    pub name: Option<String>,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A bug that is planted on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Planted {
    /// Bindings are written although the mapping changed meanwhile.
    Recheck,
    /// Device units acknowledge TLB invalidations and keep their entries.
    Tlb,
    /// Migrations take the content before they take the pages.
    Freeze,
    /// Actors take two locks crosswise.
    Hang,
}

/// The host whose memory is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// This process.
    Live,
    /// A process that exists only in memory, under a scheduler: the same command gives the same output.
    Model,
}

/// How pages move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Migration {
    /// Pages of the process become device memory; nothing is copied.
    Remap,
    /// The device has memory of its own; content is copied.
    Copy,
}

/// Where faults are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Service {
    /// On the unit that faulted.
    Inline,
    /// By a thread that reads the fault ring.
    Queue,
}

/// Where CPU faults are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CpuFaults {
    /// By a thread that reads userfaultfd.
    Monitor,
    /// On the thread that faults.
    InThread,
}

/// Which touches of memory that is on the device are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// The best that the system allows.
    Best,
    /// Those by the program and by system calls.
    Full,
    /// Those by the program.
    UserModeOnly,
    /// Those by the program on allocations of its own, without userfaultfd.
    Mprotect,
    /// None, without userfaultfd: nothing migrates by itself.
    Explicit,
}

/// How address-space changes are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Brackets {
    /// Patched; where that is impossible by symbols, or events.
    Best,
    /// By patched system-call sites, or not at all.
    Patched,
    /// By symbols of this program in place of the C library's.
    Symbols,
    /// By userfaultfd events, after they happened.
    Events,
}

/// What the parser says of a command line, on one line and without its usage.
#[derive(Debug)]
pub struct OneLine<'a>(pub &'a clap::Error);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let lines = text.lines().map(str::trim);
        let said = lines.filter(|line| {
            !line.is_empty() && !line.starts_with("Usage:") && !line.starts_with("For more")
        });
        for line in said {
            write!(f, "{}; ", line.trim_start_matches("error: "))?;
        }
        f.write_str("see --help")
    }
}

/// The name of an option's value, as it is written on the command line.
#[must_use]
pub fn value_name(value: impl ValueEnum) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_owned())
}

/// What there is to run.
fn workloads() -> String {
    let mut text = "The workload; without one, the demo set. There are:\n".to_owned();
    for workload in workload::ALL {
        text += &format!("- {}: {}\n", workload.name, workload.about);
    }
    text + "- torture: whatever a process can do, at once"
}

fn parse_size(text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|error| error.to_string())
}

impl LiveArgs {
    /// The host's configuration.
    #[must_use]
    pub fn config(self) -> LiveConfig {
        LiveConfig {
            level: match self.level {
                Level::Best => LevelChoice::Best,
                Level::Full => LevelChoice::Forced(FaultLevel::Full),
                Level::UserModeOnly => LevelChoice::Forced(FaultLevel::UserModeOnly),
                Level::Mprotect => LevelChoice::Forced(FaultLevel::Mprotect),
                Level::Explicit => LevelChoice::Forced(FaultLevel::Explicit),
            },
            brackets: match self.brackets {
                Brackets::Best => BracketChoice::Best,
                Brackets::Patched => BracketChoice::Patched,
                Brackets::Symbols => BracketChoice::Symbols,
                Brackets::Events => BracketChoice::Events,
            },
            ..LiveConfig::default()
        }
    }
}

impl RunArgs {
    /// The machine that these options ask for, with `vram` bytes of device memory.
    #[must_use]
    pub fn machine(&self, vram: u64) -> MachineConfig {
        MachineConfig {
            vram,
            units: self.threads,
            migration: match self.migration {
                Migration::Remap => VramMode::Adopt,
                Migration::Copy => VramMode::Copy,
            },
            service: match self.fault_service {
                Service::Inline => ServiceMode::Inline,
                Service::Queue => ServiceMode::Queue,
            },
            live: self.live.config(),
            atomics: self.atomics,
            seed: self.seed,
            timeline: self.report.is_some(),
            plant_stale_tlb: self.planted == Some(Planted::Tlb),
            ..MachineConfig::default()
        }
    }
}
