//! The memory management of Linux 6.18 as plain data.
//!
//! [`Machine`] is physical memory, swap, files and processes. It is plain data: indices into
//! arenas, no pointers, no maps; a clone is a copy, and two equal machines hash alike. Its methods
//! are *steps*: each changes one thing under what would be one lock. Calls of a process are
//! functions that string steps together ([`map`], [`remap`], [`advise`], [`fork`], ...), and are
//! written once for both uses by [`Around`](around::Around): alone, on a machine that nobody else
//! uses ([`Solo`](around::Solo)), or inside the [kernel layer](crate::kernel) with locks, notifier
//! brackets and switch points between the steps.
//!
//! ```text
//!   calls       map  protect  remap  advise  fork  fault  reclaim  thp  ksm  pagemap
//!                └──────────────┬── Around: lock, bracket, step ──────────────┘
//!   steps       table (entries, reverse maps, references)   vma (split, merge)   migrate
//!                └──────────────┬──────────────────────────────┘
//!   data        entry   memory   rmap   swap   file
//! ```
//!
//! A process has one window of addresses whose tables are dense. A block entry covers
//! `1 << pmd_order` pages: 512 as on x86-64, or fewer, so that small worlds have large pages too.
//!
//! # What is not modelled
//!
//! * Huge pages (`MAP_HUGETLB`) are private, of the size of a block, taken at the first touch, not
//!   reserved; calls that would cut one answer `EINVAL`. `mremap` and advice for them are left out.
//! * Mappings that grow down, userfaultfd beyond the service of missing pages, limits on counts and
//!   sizes, NUMA.
//! * Faults take the mmap lock, never a lock of one mapping; `munmap` keeps it for writing to the end;
//!   `process_madvise` takes it once per span.
//! * Only anonymous pages are reclaimed, one by one; pages of files stay but for `MADV_PAGEOUT`. Merged
//!   pages neither migrate nor leave.
//! * Reads of present pages by system calls have no events of their own; pins are for a device or a
//!   call that stays.
//! * Large folios are anonymous and of the order of a block only; device pages are small, as before 6.19,
//!   unless [`Shape::device_folios`] says otherwise; large folios are split before they are swapped out.
//!   Their pages of zeros become the page of zeros where an advice splits them, not where a migration does.
//! * `MADV_HWPOISON` and `MADV_SOFT_OFFLINE` answer `EPERM`, as for a process without privileges;
//!   [`poison`](reclaim::poison) is the memory error itself.

#[macro_use]
pub mod flags;
pub mod advise;
pub mod around;
pub mod changes;
pub mod check;
pub mod checker;
pub mod cow;
pub mod entry;
pub mod errno;
pub mod fault;
pub mod file;
pub mod fork;
mod idle;
pub mod ksm;
pub mod map;
pub mod memory;
pub mod migrate;
pub mod pagemap;
pub mod protect;
pub mod reclaim;
pub mod remap;
pub mod rmap;
pub mod swap;
mod table;
pub mod thp;
pub mod vma;

#[cfg(test)]
mod tests;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::mutant::Mutant;

use crate::mm::changes::Changes;
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::file::File;
use crate::mm::memory::{FrameId, Memory};
use crate::mm::migrate::Device;
use crate::mm::rmap::Rmaps;
use crate::mm::swap::Swap;
use crate::mm::vma::{AnonId, Vmas};

/// A process of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub u8);

/// A half-open run of page numbers of a process's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages {
    /// First page.
    pub start: u32,
    /// First page behind.
    pub end: u32,
}

impl Pages {
    /// The run from `start` to `end`.
    #[must_use]
    pub const fn new(start: u32, end: u32) -> Self {
        Self { start, end }
    }

    /// A single page.
    #[must_use]
    pub const fn one(page: u32) -> Self {
        Self::new(page, page + 1)
    }

    /// Number of pages.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no page.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// Whether `page` is one of them.
    #[must_use]
    pub const fn contains(self, page: u32) -> bool {
        self.start <= page && page < self.end
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two share a page.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The shared pages; empty where there are none.
    #[must_use]
    pub fn clip(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::new(start, self.end.min(other.end).max(start))
    }

    /// The page numbers.
    pub fn iter(self) -> core::ops::Range<u32> {
        self.start..self.end
    }
}

/// When anonymous memory gets large pages (`transparent_hugepage/enabled`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Thp {
    /// Nowhere.
    Never,
    /// Where `MADV_HUGEPAGE` asks for them.
    #[default]
    Madvise,
    /// Wherever they fit.
    Always,
}

/// What becomes of large pages in private device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceFolios {
    /// They are split on their way: as before 6.19.
    #[default]
    Small,
    /// They stay whole.
    Large,
}

