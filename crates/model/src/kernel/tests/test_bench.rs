//! An environment of real threads, and a device memory of one word per page.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PAGE, PageCount, VramAddr, VramSpan};
use gpusvm::error::Interrupted;
use gpusvm::event::HomeCause;
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::copy::{CopyMove, CopyWith};
use gpusvm::seam::env::{Environment, Ns, Point, Work};
use gpusvm::seam::mm::{
    Access, AddressSpace, AllocationId, AllocationRef, CpuFault, CpuFaultOutcome, CpuFaultSink,
    DeviceAllocation, FaultIn, Folios, InvalidateReason, InvalidationSink, Location, MigrateTo,
    MigrationSet, PagemapId, Pager,
};
use gpusvm_abi::bus::SystemBus;

use crate::kernel::bus::{Bus, address_of};
use crate::kernel::{Kernel, ModelSpace};
use crate::mm::Shape;
use crate::mm::flags::VmFlags;
use crate::mm::map::{Map, Place, What};
use crate::mm::memory::FrameId;

pub(super) const RW: VmFlags = VmFlags::READ.with(VmFlags::WRITE);

type Hook = Box<dyn FnOnce() + Send>;

/// Waits by yielding; runs a hook at a switch point.
#[derive(Default)]
pub(super) struct TestEnv {
    hook: Mutex<Option<(Point, Hook)>>,
    yields: AtomicU64,
    /// Checked at every switch point.
    watched: Mutex<Weak<Kernel<Self>>>,
}

impl TestEnv {
    /// Checks the state at every switch point from now on. Threads must not run side by side.
    pub(super) fn watch(&self, kernel: &Arc<Kernel<Self>>) {
        *self.watched.lock().expect("no panics") = Arc::downgrade(kernel);
    }

    /// Runs `hook` at the next switch point of this kind.
    pub(super) fn at(&self, point: Point, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().expect("no panics") = Some((point, Box::new(hook)));
    }
}

impl Environment for TestEnv {
    type RawMutex = parking_lot::RawMutex;

    fn now(&self) -> Ns {
        Ns(self.yields.fetch_add(1, Ordering::Relaxed))
    }

    fn random(&self) -> u64 {
        self.yields.load(Ordering::Relaxed)
    }

    fn wait(&self, word: &AtomicU32, seen: u32) {
        while word.load(Ordering::Acquire) == seen {
            std::thread::yield_now();
        }
    }

    fn wake(&self, _word: &AtomicU32) {}

    fn sleep_until(&self, _deadline: Ns) {}

    fn defer(&self, _work: Work) {}

    fn yield_point(&self, at: Point) {
        let watched = self
            .watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade();
        if let Some(kernel) = watched {
            kernel.check().expect("the state makes sense between steps");
        }
        let mut slot = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
        let due = slot.take_if(|(point, _)| *point == at);
        drop(slot);
        if let Some((_, hook)) = due {
            hook();
        }
    }
}

pub(super) type TestSpace = ModelSpace<TestEnv>;

