//! [`Svm`]: notifiers and ranges of one device address space (`drm_gpusvm`).
//!
//! Two parties meet here. A driver, under its `vm` lock, finds ranges, gathers their pages and
//! commits bindings. The host, on any thread and at any moment, invalidates. They share one lock,
//! the **notifier lock**, and one number, the interval's sequence:
//!
//! ```text
//!  driver:  get_pages: read_begin ── fault_in ──┐            ┌─ commit: lock, read_retry, write PTEs
//!                                               │  anything  │
//!  host:    start: lock, set_seq, zap, flush ───┴────────────┴─ change tables ── end
//! ```
//!
//! Either the invalidation comes first and `commit` sees the sequence moved, or `commit` comes
//! first and the invalidation finds the binding and zaps it. There is no third case.
//!
//! Lock rank: `notifier`. Inside [`Svm::start`](InvalidationSink::start) nothing allocates, calls
//! the host, or takes another lock but leaves.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::NotifierHeld;
use crate::addr::{HostSpan, HostVa};
use crate::error::{Failed, Interrupted, Stale};
use crate::event::Event;
use crate::mmu::{Interval, Seq};
use crate::mutant::Mutant;
use crate::pages::{PageSet, in_one_place};
use crate::range::{Range, RangeRef, Tree};
use crate::seam::env::{Environment, Mutex, Ns, Point, Work};
use crate::seam::mm::{
    Access, AddressSpace, FaultIn, InvalidateReason, InvalidationSink, Owner, PagemapId, Pager,
};
use crate::seam::{Platform, Seams};

/// How long a fault with the planted bug rests where an invalidation does most harm.
const PLANTED_PAUSE: Ns = Ns(300_000);

/// What a driver does with the bindings of ranges. Every call comes with the notifier lock held:
/// no allocation, no host call, no lock but leaves.
pub trait Bindings: Send + Sync + 'static {
    /// What the driver keeps for one range; the default is unbound.
    type Binding: Default + Send + fmt::Debug;

    /// Makes the entries of one range invalid. Returns whether there were any.
    fn zap(&self, binding: &mut Self::Binding, held: &NotifierHeld<'_>) -> Zapped;

    /// Flushes `span` out of every TLB and waits; called once per invalidation, after all zaps.
    fn flush(&self, span: HostSpan, held: &NotifierHeld<'_>);

    /// An invalidation that zapped something is over, `started` at this time.
    fn zapped(&self, span: HostSpan, started: Ns);
}

/// Whether a zap found valid entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zapped {
    /// Entries were valid and are not any more: the TLBs must be flushed.
    Entries,
    /// Nothing was bound.
    Nothing,
}

/// The right to change an [`Svm`]'s structure. There is one per instance; it lives under the
/// driver's `vm` lock, so whoever can borrow it mutably holds that lock.
#[derive(Debug)]
pub struct SvmOwner(());

/// Fixed properties of one [`Svm`].
#[derive(Clone, Copy, Debug)]
pub struct SvmConfig {
    /// Identity for deferred work.
    pub vm: u32,
    /// Identity as owner of exclusive pages: no two address spaces of a process share one.
    pub owner: Owner,
    /// Host addresses that may be shared.
    pub area: HostSpan,
    /// Bytes of a notifier window, a power of two of at least 4 KiB (`svm_notifier_size`).
    pub window_bytes: u64,
}

/// What a fault asks of [`Svm::find_or_insert_range`] (`drm_gpusvm_ctx`).
#[derive(Clone, Copy, Debug)]
pub struct FindRange {
    /// Faulting address.
    pub at: HostVa,
    /// The device mapping around it; ranges stay inside.
    pub area: HostSpan,
    /// Right that the device mapping wants from the CPU mapping.
    pub access: Access,
    /// Whether there is device memory to migrate to.
    pub device_memory: bool,
    /// Chunks up to this many bytes must be populated (`check_pages_threshold`).
    pub populated_up_to: u64,
    /// Most bytes of a new range, a chunk size.
    pub largest: u64,
}

