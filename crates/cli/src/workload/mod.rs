//! Workloads: ordinary programs over ordinary memory, one kernel each, checked against the CPU.
//!
//! A [`Workload`] prepares its data as any program would: arrays from the allocator, a mapped file. What it
//! prepared runs on a device through a [`Job`] and then verifies itself, without the device. `size`
//! is the total of the data; workloads whose every access may fault bound their work, and say so.
//!
//! The same workload runs on both hosts: its data is in arrays, which are ordinary memory of this process
//! or memory of a world's process.

mod atomics;
mod bfs;
mod chase;
mod gemm;
mod gups;
mod hashjoin;
mod memory;
mod pingpong;
mod refused;
mod sort;
mod spmv;
mod stencil;
mod storm;
mod stream;
mod wordcount;

use core::ops::ControlFlow;
use std::fmt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::error::Failed;
use gpusvm_live::FaultLevel;
use gpusvm_softgpu::{Kernel, Stop};
use serde_json::Value;

use crate::machine::Machine;
use crate::progress::Progress;
use crate::world;

pub(crate) use memory::{Array, File, Memory, Words};
pub use refused::Refused;
pub(crate) use storm::Storm;
pub use stream::cpu_triad;

/// What a workload is made from.
#[derive(Clone, Debug)]
pub struct Order {
    /// Bytes of data in all.
    pub size: u64,
    /// Seed of everything random in it.
    pub seed: u64,
    /// File to read, for workloads that read one.
    pub input: Option<PathBuf>,
    /// How long to go on, for workloads that can go on.
    pub seconds: Option<u64>,
    /// Where the data is to be.
    pub(crate) memory: Memory,
}

/// A workload cannot be prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrepareError {
    /// The size is too small to make sense of.
    TooSmall {
        /// Least bytes.
        least: u64,
    },
    /// The workload reads a file, and none was given.
    NoInput,
    /// The file cannot be used.
    Input {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

impl fmt::Display for PrepareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall { least } => {
                write!(
                    f,
                    "--size is too small for this workload; use {least} or more"
                )
            }
            Self::NoInput => f.write_str("this workload reads a file; name one with --input FILE"),
            Self::Input { path, why } => write!(f, "cannot read {}: {why}", path.display()),
        }
    }
}

impl std::error::Error for PrepareError {}

/// A workload stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobError {
    /// The device stopped.
    Device(Stop),
    /// The driver refused an access of the device.
    Refused(Refused),
    /// The driver refused an area.
    Driver(Failed),
    /// The user interrupted.
    Interrupted,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(stop) => stop.fmt(f),
            Self::Refused(refused) => refused.fmt(f),
            Self::Driver(failed) => failed.fmt(f),
            Self::Interrupted => f.write_str("interrupted; all data is home"),
        }
    }
}

impl std::error::Error for JobError {}

/// A kind of workload.
#[derive(Clone, Copy)]
pub struct Workload {
    /// Name on the command line.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    prepare: fn(&Order) -> Result<Box<dyn Prepared>, PrepareError>,
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// All workloads.
pub const ALL: [Workload; 12] = [
    Workload {
        name: "stream",
        about: "a = b + s*c over three arrays",
        prepare: stream::prepare,
    },
    Workload {
        name: "gups",
        about: "random updates of a table",
        prepare: gups::prepare,
    },
    Workload {
        name: "chase",
        about: "follow pointers between boxes",
        prepare: chase::prepare,
    },
    Workload {
        name: "stencil",
        about: "5-point sweeps over a grid",
        prepare: stencil::prepare,
    },
    Workload {
        name: "spmv",
        about: "sparse matrix times vector",
        prepare: spmv::prepare,
    },
    Workload {
        name: "bfs",
        about: "breadth-first search of a graph",
        prepare: bfs::prepare,
    },
    Workload {
        name: "hashjoin",
        about: "build and probe a hash table",
        prepare: hashjoin::prepare,
    },
    Workload {
        name: "gemm",
        about: "dense matrix product",
        prepare: gemm::prepare,
    },
    Workload {
        name: "pingpong",
        about: "CPU and device take turns",
        prepare: pingpong::prepare,
    },
    Workload {
        name: "sort",
        about: "merge sort of 64-bit keys",
        prepare: sort::prepare,
    },
    Workload {
        name: "atomics",
        about: "CPU and device add to the same words",
        prepare: atomics::prepare,
    },
    Workload {
        name: "wordcount",
        about: "count words of a mapped file",
        prepare: wordcount::prepare,
    },
];

impl Workload {
    /// The workload of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|workload| workload.name == name)
    }

