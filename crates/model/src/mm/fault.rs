//! CPU accesses and the faults they raise.
//!
//! An access either hits, by the entry and the rights of the mapping, or asks
//! [`Machine::fault`] for one step. Steps that change what devices may use already (copy on write,
//! the end of a device's exclusive use) come back as a plan, to be committed inside a bracket.

use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::{Access, InvalidateReason};

use crate::mm::around::{Around, MmapLock, Waited};
use crate::mm::cow::{Copied, commit};
use crate::mm::entry::{Block, Entry, SlotId};
use crate::mm::errno::Signal;
use crate::mm::file::{FileId, NoFrame};
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::{DevicePage, FolioFlags, FrameId, Owner};
use crate::mm::vma::{Backing, Vma};
use crate::mm::{Machine, Pages, Pid, Thp};

/// Pages that one read fault of a file maps at most (`fault_around_bytes`).
const AROUND: u32 = 16;

/// What an access that needs no fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// A page.
    Frame(FrameId),
    /// The page of zeros.
    Zero,
}

/// One step of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faulted {
    /// Done, or something changed: try the access again.
    Retry,
    /// An operation has the page: wait until something changes.
    Wait,
    /// The page is in device memory.
    Device(DevicePage),
    /// The page is missing, and the program serves such faults.
    Pager,
    /// A copy is ready to replace the entry, inside a bracket.
    Copy(Copied),
    /// A device has the page for itself; it has to give it up, inside a bracket.
    Exclusive,
    /// The access cannot be made.
    Refused(Signal),
}

/// Makes `page` accessible, as an access by the CPU does.
///
/// # Errors
/// The signal that the thread would get.
pub fn fault<A: Around>(around: &A, pid: Pid, page: u32, access: Access) -> Result<(), Signal> {
    loop {
        let seen = around.changes();
        let lock = MmapLock::read(around, pid);
        match around.with(|mm| mm.fault(pid, page, access)) {
            Faulted::Refused(signal) => return Err(signal),
            Faulted::Copy(copied) => commit(around, pid, copied),
            Faulted::Exclusive => restore_exclusive(around, pid, page),
            Faulted::Wait => {
                drop(lock);
                if around.wait(seen) == Waited::Hopeless {
                    return Err(Signal::Bus);
                }
                continue;
            }
            Faulted::Pager => {
                drop(lock);
                around.pager_fault(pid, page, seen)?;
                continue;
            }
            Faulted::Device(device) => {
                drop(lock);
                around.device_fault(pid, device, page, seen)?;
                continue;
            }
            Faulted::Retry => {}
        }
        if around.with(|mm| mm.access(pid, page, access)).is_some() {
            return Ok(());
        }
    }
}

/// Ends a device's exclusive use of a page.
pub(crate) fn restore_exclusive<A: Around>(around: &A, pid: Pid, page: u32) {
    let quietly = around.with(|mm| mm.mutant == Some(Mutant::ExclusiveEndedQuietly));
    let told = if quietly {
        Pages::new(0, 0)
    } else {
        Pages::one(page)
    };
    let open = around.open(pid, told, InvalidateReason::Clear);
    around.step();
    around.with(|mm| mm.restore_exclusive(pid, page));
    around.close(pid, open);
}

impl Machine {
    /// The page that a CPU access meets, or `None` where it faults. Sets the bits that the
    /// hardware sets.
    pub fn access(&mut self, pid: Pid, page: u32, access: Access) -> Option<Hit> {
        let vma = self.process(pid).vmas.at(page)?;
        if !allows(vma, access) {
            return None;
        }
        let entry = self.entry(pid, page);
        let bits = entry.bits();
        let hit = match entry {
            Entry::Present(frame, _) => Hit::Frame(frame),
            Entry::Zero(_) => Hit::Zero,
            Entry::None
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => return None,
        };
        let bits = match access {
            Access::Read => bits.with(Bits::YOUNG),
            Access::Write if !bits.has(Bits::WRITE) || hit == Hit::Zero => return None,
            Access::Write => bits
                .with(Bits::YOUNG)
                .with(Bits::DIRTY)
                .with(Bits::SOFT_DIRTY),
        };
        self.set_bits(pid, page, bits);
        Some(hit)
    }