/// Sizes of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// First address of every process's window, a multiple of a block.
    pub base: HostVa,
    /// Pages of the window.
    pub pages: u32,
    /// Frames of host memory.
    pub frames: u32,
    /// Slots of swap.
    pub slots: u32,
    /// Processes that there can be, alive or not.
    pub processes: u8,
    /// Pages of a block, as a power of two.
    pub pmd_order: u8,
    /// Words of content per page, 512 for all of it. Bytes behind them read as zeros.
    pub words: u32,
    /// When there are large pages.
    pub thp: Thp,
    /// What becomes of them in device memory.
    pub device_folios: DeviceFolios,
    /// Frames of coherent device memory.
    pub coherent: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            base: HostVa::new(1 << 40),
            pages: 64,
            frames: 128,
            slots: 64,
            processes: 2,
            pmd_order: 2,
            words: 1,
            thp: Thp::Madvise,
            device_folios: DeviceFolios::Small,
            coherent: 0,
        }
    }
}

impl Shape {
    /// Pages of a block.
    #[must_use]
    pub const fn block(&self) -> u32 {
        1 << self.pmd_order
    }

    /// The address of a page.
    #[must_use]
    pub fn address(&self, page: u32) -> HostVa {
        self.base.plus(u64::from(page) * PAGE)
    }

    /// The addresses of a run of pages.
    #[must_use]
    pub fn span(&self, pages: Pages) -> HostSpan {
        HostSpan::new(self.address(pages.start), self.address(pages.end))
    }

    /// The page at `at`; `None` outside the window.
    #[must_use]
    pub fn page(&self, at: HostVa) -> Option<u32> {
        let offset = at.get().checked_sub(self.base.get())?;
        let page = u32::try_from(offset / PAGE).ok()?;
        (page < self.pages).then_some(page)
    }

    /// The part of `span` inside the window, in pages, rounded outward.
    #[must_use]
    pub fn pages_in(&self, span: HostSpan) -> Pages {
        let number = |at: u64| {
            let page = at.saturating_sub(self.base.get()).div_ceil(PAGE);
            u32::try_from(page).unwrap_or(u32::MAX).min(self.pages)
        };
        let start = span.start().align_down(PAGE).get();
        Pages::new(number(start), number(span.end().get()))
    }

    /// The block that holds `page`.
    #[must_use]
    pub const fn block_around(&self, page: u32) -> Pages {
        let start = page & !(self.block() - 1);
        Pages::new(start, start + self.block())
    }
}

/// Whether there is a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    There,
    Gone,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    /// It exists and has not ended.
    pub alive: bool,
    /// Its mappings.
    pub vmas: Vmas,
    /// Its mappings are gone, its entries are about to go.
    pub(crate) detached: Pages,
    pub(crate) entries: Vec<Entry>,
    pub(crate) blocks: Vec<Block>,
    /// Whether there is a table for small entries, by block. There may be an empty one.
    pub(crate) tables: Vec<bool>,
}

/// A whole machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    pub(crate) shape: Shape,
    pub(crate) processes: Vec<Process>,
    pub(crate) memory: Memory,
    pub(crate) rmaps: Rmaps,
    pub(crate) swap: Swap,
    pub(crate) files: Vec<File>,
    /// Pages that the device allocation in every place still has.
    pub(crate) device_pages: Vec<u32>,
    /// Who that is.
    pub(crate) devices: Vec<Device>,
    /// Device allocations that have lost their last page and whose owner is not told yet.
    pub(crate) released: Vec<u32>,
    /// Pages, mappings and places that have changed; frames and slots know themselves.
    pub(crate) changes: Changes,
    /// A known bug that is re-introduced.
    pub(crate) mutant: Option<Mutant>,
    next_anon: u32,
}

