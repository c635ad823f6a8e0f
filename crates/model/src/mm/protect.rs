//! `mprotect`, `mlock` and `munlock`.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::flags::{Bits, Prot, VmFlags};
use crate::mm::map::{cut, populate, populate_some, split_blocks};
use crate::mm::vma::Vma;
use crate::mm::{Machine, Pages, Pid};

/// `mprotect`. What lies before a hole or a refusal is changed all the same.
///
/// # Errors
/// As the system call.
pub fn mprotect<A: Around>(
    around: &A,
    pid: Pid,
    at: HostVa,
    len: u64,
    prot: Prot,
) -> Result<(), Errno> {
    if !at.is_aligned(PAGE) {
        return Err(Errno::Invalid);
    }
    let pages = around
        .with(|mm| mm.argument(at, len))
        .map_err(|_end| Errno::NoMem)?;
    if pages.is_empty() {
        return Ok(());
    }
    let mut locked = Vec::new();
    let lock = MmapLock::write(around, pid);
    around.with(|mm| mm.check_huge_pages(pid, pages))?;
    let result = for_each_part(around, pid, pages, |part| {
        let may = part.flags.common(VmFlags::MAY);
        let allowed = [
            (VmFlags::READ, VmFlags::MAY_READ),
            (VmFlags::WRITE, VmFlags::MAY_WRITE),
            (VmFlags::EXEC, VmFlags::MAY_EXEC),
        ];
        if allowed
            .iter()
            .any(|(right, need)| prot.has(*right) && !may.has(*need))
        {
            return Err(Errno::Access);
        }
        let rights = prot.common(VmFlags::RIGHTS);
        let flags = part.flags.without(VmFlags::RIGHTS).with(rights);
        if flags != part.flags {
            let flags = accounted(&part, flags);
            change_flags(around, pid, part.pages, flags);
            protect_pages(around, pid, part.pages, flags);
            if becomes_writable(part.flags, flags) {
                // Its pages come when the lock is gone, but what it merges with is decided now.
                around.with(|mm| mm.prepare_anon(pid, part.pages.start));
                locked.push(part.pages);
            }
        }
        Ok(())
    });
    drop(lock);
    for pages in locked {
        populate_some(around, pid, pages);
    }
    result
}

/// The flags with what accounting makes of them: memory that may be written is accounted for, and
/// stays so once it was.
fn accounted(part: &Vma, flags: VmFlags) -> VmFlags {
    let before = VmFlags::ACCOUNT.with(VmFlags::WRITE).with(VmFlags::SHARED);
    if flags.has(VmFlags::WRITE) && !part.flags.any(before) {
        flags.with(VmFlags::ACCOUNT)
    } else if !flags.has(VmFlags::WRITE) && part.is_anon() && part.anon.is_none() {
        flags.without(VmFlags::ACCOUNT)
    } else {
        flags
    }
}

/// Whether pages of a locked mapping are to be copied now and not at the next store.
const fn becomes_writable(old: VmFlags, new: VmFlags) -> bool {
    let own = !old.any(VmFlags::WRITE.with(VmFlags::SHARED));
    own && old.has(VmFlags::LOCKED) && new.has(VmFlags::WRITE)
}

/// Visits the parts of mappings in `pages`, in order, until one refuses or a hole comes.
pub(crate) fn for_each_part<A: Around>(
    around: &A,
    pid: Pid,
    pages: Pages,
    mut visit: impl FnMut(Vma) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut at = pages.start;
    while at < pages.end {
        let vma = around.with(|mm| mm.process(pid).vmas.at(at).copied());
        let part = vma.ok_or(Errno::NoMem)?.part(Pages::new(at, pages.end));
        at = part.pages.end;
        visit(part)?;
    }
    Ok(())
}

/// Gives a piece of a mapping other flags, cutting and merging as need be.
pub(crate) fn change_flags<A: Around>(around: &A, pid: Pid, pages: Pages, flags: VmFlags) {
    cut(around, pid, pages);
    around.with(|mm| mm.process_mut(pid).vmas.set_flags(pages.start, flags));
}

/// Takes rights from entries, and gives those that need no fault.
fn protect_pages<A: Around>(around: &A, pid: Pid, pages: Pages, flags: VmFlags) {
    let open = around.open(pid, pages, InvalidateReason::ProtectVma);
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        around.step();
        at = around.with(|mm| mm.protect(pid, page, flags));
    }
    around.close(pid, open);
}