    /// Allocates and fills the data.
    ///
    /// # Errors
    /// [`PrepareError`] for a size or a file that does not do.
    pub fn prepare(&self, order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
        (self.prepare)(order)
    }
}

/// Data that is ready to be worked on.
pub trait Prepared {
    /// Bytes of data that the device works on.
    fn bytes(&self) -> u64;

    /// Bytes that the kernels read and write, in all passes.
    fn traffic(&self) -> u64;

    /// Does the work on the device.
    ///
    /// # Errors
    /// [`JobError`].
    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError>;

    /// Whether the result is what the CPU says it must be.
    fn verify(&self) -> bool;

    /// The answer, where it is short enough to show.
    fn answer(&self) -> Option<String> {
        None
    }

    /// What it counted, as JSON, where that is more than the answer.
    fn counts(&self) -> Option<Value> {
        None
    }
}

/// What runs kernels, on either host.
#[derive(Clone, Copy)]
pub(crate) enum Device<'a> {
    Live(&'a Machine),
    Model(&'a world::machine::Machine),
}

/// The device, as workloads use it.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The machine.
    pub(crate) device: Device<'a>,
    /// Set when the user wants to stop.
    pub interrupted: &'a AtomicBool,
    /// Told how far the work is.
    pub progress: &'a dyn Progress,
}

impl fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").finish_non_exhaustive()
    }
}

impl Job<'_> {
    /// Runs one kernel to its end.
    ///
    /// # Errors
    /// [`JobError`].
    pub fn launch<K>(&self, what: &str, kernel: &K, groups: u32) -> Result<(), JobError>
    where
        K: Kernel + Clone + Send + 'static,
    {
        let watch = |begun| self.watch(what, begun, groups);
        self.ended(match self.device {
            Device::Live(machine) => launch_live(machine, kernel, groups, &watch),
            Device::Model(machine) => {
                let launch = machine.begin(Arc::new(kernel.clone()), groups);
                machine.wait(&launch, &watch)
            }
        })
    }

    /// As [`launch`](Self::launch); at the same time the CPU calls `beside` with 0, 1, 2, ... until the
    /// kernel has ended. Returns how often.
    ///
    /// # Errors
    /// As there.
    pub fn launch_beside<K>(
        &self,
        what: &str,
        kernel: &K,
        groups: u32,
        beside: impl Fn(u64) + Sync,
    ) -> Result<u64, JobError>
    where
        K: Kernel + Clone + Send + 'static,
    {
        let watch = |begun| self.watch(what, begun, groups);
        let (result, calls) = match self.device {
            Device::Live(machine) => {
                let done = AtomicBool::new(false);
                let until_done = || call_until(&beside, || done.load(Ordering::Acquire));
                std::thread::scope(|scope| {
                    let cpu = scope.spawn(until_done);
                    let result = launch_live(machine, kernel, groups, &watch);
                    done.store(true, Ordering::Release);
                    (
                        result,
                        cpu.join().unwrap_or_else(|panic| resume_unwind(panic)),
                    )
                })
            }
            Device::Model(machine) => {
                let launch = machine.begin(Arc::new(kernel.clone()), groups);
                let calls = call_until(&beside, || machine.is_over(&launch));
                (machine.wait(&launch, &watch), calls)
            }
        };
        self.ended(result).map(|()| calls)
    }

    /// Tells how far the work is; whether it goes on.
    fn watch(&self, what: &str, begun: u32, groups: u32) -> ControlFlow<()> {
        self.progress.at(what, begun, groups);
        if self.interrupted.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    /// How a launch ended.
    fn ended(&self, result: Result<(), Stop>) -> Result<(), JobError> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(JobError::Interrupted);
        }
        result.map_err(|stop| self.why(stop))
    }

    /// What stopped the device, with what the driver said of it.
    fn why(&self, stop: Stop) -> JobError {
        let (Device::Live(machine), Stop::Fault(_)) = (self.device, stop) else {
            return JobError::Device(stop);
        };
        let why = machine.notes().refusal();
        why.map_or(JobError::Device(stop), |why| {
            JobError::Refused(Refused {
                stop,
                why,
                level: machine.space().level().faults,
            })
        })
    }

    /// Does `work` while a storm rages, where there can be one. Returns what it gave, and how often the storm moved pages.
    pub(crate) fn in_storm<R>(&self, storm: Storm, work: impl FnOnce() -> R) -> (R, u64) {
        match self.device {
            // Nothing would bring home what the CPU touches.
            Device::Live(machine) if machine.space().level().faults == FaultLevel::Explicit => {
                (work(), 0)
            }
            Device::Live(machine) => {
                let over = AtomicBool::new(false);
                let pagemap = machine.device().pagemap();
                let gust = |n| gpusvm_live::thread::run(|| storm.gust(pagemap, n));
                let rage = || call_until(&gust, || over.load(Ordering::Acquire));
                std::thread::scope(|scope| {
                    let raging = scope.spawn(rage);
                    let done = work();
                    over.store(true, Ordering::Release);
                    let gusts = raging.join().unwrap_or_else(|panic| resume_unwind(panic));
                    (done, gusts)
                })
            }
            Device::Model(machine) => {
                machine.begin_storm(storm);
                let done = work();
                (done, machine.end_storm())
            }
        }
    }

    /// Lets the device read memory that the CPU may only read.
    ///
    /// # Errors
    /// The driver's.
    pub fn mirror_read_only(&self, start: u64, len: u64) -> Result<(), JobError> {
        let span = HostSpan::at(HostVa::new(start), len).align_outward(gpusvm::addr::PAGE);
        let done = match self.device {
            Device::Live(machine) => machine.mirror_read_only(span),
            Device::Model(machine) => machine.mirror_read_only(span),
        };
        done.map_err(JobError::Driver)
    }
}