impl Machine {
    /// A machine with one process, [`Pid`] 0, that has no mappings.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let blocks = shape.pages.div_ceil(shape.block());
        let process = Process {
            alive: false,
            vmas: Vmas::default(),
            detached: Pages::new(0, 0),
            entries: vec![Entry::None; shape.pages as usize],
            blocks: vec![Block::Table; blocks as usize],
            tables: vec![false; blocks as usize],
        };
        let mut processes = vec![process; usize::from(shape.processes)];
        if let Some(first) = processes.first_mut() {
            first.alive = true;
        }
        Self {
            processes,
            memory: Memory::new(&shape),
            rmaps: Rmaps::default(),
            swap: Swap::new(shape.slots, shape.words),
            files: Vec::new(),
            device_pages: Vec::new(),
            devices: Vec::new(),
            released: Vec::new(),
            changes: Changes::new(shape.processes),
            mutant: None,
            next_anon: 0,
            shape,
        }
    }

    /// Re-introduces a known bug, or none.
    pub fn plant(&mut self, bug: Option<Mutant>) {
        self.mutant = bug;
    }

    /// Whether a known bug is there again.
    pub(crate) fn has(&self, bug: Mutant) -> bool {
        self.mutant == Some(bug)
    }

    /// Its sizes.
    #[must_use]
    pub const fn shape(&self) -> &Shape {
        &self.shape
    }

    /// A process.
    #[must_use]
    pub fn process(&self, pid: Pid) -> &Process {
        &self.processes[usize::from(pid.0)]
    }

    /// A process, to change its mappings. Its entries are changed by steps of `table`.
    pub(crate) fn process_mut(&mut self, pid: Pid) -> &mut Process {
        self.changes.mappings.add(u32::from(pid.0));
        &mut self.processes[usize::from(pid.0)]
    }

    /// All processes, alive or not.
    pub fn pids(&self) -> impl Iterator<Item = Pid> + use<> {
        (0..self.shape.processes).map(Pid)
    }

    /// What a store does once [`access`](Self::access) has found its page: word `at` of the page
    /// becomes `value`. Words that the pages of this machine do not have are dropped.
    pub fn write_word(&mut self, frame: FrameId, at: usize, value: u64) {
        if let Some(word) = self.memory.content_mut(frame).get_mut(at) {
            *word = value;
        }
    }

    /// Frames of host memory and device pages.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Who maps which frame.
    #[must_use]
    pub const fn rmaps(&self) -> &Rmaps {
        &self.rmaps
    }

    /// The entry of a page, also where a block entry covers it.
    #[must_use]
    pub fn entry(&self, pid: Pid, page: u32) -> Entry {
        match self.block(pid, page) {
            Block::Table => self.process(pid).entries[page as usize],
            Block::Huge(head, bits) => {
                Entry::Present(head.plus(page & (self.shape.block() - 1)), bits)
            }
            Block::Device(head, bits) => {
                Entry::DevicePrivate(head.plus(page & (self.shape.block() - 1)), bits)
            }
            Block::Zero(bits) => Entry::Zero(bits),
        }
    }

    /// The block entry above a page.
    #[must_use]
    pub fn block(&self, pid: Pid, page: u32) -> Block {
        self.process(pid).blocks[(page >> self.shape.pmd_order) as usize]
    }

    pub(crate) fn set_block(&mut self, pid: Pid, page: u32, block: Block) {
        for page in self.shape.block_around(page).iter() {
            self.changes.page(pid, page);
        }
        let at = (page >> self.shape.pmd_order) as usize;
        let process = &mut self.processes[usize::from(pid.0)];
        process.tables[at] = false;
        let former = &mut process.blocks[at];
        for block in [core::mem::replace(former, block), block] {
            if let Block::Huge(head, _) = block {
                self.memory.changed.add(head.0);
            }
        }
    }

    /// Whether there is a table for small entries above `page`.
    #[must_use]
    pub fn has_table(&self, pid: Pid, page: u32) -> bool {
        self.process(pid).tables[(page >> self.shape.pmd_order) as usize]
    }

    pub(crate) fn set_table(&mut self, pid: Pid, page: u32, there: Table) {
        let at = (page >> self.shape.pmd_order) as usize;
        let now = there == Table::There;
        let former = &mut self.processes[usize::from(pid.0)].tables[at];
        // Whoever checks looks whether nothing is left in a table that goes.
        if core::mem::replace(former, now) && !now {
            for page in self.shape.block_around(page).iter() {
                self.changes.page(pid, page);
            }
        }
    }

    pub(crate) fn new_anon(&mut self) -> AnonId {
        self.next_anon += 1;
        AnonId(self.next_anon)
    }

    /// Pages of a span as system calls take it: the start must be aligned, the length is rounded
    /// up, and the end must not wrap. Pages outside the window are beyond `shape.pages`.
    pub(crate) fn argument(&self, at: HostVa, len: u64) -> Result<Pages, Errno> {
        let len = len.checked_next_multiple_of(PAGE).ok_or(Errno::Invalid)?;
        if !at.is_aligned(PAGE) || at.get().checked_add(len).is_none() {
            return Err(Errno::Invalid);
        }
        let offset = at.get().checked_sub(self.shape.base.get());
        let outside = Pages::new(self.shape.pages, self.shape.pages);
        let Some(start) = offset.and_then(|offset| u32::try_from(offset / PAGE).ok()) else {
            return Ok(outside);
        };
        let pages = u32::try_from(len / PAGE).unwrap_or(u32::MAX);
        Ok(Pages::new(start, start.saturating_add(pages)))
    }
}
