//! Migrations (`migrate_vma`): pages are collected behind migration entries inside a bracket, the
//! caller copies, and the entries are replaced by ones for the new pages.
//!
//! A migration to a device holds the mmap lock for reading from beginning to end, as
//! `drm_pagemap` does: mappings do not change under it, pages may. A migration home finds the pages
//! by their frames, wherever they are mapped, and holds no lock.

use core::fmt;

use gpusvm::addr::{HostSpan, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::mutant::Mutant;
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{AllocationRef, InvalidateReason, MigrationSet};

use crate::kernel::Kernel;
use crate::kernel::bus::address_of;
use crate::kernel::space::{ModelSpace, alive};
use crate::mm::around::{Around, MmapLock};
use crate::mm::map::split_blocks;
use crate::mm::memory::FrameId;
use crate::mm::migrate::{Collected, Device, Taken};
use crate::mm::reclaim::unmap_all;
use crate::mm::{Machine, Pages, Pid};

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

/// A page on its way to a device.
struct Out {
    page: u32,
    /// Where it is; a hole has no frame.
    from: Option<FrameId>,
    to: FrameId,
}

/// A page on its way home.
struct Home {
    from: FrameId,
    to: FrameId,
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
    ) -> Result<ModelMigration<'_, E>, Interrupted> {
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
        set.collect(place)?;
        set.isolate()?;
        set.plan_out(allocation.vram().start());
        Ok(set)
    }
}

/// The pages of a span that may move.
fn check_out(mm: &Machine, pid: Pid, span: HostSpan) -> Result<Pages, Failed> {
    alive(mm, pid)?;
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
    }
}

impl<E: Environment> ModelMigration<'_, E> {
    /// Puts migration entries into the mapping, inside one bracket; all or nothing.
    fn collect(&mut self, place: u32) -> Result<(), Interrupted> {
        let Way::Out {
            pid, pages, legs, ..
        } = &mut self.way
        else {
            return Ok(());
        };
        let open = self.kernel.open(*pid, *pages, InvalidateReason::Migrate);
        let mut result = Ok(());
        for (n, page) in (0..).zip(pages.iter()) {
            self.kernel.step();
            let found = self.kernel.with(|mm| {
                // Made first: the allocation's reference goes with its last page.
                let to = mm.new_device_page(place, n)?;
                Some((mm.collect(*pid, page), to))
            });
            let Some((found, to)) = found else {
                if legs.is_empty() {
                    self.kernel.release(vec![place]);
                }
                result = Err(Failed::OutOfMemory.into());
                break;
            };
            let from = match found {
                Collected::Page(frame) => Some(frame),
                Collected::Hole | Collected::Busy | Collected::Refused => None,
            };
            legs.push(Out { page, from, to });
            match found {
                Collected::Page(_) | Collected::Hole => {}
                Collected::Busy => result = Err(Stale::PagesBusy.into()),
                Collected::Refused => result = Err(Stale::PagesRefused.into()),
            }
            if result.is_err() {
                break;
            }
        }
        self.kernel.close(*pid, open);
        result
    }

    /// Takes the pages from all other mappings; nobody may refer to them afterwards.
    fn isolate(&self) -> Result<(), Stale> {
        let Way::Out { legs, .. } = &self.way else {
            return Ok(());
        };
        for frame in legs.iter().filter_map(|leg| leg.from) {
            unmap_all(self.kernel, frame, |mm, mapping| {
                mm.unmap_migrating(frame, mapping)
            });
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
        for (n, leg) in (0..).zip(legs) {
            let with = match leg.from {
                Some(frame) => CopyWith::From(address_of(frame)),
                None => CopyWith::Hole,
            };
            let at = vram.plus(PageCount::new(n).bytes());
            push(&mut self.moves, at, with);
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
                    let filled = mm.fill_hole(pid, leg.page, leg.to);
                    mm.drop_device_page(leg.to);
                    filled
                });
                moved += u64::from(filled);
            }
            kernel.close(pid, open);
        }
        for leg in legs {
            let Some(from) = leg.from else { continue };
            kernel.step();
            let settled = kernel.with(|mm| mm.leave(from, leg.to));
            moved += u64::from(settled > 0);
        }
        moved
    }
}

