//! Pages that a process does not need for now: `MADV_FREE`, `MADV_COLD` and `MADV_PAGEOUT`.
//!
//! All three look at pages that no other process maps, and at large folios as a whole: one of which
//! only a part is meant is split first.

use gpusvm::seam::mm::InvalidateReason;

use crate::mm::around::Around;
use crate::mm::entry::{Block, Entry};
use crate::mm::flags::Bits;
use crate::mm::memory::{FolioFlags, FrameId, Owner};
use crate::mm::reclaim::reclaim;
use crate::mm::table::Zap;
use crate::mm::{Machine, Pages, Pid, map};

/// `MADV_FREE`: pages may be dropped until they are written again.
pub(crate) fn free<A: Around>(around: &A, pid: Pid, pages: Pages) {
    split_pieces(around, pid, pages);
    let open = around.open(pid, pages, InvalidateReason::Clear);
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        around.step();
        at = around.with(|mm| mm.free_lazily(pid, page, pages));
    }
    around.close(pid, open);
}

/// `MADV_COLD`: pages are the next to go when memory is short.
pub(crate) fn cold<A: Around>(around: &A, pid: Pid, pages: Pages) {
    split_pieces(around, pid, pages);
    around.with(|mm| mm.make_cold(pid, pages));
}

/// `MADV_PAGEOUT`: pages go, as far as there is room for them elsewhere. Those of files lose their
/// entries; they stay in memory if they were ever written, for there is nowhere to write them to.
pub(crate) fn page_out<A: Around>(around: &A, pid: Pid, pages: Pages) {
    split_pieces(around, pid, pages);
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        around.step();
        let Extent { next, folio } = around.with(|mm| mm.extent(pid, page, pages));
        at = next;
        match folio {
            Folio::Whole(head) if around.with(|mm| mm.is_sole(head)) => {
                page_out_folio(around, pid, Pages::new(page, next), head);
            }
            Folio::Whole(_) | Folio::Piece(_) | Folio::No => {}
        }
    }
}

fn page_out_folio<A: Around>(around: &A, pid: Pid, pages: Pages, head: FrameId) {
    let folio = around.with(|mm| *mm.memory.folio(head));
    let clean = folio.flags.has(FolioFlags::LAZYFREE) && !folio.flags.has(FolioFlags::DIRTY);
    let room = around.with(|mm| mm.swap.has_room());
    match folio.owner {
        Owner::File(..) => {
            map::zap_pages(
                around,
                pid,
                pages,
                Zap::KeepMarkers,
                InvalidateReason::Clear,
            );
            around.with(|mm| mm.drop_clean(head));
        }
        // No room for a large one: perhaps for its pages.
        Owner::Anon if folio.order > 0 && !clean && !room => split_sole(around, pid, head),
        Owner::Anon if folio.order > 0 => {
            for page in pages.iter() {
                if let Entry::Present(frame, _) = around.with(|mm| mm.entry(pid, page)) {
                    reclaim(around, frame);
                }
            }
        }
        Owner::Anon => {
            reclaim(around, head);
        }
        Owner::Free | Owner::Ksm | Owner::Device(..) | Owner::HugePages | Owner::Poisoned => {}
    }
}

/// Splits the large folios of which `pages` has a part only, where the process alone maps them.
fn split_pieces<A: Around>(around: &A, pid: Pid, pages: Pages) {
    let mut at = pages.start;
    while let Some(page) = around.with(|mm| mm.next_used(pid, at, pages)) {
        let Extent { next, folio } = around.with(|mm| mm.extent(pid, page, pages));
        at = next;
        if let Folio::Piece(head) = folio
            && around.with(|mm| mm.is_sole(head))
        {
            split_sole(around, pid, head);
        }
    }
}

/// Splits a large folio that `pid` alone maps. Pages of zeros become the page of zeros.
fn split_sole<A: Around>(around: &A, pid: Pid, head: FrameId) {
    let hull = around.with(|mm| mm.hull(head));
    let open = around.open(pid, hull, InvalidateReason::Clear);
    around.step();
    around.with(|mm| mm.split_anon(head));
    around.close(pid, open);
}

/// What lies at a page, and the first page behind it.
struct Extent {
    next: u32,
    folio: Folio,
}

/// How a span of pages stands to the folio at one of them.
enum Folio {
    /// All of it is in the span, in order.
    Whole(FrameId),
    /// A part of it is.
    Piece(FrameId),
    /// There is none.
    No,
}

