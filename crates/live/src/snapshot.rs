//! What a device finds without a fault (`hmm_range_fault` without a request).
//!
//! The system does not show whether an entry allows stores. A page that only one entry maps, in a
//! mapping that may be written, stands for it: wrong for a page that was shared by a child that has
//! ended, until the next store.

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE};
use gpusvm::seam::mm::{Access, Location, PageKind, PagemapId, Seen, SeenPage, Vma, VmaKind};

use crate::residency::State;
use crate::space::LiveSpace;
use crate::sys::pagemap::Look;
use crate::sys::procmap::Sharing;

/// Order of a huge page.
const HUGE: u8 = 9;

impl LiveSpace {
    /// Looks at each page of `span`.
    pub(crate) fn glance(&self, span: HostSpan, keep: Option<PagemapId>, out: &mut Vec<Seen>) {
        out.clear();
        let mut at = span.start();
        while at < span.end() {
            let vma = self.vma_for_device(at);
            let here = vma.filter(|vma| vma.span.contains(at));
            let here = here.map(|vma| self.piece_at(vma, at));
            let end = match (&here, vma) {
                (Some(piece), _) => piece.span.end(),
                (None, Some(next)) => next.span.start(),
                (None, None) => span.end(),
            };
            let part = HostSpan::new(at, end.min(span.end()));
            let usable = here.filter(|vma| vma.read && vma.kind != VmaKind::Special);
            match usable {
                Some(vma) => self.glance_in(&vma, part, keep, out),
                None => out.extend((0..part.pages().get()).map(|_| Seen::Never)),
            }
            at = part.end();
        }
    }

    /// Looks at pages of one mapping.
    fn glance_in(&self, vma: &Vma, part: HostSpan, keep: Option<PagemapId>, out: &mut Vec<Seen>) {
        let map = self.procmap.query(part.start()).ok().flatten();
        let shared = map.is_some_and(|map| map.sharing == Sharing::Shared);
        let rights = Rights {
            write: vma.write,
            shared,
        };
        let away = self.away_in(part);
        let mut away = away.iter().peekable();
        for (n, look) in (0..).zip(self.pagemap.looks(part)) {
            let at = part.start().plus(n * PAGE);
            while away.next_if(|(span, _)| span.end() <= at).is_some() {}
            let page = away.peek().filter(|(span, _)| span.contains(at));
            out.push(match page {
                Some((span, state)) => self.away_page(*span, state, at, (vma, keep)),
                None => rights.host_page(at, look),
            });
        }
    }

    /// What of `part` is not in host memory, with its state.
    fn away_in(&self, part: HostSpan) -> Vec<(HostSpan, State)> {
        let table = self.residency.lock();
        let departed = table
            .overlapping(part)
            .filter(|(_, state)| !matches!(state, State::Claimed));
        departed
            .map(|(span, state)| (span, state.clone()))
            .collect()
    }

    fn away_page(
        &self,
        span: HostSpan,
        state: &State,
        at: HostVa,
        (vma, keep): (&Vma, Option<PagemapId>),
    ) -> Seen {
        let State::Resident(first) = state else {
            return Seen::Absent;
        };
        if keep != Some(first.allocation.pagemap()) {
            return Seen::Absent;
        }
        let page = first.plus(at.offset_from(span.start()));
        let order = if self.is_large(span, first, at) {
            HUGE
        } else {
            0
        };
        Seen::Page(SeenPage {
            at: Location::Device {
                pagemap: page.allocation.pagemap(),
                allocation: page.allocation.id(),
                vram: page.vram(),
            },
            // Before a fork all pages come home, so those that are away are the process's alone.
            access: if vma.write {
                Access::Write
            } else {
                Access::Read
            },
            order,
            folio: order,
            kind: PageKind::Plain,
        })
    }
}

/// What a mapping allows.
struct Rights {
    write: bool,
    shared: bool,
}

impl Rights {
    fn host_page(&self, at: HostVa, look: Look) -> Seen {
        if !look.is_present() {
            return Seen::Absent;
        }
        let own = if look.is_file() {
            self.shared
        } else {
            look.is_exclusive()
        };
        let zero = look.is_zero();
        let write = self.write && own && !zero;
        let order = if look.is_huge() { HUGE } else { 0 };
        Seen::Page(SeenPage {
            at: Location::System(BusAddr::new(at.get())),
            access: if write { Access::Write } else { Access::Read },
            order,
            folio: order,
            kind: if zero {
                PageKind::Zero
            } else {
                PageKind::Plain
            },
        })
    }
}
