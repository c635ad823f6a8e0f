//! Ranges: the pieces of address space that are faulted, migrated, bound and invalidated as units,
//! and the tree that holds them (`svm-design.md` sections 2.2, 2.3, 2.8).
//!
//! ```text
//!  Tree ── window [512 MiB) ── interval notifier
//!              └── ranges by start: 2M ─ 64K ─ 4K …   each: flags, pages, the driver's binding
//!          garbage: a list through the ranges themselves
//! ```
//!
//! The whole tree lies under the notifier lock. Ranges are values in it; outside the lock a range
//! is known by a [`RangeRef`], whose serial number tells a dead range from a new one at its place.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{HostSpan, HostVa};
use crate::mmu::Interval;
use crate::seam::mm::{Access, Location, PageRun, PagemapId};

/// What a range's memory can do; fixed at creation (`migrate_devmem`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeKind {
    /// It can live on a device.
    Migratable,
    /// It is mapped where it is.
    InPlace,
}

/// Names a range from outside the notifier lock.
#[derive(Clone, Debug)]
pub struct RangeRef {
    pub(crate) span: HostSpan,
    pub(crate) serial: u64,
    pub(crate) kind: RangeKind,
    pub(crate) interval: Arc<Interval>,
}

impl RangeRef {
    /// Addresses of the range.
    #[must_use]
    pub const fn span(&self) -> HostSpan {
        self.span
    }

    /// Whether its kind of memory can live on a device (`migrate_devmem`); fixed at creation.
    #[must_use]
    pub const fn migratable(&self) -> bool {
        matches!(self.kind, RangeKind::Migratable)
    }
}

/// Where the pages of a bound range are (`drm_gpusvm_pages`).
#[derive(Debug, Default)]
pub(crate) struct Pages {
    /// Dense runs; meaningful while `mapped`. The buffer is kept for the next mapping.
    pub(crate) runs: Vec<PageRun>,
    /// A device may use the pages (`has_dma_mapping`).
    pub(crate) mapped: bool,
    /// Right with which they were faulted in.
    pub(crate) writable: bool,
}

impl Pages {
    /// Whether they were in device memory when they were last looked up.
    pub(crate) fn was_device(&self) -> bool {
        let first = self.runs.first();
        first.is_some_and(|run| matches!(run.at, Location::Device { .. }))
    }

    /// Device memory that holds them; `None` for host memory and for unmapped pages.
    pub(crate) fn pagemap(&self) -> Option<PagemapId> {
        match self.runs.first() {
            Some(PageRun {
                at: Location::Device { pagemap, .. },
                ..
            }) if self.mapped => Some(*pagemap),
            _ => None,
        }
    }
}

/// Whether the CPU mapping of a range still stands. A range only goes down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// It does, as far as anybody has said.
    Mapped,
    /// It went away, wholly or in part: the range is dead, and in the garbage list. The collector
    /// alone may remove it, or what comes after it in the list would be lost.
    Garbage {
        /// Next in the list.
        next: Option<HostVa>,
    },
    /// Dead, and off the list: the collector is about to remove it.
    Collected,
}

/// One range; `B` is what the driver keeps for it.
#[derive(Debug)]
pub(crate) struct Range<B> {
    pub(crate) span: HostSpan,
    pub(crate) serial: u64,
    pub(crate) kind: RangeKind,
    life: Life,
    pub(crate) pages: Pages,
    pub(crate) binding: B,
}

impl<B> Range<B> {
    /// Whether its pages are mapped with at least the right `access`.
    pub(crate) fn allows(&self, access: Access) -> bool {
        self.pages.mapped && (access == Access::Read || self.pages.writable)
    }

    /// Whether its CPU mapping went away, wholly or in part (`unmapped`).
    pub(crate) fn is_dead(&self) -> bool {
        self.life != Life::Mapped
    }

    /// Whether it waits for the collector.
    pub(crate) const fn is_garbage(&self) -> bool {
        matches!(self.life, Life::Garbage { .. })
    }
}

/// One notifier window and its ranges.
#[derive(Debug)]
pub(crate) struct Window<B> {
    pub(crate) interval: Arc<Interval>,
    ranges: BTreeMap<HostVa, Range<B>>,
}

/// All windows of one [`Svm`](crate::svm::Svm), and the garbage list through their ranges.
#[derive(Debug)]
pub(crate) struct Tree<B> {
    windows: BTreeMap<HostVa, Window<B>>,
    garbage: Option<HostVa>,
    serial: u64,
    window_bytes: u64,
}

impl<B: Default> Tree<B> {
    pub(crate) const fn new(window_bytes: u64) -> Self {
        Self {
            windows: BTreeMap::new(),
            garbage: None,
            serial: 0,
            window_bytes,
        }
    }

    fn key(&self, at: HostVa) -> HostVa {
        at.align_down(self.window_bytes)
    }

    /// The window around `at`, if it has ranges.
    pub(crate) fn window(&self, at: HostVa) -> Option<&Window<B>> {
        self.windows.get(&self.key(at))
    }

