//! Where pages are, for a device that is about to use them (`hmm_range_fault`).
//!
//! The walk goes on under the mmap lock until a page needs a fault; the fault happens with no lock
//! held, and the walk goes on where it stopped. What it found before may be old by then: the
//! caller's sequence tells.

use gpusvm::addr::{HostVa, PageCount};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{Access, FaultIn, Location, PageRun, Pager};

use crate::kernel::bus::{ZERO_PAGE, address_of, frame_of};
use crate::kernel::snapshot::own_location;
use crate::kernel::space::{ModelSpace, alive};
use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::Entry;
use crate::mm::errno::Signal;
use crate::mm::fault::fault;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::memory::FrameId;
use crate::mm::vma::Backing;
use crate::mm::{Machine, Pages, Pid};

/// Faults and waits per page of a request before it answers `Stale`.
const ROUNDS_PER_PAGE: u32 = 16;

/// What the walk found at a page.
enum Found {
    /// It is there.
    At(Location),
    /// It must be faulted in.
    Fault,
    /// An operation has it.
    Wait,
    /// It cannot be used.
    Failed(Failed),
}

impl<E: Environment> ModelSpace<E> {
    pub(super) fn walk(
        &self,
        request: &FaultIn,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Interrupted> {
        runs.clear();
        let pages = self.kernel.shape().pages_in(request.span);
        if u64::from(pages.len()) != request.span.pages().get() {
            return Err(Failed::BadPage(request.span.start()).into());
        }
        let mut at = pages.start;
        for _round in 0..ROUNDS_PER_PAGE * pages.len().max(1) {
            let seen = self.kernel.changes();
            let found = {
                let _lock = MmapLock::read(&*self.kernel, self.pid);
                self.kernel
                    .with(|mm| walk_until(mm, self.pid, request, pages, &mut at, runs))
            };
            match found {
                None => return Ok(()),
                Some(Found::Failed(failed)) => return Err(failed.into()),
                Some(Found::Wait) => {
                    self.kernel.wait(seen);
                }
                Some(Found::Fault | Found::At(_)) => {
                    let served = self
                        .kernel
                        .look(|mm| mm.is_served(self.pid, at, request.access));
                    if served && request.pager == Pager::Refuse {
                        let at = self.kernel.look(|mm| mm.shape().address(at));
                        return Err(Failed::BadPage(at).into());
                    }
                    self.fault_page(at, request.access)?;
                }
            }
        }
        Err(Stale::PagesBusy.into())
    }

    fn fault_page(&self, page: u32, access: Access) -> Result<(), Failed> {
        let at = self.kernel.shape().address(page);
        fault(&*self.kernel, self.pid, page, access).map_err(|signal| match signal {
            Signal::OutOfMemory => Failed::OutOfMemory,
            Signal::Segv | Signal::Bus => Failed::BadPage(at),
        })
    }
}

/// Walks from `at` on and enters what is there, up to the first page that is not; `None` at the
/// end.
fn walk_until(
    mm: &mut Machine,
    pid: Pid,
    request: &FaultIn,
    pages: Pages,
    at: &mut u32,
    runs: &mut Vec<PageRun>,
) -> Option<Found> {
    if let Err(gone) = alive(mm, pid) {
        return Some(Found::Failed(gone));
    }
    while *at < pages.end {
        match find(mm, pid, *at, request) {
            Found::At(location) => {
                if request.access == Access::Write {
                    mark_written(mm, location);
                }
                push(runs, location);
            }
            other @ (Found::Fault | Found::Wait | Found::Failed(_)) => return Some(other),
        }
        *at += 1;
    }
    None
}

fn find(mm: &Machine, pid: Pid, page: u32, request: &FaultIn) -> Found {
    let at = mm.shape().address(page);
    if let Err(failed) = check_mapping(mm, pid, page, at, request.access) {
        return Found::Failed(failed);
    }
    let entry = mm.entry(pid, page);
    match entry {
        Entry::Present(frame, bits) => match request.access {
            Access::Write if !bits.has(Bits::WRITE) => Found::Fault,
            Access::Read | Access::Write => Found::At(Location::System(address_of(frame))),
        },
        Entry::DevicePrivate(frame, bits) => find_device(mm, (frame, bits), request),
        Entry::Zero(_) => match request.access {
            Access::Read => Found::At(Location::System(ZERO_PAGE)),
            Access::Write => Found::Fault,
        },
        Entry::None | Entry::Swap(..) | Entry::DeviceExclusive(..) | Entry::UffdWp => Found::Fault,
        Entry::Migration(..) => Found::Wait,
        Entry::HwPoison(_) | Entry::Guard => Found::Failed(Failed::BadPage(at)),
    }
}

/// A page that a device may store to is dirty from then on: no store of it tells. Whatever cleans a page takes
/// the right to store away first. (Linux 7.3 leaves that to drivers: `set_page_dirty`.)
fn mark_written(mm: &mut Machine, at: Location) {
    if let Location::System(bus) = at
        && let Some(frame) = frame_of(bus)
        && !mm.has(Mutant::DirtyForgotten)
    {
        mm.memory.mark_dirty(frame);
    }
}

fn check_mapping(
    mm: &Machine,
    pid: Pid,
    page: u32,
    at: HostVa,
    access: Access,
) -> Result<(), Failed> {
    let vma = mm.process(pid).vmas.at(page).ok_or(Failed::BadPage(at))?;
    if vma.backing == Backing::Special || !vma.flags.has(VmFlags::READ) {
        return Err(Failed::BadPage(at));
    }
    if access == Access::Write && !vma.flags.has(VmFlags::WRITE) {
        return Err(Failed::Permission(at));
    }
    Ok(())
}

/// A page in the device memory that the caller knows is reported as it is, if its entry gives the right;
/// any other comes home. (Linux 7.3 does not look at the right: a device goes on writing to what its process
/// shares with a child.)
fn find_device(mm: &Machine, (frame, bits): (FrameId, Bits), request: &FaultIn) -> Found {
    let blind = mm.has(Mutant::SharedDevicePages);
    if request.access == Access::Write && !bits.has(Bits::WRITE) && !blind {
        return Found::Fault;
    }
    own_location(mm, frame, request.keep).map_or(Found::Fault, Found::At)
}

/// Enters a page, as part of the last run where it goes on there.
fn push(runs: &mut Vec<PageRun>, at: Location) {
    if let Some(last) = runs.last_mut()
        && follows(last, at)
    {
        last.pages = last.pages + PageCount::new(1);
        return;
    }
    runs.push(PageRun {
        pages: PageCount::new(1),
        at,
    });
}

fn follows(run: &PageRun, at: Location) -> bool {
    let bytes = run.pages.bytes();
    match (run.at, at) {
        (Location::System(first), Location::System(next)) => first.plus(bytes) == next,
        (
            Location::Device {
                allocation, vram, ..
            },
            Location::Device {
                allocation: next,
                vram: at,
                ..
            },
        ) => allocation == next && vram.plus(bytes) == at,
        (Location::System(_), Location::Device { .. })
        | (Location::Device { .. }, Location::System(_)) => false,
    }
}
