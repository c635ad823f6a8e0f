//! [`SoftGpu`]: the device as its driver and its embedder see it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm_abi::bus::{
    BusError, CopyPiece, DevicePort, FaultHandler, Park, SystemBus, TlbTimeout, VramStore,
};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use lock_api::{Mutex, RawMutex};

use crate::copy;
use crate::fault_ring::FaultRing;
use crate::shootdown::{self, Gate, Shootdown};
use crate::tlb::Tlb;
use crate::unit::{Running, Tally};
use crate::updating::{SmemAtomics, Updating};
use crate::work::{Dispatch, Stop, Tile};

/// A root pointer that is not set.
const NO_ROOT: u64 = u64::MAX;
/// Looks at a unit that is inside an access before the waiter sleeps for a moment.
const SPINS: u32 = 2_000;
/// That moment.
const NAP_NS: u64 = 20_000;

/// What a device is made of.
#[derive(Clone, Copy, Debug)]
pub struct GpuConfig {
    /// GTs.
    pub gts: u16,
    /// Execution units per GT.
    pub units_per_gt: u16,
    /// Translations that a unit caches, per block size.
    pub tlb_entries: usize,
    /// Faults that wait in the ring.
    pub fault_ring: usize,
    /// Address-space ids, from 0.
    pub asids: u32,
    /// Time within which units must acknowledge a TLB invalidation.
    pub tlb_timeout_ns: u64,
    /// What becomes of atomics on host memory (`has_device_atomics_on_smem`).
    pub smem_atomics: SmemAtomics,
    /// A bug in the device. Tests use it to show that they would notice.
    pub planted: Option<Planted>,
}

/// A bug that is planted on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// Units acknowledge TLB invalidations and keep their entries.
    KeepTlb,
    /// Units walk before they enter an access, and keep what they found.
    WalkOutsideGate,
    /// A unit whose fault was answered is not woken.
    AnswerWakesNobody,
    /// No acknowledgement of a TLB invalidation arrives.
    LosesTlbAnswers,
}

/// A device cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// This number must not be zero.
    Zero(&'static str),
    /// More units than a fault record can name.
    TooManyUnits,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero(what) => write!(f, "a device needs at least one of: {what}"),
            Self::TooManyUnits => write!(f, "a device has at most {} units", u16::MAX),
        }
    }
}

impl core::error::Error for ConfigError {}

/// Who serves faults.
#[derive(Clone)]
pub enum FaultService {
    /// The handler, on the unit that faulted: lowest latency.
    Inline(Arc<dyn FaultHandler>),
    /// Whoever takes records out of the ring.
    Queue,
}

impl fmt::Debug for FaultService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inline(_) => "Inline",
            Self::Queue => "Queue",
        })
    }
}

/// What a unit is doing at one moment, for reports about a device that no longer moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitState {
    /// It is inside an access: a TLB invalidation waits for it.
    pub inside: bool,
    /// A TLB invalidation is waiting for it.
    pub awaited: bool,
    /// Address of the fault whose answer it waits for.
    pub fault: Option<u64>,
}

struct Unit<R> {
    gate: Gate,
    /// Address of the fault being served, 0 for none.
    fault: AtomicU64,
    /// Invalidations that have waited long for this unit.
    awaited: AtomicU32,
    /// Held by the thread that plays the unit.
    tlb: Mutex<R, Tlb>,
}

/// A software GPU. `R` is the embedder's mutex.
pub struct SoftGpu<R: RawMutex> {
    config: GpuConfig,
    pub(crate) vram: Arc<dyn VramStore>,
    pub(crate) bus: Arc<dyn SystemBus>,
    pub(crate) park: Arc<dyn Park>,
    pub(crate) shootdown: Shootdown,
    /// Orders publishers of TLB invalidations; a few stores long.
    publishing: Mutex<R, ()>,
    /// Held by a unit between the read and the write of [`SmemAtomics::ReadThenWrite`]. Nobody who
    /// serves a fault of the CPU takes it: the read may wait for one.
    pub(crate) updating: Updating,
    roots: Box<[AtomicU64]>,
    units: Vec<Unit<R>>,
    ring: FaultRing<R>,
    service: Mutex<R, FaultService>,
}

