//! What others may see of an [`Svm`] from outside: drivers that must not touch ranges, reports, tests.
//! Every answer is old when it arrives, unless the caller holds the driver's `vm` lock.

use crate::addr::{HostSpan, HostVa};
use crate::range::RangeRef;
use crate::seam::Platform;
use crate::svm::{Bindings, Svm, SvmOwner};

impl<P: Platform, D: Bindings> Svm<P, D> {
    /// Any range, for teardown loops; `None` when all are gone.
    pub fn any_range(&self, _owner: &mut SvmOwner) -> Option<RangeRef> {
        self.tree.lock().any()
    }

    /// Number of ranges.
    pub fn range_count(&self) -> usize {
        self.tree.lock().len()
    }

    /// Number of notifier windows, each of which has ranges.
    pub fn notifier_count(&self) -> usize {
        self.tree.lock().windows()
    }

    /// Addresses of the range around `at`, alive or dead.
    pub fn range_at(&self, at: HostVa) -> Option<HostSpan> {
        self.find_range(at).map(|range| range.span)
    }

    /// Whether any range object overlaps `span` (`drm_gpusvm_has_mapping`).
    pub fn has_mapping(&self, span: HostSpan) -> bool {
        self.tree.lock().overlaps(span)
    }
}