/// A machine, its first process, its bus, and device memory.
pub(super) struct Bench {
    pub(super) env: Arc<TestEnv>,
    pub(super) kernel: Arc<Kernel<TestEnv>>,
    pub(super) space: Arc<TestSpace>,
    pub(super) vram: Arc<Mutex<Vec<u64>>>,
    next: AtomicU64,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::of(Shape::default())
    }

    pub(super) fn of(shape: Shape) -> Self {
        let env = Arc::new(TestEnv::default());
        let kernel = Kernel::new(Arc::clone(&env), shape);
        Self {
            space: ModelSpace::first(&kernel),
            env,
            kernel,
            vram: Arc::new(Mutex::new(vec![0; 1 << 16])),
            next: AtomicU64::new(0),
        }
    }

    pub(super) fn at(&self, page: u32) -> HostVa {
        Shape::default().address(page)
    }

    pub(super) fn span(&self, page: u32, pages: u32) -> HostSpan {
        HostSpan::at(self.at(page), u64::from(pages) * PAGE)
    }

    pub(super) fn map(&self, page: u32, pages: u32) {
        let map = Map {
            place: Place::Fixed(self.at(page)),
            len: u64::from(pages) * PAGE,
            prot: RW,
            what: What::Private,
            extra: VmFlags::NONE,
        };
        self.space.mmap(&map).expect("inside");
    }

    pub(super) fn store(&self, page: u32, value: u64) {
        self.space.store(self.at(page), value).expect("writable");
    }

    pub(super) fn load(&self, page: u32) -> u64 {
        self.space.load(self.at(page)).expect("readable")
    }

    /// An allocation for `span`.
    pub(super) fn allocation(&self, span: HostSpan) -> Arc<Toy> {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(Toy {
            kernel: Arc::downgrade(&self.kernel),
            vram: Arc::clone(&self.vram),
            id,
            origin: span,
            coherent_at: None,
            lost: Mutex::default(),
        })
    }

    /// One at the start of coherent memory.
    pub(super) fn coherent(&self, span: HostSpan) -> Arc<Toy> {
        let first = FrameId(Shape::default().frames);
        Arc::new(Toy {
            kernel: Arc::downgrade(&self.kernel),
            vram: Arc::clone(&self.vram),
            id: 1 << 32,
            origin: span,
            coherent_at: Some(address_of(first)),
            lost: Mutex::default(),
        })
    }

    /// Brings part of an allocation home.
    pub(super) fn bring(&self, toy: &Arc<Toy>, part: VramSpan, folios: Folios) -> PageCount {
        let to = MigrateTo::System {
            allocation: Arc::clone(toy) as AllocationRef,
            part,
            aperture: None,
            folios,
        };
        let set = self.space.migrate_begin(toy.origin, to).expect("free");
        self.copy(set.moves());
        set.finalize()
    }

    /// Word at a bus address.
    pub(super) fn read(&self, at: BusAddr) -> u64 {
        let mut word = [0; 8];
        let bus = Bus::new(Arc::clone(&self.kernel));
        bus.read(at.get(), &mut word).expect("somebody's");
        u64::from_ne_bytes(word)
    }

    pub(super) fn copy(&self, moves: &[CopyMove]) {
        copy(&self.kernel, &self.vram, moves);
    }

    /// Copies to or from the start of coherent memory.
    pub(super) fn copy_coherent(kernel: &Arc<Kernel<TestEnv>>, moves: &[CopyMove]) {
        let bus = Bus::new(Arc::clone(kernel));
        let device = address_of(FrameId(Shape::default().frames)).get();
        let mut word = [0; 8];
        for step in moves {
            let (from, to) = match step.with {
                CopyWith::From(at) => (at.get(), device),
                CopyWith::To(at) => (device, at.get()),
                CopyWith::Hole => continue,
            };
            bus.read(from, &mut word).expect("held by the set");
            bus.write(to, &word).expect("held by the set");
        }
    }

    /// Sends a span to the device. Returns the pages that moved, and the allocation.
    pub(super) fn send(&self, span: HostSpan) -> Result<(PageCount, Weak<Toy>), Interrupted> {
        self.send_with(span, || ())
    }

    /// Does something between isolating and finalizing.
    pub(super) fn send_with(
        &self,
        span: HostSpan,
        between: impl FnOnce(),
    ) -> Result<(PageCount, Weak<Toy>), Interrupted> {
        let toy = self.allocation(span);
        let weak = Arc::downgrade(&toy);
        let set = self
            .space
            .migrate_begin(span, MigrateTo::device(toy, None))?;
        self.copy(set.moves());
        between();
        Ok((set.finalize(), weak))
    }

    /// Where the first page is, for a device that wants this right.
    pub(super) fn look_up(&self, access: Access) -> BusAddr {
        let mut runs = Vec::new();
        let request = FaultIn {
            span: self.span(0, 1),
            access,
            keep: None,
            pager: Pager::Wait,
        };
        self.space.fault_in(&request, &mut runs).expect("mapped");
        match runs[0].at {
            Location::System(at) => at,
            Location::Device { .. } => panic!("in host memory"),
        }
    }

    /// Checks that nothing is wrong.
    pub(super) fn check(&self) {
        self.kernel.check_quiet().expect("the state makes sense");
        assert_eq!(self.kernel.violations(), []);
    }
}