impl<R: RawMutex> fmt::Debug for SoftGpu<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftGpu")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl<R: RawMutex + Send + Sync> SoftGpu<R> {
    /// A device with the given memory, bus and way to wait.
    ///
    /// # Errors
    /// [`ConfigError`] for a configuration without units, ring or address spaces.
    pub fn new(
        config: GpuConfig,
        vram: Arc<dyn VramStore>,
        bus: Arc<dyn SystemBus>,
        park: Arc<dyn Park>,
    ) -> Result<Arc<Self>, ConfigError> {
        let units = usize::from(config.gts) * usize::from(config.units_per_gt);
        let zeros = [
            ("gts", usize::from(config.gts)),
            ("units_per_gt", usize::from(config.units_per_gt)),
            ("tlb_entries", config.tlb_entries),
            ("fault_ring", config.fault_ring),
            ("asids", usize::try_from(config.asids).unwrap_or(usize::MAX)),
        ];
        if let Some((what, _)) = zeros.into_iter().find(|(_, number)| *number == 0) {
            return Err(ConfigError::Zero(what));
        }
        if units > usize::from(u16::MAX) {
            return Err(ConfigError::TooManyUnits);
        }
        let unit = |_| Unit {
            gate: Gate::default(),
            fault: AtomicU64::new(0),
            awaited: AtomicU32::new(0),
            tlb: Mutex::new(Tlb::new(config.tlb_entries)),
        };
        Ok(Arc::new(Self {
            vram,
            bus,
            park,
            shootdown: Shootdown::new(),
            publishing: Mutex::new(()),
            updating: Updating::default(),
            roots: (0..config.asids).map(|_| AtomicU64::new(NO_ROOT)).collect(),
            units: (0..units).map(unit).collect(),
            ring: FaultRing::new(config.fault_ring, units),
            service: Mutex::new(FaultService::Queue),
            config,
        }))
    }

    /// Number of units.
    #[must_use]
    pub const fn unit_count(&self) -> usize {
        self.units.len()
    }

    /// Says who serves faults from now on.
    pub fn set_fault_service(&self, service: FaultService) {
        let former = core::mem::replace(&mut *self.service.lock(), service);
        drop(former);
    }

    /// Plays unit `index`: runs groups of `dispatch` until there are none left.
    ///
    /// # Errors
    /// The [`Stop`] of this unit's kernel. A unit that ends because another one failed returns
    /// `Ok`: the other one tells.
    pub fn run(&self, dispatch: &Dispatch<'_>, index: usize) -> Result<(), Stop> {
        let unit = self.units.get(index).ok_or(Stop::NoUnit)?;
        let mut tlb = unit.tlb.try_lock().ok_or(Stop::UnitBusy)?;
        let mut running = Running {
            gpu: self,
            index,
            gate: &unit.gate,
            tlb: &mut tlb,
            dispatch,
            tally: Tally::default(),
        };
        let result = run_groups(&mut running);
        running.add_up();
        match result {
            Err(Stop::Cancelled) if dispatch.follows_failure() => Ok(()),
            Err(stop) => {
                if stop != Stop::Cancelled {
                    dispatch.fail();
                }
                Err(stop)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Whether a unit that nobody plays would use a translation of an address space that it has cached,
    /// for whoever checks what is left of one.
    #[must_use]
    pub fn caches(&self, asid: u32) -> bool {
        self.units.iter().any(|unit| {
            unit.tlb.try_lock().is_some_and(|mut tlb| {
                unit.gate.enter(&self.shootdown, &mut tlb);
                unit.gate.leave();
                tlb.has(asid)
            })
        })
    }

    /// What the units are doing.
    #[must_use]
    pub fn unit_states(&self) -> Vec<UnitState> {
        let state = |unit: &Unit<R>| {
            let fault = unit.fault.load(Ordering::Relaxed);
            UnitState {
                inside: unit.gate.is_inside(),
                awaited: unit.awaited.load(Ordering::Relaxed) > 0,
                fault: (fault != 0).then_some(fault),
            }
        };
        self.units.iter().map(state).collect()
    }

    /// Sleeps until a fault is in the ring, or [`kick_service`](Self::kick_service).
    pub fn wait_fault(&self) {
        self.ring.wait(&*self.park);
    }

    /// Wakes who sleeps in [`wait_fault`](Self::wait_fault).
    pub fn kick_service(&self) {
        self.ring.announce(&*self.park);
    }
}

fn run_groups<R: RawMutex + Send + Sync>(running: &mut Running<'_, R>) -> Result<(), Stop> {
    let dispatch = running.dispatch;
    while let Some(group) = dispatch.take_group() {
        dispatch.check()?;
        dispatch.kernel.run(group, &mut Tile::new(running))?;
    }
    Ok(())
}

impl<R: RawMutex> SoftGpu<R> {
    pub(crate) const fn config(&self) -> &GpuConfig {
        &self.config
    }

    /// Offset of the root table of an address space.
    pub fn root(&self, asid: u32) -> Option<u64> {
        let root = self
            .roots
            .get(usize::try_from(asid).ok()?)?
            .load(Ordering::Acquire);
        (root != NO_ROOT).then_some(root)
    }

    /// Gets a fault served, while the unit is quiescent.
    pub(crate) fn serve(&self, unit: usize, record: FaultRecord) -> FaultResponse {
        let service = self.service.lock().clone();
        let place = self.units.get(unit).map(|unit| &unit.fault);
        if let Some(place) = place {
            place.store(record.address, Ordering::Relaxed);
        }
        let response = match service {
            FaultService::Inline(handler) => handler.handle(&record),
            FaultService::Queue => self.ring.report(unit, record, &*self.park),
        };
        if let Some(place) = place {
            place.store(0, Ordering::Relaxed);
        }
        response
    }

    fn has_acknowledged(&self, unit: &Unit<R>, n: u64) -> bool {
        let lost = self.config.planted == Some(Planted::LosesTlbAnswers);
        unit.gate.has_acknowledged(n) && !lost
    }

    /// Waits until `unit` cannot use what invalidation `n` removed. False at the deadline.
    fn wait_unit(&self, unit: &Unit<R>, n: u64, deadline: u64) -> bool {
        for _look in 0..SPINS {
            if self.has_acknowledged(unit, n) {
                return true;
            }
            core::hint::spin_loop();
        }
        unit.awaited.fetch_add(1, Ordering::Relaxed);
        let done = self.nap_until(unit, n, deadline);
        unit.awaited.fetch_sub(1, Ordering::Relaxed);
        done
    }

    fn nap_until(&self, unit: &Unit<R>, n: u64, deadline: u64) -> bool {
        while !self.has_acknowledged(unit, n) {
            if self.park.now_ns() > deadline {
                return false;
            }
            self.park.wait(&AtomicU32::new(0), 0, Some(NAP_NS));
        }
        true
    }
}

impl<R: RawMutex + Send + Sync> DevicePort for SoftGpu<R> {
    fn vram_size(&self) -> u64 {
        self.vram.size()
    }

    fn gt_count(&self) -> u16 {
        self.config.gts
    }

    fn write_entries(&self, offset: u64, entries: &[u64]) {
        for (at, entry) in (offset..).step_by(8).zip(entries) {
            self.vram.write(at, &entry.to_ne_bytes());
        }
        // A walk that starts afterwards must see them.
        core::sync::atomic::fence(Ordering::SeqCst);
    }

    fn read_entry(&self, offset: u64) -> u64 {
        self.vram.word(offset)
    }

    fn set_root(&self, asid: u32, root: Option<u64>) {
        let place = usize::try_from(asid)
            .ok()
            .and_then(|asid| self.roots.get(asid));
        if let Some(place) = place {
            place.store(root.unwrap_or(NO_ROOT), Ordering::Release);
        }
    }

    fn invalidate_tlb(&self, asid: u32, start: u64, len: u64) -> u32 {
        let _one_publisher = self.publishing.lock();
        let n = self
            .shootdown
            .publish(asid, start, start.saturating_add(len));
        shootdown::seqno_of(n)
    }

    fn wait_tlb(&self, seqno: u32) -> Result<(), TlbTimeout> {
        let n = shootdown::number_of(seqno, self.shootdown.latest());
        let deadline = self
            .park
            .now_ns()
            .saturating_add(self.config.tlb_timeout_ns);
        let done = self
            .units
            .iter()
            .all(|unit| self.wait_unit(unit, n, deadline));
        if done {
            Ok(())
        } else {
            Err(TlbTimeout { seqno })
        }
    }

    fn copy(&self, pieces: &[CopyPiece]) -> Result<(), BusError> {
        copy::run(&*self.vram, pieces)
    }

    fn adopt(&self, vram: u64, len: u64) -> Option<u64> {
        let at = self.vram.aperture(vram)?;
        self.vram.discard(vram, len);
        Some(at)
    }

    fn surrender(&self, vram: u64, _len: u64) -> Option<u64> {
        self.vram.aperture(vram)
    }

    fn pop_fault(&self) -> Option<FaultRecord> {
        self.ring.pop(&*self.park)
    }

    fn ack_fault(&self, record: &FaultRecord, response: FaultResponse) {
        let asleep = self.config.planted == Some(Planted::AnswerWakesNobody);
        self.ring
            .answer(record, response, (!asleep).then_some(&*self.park));
    }
}
