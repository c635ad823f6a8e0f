//! Legs: the pieces of up to 2 MiB in which pages travel.

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE_2M, VramSpan};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::mm::AllocationRef;

use crate::staging::{Kind, Slot};

/// Up to 2 MiB of user memory and the place outside of it where its pages stay meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leg {
    pub(super) user: HostSpan,
    pub(super) parked: HostVa,
    pub(super) slot: Option<Slot>,
}

impl Leg {
    pub(super) fn parked_span(&self) -> HostSpan {
        HostSpan::at(self.parked, self.user.bytes())
    }

    /// Where the page at `user` stays while it is out.
    pub(super) fn parked_at(&self, user: HostVa) -> HostVa {
        self.parked.plus(user.offset_from(self.user.start()))
    }

    /// Where the page that stays at `parked` belongs.
    pub(super) fn user_at(&self, parked: HostVa) -> HostVa {
        self.user.start().plus(parked.offset_from(self.parked))
    }
}

/// The kind of slot that a piece of user memory passes through.
pub(super) fn kind_of(user: HostSpan) -> Kind {
    if user.bytes() == PAGE_2M {
        Kind::Huge
    } else {
        Kind::Small
    }
}

/// `span` cut at 2 MiB borders.
pub(super) fn blocks(span: HostSpan) -> impl Iterator<Item = HostSpan> {
    let mut rest = span;
    core::iter::from_fn(move || {
        let border = rest
            .start()
            .align_down(PAGE_2M)
            .plus(PAGE_2M)
            .min(rest.end());
        let block = HostSpan::new(rest.start(), border);
        rest = HostSpan::new(border, rest.end());
        (!block.is_empty()).then_some(block)
    })
}

pub(super) fn moves_out(legs: &[Leg], allocation: &AllocationRef) -> Vec<CopyMove> {
    let vram = allocation.vram();
    let first = legs.first().map_or(HostVa::new(0), |leg| leg.user.start());
    legs.iter()
        .map(|leg| {
            let at = vram.start().plus(leg.user.start().offset_from(first));
            CopyMove {
                vram: VramSpan::at(at, leg.user.bytes()),
                with: CopyWith::From(BusAddr::new(leg.parked.get())),
            }
        })
        .collect()
}
