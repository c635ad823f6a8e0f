//! One execution unit: the accesses of a kernel, piece by piece.
//!
//! A piece lies inside one leaf and is at most [`PIECE`] long. The unit enters its gate, translates,
//! moves the bytes, and leaves; a TLB invalidation never waits longer than that. A fault is raised
//! outside the gate, holding nothing.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm_abi::bus::{AtomicOp, BusError};
use gpusvm_abi::fault::{AccessType, FaultKind, FaultRecord, FaultResponse};
use lock_api::RawMutex;

use crate::device::{Planted, SoftGpu};
use crate::mmu::{self, Leaf, Target};
use crate::shootdown::Gate;
use crate::tlb::Tlb;
use crate::work::{Access, DeviceFault, Dispatch, Stop};

/// Most bytes moved between two looks at invalidations.
const PIECE: u64 = 64 << 10;
/// Elements gathered between two looks.
const GATHERED: usize = 32;
/// Times that a translation may lead to host memory that does not answer.
const BUS_RETRIES: u32 = 8;
/// Replays of one access. Each means that a fault was served and its translation lost again; far
/// beyond what contention explains.
const REPLAYS: u32 = 100_000;
/// Pause before a retry on the bus, for news of the change to arrive.
const BUS_PAUSE_NS: u64 = 100_000;

/// A unit that runs a dispatch.
pub(crate) struct Running<'a, R: RawMutex> {
    pub(crate) gpu: &'a SoftGpu<R>,
    pub(crate) index: usize,
    pub(crate) gate: &'a Gate,
    pub(crate) tlb: &'a mut Tlb,
    pub(crate) dispatch: &'a Dispatch<'a>,
    pub(crate) tally: Tally,
}

/// Counts of one unit, added to the dispatch's when it ends.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    loaded: u64,
    stored: u64,
    faults: u64,
    walks: u64,
}

/// A kernel's buffer, and with it the direction.
enum Buffer<'b> {
    Load(&'b mut [u8]),
    Store(&'b [u8]),
}

impl Buffer<'_> {
    const fn access(&self) -> AccessType {
        match self {
            Self::Load(_) => AccessType::Read,
            Self::Store(_) => AccessType::Write,
        }
    }

    const fn len(&self) -> usize {
        match self {
            Self::Load(out) => out.len(),
            Self::Store(data) => data.len(),
        }
    }

    /// Moves its bytes from `from` on, as far as `leaf` reaches; returns how many.
    fn transfer<R: RawMutex>(
        &mut self,
        gpu: &SoftGpu<R>,
        leaf: &Leaf,
        va: u64,
        from: usize,
    ) -> Result<usize, BusError> {
        let inside = va - leaf.va;
        let reach = usize::try_from((leaf.bytes() - inside).min(PIECE)).unwrap_or(usize::MAX);
        let end = self.len().min(from.saturating_add(reach));
        match (self, leaf.target) {
            (Self::Load(out), Target::Vram(at)) => gpu.vram.read(at + inside, &mut out[from..end]),
            (Self::Load(out), Target::Bus(at)) => gpu.bus.read(at + inside, &mut out[from..end])?,
            (Self::Load(out), Target::Null) => out[from..end].fill(0),
            (Self::Store(data), Target::Vram(at)) => gpu.vram.write(at + inside, &data[from..end]),
            (Self::Store(data), Target::Bus(at)) => gpu.bus.write(at + inside, &data[from..end])?,
            (Self::Store(_), Target::Null) => {}
        }
        Ok(end - from)
    }
}

/// How one try of an access ended.
enum Try<T> {
    Done(T),
    Bus(BusError),
    Fault(mmu::NoWay),
}