    /// One step towards an access.
    pub fn fault(&mut self, pid: Pid, page: u32, access: Access) -> Faulted {
        let process = self.process(pid);
        let Some(vma) = process.vmas.at(page).copied().filter(|_| process.alive) else {
            return Faulted::Refused(Signal::Segv);
        };
        if !allows(&vma, access) {
            return Faulted::Refused(Signal::Segv);
        }
        let block = self.block(pid, page);
        if block != Block::Table {
            return self.fault_block(pid, page, access, block);
        }
        let entry = self.entry(pid, page);
        match entry {
            Entry::None => self.fault_none(pid, page, access, &vma),
            Entry::Present(_, bits) => match access {
                Access::Write if !bits.has(Bits::WRITE) => self.fault_protected(pid, page, &vma),
                Access::Read | Access::Write => Faulted::Retry,
            },
            Entry::Zero(_) => match access {
                Access::Read => Faulted::Retry,
                Access::Write => self.copy_page(pid, page, entry),
            },
            Entry::Swap(slot, bits) => self.fault_swap(pid, page, slot, bits),
            Entry::Migration(..) => Faulted::Wait,
            Entry::DevicePrivate(frame, _) => self.fault_device(frame),
            Entry::DeviceExclusive(frame, _) if self.is_locked(frame) => Faulted::Wait,
            Entry::DeviceExclusive(..) => Faulted::Exclusive,
            Entry::HwPoison(_) => Faulted::Refused(Signal::Bus),
            Entry::Guard => Faulted::Refused(Signal::Segv),
            Entry::UffdWp => {
                self.replace(pid, page, Entry::None);
                Faulted::Retry
            }
        }
    }

    pub(crate) fn is_locked(&self, frame: FrameId) -> bool {
        self.memory.folio(frame).flags.has(FolioFlags::LOCKED)
    }

    /// Whoever finds the page locked waits for it and does not call in: many readers would keep
    /// the migration from ever getting the page.
    fn fault_device(&self, frame: FrameId) -> Faulted {
        match self.memory.device_page(frame) {
            _ if self.is_locked(frame) => Faulted::Wait,
            Some(device) => Faulted::Device(device),
            None => Faulted::Refused(Signal::Bus),
        }
    }

    fn fault_none(&mut self, pid: Pid, page: u32, access: Access, vma: &Vma) -> Faulted {
        match vma.backing {
            Backing::Special => Faulted::Refused(Signal::Bus),
            Backing::HugePages => self.fault_huge_page(pid, page, vma),
            Backing::File(file) => self.fault_file(pid, page, access, vma, file),
            Backing::Anon if vma.flags.has(VmFlags::UFFD_MISSING) => Faulted::Pager,
            Backing::Anon if self.wants_block(pid, page, vma) => {
                self.fault_anon_block(pid, page, access, vma)
            }
            Backing::Anon => self.fault_anon(pid, page, access, vma),
        }
    }

    fn fault_anon(&mut self, pid: Pid, page: u32, access: Access, vma: &Vma) -> Faulted {
        if access == Access::Read {
            self.replace(pid, page, Entry::Zero(Bits::YOUNG.with(Bits::SOFT_DIRTY)));
            return Faulted::Retry;
        }
        self.prepare_anon(pid, page);
        let Some(frame) = self.new_page() else {
            return Faulted::Refused(Signal::OutOfMemory);
        };
        self.replace(
            pid,
            page,
            Entry::Present(frame, Self::fresh_bits(vma.flags)),
        );
        Faulted::Retry
    }

    /// Whether a fault at `page` may bring a whole block in.
    pub(crate) fn wants_block(&self, pid: Pid, page: u32, vma: &Vma) -> bool {
        let wanted = match self.shape.thp {
            Thp::Never => false,
            Thp::Madvise => vma.flags.has(VmFlags::HUGE),
            Thp::Always => true,
        };
        let block = self.shape.block_around(page);
        wanted
            && !vma.flags.has(VmFlags::NO_HUGE)
            && vma.pages.covers(block)
            && !self.has_table(pid, page)
    }

