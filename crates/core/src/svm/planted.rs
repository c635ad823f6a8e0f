//! Parts of [`Svm`] as [mutants](crate::mutant) have them.

use core::sync::atomic::Ordering;

use crate::NotifierHeld;
use crate::error::Stale;
use crate::mutant::Mutant;
use crate::pages::PageSet;
use crate::range::{Pages, RangeRef, Tree};
use crate::seam::Platform;
use crate::seam::env::{Environment, MutexGuard, Point};
use crate::seam::mm::InvalidateReason;
use crate::svm::{Bindings, Svm};

impl<P: Platform, D: Bindings> Svm<P, D> {
    /// Mutants that leave the TLBs alone, or have flushed them already.
    pub(super) fn keeps_tlbs(&self, reason: InvalidateReason) -> bool {
        let env = &self.seams.env;
        let protects = reason == InvalidateReason::ProtectVma;
        env.mutant(Mutant::FlushSkipped)
            || env.mutant(Mutant::ZapAfterFlush)
            || (protects && env.mutant(Mutant::ProtectUnflushed))
    }

    /// A mutant that leaves entries for device memory alone where only rights change.
    pub(super) fn keeps_entries(&self, reason: InvalidateReason, pages: &Pages) -> bool {
        let protects = reason == InvalidateReason::ProtectVma;
        protects && pages.was_device() && self.seams.env.mutant(Mutant::DeviceRightsKept)
    }

    /// Planted bugs that commit what they found without another look.
    pub(super) fn drops_recheck(&self, pages: &PageSet) -> bool {
        let env = &self.seams.env;
        self.skip_recheck.load(Ordering::Relaxed)
            || env.mutant(Mutant::RecheckDropped)
            || (pages.exclusive && env.mutant(Mutant::ExclusiveNotRechecked))
    }

    /// A mutant: the guard is gone when the entries are written.
    #[cold]
    pub(super) fn commit_unguarded(
        &self,
        tree: MutexGuard<'_, P::Env, Tree<D::Binding>>,
        range: &RangeRef,
        bind: impl FnOnce(&mut D::Binding, &NotifierHeld<'_>),
    ) -> Result<(), Stale> {
        drop(tree);
        self.seams.env.yield_point(Point::BeforeCommit);
        let mut tree = self.tree.lock();
        let found = tree.get_mut(range).ok_or(Stale::RangeUnmapped)?;
        bind(&mut found.binding, &NotifierHeld::new());
        Ok(())
    }
}
