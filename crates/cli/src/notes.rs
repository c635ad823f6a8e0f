//! [`Notes`]: what scenarios want to know of events that no counter tells. Atomics alone: a sink must
//! neither allocate nor lock.

use std::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::{Event, EventSink, FaultEnd};
use gpusvm::seam::env::Ns;

/// A fold over events.
#[derive(Debug)]
pub struct Notes {
    /// The last refusal, see [`packed`].
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

/// All that a refusal can say of a page, in the order of their numbers, which start at 1.
const REFUSALS: [fn(HostVa) -> Failed; 20] = [
    Failed::NoVma,
    Failed::Permission,
    Failed::Unmappable,
    Failed::OutOfArea,
    Failed::BadPage,
    Failed::AtomicForbidden,
    Failed::NotMigratable,
    |_page| Failed::AddressSpaceGone,
    |_page| Failed::OutOfVram,
    |_page| Failed::TooLarge,
    |_page| Failed::OutOfMemory,
    |_page| Failed::Copy,
    |_page| Failed::Closed,
    |_page| Failed::Budget(Stale::CpuMappingChanged),
    |_page| Failed::Budget(Stale::RangeUnmapped),
    |_page| Failed::Budget(Stale::MixedPlacement),
    |_page| Failed::Budget(Stale::PagesBusy),
    |_page| Failed::Budget(Stale::PagesRefused),
    |_page| Failed::Budget(Stale::Timeslice),
    |page| Failed::Os(i32::try_from(page.get() / PAGE).unwrap_or(0)),
];

/// A refusal as one word, so that nobody sees half of it: its page, and below that its number.
fn packed(failed: Failed) -> u64 {
    let page = match failed {
        Failed::NoVma(at)
        | Failed::Permission(at)
        | Failed::Unmappable(at)
        | Failed::OutOfArea(at)
        | Failed::BadPage(at)
        | Failed::AtomicForbidden(at)
        | Failed::NotMigratable(at) => at,
        Failed::Os(errno) => HostVa::new(u64::try_from(errno).unwrap_or(0) * PAGE),
        Failed::AddressSpaceGone
        | Failed::OutOfVram
        | Failed::TooLarge
        | Failed::OutOfMemory
        | Failed::Copy
        | Failed::Budget(_)
        | Failed::Closed => HostVa::new(0),
    };
    let number = (1..).zip(REFUSALS).find(|(_, said)| said(page) == failed);
    page.align_down(PAGE).get() | number.map_or(0, |(number, _)| number)
}

/// What [`packed`] made the word of.
fn unpacked(word: u64) -> Option<Failed> {
    let number = usize::try_from(word % PAGE).ok()?;
    let said = REFUSALS.get(number.checked_sub(1)?)?;
    Some(said(HostVa::new(word).align_down(PAGE)))
}

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
        self.refusal().map_or("NACK", errno_of)
    }

    /// Why the last refused device fault was; its page, not its byte.
    pub(crate) fn refusal(&self) -> Option<Failed> {
        unpacked(self.refused.load(Ordering::Relaxed))
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
}

impl EventSink for Notes {
    fn record(&self, _at: Ns, event: &Event) {
        match event {
            Event::FaultDone {
                end: FaultEnd::Refused(failed),
                ..
            } => self.refused.store(packed(*failed), Ordering::Relaxed),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_of_a_page_is_read_back() {
        let page = HostVa::new(0x7fff_1234_5000);
        for said in REFUSALS {
            let failed = said(page);
            assert_eq!(unpacked(packed(failed)), Some(failed));
        }
        assert_eq!(unpacked(packed(Failed::Os(12))), Some(Failed::Os(12)));
        let inside = packed(Failed::NotMigratable(page.plus(8)));
        assert_eq!(unpacked(inside), Some(Failed::NotMigratable(page)));
        assert_eq!(unpacked(0), None, "nothing was refused");
    }
}
