//! `/proc/PID/pagemap` and `PAGEMAP_SCAN`, in the kernel's bit layout. Frame numbers are left out,
//! as they are for readers without privileges.

use crate::mm::entry::{Block, Entry};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{FrameId, Owner};
use crate::mm::rmap::Mapping;
use crate::mm::{Machine, Pid};

/// Soft-dirty.
pub const PM_SOFT_DIRTY: u64 = 1 << 55;
/// Mapped by one process alone.
pub const PM_MMAP_EXCLUSIVE: u64 = 1 << 56;
/// Write-protected by userfaultfd.
pub const PM_UFFD_WP: u64 = 1 << 57;
/// A guard.
pub const PM_GUARD_REGION: u64 = 1 << 58;
/// Page of a file, or shared anonymous.
pub const PM_FILE: u64 = 1 << 61;
/// The entry is not empty and not present.
pub const PM_SWAP: u64 = 1 << 62;
/// Present.
pub const PM_PRESENT: u64 = 1 << 63;

/// Not write-protected by userfaultfd.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Page of a file, or shared anonymous.
pub const PAGE_IS_FILE: u64 = 1 << 2;
/// Present.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The entry is not empty and not present.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The page of zeros.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Mapped by a block entry.
pub const PAGE_IS_HUGE: u64 = 1 << 6;
/// Soft-dirty.
pub const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
/// A guard.
pub const PAGE_IS_GUARD: u64 = 1 << 8;

impl Machine {
    /// The pagemap word of a page.
    #[must_use]
    pub fn pagemap(&self, pid: Pid, page: u32) -> u64 {
        let Some(vma) = self.process(pid).vmas.at(page) else {
            return 0;
        };
        let entry = self.entry(pid, page);
        let bits = entry.bits();
        let kind = match entry {
            Entry::None => 0,
            Entry::Present(frame, _) => {
                PM_PRESENT
                    | (u64::from(self.mapped_once(pid, page, frame)) * PM_MMAP_EXCLUSIVE)
                    | self.file_bit(frame, PM_FILE)
            }
            // The large page of zeros has an owner that counts as a file.
            Entry::Zero(_) => match self.block(pid, page) {
                Block::Zero(_) => PM_PRESENT | PM_FILE,
                Block::Table | Block::Huge(..) | Block::Device(..) => PM_PRESENT,
            },
            Entry::Guard => PM_SWAP | PM_GUARD_REGION,
            Entry::Migration(frame, _) => PM_SWAP | self.file_bit(frame, PM_FILE),
            Entry::Swap(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::UffdWp => PM_SWAP,
        };
        let dirty = bits.has(Bits::SOFT_DIRTY) || vma.flags.has(VmFlags::SOFT_DIRTY);
        kind | (u64::from(dirty) * PM_SOFT_DIRTY)
            | (u64::from(bits.has(Bits::UFFD_WP)) * PM_UFFD_WP)
    }

    /// The categories that `PAGEMAP_SCAN` gives a page.
    #[must_use]
    pub fn categories(&self, pid: Pid, page: u32) -> u64 {
        let entry = self.entry(pid, page);
        let bits = entry.bits();
        let kind = match entry {
            // Where there is no table, nobody looks.
            Entry::None if !self.has_table(pid, page) => return 0,
            Entry::None if self.process(pid).vmas.at(page).is_none() => return 0,
            Entry::None => 0,
            Entry::Present(frame, _) => PAGE_IS_PRESENT | self.file_bit(frame, PAGE_IS_FILE),
            Entry::Zero(_) => PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
            Entry::Guard => PAGE_IS_SWAPPED | PAGE_IS_GUARD,
            Entry::Migration(frame, _) => PAGE_IS_SWAPPED | self.file_bit(frame, PAGE_IS_FILE),
            Entry::Swap(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::UffdWp => PAGE_IS_SWAPPED,
        };
        let huge = match self.block(pid, page) {
            Block::Table => 0,
            Block::Huge(..) | Block::Device(..) | Block::Zero(_) => PAGE_IS_HUGE,
        };
        kind | huge
            | (u64::from(!bits.has(Bits::UFFD_WP)) * PAGE_IS_WRITTEN)
            | (u64::from(bits.has(Bits::SOFT_DIRTY)) * PAGE_IS_SOFT_DIRTY)
    }

    /// Whether a page has one mapping. Of a block the first page counts for all.
    fn mapped_once(&self, pid: Pid, page: u32, frame: FrameId) -> bool {
        let head = self.memory.head(frame);
        let counted = match self.block(pid, page) {
            Block::Huge(..) | Block::Device(..) => head,
            Block::Table | Block::Zero(_) => frame,
        };
        self.memory.frame(head).entire + self.memory.frame(counted).mapcount == 1
    }

    fn file_bit(&self, frame: FrameId, bit: u64) -> u64 {
        match self.memory.folio(frame).owner {
            Owner::File(..) => bit,
            Owner::Free
            | Owner::Anon
            | Owner::Ksm
            | Owner::HugePages
            | Owner::Device(..)
            | Owner::Poisoned => 0,
        }
    }

    /// Whether one process alone maps a page: the owner of every mapping of its folio.
    #[must_use]
    pub fn is_sole(&self, frame: FrameId) -> bool {
        let head = self.memory.head(frame);
        let small = self.memory.folio(frame).order == 0;
        let pages = self.memory.pages_of(head);
        let mut mappings = pages.flat_map(|page| self.rmaps.of(&self.memory, page));
        let Some(first) = mappings.next() else {
            return false;
        };
        let same = |mapping: Mapping| mapping.pid == first.pid;
        if small {
            mappings.next().is_none()
        } else {
            mappings.all(same)
        }
    }
}