impl<E: Environment> Kernel<E> {
    pub(super) fn begin_home(
        &self,
        allocation: &AllocationRef,
    ) -> Result<ModelMigration<'_, E>, Interrupted> {
        let mut set = ModelMigration {
            kernel: self,
            way: Way::Home { legs: Vec::new() },
            moves: Vec::new(),
            done: false,
        };
        let id = allocation.id().0;
        let pages = self.look(|mm| mm.place_of(id).map(|place| mm.device_pages(place)));
        for (frame, page) in pages.unwrap_or_default() {
            set.take_home(frame, page, allocation)?;
        }
        set.recall();
        set.drop_unmapped();
        Ok(set)
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
    /// Locks a device page and gets a page for it. One that was freed since it was looked up needs
    /// none.
    fn take_home(
        &mut self,
        frame: FrameId,
        page: u32,
        allocation: &AllocationRef,
    ) -> Result<(), Interrupted> {
        let id = allocation.id().0;
        let taken = self
            .kernel
            .with(|mm| match mm.take_device_page(frame, id, page) {
                Taken::Gone => Ok(None),
                Taken::Busy => Err(Interrupted::from(Stale::PagesBusy)),
                Taken::Yes => match mm.new_home() {
                    Some(to) => Ok(Some(to)),
                    None => {
                        mm.let_go(frame);
                        Err(Failed::OutOfMemory.into())
                    }
                },
            });
        let Some(to) = taken? else { return Ok(()) };
        if let Way::Home { legs } = &mut self.way {
            legs.push(Home { from: frame, to });
        }
        let first = allocation.vram().start();
        let at = first.plus(PageCount::new(u64::from(page)).bytes());
        push(&mut self.moves, at, CopyWith::To(address_of(to)));
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
                let all = legs.iter().flat_map(|leg| mm.mapped_at(leg.from));
                all.collect::<Vec<_>>()
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

    /// Pages that lost their last mapping meanwhile need no copy.
    fn drop_unmapped(&mut self) {
        let Way::Home { legs } = &mut self.way else {
            return;
        };
        let mut kept = Vec::with_capacity(legs.len());
        let mut moves = Vec::with_capacity(self.moves.len());
        let single = core::mem::take(&mut self.moves);
        for (leg, step) in legs.drain(..).zip(each_page(&single)) {
            if self.kernel.look(|mm| mm.mappings(leg.from).is_empty()) {
                self.kernel
                    .with(|mm| mm.return_device_page(leg.from, leg.to));
            } else {
                push(&mut moves, step.0, step.1);
                kept.push(leg);
            }
        }
        *legs = kept;
        self.moves = moves;
    }

    fn finish_home(kernel: &Kernel<E>, legs: &[Home]) -> u64 {
        let mut moved = 0;
        for leg in legs {
            kernel.step();
            moved += u64::from(kernel.with(|mm| mm.arrive(leg.from, leg.to)) > 0);
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
    /// Ends the move of a page: entries for the new one, the old one goes. Returns the number of
    /// entries; where there are none, the new page goes, too.
    fn arrive(&mut self, from: FrameId, to: FrameId) -> u32 {
        let settled = self.settle(from, to);
        self.let_go(from);
        self.drop_device_page(to);
        settled
    }

    /// As [`arrive`](Self::arrive), on a device, unless the page is refused there: then it stays where it
    /// was (a charge that fails, as in `migrate_vma_pages`).
    fn leave(&mut self, from: FrameId, to: FrameId) -> u32 {
        if !self.memory.is_refused() {
            return self.arrive(from, to);
        }
        self.settle(from, from);
        self.let_go(from);
        self.drop_device_page(to);
        0
    }

    /// Where a page is mapped, without entries of migrations.
    fn mapped_at(&self, frame: FrameId) -> impl Iterator<Item = (Pid, u32)> + use<'_> {
        let all = self.rmaps().of(self.memory(), frame);
        let mapped = move |at: &(Pid, u32)| self.entry(at.0, at.1).mapped_frame() == Some(frame);
        all.map(|mapping| (mapping.pid, mapping.page))
            .filter(mapped)
    }

    /// Puts a migration entry over a device page that a set has taken.
    fn recall(&mut self, pid: Pid, page: u32) {
        let mapping = crate::mm::rmap::Mapping {
            pid,
            page,
            level: crate::mm::rmap::Level::Page,
        };
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

/// The moves page by page.
fn each_page(moves: &[CopyMove]) -> impl Iterator<Item = (VramAddr, CopyWith)> + '_ {
    moves.iter().flat_map(|step| {
        (0..step.vram.pages().get()).map(|n| {
            let bytes = PageCount::new(n).bytes();
            let with = match step.with {
                CopyWith::From(bus) => CopyWith::From(bus.plus(bytes)),
                CopyWith::To(bus) => CopyWith::To(bus.plus(bytes)),
                CopyWith::Hole => CopyWith::Hole,
            };
            (step.vram.start().plus(bytes), with)
        })
    })
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
        if !self.done && !self.kernel.env.mutant(Mutant::UndoSkipped) {
            self.undo();
        }
    }
}
