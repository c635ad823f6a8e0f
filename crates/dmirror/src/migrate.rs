//! Pages go to the device, and come home by command.
//!
//! The host's migrations take all of a span or nothing, the module's take what they can get: a span
//! that is refused is halved until what refuses is alone.

use alloc::sync::Arc;
use alloc::vec::Vec;

use gpusvm::addr::{HostSpan, PAGE, PAGE_2M, PageCount, VramSpan};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::env::{Environment, Point};
use gpusvm::seam::mm::{
    Access, AddressSpace, AllocationRef, Folios, Location, MigrateTo, MigrationSet, PageKind, Seen,
    SeenPage, VmaKind,
};

use crate::block::{Block, Size};
use crate::mirror::Mirror;
use crate::table::{Entry, Tag};
use crate::uapi::Errno;

/// How often pages are asked for that another operation holds.
const TRIES: usize = 32;

/// Order of a large page.
const LARGE: u8 = 9;

impl<E: Environment, S: AddressSpace> Mirror<E, S> {
    /// Sends the pages of the span to the device, as far as they go. What lies before a hole is sent
    /// all the same.
    pub(crate) fn to_device(&self, span: HostSpan) -> Result<(), Errno> {
        self.each_step(span, |step| {
            self.send(step);
            Ok(())
        })
    }

    /// Brings the device's pages of the span home. Returns the number of entries that moved: a large
    /// page counts once.
    pub(crate) fn to_system(&self, span: HostSpan) -> Result<u64, Errno> {
        let mut moved = 0;
        self.each_step(span, |step| {
            moved += self.fetch(step)?;
            Ok(())
        })?;
        Ok(moved)
    }

    /// Visits the span in steps of a block of 2 MiB at most, each inside one mapping.
    fn each_step(
        &self,
        span: HostSpan,
        mut visit: impl FnMut(HostSpan) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut at = span.start();
        while at < span.end() {
            let vma = self.space.find_vma(at);
            let vma = vma.filter(|vma| vma.span.contains(at) && vma.read);
            let vma = vma.ok_or(Errno::Invalid)?;
            if matches!(vma.kind, VmaKind::HugePages | VmaKind::Special) {
                return Err(Errno::Invalid);
            }
            let border = at.align_down(PAGE_2M).plus(PAGE_2M);
            let end = border.min(vma.span.end()).min(span.end());
            visit(HostSpan::new(at, end))?;
            at = end;
        }
        Ok(())
    }

    /// Sends what of a step is not on a device.
    fn send(&self, step: HostSpan) {
        let Some(seen) = self.look(step) else { return };
        let mut start = 0;
        while start < seen.len() {
            let run = seen[start..].iter().take_while(|page| may_go(page)).count();
            if run > 0 {
                self.send_run(part(step, start, run), &seen[start..start + run]);
            }
            start += run.max(1);
        }
    }

    fn look(&self, span: HostSpan) -> Option<Vec<Seen>> {
        let mut seen = Vec::new();
        let keep = Some(self.device.id());
        self.space.snapshot(span, keep, &mut seen).ok()?;
        Some(seen)
    }

    /// Sends the pages of `span`, which were as `before` says; halves it where it is refused.
    fn send_run(&self, span: HostSpan, before: &[Seen]) {
        let wanted = if is_large(span, before) {
            Size::Large
        } else {
            Size::Small
        };
        match (self.flags.take_failure(), wanted) {
            (false, _) => self.send_as(span, before, (wanted, Folios::Keep)),
            (true, Size::Large) => self.send_as(span, before, (Size::Small, Folios::Split)),
            // No page for the first one: it stays.
            (true, Size::Small) if before.len() > 1 => {
                self.send_run(part(span, 1, before.len() - 1), &before[1..]);
            }
            (true, Size::Small) => {}
        }
    }

    fn send_as(&self, span: HostSpan, before: &[Seen], (size, folios): (Size, Folios)) {
        if self.try_send(span, (size, folios)).is_ok() {
            return self.enter(span, before);
        }
        let half = before.len() / 2;
        if half > 0 {
            let (first, second) = before.split_at(half);
            let small = (Size::Small, folios);
            self.send_as(part(span, 0, half), first, small);
            self.send_as(part(span, half, second.len()), second, small);
        }
    }

    fn try_send(&self, span: HostSpan, how: (Size, Folios)) -> Result<(), Interrupted> {
        let env = self.device.env();
        let mut result = Err(Interrupted::from(Stale::PagesBusy));
        for _try in 0..TRIES {
            result = self.send_all(span, how);
            if result != Err(Stale::PagesBusy.into()) {
                break;
            }
            env.yield_point(Point::Retry);
        }
        result
    }

    /// Sends all pages of a span, or none.
    fn send_all(&self, span: HostSpan, (size, folios): (Size, Folios)) -> Result<(), Interrupted> {
        let owner = (&self.space, &self.flags);
        let block = Block::allocate(&self.device, owner, span, size);
        let block = block.ok_or(Failed::OutOfVram)?;
        let to = MigrateTo::Device {
            aperture: self.device.adopt(block.memory()),
            allocation: Arc::clone(&block) as AllocationRef,
            folios,
        };
        let set = self.space.migrate_begin(span, to)?;
        let env = self.device.env();
        env.yield_point(Point::AfterCollect);
        self.device.copy(set.moves())?;
        env.yield_point(Point::BeforeFinalize);
        set.finalize();
        Ok(())
    }

