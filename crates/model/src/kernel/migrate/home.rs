//! The way home of [`ModelMigration`]: device pages are found by their frames, wherever they are
//! mapped, taken from all mappings, and replaced by pages of host memory.

use gpusvm::addr::{PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::copy::CopyWith;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{AllocationRef, Folios, InvalidateReason};

use crate::kernel::Kernel;
use crate::kernel::bus::address_of;
use crate::kernel::migrate::{Home, ModelMigration, Way, push};
use crate::mm::around::Around;
use crate::mm::entry::Block;
use crate::mm::memory::FrameId;
use crate::mm::migrate::Taken;
use crate::mm::reclaim::{make_small, split_large};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::thp::Split;
use crate::mm::{Machine, Pages, Pid};

impl<E: Environment> Kernel<E> {
    pub(in crate::kernel) fn begin_home(
        &self,
        allocation: &AllocationRef,
        part: VramSpan,
        folios: Folios,
    ) -> Result<ModelMigration<'_, E>, Interrupted> {
        let mut set = ModelMigration {
            kernel: self,
            way: Way::Home { legs: Vec::new() },
            moves: Vec::new(),
            done: false,
        };
        self.cut_folios(allocation, part, folios);
        for (frame, pages) in self.folios_in(allocation, part) {
            set.take_home(frame, pages, allocation)?;
        }
        set.recall();
        set.drop_unmapped();
        Ok(set)
    }

    /// The folios of an allocation that have pages in `part` of its memory.
    fn folios_in(&self, allocation: &AllocationRef, part: VramSpan) -> Vec<(FrameId, Pages)> {
        let wanted = pages_of(allocation, part);
        let id = allocation.id().0;
        let all = self.look(|mm| mm.place_of(id).map(|place| mm.device_folios(place)));
        let mut folios = all.unwrap_or_default();
        folios.retain(|(_, pages)| pages.overlaps(wanted));
        folios
    }

    /// Splits the large folios that cannot come home whole: to single pages where the other side has
    /// no others, otherwise around what comes, so that the rest stays as large as it can.
    fn cut_folios(&self, allocation: &AllocationRef, part: VramSpan, folios: Folios) {
        let wanted = pages_of(allocation, part);
        for (frame, pages) in self.folios_in(allocation, part) {
            match folios {
                Folios::Split if pages.len() > 1 => make_small(self, frame),
                Folios::Split => {}
                Folios::Keep => self.cut_around(frame, pages, wanted),
            }
        }
    }

    /// Cuts the part that is `wanted` out of the folio that has `pages` of an allocation; one that the
    /// CPU maps by block entries only comes whole.
    fn cut_around(&self, head: FrameId, pages: Pages, wanted: Pages) {
        if wanted.covers(pages) || self.look(|mm| mm.is_mapped_whole(head)) {
            return;
        }
        let part = pages.clip(wanted);
        let borders = [
            (part.start > pages.start).then_some(part.start),
            (part.end < pages.end).then_some(part.end - 1),
        ];
        for page in borders.into_iter().flatten() {
            let frame = head.plus(page - pages.start);
            split_large(self, frame, Split::Around(frame));
        }
    }

    /// The span of one process around `page` in which pages of the set follow each other.
    fn runs(mut mappings: Vec<(Pid, u32)>) -> Vec<(Pid, Pages)> {
        mappings.sort_unstable();
        let mut runs: Vec<(Pid, Pages)> = Vec::new();
        for (pid, page) in mappings {
            match runs.last_mut() {
                Some((last, pages)) if *last == pid && pages.end == page => pages.end += 1,
                Some(_) | None => runs.push((pid, Pages::one(page))),
            }
        }
        runs
    }
}

