//! Migrations (`migrate_vma`): pages are collected behind migration entries inside a bracket, the
//! caller copies, and the entries are replaced by ones for the new pages.
//!
//! A migration to a device holds the mmap lock for reading from beginning to end, as
//! `drm_pagemap` does: mappings do not change under it, pages may. A migration home finds the pages
//! by their frames, wherever they are mapped, and holds no lock.

use core::fmt;

use gpusvm::addr::{HostSpan, PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{AllocationRef, Folios, InvalidateReason, MigrationSet};

use crate::kernel::Kernel;
use crate::kernel::bus::{address_of, frame_of};
use crate::kernel::space::ModelSpace;
use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::Block;
use crate::mm::map::split_blocks;
use crate::mm::memory::FrameId;
use crate::mm::migrate::{Collected, Device, Taken};
use crate::mm::reclaim::{make_small, unmap_all};
use crate::mm::rmap::{Level, Mapping};
use crate::mm::{DeviceFolios, Machine, Pages, Pid};

/// Pages isolated for a migration.
pub struct ModelMigration<'a, E: Environment> {
    kernel: &'a Kernel<E>,
    way: Way<'a, E>,
    moves: Vec<CopyMove>,
    done: bool,
}

enum Way<'a, E: Environment> {
    Out {
        pid: Pid,
        pages: Pages,
        legs: Vec<Out>,
        /// Held until the end.
        _mmap: MmapLock<'a, Kernel<E>>,
    },
    Home {
        legs: Vec<Home>,
    },
}

/// A folio on its way to a device.
struct Out {
    page: u32,
    order: u8,
    /// Where it is; a hole has no frame.
    from: Option<FrameId>,
    to: FrameId,
}

/// A folio on its way home.
struct Home {
    from: FrameId,
    to: FrameId,
    order: u8,
    /// Where it is in device memory.
    at: VramAddr,
}

impl<E: Environment> fmt::Debug for ModelMigration<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelMigration")
            .field("moves", &self.moves)
            .finish_non_exhaustive()
    }
}

impl<E: Environment> ModelSpace<E> {
    pub(super) fn begin_out(
        &self,
        span: HostSpan,
        allocation: &AllocationRef,
        folios: Folios,
    ) -> Result<ModelMigration<'_, E>, Interrupted> {
        self.alive()?;
        let kernel = &*self.kernel;
        let mmap = MmapLock::read(kernel, self.pid);
        let pages = kernel.look(|mm| check_out(mm, self.pid, span))?;
        split_blocks(kernel, self.pid, pages);
        let place = kernel.enter(allocation);
        kernel.with(|mm| mm.name_place(place, identity(allocation)));
        let mut set = ModelMigration {
            kernel,
            way: Way::Out {
                pid: self.pid,
                pages,
                legs: Vec::new(),
                _mmap: mmap,
            },
            moves: Vec::new(),
            done: false,
        };
        set.collect(place, folios)?;
        set.isolate()?;
        set.plan_out(allocation.vram().start());
        Ok(set)
    }
}

/// The pages of a span that may move.
fn check_out(mm: &Machine, pid: Pid, span: HostSpan) -> Result<Pages, Failed> {
    let pages = mm.shape().pages_in(span);
    if mm.process(pid).vmas.at(pages.start).is_none() || pages.is_empty() {
        return Err(Failed::NoVma(span.start()));
    }
    let inside = mm.shape().span(pages) == span && mm.is_migratable(pid, pages);
    if inside {
        Ok(pages)
    } else {
        Err(Failed::NotMigratable(span.start()))
    }
}

fn identity(allocation: &AllocationRef) -> Device {
    Device {
        id: allocation.id().0,
        pagemap: allocation.pagemap().0,
        vram: allocation.vram().start().get(),
        frames: (0, 0),
        coherent: allocation
            .coherent_at()
            .and_then(frame_of)
            .map(|frame| frame.0),
    }
}

