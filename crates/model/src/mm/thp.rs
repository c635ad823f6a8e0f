//! Large pages: `MADV_COLLAPSE`, and splitting large folios, evenly or not.

use gpusvm::seam::mm::{Access, InvalidateReason};

use crate::mm::around::Around;
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::fault::fault;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{FolioFlags, FrameId, Owner};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::vma::Vma;
use crate::mm::{Machine, Pages, Pid};

/// Collapses the whole blocks of a part of a mapping; the mmap lock is held for writing. The error
/// is that of the last block that failed.
pub(crate) fn collapse_pages<A: Around>(around: &A, pid: Pid, part: &Vma) -> Result<(), Errno> {
    let block = around.with(|mm| mm.shape.block());
    let room = |mm: &mut Machine| {
        let vma = mm.process(pid).vmas.at(part.pages.start);
        vma.is_some_and(|vma| vma.pages.start.next_multiple_of(block) + block <= vma.pages.end)
    };
    let untouched = part.anon.is_none();
    if part.flags.has(VmFlags::NO_HUGE) || !part.is_anon() || untouched || !around.with(room) {
        return Err(Errno::Invalid);
    }
    let mut start = part.pages.start.next_multiple_of(block);
    // Inside of one block: the number of blocks is less than none.
    if start > part.pages.end - part.pages.end % block {
        return Err(Errno::Invalid);
    }
    let mut result = Ok(());
    while start + block <= part.pages.end {
        // Where there is not even a table, the rest is not looked at.
        let whole = |mm: &mut Machine| mm.block(pid, start) != Block::Table;
        if !around.with(|mm| whole(mm) || mm.has_table(pid, start)) {
            return Err(Errno::Invalid);
        }
        if let Err(error) = collapse(around, pid, Pages::new(start, start + block)) {
            result = Err(error);
        }
        start += block;
    }
    result
}

fn collapse<A: Around>(around: &A, pid: Pid, block: Pages) -> Result<(), Errno> {
    if around.with(|mm| mm.block(pid, block.start) != Block::Table) {
        return Ok(());
    }
    let open = around.open(pid, block, InvalidateReason::Clear);
    around.step();
    let result = around.with(|mm| mm.collapse(pid, block));
    around.close(pid, open);
    around.announce();
    result
}

/// Reads swapped pages of a block in; the mmap lock is not held.
///
/// # Errors
/// `EFAULT` where one cannot be read.
pub fn swap_in<A: Around>(around: &A, pid: Pid, block: Pages) -> Result<(), Errno> {
    for page in block.iter() {
        if matches!(around.with(|mm| mm.entry(pid, page)), Entry::Swap(..)) {
            fault(around, pid, page, Access::Read).map_err(|_signal| Errno::Fault)?;
        }
    }
    Ok(())
}

/// Whether the parts of a split folio are all of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Single pages.
    Uniform,
    /// One page apart, the rest as large as it can stay: 1, 1, 2, 4, ...
    Around(FrameId),
}

impl Machine {
    /// Copies the pages of a block into one large folio. Devices must have let go of the block.
    fn collapse(&mut self, pid: Pid, block: Pages) -> Result<(), Errno> {
        self.check_collapse(pid, block)?;
        let head = self.new_block().ok_or(Errno::NoMem)?;
        self.prepare_anon(pid, block.start);
        let flags = self.process(pid).vmas.at(block.start).map(|vma| vma.flags);
        for (n, page) in (0..).zip(block.iter()) {
            if let Entry::Present(frame, _) = self.replace_none(pid, page) {
                self.memory.copy_content(frame, head.plus(n));
                self.put_copied(frame);
            }
        }
        self.map_block(
            pid,
            block.start,
            head,
            Self::fresh_bits(flags.unwrap_or_default()),
        );
        Ok(())
    }

    /// Empties an entry but keeps its page until the copy is made.
    fn replace_none(&mut self, pid: Pid, page: u32) -> Entry {
        if let Entry::Present(frame, _) = self.entry(pid, page) {
            self.hold(frame);
        }
        self.replace(pid, page, Entry::None)
    }

    fn put_copied(&mut self, frame: FrameId) {
        self.unhold(frame);
    }

    fn check_collapse(&self, pid: Pid, block: Pages) -> Result<(), Errno> {
        for page in block.iter() {
            match self.entry(pid, page) {
                Entry::None | Entry::Zero(_) => {}
                Entry::Present(frame, bits) => {
                    let folio = self.memory.folio(frame);
                    let busy = folio.flags.has(FolioFlags::LOCKED) || folio.pins > 0;
                    if bits.has(Bits::UFFD_WP) || folio.owner != Owner::Anon {
                        return Err(Errno::Invalid);
                    }
                    if busy || folio.held > 0 {
                        return Err(Errno::Again);
                    }
                }
                Entry::Swap(..)
                | Entry::Migration(..)
                | Entry::DevicePrivate(..)
                | Entry::DeviceExclusive(..)
                | Entry::HwPoison(_)
                | Entry::Guard
                | Entry::UffdWp => return Err(Errno::Invalid),
            }
        }
        Ok(())
    }

