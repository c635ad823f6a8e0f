//! Prefetch: pages move to the device before it touches them, because the program says so.
//!
//! Ranges are found or made as a fault makes them, so that what moves is what a fault will bind; the
//! binding itself is left to that fault. What cannot move stays where it is, and is no error.

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PageCount};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::Platform;
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::{Access, AddressSpace};
use gpusvm::svm::FindRange;

use crate::collect;
use crate::vm::{Rights, Vm, VmState};

/// Attempts at one range whose pages are busy or whose mapping changes.
const TRIES: usize = 16;

impl<P: Platform> Vm<P> {
    /// Moves the ranges that `span` meets to this VM's device, as far as they can move, and returns
    /// how many pages of the span are there afterwards. Holes between mappings are skipped
    /// (`svm-design.md` section 5.7). The `vm` lock is held meanwhile, as for a fault.
    ///
    /// # Errors
    /// [`Failed`] for mappings outside every area, or of too few rights; [`Failed::Closed`]. What has
    /// moved by then stays moved.
    pub fn prefetch(&self, span: HostSpan) -> Result<PageCount, Failed> {
        let span = span.align_outward(PAGE);
        let mut state = self.state.lock();
        let mut next = Some(span.start());
        let mut there = PageCount::ZERO;
        while let Some(at) = next.filter(|at| *at < span.end()) {
            next = match self.prefetch_range(&mut state, at) {
                Ok((range, moved)) => {
                    let part = range.intersect(span).filter(|_| moved);
                    there = there + part.map_or(PageCount::ZERO, HostSpan::pages);
                    Some(range.end())
                }
                Err(Failed::NoVma(_)) => self.behind_hole(at),
                Err(failed) => return Err(failed),
            };
        }
        Ok(there)
    }

    /// Where the next mapping begins, if nothing is mapped at `at`.
    fn behind_hole(&self, at: HostVa) -> Option<HostVa> {
        let next = self.device.seams.space.find_vma(at)?;
        Some(next.span.start().max(at))
    }

    /// The range around `at`, and whether its pages are on the device.
    fn prefetch_range(&self, state: &mut VmState, at: HostVa) -> Result<(HostSpan, bool), Failed> {
        let mut found = None;
        let mut why = Stale::PagesBusy;
        for _try in 0..TRIES {
            match self.try_prefetch(state, at, &mut found) {
                Ok(ended) => return Ok(ended),
                Err(Interrupted::Stale(stale)) => why = stale,
                Err(Interrupted::Failed(failed)) => return Err(failed),
            }
        }
        found.map(|range| (range, false)).ok_or(Failed::Budget(why))
    }

    /// As [`prefetch_range`](Self::prefetch_range), once.
    fn try_prefetch(
        &self,
        state: &mut VmState,
        at: HostVa,
        found: &mut Option<HostSpan>,
    ) -> Result<(HostSpan, bool), Interrupted> {
        if state.closed {
            return Err(Failed::Closed.into());
        }
        collect::run(self, state);
        let area = state.area_at(at).ok_or(Failed::OutOfArea(at))?;
        let find = FindRange {
            at,
            area: area.span,
            access: match area.rights {
                Rights::ReadWrite => Access::Write,
                Rights::ReadOnly => Access::Read,
            },
            device_memory: true,
            populated_up_to: 0,
            largest: PAGE_2M,
        };
        let range = self.svm.find_or_insert_range(&mut state.owner, &find)?;
        *found = Some(range.span());
        let moved = self.device.pagemap.to_device(ToDevice {
            span: range.span(),
            timeslice: Ns::default(),
        });
        match moved {
            Ok(()) => Ok((range.span(), true)),
            Err(Interrupted::Stale(why)) => Err(why.into()),
            // Whatever the reason, the pages stay where they are, which is no error.
            Err(Interrupted::Failed(_)) => Ok((range.span(), false)),
        }
    }
}
