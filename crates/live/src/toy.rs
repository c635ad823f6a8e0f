//! A device memory that does nothing by itself, for the tests of this crate.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use gpusvm::addr::{HostSpan, HostVa, PAGE_2M, PageCount, VramAddr, VramSpan};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::event::{Event, EventSink, HomeCause};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::{
    AddressSpace, AllocationId, AllocationRef, CpuFault, CpuFaultOutcome, CpuFaultSink,
    DeviceAllocation, MigrateTo, MigrationSet, PagemapId,
};
use gpusvm_abi::bus::VramStore;

use crate::env::LiveEnv;
use crate::level::{BracketChoice, LiveConfig};
use crate::space::LiveSpace;
use crate::sys::vram::{LiveVram, VramMode};

/// What happened, as far as tests ask.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// [`Event::MoveMisreported`].
    pub(crate) misreported: AtomicU64,
    /// [`Event::HostConflict`] and [`Event::HostGone`].
    pub(crate) lost: AtomicU64,
}

impl EventSink for Counts {
    fn record(&self, _now: Ns, event: &Event) {
        match event {
            Event::MoveMisreported { .. } => self.misreported.fetch_add(1, Ordering::Relaxed),
            Event::HostConflict { .. } | Event::HostGone { .. } => {
                self.lost.fetch_add(1, Ordering::Relaxed)
            }
            _ => return,
        };
    }
}

/// What a process has once, tests use one after the other: the space, the patched sites, the hull.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A space with one device memory of two blocks. Closed when dropped.
pub(crate) struct Bench {
    pub(crate) space: Arc<LiveSpace>,
    pub(crate) vram: Arc<LiveVram>,
    pub(crate) counts: Arc<Counts>,
    _alone: MutexGuard<'static, ()>,
}

impl Bench {
    /// Opens it; says why not and answers `None` where the machine has no userfaultfd.
    pub(crate) fn open(mode: VramMode) -> Option<Self> {
        let alone = alone();
        let counts = Arc::new(Counts::default());
        // Other tests of this binary patch and restore the system-call sites.
        let config = LiveConfig {
            brackets: BracketChoice::Events,
            ..LiveConfig::default()
        };
        match LiveSpace::open(&config, LiveEnv::new(1), counts.clone()) {
            Ok(space) => Some(Self {
                vram: space.create_vram(2 * PAGE_2M, mode).expect("4M of memory"),
                space,
                counts,
                _alone: alone,
            }),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    /// An allocation at the start of the device memory, for the pages of `origin`.
    pub(crate) fn allocation(&self, origin: HostSpan) -> Arc<Toy> {
        Arc::new(Toy {
            home: Some((Arc::downgrade(&self.space), Arc::clone(&self.vram))),
            ..Toy::loose(1, origin)
        })
    }

    /// Sends the pages of `span` to the device.
    pub(crate) fn send(&self, span: HostSpan) -> Result<(), Interrupted> {
        let allocation = self.allocation(span);
        let aperture = allocation.aperture();
        let to = MigrateTo::device(allocation, aperture);
        let set = self.space.migrate_begin(span, to)?;
        copy(&self.vram, set.moves());
        set.finalize();
        Ok(())
    }

    /// Word `index` of the device memory.
    pub(crate) fn device_word(&self, index: u64) -> u64 {
        let mut word = [0; 8];
        self.vram.read(index * 8, &mut word);
        u64::from_ne_bytes(word)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.space.close();
    }
}

/// An allocation; without a home its pages stay.
pub(crate) struct Toy {
    id: AllocationId,
    origin: HostSpan,
    home: Option<(Weak<LiveSpace>, Arc<LiveVram>)>,
}

impl Toy {
    /// One that belongs to no space.
    pub(crate) fn loose(id: u64, origin: HostSpan) -> Self {
        Self {
            id: AllocationId(id),
            origin,
            home: None,
        }
    }

    /// Where it lies in this process.
    pub(crate) fn aperture(&self) -> Option<HostSpan> {
        let (_, memory) = self.home.as_ref()?;
        let at = memory.aperture(0)?;
        Some(HostSpan::at(HostVa::new(at), self.origin.bytes()))
    }
}

impl CpuFaultSink for Toy {
    fn migrate_to_ram(self: Arc<Self>, _fault: CpuFault) -> CpuFaultOutcome {
        match self.bring_home(HomeCause::CpuFault) {
            Ok(_) => CpuFaultOutcome::Retry,
            Err(_) => CpuFaultOutcome::Lost,
        }
    }
}

impl DeviceAllocation for Toy {
    fn id(&self) -> AllocationId {
        self.id
    }

    fn pagemap(&self) -> PagemapId {
        PagemapId(1)
    }

    fn vram(&self) -> VramSpan {
        VramSpan::at(VramAddr::new(0), self.origin.bytes())
    }

    fn origin(&self) -> HostSpan {
        self.origin
    }

    fn bring_home(self: Arc<Self>, _cause: HomeCause) -> Result<PageCount, Interrupted> {
        let Some((space, memory)) = self.home.clone() else {
            return Err(Failed::AddressSpaceGone.into());
        };
        let Some(space) = space.upgrade() else {
            return Ok(PageCount::ZERO);
        };
        let (origin, aperture) = (self.origin, self.aperture());
        let allocation: AllocationRef = self;
        let to = MigrateTo::home(allocation, aperture);
        let set = space.migrate_begin(origin, to)?;
        copy(&memory, set.moves());
        Ok(set.finalize())
    }
}

fn copy(memory: &LiveVram, moves: &[CopyMove]) {
    for step in moves {
        let (vram, bytes) = (step.vram.start().get(), step.vram.bytes());
        let copied = match step.with {
            CopyWith::From(bus) => memory.copy_from_bus(vram, bus.get(), bytes),
            CopyWith::To(bus) => memory.copy_to_bus(vram, bus.get(), bytes),
            CopyWith::Hole => {
                memory.zero(vram, bytes);
                Ok(())
            }
        };
        copied.expect("staging is mapped");
    }
}
