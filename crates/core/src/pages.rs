//! Pages of a range, between gathering and committing.

use alloc::vec::Vec;

use crate::mmu::Seq;
use crate::seam::mm::{Access, Location, PageRun, PagemapId};

/// Pages of a range, gathered and not yet committed.
#[derive(Debug)]
pub struct PageSet {
    pub(crate) runs: Vec<PageRun>,
    pub(crate) access: Access,
    pub(crate) seq: Seq,
    /// The CPU has no access.
    pub(crate) exclusive: bool,
}

impl PageSet {
    /// Dense runs that cover the range exactly, all in one place.
    #[must_use]
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Device memory that holds the pages; `None` for host memory.
    #[must_use]
    pub fn pagemap(&self) -> Option<PagemapId> {
        match self.runs.first()?.at {
            Location::Device { pagemap, .. } => Some(pagemap),
            Location::System(_) => None,
        }
    }

    /// Whether the device has the pages, which are host memory, for itself
    /// ([`Svm::make_exclusive`](crate::svm::Svm::make_exclusive)).
    #[must_use]
    pub const fn is_exclusive(&self) -> bool {
        self.exclusive
    }

    /// Right with which the pages were faulted in.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }
}

/// Whether all runs lie in host memory, or all in one allocation.
pub(crate) fn in_one_place(runs: &[PageRun]) -> bool {
    let place = |run: &PageRun| match run.at {
        Location::System(_) => None,
        Location::Device { allocation, .. } => Some(allocation),
    };
    runs.windows(2)
        .all(|pair| place(&pair[0]) == place(&pair[1]))
}
