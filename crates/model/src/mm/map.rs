//! `mmap` and `munmap`, and the pieces that other calls share with them: cutting mappings at a
//! border, emptying a span of page tables.

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::mm::{Access, InvalidateReason};

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::Block;
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::fault;
use crate::mm::file::{FileId, Named};
use crate::mm::flags::{Prot, VmFlags};
use crate::mm::table::Zap;
use crate::mm::vma::{Backing, Descent, Left, Vma};
use crate::mm::{Machine, Pages, Pid};

/// Where a new mapping goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// There if nothing is in the way, otherwise anywhere.
    Hint(HostVa),
    /// There; what is in the way goes (`MAP_FIXED`).
    Fixed(HostVa),
    /// There, or not at all (`MAP_FIXED_NOREPLACE`).
    NoReplace(HostVa),
}

/// What is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Private anonymous memory.
    Private,
    /// Anonymous memory shared with children.
    Shared,
    /// A file from this page on, writes go to copies.
    PrivateFile(FileId, u32),
    /// A file from this page on.
    SharedFile(FileId, u32),
    /// Raw pages, as of a device.
    Special,
    /// Huge pages.
    Hugetlb,
}

/// Arguments of `mmap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Where.
    pub place: Place,
    /// Bytes, rounded up to pages.
    pub len: u64,
    /// Rights.
    pub prot: Prot,
    /// What.
    pub what: What,
    /// Further flags of the mapping from its start, such as [`VmFlags::LOCKED`].
    pub extra: VmFlags,
}

/// `mmap`.
///
/// # Errors
/// As the system call.
pub fn mmap<A: Around>(around: &A, pid: Pid, map: &Map) -> Result<HostVa, Errno> {
    let pages = {
        let _lock = MmapLock::write(around, pid);
        let pages = around.with(|mm| mm.find_place(pid, map))?;
        if around.with(|mm| mm.is_mapped(pid, pages)) {
            unmap_locked(around, pid, pages);
        }
        around.with(|mm| mm.insert_new(pid, pages, map))?;
        pages
    };
    if map.extra.has(VmFlags::LOCKED) {
        populate_some(around, pid, pages);
    }
    Ok(around.with(|mm| mm.shape.address(pages.start)))
}

/// `munmap`.
///
/// # Errors
/// As the system call.
pub fn munmap<A: Around>(around: &A, pid: Pid, at: HostVa, len: u64) -> Result<(), Errno> {
    let pages = around.with(|mm| mm.argument(at, len))?;
    if pages.is_empty() || pages.end > around.with(|mm| mm.shape.pages) {
        return Err(Errno::Invalid);
    }
    let _lock = MmapLock::write(around, pid);
    around.with(|mm| mm.check_huge_pages(pid, pages))?;
    unmap_locked(around, pid, pages);
    Ok(())
}

/// Takes mappings away; the mmap lock is held.
pub(crate) fn unmap_locked<A: Around>(around: &A, pid: Pid, pages: Pages) {
    let pages = around.with(|mm| pages.clip(Pages::new(0, mm.shape.pages)));
    cut(around, pid, pages);
    let gone = around.with(|mm| {
        let process = mm.process_mut(pid);
        process.detached = pages;
        process.vmas.remove(pages)
    });
    if !gone.is_empty() {
        zap_pages(around, pid, pages, Zap::All, InvalidateReason::Unmap);
    }
    around.with(|mm| {
        mm.process_mut(pid).detached = Pages::new(0, 0);
        for vma in &gone {
            mm.drop_unmapped_tables(pid, vma.pages);
        }
        mm.forget(&gone);
    });
}

/// Cuts mappings at both ends of `pages`, and large pages that lie across.
pub(crate) fn cut<A: Around>(around: &A, pid: Pid, pages: Pages) {
    split_blocks(around, pid, pages);
    around.with(|mm| {
        let vmas = &mut mm.process_mut(pid).vmas;
        vmas.split(pages.start);
        vmas.split(pages.end);
    });
}