impl<E: Environment> ModelMigration<'_, E> {
    /// Puts migration entries into the mapping, inside one bracket; all or nothing.
    fn collect(&mut self, place: u32, folios: Folios) -> Result<(), Stale> {
        let Way::Out {
            pid, pages, legs, ..
        } = &mut self.way
        else {
            return Ok(());
        };
        let open = self.kernel.open(*pid, *pages, InvalidateReason::Migrate);
        let mut result = Ok(());
        let mut page = pages.start;
        while page < pages.end && result.is_ok() {
            self.kernel.step();
            let into = page - pages.start;
            let found = self
                .kernel
                .with(|mm| mm.collect_leg(*pid, (page, *pages), (place, into), folios));
            result = found.map(|leg| {
                page += 1 << leg.order;
                legs.push(leg);
            });
        }
        self.kernel.close(*pid, open);
        result
    }

    /// Takes the pages from all other mappings; nobody may refer to them afterwards.
    fn isolate(&self) -> Result<(), Stale> {
        let Way::Out { legs, .. } = &self.way else {
            return Ok(());
        };
        for leg in legs {
            let Some(frame) = leg.from else { continue };
            for frame in (0..1 << leg.order).map(|n| frame.plus(n)) {
                unmap_all(self.kernel, frame, |mm, mapping| {
                    mm.unmap_migrating(frame, mapping)
                });
            }
            if !self.kernel.with(|mm| mm.is_isolated(frame)) {
                return Err(Stale::PagesRefused);
            }
        }
        Ok(())
    }

    fn plan_out(&mut self, vram: VramAddr) {
        let Way::Out { legs, .. } = &self.way else {
            return;
        };
        let mut at = vram;
        for leg in legs {
            for n in 0..1 << leg.order {
                let with = match leg.from {
                    Some(frame) => CopyWith::From(address_of(frame.plus(n))),
                    None => CopyWith::Hole,
                };
                push(&mut self.moves, at, with);
                at = at.plus(PAGE);
            }
        }
    }

    /// Fills holes and replaces migration entries. Pages that raced stay where they are.
    fn finish_out(kernel: &Kernel<E>, pid: Pid, pages: Pages, legs: &[Out]) -> u64 {
        let mut moved = 0;
        if legs.iter().any(|leg| leg.from.is_none()) {
            let open = kernel.open(pid, pages, InvalidateReason::Migrate);
            for leg in legs.iter().filter(|leg| leg.from.is_none()) {
                kernel.step();
                // In one step: what was filled may be home again, and free, in the next.
                let filled = kernel.with(|mm| {
                    let filled = match leg.order {
                        0 => mm.fill_hole(pid, leg.page, leg.to),
                        _ => mm.fill_hole_block(pid, leg.page, leg.to),
                    };
                    mm.drop_device_page(leg.to);
                    filled
                });
                moved += u64::from(filled) << leg.order;
            }
            kernel.close(pid, open);
        }
        for leg in legs {
            let Some(from) = leg.from else { continue };
            kernel.step();
            moved += u64::from(kernel.with(|mm| mm.arrive(from, leg.to)));
        }
        moved
    }
}

