//! [`Device`]: a node, shared by all who have it open.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PageCount, VramAddr, VramSpan};
use gpusvm::error::Failed;
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::{Environment, Mutex, Point};
use gpusvm::seam::mm::{AddressSpace, Location, PagemapId};
use gpusvm_abi::bus::{SystemBus, VramStore};

use crate::block::Block;
use crate::memory::Free;
use crate::uapi::Errno;

/// Rounds in which everything is sent home before what is left is left.
const EVICT_ROUNDS: usize = 64;

/// What kind of memory a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The device's alone (`DEVICE_PRIVATE`).
    Private,
    /// The CPU uses it in place, too (`DEVICE_COHERENT`): it begins at this bus address.
    Coherent(BusAddr),
}

/// What a device is made of.
#[derive(Clone)]
pub struct DeviceConfig<E> {
    /// Clock, locks, waiting.
    pub env: Arc<E>,
    /// Identity of its memory, unlike that of any other device.
    pub id: PagemapId,
    /// What kind of memory it is.
    pub kind: Kind,
    /// The memory.
    pub vram: Arc<dyn VramStore>,
    /// How it reaches host memory.
    pub bus: Arc<dyn SystemBus>,
}

impl<E> fmt::Debug for DeviceConfig<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceConfig")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// Memory that is free, and memory that has pages.
struct Pool<E: Environment, S: AddressSpace> {
    free: Free,
    /// By the offset of their memory.
    blocks: BTreeMap<VramAddr, Weak<Block<E, S>>>,
}

/// A node (`/dev/hmm_dmirrorN`).
pub struct Device<E: Environment, S: AddressSpace> {
    config: DeviceConfig<E>,
    /// A leaf lock.
    pool: Mutex<E, Pool<E, S>>,
    next_id: AtomicU64,
}

impl<E: Environment, S: AddressSpace> fmt::Debug for Device<E, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl<E: Environment, S: AddressSpace> Device<E, S> {
    /// A device with empty memory.
    #[must_use]
    pub fn new(config: DeviceConfig<E>) -> Arc<Self> {
        let free = Free::new(config.vram.size());
        Arc::new(Self {
            config,
            pool: Mutex::<E, _>::new(Pool {
                free,
                blocks: BTreeMap::new(),
            }),
            next_id: AtomicU64::new(1),
        })
    }

    /// Identity of its memory.
    #[must_use]
    pub const fn id(&self) -> PagemapId {
        self.config.id
    }

    pub(crate) const fn env(&self) -> &Arc<E> {
        &self.config.env
    }

    pub(crate) const fn kind(&self) -> Kind {
        self.config.kind
    }

    /// An identity for an allocation, unlike those of all devices.
    pub(crate) fn next_id(&self) -> u64 {
        let serial = self.next_id.fetch_add(1, Ordering::Relaxed);
        u64::from(self.config.id.0) << 48 | serial
    }

    /// Takes memory for pages.
    pub(crate) fn take(&self, pages: PageCount) -> Option<VramSpan> {
        self.pool.lock().free.take(pages)
    }

    /// Enters a block, so that it can be found by its memory.
    pub(crate) fn enter(&self, block: &Arc<Block<E, S>>) {
        let start = block.memory().start();
        let weak = Arc::downgrade(block);
        self.pool.lock().blocks.insert(start, weak);
    }

    /// Takes memory back that has no pages any more.
    pub(crate) fn give(&self, memory: VramSpan) {
        let mut pool = self.pool.lock();
        let gone = pool.blocks.remove(&memory.start());
        pool.free.give(memory);
        drop(pool);
        drop(gone);
    }

    /// The block whose memory holds the page at `at`.
    pub(crate) fn block_at(&self, at: VramAddr) -> Option<Arc<Block<E, S>>> {
        let pool = self.pool.lock();
        let (_, weak) = pool.blocks.range(..=at).next_back()?;
        let block = weak.upgrade();
        drop(pool);
        block.filter(|block| block.memory().contains(at))
    }

    /// Where in its memory a page is, if it is there.
    pub(crate) fn offset_of(&self, at: Location) -> Option<VramAddr> {
        match (at, self.config.kind) {
            (Location::Device { pagemap, vram, .. }, _) => {
                (pagemap == self.config.id).then_some(vram)
            }
            (Location::System(bus), Kind::Coherent(first)) => {
                let offset = bus.get().checked_sub(first.get())?;
                (offset < self.config.vram.size()).then_some(VramAddr::new(offset))
            }
            (Location::System(_), Kind::Private) => None,
        }
    }

    /// Host addresses at which pages that are moved there are this memory, emptied first.
    pub(crate) fn adopt(&self, memory: VramSpan) -> Option<HostSpan> {
        self.surrender(memory).inspect(|_there| {
            self.config
                .vram
                .discard(memory.start().get(), memory.bytes());
        })
    }

    /// Host addresses from which the pages of this memory can be taken back.
    pub(crate) fn surrender(&self, memory: VramSpan) -> Option<HostSpan> {
        let at = self.config.vram.aperture(memory.start().get())?;
        Some(HostSpan::at(HostVa::new(at), memory.bytes()))
    }

    /// Runs the copies of a migration.
    pub(crate) fn copy(&self, moves: &[CopyMove]) -> Result<(), Failed> {
        let vram = &self.config.vram;
        for step in moves {
            let (at, bytes) = (step.vram.start().get(), step.vram.bytes());
            let copied = match step.with {
                CopyWith::From(bus) => vram.copy_from_bus(at, bus.get(), bytes),
                CopyWith::To(bus) => vram.copy_to_bus(at, bus.get(), bytes),
                CopyWith::Hole => {
                    vram.zero(at, bytes);
                    Ok(())
                }
            };
            copied.map_err(|_no_memory| Failed::Copy)?;
        }
        Ok(())
    }

    /// The device reads a page.
    pub(crate) fn read(&self, from: Location, to: &mut [u8]) -> Result<(), Errno> {
        match from {
            Location::System(bus) => {
                let read = self.config.bus.read(bus.get(), to);
                read.map_err(|_no_memory| Errno::Fault)
            }
            Location::Device { vram, .. } => {
                self.config.vram.read(vram.get(), to);
                Ok(())
            }
        }
    }

    /// The device writes a page.
    pub(crate) fn write(&self, to: Location, from: &[u8]) -> Result<(), Errno> {
        match to {
            Location::System(bus) => {
                let written = self.config.bus.write(bus.get(), from);
                written.map_err(|_no_memory| Errno::Fault)
            }
            Location::Device { vram, .. } => {
                self.config.vram.write(vram.get(), from);
                Ok(())
            }
        }
    }

    /// Sends all pages home, of every process. Pages that other operations hold are waited for, as
    /// long as that is worth it.
    pub(crate) fn evict_all(&self) {
        for _round in 0..EVICT_ROUNDS {
            let pool = self.pool.lock();
            let blocks: Vec<_> = pool.blocks.values().filter_map(Weak::upgrade).collect();
            drop(pool);
            if blocks.is_empty() {
                return;
            }
            for block in blocks {
                // What could not come now is asked again in the next round.
                let _moved = block.bring_all();
            }
            self.env().yield_point(Point::Retry);
        }
    }
}