    /// Enters the pages of `span` that are on the device now. The device may write those that the CPU
    /// could.
    fn enter(&self, span: HostSpan, before: &[Seen]) {
        let entered = self.retry(|| {
            let seq = self.space.read_begin(&self.interval);
            let now = self.look(span).ok_or(Failed::AddressSpaceGone)?;
            let mut entries = self.table.0.lock();
            if self.interval.read_retry(seq) {
                return Err(Stale::CpuMappingChanged.into());
            }
            let pages = (0..).zip(before.iter().zip(now));
            for (n, (before, now)) in pages {
                if let Some((entry, folio)) = self.entry_for(before, now) {
                    entries.enter(span.start().plus(n * PAGE), entry, folio);
                }
            }
            Ok(())
        });
        // Without entries the command answers that the pages are not there.
        let _may_fail = entered;
    }

    /// The entry of a page that is `now` on this device, and was as `before` says, and the order of the
    /// large page that it is in.
    fn entry_for(&self, before: &Seen, now: Seen) -> Option<(Entry, u8)> {
        let Seen::Page(SeenPage { at, folio, .. }) = now else {
            return None;
        };
        self.device.offset_of(at)?;
        let tag = if is_writable(before) && is_writable(&now) {
            Tag::Write
        } else {
            Tag::Read
        };
        Some((Entry { at, tag }, folio))
    }

    /// Brings home what of a step is on this device.
    fn fetch(&self, step: HostSpan) -> Result<u64, Errno> {
        let mut moved = 0;
        for (memory, order) in self.own_runs(step) {
            let Some(block) = self.device.block_at(memory.start()) else {
                continue;
            };
            let part = memory.intersect(block.memory()).unwrap_or(memory);
            moved += self.fetch_run(&block, part, order)?;
        }
        Ok(moved)
    }

    fn fetch_run(&self, block: &Arc<Block<E, S>>, part: VramSpan, order: u8) -> Result<u64, Errno> {
        let whole = order >= LARGE && part == block.memory() && block.size() == Size::Large;
        let folios = match (self.flags.take_failure(), whole) {
            (false, true) => Folios::Keep,
            (false, false) | (true, true) => Folios::Split,
            (true, false) => return Err(Errno::NoMem),
        };
        let came = self.retry(|| block.bring(part, folios));
        let came = came.map_err(|why| match why {
            Failed::OutOfMemory => Errno::NoMem,
            Failed::Budget(_) => Errno::Busy,
            _other => Errno::Fault,
        })?;
        Ok(match folios {
            Folios::Keep => u64::from(came > PageCount::ZERO),
            Folios::Split => came.get(),
        })
    }

    /// Stretches of this device's memory that hold pages of `step`, each in one block, and the order
    /// by which they are mapped.
    fn own_runs(&self, step: HostSpan) -> Vec<(VramSpan, u8)> {
        let mut runs: Vec<(VramSpan, u8)> = Vec::new();
        for page in self.look(step).unwrap_or_default() {
            let Seen::Page(SeenPage { at, order, .. }) = page else {
                continue;
            };
            let Some(vram) = self.device.offset_of(at) else {
                continue;
            };
            let page = VramSpan::at(vram, PAGE);
            match runs.last_mut() {
                Some((last, of))
                    if last.end() == vram && *of == order && self.is_one(last, vram) =>
                {
                    *last = last.join(page);
                }
                Some(_) | None => runs.push((page, order)),
            }
        }
        runs
    }

    /// Whether the block of `run` reaches to `next`.
    fn is_one(&self, run: &VramSpan, next: gpusvm::addr::VramAddr) -> bool {
        let block = self.device.block_at(run.start());
        block.is_some_and(|block| block.memory().contains(next))
    }
}

/// Whether a page may leave: it is with the host, or nowhere.
const fn may_go(seen: &Seen) -> bool {
    match seen {
        Seen::Absent => true,
        Seen::Never => false,
        Seen::Page(page) => match page.kind {
            PageKind::Plain | PageKind::Zero => matches!(page.at, Location::System(_)),
            PageKind::Coherent(_) => false,
        },
    }
}

/// Whether the span is one large page, or a block of nothing that could be one.
fn is_large(span: HostSpan, before: &[Seen]) -> bool {
    let large = |seen: &Seen| match seen {
        Seen::Page(page) => page.order >= LARGE,
        Seen::Absent => true,
        Seen::Never => false,
    };
    span.bytes() == PAGE_2M && span.start().is_aligned(PAGE_2M) && before.iter().all(large)
}

fn is_writable(seen: &Seen) -> bool {
    matches!(seen, Seen::Page(page) if page.access == Access::Write)
}

/// `pages` pages of `span` from number `first` on.
fn part(span: HostSpan, first: usize, pages: usize) -> HostSpan {
    let bytes = |pages: usize| u64::try_from(pages).unwrap_or(0) * PAGE;
    HostSpan::at(span.start().plus(bytes(first)), bytes(pages))
}
