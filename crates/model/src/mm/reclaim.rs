//! Reclaim, swap, memory errors and page pins.
//!
//! Only anonymous pages are reclaimed; those of files stay, unless an advice (`idle`) names them. A
//! page leaves in steps: it is locked and gets a slot, its mappings go one by one, each in a bracket
//! of its own, and it is free when nobody else had a reference. Otherwise it stays in the swap cache.

use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::{Access, InvalidateReason};

use crate::mm::around::{Around, MmapLock, Waited};
use crate::mm::cow::commit;
use crate::mm::entry::{Entry, SlotId};
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::{Faulted, Hit, fault};
use crate::mm::file::FileId;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::split_block;
use crate::mm::memory::{DevicePage, FolioFlags, FrameId, Owner};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::thp::Split;
use crate::mm::{Machine, Pages, Pid};

/// What a page in reclaim leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    /// Its content goes to this slot.
    Slot(SlotId),
    /// Nothing: it was freed lazily.
    Nothing,
}

/// Tries to free the page in `frame`, which no process may have mapped at all. Returns whether it
/// is free now.
pub fn reclaim<A: Around>(around: &A, frame: FrameId) -> bool {
    make_small(around, frame);
    let Some(leaves) = around.with(|mm| mm.begin_reclaim(frame)) else {
        return false;
    };
    unmap_all(around, frame, |mm, mapping| {
        mm.unmap_reclaimed(frame, mapping, leaves)
    });
    around.step();
    let freed = around.with(|mm| mm.finish_reclaim(frame, leaves));
    around.announce();
    freed
}

/// Splits a large folio into single pages, entries first.
pub(crate) fn make_small<A: Around>(around: &A, frame: FrameId) {
    split_large(around, frame, Split::Uniform);
}

/// Splits a large folio, entries first.
pub(crate) fn split_large<A: Around>(around: &A, frame: FrameId, how: Split) {
    if around.with(|mm| mm.memory.folio(frame).owner == Owner::HugePages) {
        return;
    }
    let block = |mm: &mut Machine| {
        let mut mappings = mm.rmaps.of(&mm.memory, mm.memory.head(frame));
        mappings.find(|mapping| mapping.level == Level::Block)
    };
    while let Some(mapping) = around.with(block) {
        split_block(around, mapping.pid, mapping.page);
    }
    around.with(|mm| mm.split_folio(frame, how));
}

/// Visits every mapping that a page has, each inside a bracket, until `unmap` has dealt with all
/// or refuses one.
pub(crate) fn unmap_all<A: Around>(
    around: &A,
    frame: FrameId,
    mut unmap: impl FnMut(&mut Machine, Mapping) -> Unmapped,
) {
    while let Some(mapping) = around.with(|mm| mm.next_mapping(frame)) {
        let open = around.open(
            mapping.pid,
            Pages::one(mapping.page),
            InvalidateReason::Clear,
        );
        around.step();
        let done = around.with(|mm| unmap(mm, mapping));
        around.close(mapping.pid, open);
        if done == Unmapped::Stays {
            return;
        }
    }
}

/// What became of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmapped {
    /// It is gone, or was gone.
    Gone,
    /// It has to stay: the page cannot go.
    Stays,
}

/// A memory error in a page, of a device's memory, too: its processes lose it, and nobody gets it
/// again. Pages of the pool of huge pages have none.
pub fn poison<A: Around>(around: &A, frame: FrameId) {
    if around.with(|mm| mm.memory.folio(frame).owner == Owner::HugePages) {
        return;
    }
    // What comes home meanwhile may be one block again.
    loop {
        make_small(around, frame);
        if around.with(|mm| mm.mark_poisoned(frame)) {
            break;
        }
    }
    unmap_all(around, frame, |mm, mapping| {
        let entry = mm.entry(mapping.pid, mapping.page);
        if entry.mapped_frame() == Some(frame) {
            mm.replace(mapping.pid, mapping.page, Entry::HwPoison(frame));
        }
        Unmapped::Gone
    });
    around.with(|mm| mm.unhold(frame));
    around.announce();
}

/// Plays a memory error (`MADV_HWPOISON`) in a page of host memory, which is brought in as for a load. Who
/// moves it at the time is waited for.
///
/// # Errors
/// `EFAULT` where a load gets a signal, `ENOMEM`; `EBUSY` for pages that nobody can lose: that of zeros,
/// and those of a large page that does not split; `ENXIO` for device memory.
pub fn inject_error<A: Around>(around: &A, pid: Pid, page: u32) -> Result<(), Errno> {
    let frame = seize(around, pid, page)?;
    poison(around, frame);
    around.with(|mm| mm.let_go(frame));
    around.announce();
    Ok(())
}