/// `mlock`.
///
/// # Errors
/// As the system call.
pub fn mlock<A: Around>(around: &A, pid: Pid, at: HostVa, len: u64) -> Result<(), Errno> {
    let pages = lock_flags(around, pid, at, len, VmFlags::LOCKED)?;
    for page in pages.iter() {
        populate(around, pid, page).map_err(|_signal| Errno::NoMem)?;
    }
    Ok(())
}

/// `munlock`.
///
/// # Errors
/// As the system call.
pub fn munlock<A: Around>(around: &A, pid: Pid, at: HostVa, len: u64) -> Result<(), Errno> {
    lock_flags(around, pid, at, len, VmFlags::NONE).map(|_pages| ())
}

/// Both round the span outward, unlike other calls.
fn lock_flags<A: Around>(
    around: &A,
    pid: Pid,
    at: HostVa,
    len: u64,
    locks: VmFlags,
) -> Result<Pages, Errno> {
    let start = at.align_down(PAGE);
    // Lengths wrap around zero unnoticed, and then there is nothing to do.
    let len = len.wrapping_add(at.offset_from(start) + PAGE - 1) & !(PAGE - 1);
    let pages = around.with(|mm| mm.argument(start, len))?;
    let _lock = MmapLock::write(around, pid);
    for_each_part(around, pid, pages, |part| {
        let flags = part.flags.without(VmFlags::LOCKS).with(locks);
        let special = part.flags.any(VmFlags::PFN_MAP);
        if flags != part.flags && !special {
            change_flags(around, pid, part.pages, flags);
        }
        Ok(())
    })?;
    Ok(pages)
}

/// Brings the pages of a locked mapping in after it grew or moved.
pub(crate) fn populate_locked<A: Around>(around: &A, pid: Pid, pages: Pages) {
    let locked = |mm: &mut Machine| {
        let vma = mm.process(pid).vmas.at(pages.start);
        vma.is_some_and(|vma| vma.flags.has(VmFlags::LOCKED))
    };
    if around.with(locked) {
        populate_some(around, pid, pages);
    }
}

/// Soft-dirty bits of a process are cleared (`clear_refs`): every later write is seen by them.
pub fn clear_soft_dirty<A: Around>(around: &A, pid: Pid) {
    let _lock = MmapLock::write(around, pid);
    let pages = around.with(|mm| {
        mm.process_mut(pid).vmas.clear_soft_dirty();
        Pages::new(0, mm.shape.pages)
    });
    split_blocks(around, pid, pages);
    let open = around.open(pid, pages, InvalidateReason::ProtectPage);
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        around.step();
        at = around.with(|mm| mm.clear_soft_dirty(pid, page));
    }
    around.close(pid, open);
}

impl Machine {
    /// The first page behind the entry at `page`.
    pub(crate) fn after(&self, pid: Pid, page: u32) -> u32 {
        match self.block(pid, page) {
            Block::Table => page + 1,
            Block::Huge(..) | Block::Device(..) | Block::Zero(_) => {
                self.shape.block_around(page).end
            }
        }
    }

    /// Fits an entry to the flags of its mapping. Returns the first page behind it.
    fn protect(&mut self, pid: Pid, page: u32, flags: VmFlags) -> u32 {
        let entry = self.entry(pid, page);
        let bits = entry.bits();
        let writable = flags.has(VmFlags::WRITE);
        let new = match entry {
            Entry::Present(frame, _) if writable && !bits.has(Bits::UFFD_WP) => {
                let shared = flags.has(VmFlags::SHARED) && bits.has(Bits::DIRTY);
                let own = !flags.has(VmFlags::SHARED) && self.memory.frame(frame).exclusive;
                if shared || own {
                    bits.with(Bits::WRITE)
                } else {
                    bits
                }
            }
            Entry::Present(..) | Entry::Migration(..) | Entry::DevicePrivate(..) if !writable => {
                bits.without(Bits::WRITE)
            }
            Entry::Present(..)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::None
            | Entry::Zero(_)
            | Entry::Swap(..)
            | Entry::HwPoison(_)
            | Entry::Guard
            | Entry::UffdWp => bits,
        };
        self.set_bits(pid, page, new);
        self.after(pid, page)
    }

    fn clear_soft_dirty(&mut self, pid: Pid, page: u32) -> u32 {
        let bits = self.entry(pid, page).bits().without(Bits::SOFT_DIRTY);
        let present = matches!(self.entry(pid, page), Entry::Present(..));
        let bits = if present {
            bits.without(Bits::WRITE)
        } else {
            bits
        };
        self.set_bits(pid, page, bits);
        self.after(pid, page)
    }
}
