//! [`Allocation`]: device memory that holds pages (`drm_pagemap_devmem` and its zone-device data).

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{HostSpan, PageCount, VramSpan};
use crate::error::{Interrupted, Stale};
use crate::event::{Event, HomeCause};
use crate::pagemap::{Pagemap, move_to_system};
use crate::seam::Platform;
use crate::seam::env::{Environment, Ns};
use crate::seam::mm::{
    AllocationId, CpuFault, CpuFaultOutcome, CpuFaultSink, DeviceAllocation, PagemapId,
};
use crate::vram::{Bo, Evict};

/// One allocation. The host holds a counted reference per span of pages; when the last one goes,
/// the BO goes with it.
pub struct Allocation<P: Platform> {
    pub(super) pagemap: Arc<Pagemap<P>>,
    id: AllocationId,
    pub(super) bo: Arc<Bo<P::Env>>,
    origin: HostSpan,
    /// CPU faults leave the pages alone until then ([`Ns`]); one independent value.
    resident_until: AtomicU64,
}

impl<P: Platform> fmt::Debug for Allocation<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Allocation({:#x} for {})", self.id.0, self.origin)
    }
}

impl<P: Platform> Allocation<P> {
    pub(super) fn new(
        pagemap: &Arc<Pagemap<P>>,
        bo: Arc<Bo<P::Env>>,
        origin: HostSpan,
    ) -> Arc<Self> {
        pagemap.seams.emit(&Event::VramTaken { vram: bo.span() });
        Arc::new(Self {
            pagemap: Arc::clone(pagemap),
            id: pagemap.next_id(),
            bo,
            origin,
            resident_until: AtomicU64::new(0),
        })
    }

    /// Keeps CPU faults away until `deadline`.
    pub(super) fn hold_until(&self, deadline: Ns) {
        self.resident_until.store(deadline.0, Ordering::Relaxed);
    }

    /// When the timeslice ends.
    fn resident_until(&self) -> Ns {
        Ns(self.resident_until.load(Ordering::Relaxed))
    }
}

/// Told before the memory is free, so that nobody is told before of its next owner.
impl<P: Platform> Drop for Allocation<P> {
    fn drop(&mut self) {
        let vram = self.bo.span();
        self.pagemap.seams.emit(&Event::VramFreed { vram });
    }
}

impl<P: Platform> DeviceAllocation for Allocation<P> {
    fn id(&self) -> AllocationId {
        self.id
    }

    fn pagemap(&self) -> PagemapId {
        self.pagemap.id()
    }

    fn vram(&self) -> VramSpan {
        self.bo.span()
    }

    fn origin(&self) -> HostSpan {
        self.origin
    }

    fn bring_home(self: Arc<Self>, cause: HomeCause) -> Result<PageCount, Interrupted> {
        move_to_system(&self, cause)
    }

    fn memory_failure(&self, bad: VramSpan) {
        self.pagemap.vram().lose(bad);
    }
}

/// The CPU-fault flow: timeslice, then [`move_to_system`].
impl<P: Platform> CpuFaultSink for Allocation<P> {
    fn migrate_to_ram(self: Arc<Self>, fault: CpuFault) -> CpuFaultOutcome {
        self.pagemap.seams.emit(&Event::CpuFault { at: fault.at });
        let until = self.resident_until();
        if self.pagemap.seams.env.now() < until {
            return CpuFaultOutcome::RetryAt(until);
        }
        match move_to_system(&self, HomeCause::CpuFault) {
            Ok(_) | Err(Interrupted::Stale(_)) => CpuFaultOutcome::Retry,
            Err(Interrupted::Failed(_)) => CpuFaultOutcome::Lost,
        }
    }
}

/// Eviction under pressure. It ignores the timeslice, as the kernel's does.
impl<P: Platform> Evict for Allocation<P> {
    fn evict(self: Arc<Self>) -> Result<(), Interrupted> {
        self.pagemap.seams.emit(&Event::Evict {
            vram: self.bo.span(),
        });
        move_to_system(&self, HomeCause::Pressure)?;
        // Evicted means that nobody holds a page: the caller's and our own reference remain.
        if Arc::strong_count(&self) > 1 {
            Err(Stale::PagesBusy.into())
        } else {
            Ok(())
        }
    }
}
