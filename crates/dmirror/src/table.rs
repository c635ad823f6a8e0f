//! The device's page table of one mirror, and the sink that keeps it true.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::env::{Environment, Mutex};
use gpusvm::seam::mm::{InvalidateReason, InvalidationSink, Location};

/// What the device may do by an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Read and update, alone: the CPU has no access. Not written by [`Write`] commands, which take
    /// the page back first.
    ///
    /// [`Write`]: crate::uapi::Command::Write
    Atomic,
}

/// One entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) at: Location,
    pub(crate) tag: Tag,
}

/// Entries by the address of their page. An invalidation leaves the places of what it takes: it must
/// neither allocate nor free.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    places: BTreeMap<HostVa, Option<Entry>>,
    /// Places without an entry.
    empty: usize,
}

impl Entries {
    /// The entry of a page.
    pub(crate) fn get(&self, at: HostVa) -> Option<Entry> {
        self.places.get(&at).copied().flatten()
    }

    /// The entries of the pages of a span.
    pub(crate) fn inside(&self, span: HostSpan) -> impl Iterator<Item = Entry> {
        let places = self.places.range(span.start()..span.end());
        places.filter_map(|(_, entry)| *entry)
    }

    /// Enters a page. Places go where most are empty.
    pub(crate) fn insert(&mut self, at: HostVa, entry: Entry) {
        if self.empty > self.places.len() / 2 {
            self.places.retain(|_, entry| entry.is_some());
            self.empty = 0;
        }
        if let Some(None) = self.places.insert(at, Some(entry)) {
            self.empty -= 1;
        }
    }

    /// The pages of a span leave the table.
    fn remove(&mut self, span: HostSpan) {
        for (_, entry) in self.places.range_mut(span.start()..span.end()) {
            self.empty += usize::from(entry.take().is_some());
        }
    }
}

/// The table; its lock is the notifier lock.
pub(crate) struct Table<E: Environment>(pub(crate) Mutex<E, Entries>);

impl<E: Environment> Table<E> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::<E, _>::new(Entries::default())))
    }

    /// The device's pages in `span` leave the table.
    pub(crate) fn clear(&self, span: HostSpan) {
        self.0.lock().remove(span);
    }
}

impl<E: Environment> InvalidationSink for Table<E> {
    fn start(&self, interval: &Interval, span: HostSpan, _why: InvalidateReason, seq: Seq) {
        let mut entries = self.0.lock();
        interval.set_seq(seq);
        entries.remove(span);
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{BusAddr, PAGE};

    #[test]
    fn places_of_what_was_taken_are_used_again_or_go() {
        let page = |n: u64| HostVa::new(n * PAGE);
        let entry = Entry {
            at: Location::System(BusAddr::new(0)),
            tag: Tag::Read,
        };
        let mut entries = Entries::default();
        (0..8).for_each(|n| entries.insert(page(n), entry));
        entries.remove(HostSpan::new(page(1), page(4)));
        assert_eq!((entries.places.len(), entries.empty), (8, 3));
        entries.insert(page(1), entry);
        assert_eq!((entries.places.len(), entries.empty), (8, 2));
        entries.remove(HostSpan::new(page(0), page(7)));
        assert!(entries.get(page(7)).is_some() && entries.get(page(1)).is_none());
        assert_eq!(entries.inside(HostSpan::new(page(0), page(9))).count(), 1);
        entries.insert(page(9), entry);
        assert_eq!((entries.places.len(), entries.empty), (2, 0));
    }
}
