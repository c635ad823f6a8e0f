//! Protection against stores by userfaultfd: a bit of every entry, and markers where there is no page.
//! Who registers wants markers in private memory, too (`UFFD_FEATURE_WP_UNPOPULATED`), and no events.

use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::{split_block, split_blocks};
use crate::mm::protect::{change_flags, for_each_part};
use crate::mm::{Machine, Pages, Pid};

/// What becomes of stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// They wait until the program allows them.
    Wait,
    /// They go on.
    Go,
}

/// The program serves such faults from now on (`UFFDIO_REGISTER`).
///
/// # Errors
/// `EINVAL` where not all of it is mapped, or of a kind that cannot be served.
pub fn register<A: Around>(
    around: &A,
    pid: Pid,
    pages: Pages,
    faults: VmFlags,
) -> Result<(), Errno> {
    let _lock = MmapLock::write(around, pid);
    let missing = faults.has(VmFlags::UFFD_MISSING);
    for_each_part(around, pid, pages, |part| {
        let raw = part.flags.any(VmFlags::PFN_MAP.with(VmFlags::HUGETLB));
        if raw || (missing && !part.is_anon()) {
            return Err(Errno::Invalid);
        }
        change_flags(around, pid, part.pages, part.flags.with(faults));
        Ok(())
    })
    .map_err(|_hole| Errno::Invalid)
}

/// It serves none any more: protections end (`UFFDIO_UNREGISTER`). Holes are passed over.
pub fn unregister<A: Around>(around: &A, pid: Pid, pages: Pages) {
    let _lock = MmapLock::write(around, pid);
    for page in pages.iter() {
        let vma = around.with(|mm| mm.process(pid).vmas.at(page).copied());
        let Some(vma) = vma.filter(|vma| vma.flags.any(VmFlags::UFFD)) else {
            continue;
        };
        let part = vma.part(Pages::new(page, pages.end)).pages;
        let flags = vma.flags.without(VmFlags::UFFD);
        change_stores(around, pid, part, Stores::Go);
        change_flags(around, pid, part, flags);
    }
}

/// Protects pages against stores, or allows them again (`UFFDIO_WRITEPROTECT`). What lies before a
/// refusal is changed.
///
/// # Errors
/// `ENOENT` where stores are not served.
pub fn write_protect<A: Around>(
    around: &A,
    pid: Pid,
    pages: Pages,
    stores: Stores,
) -> Result<(), Errno> {
    let _lock = MmapLock::read(around, pid);
    for_each_part(around, pid, pages, |part| {
        if !part.flags.has(VmFlags::UFFD_WP) {
            return Err(Errno::NoEnt);
        }
        change_stores(around, pid, part.pages, stores);
        Ok(())
    })
    .map_err(|_hole| Errno::NoEnt)
}

fn change_stores<A: Around>(around: &A, pid: Pid, pages: Pages, stores: Stores) {
    split_blocks(around, pid, pages);
    let open = around.open(pid, pages, InvalidateReason::ProtectVma);
    let mut at = pages.start;
    while at < pages.end {
        around.step();
        // A fault may have brought a block in meanwhile, of which only a part changes.
        let changed = around.with(|mm| {
            let whole = !mm.sticks_out(pid, at, pages);
            whole.then(|| match stores {
                Stores::Wait => mm.protect_from_stores(pid, at),
                Stores::Go => mm.allow_stores(pid, at),
            })
        });
        match changed {
            Some(next) => at = next,
            None => split_block(around, pid, at),
        }
    }
    around.close(pid, open);
}

impl Machine {
    /// Protects a page or a block. Returns the first page behind it.
    pub(crate) fn protect_from_stores(&mut self, pid: Pid, page: u32) -> u32 {
        let nothing = self.block(pid, page) == Block::Table && self.entry(pid, page) == Entry::None;
        if nothing {
            self.replace(pid, page, Entry::UffdWp);
        } else {
            let bits = self.entry(pid, page).bits();
            let bits = bits.with(Bits::UFFD_WP).without(Bits::WRITE);
            self.set_bits(pid, page, bits);
        }
        self.after(pid, page)
    }

    /// Ends it. The right to store comes back with the next fault.
    fn allow_stores(&mut self, pid: Pid, page: u32) -> u32 {
        let entry = self.entry(pid, page);
        if entry == Entry::UffdWp {
            self.replace(pid, page, Entry::None);
        } else {
            self.set_bits(pid, page, entry.bits().without(Bits::UFFD_WP));
        }
        self.after(pid, page)
    }
}
