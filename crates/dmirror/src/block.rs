//! [`Block`]: pages of device memory that came together (the module's device pages), and the one
//! way home.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{BusAddr, HostSpan, PAGE, PageCount, VramSpan};
use gpusvm::error::{Interrupted, Stale};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::{Environment, Point};
use gpusvm::seam::mm::{
    AddressSpace, AllocationId, AllocationRef, CpuFault, CpuFaultOutcome, CpuFaultSink,
    DeviceAllocation, Folios, MigrateTo, MigrationSet, PagemapId,
};

use crate::device::{Device, Kind};
use crate::uapi::FAIL_ALLOC;

/// The flags of an open file, which its pages know, too.
#[derive(Debug, Default)]
pub(crate) struct Flags(AtomicU64);

impl Flags {
    pub(crate) fn set(&self, flags: u64) {
        self.0.store(flags, Ordering::Relaxed);
    }

    /// Whether the next allocation is to fail; it is asked once.
    pub(crate) fn take_failure(&self) -> bool {
        self.0.fetch_and(!FAIL_ALLOC, Ordering::Relaxed) & FAIL_ALLOC != 0
    }
}

/// Whether a block was made for one large page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Large,
    Small,
}

/// Device memory with pages of a process. The host holds a reference while it has any.
pub(crate) struct Block<E: Environment, S: AddressSpace> {
    device: Arc<Device<E, S>>,
    space: Arc<S>,
    flags: Arc<Flags>,
    id: AllocationId,
    memory: VramSpan,
    origin: HostSpan,
    size: Size,
}

impl<E: Environment, S: AddressSpace> Block<E, S> {
    /// Memory for the pages of `origin`; `None` where there is none.
    pub(crate) fn allocate(
        device: &Arc<Device<E, S>>,
        (space, flags): (&Arc<S>, &Arc<Flags>),
        origin: HostSpan,
        size: Size,
    ) -> Option<Arc<Self>> {
        let block = Arc::new(Self {
            memory: device.take(origin.pages())?,
            id: AllocationId(device.next_id()),
            device: Arc::clone(device),
            space: Arc::clone(space),
            flags: Arc::clone(flags),
            origin,
            size,
        });
        device.enter(&block);
        Some(block)
    }

    pub(crate) const fn memory(&self) -> VramSpan {
        self.memory
    }

    pub(crate) const fn size(&self) -> Size {
        self.size
    }

    /// Brings what the host still has of `part` of the memory home.
    pub(crate) fn bring(
        self: &Arc<Self>,
        part: VramSpan,
        folios: Folios,
    ) -> Result<PageCount, Interrupted> {
        let to = MigrateTo::System {
            allocation: Arc::clone(self) as AllocationRef,
            part,
            aperture: self.device.surrender(self.memory),
            folios,
        };
        let set = self.space.migrate_begin(self.origin, to)?;
        let env = self.device.env();
        env.yield_point(Point::AfterCollect);
        self.device.copy(set.moves())?;
        env.yield_point(Point::BeforeFinalize);
        Ok(set.finalize())
    }

    /// Brings everything home.
    pub(crate) fn bring_all(self: &Arc<Self>) -> Result<PageCount, Interrupted> {
        self.bring(self.memory, Folios::Keep)
    }

    /// Brings the touched page home, and the large page that it is part of.
    fn serve(self: &Arc<Self>, fault: CpuFault) -> Result<PageCount, Interrupted> {
        let folios = match (self.flags.take_failure(), self.size) {
            (false, _) => Folios::Keep,
            (true, Size::Large) => Folios::Split,
            // Without a page for it: the touch comes again.
            (true, Size::Small) => return Err(Stale::PagesBusy.into()),
        };
        self.bring(VramSpan::at(fault.vram, PAGE), folios)
    }
}

impl<E: Environment, S: AddressSpace> Drop for Block<E, S> {
    fn drop(&mut self) {
        self.device.give(self.memory);
    }
}

impl<E: Environment, S: AddressSpace> CpuFaultSink for Block<E, S> {
    fn migrate_to_ram(self: Arc<Self>, fault: CpuFault) -> CpuFaultOutcome {
        match self.serve(fault) {
            Ok(_) | Err(Interrupted::Stale(_)) => CpuFaultOutcome::Retry,
            Err(Interrupted::Failed(_)) => CpuFaultOutcome::Lost,
        }
    }
}

impl<E: Environment, S: AddressSpace> DeviceAllocation for Block<E, S> {
    fn id(&self) -> AllocationId {
        self.id
    }

    fn pagemap(&self) -> PagemapId {
        self.device.id()
    }

    fn coherent_at(&self) -> Option<BusAddr> {
        match self.device.kind() {
            Kind::Private => None,
            Kind::Coherent(first) => Some(first.plus(self.memory.start().get())),
        }
    }

    fn vram(&self) -> VramSpan {
        self.memory
    }

    fn origin(&self) -> HostSpan {
        self.origin
    }

    fn bring_home(self: Arc<Self>, _cause: HomeCause) -> Result<PageCount, Interrupted> {
        self.bring_all()
    }
}
