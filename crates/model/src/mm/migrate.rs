//! Steps of migrations (`migrate_vma`): collecting pages behind migration entries, and putting
//! entries for the new pages, or for the old ones, into their place.
//!
//! A collected page is locked and held; whoever meets its entry waits. Holes are not closed: a CPU
//! may fill one meanwhile, and then the move of that page is refused.

use gpusvm::mutant::Mutant;

use crate::mm::entry::{Block, Entry};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{DevicePage, Frame, FrameId, Owner};
use crate::mm::reclaim::Unmapped;
use crate::mm::rmap::Mapping;
use crate::mm::vma::Vma;
use crate::mm::{Machine, Pages, Pid};

/// What collecting a page for a move to a device found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// Nothing, or the page of zeros: the device side is filled with zeros.
    Hole,
    /// This page; its entry is a migration entry now.
    Page(FrameId),
    /// Another operation has the page.
    Busy,
    /// A page that does not move: pinned, poisoned, swapped out, on a device, a guard.
    Refused,
}

/// What became of a device page that is to come home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is the caller's.
    Yes,
    /// Another operation has it.
    Busy,
    /// It has been freed meanwhile.
    Gone,
}

/// Identity of a device allocation, as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Device {
    /// Identity of the allocation.
    pub id: u64,
    /// Identity of the device memory.
    pub pagemap: u32,
    /// Where in it the allocation begins.
    pub vram: u64,
    /// Frame of its first page, in coherent memory.
    pub coherent: Option<u32>,
    /// Frames among which its pages are.
    pub frames: (u32, u32),
}