impl<R: RawMutex + Send + Sync> Running<'_, R> {
    /// Adds this unit's counts to the dispatch's.
    pub(crate) fn add_up(&self) {
        let counts = &self.dispatch.counts;
        counts
            .loaded
            .fetch_add(self.tally.loaded, Ordering::Relaxed);
        counts
            .stored
            .fetch_add(self.tally.stored, Ordering::Relaxed);
        counts
            .faults
            .fetch_add(self.tally.faults, Ordering::Relaxed);
        counts.walks.fetch_add(self.tally.walks, Ordering::Relaxed);
    }

    /// Moves a whole span, piece by piece.
    fn transfer(&mut self, va: u64, mut buffer: Buffer<'_>) -> Result<(), Stop> {
        let access = buffer.access();
        let mut done = 0;
        while done < buffer.len() {
            let offset = u64::try_from(done).unwrap_or(u64::MAX);
            let refused = Stop::Fault(DeviceFault {
                address: va,
                access,
            });
            let at = va.checked_add(offset).ok_or(refused)?;
            done += self.once(at, access, |gpu, leaf| buffer.transfer(gpu, leaf, at, done))?;
        }
        Ok(())
    }

    /// Does `act` with the translation of `va`, faulting until there is one.
    fn once<T>(
        &mut self,
        va: u64,
        access: AccessType,
        mut act: impl FnMut(&SoftGpu<R>, &Leaf) -> Result<T, BusError>,
    ) -> Result<T, Stop> {
        let mut bus_errors = 0;
        for _replay in 0..REPLAYS {
            self.dispatch.check()?;
            if self.gpu.config().planted == Some(Planted::WalkOutsideGate) {
                self.walk_early(va, access);
            }
            self.enter();
            let tried = self.try_once(va, access, &mut act);
            self.gate.leave();
            match tried {
                Try::Done(value) => return Ok(value),
                Try::Fault(no_way) => self.fault(va, access, no_way)?,
                Try::Bus(error) if bus_errors == BUS_RETRIES => return Err(Stop::Bus(error)),
                Try::Bus(_) => {
                    bus_errors += 1;
                    self.gpu
                        .park
                        .wait(&AtomicU32::new(0), 0, Some(BUS_PAUSE_NS));
                }
            }
        }
        Err(Stop::Fault(DeviceFault {
            address: va,
            access,
        }))
    }

    fn enter(&mut self) {
        if self.gpu.config().planted == Some(Planted::KeepTlb) {
            self.gate.enter_ignoring(&self.gpu.shootdown);
        } else {
            self.gate.enter(&self.gpu.shootdown, self.tlb);
        }
    }

    /// A planted bug: the walk is over when the access begins, and an invalidation in between does not
    /// find its result.
    #[cold]
    fn walk_early(&mut self, va: u64, access: AccessType) {
        self.enter();
        let found = self.translate(va, access);
        self.gate.leave();
        self.gpu.park.wait(&AtomicU32::new(0), 0, Some(1));
        self.enter();
        if let Ok(leaf) = found {
            self.tlb.insert(self.dispatch.asid, leaf);
        }
        self.gate.leave();
    }

    /// One try, inside the gate.
    fn try_once<T>(
        &mut self,
        va: u64,
        access: AccessType,
        act: &mut impl FnMut(&SoftGpu<R>, &Leaf) -> Result<T, BusError>,
    ) -> Try<T> {
        let leaf = match self.translate(va, access) {
            Ok(leaf) => leaf,
            Err(no_way) => return Try::Fault(no_way),
        };
        match act(self.gpu, &leaf) {
            Ok(value) => Try::Done(value),
            Err(error) => {
                // The mapping went away under the translation: walk again.
                self.tlb
                    .invalidate(self.dispatch.asid, leaf.va, leaf.va + leaf.bytes());
                Try::Bus(error)
            }
        }
    }

    /// The translation of `va`, cached or walked, if it allows `access`. A cached one that does not
    /// is walked again: rights may have grown.
    fn translate(&mut self, va: u64, access: AccessType) -> Result<Leaf, mmu::NoWay> {
        let asid = self.dispatch.asid;
        if let Some(leaf) = self.tlb.look_up(asid, va)
            && leaf.check(access).is_ok()
        {
            return Ok(leaf);
        }
        self.tally.walks += 1;
        let absent = mmu::NoWay {
            kind: FaultKind::NotPresent,
            level: gpusvm_abi::pte::ROOT_LEVEL,
        };
        let root = self.gpu.root(asid).ok_or(absent)?;
        let leaf = mmu::walk(&*self.gpu.vram, root, va)?;
        leaf.check(access)
            .map_err(|kind| mmu::NoWay { kind, level: 0 })?;
        self.tlb.insert(asid, leaf);
        Ok(leaf)
    }

    /// Raises a fault and waits for its answer, outside the gate.
    fn fault(&mut self, va: u64, access: AccessType, no_way: mmu::NoWay) -> Result<(), Stop> {
        self.tally.faults += 1;
        let page = va & !0xfff;
        let mut record =
            FaultRecord::new(page, self.dispatch.asid, access, no_way.kind, no_way.level);
        record.unit = u16::try_from(self.index).unwrap_or(u16::MAX);
        record.gt = record.unit / self.gpu.config().units_per_gt.max(1);
        match self.gpu.serve(self.index, record) {
            FaultResponse::Replay => Ok(()),
            FaultResponse::Refuse => Err(Stop::Fault(DeviceFault {
                address: va,
                access,
            })),
        }
    }
}