    pub(crate) fn window_mut(&mut self, at: HostVa) -> Option<&mut Window<B>> {
        let key = self.key(at);
        self.windows.get_mut(&key)
    }

    /// The live or dead range at `range`'s place, if it is still the same one.
    pub(crate) fn get_mut(&mut self, range: &RangeRef) -> Option<&mut Range<B>> {
        let start = range.span.start();
        self.window_mut(start)?
            .ranges
            .get_mut(&start)
            .filter(|r| r.serial == range.serial)
    }

    /// Adds a range, and its window if it is the first there.
    pub(crate) fn insert(
        &mut self,
        span: HostSpan,
        kind: RangeKind,
        interval: Arc<Interval>,
    ) -> RangeRef {
        self.serial += 1;
        let serial = self.serial;
        let range = Range {
            span,
            serial,
            kind,
            life: Life::Mapped,
            pages: Pages::default(),
            binding: B::default(),
        };
        let key = self.key(span.start());
        self.windows
            .entry(key)
            .or_insert_with(|| Window {
                interval: Arc::clone(&interval),
                ranges: BTreeMap::new(),
            })
            .ranges
            .insert(span.start(), range);
        RangeRef {
            span,
            serial,
            kind,
            interval,
        }
    }

    /// Marks a range dead and queues it for the collector, once. Does not allocate.
    pub(crate) fn mark_unmapped(&mut self, start: HostVa) {
        let head = self.garbage;
        let Some(range) = self
            .window_mut(start)
            .and_then(|w| w.ranges.get_mut(&start))
        else {
            return;
        };
        if range.life == Life::Mapped {
            range.life = Life::Garbage { next: head };
            self.garbage = Some(start);
        }
    }

    /// Takes the first dead range off the garbage list.
    pub(crate) fn pop_garbage(&mut self) -> Option<RangeRef> {
        let start = self.garbage?;
        let window = self.window_mut(start)?;
        let interval = Arc::clone(&window.interval);
        let range = window.ranges.get_mut(&start)?;
        let former = core::mem::replace(&mut range.life, Life::Collected);
        let found = RangeRef {
            span: range.span,
            serial: range.serial,
            kind: range.kind,
            interval,
        };
        self.garbage = match former {
            Life::Garbage { next } => next,
            Life::Mapped | Life::Collected => None,
        };
        Some(found)
    }

    /// Removes a range whose pages are unmapped and which is not in the garbage list. Returns the
    /// window's interval where it was the last range there: the caller ends the subscription,
    /// without the lock.
    pub(crate) fn remove(&mut self, range: &RangeRef) -> (Option<B>, Option<Arc<Interval>>) {
        let key = self.key(range.span.start());
        let Some(window) = self.windows.get_mut(&key) else {
            return (None, None);
        };
        let removed = window.ranges.remove(&range.span.start());
        debug_assert!(
            removed
                .as_ref()
                .is_none_or(|r| !r.pages.mapped && !r.is_garbage()),
            "removed while mapped or listed"
        );
        let emptied = window
            .ranges
            .is_empty()
            .then(|| Arc::clone(&window.interval));
        if emptied.is_some() {
            self.windows.remove(&key);
        }
        (removed.map(|range| range.binding), emptied)
    }

    /// Any one range, for teardown.
    pub(crate) fn any(&self) -> Option<RangeRef> {
        let window = self.windows.values().next()?;
        let range = window.ranges.values().next()?;
        Some(RangeRef {
            span: range.span,
            serial: range.serial,
            kind: range.kind,
            interval: Arc::clone(&window.interval),
        })
    }

    /// Number of ranges.
    pub(crate) fn len(&self) -> usize {
        self.windows
            .values()
            .map(|window| window.ranges.len())
            .sum()
    }

    /// Number of windows.
    pub(crate) fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Whether any range object overlaps `span` (`drm_gpusvm_has_mapping`).
    pub(crate) fn overlaps(&self, span: HostSpan) -> bool {
        let first = self.key(span.start());
        self.windows
            .range(first..span.end())
            .any(|(_, w)| w.overlapping(span).next().is_some())
    }
}

impl<B> Window<B> {
    /// Ranges that overlap `span`, in address order. Ranges never overlap each other, so at most
    /// one that starts before `span` reaches into it.
    pub(crate) fn overlapping(&self, span: HostSpan) -> impl Iterator<Item = &Range<B>> {
        let from = self.first_key(span);
        self.ranges
            .range(from..span.end().max(from))
            .map(|(_, range)| range)
    }

    /// As [`overlapping`](Self::overlapping), to change them.
    pub(crate) fn overlapping_mut(
        &mut self,
        span: HostSpan,
    ) -> impl Iterator<Item = &mut Range<B>> {
        let from = self.first_key(span);
        self.ranges
            .range_mut(from..span.end().max(from))
            .map(|(_, range)| range)
    }

    fn first_key(&self, span: HostSpan) -> HostVa {
        self.ranges
            .range(..=span.start())
            .next_back()
            .filter(|(_, range)| range.span.overlaps(span))
            .map_or(span.start(), |(start, _)| *start)
    }
}