impl Machine {
    /// What lies at `page`, of which as much counts as `pages` has.
    fn extent(&self, pid: Pid, page: u32, pages: Pages) -> Extent {
        let block = self.shape.block_around(page);
        match self.block(pid, page) {
            // What is on a device is no memory of the host's.
            Block::Zero(_) | Block::Device(..) => Extent {
                next: block.end,
                folio: Folio::No,
            },
            Block::Huge(head, _) => Extent {
                next: block.end,
                folio: if pages.covers(block) {
                    Folio::Whole(head)
                } else {
                    Folio::Piece(head)
                },
            },
            Block::Table => self.small_extent(pid, page, pages),
        }
    }

    fn small_extent(&self, pid: Pid, page: u32, pages: Pages) -> Extent {
        let one = |folio| Extent {
            next: page + 1,
            folio,
        };
        let Entry::Present(frame, _) = self.entry(pid, page) else {
            return one(Folio::No);
        };
        let head = self.memory.head(frame);
        let all = Pages::new(page, page + (1 << self.memory.frame(head).order));
        let table = self.shape.block_around(page);
        let in_order = |n: u32| {
            let entry = self.entry(pid, page + n);
            matches!(entry, Entry::Present(other, _) if other == head.plus(n))
        };
        if pages.covers(all) && table.covers(all) && (0..all.len()).all(in_order) {
            return Extent {
                next: all.end,
                folio: Folio::Whole(head),
            };
        }
        one(Folio::Piece(head))
    }

    /// The smallest span that has all pages where a folio is mapped.
    fn hull(&self, head: FrameId) -> Pages {
        let mut hull: Option<Pages> = None;
        for frame in self.memory.pages_of(head) {
            for mapping in self.rmaps.of(&self.memory, frame) {
                let pages = match self.block(mapping.pid, mapping.page) {
                    Block::Table => Pages::one(mapping.page),
                    Block::Huge(..) | Block::Device(..) | Block::Zero(_) => {
                        self.shape.block_around(mapping.page)
                    }
                };
                let joined =
                    |hull: Pages| Pages::new(hull.start.min(pages.start), hull.end.max(pages.end));
                hull = Some(hull.map_or(pages, joined));
            }
        }
        hull.unwrap_or(Pages::new(0, 0))
    }

    /// Marks the folio at `page` as free until it is written. Returns the first page behind it.
    fn free_lazily(&mut self, pid: Pid, page: u32, pages: Pages) -> u32 {
        let Extent { next, folio } = self.extent(pid, page, pages);
        match folio {
            Folio::Whole(head) if self.may_free(head) => {
                for page in page..next {
                    let bits = self.entry(pid, page).bits();
                    let clean = bits.without(Bits::DIRTY).without(Bits::YOUNG);
                    self.set_bits(pid, page, clean);
                }
                let folio = self.memory.folio_mut(head);
                let clean = folio.flags.without(FolioFlags::DIRTY);
                folio.flags = clean.with(FolioFlags::LAZYFREE);
            }
            Folio::Whole(_) | Folio::Piece(_) => {}
            Folio::No => self.free_absent(pid, page),
        }
        next
    }

    fn free_absent(&mut self, pid: Pid, page: u32) {
        match self.entry(pid, page) {
            Entry::Swap(..) | Entry::HwPoison(_) => {
                self.replace(pid, page, Entry::None);
            }
            Entry::None
            | Entry::Present(..)
            | Entry::Zero(_)
            | Entry::Migration(..)
            | Entry::DevicePrivate(..)
            | Entry::DeviceExclusive(..)
            | Entry::Guard
            | Entry::UffdWp => {}
        }
    }

    /// Whether a folio may be marked. What others map, too, may be if all of it is as the entries
    /// say: their entries still count as written.
    fn may_free(&mut self, head: FrameId) -> bool {
        if let Some(slot) = self.memory.folio(head).swap {
            self.try_free_slot(slot);
        }
        let folio = *self.memory.folio(head);
        let plain = folio.owner == Owner::Anon && folio.swap.is_none();
        if !plain || folio.flags.has(FolioFlags::LOCKED) {
            return false;
        }
        let dirty = folio.flags.has(FolioFlags::DIRTY);
        let shared = if folio.order == 0 { dirty } else { true };
        !shared || self.is_sole(head)
    }

    fn make_cold(&mut self, pid: Pid, pages: Pages) {
        let mut at = pages.start;
        while let Some(page) = self.next_used(pid, at, pages) {
            let Extent { next, folio } = self.extent(pid, page, pages);
            at = next;
            let Folio::Whole(head) = folio else {
                continue;
            };
            if !self.is_sole(head) {
                continue;
            }
            for page in page..next {
                let bits = self.entry(pid, page).bits();
                self.set_bits(pid, page, bits.without(Bits::YOUNG));
            }
            let folio = self.memory.folio_mut(head);
            let used = FolioFlags::ACTIVE.with(FolioFlags::REFERENCED);
            folio.flags = folio.flags.without(used);
        }
    }
}