    fn fault_anon_block(&mut self, pid: Pid, page: u32, access: Access, vma: &Vma) -> Faulted {
        self.prepare_anon(pid, page);
        let block = self.shape.block_around(page);
        if access == Access::Read {
            let bits = Bits::YOUNG.with(Bits::SOFT_DIRTY);
            self.set_block(pid, page, Block::Zero(bits));
            return Faulted::Retry;
        }
        match self.new_block() {
            Some(head) => {
                self.map_block(pid, block.start, head, Self::fresh_bits(vma.flags));
                Faulted::Retry
            }
            None => self.fault_anon(pid, page, access, vma),
        }
    }

    /// A first touch of the pool's memory gets a page of its own, for reading, too.
    fn fault_huge_page(&mut self, pid: Pid, page: u32, vma: &Vma) -> Faulted {
        self.prepare_anon(pid, page);
        let Some(head) = self.new_folio(Owner::HugePages) else {
            return Faulted::Refused(Signal::Bus);
        };
        let start = self.shape.block_around(page).start;
        self.map_block(pid, start, head, Self::fresh_bits(vma.flags));
        Faulted::Retry
    }

    /// A large folio of zeros that is not mapped yet.
    pub(crate) fn new_block(&mut self) -> Option<FrameId> {
        self.new_folio(Owner::Anon)
    }

    fn new_folio(&mut self, owner: Owner) -> Option<FrameId> {
        let head = self.memory.allocate(self.shape.pmd_order, owner)?;
        for page in self.memory.pages_of(head) {
            self.memory.frame_mut(page).exclusive = true;
        }
        Some(head)
    }

    fn fault_file(
        &mut self,
        pid: Pid,
        page: u32,
        access: Access,
        vma: &Vma,
        file: FileId,
    ) -> Faulted {
        if access == Access::Read {
            self.fault_around(pid, page, vma, file);
            if self.entry(pid, page) != Entry::None {
                return Faulted::Retry;
            }
        }
        let frame = match self.cached_page(file, vma.index_of(page)) {
            Ok(Some(frame)) if !self.memory.frame(frame).poisoned => frame,
            Ok(_) => return Faulted::Refused(Signal::Bus),
            Err(NoFrame) => return Faulted::Refused(Signal::OutOfMemory),
        };
        let private_write = access == Access::Write && !vma.flags.has(VmFlags::SHARED);
        if private_write {
            return self.copy_cached(pid, page, frame, vma);
        }
        let bits = match access {
            Access::Read => Bits::YOUNG.with(Bits::SOFT_DIRTY),
            Access::Write => Self::fresh_bits(vma.flags),
        };
        self.replace(pid, page, Entry::Present(frame, bits));
        Faulted::Retry
    }

    /// A read fault maps the pages around it, too, that are in memory: [`AROUND`] pages from the
    /// start of the aligned piece on, or from that of the mapping, inside the mapping and the table.
    fn fault_around(&mut self, pid: Pid, page: u32, vma: &Vma, file: FileId) {
        let start = (page - page % AROUND).max(vma.pages.start);
        let around = Pages::new(start, start + AROUND).clip(vma.pages);
        for page in around.clip(self.shape.block_around(page)).iter() {
            let index = vma.index_of(page) as usize;
            let cached = self.file(file).pages.get(index).copied().flatten();
            let usable = cached.filter(|frame| !self.memory.frame(*frame).poisoned);
            if let Some(frame) = usable.filter(|_| self.entry(pid, page) == Entry::None) {
                let bits = Bits::YOUNG.with(Bits::SOFT_DIRTY);
                self.replace(pid, page, Entry::Present(frame, bits));
            }
        }
    }

    fn fault_block(&mut self, pid: Pid, page: u32, access: Access, block: Block) -> Faulted {
        match (block, access) {
            (Block::Device(head, _), _) => self.fault_device(head.plus(page % self.shape.block())),
            (_, Access::Read) => Faulted::Retry,
            (Block::Table, Access::Write) => Faulted::Retry,
            (Block::Zero(_), Access::Write) => self.copy_zero_block(pid, page, block),
            (Block::Huge(head, bits), Access::Write) => {
                let folio = *self.memory.frame(head);
                let alone = folio.exclusive || (folio.refs == 1 && folio.entire == 1);
                if alone {
                    for page in self.memory.pages_of(head) {
                        self.memory.frame_mut(page).exclusive = true;
                    }
                    self.set_bits(pid, page, bits.with(Bits::WRITE).with(Bits::DIRTY));
                } else if folio.owner == Owner::HugePages {
                    return self.copy_huge_page(page, head, block);
                } else {
                    // Copied page by page: a large copy is rarely worth its time.
                    self.split_block(pid, page);
                }
                Faulted::Retry
            }
        }
    }