/// Replaces block entries that stick out of `pages` by small ones.
pub(crate) fn split_blocks<A: Around>(around: &A, pid: Pid, pages: Pages) {
    for page in [pages.start, pages.end.saturating_sub(1)] {
        if around.with(|mm| mm.sticks_out(pid, page, pages)) {
            split_block(around, pid, page);
        }
    }
}

/// Replaces the block entry above `page` by small ones.
pub(crate) fn split_block<A: Around>(around: &A, pid: Pid, page: u32) {
    let block = around.with(|mm| mm.shape.block_around(page));
    let open = around.open(pid, block, InvalidateReason::Clear);
    around.with(|mm| mm.split_block(pid, page));
    around.close(pid, open);
}

/// Empties the page tables of a span inside one bracket.
pub(crate) fn zap_pages<A: Around>(
    around: &A,
    pid: Pid,
    pages: Pages,
    what: Zap,
    reason: InvalidateReason,
) {
    split_blocks(around, pid, pages);
    let open = around.open(pid, pages, reason);
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        around.step();
        // A fault may have brought a block in meanwhile, of which only a part goes.
        let zapped = around.with(|mm| {
            let whole = !mm.sticks_out(pid, page, pages);
            whole.then(|| mm.zap(pid, page, what))
        });
        match zapped {
            Some(next) => at = next,
            None => split_block(around, pid, page),
        }
    }
    around.close(pid, open);
    around.announce();
}

/// Brings pages in as far as that goes (`MAP_LOCKED`, `mlock`): failures are not reported.
pub(crate) fn populate_some<A: Around>(around: &A, pid: Pid, pages: Pages) {
    for page in pages.iter() {
        if populate(around, pid, page).is_err() {
            return;
        }
    }
}

/// Brings a page in for what its mapping allows.
pub(crate) fn populate<A: Around>(around: &A, pid: Pid, page: u32) -> Result<(), Signal> {
    let flags = around.with(|mm| mm.process(pid).vmas.at(page).map(|vma| vma.flags));
    let Some(flags) = flags.filter(|flags| flags.any(VmFlags::RIGHTS)) else {
        return Err(Signal::Segv);
    };
    let own = flags.has(VmFlags::WRITE) && !flags.has(VmFlags::SHARED);
    let access = if own { Access::Write } else { Access::Read };
    fault(around, pid, page, access)
}

impl Machine {
    /// Calls do not cut pages of the pool of huge pages.
    pub(crate) fn check_huge_pages(&self, pid: Pid, pages: Pages) -> Result<(), Errno> {
        let cut = |page: u32| {
            let inside = !page.is_multiple_of(self.shape.block());
            let vma = self.process(pid).vmas.at(page);
            inside && vma.is_some_and(|vma| vma.backing == Backing::HugePages)
        };
        if cut(pages.start) || cut(pages.end) {
            return Err(Errno::Invalid);
        }
        Ok(())
    }

    /// Whether something is mapped in `pages`.
    pub(crate) fn is_mapped(&self, pid: Pid, pages: Pages) -> bool {
        self.process(pid).vmas.overlapping(pages).next().is_some()
    }

    /// The pages that a new mapping gets.
    fn find_place(&self, pid: Pid, map: &Map) -> Result<Pages, Errno> {
        if map.len == 0 {
            return Err(Errno::Invalid);
        }
        let len = u32::try_from(map.len.div_ceil(PAGE)).map_err(|_large| Errno::NoMem)?;
        let len = match map.what {
            What::Hugetlb => len.next_multiple_of(self.shape.block()),
            _any_size => len,
        };
        match map.place {
            Place::Hint(at) => self.near(pid, at, len, map.what).ok_or(Errno::NoMem),
            Place::Fixed(at) => self.exactly(at, len),
            Place::NoReplace(at) => {
                let pages = self.exactly(at, len)?;
                if self.is_mapped(pid, pages) {
                    return Err(Errno::Exist);
                }
                Ok(pages)
            }
        }
    }

