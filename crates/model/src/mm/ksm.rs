//! Merging of identical pages.

use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::{Around, MmapLock};
use crate::mm::cow::commit;
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::fault::Faulted;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::split_block;
use crate::mm::memory::{FrameId, Owner};
use crate::mm::{Machine, Pages, Pid};

/// A page of a process.
pub type Place = (Pid, u32);

/// Merges two pages that have the same content, as the kernel's scanner does: both lose the right
/// to be written, are compared, and the second gives way to the first. Returns whether it did.
pub fn merge<A: Around>(around: &A, first: Place, second: Place) -> bool {
    if first == second || !protect(around, first) || !protect(around, second) {
        return false;
    }
    let (pid, page) = second;
    let _lock = MmapLock::read(around, pid);
    let open = around.open(pid, Pages::one(page), InvalidateReason::Clear);
    around.step();
    let merged = around.with(|mm| mm.merge_pages(first, second));
    around.close(pid, open);
    merged
}

/// Takes the right to write from a page that may be merged.
fn protect<A: Around>(around: &A, (pid, page): Place) -> bool {
    let _lock = MmapLock::read(around, pid);
    if around.with(|mm| mm.block(pid, page)) != Block::Table {
        split_block(around, pid, page);
        around.with(|mm| mm.single_out(pid, page));
    }
    let open = around.open(pid, Pages::one(page), InvalidateReason::Clear);
    around.step();
    let done = around.with(|mm| mm.protect_mergeable((pid, page)).is_some());
    around.close(pid, open);
    done
}

/// `MADV_UNMERGEABLE`: merged pages become pages of their own again.
pub(crate) fn unmerge<A: Around>(around: &A, pid: Pid, pages: Pages) -> Result<(), Errno> {
    for page in pages.iter() {
        match around.with(|mm| mm.unshare_merged(pid, page)) {
            Faulted::Copy(copied) => commit(around, pid, copied),
            Faulted::Refused(_) => return Err(Errno::NoMem),
            Faulted::Retry
            | Faulted::Wait
            | Faulted::Device(_)
            | Faulted::Pager
            | Faulted::Exclusive => {}
        }
    }
    Ok(())
}

impl Machine {
    fn mergeable(&self, (pid, page): Place) -> Option<FrameId> {
        let vma = self.process(pid).vmas.at(page)?;
        let wanted = vma.flags.has(VmFlags::MERGEABLE) && self.block(pid, page) == Block::Table;
        let Entry::Present(frame, _) = self.entry(pid, page) else {
            return None;
        };
        let folio = self.memory.folio(frame);
        let kind = matches!(folio.owner, Owner::Anon | Owner::Ksm);
        let free = folio.order == 0 && folio.pins == 0 && folio.held == 0 && folio.swap.is_none();
        (wanted && kind && free && !self.is_locked(frame)).then_some(frame)
    }

    fn protect_mergeable(&mut self, place: Place) -> Option<FrameId> {
        let frame = self.mergeable(place)?;
        let (pid, page) = place;
        let bits = self.entry(pid, page).bits();
        self.memory.frame_mut(frame).exclusive = false;
        self.set_bits(pid, page, bits.without(Bits::WRITE));
        Some(frame)
    }

    fn merge_pages(&mut self, first: Place, second: Place) -> bool {
        let (Some(keep), Some(drop)) = (self.mergeable(first), self.mergeable(second)) else {
            return false;
        };
        let writable = |mm: &Self, (pid, page): Place| mm.entry(pid, page).bits().has(Bits::WRITE);
        let same = self.memory.content(keep) == self.memory.content(drop);
        if keep == drop || !same || writable(self, first) || writable(self, second) {
            return false;
        }
        self.memory.frame_mut(keep).exclusive = false;
        self.memory.frame_mut(keep).owner = Owner::Ksm;
        let (pid, page) = second;
        let bits = self.entry(pid, page).bits().without(Bits::WRITE);
        self.replace(pid, page, Entry::Present(keep, bits));
        true
    }

    fn unshare_merged(&mut self, pid: Pid, page: u32) -> Faulted {
        match self.entry(pid, page) {
            entry @ Entry::Present(frame, _) if self.memory.folio(frame).owner == Owner::Ksm => {
                self.copy_page(pid, page, entry)
            }
            Entry::None
            | Entry::Present(..)
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => Faulted::Retry,
        }
    }
}
