//! Pages that a device has for itself, for atomics on host memory (`svm-design.md` section 4.6).
//!
//! The taking of the page is an invalidation like any other, but for one thing: it must not count as
//! a change between the look at the page and the binding, or no binding would ever be in time. What
//! comes before it does count: a page that an attempt has taken, and was too late to bind, is given
//! back before the next one looks, or that one would be too late as well, by its own doing.

use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{HostSpan, HostVa, PAGE, PageCount};
use crate::error::{Failed, Interrupted, Stale};
use crate::mutant::Mutant;
use crate::pages::PageSet;
use crate::range::RangeRef;
use crate::seam::env::{Environment, Point};
use crate::seam::mm::{Access, AddressSpace, FaultIn, InvalidateReason, Location, PageRun, Pager};
use crate::seam::{Platform, Seams};
use crate::svm::{Bindings, Svm};

impl<P: Platform, D: Bindings> Svm<P, D> {
    /// Takes the page of `range`, a range of one page, away from the CPU. As after
    /// [`get_pages`](Self::get_pages), nothing is published yet, and [`commit`](Self::commit) notices
    /// when the CPU has taken the page back. The caller holds the `vm` lock: nobody else may look up
    /// pages meanwhile.
    ///
    /// # Errors
    /// [`Failed::OutOfArea`] for a larger range, or what [`AddressSpace::make_exclusive`] answers.
    pub fn make_exclusive(&self, range: &RangeRef) -> Result<PageSet, Interrupted> {
        let at: HostVa = range.span.start();
        if range.span != HostSpan::at(at, PAGE) {
            return Err(Failed::OutOfArea(at).into());
        }
        let Seams { space, env, .. } = &self.seams;
        let request = FaultIn {
            span: range.span,
            access: Access::Write,
            keep: None,
            pager: Pager::Wait,
        };
        space.fault_in(&request, &mut Vec::new())?;
        let seq = space.read_begin(&range.interval);
        let mut given = None;
        space.make_exclusive(at, self.config.owner, &mut |bus| given = Some(bus))?;
        env.yield_point(Point::AfterFaultIn);
        let bus = given.ok_or(Stale::PagesRefused)?;
        Ok(PageSet {
            runs: vec![PageRun {
                pages: PageCount::new(1),
                at: Location::System(bus),
            }],
            access: Access::Write,
            seq,
            exclusive: true,
        })
    }

    /// Whether an invalidation is the one of [`make_exclusive`](Self::make_exclusive), which runs under
    /// the `vm` lock: no other look at pages of this address space is under way.
    pub(super) fn is_own(&self, reason: InvalidateReason) -> bool {
        match reason {
            InvalidateReason::Exclusive(owner) => {
                owner == self.config.owner || self.seams.env.mutant(Mutant::ExclusiveEventOfOthers)
            }
            InvalidateReason::Unmap
            | InvalidateReason::Clear
            | InvalidateReason::ProtectVma
            | InvalidateReason::ProtectPage
            | InvalidateReason::Release
            | InvalidateReason::Migrate => false,
        }
    }
}
