//! How ranges come to be: the mapping, the window, the chunk (`svm-design.md` section 2.4).

use alloc::sync::Arc;

use crate::addr::{HostSpan, HostVa};
use crate::chunk::{self, Limits};
use crate::error::{Failed, Interrupted, Stale};
use crate::mmu::Interval;
use crate::range::{RangeKind, RangeRef};
use crate::seam::Platform;
use crate::seam::mm::{AddressSpace, Vma, VmaKind};
use crate::svm::{Bindings, FindRange, Svm, SvmOwner};

impl<P: Platform, D: Bindings> Svm<P, D> {
    pub(super) fn check_vma(&self, find: &FindRange) -> Result<Vma, Failed> {
        let vma = self
            .seams
            .space
            .find_vma(find.at)
            .filter(|vma| vma.span.contains(find.at));
        let vma = vma.ok_or(Failed::NoVma(find.at))?;
        if !vma.allows(find.access) || !vma.read {
            return Err(Failed::Permission(find.at));
        }
        if vma.kind == VmaKind::Special {
            return Err(Failed::Unmappable(find.at));
        }
        Ok(vma)
    }

    pub(super) fn find_range(&self, at: HostVa) -> Option<RangeRef> {
        let tree = self.tree.lock();
        let window = tree.window(at)?;
        let range = window.overlapping(HostSpan::at(at, 1)).next()?;
        Some(RangeRef {
            span: range.span,
            serial: range.serial,
            kind: range.kind,
            interval: Arc::clone(&window.interval),
        })
    }

    pub(super) fn insert_range(
        self: &Arc<Self>,
        _owner: &mut SvmOwner,
        find: &FindRange,
    ) -> Result<RangeRef, Interrupted> {
        let window = HostSpan::aligned_around(find.at, self.config.window_bytes)
            .ok_or(Failed::OutOfArea(find.at))?;
        let existing = self
            .tree
            .lock()
            .window(find.at)
            .map(|w| Arc::clone(&w.interval));
        let is_new = existing.is_none();
        // Registered with the host before any range is visible, so that no change is missed.
        let interval = match existing {
            Some(interval) => interval,
            None => self
                .seams
                .space
                .subscribe(window, Arc::<Self>::clone(self))?,
        };
        let made = self.try_insert(find, &interval);
        if is_new && made.is_err() {
            self.seams.space.unsubscribe(&interval);
        }
        made
    }

    /// A range that fits the mapping as it is when the range is inserted: one that goes in between would
    /// leave a range behind that nobody ever finds dead.
    ///
    /// # Errors
    /// [`Stale::CpuMappingChanged`] where something changed meanwhile.
    fn try_insert(
        &self,
        find: &FindRange,
        interval: &Arc<Interval>,
    ) -> Result<RangeRef, Interrupted> {
        let seq = self.seams.space.read_begin(interval);
        let vma = self.check_vma(find)?;
        let limits = Limits {
            vma: vma.span,
            window: interval.window(),
            area: find.area.intersect(self.config.area).unwrap_or(find.area),
            populated_up_to: find.populated_up_to,
            largest: find.largest,
        };
        let chunk = chunk::choose(
            find.at,
            &limits,
            |span| self.has_mapping(span),
            |span| self.seams.space.is_populated(span),
        );
        let span = chunk.ok_or(Failed::OutOfArea(find.at))?;
        let kind = match vma.kind {
            VmaKind::Anonymous if find.device_memory => RangeKind::Migratable,
            VmaKind::Anonymous
            | VmaKind::PrivateFile
            | VmaKind::InPlace
            | VmaKind::HugePages
            | VmaKind::Special => RangeKind::InPlace,
        };
        let mut tree = self.tree.lock();
        if interval.read_retry(seq) {
            return Err(Stale::CpuMappingChanged.into());
        }
        Ok(tree.insert(span, kind, Arc::clone(interval)))
    }
}