impl<R: RawMutex + Send + Sync> Access for Running<'_, R> {
    fn load(&mut self, va: u64, out: &mut [u8]) -> Result<(), Stop> {
        self.tally.loaded += u64::try_from(out.len()).unwrap_or(0);
        self.transfer(va, Buffer::Load(out))
    }

    fn store(&mut self, va: u64, data: &[u8]) -> Result<(), Stop> {
        self.tally.stored += u64::try_from(data.len()).unwrap_or(0);
        self.transfer(va, Buffer::Store(data))
    }

    fn atomic(&mut self, va: u64, op: AtomicOp) -> Result<u64, Stop> {
        let access = AccessType::Atomic;
        if !va.is_multiple_of(8) {
            return Err(Stop::Fault(DeviceFault {
                address: va,
                access,
            }));
        }
        self.once(va, access, |gpu, leaf| {
            let inside = va - leaf.va;
            match leaf.target {
                Target::Vram(at) => Ok(gpu.vram.atomic(at + inside, op)),
                Target::Bus(at) => gpu.atomic_on_bus(at + inside, op),
                Target::Null => Ok(0),
            }
        })
    }

    fn gather(&mut self, from: &[u64], size: usize, out: &mut [u8]) -> Result<(), Stop> {
        if size == 0 {
            return Ok(());
        }
        self.tally.loaded += u64::try_from(out.len()).unwrap_or(0);
        let batches = from.chunks(GATHERED).zip(out.chunks_mut(GATHERED * size));
        for (addresses, bytes) in batches {
            self.dispatch.check()?;
            let done = self.gather_cached(addresses, size, bytes);
            for (va, one) in addresses.iter().zip(bytes.chunks_mut(size)).skip(done) {
                self.transfer(*va, Buffer::Load(one))?;
            }
        }
        Ok(())
    }
}

impl<R: RawMutex + Send + Sync> Running<'_, R> {
    /// Loads elements in one stay inside the gate, as long as their translations are at hand;
    /// returns how many.
    fn gather_cached(&mut self, from: &[u64], size: usize, out: &mut [u8]) -> usize {
        self.enter();
        let mut done = 0;
        for (va, one) in from.iter().zip(out.chunks_mut(size)) {
            let Some(leaf) = self.tlb.look_up(self.dispatch.asid, *va) else {
                break;
            };
            let mut buffer = Buffer::Load(one);
            match buffer.transfer(self.gpu, &leaf, *va, 0) {
                Ok(bytes) if bytes == size => done += 1,
                Ok(_) | Err(_) => break,
            }
        }
        self.gate.leave();
        done
    }
}