impl<E: Environment> Kernel<E> {
    pub(super) fn begin_home(
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

    /// Splits the large folios that cannot come home whole.
    fn cut_folios(&self, allocation: &AllocationRef, part: VramSpan, folios: Folios) {
        let wanted = pages_of(allocation, part);
        for (frame, pages) in self.folios_in(allocation, part) {
            let in_one = || wanted.covers(pages) || self.look(|mm| mm.is_mapped_whole(frame));
            let whole = folios == Folios::Keep && in_one();
            if pages.len() > 1 && !whole {
                make_small(self, frame);
            }
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

    fn finish_home(kernel: &Kernel<E>, legs: &[Home]) -> u64 {
        let mut moved = 0;
        for leg in legs {
            kernel.step();
            moved += u64::from(kernel.with(|mm| mm.arrive(leg.from, leg.to)));
        }
        moved
    }

    /// Puts everything back where it was.
    fn undo(&self) {
        let back = |mm: &mut Machine, from: Option<FrameId>, to: FrameId| {
            if let Some(frame) = from {
                mm.settle(frame, frame);
                mm.let_go(frame);
            }
            mm.drop_device_page(to);
        };
        match &self.way {
            Way::Out { legs, .. } => {
                for leg in legs {
                    self.kernel.with(|mm| back(mm, leg.from, leg.to));
                }
            }
            Way::Home { legs } => {
                for leg in legs {
                    self.kernel.with(|mm| back(mm, Some(leg.from), leg.to));
                }
            }
        }
        self.kernel.announce();
    }
}

impl Machine {
    /// Ends the move of a folio: entries for the new one, the old one goes. Returns the number of
    /// pages that have entries; where none has, the new folio goes, too.
    fn arrive(&mut self, from: FrameId, to: FrameId) -> u32 {
        let settled = self.settle(from, to);
        self.let_go(from);
        self.drop_device_page(to);
        settled
    }

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

    /// One leg of a move to a device: the folio at `page`, or the hole there, and device memory for it.
    fn collect_leg(
        &mut self,
        pid: Pid,
        (page, pages): (u32, Pages),
        (place, into): (u32, u32),
        folios: Folios,
    ) -> Result<Out, Stale> {
        let block = self.shape().block_around(page);
        let large = folios == Folios::Keep
            && self.shape().device_folios == DeviceFolios::Large
            && self.device(place).coherent.is_none()
            && block.start == page
            && pages.covers(block);
        let order = if large { self.shape().pmd_order } else { 0 };
        // Made first: the allocation's reference goes with its last page.
        let to = self.new_device_page(place, into, order);
        let to = to.ok_or(Stale::PagesBusy)?;
        let whole = large.then(|| self.collect_block(pid, page)).flatten();
        if large && whole.is_none() {
            let small = self.new_device_page(place, into, 0);
            self.drop_device_page(to);
            let to = small.ok_or(Stale::PagesBusy)?;
            let found = self.collect(pid, page);
            return self.leg(page, 0, found, to);
        }
        let found = whole.unwrap_or_else(|| self.collect(pid, page));
        self.leg(page, order, found, to)
    }

    fn leg(&mut self, page: u32, order: u8, found: Collected, to: FrameId) -> Result<Out, Stale> {
        let from = match found {
            Collected::Page(frame) => Some(frame),
            Collected::Hole => None,
            Collected::Busy | Collected::Refused => {
                self.drop_device_page(to);
                return Err(match found {
                    Collected::Busy => Stale::PagesBusy,
                    Collected::Page(_) | Collected::Hole | Collected::Refused => {
                        Stale::PagesRefused
                    }
                });
            }
        };
        Ok(Out {
            page,
            order,
            from,
            to,
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

/// Enters the move of one page, as part of the last one where both sides go on there.
fn push(moves: &mut Vec<CopyMove>, at: VramAddr, with: CopyWith) {
    let page = VramSpan::at(at, PageCount::new(1).bytes());
    if let Some(last) = moves.last_mut() {
        let bytes = last.vram.bytes();
        let follows = match (last.with, with) {
            (CopyWith::From(a), CopyWith::From(b)) | (CopyWith::To(a), CopyWith::To(b)) => {
                a.plus(bytes) == b
            }
            (CopyWith::Hole, CopyWith::Hole) => true,
            (CopyWith::From(_) | CopyWith::To(_) | CopyWith::Hole, _) => false,
        };
        if follows && last.vram.end() == at {
            last.vram = last.vram.join(page);
            return;
        }
    }
    moves.push(CopyMove { vram: page, with });
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

impl<E: Environment> MigrationSet for ModelMigration<'_, E> {
    fn moves(&self) -> &[CopyMove] {
        &self.moves
    }

    fn adopted(&self) -> PageCount {
        PageCount::ZERO
    }

    fn finalize(mut self) -> PageCount {
        self.done = true;
        let moved = match &self.way {
            Way::Out {
                pid, pages, legs, ..
            } => Self::finish_out(self.kernel, *pid, *pages, legs),
            Way::Home { legs } => Self::finish_home(self.kernel, legs),
        };
        self.kernel.announce();
        PageCount::new(moved)
    }
}

impl<E: Environment> Drop for ModelMigration<'_, E> {
    fn drop(&mut self) {
        if !self.done {
            self.undo();
        }
    }
}