/// Notifiers and ranges of one device address space.
pub struct Svm<P: Platform, D: Bindings> {
    seams: Seams<P>,
    driver: D,
    config: SvmConfig,
    /// The notifier lock.
    tree: Mutex<P::Env, Tree<D::Binding>>,
    /// Dead ranges are no longer queued; set once, under the `vm` lock.
    closed: AtomicBool,
    /// Test switch, see [`plant_missing_recheck`](Self::plant_missing_recheck).
    skip_recheck: AtomicBool,
}

impl<P: Platform, D: Bindings> fmt::Debug for Svm<P, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svm")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl<P: Platform, D: Bindings> Svm<P, D> {
    /// An address space without ranges, and the right to change it.
    ///
    /// # Errors
    /// [`Failed::OutOfArea`] where the window size is no power of two of at least 4 KiB.
    pub fn new(
        seams: Seams<P>,
        driver: D,
        config: SvmConfig,
    ) -> Result<(Arc<Self>, SvmOwner), Failed> {
        if !config.window_bytes.is_power_of_two() || config.window_bytes < crate::addr::PAGE {
            return Err(Failed::OutOfArea(config.area.start()));
        }
        let tree = Mutex::<P::Env, _>::new(Tree::new(config.window_bytes));
        let svm = Self {
            seams,
            driver,
            config,
            tree,
            closed: AtomicBool::new(false),
            skip_recheck: AtomicBool::new(false),
        };
        Ok((Arc::new(svm), SvmOwner(())))
    }

    /// The driver's part.
    pub const fn driver(&self) -> &D {
        &self.driver
    }

    /// The range around `find.at`: the one that exists, or a new one of the largest chunk that
    /// fits (`svm-design.md` section 2.4). An existing range is returned as it is, also a dead one.
    ///
    /// # Errors
    /// [`Failed::NoVma`], [`Failed::Permission`], [`Failed::Unmappable`] about the CPU mapping,
    /// [`Failed::OutOfArea`], or what the host answers to a subscription. [`Stale::CpuMappingChanged`]
    /// where something has changed while a range was made.
    pub fn find_or_insert_range(
        self: &Arc<Self>,
        owner: &mut SvmOwner,
        find: &FindRange,
    ) -> Result<RangeRef, Interrupted> {
        if !self.config.area.contains(find.at) || !find.area.contains(find.at) {
            return Err(Failed::OutOfArea(find.at).into());
        }
        if let Some(range) = self.find_range(find.at) {
            return self.check_vma(find).map(|_vma| range).map_err(Into::into);
        }
        self.insert_range(owner, find)
    }

    /// Pages of `range`, accessible with the right `access` and all in one place
    /// (`drm_gpusvm_get_pages`). Nothing is published yet: [`commit`](Self::commit) does.
    ///
    /// # Errors
    /// [`Stale::MixedPlacement`] where the pages lie in several places or allocations, or what
    /// [`AddressSpace::fault_in`] answers.
    pub fn get_pages(
        &self,
        range: &RangeRef,
        access: Access,
        keep: Option<PagemapId>,
    ) -> Result<PageSet, Interrupted> {
        let mut seq = self.seams.space.read_begin(&range.interval);
        let mut runs = Vec::new();
        let request = FaultIn {
            span: range.span,
            access,
            keep,
            pager: Pager::Wait,
        };
        self.seams.space.fault_in(&request, &mut runs)?;
        self.seams.env.yield_point(Point::AfterFaultIn);
        if self.seams.env.mutant(Mutant::SeqTakenLate) {
            seq = self.seams.space.read_begin(&range.interval);
        }
        if self.skip_recheck.load(Ordering::Relaxed) {
            // What the missing check would notice has to happen now: more of it does.
            let now = self.seams.env.now();
            self.seams.env.sleep_until(now.after(PLANTED_PAUSE));
        }
        if !in_one_place(&runs) {
            return Err(Stale::MixedPlacement.into());
        }
        Ok(PageSet {
            runs,
            access,
            seq,
            exclusive: false,
        })
    }

    /// Publishes `pages` and lets `bind` write the entries, unless an invalidation came in
    /// between. `bind` runs under the notifier lock and cannot fail.
    ///
    /// # Errors
    /// [`Stale::RangeUnmapped`] or [`Stale::CpuMappingChanged`]; then nothing was written.
    pub fn commit(
        &self,
        range: &RangeRef,
        mut pages: PageSet,
        bind: impl FnOnce(&mut D::Binding, &NotifierHeld<'_>),
    ) -> Result<(), Stale> {
        let mut tree = self.tree.lock();
        let found = tree
            .get_mut(range)
            .filter(|r| !r.is_dead())
            .ok_or(Stale::RangeUnmapped)?;
        if !self.drops_recheck(&pages) && range.interval.read_retry(pages.seq) {
            return Err(Stale::CpuMappingChanged);
        }
        if self.seams.env.mutant(Mutant::CommitWithoutGuard) {
            return self.commit_unguarded(tree, range, bind);
        }
        bind(&mut found.binding, &NotifierHeld::new());
        core::mem::swap(&mut found.pages.runs, &mut pages.runs);
        found.pages.mapped = true;
        found.pages.writable = pages.access == Access::Write;
        drop(tree);
        Ok(())
    }

    /// Whether the range is mapped with the right `access` and `bound` holds for its binding and
    /// the device memory its pages are in.
    pub fn is_bound(
        &self,
        range: &RangeRef,
        access: Access,
        bound: impl FnOnce(&D::Binding, Option<PagemapId>) -> bool,
    ) -> bool {
        let mut tree = self.tree.lock();
        let shortcut = self.seams.env.mutant(Mutant::DeviceMemoryShortcut);
        tree.get_mut(range).is_some_and(|r| {
            if shortcut && r.pages.was_device() {
                return true;
            }
            !r.is_dead() && r.allows(access) && bound(&r.binding, r.pages.pagemap())
        })
    }

    /// Brings every page of the range home (`drm_gpusvm_range_evict`), by reading it as a CPU
    /// would.
    ///
    /// # Errors
    /// What [`AddressSpace::fault_in`] answers.
    pub fn evict_range(&self, range: &RangeRef) -> Result<(), Interrupted> {
        let request = FaultIn {
            span: range.span,
            access: Access::Read,
            keep: None,
            pager: Pager::Wait,
        };
        self.seams.space.fault_in(&request, &mut Vec::new())
    }

    /// The next dead range, off the garbage list.
    pub fn pop_garbage(&self, _owner: &mut SvmOwner) -> Option<RangeRef> {
        self.tree.lock().pop_garbage()
    }

    /// Removes a range: unbinds it by `unbind` under the notifier lock, unmaps its pages, and only
    /// then takes it out of the tree, so that a racing unmap always finds it. `None`, and nothing
    /// done, where it is gone, or died meanwhile and waits for
    /// [`pop_garbage`](Self::pop_garbage).
    pub fn remove_range<R>(
        &self,
        _owner: &mut SvmOwner,
        range: &RangeRef,
        unbind: impl FnOnce(&mut D::Binding, &NotifierHeld<'_>) -> R,
    ) -> Option<R> {
        let mut tree = self.tree.lock();
        let found = tree.get_mut(range).filter(|r| !r.is_garbage())?;
        let result = unbind(&mut found.binding, &NotifierHeld::new());
        found.pages.mapped = false;
        let (_binding, emptied) = tree.remove(range);
        drop(tree);
        if let Some(interval) = emptied
            && !self.seams.env.mutant(Mutant::SubscriptionKept)
        {
            self.seams.space.unsubscribe(&interval);
        }
        self.seams
            .emit(&Event::RangeCollected { range: range.span });
        Some(result)
    }

    /// From now on dead ranges are not queued: the VM is closed and removes all of them itself.
    pub fn close(&self, _owner: &mut SvmOwner) {
        let _under_the_notifier_lock = self.tree.lock();
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Plants a bug: [`commit`](Self::commit) no longer re-checks the sequence. Tests use it to
    /// show that they would notice.
    #[doc(hidden)]
    pub fn plant_missing_recheck(&self) {
        self.skip_recheck.store(true, Ordering::Relaxed);
    }
}

/// The invalidation flow: zap, one flush, unmap pages, mark for the collector.
impl<P: Platform, D: Bindings> InvalidationSink for Svm<P, D> {
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq) {
        let started = self.seams.env.now();
        let mut tree = self.tree.lock();
        let noted = !self.seams.env.mutant(Mutant::SeqNotSet) || tree.overlaps(span);
        if noted && !self.is_own(reason) {
            interval.set_seq(seq);
        }
        let Some(clipped) = span.intersect(interval.window()) else {
            return;
        };
        self.seams.emit(&Event::InvalidateStart {
            span: clipped,
            reason,
        });
        let held = NotifierHeld::new();
        if self.seams.env.mutant(Mutant::ZapAfterFlush) {
            self.driver.flush(clipped, &held);
        }
        if let Some(zapped) = self.zap_ranges(&mut tree, clipped, reason, &held) {
            if !self.keeps_tlbs(reason) {
                self.driver.flush(zapped, &held);
            }
            self.driver.zapped(zapped, started);
        }
        unmap_pages(&mut tree, clipped);
        if reason == InvalidateReason::Unmap && !self.closed.load(Ordering::Relaxed) {
            self.queue_unmapped(&mut tree, clipped);
        }
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}

impl<P: Platform, D: Bindings> Svm<P, D> {
    /// Zaps every overlapping range; returns the joined span of those that had valid entries. The
    /// span grows with every range: one start taken from the last range only would leave the head
    /// of the first one in the TLBs.
    fn zap_ranges(
        &self,
        tree: &mut Tree<D::Binding>,
        span: HostSpan,
        reason: InvalidateReason,
        held: &NotifierHeld<'_>,
    ) -> Option<HostSpan> {
        let window = tree.window_mut(span.start())?;
        let last_only = self.seams.env.mutant(Mutant::FlushSpanOverwritten);
        window
            .overlapping_mut(span)
            .filter(|range| !self.keeps_entries(reason, &range.pages))
            .filter_map(|range| match self.driver.zap(&mut range.binding, held) {
                Zapped::Entries => Some(range.span),
                Zapped::Nothing => None,
            })
            .reduce(|all, next| if last_only { next } else { all.join(next) })
    }

    /// Marks every overlapping range dead and asks for the collector.
    fn queue_unmapped(&self, tree: &mut Tree<D::Binding>, span: HostSpan) {
        let mut at = span;
        let mut queued = false;
        while let Some(found) = tree
            .window(span.start())
            .and_then(|w| w.overlapping(at).next().map(|r| r.span))
        {
            tree.mark_unmapped(found.start());
            queued = true;
            at = HostSpan::new(found.end(), span.end());
            if at.is_empty() {
                break;
            }
        }
        if queued {
            self.seams
                .env
                .defer(Work::CollectGarbage { vm: self.config.vm });
        }
    }
}

/// Withdraws the pages of every overlapping range; buffers are kept.
fn unmap_pages<B: Default>(tree: &mut Tree<B>, span: HostSpan) {
    let Some(window) = tree.window_mut(span.start()) else {
        return;
    };
    window
        .overlapping_mut(span)
        .for_each(|range: &mut Range<B>| range.pages.mapped = false);
}

mod exclusive;
mod insert;
mod look;
mod planted;
#[cfg(test)]
mod tests;
