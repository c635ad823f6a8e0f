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

/// Entries by the address of their page.
pub(crate) type Entries = BTreeMap<HostVa, Entry>;

/// The table; its lock is the notifier lock.
pub(crate) struct Table<E: Environment>(pub(crate) Mutex<E, Entries>);

impl<E: Environment> Table<E> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::<E, _>::new(BTreeMap::new())))
    }

    /// The device's pages in `span` leave the table.
    pub(crate) fn clear(&self, span: HostSpan) {
        drop_in(&mut self.0.lock(), span);
    }
}

impl<E: Environment> InvalidationSink for Table<E> {
    fn start(&self, interval: &Interval, span: HostSpan, _why: InvalidateReason, seq: Seq) {
        let mut entries = self.0.lock();
        interval.set_seq(seq);
        drop_in(&mut entries, span);
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

fn drop_in(entries: &mut Entries, span: HostSpan) {
    while let Some((at, _)) = entries.range(span.start()..span.end()).next() {
        let at = *at;
        entries.remove(&at);
    }
}
