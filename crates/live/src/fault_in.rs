//! Where pages are, for a device that is about to use them (`hmm_range_fault`).

use gpusvm::addr::{BusAddr, HostSpan};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::event::HomeCause;
use gpusvm::seam::mm::{FaultIn, Location, PageRun, VmaKind};

use crate::residency::State;
use crate::space::LiveSpace;

impl LiveSpace {
    /// One try of [`AddressSpace::fault_in`]; `None` when it has to start over.
    pub(crate) fn try_fault_in(
        &self,
        request: &FaultIn,
        runs: &mut Vec<PageRun>,
    ) -> Result<Option<()>, Interrupted> {
        runs.clear();
        self.check_mappings(request)?;
        let mut foreign = None;
        let mut travelling = false;
        let mut at = request.span.start();
        let table = self.residency.lock();
        for (span, state) in table.overlapping(request.span) {
            let Some(part) = span.intersect(request.span) else {
                continue;
            };
            push_system(runs, HostSpan::new(at, part.start()));
            match state {
                State::Resident(page) if Some(page.allocation.pagemap()) == request.keep => {
                    let into = part.start().offset_from(span.start());
                    push_device(runs, part, &page.allocation, page.offset + into);
                }
                State::Resident(page) => foreign = Some(page.allocation.clone()),
                State::Claimed | State::Transit(_) => travelling = true,
            }
            at = part.end();
        }
        push_system(runs, HostSpan::new(at, request.span.end()));
        drop(table);
        if let Some(allocation) = foreign {
            // Stale is another operation at work; the next round waits for it.
            if let Err(Interrupted::Failed(failed)) = allocation.bring_home(HomeCause::Mixed) {
                return Err(failed.into());
            }
            return Ok(None);
        }
        if travelling {
            self.wait_settled(request.span);
            return Ok(None);
        }
        Ok(Some(()))
    }

    /// Every mapping of the span allows the access and is watched.
    fn check_mappings(&self, request: &FaultIn) -> Result<(), Interrupted> {
        let mut at = request.span.start();
        while at < request.span.end() {
            let vma = self.vma_around(at).filter(|vma| vma.span.contains(at));
            let vma = vma.ok_or(Failed::BadPage(at))?;
            if vma.kind == VmaKind::Special || !vma.read {
                return Err(Failed::BadPage(at).into());
            }
            if !vma.allows(request.access) {
                return Err(Failed::Permission(at).into());
            }
            self.watch_mapping(&vma);
            let vma = self.piece_at(vma, at);
            if !vma.read {
                return Err(Failed::BadPage(at).into());
            }
            at = vma.span.end();
        }
        Ok(())
    }
}

fn push_system(runs: &mut Vec<PageRun>, span: HostSpan) {
    if !span.is_empty() {
        let at = Location::System(BusAddr::new(span.start().get()));
        runs.push(PageRun {
            pages: span.pages(),
            at,
        });
    }
}

fn push_device(
    runs: &mut Vec<PageRun>,
    span: HostSpan,
    allocation: &gpusvm::seam::mm::AllocationRef,
    offset: u64,
) {
    let at = Location::Device {
        pagemap: allocation.pagemap(),
        allocation: allocation.id(),
        vram: allocation.vram().start().plus(offset),
    };
    runs.push(PageRun {
        pages: span.pages(),
        at,
    });
}