/// Runs a kernel on the live host.
fn launch_live(
    machine: &Machine,
    kernel: &dyn Kernel,
    groups: u32,
    watch: &(dyn Fn(u32) -> ControlFlow<()> + Sync),
) -> Result<(), Stop> {
    machine.launch_watched(kernel, groups, &|dispatch| {
        if watch(dispatch.begun()).is_break() {
            dispatch.cancel();
        }
    })
}

/// Calls `act` with 0, 1, 2, ... until it is done; returns how often.
fn call_until(act: &impl Fn(u64), done: impl Fn() -> bool) -> u64 {
    let mut calls = 0;
    while !done() {
        act(calls);
        calls += 1;
    }
    calls
}

/// Address of a slice that the device only reads.
pub(crate) fn address_of<T>(data: &[T]) -> u64 {
    u64::try_from(data.as_ptr().expose_provenance()).unwrap_or(0)
}

/// Address of a slice that the device writes.
pub(crate) fn address_of_mut<T>(data: &mut [T]) -> u64 {
    u64::try_from(data.as_mut_ptr().expose_provenance()).unwrap_or(0)
}

/// A number of bytes or elements as an index.
pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// A length as a number.
pub(crate) fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// Groups of `per` elements that cover `n` elements.
pub(crate) fn groups(n: usize, per: usize) -> u32 {
    u32::try_from(n.div_ceil(per)).unwrap_or(u32::MAX)
}

/// The elements of `group`, of `per` each, out of `n`.
pub(crate) fn part(group: u32, per: usize, n: usize) -> core::ops::Range<usize> {
    let start = usize::try_from(group)
        .unwrap_or(usize::MAX)
        .saturating_mul(per)
        .min(n);
    start..start.saturating_add(per).min(n)
}

/// Elements that `size` bytes hold at `bytes` each, at least `least`.
pub(crate) fn elements(size: u64, bytes: u64, least: u64) -> Result<usize, PrepareError> {
    let n = size / bytes;
    if n < least {
        return Err(PrepareError::TooSmall {
            least: least * bytes,
        });
    }
    Ok(index(n))
}

/// A small exact number as a float.
pub(crate) fn exact(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

/// splitmix64: a bijection that looks random. The `n`th number of stream `seed` is
/// `mix(seed + n)`.
pub(crate) const fn mix(n: u64) -> u64 {
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number below `bound`, from a random one.
pub(crate) fn below(random: u64, bound: usize) -> usize {
    index(u64::try_from((u128::from(random) * u128::from(count(bound))) >> 64).unwrap_or(0))
}
