//! What stands between the driver and the host: it tells what the driver is doing, and passes all on.

use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PageCount};
use gpusvm::error::Interrupted;
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::copy::CopyMove;
use gpusvm::seam::mm::{
    AddressSpace, FaultIn, InvalidateReason, InvalidationSink, MigrateTo, MigrationSet, PageRun,
    Placement, Vma,
};
use gpusvm_model::kernel::{ModelMigration, ModelSpace};
use gpusvm_model::sched::ModelEnv;

use crate::explore::doing::{Doing, Ends, Watch};

/// The process, as the driver sees it.
#[derive(Debug)]
pub(super) struct Space {
    host: Arc<ModelSpace<ModelEnv>>,
    watch: Arc<Watch>,
}

impl Space {
    pub(super) const fn new(host: Arc<ModelSpace<ModelEnv>>, watch: Arc<Watch>) -> Self {
        Self { host, watch }
    }
}

/// A subscriber of invalidations.
struct Sink {
    driver: Arc<dyn InvalidationSink>,
    watch: Arc<Watch>,
}

impl InvalidationSink for Sink {
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq) {
        self.watch.open();
        self.driver.start(interval, span, reason, seq);
    }

    fn end(&self, interval: &Interval, span: HostSpan) {
        self.driver.end(interval, span);
        self.watch.close();
    }
}

/// Isolated pages.
#[derive(Debug)]
pub(super) struct Migration<'a> {
    host: ModelMigration<'a, ModelEnv>,
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
        self.host.finalize()
    }
}

impl AddressSpace for Space {
    type Migration<'a> = Migration<'a>;

    fn find_vma(&self, at: HostVa) -> Option<Vma> {
        self.host.find_vma(at)
    }

    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted> {
        let watch = Arc::clone(&self.watch);
        let sink = Arc::new(Sink {
            driver: sink,
            watch,
        });
        self.host.subscribe(window, sink)
    }

    fn unsubscribe(&self, interval: &Arc<Interval>) {
        self.host.unsubscribe(interval);
    }

    fn read_begin(&self, interval: &Interval) -> Seq {
        self.host.read_begin(interval)
    }

    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        let _ends = self.watch.begin_span(Doing::LookUp, request.span);
        self.host.fault_in(request, runs)
    }

    fn is_populated(&self, span: HostSpan) -> bool {
        self.host.is_populated(span)
    }

    fn placement(&self, span: HostSpan) -> Placement {
        self.host.placement(span)
    }

    fn migrate_begin(&self, span: HostSpan, to: MigrateTo) -> Result<Migration<'_>, Interrupted> {
        let doing = match to {
            MigrateTo::Device { .. } => Doing::ToDevice,
            MigrateTo::System { .. } => Doing::Home,
        };
        let ends = self.watch.begin_span(doing, span);
        let host = self.host.migrate_begin(span, to)?;
        self.watch.isolate();
        Ok(Migration { host, _ends: ends })
    }
}