    /// Splits a large folio that no block entry maps and nobody else holds. Returns whether it did.
    pub fn split_folio(&mut self, frame: FrameId, how: Split) -> bool {
        let head = self.memory.head(frame);
        let folio = *self.memory.frame(head);
        if folio.order == 0 || folio.entire > 0 || !self.may_split(head) {
            return folio.order == 0;
        }
        match how {
            Split::Uniform => self.carve(head, folio.order, 0),
            Split::Around(page) => self.split_towards(head, folio.order, page),
        }
        self.drop_unmapped(head, folio.order);
        true
    }

    /// Whether nobody but entries has a large folio.
    fn may_split(&self, head: FrameId) -> bool {
        let folio = *self.memory.frame(head);
        let pages = self.memory.pages_of(head);
        let mapped: u32 = pages.map(|page| self.memory.frame(page).mapcount).sum();
        !folio.flags.has(FolioFlags::LOCKED) && folio.refs == mapped + folio.entire
    }

    /// Splits a large folio that one process maps, block entry and all. Its pages of zeros become
    /// the page of zeros where their mapping is not locked. Devices must have let go of it.
    pub(crate) fn split_anon(&mut self, head: FrameId) {
        if !self.may_split(head) {
            return;
        }
        let block = |mapping: &Mapping| mapping.level == Level::Block;
        let mapping = self.rmaps.of(&self.memory, head).find(block);
        if let Some(mapping) = mapping {
            self.split_block(mapping.pid, mapping.page);
        }
        let pages: Vec<_> = self.memory.pages_of(head).collect();
        if self.split_folio(head, Split::Uniform) {
            for page in pages {
                self.share_zeros(page);
            }
        }
    }

    fn share_zeros(&mut self, frame: FrameId) {
        let zeros = self.memory.content(frame).iter().all(|word| *word == 0);
        if !zeros || self.memory.frame(frame).poisoned {
            return;
        }
        let mappings: Vec<_> = self.rmaps.of(&self.memory, frame).collect();
        for Mapping { pid, page, .. } in mappings {
            let vma = self.process(pid).vmas.at(page);
            let locked = vma.is_some_and(|vma| vma.flags.has(VmFlags::LOCKED));
            if let (Entry::Present(_, bits), false) = (self.entry(pid, page), locked) {
                let bits = bits.without(Bits::WRITE.with(Bits::DIRTY));
                self.replace(pid, page, Entry::Zero(bits));
            }
        }
    }

    /// Halves the folio again and again on the side of `page`.
    fn split_towards(&mut self, head: FrameId, order: u8, page: FrameId) {
        let mut at = head;
        for order in (0..order).rev() {
            self.carve(at, order + 1, order);
            if page.0 >= at.0 + (1 << order) {
                at = at.plus(1 << order);
            }
        }
    }

    /// Cuts a folio of `order` into folios of `part`.
    fn carve(&mut self, head: FrameId, order: u8, part: u8) {
        let whole = *self.memory.frame(head);
        for start in (0..1u32 << order).step_by(1 << part) {
            let first = head.plus(start);
            let mut refs = 0;
            for n in 0..1 << part {
                let page = self.memory.frame_mut(first.plus(n));
                page.head = first.0;
                refs += page.mapcount;
            }
            let folio = self.memory.frame_mut(first);
            folio.order = part;
            folio.flags = whole.flags;
            folio.owner = match whole.owner {
                Owner::Device(place, page) => Owner::Device(place, page + start),
                other @ (Owner::Free
                | Owner::Anon
                | Owner::Ksm
                | Owner::HugePages
                | Owner::File(..)
                | Owner::Poisoned) => other,
            };
            folio.refs = refs;
        }
    }

    /// Pages of a split folio that nobody maps are free.
    fn drop_unmapped(&mut self, head: FrameId, order: u8) {
        let mut at = head.0;
        while at < head.0 + (1 << order) {
            let part = self.memory.head(FrameId(at));
            let size = 1 << self.memory.frame(part).order;
            if self.memory.frame(part).refs == 0 {
                self.free_folio(part);
            }
            at += size;
        }
    }

    /// Makes the page at `page` a folio of its own where a block entry or a large folio has it.
    /// Devices must have let go of the block. Returns whether it is one now.
    pub(crate) fn single_out(&mut self, pid: Pid, page: u32) -> bool {
        if self.block(pid, page) != Block::Table {
            self.split_block(pid, page);
        }
        match self.entry(pid, page) {
            Entry::Present(frame, _) => self.split_folio(frame, Split::Uniform),
            Entry::None
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => true,
        }
    }
}
