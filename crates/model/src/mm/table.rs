//! Steps on page tables. All accounting of mappings stands in [`Machine::replace`]: whatever an
//! entry names gains or loses a reference, a mapping and a link by it and by nothing else.

use crate::mm::entry::{Block, Entry, SlotId};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{FolioFlags, FrameId, Owner};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::vma::Vma;
use crate::mm::{Machine, Pages, Pid, Table};

/// What a zap leaves in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zap {
    /// Nothing: the mapping goes.
    All,
    /// Guards, and in files the markers of userfaultfd: the mapping stays.
    KeepMarkers,
}

impl Machine {
    /// Takes a reference.
    pub(crate) fn get(&mut self, frame: FrameId) {
        self.memory.folio_mut(frame).refs += 1;
    }

    /// Drops a reference; the last one frees the folio.
    pub(crate) fn put(&mut self, frame: FrameId) {
        let head = self.memory.head(frame);
        let folio = self.memory.frame_mut(head);
        folio.refs -= 1;
        if folio.refs == 0 {
            self.free_folio(head);
        }
    }

    /// Takes a reference for an operation.
    pub(crate) fn hold(&mut self, frame: FrameId) {
        self.memory.folio_mut(frame).held += 1;
        self.get(frame);
    }

    /// Drops an operation's reference.
    pub(crate) fn unhold(&mut self, frame: FrameId) {
        self.memory.folio_mut(frame).held -= 1;
        self.put(frame);
    }

    pub(crate) fn free_folio(&mut self, head: FrameId) {
        if let Owner::Device(place, _) = self.memory.frame(head).owner {
            self.changes.places.add(place);
            let pages = &mut self.device_pages[place as usize];
            *pages -= 1 << self.memory.frame(head).order;
            if *pages == 0 {
                self.released.push(place);
            }
        }
        // Entries that still lead there are looked at: the chains go.
        for frame in self.memory.pages_of(head) {
            for mapping in self.rmaps.of(&self.memory, frame) {
                self.changes.page(mapping.pid, mapping.page);
            }
        }
        self.memory.release(head);
    }

    /// Takes the lock of a folio where it is free.
    pub(crate) fn try_lock(&mut self, frame: FrameId) -> bool {
        let folio = self.memory.folio_mut(frame);
        let free = !folio.flags.has(FolioFlags::LOCKED);
        folio.flags = folio.flags.with(FolioFlags::LOCKED);
        free
    }

    pub(crate) fn unlock(&mut self, frame: FrameId) {
        let folio = self.memory.folio_mut(frame);
        folio.flags = folio.flags.without(FolioFlags::LOCKED);
    }

    /// Puts `new` into the place of an entry, with all accounting, and returns what was there. The
    /// block above must be a table.
    pub(crate) fn replace(&mut self, pid: Pid, page: u32, new: Entry) -> Entry {
        debug_assert_eq!(self.block(pid, page), Block::Table, "split first");
        let old = self.process(pid).entries[page as usize];
        if new != Entry::None {
            self.set_table(pid, page, Table::There);
        }
        self.account_in(pid, page, new);
        self.set_entry(pid, page, new);
        self.account_out(pid, page, old);
        old
    }

    /// Puts `new` into the place of an entry, without accounting. What the two name is marked:
    /// whoever checks looks at its accounting, whether or not that was changed.
    pub(super) fn set_entry(&mut self, pid: Pid, page: u32, new: Entry) {
        self.changes.page(pid, page);
        let entry = &mut self.processes[usize::from(pid.0)].entries[page as usize];
        let old = core::mem::replace(entry, new);
        self.mark_named(old);
        self.mark_named(new);
    }

    fn mark_named(&mut self, entry: Entry) {
        if let Some(frame) = entry.named_frame() {
            self.memory.changed.add(frame.0);
        }
        if let Some(slot) = entry.slot() {
            self.swap.changed.add(slot.0);
        }
    }

    fn account_in(&mut self, pid: Pid, page: u32, entry: Entry) {
        if let Some(frame) = entry.mapped_frame() {
            self.memory.frame_mut(frame).mapcount += 1;
            self.get(frame);
        }
        match entry {
            Entry::Present(frame, _)
            | Entry::DevicePrivate(frame, _)
            | Entry::DeviceExclusive(frame, _)
            | Entry::Migration(frame, _) => self.link(frame, pid, page, Level::Page),
            Entry::Swap(slot, _) => self.swap.slot_mut(slot).count += 1,
            Entry::None | Entry::Zero(_) | Entry::HwPoison(_) | Entry::Guard | Entry::UffdWp => {}
        }
    }

    fn account_out(&mut self, pid: Pid, page: u32, entry: Entry) {
        match entry {
            Entry::Present(frame, _)
            | Entry::DevicePrivate(frame, _)
            | Entry::DeviceExclusive(frame, _)
            | Entry::Migration(frame, _) => self.unlink(frame, pid, page, Level::Page),
            Entry::Swap(slot, _) => self.drop_slot(slot),
            Entry::None | Entry::Zero(_) | Entry::HwPoison(_) | Entry::Guard | Entry::UffdWp => {}
        }
        if let Some(frame) = entry.mapped_frame() {
            self.memory.frame_mut(frame).mapcount -= 1;
            self.put(frame);
        }
    }

