//! Copy on write: who may write a page as it is, and what happens to others.
//!
//! A copy is made outside of any bracket and put into place inside one, if the entry is still the
//! one that was copied.

use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::Around;
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Signal;
use crate::mm::fault::Faulted;
use crate::mm::flags::VmFlags;
use crate::mm::memory::{FrameId, Owner};
use crate::mm::vma::Vma;
use crate::mm::{Machine, Pages, Pid};

/// A page that was copied for a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The entry that was copied; if it has changed, the copy is for nothing.
    old: Source,
    /// The copy.
    new: FrameId,
    /// The pages it is for.
    pub pages: Pages,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Page(Entry),
    Block(Block),
}

/// Puts a copy into its place; the device's right to the old page ends first.
pub(crate) fn commit<A: Around>(around: &A, pid: Pid, copied: Copied) {
    let open = around.open(pid, copied.pages, InvalidateReason::Clear);
    around.step();
    around.with(|mm| mm.commit_copy(pid, copied));
    around.close(pid, open);
}

impl Machine {
    /// A first write to a private file mapping goes to a copy at once.
    pub(crate) fn copy_cached(
        &mut self,
        pid: Pid,
        page: u32,
        cached: FrameId,
        vma: &Vma,
    ) -> Faulted {
        self.prepare_anon(pid, page);
        let Some(frame) = self.new_page() else {
            return Faulted::Refused(Signal::OutOfMemory);
        };
        self.memory.copy_content(cached, frame);
        self.replace(
            pid,
            page,
            Entry::Present(frame, Self::fresh_bits(vma.flags)),
        );
        Faulted::Retry
    }

    /// A write to a page that is present and must not be written as it is.
    pub(crate) fn fault_protected(&mut self, pid: Pid, page: u32, vma: &Vma) -> Faulted {
        let entry = self.entry(pid, page);
        let Entry::Present(frame, bits) = entry else {
            return Faulted::Retry;
        };
        let shared = vma.flags.has(VmFlags::SHARED);
        if shared || self.may_reuse(frame) {
            self.set_bits(pid, page, bits.with(Self::fresh_bits(vma.flags)));
            return Faulted::Retry;
        }
        self.copy_page(pid, page, entry)
    }

    /// Whether a process that maps an anonymous page may write it without a copy.
    fn may_reuse(&mut self, frame: FrameId) -> bool {
        let folio = *self.memory.folio(frame);
        if !matches!(folio.owner, Owner::Anon | Owner::Device(..)) {
            return false;
        }
        if self.memory.frame(frame).exclusive {
            return true;
        }
        if self.is_locked(frame) {
            return false;
        }
        if let Some(slot) = folio.swap {
            self.try_free_slot(slot);
        }
        let folio = *self.memory.folio(frame);
        let alone = folio.order == 0 && folio.refs == 1 && folio.swap.is_none();
        if alone {
            self.memory.frame_mut(frame).exclusive = true;
        }
        alone
    }

    /// Copies a page for a writer.
    pub(crate) fn copy_page(&mut self, pid: Pid, page: u32, old: Entry) -> Faulted {
        self.prepare_anon(pid, page);
        let Some(new) = self.new_page() else {
            return Faulted::Refused(Signal::OutOfMemory);
        };
        if let Entry::Present(frame, _) = old {
            self.memory.copy_content(frame, new);
        }
        Faulted::Copy(Copied {
            old: Source::Page(old),
            new,
            pages: Pages::one(page),
        })
    }

    /// Puts a copy into its place if the entry is still the one that was copied.
    pub fn commit_copy(&mut self, pid: Pid, copied: Copied) {
        let page = copied.pages.start;
        let flags = self.process(pid).vmas.at(page).map(|vma| vma.flags);
        let bits = Self::fresh_bits(flags.unwrap_or_default());
        match copied.old {
            Source::Page(old) => {
                let table = self.block(pid, page) == Block::Table;
                if table && self.entry(pid, page) == old {
                    self.replace(pid, page, Entry::Present(copied.new, bits));
                }
            }
            Source::Block(old) if self.block(pid, page) == old => {
                self.unmap_block(pid, page);
                self.map_block(pid, page, copied.new, bits);
            }
            Source::Block(_) => {}
        }
        self.discard_new(copied.new);
    }

    /// A copy of a whole block is ready.
    pub(crate) fn copied_block(&self, page: u32, old: Block, new: FrameId) -> Faulted {
        Faulted::Copy(Copied {
            old: Source::Block(old),
            new,
            pages: self.shape.block_around(page),
        })
    }

    pub(crate) fn copy_zero_block(&mut self, pid: Pid, page: u32, old: Block) -> Faulted {
        match self.new_block() {
            Some(new) => Faulted::Copy(Copied {
                old: Source::Block(old),
                new,
                pages: self.shape.block_around(page),
            }),
            None => {
                self.split_block(pid, page);
                Faulted::Retry
            }
        }
    }
}
