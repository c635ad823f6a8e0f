//! [`Pagemap`]: one device's memory as a place where pages of a process can live
//! (`drm_pagemap`), and the migrations to and from it.
//!
//! A pagemap knows host spans, device memory and the host mm; it knows neither ranges nor device
//! page tables. Entries that point to moved pages vanish because every migration runs an
//! invalidation; nothing leads from device memory to a device address.
//!
//! ```text
//!  to_device:       allocate a BO ─ isolate pages ─ copy or adopt ─ finalize ─ put on the LRU
//!  move_to_system:  isolate pages ─ copy or surrender ─ finalize      (the one way home)
//! ```
//!
//! An allocation lives exactly as long as the host holds a page of it: the host's references are
//! counted, and the last one frees the memory.

mod allocation;
mod to_device;
mod to_system;

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::seam::mm::{AllocationId, PagemapId};
use crate::seam::{Platform, Seams};
use crate::vram::Manager;

pub use allocation::Allocation;
pub use to_device::ToDevice;
pub use to_system::move_to_system;

/// One device's memory, able to hold pages of the process.
pub struct Pagemap<P: Platform> {
    seams: Seams<P>,
    id: PagemapId,
    copy: Arc<P::Copy>,
    vram: Arc<Manager<P::Env>>,
    next_allocation: AtomicU64,
}

impl<P: Platform> fmt::Debug for Pagemap<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pagemap({})", self.id.0)
    }
}

impl<P: Platform> Pagemap<P> {
    /// A pagemap over the memory that `vram` manages and `copy` can reach.
    #[must_use]
    pub fn new(
        seams: Seams<P>,
        id: PagemapId,
        copy: Arc<P::Copy>,
        vram: Arc<Manager<P::Env>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            seams,
            id,
            copy,
            vram,
            next_allocation: AtomicU64::new(1),
        })
    }

    /// Identity, as page locations carry it.
    #[must_use]
    pub const fn id(&self) -> PagemapId {
        self.id
    }

    /// The memory's manager.
    #[must_use]
    pub const fn vram(&self) -> &Arc<Manager<P::Env>> {
        &self.vram
    }

    fn next_id(&self) -> AllocationId {
        // Unique over all pagemaps: the identity of the memory stands in the upper bits.
        let serial = self.next_allocation.fetch_add(1, Ordering::Relaxed);
        AllocationId(u64::from(self.id.0) << 48 | serial)
    }
}