/// Finds a page, locks and holds it.
fn seize<A: Around>(around: &A, pid: Pid, page: u32) -> Result<FrameId, Errno> {
    loop {
        let seen = around.changes();
        fault(around, pid, page, Access::Read).map_err(|signal| match signal {
            Signal::OutOfMemory => Errno::NoMem,
            Signal::Segv | Signal::Bus => Errno::Fault,
        })?;
        let frame = match around.with(|mm| mm.access(pid, page, Access::Read)) {
            Some(Hit::Frame(frame)) => frame,
            Some(Hit::Zero) => return Err(Errno::Busy),
            None => continue,
        };
        make_small(around, frame);
        match around.with(|mm| mm.seize(pid, page, frame))? {
            Seized::Yes => return Ok(frame),
            Seized::Moved => {}
            Seized::Locked if around.wait(seen) == Waited::Hopeless => return Err(Errno::Busy),
            Seized::Locked => {}
        }
    }
}

/// What came of locking a page.
enum Seized {
    Yes,
    /// The page is somewhere else by now.
    Moved,
    /// Somebody else is at work on it.
    Locked,
}

/// Pins the page at `page` for a device or a system call; it is faulted in like a CPU access. A
/// page of the process's own that others share is copied first, so that the pin sees what the
/// process sees from then on.
///
/// # Errors
/// The signal that the access would raise; `SIGBUS` for the page of zeros, which has no owner.
pub fn pin<A: Around>(around: &A, pid: Pid, page: u32, access: Access) -> Result<FrameId, Signal> {
    loop {
        let seen = around.changes();
        fault(around, pid, page, access)?;
        let lock = MmapLock::read(around, pid);
        match around.with(|mm| mm.pin(pid, page, access)) {
            Pinned::Yes(frame) => return Ok(frame),
            Pinned::Shared(entry) => match around.with(|mm| mm.copy_page(pid, page, entry)) {
                Faulted::Copy(copied) => commit(around, pid, copied),
                Faulted::Refused(signal) => return Err(signal),
                Faulted::Retry
                | Faulted::Wait
                | Faulted::Device(_)
                | Faulted::Pager
                | Faulted::Exclusive => {}
            },
            Pinned::Device(device) => {
                drop(lock);
                around.device_fault(pid, device, page, seen)?;
            }
            Pinned::Zero => return Err(Signal::Bus),
            Pinned::Gone => {}
        }
    }
}

/// What came of pinning a page.
enum Pinned {
    Yes(FrameId),
    /// Others have it, too: it must be copied first.
    Shared(Entry),
    /// It is in coherent device memory, where nothing stays for long.
    Device(DevicePage),
    /// Nobody owns it.
    Zero,
    /// It has gone meanwhile.
    Gone,
}

/// Ends a pin.
pub fn unpin<A: Around>(around: &A, frame: FrameId) {
    around.with(|mm| {
        mm.memory.folio_mut(frame).pins -= 1;
        mm.put(frame);
    });
    around.announce();
}

impl Machine {
    /// A mapping of the page by an entry that counts as one.
    fn next_mapping(&self, frame: FrameId) -> Option<Mapping> {
        let counts =
            |mapping: &Mapping| self.entry(mapping.pid, mapping.page).mapped_frame() == Some(frame);
        self.rmaps.of(&self.memory, frame).find(counts)
    }

    /// Drops a page of a file that is as it was when it was read in, and that nobody uses.
    pub(crate) fn drop_clean(&mut self, frame: FrameId) {
        let folio = *self.memory.folio(frame);
        if let (Owner::File(file, index), 1) = (folio.owner, folio.refs)
            && !folio.flags.has(FolioFlags::DIRTY)
        {
            self.drop_cached(FileId(file), index);
        }
    }

    fn begin_reclaim(&mut self, frame: FrameId) -> Option<Leaves> {
        let folio = *self.memory.folio(frame);
        let usable = folio.owner == Owner::Anon && folio.order == 0 && folio.pins == 0;
        let busy = folio.held > 0 || self.memory.frame(frame).poisoned;
        if !usable || busy || !self.try_lock(frame) {
            return None;
        }
        if folio.flags.has(FolioFlags::LAZYFREE) {
            self.hold(frame);
            return Some(Leaves::Nothing);
        }
        let Some(slot) = folio.swap.or_else(|| self.swap.allocate(frame)) else {
            self.unlock(frame);
            return None;
        };
        if folio.swap.is_none() {
            self.memory.frame_mut(frame).swap = Some(slot);
            self.get(frame);
        }
        self.hold(frame);
        Some(Leaves::Slot(slot))
    }