    fn exactly(&self, at: HostVa, len: u32) -> Result<Pages, Errno> {
        if !at.is_aligned(PAGE) {
            return Err(Errno::Invalid);
        }
        let start = self.shape.page(at).ok_or(Errno::NoMem)?;
        let end = start.checked_add(len).ok_or(Errno::NoMem)?;
        if end > self.shape.pages {
            return Err(Errno::NoMem);
        }
        Ok(Pages::new(start, end))
    }

    /// The pages at `at`, or where that is not possible the highest ones that are free; large enough
    /// ones of private memory begin at a block.
    pub(crate) fn near(&self, pid: Pid, at: HostVa, len: u32, what: What) -> Option<Pages> {
        let hint = self.shape.page(at.align_down(PAGE));
        let wanted = hint.map(|start| Pages::new(start, start.saturating_add(len)));
        let fits = |pages: &Pages| pages.end <= self.shape.pages && !self.is_mapped(pid, *pages);
        if let Some(pages) = wanted.filter(fits) {
            return Some(pages);
        }
        let block = self.shape.block();
        let large = matches!(what, What::Private | What::Hugetlb);
        let huge = at.get() == 0 && large && len.is_multiple_of(block);
        let aligned = huge.then(|| self.gap(pid, len + block)).flatten();
        match aligned {
            Some(gap) => {
                let start = (gap.end - len) & !(block - 1);
                Some(Pages::new(start, start + len))
            }
            None => self.gap(pid, len),
        }
    }

    /// The highest free run of `len` pages.
    pub(crate) fn gap(&self, pid: Pid, len: u32) -> Option<Pages> {
        let mut end = self.shape.pages;
        for vma in self.process(pid).vmas.all().iter().rev() {
            if end - vma.pages.end >= len {
                break;
            }
            end = vma.pages.start;
        }
        let floor = self.process(pid).vmas.all().iter().map(|vma| vma.pages.end);
        let floor = floor.filter(|floor| *floor <= end).max().unwrap_or(0);
        (end - floor >= len).then(|| Pages::new(end - len, end))
    }

    /// Enters a new mapping where nothing is.
    fn insert_new(&mut self, pid: Pid, pages: Pages, map: &Map) -> Result<(), Errno> {
        let (backing, offset, shared) = match map.what {
            What::Private => (Backing::Anon, pages.start, VmFlags::NONE),
            What::Shared => {
                let file = self.make_file(pages.len(), Named::No);
                (Backing::File(file), 0, VmFlags::SHARED)
            }
            What::PrivateFile(file, offset) => (Backing::File(file), offset, VmFlags::NONE),
            What::SharedFile(file, offset) => (Backing::File(file), offset, VmFlags::SHARED),
            What::Special => {
                let flags = VmFlags::PFN_MAP.with(VmFlags::DONT_EXPAND);
                (Backing::Special, pages.start, flags.with(VmFlags::SHARED))
            }
            What::Hugetlb => {
                let flags = VmFlags::HUGETLB.with(VmFlags::DONT_EXPAND);
                (Backing::HugePages, pages.start, flags)
            }
        };
        let mut rights = map.prot.common(VmFlags::RIGHTS).with(VmFlags::MAY);
        if rights.has(VmFlags::WRITE) && !shared.has(VmFlags::SHARED) {
            rights = rights.with(VmFlags::ACCOUNT);
        }
        let vma = Vma {
            pages,
            offset,
            flags: rights
                .with(shared)
                .with(map.extra)
                .with(VmFlags::SOFT_DIRTY),
            backing,
            anon: None,
            descent: Descent::Own,
            left: Left::Tried,
        };
        self.process_mut(pid).vmas.insert(vma);
        Ok(())
    }

    /// Mappings are gone: so are nameless files that only they used.
    pub(crate) fn forget(&mut self, gone: &[Vma]) {
        for vma in gone {
            if let Backing::File(file) = vma.backing {
                self.unuse_file(file);
            }
        }
    }

    /// Whether the block above `page` is mapped by one entry.
    #[must_use]
    pub fn is_huge(&self, pid: Pid, page: u32) -> bool {
        matches!(self.block(pid, page), Block::Huge(..))
    }
}
