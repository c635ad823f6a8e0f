//! `madvise` and `process_madvise`: one table says what an advice is, one function per kind does it.

use gpusvm::addr::HostVa;
use gpusvm::mutant::Mutant;
use gpusvm::seam::mm::{Access, InvalidateReason};

use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::{Errno, Signal};
use crate::mm::fault::fault;
use crate::mm::flags::VmFlags;
use crate::mm::map::zap_pages;
use crate::mm::protect::change_flags;
use crate::mm::reclaim::inject_error;
use crate::mm::table::Zap;
use crate::mm::vma::{Backing, Vma};
use crate::mm::{Machine, Pages, Pid, Privilege, idle, ksm, thp};

/// An advice that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advice {
    /// Flags of the mapping, by the number of the call.
    Flags(i32),
    /// Nothing to do.
    Nothing,
    /// Content goes; locked mappings refuse or not.
    DontNeed { even_locked: Locked },
    /// Content may go.
    Free,
    /// A hole in a file.
    Remove,
    /// Pages are used for reading or writing now.
    Populate(Access),
    /// Pages are not used for now.
    Cold,
    /// Pages are swapped out.
    PageOut,
    /// Pages become large ones.
    Collapse,
    /// Every access becomes an error.
    GuardInstall,
    /// Accesses are no errors any more.
    GuardRemove,
    /// A memory error is played: needs privileges.
    Poison,
    /// Content moves away from a page before it has an error: needs privileges, and is not modelled.
    SoftOffline,
}

/// Whether locked mappings take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Locked {
    Refuse,
    Take,
}

/// What the number of an advice means; `None` for one that does not exist.
const fn classify(advice: i32) -> Option<Advice> {
    Some(match advice {
        0..=2 | 10..=19 => Advice::Flags(advice),
        3 => Advice::Nothing,
        4 => Advice::DontNeed {
            even_locked: Locked::Refuse,
        },
        8 => Advice::Free,
        9 => Advice::Remove,
        20 => Advice::Cold,
        21 => Advice::PageOut,
        22 => Advice::Populate(Access::Read),
        23 => Advice::Populate(Access::Write),
        24 => Advice::DontNeed {
            even_locked: Locked::Take,
        },
        25 => Advice::Collapse,
        100 => Advice::Poison,
        101 => Advice::SoftOffline,
        102 => Advice::GuardInstall,
        103 => Advice::GuardRemove,
        _ => return None,
    })
}

/// `madvise`. Holes in the span are skipped and reported.
///
/// # Errors
/// As the system call.
pub fn madvise<A: Around>(
    around: &A,
    pid: Pid,
    at: HostVa,
    len: u64,
    advice: i32,
) -> Result<(), Errno> {
    let advice = match classify(advice) {
        None if around.with(|mm| mm.has(Mutant::AdviceUnchecked)) => Advice::Nothing,
        known => known.ok_or(Errno::Invalid)?,
    };
    let pages = around.with(|mm| mm.argument(at, len))?;
    if pages.is_empty() {
        return Ok(());
    }
    match advice {
        Advice::Poison if around.with(|mm| mm.shape.privilege == Privilege::Admin) => {
            let mut pages = pages.iter();
            pages.try_for_each(|page| inject_error(around, pid, page))
        }
        Advice::Poison | Advice::SoftOffline => Err(Errno::Perm),
        Advice::Populate(access) => populate(around, pid, pages, access),
        Advice::Flags(_) => {
            let _lock = MmapLock::write(around, pid);
            walk(around, pid, pages, advice)
        }
        Advice::Collapse => {
            let _lock = MmapLock::write(around, pid);
            walk(around, pid, pages, advice)
        }
        Advice::Nothing
        | Advice::DontNeed { .. }
        | Advice::Free
        | Advice::Remove
        | Advice::Cold
        | Advice::PageOut
        | Advice::GuardInstall
        | Advice::GuardRemove => {
            let _lock = MmapLock::read(around, pid);
            walk(around, pid, pages, advice)
        }
    }
}

/// `process_madvise` of the process itself: the spans in order, until one fails. Returns the bytes
/// that were advised.
///
/// # Errors
/// As the system call: the first span's error.
pub fn process_madvise<A: Around>(
    around: &A,
    pid: Pid,
    spans: &[(HostVa, u64)],
    advice: i32,
) -> Result<u64, Errno> {
    if spans.iter().any(|(_, len)| i64::try_from(*len).is_err()) {
        return Err(Errno::Invalid);
    }
    let (mut done, mut left) = (0, spans.iter().map(|(_, len)| *len).sum::<u64>());
    for (at, len) in spans {
        // Nothing is left to look at, not even whether the advice exists.
        if left == 0 {
            break;
        }
        left -= len;
        match madvise(around, pid, *at, *len, advice) {
            Ok(()) => done += len,
            Err(error) if done == 0 => return Err(error),
            Err(_) if around.with(|mm| mm.has(Mutant::BatchOverrun)) => {}
            Err(_) => break,
        }
    }
    Ok(done)
}

