//! Steps of migrations (`migrate_vma`): collecting pages behind migration entries, and putting
//! entries for the new pages, or for the old ones, into their place.
//!
//! A collected page is locked and held; whoever meets its entry waits. Holes are not closed: a CPU
//! may fill one meanwhile, and then the move of that page is refused.

use gpusvm::mutant::Mutant;

use crate::mm::entry::{Block, Entry};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{FrameId, Owner};
use crate::mm::reclaim::Unmapped;
use crate::mm::rmap::Mapping;
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
}

impl Machine {
    /// Collects the page at `page` for a move to a device. Devices must have let go of it.
    pub fn collect(&mut self, pid: Pid, page: u32) -> Collected {
        if !self.single_out(pid, page) {
            return Collected::Refused;
        }
        match self.entry(pid, page) {
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
        let folio = self.memory.folio(frame);
        let still = match folio.owner {
            Owner::Device(place, of) => of == page && self.device(place).id == id && folio.refs > 0,
            Owner::Free | Owner::Anon | Owner::Ksm | Owner::File(..) | Owner::Poisoned => false,
        };
        if !still {
            return Taken::Gone;
        }
        if !self.try_lock(frame) {
            return Taken::Busy;
        }
        self.hold(frame);
        Taken::Yes
    }

    /// The device pages of the allocation in `place`, and where they are in it.
    pub fn device_pages(&self, place: u32) -> Vec<(FrameId, u32)> {
        let mut pages = Vec::new();
        self.device_pages_into(place, &mut pages);
        pages
    }

    fn device_pages_into(&self, place: u32, out: &mut Vec<(FrameId, u32)>) {
        let first = self.memory.host_frames();
        let frames = (first..).zip(&self.memory.frames[first as usize..]);
        out.extend(frames.filter_map(|(at, frame)| match frame.owner {
            Owner::Device(of, page) if of == place && frame.refs > 0 => Some((FrameId(at), page)),
            Owner::Device(..)
            | Owner::Free
            | Owner::Anon
            | Owner::Ksm
            | Owner::File(..)
            | Owner::Poisoned => None,
        }));
        out.sort_unstable_by_key(|(_, page)| *page);
    }

    /// Where a page is mapped or has migration entries.
    pub fn mappings(&self, frame: FrameId) -> Vec<Mapping> {
        self.rmaps.of(&self.memory, frame).collect()
    }

    /// Replaces the migration entries of `from` by entries for `to`, which may be the same page.
    /// Returns their number.
    pub fn settle(&mut self, from: FrameId, to: FrameId) -> u32 {
        let mut settled = 0;
        while let Some((mapping, bits)) = self.migration_entry(from) {
            self.settle_one(mapping, bits, to);
            settled += 1;
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
        let entry = if self.memory.is_device(to) {
            Entry::DevicePrivate(to, bits)
        } else {
            Entry::Present(to, bits)
        };
        self.replace(mapping.pid, mapping.page, entry);
    }

    /// Puts a device page into a hole, if it still is one in memory that may have it. Returns
    /// whether it did. Devices must have let go of the page.
    pub fn fill_hole(&mut self, pid: Pid, page: u32, device: FrameId) -> bool {
        let Some(vma) = self.process(pid).vmas.at(page).copied() else {
            return false;
        };
        if self.block(pid, page) != Block::Table || !vma.is_anon() {
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
        let right = if vma.flags.has(VmFlags::WRITE) {
            Bits::WRITE
        } else {
            Bits::NONE
        };
        self.replace(
            pid,
            page,
            Entry::DevicePrivate(device, right.with(Bits::SOFT_DIRTY)),
        );
        true
    }

    /// Lets a collected page go: unlocked, no longer held; it is free if nobody maps it.
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

    /// A page of device memory for page `page` of the allocation in `place`; `None` where memory for
    /// its bookkeeping is refused. It has no references:
    /// [`drop_device_page`](Self::drop_device_page) gives it back if it gets none.
    pub fn new_device_page(&mut self, place: u32, page: u32) -> Option<FrameId> {
        if self.memory.is_refused() {
            return None;
        }
        if self.devices.len() <= place as usize {
            self.name_place(place, Device::default());
        }
        self.device_pages[place as usize] += 1;
        self.changes.places.add(place);
        Some(self.memory.allocate_device(Owner::Device(place, page)))
    }

    /// Gives back a device page that was never mapped.
    pub fn drop_device_page(&mut self, frame: FrameId) {
        self.discard_new(frame);
    }

    /// A page of host memory that content comes home to.
    pub fn new_home(&mut self) -> Option<FrameId> {
        self.memory.allocate(0, Owner::Anon)
    }

    /// Makes a page exclusive to a device: the CPU loses access, the page stays mapped.
    pub fn make_exclusive(&mut self, pid: Pid, page: u32) -> bool {
        if !self.single_out(pid, page) {
            return false;
        }
        match self.entry(pid, page) {
            Entry::Present(frame, bits)
                if bits.has(Bits::WRITE)
                    && self.memory.folio(frame).owner == Owner::Anon
                    && !self.is_locked(frame) =>
            {
                self.replace(pid, page, Entry::DeviceExclusive(frame, bits));
                true
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
            | Entry::UffdWp => false,
        }
    }

    /// Whether a span lies in one private anonymous mapping.
    pub(crate) fn is_migratable(&self, pid: Pid, pages: Pages) -> bool {
        let vma = self.process(pid).vmas.at(pages.start);
        vma.is_some_and(|vma| vma.is_anon() && vma.pages.covers(pages))
    }
}