    fn link(&mut self, frame: FrameId, pid: Pid, page: u32, level: Level) {
        let mapping = Mapping { pid, page, level };
        self.rmaps.add(&mut self.memory, frame, mapping);
    }

    fn unlink(&mut self, frame: FrameId, pid: Pid, page: u32, level: Level) {
        let mapping = Mapping { pid, page, level };
        self.changes.page(pid, page);
        self.memory.changed.add(frame.0);
        self.rmaps.remove(&mut self.memory, frame, mapping);
    }

    /// An entry that named the slot is gone.
    fn drop_slot(&mut self, slot: SlotId) {
        self.swap.slot_mut(slot).count -= 1;
        self.try_free_slot(slot);
    }

    /// Frees a slot that no entry names, unless an operation has its page.
    pub(crate) fn try_free_slot(&mut self, slot: SlotId) {
        let found = *self.swap.slot(slot);
        let Some(frame) = found.cache.filter(|_| found.count == 0) else {
            return;
        };
        if !self.memory.folio(frame).flags.has(FolioFlags::LOCKED) {
            self.uncache_slot(slot, frame);
        }
    }

    /// Takes a page out of the swap cache.
    pub(crate) fn uncache_slot(&mut self, slot: SlotId, frame: FrameId) {
        self.swap.slot_mut(slot).cache = None;
        let folio = self.memory.folio_mut(frame);
        folio.swap = None;
        // What was in swap is nowhere else now.
        folio.flags = folio.flags.with(FolioFlags::DIRTY);
        self.put(frame);
    }

    /// Sets state bits of an entry, whichever level it is on.
    pub(crate) fn set_bits(&mut self, pid: Pid, page: u32, bits: Bits) {
        match self.block(pid, page) {
            Block::Table => {
                let entry = self.process(pid).entries[page as usize];
                self.set_entry(pid, page, entry.with_bits(bits));
            }
            Block::Huge(head, _) => self.set_block(pid, page, Block::Huge(head, bits)),
            Block::Device(head, _) => self.set_block(pid, page, Block::Device(head, bits)),
            Block::Zero(_) => self.set_block(pid, page, Block::Zero(bits)),
        }
    }

    /// Maps a large folio by one block entry. The tables below must be empty.
    pub(crate) fn map_block(&mut self, pid: Pid, start: u32, head: FrameId, bits: Bits) {
        self.memory.frame_mut(head).entire += 1;
        self.get(head);
        self.link(head, pid, start, Level::Block);
        let block = if self.memory.is_device(head) {
            Block::Device(head, bits)
        } else {
            Block::Huge(head, bits)
        };
        self.set_block(pid, start, block);
    }

    /// Empties the block that holds `page` and returns what was there.
    pub(crate) fn unmap_block(&mut self, pid: Pid, page: u32) -> Block {
        let start = self.shape.block_around(page).start;
        let old = self.block(pid, page);
        self.set_block(pid, page, Block::Table);
        if let Block::Huge(head, bits) | Block::Device(head, bits) = old {
            self.note_dirty(head, bits);
            self.unlink(head, pid, start, Level::Block);
            self.memory.frame_mut(head).entire -= 1;
            self.put(head);
        }
        old
    }

    /// Replaces a block entry by small entries for the same pages.
    pub(crate) fn split_block(&mut self, pid: Pid, page: u32) {
        let block = self.shape.block_around(page);
        let old = self.block(pid, page);
        if let Block::Huge(head, _) | Block::Device(head, _) = old {
            self.hold(head);
        }
        self.unmap_block(pid, page);
        self.set_table(pid, page, Table::There);
        for (n, page) in (0..).zip(block.iter()) {
            match old {
                Block::Table => {}
                Block::Huge(head, bits) => {
                    self.replace(pid, page, Entry::Present(head.plus(n), bits));
                }
                Block::Device(head, bits) => {
                    self.replace(pid, page, Entry::DevicePrivate(head.plus(n), bits));
                }
                Block::Zero(bits) => {
                    self.replace(pid, page, Entry::Zero(bits.without(Bits::WRITE)));
                }
            }
        }
        if let Block::Huge(head, _) | Block::Device(head, _) = old {
            self.unhold(head);
        }
    }

    /// Maps a large folio by one block entry again where small entries map all of it, alike.
    pub(crate) fn join_block(&mut self, pid: Pid, page: u32, head: FrameId) {
        let block = self.shape.block_around(page);
        let whole = self.memory.frame(head).order == self.shape.pmd_order;
        if !whole || self.block(pid, page) != Block::Table {
            return;
        }
        let bits = self.entry(pid, block.start).bits();
        let alike = (0..).zip(block.iter()).all(|(n, page)| {
            let entry = self.entry(pid, page);
            entry.mapped_frame() == Some(head.plus(n)) && entry.bits() == bits
        });
        let mapped = |vma: &Vma| vma.pages.covers(block);
        if !alike || !self.process(pid).vmas.at(page).is_some_and(mapped) {
            return;
        }
        self.hold(head);
        for page in block.iter() {
            self.replace(pid, page, Entry::None);
        }
        self.map_block(pid, block.start, head, bits);
        self.unhold(head);
    }

