//! Planned and written entries, as data.

use alloc::vec::Vec;

use crate::NotifierHeld;
use crate::addr::{GpuVa, PAGE, PAGE_64K, PageCount, VramAddr};
use crate::seam::table::{LeafBlock, LeafFlags, LeafTarget, PageTableFormat, TableStore};

/// Entries of a 64 KiB block.
const BLOCK: u64 = PAGE_64K / PAGE;
/// Entries written at once.
const CHUNK: usize = 64;

/// Pages with one target, contiguous there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Length.
    pub pages: PageCount,
    /// Where the first page lies.
    pub target: LeafTarget,
    /// Rights and attributes.
    pub flags: LeafFlags,
}

/// Consecutive leaf entries of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafSlot {
    /// The table.
    pub table: VramAddr,
    /// Device address of the first entry.
    pub at: GpuVa,
    /// Index of the first entry.
    pub first: u16,
    /// Number of entries.
    pub count: u16,
    /// Level of the table.
    pub level: u8,
}

impl LeafSlot {
    /// Grows by `next` where that follows in the same table.
    fn join(&mut self, next: &Self) -> bool {
        let follows = self.table == next.table && self.first + self.count == next.first;
        if follows {
            self.count += next.count;
        }
        follows
    }
}

/// Leaves with one contiguous target, to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeafWrite {
    pub(super) slot: LeafSlot,
    target: LeafTarget,
    flags: LeafFlags,
}

impl LeafWrite {
    pub(super) const fn new(slot: LeafSlot, target: LeafTarget, flags: LeafFlags) -> Self {
        Self {
            slot,
            target,
            flags,
        }
    }

    /// Grows by `next` where table, target and flags all continue.
    pub(super) fn join<F: PageTableFormat>(&mut self, next: &Self) -> bool {
        let bytes = u64::from(self.slot.count) * F::entry_bytes(self.slot.level);
        let continues = self.target.plus(bytes) == next.target && self.flags == next.flags;
        continues && self.slot.join(&next.slot)
    }

    /// Writes the entries.
    pub(super) fn write<F: PageTableFormat>(&self, store: &dyn TableStore) {
        let mut chunk = [0; CHUNK];
        let mut done = 0;
        while done < self.slot.count {
            let count = usize::from(self.slot.count - done).min(CHUNK);
            for (entry, n) in chunk[..count].iter_mut().zip(done..) {
                *entry = self.entry::<F>(n);
            }
            store.write(
                self.slot.table,
                usize::from(self.slot.first + done),
                &chunk[..count],
            );
            done += u16::try_from(count).unwrap_or(u16::MAX);
        }
    }

    /// The `n`th entry.
    fn entry<F: PageTableFormat>(&self, n: u16) -> u64 {
        let level = self.slot.level;
        let target = self.target.plus(u64::from(n) * F::entry_bytes(level));
        F::leaf(level, target, self.flags, self.block(u64::from(n)))
    }

    /// Whether the `n`th entry belongs to a 64 KiB block, aligned on both sides and written whole.
    fn block(&self, n: u64) -> LeafBlock {
        let index = u64::from(self.slot.first) + n;
        let (first, end) = (
            u64::from(self.slot.first),
            u64::from(self.slot.first + self.slot.count),
        );
        let start = index - index % BLOCK;
        let whole = self.slot.level == 0 && start >= first && start + BLOCK <= end;
        if whole
            && self
                .target
                .plus((start - first) * PAGE)
                .raw()
                .is_multiple_of(PAGE_64K)
        {
            LeafBlock::Of64K
        } else {
            LeafBlock::Single
        }
    }
}

/// A new table, to be linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) parent: VramAddr,
    /// Level of the parent.
    pub(super) level: u8,
    pub(super) at: GpuVa,
    pub(super) table: VramAddr,
}

/// Entries to be written, in order: leaves first, then links from the leaves up, so that a walk
/// never meets a half-filled table.
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "a plan that is neither committed nor aborted leaks its tables"]
pub struct TablePlan {
    pub(super) leaves: Vec<LeafWrite>,
    pub(super) links: Vec<Link>,
    /// Tables that a larger leaf replaces: level of the leaf and its address.
    pub(super) replaced: Vec<(u8, GpuVa)>,
    /// Where the leaves will stand.
    pub(super) slots: Vec<LeafSlot>,
    /// Room for the replaced tables, so that committing does not allocate.
    pub(super) garbage: Vec<VramAddr>,
}

impl TablePlan {
    /// Adds leaves, joining what continues.
    pub(super) fn push<F: PageTableFormat>(&mut self, write: LeafWrite) {
        if !self
            .leaves
            .last_mut()
            .is_some_and(|last| last.join::<F>(&write))
        {
            self.leaves.push(write);
        }
        if !self
            .slots
            .last_mut()
            .is_some_and(|last| last.join(&write.slot))
        {
            self.slots.push(write.slot);
        }
    }
}

/// Makes entries invalid. For invalidations: allocates nothing, calls nothing but the store.
pub fn zap(slots: &[LeafSlot], store: &dyn TableStore, _held: &NotifierHeld<'_>) {
    static ZEROS: [u64; 512] = [0; 512];
    for slot in slots {
        let mut first = usize::from(slot.first);
        let end = first + usize::from(slot.count);
        while first < end {
            let count = (end - first).min(ZEROS.len());
            store.write(slot.table, first, &ZEROS[..count]);
            first += count;
        }
    }
}
