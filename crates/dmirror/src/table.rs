//! The device's page table of one mirror, and the sink that keeps it true.
//!
//! An entry maps a power of two of pages, aligned to its size, that follow each other where they are:
//! pages are entered one by one and join as far as their large page (folio) goes.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::env::{Environment, Mutex};
use gpusvm::seam::mm::{InvalidateReason, InvalidationSink, Location, Owner};

/// Owner of exclusive pages. Mirrors enter them while they are locked, and listen to all events.
pub(crate) const OWNER: Owner = Owner(u64::MAX);

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

/// What an entry says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) at: Location,
    pub(crate) tag: Tag,
}

impl Entry {
    /// What it says of the page `bytes` further on.
    const fn plus(self, bytes: u64) -> Self {
        Self {
            at: self.at.plus(bytes),
            tag: self.tag,
        }
    }
}

/// Entries by the address of their first page, with their bytes. An invalidation leaves the places of
/// what it takes, with no bytes: it must neither allocate nor free.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    places: BTreeMap<HostVa, (Entry, u64)>,
    /// Places without bytes.
    empty: usize,
    /// Invalidations that have begun and have not ended.
    changing: usize,
    /// The page that is being taken for the device alone, as long as nothing else happens to it.
    taking: Option<HostVa>,
}

impl Entries {
    /// What the device has for the page at `at`.
    pub(crate) fn at(&self, at: HostVa) -> Option<Entry> {
        let (start, entry, _) = self.last_in(HostSpan::at(at, PAGE))?;
        Some(entry.plus(at.offset_from(start)))
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.empty
    }

    /// Enters a page that was taken for the device alone, unless an invalidation has come in between, or
    /// began before: such a one found no entry, and does not look again. Whether it did.
    pub(crate) fn enter_taken(&mut self, at: HostVa, entry: Entry) -> bool {
        let is_taken = self.taking.take() == Some(at);
        if is_taken {
            self.enter(at, entry, 0);
        }
        is_taken
    }

    /// An invalidation begins.
    fn begin(&mut self, span: HostSpan, why: InvalidateReason) {
        self.drop_in(span);
        if why == InvalidateReason::Exclusive(OWNER) {
            self.taking = (self.changing == 0).then_some(span.start());
        } else {
            self.taking = self.taking.filter(|at| !span.contains(*at));
        }
        self.changing += 1;
    }

    pub(crate) fn has_exclusive(&self, span: HostSpan) -> bool {
        let mut inside = self.places.range(span.start()..span.end());
        inside.any(|(_, (entry, bytes))| *bytes > 0 && entry.tag == Tag::Atomic)
    }

    /// Enters the page at `at`, which is in a large page of `order`. Empty places go where most are.
    pub(crate) fn enter(&mut self, at: HostVa, entry: Entry, order: u8) {
        if self.at(at) == Some(entry) {
            return;
        }
        if self.empty > self.places.len() / 2 {
            self.places.retain(|_, (_, bytes)| *bytes > 0);
            self.empty = 0;
        }
        self.cut_out(at);
        let (mut start, mut entry, mut bytes) = (at, entry, PAGE);
        while bytes < PAGE << order {
            let buddy = HostVa::new(start.get() ^ bytes);
            let (low, high) = (start.min(buddy), start.max(buddy));
            let Some((other, size)) = self.places.get(&buddy).copied() else {
                break;
            };
            let first = if low == start { entry } else { other };
            let second = if high == start { entry } else { other };
            if size != bytes || first.plus(bytes) != second {
                break;
            }
            self.places.remove(&buddy);
            (start, entry, bytes) = (low, first, 2 * bytes);
        }
        self.put(start, entry, bytes);
    }

    fn put(&mut self, start: HostVa, entry: Entry, bytes: u64) {
        if let Some((_, 0)) = self.places.insert(start, (entry, bytes)) {
            self.empty -= 1;
        }
    }

    /// Takes one page out of the entry that has it; the rest stays, in entries as large as can be.
    fn cut_out(&mut self, at: HostVa) {
        let Some((mut start, mut entry, mut bytes)) = self.last_in(HostSpan::at(at, PAGE)) else {
            return;
        };
        self.places.remove(&start);
        while bytes > PAGE {
            bytes /= 2;
            let upper = (start.plus(bytes), entry.plus(bytes));
            let (stays, cut) = if at < upper.0 {
                (upper, (start, entry))
            } else {
                ((start, entry), upper)
            };
            self.put(stays.0, stays.1, bytes);
            (start, entry) = cut;
        }
    }

