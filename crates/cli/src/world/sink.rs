//! What the framework tells: part of the world's hash, and the owners of device memory.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::VramSpan;
use gpusvm::error::Failed;
use gpusvm::event::{Event, EventSink, FaultEnd};
use gpusvm::seam::env::Ns;
use gpusvm_model::sched::ModelEnv;

use crate::machine::Folds;

/// Where the events of a world go; counters and what else a machine makes of them only where somebody asks
/// for it.
pub(crate) type Sink = (Arc<Told>, Option<Arc<Folds>>);

/// A fold over events.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Device memory that has an owner. Two devices have the same offsets: both are here.
    taken: Mutex<Vec<VramSpan>>,
    counts: Counts,
    /// Whether the device is one that loses answers.
    timeouts: Timeouts,
    /// What the device may reach.
    reach: Reach,
}

/// How much was told.
#[derive(Debug, Default)]
struct Counts {
    to_device: AtomicU64,
    to_system: AtomicU64,
    /// Faults that have begun, and those that are done.
    faults: [AtomicU64; 2],
}

/// What a device may reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reach {
    /// Everything: no fault is refused because it lies outside.
    #[default]
    Everything,
    /// What somebody says.
    Areas,
}

/// Whether TLB invalidations may go unanswered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Timeouts {
    /// The world has failed then.
    #[default]
    Forbidden,
    /// Answers are lost on purpose.
    Expected,
}

impl Told {
    /// For a world whose devices answer, or do not.
    pub(crate) fn new(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            reach: Reach::Areas,
            ..Self::default()
        }
    }

    /// Spans of device memory that have an owner.
    pub(crate) fn taken(&self) -> Vec<VramSpan> {
        self.taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// When all is over, each page that moved to a device and each that came home was told once, and each
    /// fault that has begun is done.
    ///
    /// # Errors
    /// What was told otherwise.
    pub(crate) fn agrees(&self, moved: [u64; 2]) -> Result<(), String> {
        let Counts {
            to_device,
            to_system,
            faults: [begun, done],
        } = &self.counts;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let told = [load(to_device), load(to_system)];
        if told != moved {
            return Err(format!(
                "miscounted: pages that went to devices and came home are {moved:?}, {told:?} were told"
            ));
        }
        let (begun, done) = (load(begun), load(done));
        if begun == done {
            Ok(())
        } else {
            Err(format!(
                "miscounted: {begun} faults have begun, {done} are done"
            ))
        }
    }

    /// Adds what an event tells.
    fn count(&self, event: &Event) {
        let Counts {
            to_device,
            to_system,
            faults: [begun, done],
        } = &self.counts;
        let add = |count: &AtomicU64, n: u64| count.fetch_add(n, Ordering::Relaxed);
        match event {
            Event::ToDevice {
                copied, adopted, ..
            } => add(to_device, (*copied + *adopted).get()),
            Event::ToSystem {
                copied, adopted, ..
            } => add(to_system, (*copied + *adopted).get()),
            Event::FaultStart { .. } => add(begun, 1),
            Event::FaultDone { .. } => add(done, 1),
            _other => 0,
        };
    }

    fn change(&self, act: impl FnOnce(&mut Vec<VramSpan>)) {
        act(&mut self.taken.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl EventSink for Told {
    fn record(&self, _at: Ns, event: &Event) {
        self.count(event);
        let number = |span: gpusvm::addr::HostSpan| [span.start().get(), span.bytes()];
        match event {
            Event::FaultStart { at, access, .. } => {
                ModelEnv.tell("fault", [at.get(), 0], || {
                    format!("fault {access:?} at {at}")
                });
            }
            Event::FaultRetry { at, why } => {
                ModelEnv.tell("retry", [at.get(), 0], || format!("retry {at}: {why:?}"));
            }
            Event::FaultDone {
                end: FaultEnd::Refused(Failed::OutOfArea(at)),
                ..
            } if self.reach == Reach::Everything => {
                ModelEnv.fail(format!(
                    "a fault at {at} is refused as outside of everything"
                ));
            }
            Event::FaultDone { at, end, .. } => {
                ModelEnv.tell("fault done", [at.get(), 0], || {
                    format!("fault done {end:?}")
                });
            }
            Event::ToDevice { span, .. } => {
                ModelEnv.tell("to device", number(*span), || format!("to device {span}"));
            }
            Event::ToSystem { span, cause, .. } => {
                ModelEnv.tell("home", number(*span), || format!("home {span} {cause:?}"));
            }
            Event::CpuFault { at } => {
                ModelEnv.tell("cpu fault", [at.get(), 0], || format!("cpu fault {at}"));
            }
            Event::Evict { vram } => {
                ModelEnv.tell("evict", [vram.start().get(), 0], || format!("evict {vram}"));
            }
            Event::InvalidateStart { span, reason } => {
                ModelEnv.tell("invalidate", number(*span), || {
                    format!("invalidate {span} {reason:?}")
                });
            }
            Event::Bind { range, .. } => {
                ModelEnv.tell("bind", number(*range), || format!("bind {range}"));
            }
            Event::RangeCollected { range } => {
                ModelEnv.tell("collected", number(*range), || format!("collected {range}"));
            }
            Event::VramTaken { vram } => self.change(|taken| taken.push(*vram)),
            Event::VramFreed { vram } => self.change(|taken| {
                if let Some(n) = taken.iter().position(|other| other == vram) {
                    taken.swap_remove(n);
                }
            }),
            Event::TlbTimeout { .. } if self.timeouts == Timeouts::Expected => {}
            Event::TlbTimeout { .. } => {
                ModelEnv.fail("a unit did not acknowledge a TLB invalidation")
            }
            Event::FaultRange { .. }
            | Event::MigrateToDevice { .. }
            | Event::GetPages { .. }
            | Event::Zapped { .. }
            | Event::TlbInvalidate { .. }
            | Event::LateInvalidation { .. }
            | Event::HostConflict { .. }
            | Event::MoveMisreported { .. }
            | Event::HostGone { .. } => {}
        }
    }
}
