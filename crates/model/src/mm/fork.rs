//! `fork` and the end of a process.

use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::file::NoFrame;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::{split_block, unmap_locked};
use crate::mm::memory::{FrameId, Owner};
use crate::mm::vma::{Descent, Vma};
use crate::mm::{Machine, Pages, Pid, Table};

/// `fork`: a child with the same memory, copied when either writes.
///
/// # Errors
/// `EAGAIN` where there is no room for a process, `ENOMEM` where a pinned page cannot be copied.
pub fn fork<A: Around>(around: &A, parent: Pid) -> Result<Pid, Errno> {
    let _lock = MmapLock::write(around, parent);
    let child = around.with(Machine::new_process).ok_or(Errno::Again)?;
    let mut at = 0;
    while let Some(vma) = around.with(|mm| mm.process(parent).vmas.first_from(at).copied()) {
        at = vma.pages.end;
        if vma.flags.has(VmFlags::DONT_COPY) {
            continue;
        }
        let copied = around.with(|mm| mm.inherit(child, &vma));
        let wiped = around.with(|mm| mm.wipes(&vma));
        let needed = copied.anon.is_some() || vma.flags.has(VmFlags::MAYBE_GUARD);
        if needed && !wiped && copy_pages(around, parent, child, &vma).is_err() {
            let whole = around.with(|mm| Pages::new(0, mm.shape.pages));
            around.with(|mm| mm.process_mut(child).alive = false);
            unmap_locked(around, child, whole);
            return Err(Errno::NoMem);
        }
    }
    Ok(child)
}

/// Copies the entries of a mapping with anonymous memory; the parent's lose the right to write.
fn copy_pages<A: Around>(around: &A, parent: Pid, child: Pid, vma: &Vma) -> Result<(), NoFrame> {
    let open = around.open(parent, vma.pages, InvalidateReason::ProtectPage);
    around.with(|mm| mm.copy_tables(parent, child, vma.pages));
    let mut result = Ok(());
    let mut at = vma.pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(parent, at, vma.pages)) {
        around.step();
        if around.with(|mm| mm.pinned_block(parent, page)) {
            split_block(around, parent, page);
        }
        match around.with(|mm| mm.copy_entry(parent, child, page)) {
            Ok(next) => at = next,
            Err(NoFrame) => {
                result = Err(NoFrame);
                break;
            }
        }
    }
    around.close(parent, open);
    result
}

/// The end of a process: devices let go of it, then its mappings go.
pub fn exit<A: Around>(around: &A, pid: Pid) {
    let _lock = MmapLock::write(around, pid);
    let whole = around.with(|mm| {
        let whole = Pages::new(0, mm.shape.pages);
        let process = mm.process_mut(pid);
        // Nobody gets its number before all is done, even if it has no mapping.
        (process.alive, process.detached) = (false, whole);
        whole
    });
    let open = around.open(pid, whole, InvalidateReason::Release);
    around.close(pid, open);
    unmap_locked(around, pid, whole);
}

impl Machine {
    /// A process that has nothing yet, taken in the same step: another one may fork, too.
    fn new_process(&mut self) -> Option<Pid> {
        // One that is ending still takes its entries away.
        let dead = |pid: &Pid| {
            let process = self.process(*pid);
            !process.alive && process.vmas.all().is_empty() && process.detached.is_empty()
        };
        let child = self.pids().find(dead)?;
        self.process_mut(child).alive = true;
        Some(child)
    }

    /// Whether a child finds a mapping empty.
    fn wipes(&self, vma: &Vma) -> bool {
        vma.flags.has(VmFlags::WIPE_ON_FORK) && !self.has(Mutant::WipeForgotten)
    }

    /// Gives a child the mapping of its parent.
    fn inherit(&mut self, child: Pid, vma: &Vma) -> Vma {
        let wiped = self.wipes(vma);
        let anon = vma.anon.filter(|_| !wiped).map(|_| self.new_anon());
        let copy = Vma {
            flags: vma.flags.without(VmFlags::LOCKS.with(VmFlags::UFFD)),
            anon,
            descent: if anon.is_some() {
                Descent::ForkChild
            } else {
                Descent::Own
            },
            ..*vma
        };
        self.process_mut(child).vmas.insert_apart(copy);
        copy
    }

    /// A child gets tables where its parent has them, also empty ones.
    fn copy_tables(&mut self, parent: Pid, child: Pid, pages: Pages) {
        let first = self.shape.block_around(pages.start).start;
        for start in (first..pages.end).step_by(self.shape.block() as usize) {
            if self.has_table(parent, start) {
                self.set_table(child, start, Table::There);
            }
        }
    }

    fn pinned_block(&self, pid: Pid, page: u32) -> bool {
        match self.block(pid, page) {
            Block::Table | Block::Zero(_) | Block::Device(..) => false,
            Block::Huge(head, _) => self.memory.frame(head).pins > 0,
        }
    }

    /// Copies one entry, or one block entry. Returns the first page behind it.
    fn copy_entry(&mut self, parent: Pid, child: Pid, page: u32) -> Result<u32, NoFrame> {
        match self.block(parent, page) {
            Block::Table => {}
            Block::Zero(bits) => {
                let bits = bits.without(Bits::UFFD_WP);
                self.set_block(child, page, Block::Zero(bits));
            }
            Block::Huge(head, bits) | Block::Device(head, bits) => {
                for page in self.memory.pages_of(head) {
                    self.memory.frame_mut(page).exclusive = false;
                }
                let bits = bits.without(Bits::WRITE);
                self.set_bits(parent, page, bits);
                let start = self.shape.block_around(page).start;
                self.map_block(child, start, head, bits.without(Bits::UFFD_WP));
            }
        }
        if self.block(parent, page) != Block::Table {
            return Ok(self.after(parent, page));
        }
        self.restore_exclusive(parent, page);
        let old = self.entry(parent, page);
        let ours = old.bits().without(Bits::WRITE).without(Bits::EXCLUSIVE);
        let new = match old {
            Entry::None | Entry::UffdWp => Entry::None,
            Entry::Zero(_) | Entry::HwPoison(_) | Entry::Guard => old,
            Entry::Present(frame, _) if self.must_copy(frame) => self.copy_pinned(frame, old)?,
            Entry::Present(frame, _)
            | Entry::DevicePrivate(frame, _)
            | Entry::DeviceExclusive(frame, _) => {
                self.memory.frame_mut(frame).exclusive = false;
                if !self.has(Mutant::ForkStaysWritable) {
                    self.set_bits(parent, page, ours);
                }
                old.with_bits(ours)
            }
            Entry::Swap(..) | Entry::Migration(..) => {
                self.set_bits(parent, page, ours);
                old.with_bits(ours)
            }
        };
        let new = new.with_bits(new.bits().without(Bits::UFFD_WP));
        self.replace(child, page, new);
        if let (Entry::DevicePrivate(frame, _), Some(Mutant::ForkDropsReference)) =
            (new, self.mutant)
        {
            self.put(frame);
        }
        Ok(page + 1)
    }

    /// Whether the child gets a copy at once: the parent's page is pinned and stays the parent's.
    fn must_copy(&self, frame: FrameId) -> bool {
        let anon = self.memory.folio(frame).owner == Owner::Anon;
        anon && self.memory.frame(frame).exclusive && self.memory.folio(frame).pins > 0
    }

    fn copy_pinned(&mut self, frame: FrameId, old: Entry) -> Result<Entry, NoFrame> {
        let copy = self.new_page().ok_or(NoFrame)?;
        self.memory.copy_content(frame, copy);
        Ok(Entry::Present(copy, old.bits()))
    }
}