    /// Empties a span. Entries that stick out go whole: an invalidation allocates nothing, and what
    /// was next to it is faulted in again.
    fn drop_in(&mut self, span: HostSpan) {
        let before = self.places.range_mut(..span.end());
        for (start, (_, bytes)) in before.rev().filter(|(_, (_, bytes))| *bytes > 0) {
            if start.plus(*bytes) <= span.start() {
                return;
            }
            *bytes = 0;
            self.empty += 1;
        }
    }

    /// The last entry that has pages of `span`.
    fn last_in(&self, span: HostSpan) -> Option<(HostVa, Entry, u64)> {
        let mut before = self.places.range(..span.end()).rev();
        let (&start, &(entry, bytes)) = before.find(|(_, (_, bytes))| *bytes > 0)?;
        (start.plus(bytes) > span.start()).then_some((start, entry, bytes))
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
        self.0.lock().drop_in(span);
    }
}

impl<E: Environment> InvalidationSink for Table<E> {
    fn start(&self, interval: &Interval, span: HostSpan, why: InvalidateReason, seq: Seq) {
        let mut entries = self.0.lock();
        interval.set_seq(seq);
        entries.begin(span, why);
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {
        self.0.lock().changing -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use gpusvm::addr::BusAddr;

    fn entry(page: u64, tag: Tag) -> Entry {
        Entry {
            at: Location::System(BusAddr::new(page * PAGE)),
            tag,
        }
    }

    const fn va(page: u64) -> HostVa {
        HostVa::new(page * PAGE)
    }

    /// First page and pages of each entry.
    fn sizes(entries: &Entries) -> Vec<(u64, u64)> {
        let pages = |bytes: u64| bytes / PAGE;
        let each = entries.places.iter();
        let each = each.filter(|(_, (_, bytes))| *bytes > 0);
        each.map(|(at, (_, bytes))| (pages(at.get()), pages(*bytes)))
            .collect()
    }

    fn filled(order: u8) -> Entries {
        let mut entries = Entries::default();
        for page in 0..16 {
            entries.enter(va(page), entry(100 + page, Tag::Read), order);
        }
        entries
    }

    #[test]
    fn pages_join_as_far_as_their_large_page_goes() {
        assert_eq!(sizes(&filled(4)), [(0, 16)]);
        assert_eq!(sizes(&filled(3)), [(0, 8), (8, 8)]);
        assert_eq!(filled(0).len(), 16);
        let entries = filled(4);
        for page in 0..16 {
            assert_eq!(entries.at(va(page)), Some(entry(100 + page, Tag::Read)));
        }
        assert_eq!(entries.at(va(16)), None);
    }

    #[test]
    fn pages_elsewhere_and_of_other_rights_do_not_join() {
        let mut entries = Entries::default();
        for (page, at) in [(0, 7), (1, 9), (2, 20), (3, 21)] {
            entries.enter(va(page), entry(at, Tag::Read), 4);
        }
        assert_eq!(sizes(&entries), [(0, 1), (1, 1), (2, 2)]);
        entries.enter(va(3), entry(21, Tag::Write), 4);
        assert_eq!(sizes(&entries), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    }

    #[test]
    fn a_page_that_changes_leaves_large_entries_around_it() {
        let mut entries = filled(4);
        entries.enter(va(5), entry(3, Tag::Write), 0);
        assert_eq!(sizes(&entries), [(0, 4), (4, 1), (5, 1), (6, 2), (8, 8)]);
        assert_eq!(entries.at(va(5)), Some(entry(3, Tag::Write)));
        assert_eq!(entries.at(va(11)), Some(entry(111, Tag::Read)));
    }

    #[test]
    fn an_invalidation_drops_what_it_touches_and_nothing_behind() {
        let mut entries = filled(3);
        entries.drop_in(HostSpan::at(va(3), PAGE));
        assert_eq!(sizes(&entries), [(8, 8)]);
        entries.drop_in(HostSpan::at(va(16), PAGE));
        assert_eq!(sizes(&entries), [(8, 8)]);
        entries.drop_in(HostSpan::new(va(0), va(9)));
        assert_eq!(entries.len(), 0);
        assert_eq!(entries.places.len(), 2, "nothing is freed");
        entries.enter(va(20), entry(1, Tag::Read), 0);
        assert_eq!((entries.places.len(), entries.empty), (1, 0));
    }
}