impl<E: Environment> ModelMigration<'_, E> {
    /// Locks a device folio and gets one for it. One that was freed since it was looked up needs none.
    fn take_home(
        &mut self,
        frame: FrameId,
        pages: Pages,
        allocation: &AllocationRef,
    ) -> Result<(), Interrupted> {
        let id = allocation.id().0;
        let order = order_of(pages);
        let taken = self
            .kernel
            .with(|mm| match mm.take_device_page(frame, id, pages.start) {
                Taken::Gone => Ok(None),
                Taken::Busy => Err(Interrupted::from(Stale::PagesBusy)),
                Taken::Yes => match mm.new_home(order) {
                    Some(to) => Ok(Some(to)),
                    None => {
                        mm.let_go(frame);
                        Err(Failed::OutOfMemory.into())
                    }
                },
            });
        let short = taken == Err(Failed::OutOfMemory.into());
        if short && pages.len() > 1 {
            return self.take_home_by_pages(frame, pages, allocation);
        }
        let Some(to) = taken? else { return Ok(()) };
        let first = allocation.vram().start();
        let at = first.plus(PageCount::new(u64::from(pages.start)).bytes());
        if let Way::Home { legs } = &mut self.way {
            let from = frame;
            legs.push(Home {
                from,
                to,
                order,
                at,
            });
        }
        Ok(())
    }

    /// Where host memory has no large page, small ones will do.
    fn take_home_by_pages(
        &mut self,
        head: FrameId,
        pages: Pages,
        allocation: &AllocationRef,
    ) -> Result<(), Interrupted> {
        make_small(self.kernel, head);
        if self.kernel.look(|mm| mm.memory().folio(head).order) > 0 {
            return Err(Stale::PagesBusy.into());
        }
        let mut each = pages.iter();
        each.try_for_each(|page| {
            let frame = head.plus(page - pages.start);
            self.take_home(frame, Pages::one(page), allocation)
        })
    }

    /// Takes the pages from all mappings, in brackets over runs of pages. A child may get new ones
    /// meanwhile: until there are none.
    fn recall(&self) {
        let Way::Home { legs } = &self.way else {
            return;
        };
        loop {
            let mapped = self.kernel.look(|mm| {
                let pages = legs.iter().flat_map(Home::frames);
                pages
                    .flat_map(|frame| mm.mapped_at(frame))
                    .collect::<Vec<_>>()
            });
            if mapped.is_empty() {
                return;
            }
            for (pid, pages) in Kernel::<E>::runs(mapped) {
                let open = self.kernel.open(pid, pages, InvalidateReason::Migrate);
                for page in pages.iter() {
                    self.kernel.step();
                    self.kernel.with(|mm| mm.recall(pid, page));
                }
                self.kernel.close(pid, open);
            }
        }
    }

    /// Plans the copies. Pages that lost their last mapping meanwhile need none.
    fn drop_unmapped(&mut self) {
        let Way::Home { legs } = &mut self.way else {
            return;
        };
        let mut kept = Vec::with_capacity(legs.len());
        for leg in legs.drain(..) {
            let mapped = |mm: &Machine, frame| !mm.mappings(frame).is_empty();
            if !self.kernel.look(|mm| leg.frames().any(|at| mapped(mm, at))) {
                self.kernel
                    .with(|mm| mm.return_device_page(leg.from, leg.to));
                continue;
            }
            for n in 0..1 << leg.order {
                let at = leg.at.plus(PageCount::new(u64::from(n)).bytes());
                push(
                    &mut self.moves,
                    at,
                    CopyWith::To(address_of(leg.to.plus(n))),
                );
            }
            kept.push(leg);
        }
        *legs = kept;
    }

    pub(super) fn finish_home(kernel: &Kernel<E>, legs: &[Home]) -> u64 {
        let mut moved = 0;
        for leg in legs {
            kernel.step();
            moved += u64::from(kernel.with(|mm| mm.arrive(leg.from, leg.to)));
        }
        moved
    }
}

impl Machine {
    /// Whether a large folio is mapped by block entries only.
    fn is_mapped_whole(&self, head: FrameId) -> bool {
        let folio = self.memory().frame(head);
        folio.entire > 0 && folio.refs == folio.entire + folio.held
    }

    /// Where a page is mapped, without entries of migrations.
    fn mapped_at(&self, frame: FrameId) -> impl Iterator<Item = (Pid, u32)> + use<'_> {
        let all = self.rmaps().of(self.memory(), frame);
        let mapped = move |at: &Mapping| {
            let entry = self.entry(at.pid, at.page);
            entry.mapped_frame() == Some(frame)
        };
        all.filter(mapped).flat_map(|mapping| {
            let pages = match mapping.level {
                Level::Page => Pages::one(mapping.page),
                Level::Block => self.shape().block_around(mapping.page),
            };
            pages.iter().map(move |page| (mapping.pid, page))
        })
    }

    /// Puts a migration entry over a device page that a set has taken.
    fn recall(&mut self, pid: Pid, page: u32) {
        let mapping = Mapping {
            pid,
            page,
            level: Level::Page,
        };
        let device = |frame: FrameId| self.memory().is_device(frame) && self.is_locked(frame);
        let taken = self.entry(pid, page).mapped_frame().is_some_and(device);
        if taken && self.block(pid, page) != Block::Table {
            self.split_block(pid, page);
        }
        if let Some(frame) = self.entry(pid, page).mapped_frame()
            && self.memory().is_device(frame)
            && self.is_locked(frame)
        {
            self.unmap_migrating(frame, mapping);
        }
    }

    fn return_device_page(&mut self, device: FrameId, home: FrameId) {
        self.let_go(device);
        self.drop_device_page(home);
    }
}

impl Home {
    /// The device pages.
    fn frames(&self) -> impl Iterator<Item = FrameId> + use<> {
        let from = self.from;
        (0..1 << self.order).map(move |n| from.plus(n))
    }
}

/// The pages of an allocation that lie in `part` of its memory.
fn pages_of(allocation: &AllocationRef, part: VramSpan) -> Pages {
    let first = allocation.vram().start();
    let page = |at: VramAddr| u32::try_from(at.offset_from(first) / PAGE).unwrap_or(u32::MAX);
    Pages::new(page(part.start()), page(part.end()))
}

/// The order of a folio of so many pages.
fn order_of(pages: Pages) -> u8 {
    u8::try_from(pages.len().trailing_zeros()).unwrap_or(0)
}