/// An allocation of the toy memory.
pub(super) struct Toy {
    kernel: Weak<Kernel<TestEnv>>,
    vram: Arc<Mutex<Vec<u64>>>,
    id: u64,
    origin: HostSpan,
    coherent_at: Option<BusAddr>,
    lost: Mutex<Vec<VramSpan>>,
}

impl Toy {
    /// Pages with memory errors, of which it was told.
    pub(super) fn lost(&self) -> Vec<VramSpan> {
        self.lost.lock().expect("nobody panics").clone()
    }
}

impl CpuFaultSink for Toy {
    fn migrate_to_ram(self: Arc<Self>, _fault: CpuFault) -> CpuFaultOutcome {
        match self.bring_home(HomeCause::CpuFault) {
            Ok(_) | Err(Interrupted::Stale(_)) => CpuFaultOutcome::Retry,
            Err(Interrupted::Failed(_)) => CpuFaultOutcome::Lost,
        }
    }
}

impl DeviceAllocation for Toy {
    fn id(&self) -> AllocationId {
        AllocationId(self.id)
    }

    fn pagemap(&self) -> PagemapId {
        PagemapId(1)
    }

    fn coherent_at(&self) -> Option<BusAddr> {
        self.coherent_at
    }

    fn memory_failure(&self, bad: VramSpan) {
        self.lost.lock().expect("nobody panics").push(bad);
    }

    fn vram(&self) -> VramSpan {
        VramSpan::at(
            VramAddr::new(self.id % 1024 * 64 * PAGE),
            self.origin.bytes(),
        )
    }

    fn origin(&self) -> HostSpan {
        self.origin
    }

    fn bring_home(self: Arc<Self>, _cause: HomeCause) -> Result<PageCount, Interrupted> {
        let Some(kernel) = self.kernel.upgrade() else {
            return Ok(PageCount::ZERO);
        };
        let (origin, vram) = (self.origin, Arc::clone(&self.vram));
        let coherent = self.coherent_at;
        let allocation: AllocationRef = self;
        let space = ModelSpace::first(&kernel);
        let set = space.migrate_begin(origin, MigrateTo::home(allocation, None))?;
        match coherent {
            Some(_in_place) => Bench::copy_coherent(&kernel, set.moves()),
            None => copy(&kernel, &vram, set.moves()),
        }
        Ok(set.finalize())
    }
}

fn copy(kernel: &Arc<Kernel<TestEnv>>, vram: &Mutex<Vec<u64>>, moves: &[CopyMove]) {
    let bus = Bus::new(Arc::clone(kernel));
    let mut vram = vram.lock().unwrap_or_else(PoisonError::into_inner);
    for step in moves {
        for n in 0..step.vram.pages().get() {
            let bytes = n * PAGE;
            let word = usize::try_from((step.vram.start().get() + bytes) / PAGE).expect("small");
            let mut value = [0; 8];
            match step.with {
                CopyWith::From(at) => {
                    bus.read(at.get() + bytes, &mut value)
                        .expect("held by the set");
                    vram[word] = u64::from_ne_bytes(value);
                }
                CopyWith::To(at) => {
                    let value = vram[word].to_ne_bytes();
                    bus.write(at.get() + bytes, &value)
                        .expect("held by the set");
                }
                CopyWith::Hole => vram[word] = 0,
            }
        }
    }
}

/// Takes note of invalidations.
#[derive(Default)]
pub(super) struct Notes(pub(super) Mutex<Vec<(HostSpan, InvalidateReason)>>);

impl InvalidationSink for Notes {
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq) {
        interval.set_seq(seq);
        self.0.lock().expect("no panics").push((span, reason));
    }

    fn end(&self, _interval: &Interval, _span: HostSpan) {}
}
