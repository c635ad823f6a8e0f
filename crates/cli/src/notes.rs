//! [`Notes`]: what scenarios want to know of events that no counter tells. Atomics alone: a sink must
//! neither allocate nor lock.

use std::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::{Event, EventSink, FaultEnd};
use gpusvm::seam::env::Ns;

/// A fold over events.
#[derive(Debug)]
pub struct Notes {
    /// Index into [`NAMES`] of the last refusal's errno.
    refused: AtomicU64,
    collected: AtomicU64,
    /// The joined span of all flushes that followed a zap.
    flushed_start: AtomicU64,
    flushed_end: AtomicU64,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            refused: AtomicU64::new(0),
            collected: AtomicU64::new(0),
            flushed_start: AtomicU64::new(u64::MAX),
            flushed_end: AtomicU64::new(0),
        }
    }
}

/// Names of errnos that a refusal can have.
const NAMES: [&str; 11] = [
    "NACK", "ENOENT", "EPERM", "EIO", "EINVAL", "EFAULT", "ENOMEM", "E2BIG", "EBUSY", "EACCES",
    "EOS",
];

/// The errno of a failure at the uAPI border, as [`Failed`] documents it.
pub(crate) const fn errno_of(failed: Failed) -> &'static str {
    match failed {
        Failed::NoVma(_) | Failed::Closed => "ENOENT",
        Failed::Permission(_) => "EPERM",
        Failed::Unmappable(_) | Failed::Copy => "EIO",
        Failed::OutOfArea(_) => "EINVAL",
        Failed::AddressSpaceGone | Failed::BadPage(_) => "EFAULT",
        Failed::OutOfVram | Failed::OutOfMemory => "ENOMEM",
        Failed::TooLarge => "E2BIG",
        Failed::Budget(_) => "EBUSY",
        Failed::NotMigratable(_) | Failed::AtomicForbidden(_) => "EACCES",
        Failed::Os(_) => "EOS",
    }
}

/// The errno of an operation that did not complete.
pub(crate) const fn errno_of_interrupted(why: Interrupted) -> &'static str {
    match why {
        Interrupted::Failed(failed) => errno_of(failed),
        Interrupted::Stale(Stale::CpuMappingChanged) => "EAGAIN",
        Interrupted::Stale(Stale::RangeUnmapped) => "EFAULT",
        Interrupted::Stale(Stale::MixedPlacement) => "EOPNOTSUPP",
        Interrupted::Stale(Stale::PagesBusy | Stale::PagesRefused | Stale::Timeslice) => "EBUSY",
    }
}

impl Notes {
    /// The errno of the last refused device fault; `NACK` where the driver knew nothing of it.
    pub(crate) fn refused(&self) -> &'static str {
        let index = usize::try_from(self.refused.load(Ordering::Relaxed)).unwrap_or(0);
        NAMES[index.min(NAMES.len() - 1)]
    }

    /// Ranges that the collector removed.
    pub(crate) fn collected(&self) -> u64 {
        self.collected.load(Ordering::Relaxed)
    }

    /// The smallest span around all that was flushed since [`forget`](Self::forget).
    pub(crate) fn flushed(&self) -> Option<HostSpan> {
        let start = self.flushed_start.load(Ordering::Relaxed);
        let end = self.flushed_end.load(Ordering::Relaxed);
        (start < end).then(|| HostSpan::new(HostVa::new(start), HostVa::new(end)))
    }

    /// Forgets the last refusal.
    pub(crate) fn forget_refusal(&self) {
        self.refused.store(0, Ordering::Relaxed);
    }

    /// Forgets flushes and collected ranges.
    pub(crate) fn forget(&self) {
        self.collected.store(0, Ordering::Relaxed);
        self.flushed_start.store(u64::MAX, Ordering::Relaxed);
        self.flushed_end.store(0, Ordering::Relaxed);
    }

    fn refuse(&self, failed: Failed) {
        let name = errno_of(failed);
        let index = NAMES.iter().position(|other| *other == name);
        let index = u64::try_from(index.unwrap_or(0)).unwrap_or(0);
        self.refused.store(index, Ordering::Relaxed);
    }
}

impl EventSink for Notes {
    fn record(&self, _at: Ns, event: &Event) {
        match event {
            Event::FaultDone {
                end: FaultEnd::Refused(failed),
                ..
            } => self.refuse(*failed),
            Event::RangeCollected { .. } => {
                self.collected.fetch_add(1, Ordering::Relaxed);
            }
            Event::Zapped { span, .. } => {
                self.flushed_start
                    .fetch_min(span.start().get(), Ordering::Relaxed);
                self.flushed_end
                    .fetch_max(span.end().get(), Ordering::Relaxed);
            }
            _ => {}
        }
    }
}