/// Visits the mapped parts of `pages`.
fn walk<A: Around>(around: &A, pid: Pid, pages: Pages, advice: Advice) -> Result<(), Errno> {
    let mut at = pages.start;
    let mut hole = Ok(());
    while at < pages.end {
        let vma = around.with(|mm| mm.process(pid).vmas.first_from(at).copied());
        let Some(vma) = vma.filter(|vma| vma.pages.start < pages.end) else {
            return Err(Errno::NoMem);
        };
        if vma.pages.start > at {
            hole = Err(Errno::NoMem);
        }
        let part = vma.part(Pages::new(at.max(vma.pages.start), pages.end));
        at = part.pages.end;
        visit(around, pid, &part, advice)?;
    }
    hole
}

fn visit<A: Around>(around: &A, pid: Pid, part: &Vma, advice: Advice) -> Result<(), Errno> {
    let locked = part.flags.has(VmFlags::LOCKED);
    let raw = part.flags.any(VmFlags::PFN_MAP.with(VmFlags::HUGETLB));
    match advice {
        Advice::Flags(number) => advise_flags(around, pid, part, number),
        Advice::Nothing | Advice::Poison | Advice::SoftOffline | Advice::Populate(_) => Ok(()),
        Advice::Collapse => thp::collapse_pages(around, pid, part),
        Advice::Remove => remove(around, part),
        Advice::DontNeed { even_locked } => {
            if raw || (locked && even_locked == Locked::Refuse) {
                return Err(Errno::Invalid);
            }
            let what = if around.with(|mm| mm.has(Mutant::GuardsSwept)) {
                Zap::All
            } else {
                Zap::KeepMarkers
            };
            zap_pages(around, pid, part.pages, what, InvalidateReason::Clear);
            around.with(|mm| mm.drop_empty_tables(pid, part.pages));
            Ok(())
        }
        Advice::Free if raw || locked || !part.is_anon() => Err(Errno::Invalid),
        Advice::Free => {
            idle::free(around, pid, part.pages);
            Ok(())
        }
        Advice::Cold | Advice::PageOut if raw || locked => Err(Errno::Invalid),
        Advice::Cold => {
            idle::cold(around, pid, part.pages);
            Ok(())
        }
        Advice::PageOut => {
            idle::page_out(around, pid, part.pages);
            Ok(())
        }
        Advice::GuardInstall if raw || locked => Err(Errno::Invalid),
        Advice::GuardRemove if raw => Err(Errno::Invalid),
        Advice::GuardInstall => {
            guard(around, pid, part);
            Ok(())
        }
        Advice::GuardRemove => {
            around.with(|mm| mm.remove_guards(pid, part.pages));
            Ok(())
        }
    }
}

/// Advices that are flags of the mapping.
fn advise_flags<A: Around>(around: &A, pid: Pid, part: &Vma, number: i32) -> Result<(), Errno> {
    let shared = part.flags.has(VmFlags::SHARED);
    let raw = part.flags.any(VmFlags::PFN_MAP.with(VmFlags::DONT_EXPAND));
    let order = VmFlags::SEQUENTIAL.with(VmFlags::RANDOM);
    let huge = VmFlags::HUGE.with(VmFlags::NO_HUGE);
    let flags = match number {
        1 => part.flags.without(order).with(VmFlags::RANDOM),
        2 => part.flags.without(order).with(VmFlags::SEQUENTIAL),
        10 => part.flags.with(VmFlags::DONT_COPY),
        11 | 17 if raw => return Err(Errno::Invalid),
        11 => part.flags.without(VmFlags::DONT_COPY),
        12 | 13 if shared || raw => part.flags,
        12 => part.flags.with(VmFlags::MERGEABLE),
        13 => {
            ksm::unmerge(around, pid, part.pages)?;
            part.flags.without(VmFlags::MERGEABLE)
        }
        14 => part.flags.without(huge).with(VmFlags::HUGE),
        15 => part.flags.without(huge).with(VmFlags::NO_HUGE),
        16 => part.flags.with(VmFlags::DONT_DUMP),
        17 => part.flags.without(VmFlags::DONT_DUMP),
        18 if !part.is_anon() => return Err(Errno::Invalid),
        18 => part.flags.with(VmFlags::WIPE_ON_FORK),
        19 => part.flags.without(VmFlags::WIPE_ON_FORK),
        _ => part.flags.without(order),
    };
    if flags != part.flags {
        change_flags(around, pid, part.pages, flags);
    }
    Ok(())
}

