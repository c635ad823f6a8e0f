//! Everything observable is an [`Event`]. Counters, reports, traces and tests are folds over
//! events; the logic itself holds no counters and writes no log lines.

use crate::addr::{HostSpan, HostVa, PageCount, VramSpan};
use crate::error::{Failed, Stale};
use crate::seam::env::Ns;
use crate::seam::mm::{Access, InvalidateReason};

/// Why an allocation was sent home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HomeCause {
    /// The CPU touched a page.
    CpuFault,
    /// Device memory was needed for something else.
    Pressure,
    /// Its pages and others of one range lay in different places.
    Mixed,
    /// The address space changes in a way that needs the pages at home.
    SpaceChange,
    /// The device or the VM goes away, or the user asked.
    Teardown,
}

/// How a device fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEnd {
    /// The range was bound.
    Bound,
    /// The binding was there already.
    Valid,
    /// The access is refused.
    Refused(Failed),
}

/// One thing that happened. `gt` is the index of a GT; spans are host addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device fault enters service. Emitted by the driver.
    FaultStart {
        /// GT that raised it.
        gt: u16,
        /// Faulting page.
        at: HostVa,
        /// Wanted right.
        access: Access,
    },
    /// The range of a fault was found or made; once per attempt.
    FaultRange {
        /// GT that raised the fault.
        gt: u16,
        /// The range.
        range: HostSpan,
    },
    /// A device fault leaves service.
    FaultDone {
        /// GT that raised it.
        gt: u16,
        /// Faulting page.
        at: HostVa,
        /// The range, where one was found.
        range: Option<HostSpan>,
        /// Result.
        end: FaultEnd,
        /// Time in service.
        took: Ns,
    },
    /// A fault attempt starts over.
    FaultRetry {
        /// Faulting page.
        at: HostVa,
        /// Why.
        why: Stale,
    },
    /// A migration to device memory was attempted.
    MigrateToDevice {
        /// GT whose fault asked for it.
        gt: u16,
        /// The span.
        span: HostSpan,
        /// Time, including a failed attempt's.
        took: Ns,
        /// Why it did not happen, if it did not.
        refused: Option<Stale>,
    },
    /// Pages arrived in device memory.
    ToDevice {
        /// The span.
        span: HostSpan,
        /// Pages that were copied.
        copied: PageCount,
        /// Pages that were handed over without a copy.
        adopted: PageCount,
        /// Time from collecting to the new entries.
        took: Ns,
    },
    /// Pages arrived in host memory.
    ToSystem {
        /// The span.
        span: HostSpan,
        /// Why.
        cause: HomeCause,
        /// Pages that were copied.
        copied: PageCount,
        /// Pages that were handed over without a copy.
        adopted: PageCount,
        /// Time from collecting to the new entries.
        took: Ns,
    },
    /// The CPU touched device memory.
    CpuFault {
        /// Address.
        at: HostVa,
    },
    /// An allocation was evicted under pressure.
    Evict {
        /// Its memory.
        vram: VramSpan,
    },
    /// Device memory was taken, to hold pages.
    VramTaken {
        /// The memory.
        vram: VramSpan,
    },
    /// Nobody holds a page in this device memory any more: it is about to be free.
    VramFreed {
        /// The memory.
        vram: VramSpan,
    },
    /// Page addresses of a range were gathered.
    GetPages {
        /// GT whose fault asked.
        gt: u16,
        /// The range.
        range: HostSpan,
        /// Time.
        took: Ns,
    },
    /// Page-table entries of a range were written.
    Bind {
        /// GT whose fault asked.
        gt: u16,
        /// The range.
        range: HostSpan,
        /// Time.
        took: Ns,
    },
    /// An invalidation reached a subscriber.
    InvalidateStart {
        /// The part inside the notifier window.
        span: HostSpan,
        /// Why.
        reason: InvalidateReason,
    },
    /// An invalidation zapped entries and flushed the TLBs.
    Zapped {
        /// GT.
        gt: u16,
        /// The flushed span.
        span: HostSpan,
        /// Time of the whole callback.
        took: Ns,
    },
    /// A TLB invalidation was sent.
    TlbInvalidate {
        /// GT.
        gt: u16,
    },
    /// A TLB invalidation was not acknowledged in time.
    TlbTimeout {
        /// GT.
        gt: u16,
    },
    /// The collector removed a range.
    RangeCollected {
        /// The range.
        range: HostSpan,
    },
    /// The host learnt of a change of the address space only after it had happened.
    LateInvalidation {
        /// What changed.
        span: HostSpan,
    },
    /// Pages came home and found other content at their place, which was kept.
    HostConflict {
        /// Where.
        span: HostSpan,
        /// How many pages.
        pages: PageCount,
    },
    /// The system's answer to a move did not agree with where the pages were afterwards. The pages
    /// decided: nothing is lost.
    MoveMisreported {
        /// Where it was to move them from.
        span: HostSpan,
    },
    /// Pages came home and found no mapping to come to: their content is gone, as the mapping is.
    HostGone {
        /// Where.
        span: HostSpan,
        /// How many pages.
        pages: PageCount,
    },
}

/// Receives events. Called with any lock held, also inside invalidations: must not allocate,
/// sleep, lock or call back.
pub trait EventSink: Send + Sync + 'static {
    /// Takes note of `event`, which happened at `at`.
    fn record(&self, at: Ns, event: &Event);
}

/// Ignores every event; costs nothing.
impl EventSink for () {
    fn record(&self, _at: Ns, _event: &Event) {}
}

/// Feeds two sinks.
impl<A: EventSink, B: EventSink> EventSink for (A, B) {
    fn record(&self, at: Ns, event: &Event) {
        self.0.record(at, event);
        self.1.record(at, event);
    }
}

/// Feeds a sink that need not be there.
impl<S: EventSink> EventSink for Option<S> {
    fn record(&self, at: Ns, event: &Event) {
        if let Some(sink) = self {
            sink.record(at, event);
        }
    }
}

impl<S: EventSink> EventSink for alloc::sync::Arc<S> {
    fn record(&self, at: Ns, event: &Event) {
        (**self).record(at, event);
    }
}
