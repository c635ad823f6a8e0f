//! What stands between the driver and the host: it tells what the driver is doing, lets calls fail where
//! there is [chaos](super::chaos), and sees to it that an invalidation calls nothing. All else is passed on.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PageCount};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::copy::CopyMove;
use gpusvm::seam::mm::{
    AddressSpace, FaultIn, InvalidateReason, InvalidationSink, MigrateTo, MigrationSet, Owner,
    PageRun, PagemapId, Placement, Seen, Vma,
};
use gpusvm_model::kernel::{ModelMigration, ModelSpace};
use gpusvm_model::sched::ModelEnv;

use crate::explore::chaos::{Chaos, Site};
use crate::explore::doing::{Doing, Ends, Watch};

/// What is noted and what goes wrong on the way between the parts of a world.
#[derive(Debug, Default)]
pub(super) struct Between {
    /// What actors are doing.
    pub(super) watch: Watch,
    /// What fails.
    pub(super) chaos: Chaos,
    /// What has moved.
    pub(super) moved: Moved,
    /// Windows that are watched.
    pub(super) watched: AtomicU64,
}

/// Pages that have moved, by what the host was asked for: to compare with what is told.
#[derive(Debug, Default)]
pub(super) struct Moved {
    to_device: AtomicU64,
    to_system: AtomicU64,
}

impl Moved {
    /// Pages that went to devices by moves that were complete, and pages that came home.
    pub(super) fn pages(&self) -> [u64; 2] {
        [&self.to_device, &self.to_system].map(|pages| pages.load(Ordering::Relaxed))
    }
}

/// The process, as the driver sees it.
#[derive(Debug)]
pub(super) struct Space {
    host: Arc<ModelSpace<ModelEnv>>,
    between: Arc<Between>,
}

impl Space {
    pub(super) const fn new(host: Arc<ModelSpace<ModelEnv>>, between: Arc<Between>) -> Self {
        Self { host, between }
    }
}

/// A subscriber of invalidations.
struct Sink {
    driver: Arc<dyn InvalidationSink>,
    between: Arc<Between>,
}

impl InvalidationSink for Sink {
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq) {
        self.between.watch.open();
        self.driver.start(interval, span, reason, seq);
    }

    fn end(&self, interval: &Interval, span: HostSpan) {
        self.driver.end(interval, span);
        self.between.watch.close();
    }
}

/// Isolated pages.
#[derive(Debug)]
pub(super) struct Migration<'a> {
    host: ModelMigration<'a, ModelEnv>,
    /// Where its pages are counted, if at least so many arrive.
    counts: (&'a AtomicU64, PageCount),
    _ends: Ends<'a>,
}

impl MigrationSet for Migration<'_> {
    fn moves(&self) -> &[CopyMove] {
        self.host.moves()
    }

    fn adopted(&self) -> PageCount {
        self.host.adopted()
    }

    fn finalize(self) -> PageCount {
        let (counter, least) = self.counts;
        let copied: PageCount = self.host.moves().iter().map(|m| m.vram.pages()).sum();
        let pages = copied + self.host.adopted();
        let arrived = self.host.finalize();
        if arrived >= least {
            counter.fetch_add(pages.get(), Ordering::Relaxed);
        }
        arrived
    }
}

impl AddressSpace for Space {
    type Migration<'a> = Migration<'a>;

    fn find_vma(&self, at: HostVa) -> Option<Vma> {
        self.between.chaos.must_be_outside("find_vma");
        self.between.chaos.delays(Site::FindVma);
        self.host.find_vma(at)
    }

    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted> {
        self.between.chaos.must_be_outside("subscribe");
        if self.between.chaos.strikes(Site::Subscribe) {
            return Err(self.between.chaos.excuse(Failed::OutOfMemory));
        }
        let sink = Arc::new(Sink {
            driver: sink,
            between: Arc::clone(&self.between),
        });
        let interval = self.host.subscribe(window, sink)?;
        self.between.watched.fetch_add(1, Ordering::Relaxed);
        Ok(interval)
    }

    fn unsubscribe(&self, interval: &Arc<Interval>) {
        self.between.chaos.must_be_outside("unsubscribe");
        self.host.unsubscribe(interval);
        self.between.watched.fetch_sub(1, Ordering::Relaxed);
    }

    fn read_begin(&self, interval: &Interval) -> Seq {
        self.between.chaos.must_be_outside("read_begin");
        self.host.read_begin(interval)
    }

    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        self.between.chaos.must_be_outside("fault_in");
        let _ends = self.between.watch.begin(Doing::LookUp, request.span);
        if self.between.chaos.strikes(Site::LookUp) {
            return Err(Stale::PagesBusy.into());
        }
        self.host.fault_in(request, runs)
    }

    fn is_populated(&self, span: HostSpan) -> bool {
        self.between.chaos.must_be_outside("is_populated");
        self.host.is_populated(span)
    }

    fn placement(&self, span: HostSpan) -> Placement {
        self.between.chaos.must_be_outside("placement");
        self.host.placement(span)
    }

    fn migrate_begin(&self, span: HostSpan, to: MigrateTo) -> Result<Migration<'_>, Interrupted> {
        let moved = &self.between.moved;
        let (doing, counts) = match to {
            MigrateTo::Device { .. } => (Doing::ToDevice, (&moved.to_device, span.pages())),
            MigrateTo::System { .. } => (Doing::Home, (&moved.to_system, PageCount::new(1))),
        };
        self.between.chaos.must_be_outside("migrate_begin");
        let ends = self.between.watch.begin(doing, span);
        if self.between.chaos.strikes(Site::Collect) {
            return Err(self.between.chaos.stale());
        }
        let host = self.host.migrate_begin(span, to)?;
        self.between.watch.isolate();
        if self.between.chaos.strikes(Site::Isolated) {
            // The set is dropped: all goes back.
            return Err(self.between.chaos.stale());
        }
        Ok(Migration {
            host,
            counts,
            _ends: ends,
        })
    }

    fn snapshot(
        &self,
        span: HostSpan,
        keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted> {
        self.between.chaos.must_be_outside("snapshot");
        self.host.snapshot(span, keep, pages)
    }

    fn make_exclusive(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        self.between.chaos.must_be_outside("make_exclusive");
        let page = HostSpan::at(at, PAGE);
        let _ends = self.between.watch.begin(Doing::TakeAlone, page);
        self.host.make_exclusive(at, owner, commit)
    }
}