impl Machine {
    /// Collects the page at `page` for a move to a device. Devices must have let go of it.
    pub fn collect(&mut self, pid: Pid, page: u32) -> Collected {
        if !self.single_out(pid, page) {
            return Collected::Refused;
        }
        let anon = |vma: &Vma| vma.is_anon();
        match self.entry(pid, page) {
            // The holes of a file are its own content.
            Entry::None if !self.process(pid).vmas.at(page).is_some_and(anon) => Collected::Refused,
            Entry::None | Entry::Zero(_) => Collected::Hole,
            Entry::Present(frame, bits) => self.collect_present(pid, page, frame, bits),
            Entry::Migration(..) => Collected::Busy,
            Entry::Guard if self.mutant == Some(Mutant::GuardFilled) => Collected::Hole,
            Entry::Swap(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => Collected::Refused,
        }
    }

    /// Collects a large page whole for a move to a device that takes large pages, or a block of holes
    /// that would become one; `None` where the pages of the block go one by one. Its entries become
    /// small ones meanwhile. Devices must have let go of the block.
    pub fn collect_block(&mut self, pid: Pid, start: u32) -> Option<Collected> {
        let vma = *self.process(pid).vmas.at(start)?;
        match self.block(pid, start) {
            Block::Zero(_) => Some(Collected::Hole),
            Block::Table if self.wants_block(pid, start, &vma) => Some(Collected::Hole),
            Block::Table | Block::Device(..) => None,
            Block::Huge(head, _) => {
                let folio = *self.memory.frame(head);
                let alone = folio.refs == 1 && folio.pins == 0 && folio.owner == Owner::Anon;
                if !alone || self.memory.has_poison(head) || !self.try_lock(head) {
                    return None;
                }
                self.hold(head);
                self.split_block(pid, start);
                for (n, page) in (0..).zip(self.shape.block_around(start).iter()) {
                    let bits = self.entry(pid, page).bits();
                    self.put_migration_entry(pid, page, head.plus(n), bits);
                }
                Some(Collected::Page(head))
            }
        }
    }

    fn collect_present(&mut self, pid: Pid, page: u32, frame: FrameId, bits: Bits) -> Collected {
        let folio = *self.memory.folio(frame);
        let pinned = folio.pins > 0 && self.mutant != Some(Mutant::PinIgnored);
        if folio.owner != Owner::Anon || pinned || self.memory.frame(frame).poisoned {
            return Collected::Refused;
        }
        if !self.try_lock(frame) {
            return Collected::Busy;
        }
        self.hold(frame);
        self.put_migration_entry(pid, page, frame, bits);
        Collected::Page(frame)
    }

    fn put_migration_entry(&mut self, pid: Pid, page: u32, frame: FrameId, bits: Bits) {
        let sole = self.memory.frame(frame).exclusive;
        let sole = if sole { Bits::EXCLUSIVE } else { Bits::NONE };
        self.replace(pid, page, Entry::Migration(frame, bits.with(sole)));
    }

    /// Puts a migration entry into the place of one more mapping of a collected page.
    pub(crate) fn unmap_migrating(&mut self, frame: FrameId, mapping: Mapping) -> Unmapped {
        let Mapping { pid, page, .. } = mapping;
        let entry = self.entry(pid, page);
        if entry.mapped_frame() == Some(frame) {
            self.put_migration_entry(pid, page, frame, entry.bits());
        }
        Unmapped::Gone
    }

    /// Whether nobody refers to a collected page any more. A copy in swap that no entry names goes.
    pub fn is_isolated(&mut self, frame: FrameId) -> bool {
        if let Some(slot) = self.memory.folio(frame).swap
            && self.swap.slot(slot).count == 0
        {
            self.uncache_slot(slot, frame);
        }
        let folio = self.memory.folio(frame);
        let pins = match self.mutant {
            Some(Mutant::PinIgnored) => folio.pins,
            _ => 0,
        };
        folio.refs == 1 + pins && folio.held == 1
    }

    /// Locks and holds the device page that was page `page` of the allocation `id` when it was looked
    /// up.
    pub fn take_device_page(&mut self, frame: FrameId, id: u64, page: u32) -> Taken {
        let refs = self.memory.folio(frame).refs;
        let still = |device: DevicePage| device.page == page && self.device(device.place).id == id;
        if refs == 0 || !self.memory.device_page(frame).is_some_and(still) {
            return Taken::Gone;
        }
        if !self.try_lock(frame) {
            return Taken::Busy;
        }
        self.hold(frame);
        Taken::Yes
    }

    /// The folios of the allocation in `place`, and where they begin in it.
    pub fn device_folios(&self, place: u32) -> Vec<(FrameId, Pages)> {
        let (first, end) = self.device(place).frames;
        let frames = (first..).zip(&self.memory.frames[first as usize..end as usize]);
        let folio = |(at, frame): (u32, &Frame)| match frame.owner {
            Owner::Device(of, page) if of == place && frame.refs > 0 => {
                Some((FrameId(at), Pages::new(page, page + (1 << frame.order))))
            }
            Owner::Device(..)
            | Owner::Free
            | Owner::Anon
            | Owner::Ksm
            | Owner::HugePages
            | Owner::File(..)
            | Owner::Poisoned => None,
        };
        let mut folios: Vec<_> = frames.filter_map(folio).collect();
        folios.sort_unstable_by_key(|(_, pages)| pages.start);
        folios
    }

    /// Where a page is mapped or has migration entries.
    pub fn mappings(&self, frame: FrameId) -> Vec<Mapping> {
        self.rmaps.of(&self.memory, frame).collect()
    }

    /// Replaces the migration entries of the folio `from` by entries for `to`, which may be the same
    /// folio; a large one is mapped by block entries again where it can. Returns the number of pages
    /// that have entries now.
    pub fn settle(&mut self, from: FrameId, to: FrameId) -> u32 {
        let mut settled = 0;
        let mut firsts = Vec::new();
        for n in 0..1 << self.memory.frame(from).order {
            let mut mapped = 0;
            while let Some((mapping, bits)) = self.migration_entry(from.plus(n)) {
                self.settle_one(mapping, bits, to.plus(n));
                if n == 0 {
                    firsts.push(mapping);
                }
                mapped += 1;
            }
            settled += u32::from(mapped > 0);
        }
        if self.memory.folio(to).order > 0 {
            for Mapping { pid, page, .. } in firsts {
                self.join_block(pid, page, to);
            }
        }
        settled
    }

    fn migration_entry(&self, frame: FrameId) -> Option<(Mapping, Bits)> {
        let entry = |mapping: Mapping| match self.entry(mapping.pid, mapping.page) {
            Entry::Migration(found, bits) if found == frame => Some((mapping, bits)),
            Entry::Migration(..)
            | Entry::None
            | Entry::Present(..)
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => None,
        };
        self.rmaps.of(&self.memory, frame).find_map(entry)
    }

    fn settle_one(&mut self, mapping: Mapping, bits: Bits, to: FrameId) {
        self.memory.frame_mut(to).exclusive = bits.has(Bits::EXCLUSIVE);
        let bits = bits.without(Bits::EXCLUSIVE);
        let entry = if self.memory.frame(to).poisoned {
            Entry::HwPoison(to)
        } else {
            self.entry_for(to, bits)
        };
        self.replace(mapping.pid, mapping.page, entry);
    }

    /// The entry that maps a page where it is.
    fn entry_for(&self, frame: FrameId, bits: Bits) -> Entry {
        if self.memory.is_device(frame) && !self.memory.is_coherent(frame) {
            Entry::DevicePrivate(frame, bits)
        } else {
            Entry::Present(frame, bits)
        }
    }

    /// Puts a large device page into a block of holes, as [`fill_hole`](Self::fill_hole).
    pub fn fill_hole_block(&mut self, pid: Pid, start: u32, device: FrameId) -> bool {
        let Some(vma) = self.process(pid).vmas.at(start).copied() else {
            return false;
        };
        let block = self.shape.block_around(start);
        let still = match self.block(pid, start) {
            Block::Zero(_) => true,
            Block::Table => self.next_used(pid, block.start, block).is_none(),
            Block::Huge(..) | Block::Device(..) => false,
        };
        if !still || !may_fill(&vma) || !vma.pages.covers(block) {
            return false;
        }
        // For the page table that splitting it will need.
        if self.memory.is_refused() {
            return false;
        }
        self.prepare_anon(pid, start);
        for page in self.memory.pages_of(device) {
            self.memory.frame_mut(page).exclusive = true;
        }
        self.unmap_block(pid, start);
        self.map_block(pid, start, device, hole_bits(vma.flags));
        true
    }

    /// Puts a device page into a hole, if it still is one in memory that may have it. Returns
    /// whether it did. Devices must have let go of the page.
    pub fn fill_hole(&mut self, pid: Pid, page: u32, device: FrameId) -> bool {
        let Some(vma) = self.process(pid).vmas.at(page).copied() else {
            return false;
        };
        if self.block(pid, page) != Block::Table || !may_fill(&vma) {
            return false;
        }
        match self.entry(pid, page) {
            Entry::None | Entry::Zero(_) => {}
            Entry::Guard if self.mutant == Some(Mutant::GuardFilled) => {}
            Entry::Present(..) if self.mutant == Some(Mutant::NewerPageOverwritten) => {}
            Entry::Present(..)
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => return false,
        }
        // For a page table.
        if self.memory.is_refused() {
            return false;
        }
        self.prepare_anon(pid, page);
        self.memory.frame_mut(device).exclusive = true;
        let entry = self.entry_for(device, hole_bits(vma.flags));
        self.replace(pid, page, entry);
        true
    }

    /// Lets a page go that was locked and held: it is free if nobody maps it any more.
    pub fn let_go(&mut self, frame: FrameId) {
        self.unlock(frame);
        if let Some(slot) = self.memory.folio(frame).swap {
            self.try_free_slot(slot);
        }
        self.unhold(frame);
    }

    /// The place of the allocation with this identity, while it has pages.
    #[must_use]
    pub fn place_of(&self, id: u64) -> Option<u32> {
        let live = (0..).zip(self.device_pages.iter().zip(&self.devices));
        let found = |(_, (pages, device)): &(u32, (&u32, &Device))| **pages > 0 && device.id == id;
        live.into_iter().find(found).map(|(place, _)| place)
    }

    /// Says who has a place from now on.
    pub fn name_place(&mut self, place: u32, device: Device) {
        let at = place as usize;
        if self.devices.len() <= at {
            self.devices.resize(at + 1, Device::default());
            self.device_pages.resize(at + 1, 0);
        }
        self.devices[at] = device;
    }

    /// Who has a place.
    #[must_use]
    pub fn device(&self, place: u32) -> Device {
        self.devices
            .get(place as usize)
            .copied()
            .unwrap_or_default()
    }

    /// A folio of device memory for the pages of the allocation in `place` from `page` on. It has no
    /// references: [`drop_device_page`](Self::drop_device_page) gives it back if it gets none.
    /// `None` where somebody has that page of coherent memory.
    pub fn new_device_page(&mut self, place: u32, page: u32, order: u8) -> Option<FrameId> {
        if self.devices.len() <= place as usize {
            self.name_place(place, Device::default());
        }
        self.changes.places.add(place);
        let owner = Owner::Device(place, page);
        let frame = match self.device(place).coherent {
            None => self.memory.allocate_device(order, owner),
            Some(first) => self.memory.take_coherent(FrameId(first + page), owner)?,
        };
        self.device_pages[place as usize] += 1 << order;
        let frames = &mut self.devices[place as usize].frames;
        let (first, end) = *frames;
        let behind = frame.0 + (1 << order);
        *frames = match end {
            0 => (frame.0, behind),
            _ => (first.min(frame.0), end.max(behind)),
        };
        Some(frame)
    }

    /// Gives back a device page that was never mapped.
    pub fn drop_device_page(&mut self, frame: FrameId) {
        self.discard_new(frame);
    }

    /// A folio of host memory that content comes home to.
    pub fn new_home(&mut self, order: u8) -> Option<FrameId> {
        self.memory.allocate(order, Owner::Anon)
    }

    /// Makes a page exclusive to a device: the CPU loses access, the page stays mapped, and is
    /// locked. Returns it where that worked.
    pub fn make_exclusive(&mut self, pid: Pid, page: u32) -> Option<FrameId> {
        if !self.single_out(pid, page) {
            return None;
        }
        match self.entry(pid, page) {
            Entry::Present(frame, bits)
                if bits.has(Bits::WRITE)
                    && self.memory.folio(frame).owner == Owner::Anon
                    && self.try_lock(frame) =>
            {
                // The device leaves no mark of what it writes.
                let bits = bits.with(Bits::DIRTY);
                self.replace(pid, page, Entry::DeviceExclusive(frame, bits));
                Some(frame)
            }
            Entry::Present(..)
            | Entry::None
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => None,
        }
    }

    /// Whether a span lies in one private mapping, anonymous or of a file.
    pub(crate) fn is_migratable(&self, pid: Pid, pages: Pages) -> bool {
        let vma = self.process(pid).vmas.at(pages.start);
        vma.is_some_and(|vma| vma.is_private() && vma.pages.covers(pages))
    }
}

/// Whether a mapping's holes are zeros: not those that the program fills itself, nor those of files.
fn may_fill(vma: &Vma) -> bool {
    vma.is_anon() && !vma.flags.has(VmFlags::UFFD_MISSING)
}

/// Bits of an entry for what was a hole.
const fn hole_bits(flags: VmFlags) -> Bits {
    if flags.has(VmFlags::WRITE) {
        Bits::WRITE.with(Bits::SOFT_DIRTY)
    } else {
        Bits::SOFT_DIRTY
    }
}