    fn unmap_reclaimed(&mut self, frame: FrameId, mapping: Mapping, leaves: Leaves) -> Unmapped {
        let Mapping { pid, page, .. } = mapping;
        let entry = self.entry(pid, page);
        if entry.mapped_frame() != Some(frame) {
            return Unmapped::Gone;
        }
        let bits = entry.bits();
        let locked = self
            .process(pid)
            .vmas
            .at(page)
            .is_some_and(|vma| vma.flags.has(VmFlags::LOCKED));
        // It may have been pinned since it was chosen: who owns it would lose sight of what the pin writes.
        let pinned = self.memory.folio(frame).pins > 0 && self.memory.frame(frame).exclusive;
        if locked || (pinned && self.mutant != Some(Mutant::PinnedReclaimed)) {
            return Unmapped::Stays;
        }
        // By a CPU, or by a device: either may have come since it was chosen.
        let written =
            bits.has(Bits::DIRTY) || self.memory.folio(frame).flags.has(FolioFlags::DIRTY);
        let new = match leaves {
            Leaves::Nothing if written => {
                let folio = self.memory.folio_mut(frame);
                folio.flags = folio.flags.without(FolioFlags::LAZYFREE);
                return Unmapped::Stays;
            }
            Leaves::Nothing => Entry::None,
            Leaves::Slot(slot) => {
                let kept = bits.common(Bits::SOFT_DIRTY.with(Bits::UFFD_WP));
                let sole = self.memory.frame(frame).exclusive;
                let sole = if sole { Bits::EXCLUSIVE } else { Bits::NONE };
                Entry::Swap(slot, kept.with(sole))
            }
        };
        self.replace(pid, page, new);
        Unmapped::Gone
    }

    /// Writes the page out if nobody else refers to it. Returns whether it is free.
    fn finish_reclaim(&mut self, frame: FrameId, leaves: Leaves) -> bool {
        let folio = *self.memory.folio(frame);
        let cached = u32::from(folio.swap.is_some());
        let alone = folio.refs == folio.held + cached && folio.held == 1;
        if let (Leaves::Slot(slot), true) = (leaves, alone) {
            let content = self.memory.content(frame);
            self.swap.content_mut(slot).copy_from_slice(content);
            self.uncache_slot(slot, frame);
        }
        self.unlock(frame);
        if let Leaves::Slot(slot) = leaves {
            self.try_free_slot(slot);
        }
        self.unhold(frame);
        alone
    }

    /// Marks a page, unless block entries map it. Returns whether it did.
    fn mark_poisoned(&mut self, frame: FrameId) -> bool {
        if self.memory.folio(frame).entire > 0 {
            return false;
        }
        self.hold(frame);
        self.memory.frame_mut(frame).poisoned = true;
        true
    }

    fn seize(&mut self, pid: Pid, page: u32, frame: FrameId) -> Result<Seized, Errno> {
        if !matches!(self.entry(pid, page), Entry::Present(found, _) if found == frame) {
            return Ok(Seized::Moved);
        }
        if self.memory.is_device(frame) {
            return Err(Errno::NxIo);
        }
        if self.memory.folio(frame).order > 0 {
            return Err(Errno::Busy);
        }
        if !self.try_lock(frame) {
            return Ok(Seized::Locked);
        }
        self.hold(frame);
        Ok(Seized::Yes)
    }

    /// Takes the pin, if the page is still what the access needs and belongs to nobody else.
    fn pin(&mut self, pid: Pid, page: u32, access: Access) -> Pinned {
        match self.access(pid, page, access) {
            None => Pinned::Gone,
            Some(Hit::Zero) => Pinned::Zero,
            Some(Hit::Frame(frame)) => {
                if let Some(device) = self.memory.device_page(frame) {
                    return Pinned::Device(device);
                }
                let anon = matches!(self.memory.folio(frame).owner, Owner::Anon | Owner::Ksm);
                if anon && !self.memory.frame(frame).exclusive {
                    return Pinned::Shared(self.entry(pid, page));
                }
                self.memory.folio_mut(frame).pins += 1;
                self.get(frame);
                Pinned::Yes(frame)
            }
        }
    }
}