    /// A write to a page of the pool that a child has, too.
    fn copy_huge_page(&mut self, page: u32, head: FrameId, old: Block) -> Faulted {
        let Some(new) = self.new_folio(Owner::HugePages) else {
            return Faulted::Refused(Signal::Bus);
        };
        for n in 0..self.shape.block() {
            self.memory.copy_content(head.plus(n), new.plus(n));
        }
        self.copied_block(page, old, new)
    }

    fn fault_swap(&mut self, pid: Pid, page: u32, slot: SlotId, bits: Bits) -> Faulted {
        let found = *self.swap.slot(slot);
        let (frame, exclusive) = match found.cache {
            Some(frame) if self.is_locked(frame) => return Faulted::Wait,
            Some(frame) => (frame, bits.has(Bits::EXCLUSIVE)),
            None => {
                let Some(frame) = self.new_page() else {
                    return Faulted::Refused(Signal::OutOfMemory);
                };
                let content = self.swap.content(slot);
                self.memory.content_mut(frame).copy_from_slice(content);
                if found.count > 1 {
                    self.cache_slot(slot, frame);
                }
                (frame, found.count == 1)
            }
        };
        if self.memory.frame(frame).poisoned {
            return Faulted::Refused(Signal::Bus);
        }
        self.map_swapped(pid, page, frame, bits, exclusive.into());
        if self.memory.folio(frame).swap == Some(slot) {
            self.try_free_slot(slot);
        }
        Faulted::Retry
    }

    /// Lets the other entries of a slot find the page that was just read.
    fn cache_slot(&mut self, slot: SlotId, frame: FrameId) {
        self.swap.slot_mut(slot).cache = Some(frame);
        self.memory.frame_mut(frame).swap = Some(slot);
        self.get(frame);
    }

    fn map_swapped(&mut self, pid: Pid, page: u32, frame: FrameId, bits: Bits, sole: Sole) {
        let flags = self
            .process(pid)
            .vmas
            .at(page)
            .map_or(VmFlags::NONE, |vma| vma.flags);
        self.memory.frame_mut(frame).exclusive = sole == Sole::Yes;
        let kept = bits.common(Bits::SOFT_DIRTY.with(Bits::UFFD_WP));
        let fresh = match sole {
            Sole::Yes => Self::fresh_bits(flags),
            Sole::No => Bits::YOUNG,
        };
        let fresh = fresh.without(Bits::SOFT_DIRTY).with(kept);
        self.replace(pid, page, Entry::Present(frame, fresh));
    }

    /// Gives the CPU its page back; what a device may do must have ended.
    pub fn restore_exclusive(&mut self, pid: Pid, page: u32) {
        let Entry::DeviceExclusive(frame, bits) = self.entry(pid, page) else {
            return;
        };
        let writable = self
            .process(pid)
            .vmas
            .at(page)
            .is_some_and(|vma| vma.flags.has(VmFlags::WRITE));
        let bits = if writable && self.memory.frame(frame).exclusive {
            bits.with(Bits::WRITE)
        } else {
            bits.without(Bits::WRITE)
        };
        self.replace(pid, page, Entry::Present(frame, bits));
    }
}

/// Whether a page belongs to one process alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sole {
    Yes,
    No,
}

impl From<bool> for Sole {
    fn from(sole: bool) -> Self {
        if sole { Self::Yes } else { Self::No }
    }
}

/// Whether a mapping allows a CPU access. On x86-64 whatever may be written or run may be read.
pub(crate) const fn allows(vma: &Vma, access: Access) -> bool {
    match access {
        Access::Read => vma.flags.any(VmFlags::RIGHTS),
        Access::Write => vma.flags.has(VmFlags::WRITE),
    }
}