    /// Whether `page` lies in a block entry that `pages` does not cover.
    pub(crate) fn sticks_out(&self, pid: Pid, page: u32, pages: Pages) -> bool {
        page < self.shape.pages
            && self.block(pid, page) != Block::Table
            && !pages.covers(self.shape.block_around(page))
    }

    /// A page of a file was written through an entry that goes. Of anonymous pages nobody keeps that:
    /// what `MADV_FREE` gave away is lost with the other entries clean.
    fn note_dirty(&mut self, frame: FrameId, bits: Bits) {
        let file = matches!(self.memory.folio(frame).owner, Owner::File(..));
        if file && bits.has(Bits::DIRTY) {
            let folio = self.memory.folio_mut(frame);
            folio.flags = folio.flags.with(FolioFlags::DIRTY);
        }
    }

    /// Empties the entry of a page, or the block entry that starts there.
    /// Returns the first page behind what it did.
    pub(crate) fn zap(&mut self, pid: Pid, page: u32, what: Zap) -> u32 {
        if self.block(pid, page) != Block::Table {
            self.unmap_block(pid, page);
            return self.shape.block_around(page).end;
        }
        let entry = self.process(pid).entries[page as usize];
        let anon = self
            .process(pid)
            .vmas
            .at(page)
            .is_none_or(|vma| vma.is_anon());
        let stays = match entry {
            Entry::Guard => what == Zap::KeepMarkers,
            Entry::UffdWp => what == Zap::KeepMarkers && !anon,
            Entry::None
            | Entry::Present(..)
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_) => false,
        };
        if !stays {
            if let Some(frame) = entry.mapped_frame() {
                self.note_dirty(frame, entry.bits());
            }
            // A page of a file comes again as it was, so its protection stays.
            let marked = what == Zap::KeepMarkers && !anon && entry.bits().has(Bits::UFFD_WP);
            let left = if marked { Entry::UffdWp } else { Entry::None };
            self.replace(pid, page, left);
        }
        page + 1
    }

    /// Tables of whole blocks in `pages` go where they are empty.
    pub(crate) fn drop_empty_tables(&mut self, pid: Pid, pages: Pages) {
        let size = self.shape.block();
        for start in (pages.start.next_multiple_of(size)..pages.end).step_by(size as usize) {
            let block = self.shape.block_around(start);
            if pages.covers(block) && self.next_used(pid, start, block).is_none() {
                self.set_table(pid, start, Table::Gone);
            }
        }
    }

    /// Tables under mappings that are gone go, too, where nothing is mapped in their block any more.
    pub(crate) fn drop_unmapped_tables(&mut self, pid: Pid, gone: Pages) {
        let first = self.shape.block_around(gone.start).start;
        for start in (first..gone.end).step_by(self.shape.block() as usize) {
            if !self.is_mapped(pid, self.shape.block_around(start)) {
                self.set_table(pid, start, Table::Gone);
            }
        }
    }

    /// The first page of `pages` from `from` on that has something in its tables.
    pub(crate) fn next_used(&self, pid: Pid, from: u32, pages: Pages) -> Option<u32> {
        let process = self.process(pid);
        (from..pages.end).find(|page| {
            process.entries[*page as usize] != Entry::None || self.block(pid, *page) != Block::Table
        })
    }

    /// Gives the mapping at `page` anonymous memory where it has none yet.
    pub(crate) fn prepare_anon(&mut self, pid: Pid, page: u32) {
        let vmas = &self.process(pid).vmas;
        if vmas.at(page).is_none_or(|vma| vma.anon.is_some()) {
            return;
        }
        let anon = match vmas.neighbour_anon(page) {
            Some(anon) => anon,
            None => self.new_anon(),
        };
        if let Some(vma) = self.process_mut(pid).vmas.get_mut(page) {
            vma.anon = Some(anon);
        }
    }

    /// A small page of zeros for a mapping of its own, not mapped yet.
    pub(crate) fn new_page(&mut self) -> Option<FrameId> {
        let frame = self.memory.allocate(0, Owner::Anon)?;
        self.memory.frame_mut(frame).exclusive = true;
        Some(frame)
    }

    /// Gives back a folio that was never mapped.
    pub(crate) fn discard_new(&mut self, head: FrameId) {
        if self.memory.frame(head).refs == 0 {
            self.free_folio(head);
        }
    }

    /// Bits of a fresh entry of a page that its mapping may write if `flags` say so.
    pub(crate) const fn fresh_bits(flags: VmFlags) -> Bits {
        let bits = Bits::YOUNG.with(Bits::SOFT_DIRTY);
        if flags.has(VmFlags::WRITE) {
            bits.with(Bits::WRITE).with(Bits::DIRTY)
        } else {
            bits
        }
    }
}
