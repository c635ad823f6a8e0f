//! Migration to device memory: all or nothing (`svm-design.md` section 3.3).

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use crate::addr::{HostSpan, PageCount, VramSpan};
use crate::error::{Interrupted, Stale};
use crate::event::Event;
use crate::mutant::Mutant;
use crate::pagemap::{Allocation, Pagemap};
use crate::seam::Platform;
use crate::seam::copy::{CopyEngine, CopyMove, CopyWith};
use crate::seam::env::{Environment, Ns, Point};
use crate::seam::mm::{
    Access, AddressSpace, AllocationRef, DeviceAllocation, FaultIn, MigrateTo, MigrationSet, Pager,
    Placement,
};
use crate::vram::{BoRequest, Evict, From, Purpose};

/// A wish to move one span.
#[derive(Clone, Copy, Debug)]
pub struct ToDevice {
    /// Pages, inside one mapping.
    pub span: HostSpan,
    /// Least time that CPU faults leave the pages there; zero for none.
    pub timeslice: Ns,
}

impl<P: Platform> Pagemap<P> {
    /// Moves the pages of a span to this device memory. Nothing happens where they are there
    /// already; what lies in other allocations or on other devices comes home first. Takes no
    /// driver lock; `vm` may be held.
    ///
    /// # Errors
    /// [`Failed::OutOfVram`](crate::error::Failed::OutOfVram) when no memory can be made free;
    /// [`Stale`] when pages are busy, refuse, or raced: pages that did move stay moved.
    pub fn to_device(self: &Arc<Self>, wish: ToDevice) -> Result<(), Interrupted> {
        match self.seams.space.placement(wish.span) {
            Placement::Device(id) if id == self.id => return Ok(()),
            Placement::System => {}
            Placement::Device(_) | Placement::Mixed => self.bring_home(wish.span)?,
        }
        let started = self.seams.env.now();
        let allocation = self.allocate(wish.span)?;
        let weak: Weak<dyn Evict> = Arc::<Allocation<P>>::downgrade(&allocation);
        let filled = self.fill(&allocation, &wish);
        if self.seams.env.mutant(Mutant::AloneNotEvictable) {
            filled?;
        }
        // Also where only some pages moved: they stay, and must be able to make room.
        self.vram.make_evictable(&allocation.bo, weak);
        let (copied, adopted) = filled?;
        let took = self.seams.env.now().since(started);
        self.seams.emit(&Event::ToDevice {
            span: wish.span,
            copied,
            adopted,
            took,
        });
        Ok(())
    }

    /// Brings home what is in any device memory, by reading it as a CPU would.
    fn bring_home(&self, span: HostSpan) -> Result<(), Interrupted> {
        let request = FaultIn {
            span,
            access: Access::Read,
            keep: None,
            pager: Pager::Wait,
        };
        self.seams.space.fault_in(&request, &mut Vec::new())
    }

    /// Device memory for `span`. It is on no LRU yet, so nobody evicts it while it is filled.
    fn allocate(self: &Arc<Self>, span: HostSpan) -> Result<Arc<Allocation<P>>, Interrupted> {
        let bo = self.vram.allocate(BoRequest {
            bytes: span.bytes(),
            from: From::Bottom,
            purpose: Purpose::Pages,
        })?;
        Ok(Allocation::new(self, bo, span))
    }

    /// Isolates the pages, brings their content over and makes the move real. Returns the pages
    /// that were copied and those that were adopted.
    fn fill(
        &self,
        allocation: &Arc<Allocation<P>>,
        wish: &ToDevice,
    ) -> Result<(PageCount, PageCount), Interrupted> {
        let span = wish.span;
        let aperture = self.copy.adopt(vram_of(allocation));
        let to = MigrateTo::device(
            Arc::<Allocation<P>>::clone(allocation) as AllocationRef,
            aperture,
        );
        let set = self.seams.space.migrate_begin(span, to)?;
        self.seams.env.yield_point(Point::AfterCollect);
        if self.seams.env.mutant(Mutant::FinalizeBeforeCopyOut) {
            return self.finalize_first(set);
        }
        if self.seams.env.mutant(Mutant::HolesKeepContent) {
            let content = |m: &&CopyMove| m.with != CopyWith::Hole;
            let moves: Vec<_> = set.moves().iter().filter(content).copied().collect();
            self.copy.run(&moves)?;
        } else {
            self.copy.run(set.moves())?;
        }
        self.seams.env.yield_point(Point::BeforeFinalize);
        let copied = set.moves().iter().map(|m| m.vram.pages()).sum();
        let adopted = set.adopted();
        // Before a CPU that waits for the pages gets to them (`svm-design.md` section 3.3, step 13).
        allocation.hold_until(self.seams.env.now().after(wish.timeslice));
        if set.finalize() < span.pages() {
            Err(Stale::PagesBusy.into())
        } else {
            Ok((copied, adopted))
        }
    }

    /// A mutant: the content follows the entries.
    #[cold]
    fn finalize_first(
        &self,
        set: impl MigrationSet,
    ) -> Result<(PageCount, PageCount), Interrupted> {
        let moves: Vec<_> = set.moves().to_vec();
        let moved = set.finalize();
        self.seams.env.yield_point(Point::BeforeFinalize);
        self.copy.run(&moves)?;
        Ok((moved, PageCount::ZERO))
    }
}

fn vram_of<P: Platform>(allocation: &Allocation<P>) -> VramSpan {
    allocation.vram()
}
