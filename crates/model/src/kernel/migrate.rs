//! Migrations (`migrate_vma`): pages are collected behind migration entries inside a bracket, the
//! caller copies, and the entries are replaced by ones for the new pages.
//!
//! A migration to a device holds the mmap lock for reading from beginning to end, as
//! `drm_pagemap` does: mappings do not change under it, pages may. A migration home finds the pages
//! by their frames, wherever they are mapped, and holds no lock.

mod home;

use core::fmt;

use gpusvm::addr::{HostSpan, PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{AllocationRef, Folios, InvalidateReason, MigrationSet};

use crate::kernel::Kernel;
use crate::kernel::bus::{address_of, frame_of};
use crate::kernel::space::{ModelSpace, alive};
use crate::mm::around::{Around, MmapLock};
use crate::mm::map::split_blocks;
use crate::mm::memory::FrameId;
use crate::mm::migrate::{Collected, Device};
use crate::mm::reclaim::unmap_all;
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

impl<E: Environment> ModelMigration<'_, E> {
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
