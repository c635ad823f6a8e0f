//! Huge pages that are away: they come home whole unless they are to be split.

use gpusvm::addr::{HostSpan, HostVa, PAGE_2M, VramSpan};
use gpusvm::seam::mm::AllocationRef;

use crate::residency::DevicePage;
use crate::space::LiveSpace;

impl LiveSpace {
    /// `part` of an allocation's memory, with all of the huge page that it is part of.
    pub(crate) fn whole_part(&self, allocation: &AllocationRef, part: VramSpan) -> VramSpan {
        if part == allocation.vram() {
            return part;
        }
        let found = self.residency.lock().find(allocation.id(), part.start());
        let Some((span, first)) = found else {
            return part;
        };
        let at = span.start().plus(part.start().offset_from(first.vram()));
        if !self.is_large(span, &first, at) {
            return part;
        }
        let into = at.align_down(PAGE_2M).offset_from(span.start());
        part.join(VramSpan::at(first.vram().plus(into), PAGE_2M))
    }

    /// Whether the block around a page that is away is one huge page there.
    pub(crate) fn is_large(&self, span: HostSpan, first: &DevicePage, at: HostVa) -> bool {
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        let parked = first.parked.filter(|_| span.covers(block));
        parked.is_some_and(|parked| {
            let there = parked.plus(block.start().offset_from(span.start()));
            self.pagemap.is_huge(HostSpan::at(there, PAGE_2M))
        })
    }
}
