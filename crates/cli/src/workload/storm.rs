//! [`Storm`]: pages move to the device and home again for no reason but that they can.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, PAGE_2M, PAGE_64K};
use gpusvm::pagemap::{Pagemap, ToDevice};
use gpusvm::seam::Platform;
use gpusvm::seam::env::Ns;

use crate::workload::mix;

/// Every so many times everything comes home.
const EVICTS_EVERY: u64 = 8;

/// What moves pages about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storm {
    /// Whose pages.
    pub(crate) span: HostSpan,
    /// Which ones, in which order.
    pub(crate) seed: u64,
}

impl Storm {
    /// The `n`th time: a piece goes to the device, or all that is there comes home.
    pub(crate) fn gust<P: Platform>(&self, pagemap: &Arc<Pagemap<P>>, n: u64) {
        if n.is_multiple_of(EVICTS_EVERY) {
            let _evicted = pagemap.vram().evict_all();
            return;
        }
        if let Some(span) = self.piece(mix(self.seed.wrapping_add(n))) {
            // Refused where pages are busy, or there is no room.
            let _moved = pagemap.to_device(ToDevice {
                span,
                timeslice: Ns::default(),
            });
        }
    }

    /// A piece at random: of the size of some range, as far as it lies in the span.
    fn piece(&self, random: u64) -> Option<HostSpan> {
        let size = if random & 1 == 0 { PAGE_64K } else { PAGE_2M };
        let at = self.span.start().plus((random >> 1) % self.span.bytes());
        HostSpan::aligned_around(at, size)?.intersect(self.span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{HostVa, PAGE};

    #[test]
    fn pieces_lie_inside_and_differ() {
        let start = HostVa::new(PAGE_2M + PAGE);
        let span = HostSpan::at(start, 3 * PAGE_2M);
        let storm = Storm { span, seed: 1 };
        let pieces: Vec<_> = (0..64).filter_map(|n| storm.piece(mix(n))).collect();
        assert_eq!(pieces.len(), 64);
        assert!(pieces.iter().all(|piece| span.covers(*piece)));
        let sizes = |bytes| pieces.iter().filter(|piece| piece.bytes() == bytes).count();
        assert!(sizes(PAGE_2M) > 0 && sizes(PAGE_64K) > 0);
    }
}
