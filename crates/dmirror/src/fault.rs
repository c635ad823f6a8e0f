//! Pages come in reach of the device, and what it finds without that.

use alloc::vec::Vec;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::env::{Environment, Point};
use gpusvm::seam::mm::{
    Access, AddressSpace, FaultIn, Location, PageKind, PageRun, Pager, Seen, SeenPage,
};

use crate::mirror::{Done, Mirror};
use crate::table::{Entry, Tag};
use crate::uapi::{Errno, UserMemory, snapshot as byte};

/// Pages that are faulted or looked at in one go.
const BATCH: u64 = 64;

impl<E: Environment, S: AddressSpace> Mirror<E, S> {
    /// Faults the whole span in and enters it.
    pub(crate) fn fault(&self, span: HostSpan, access: Access, pager: Pager) -> Result<(), Errno> {
        for part in batches(span) {
            let request = FaultIn {
                span: part,
                access,
                keep: Some(self.device.id()),
                pager,
            };
            self.retry(|| self.try_fault(&request))
                .map_err(|why| match why {
                    Failed::Permission(_) => Errno::Perm,
                    Failed::OutOfMemory => Errno::NoMem,
                    Failed::Budget(_) => Errno::Busy,
                    _other => Errno::Fault,
                })?;
        }
        Ok(())
    }

    /// The rule that everything rests on: sequence, pages, lock, sequence again, entries.
    fn try_fault(&self, request: &FaultIn) -> Result<(), Interrupted> {
        let seq = self.space.read_begin(&self.interval);
        let mut runs = Vec::new();
        self.space.fault_in(request, &mut runs)?;
        let mut seen = Vec::new();
        self.space.snapshot(request.span, request.keep, &mut seen)?;
        self.device.env().yield_point(Point::AfterFaultIn);
        let pages: Vec<_> = pages_of(request.span, &runs).zip(seen).collect();
        let mut entries = self.table.0.lock();
        if self.interval.read_retry(seq) {
            return Err(Stale::CpuMappingChanged.into());
        }
        for ((page, at), seen) in pages {
            let tag = match (request.access, seen) {
                (Access::Write, _) => Tag::Write,
                (Access::Read, Seen::Page(found)) if found.access == Access::Write => Tag::Write,
                (Access::Read, Seen::Page(_) | Seen::Absent | Seen::Never) => Tag::Read,
            };
            let folio = match seen {
                Seen::Page(found) => found.folio,
                Seen::Absent | Seen::Never => 0,
            };
            entries.enter(page, Entry { at, tag }, folio);
        }
        Ok(())
    }

    /// Writes one byte per page that says what the device finds.
    pub(crate) fn snapshot(
        &self,
        span: HostSpan,
        ptr: u64,
        user: &dyn UserMemory,
    ) -> Result<Done, Errno> {
        let mut to = ptr;
        for part in batches(span) {
            let bytes = self.glance(part)?;
            user.copy_out(&bytes, to)?;
            to += part.pages().get();
        }
        Ok(Done::pages(span.pages().get()))
    }

    fn glance(&self, span: HostSpan) -> Result<Vec<u8>, Errno> {
        let looked = self.retry(|| {
            let seq = self.space.read_begin(&self.interval);
            let mut seen = Vec::new();
            self.space
                .snapshot(span, Some(self.device.id()), &mut seen)?;
            let _held = self.table.0.lock();
            if self.interval.read_retry(seq) {
                return Err(Stale::CpuMappingChanged.into());
            }
            Ok(seen)
        });
        let seen = looked.map_err(|why| match why {
            Failed::Budget(_) => Errno::Busy,
            _gone => Errno::Invalid,
        })?;
        Ok(seen.into_iter().map(|page| self.byte_of(page)).collect())
    }

    fn byte_of(&self, seen: Seen) -> u8 {
        match seen {
            Seen::Absent => byte::NONE,
            Seen::Never => byte::ERROR,
            Seen::Page(page) => self.place_of(&page) | right_of(page.access) | level_of(page.order),
        }
    }

    fn place_of(&self, page: &SeenPage) -> u8 {
        match (page.kind, page.at) {
            (PageKind::Zero, _) => byte::ZERO,
            (PageKind::Coherent(id), _) if id == self.device.id() => byte::DEV_COHERENT_LOCAL,
            (PageKind::Coherent(_), _) => byte::DEV_COHERENT_REMOTE,
            (PageKind::Plain, Location::Device { .. }) => byte::DEV_PRIVATE_LOCAL,
            (PageKind::Plain, Location::System(_)) => byte::NONE,
        }
    }
}

const fn right_of(access: Access) -> u8 {
    match access {
        Access::Read => byte::READ,
        Access::Write => byte::WRITE,
    }
}

/// By what the CPU maps a page of this order.
const fn level_of(order: u8) -> u8 {
    match order {
        0..9 => 0,
        9..18 => byte::PMD,
        18.. => byte::PUD,
    }
}

/// The span in pieces of a batch.
fn batches(span: HostSpan) -> impl Iterator<Item = HostSpan> {
    let bytes = BATCH * PAGE;
    (0..span.bytes().div_ceil(bytes)).map(move |n| {
        let start = span.start().plus(n * bytes);
        HostSpan::new(start, start.plus(bytes).min(span.end()))
    })
}

/// The runs page by page, with their addresses.
fn pages_of(span: HostSpan, runs: &[PageRun]) -> impl Iterator<Item = (HostVa, Location)> {
    let each = runs
        .iter()
        .flat_map(|run| (0..run.pages.get()).map(|n| run.at.plus(n * PAGE)));
    let addresses = (0..).map(move |n| span.start().plus(n * PAGE));
    addresses.zip(each)
}