/// Brings pages in. No lock is held: faults take their own.
fn populate<A: Around>(around: &A, pid: Pid, pages: Pages, access: Access) -> Result<(), Errno> {
    let need = match access {
        Access::Read => VmFlags::READ,
        Access::Write => VmFlags::WRITE,
    };
    for page in pages.iter() {
        let flags = around.with(|mm| mm.process(pid).vmas.at(page).map(|vma| vma.flags));
        let flags = flags.ok_or(Errno::NoMem)?;
        if flags.any(VmFlags::PFN_MAP) || !flags.has(need) {
            return Err(Errno::Invalid);
        }
        fault(around, pid, page, access).map_err(|signal| match signal {
            Signal::OutOfMemory => Errno::NoMem,
            Signal::Segv => Errno::Fault,
            Signal::Bus if around.with(|mm| mm.is_poisoned(pid, page)) => Errno::HwPoison,
            Signal::Bus => Errno::Fault,
        })?;
    }
    Ok(())
}

/// `MADV_REMOVE`: a hole in a file that may be written; every process loses the pages.
fn remove<A: Around>(around: &A, part: &Vma) -> Result<(), Errno> {
    let Backing::File(file) = part.backing else {
        return Err(Errno::Invalid);
    };
    let writable = VmFlags::SHARED.with(VmFlags::MAY_WRITE);
    if part.flags.has(VmFlags::LOCKED) {
        return Err(Errno::Invalid);
    }
    if !part.flags.has(writable) {
        return Err(Errno::Access);
    }
    let holes = Pages::new(
        part.index_of(part.pages.start),
        part.index_of(part.pages.end),
    );
    for other in around.with(|mm| mm.pids()) {
        for pages in around.with(|mm| mm.mapped_file_pages(other, file, holes)) {
            zap_pages(
                around,
                other,
                pages,
                Zap::KeepMarkers,
                InvalidateReason::Clear,
            );
        }
    }
    if !around.with(|mm| mm.has(Mutant::HoleKeepsFile)) {
        around.with(|mm| holes.iter().for_each(|index| mm.drop_cached(file, index)));
    }
    Ok(())
}

/// `MADV_GUARD_INSTALL`: what is there goes, and again if something comes meanwhile.
fn guard<A: Around>(around: &A, pid: Pid, part: &Vma) {
    let pages = part.pages;
    around.with(|mm| {
        if part.is_anon() {
            mm.prepare_anon(pid, pages.start);
        }
        if let Some(vma) = mm.process_mut(pid).vmas.get_mut(pages.start) {
            vma.flags = vma.flags.with(VmFlags::MAYBE_GUARD);
        }
    });
    while !around.with(|mm| mm.install_guards(pid, pages)) {
        zap_pages(
            around,
            pid,
            pages,
            Zap::KeepMarkers,
            InvalidateReason::Clear,
        );
    }
}

impl Machine {
    fn is_poisoned(&self, pid: Pid, page: u32) -> bool {
        matches!(self.entry(pid, page), Entry::HwPoison(_))
    }

    /// Puts guards into a span where nothing else is. Returns whether all of it has them now.
    fn install_guards(&mut self, pid: Pid, pages: Pages) -> bool {
        for page in pages.iter() {
            if self.block(pid, page) != Block::Table {
                return false;
            }
            match self.entry(pid, page) {
                Entry::Guard => {}
                Entry::None | Entry::UffdWp => {
                    self.replace(pid, page, Entry::Guard);
                }
                Entry::Present(..)
                | Entry::Zero(_)
                | Entry::Swap(..)
                | Entry::Migration(..)
                | Entry::DevicePrivate(..)
                | Entry::DeviceExclusive(..)
                | Entry::HwPoison(_) => return false,
            }
        }
        true
    }

    fn remove_guards(&mut self, pid: Pid, pages: Pages) {
        for page in pages.iter() {
            if self.entry(pid, page) == Entry::Guard {
                self.replace(pid, page, Entry::None);
            }
        }
    }

    /// Where a process has pages of a file mapped.
    fn mapped_file_pages(
        &self,
        pid: Pid,
        file: crate::mm::file::FileId,
        indices: Pages,
    ) -> Vec<Pages> {
        let vmas = self.process(pid).vmas.all().iter();
        let of_file = vmas.filter(|vma| vma.backing == Backing::File(file));
        let part = |vma: &Vma| {
            let end = vma.index_of(vma.pages.end);
            let both = indices.clip(Pages::new(vma.offset, end));
            let shift = |index: u32| vma.pages.start + (index - vma.offset);
            (!both.is_empty()).then(|| Pages::new(shift(both.start), shift(both.end)))
        };
        of_file.filter_map(part).collect()
    }
}
