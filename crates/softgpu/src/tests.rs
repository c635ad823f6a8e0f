//! Whole devices over memory that is a vector, with page tables written by hand.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use gpusvm_abi::bus::{
    AtomicOp, BusError, CopyKind, CopyPiece, DevicePort, FaultHandler, Park, SystemBus, VramStore,
};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_abi::pte;

use crate::{Dispatch, FaultService, GpuConfig, Kernel, Planted, SmemAtomics, SoftGpu, Stop, Tile};

/// Memory as words; the same type stands for VRAM and for host memory.
struct Words(Box<[AtomicU64]>);

impl Words {
    fn new(bytes: usize) -> Self {
        Self((0..bytes / 8).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(at / 8).ok()?)
    }

    fn get(&self, at: u64) -> u8 {
        let word = self.word(at).expect("inside").load(Ordering::Relaxed);
        word.to_ne_bytes()[usize::try_from(at % 8).expect("small")]
    }

    fn set(&self, at: u64, byte: u8) {
        let place = usize::try_from(at % 8).expect("small");
        let word = self.word(at).expect("inside");
        let change = |old: u64| {
            let mut bytes = old.to_ne_bytes();
            bytes[place] = byte;
            Some(u64::from_ne_bytes(bytes))
        };
        assert!(
            word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change)
                .is_ok()
        );
    }
}

impl VramStore for Words {
    fn size(&self) -> u64 {
        u64::try_from(self.0.len() * 8).expect("64-bit")
    }
    fn read(&self, offset: u64, dst: &mut [u8]) {
        (offset..)
            .zip(dst)
            .for_each(|(at, byte)| *byte = self.get(at));
    }
    fn write(&self, offset: u64, src: &[u8]) {
        if let (Ok(word), true) = (<[u8; 8]>::try_from(src), offset.is_multiple_of(8)) {
            let place = self.word(offset).expect("inside");
            return place.store(u64::from_ne_bytes(word), Ordering::SeqCst);
        }
        (offset..)
            .zip(src)
            .for_each(|(at, byte)| self.set(at, *byte));
    }
    fn atomic(&self, offset: u64, op: AtomicOp) -> u64 {
        let word = self.word(offset).expect("inside");
        let change = |old| Some(op.apply(old));
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change)
            .unwrap_or_default()
    }
    fn zero(&self, offset: u64, len: u64) {
        (offset..offset + len).for_each(|at| self.set(at, 0));
    }
    fn copy_from_bus(&self, _offset: u64, bus: u64, _len: u64) -> Result<(), BusError> {
        Err(BusError { address: bus })
    }
    fn copy_to_bus(&self, _offset: u64, bus: u64, _len: u64) -> Result<(), BusError> {
        Err(BusError { address: bus })
    }
    fn aperture(&self, _offset: u64) -> Option<u64> {
        None
    }
    fn discard(&self, offset: u64, len: u64) {
        self.zero(offset, len);
    }
}

/// Host memory from bus address 0 on; everything behind does not answer.
impl SystemBus for Words {
    fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), BusError> {
        let end = address + u64::try_from(dst.len()).expect("64-bit");
        if end > VramStore::size(self) {
            return Err(BusError { address });
        }
        VramStore::read(self, address, dst);
        Ok(())
    }
    fn write(&self, address: u64, src: &[u8]) -> Result<(), BusError> {
        let end = address + u64::try_from(src.len()).expect("64-bit");
        if end > VramStore::size(self) {
            return Err(BusError { address });
        }
        VramStore::write(self, address, src);
        Ok(())
    }
    fn atomic(&self, address: u64, op: AtomicOp) -> Result<u64, BusError> {
        Ok(VramStore::atomic(self, address, op))
    }
}

/// Waits by yielding; its clock counts how often it is asked, in units of 100 microseconds.
#[derive(Default)]
struct Yield(AtomicU64);

impl Park for Yield {
    fn wait(&self, _word: &AtomicU32, _seen: u32, _timeout_ns: Option<u64>) {
        thread::park_timeout(Duration::from_micros(20));
    }
    fn wake(&self, _word: &AtomicU32) {}
    fn now_ns(&self) -> u64 {
        self.0.fetch_add(100_000, Ordering::Relaxed)
    }
}

type Gpu = SoftGpu<parking_lot::RawMutex>;

const CONFIG: GpuConfig = GpuConfig {
    gts: 1,
    units_per_gt: 2,
    tlb_entries: 16,
    fault_ring: 1,
    asids: 2,
    tlb_timeout_ns: 500_000_000_000,
    smem_atomics: SmemAtomics::OnTheBus,
    planted: None,
};
const ROOT: u64 = 0x1000;
const LEAVES: u64 = 0x4000;
const RW: u64 = pte::PRESENT | pte::WRITABLE;

struct World {
    gpu: Arc<Gpu>,
    vram: Arc<Words>,
    host: Arc<Words>,
}

/// A device whose address space 1 has tables down to level 0 for its first 2 MiB, all empty.
fn world(config: GpuConfig) -> World {
    let (vram, host) = (Arc::new(Words::new(1 << 20)), Arc::new(Words::new(1 << 20)));
    let park = Arc::new(Yield::default());
    let gpu = Gpu::new(
        config,
        Arc::<Words>::clone(&vram),
        Arc::<Words>::clone(&host),
        park,
    )
    .expect("a good configuration");
    for (table, next) in [(ROOT, 0x2000), (0x2000, 0x3000), (0x3000, LEAVES)] {
        gpu.write_entries(table, &[RW | next]);
    }
    gpu.set_root(1, Some(ROOT));
    World { gpu, vram, host }
}

impl World {
    fn map(&self, page: u64, entry: u64) {
        self.gpu.write_entries(LEAVES + page * 8, &[entry]);
    }

    fn flush(&self, page: u64) {
        let seqno = self.gpu.invalidate_tlb(1, page << 12, 1 << 12);
        self.gpu.wait_tlb(seqno).expect("units answer");
    }

    fn run(&self, kernel: &dyn Kernel, groups: u32) -> Result<(), Stop> {
        self.gpu.run(&Dispatch::new(kernel, groups, 1), 0)
    }
}

struct Do<F>(F);

impl<F: Fn(u32, &mut Tile<'_>) -> Result<(), Stop> + Sync> Kernel for Do<F> {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        (self.0)(group, tile)
    }
}

/// Refuses everything and counts.
#[derive(Default)]
struct Refuse(AtomicU64);

impl FaultHandler for Refuse {
    fn handle(&self, _record: &FaultRecord) -> FaultResponse {
        self.0.fetch_add(1, Ordering::Relaxed);
        FaultResponse::Refuse
    }
}

#[test]
fn spans_cross_pages_of_both_memories_at_any_alignment() {
    let world = world(CONFIG);
    world.map(0, RW | pte::DEVICE_MEMORY | 0x8000);
    world.map(1, RW | 0x3000);
    world.map(2, RW | pte::NULL);
    let data: Vec<u8> = (0..=255).cycle().take(9000).collect();
    let back = std::sync::Mutex::new(vec![1_u8; 9000]);
    let kernel = Do(|_, tile: &mut Tile<'_>| {
        tile.store(100, &data[..])?;
        tile.load(100, &mut back.lock().expect("one unit")[..])
    });
    assert_eq!(world.run(&kernel, 1), Ok(()));
    let back = back.into_inner().expect("one unit");
    let mapped = 8192 - 100;
    assert_eq!(back[..mapped], data[..mapped]);
    assert!(
        back[mapped..].iter().all(|byte| *byte == 0),
        "the null page reads as zeros"
    );
    assert_eq!(world.vram.get(0x8000 + 100), 0);
    assert_eq!(world.vram.get(0x8000 + 101), 1);
    assert_eq!(world.host.get(0x3000), data[4096 - 100]);
}

#[test]
fn refused_fault_stops_the_dispatch_with_its_address() {
    let world = world(CONFIG);
    let refuse = Arc::new(Refuse::default());
    world
        .gpu
        .set_fault_service(FaultService::Inline(Arc::<Refuse>::clone(&refuse)));
    let kernel = Do(|_, tile: &mut Tile<'_>| tile.store_one(0x5008, 1_u64));
    let stopped = world.run(&kernel, 100);
    assert!(
        matches!(stopped, Err(Stop::Fault(fault)) if fault.address == 0x5008),
        "{stopped:?}"
    );
    assert_eq!(
        refuse.0.load(Ordering::Relaxed),
        1,
        "later groups were not begun"
    );
    let wild = Do(|_, tile: &mut Tile<'_>| tile.store_one(u64::MAX - 3, 1_u64));
    assert!(matches!(world.run(&wild, 1), Err(Stop::Fault(_))));
}

#[test]
fn write_to_a_read_only_leaf_faults_and_a_read_does_not() {
    let world = world(CONFIG);
    world
        .gpu
        .set_fault_service(FaultService::Inline(Arc::new(Refuse::default())));
    world.map(0, pte::PRESENT | 0x2000);
    let read = Do(|_, tile: &mut Tile<'_>| tile.load_one::<u64>(0).map(|_word| ()));
    let write = Do(|_, tile: &mut Tile<'_>| tile.store_one(0, 1_u64));
    let update = Do(|_, tile: &mut Tile<'_>| tile.atomic(0, AtomicOp::Add(1)).map(|_old| ()));
    assert_eq!(world.run(&read, 1), Ok(()));
    assert!(world.run(&write, 1).is_err());
    assert!(world.run(&update, 1).is_err());
    world.map(0, RW | 0x2000);
    assert_eq!(
        world.run(&write, 1),
        Ok(()),
        "a cached right that is too small is walked again"
    );
    assert!(
        world.run(&update, 1).is_err(),
        "host memory without atomic enable"
    );
}

#[test]
fn atomics_need_their_bit_wherever_the_page_is() {
    let world = world(CONFIG);
    world
        .gpu
        .set_fault_service(FaultService::Inline(Arc::new(Refuse::default())));
    let update = Do(|_, tile: &mut Tile<'_>| tile.atomic(0, AtomicOp::Add(1)).map(|_old| ()));
    for place in [0, pte::DEVICE_MEMORY] {
        world.map(0, RW | place | 0x8000);
        world.flush(0);
        assert!(world.run(&update, 1).is_err());
        world.map(0, RW | place | pte::ATOMIC_ENABLE | 0x8000);
        assert_eq!(world.run(&update, 1), Ok(()), "rights may grow");
    }
}

#[test]
fn atomics_on_host_memory_are_done_with_and_without_a_bus_that_carries_them() {
    for smem_atomics in [SmemAtomics::OnTheBus, SmemAtomics::ReadThenWrite] {
        let world = world(GpuConfig {
            smem_atomics,
            ..CONFIG
        });
        world.map(0, RW | pte::ATOMIC_ENABLE | 0x2000);
        let twice = Do(|_, tile: &mut Tile<'_>| {
            assert_eq!(tile.atomic(8, AtomicOp::Add(5))?, 0);
            assert_eq!(tile.atomic(8, AtomicOp::Xor(1))?, 5);
            Ok(())
        });
        assert_eq!(world.run(&twice, 1), Ok(()));
        let word = VramStore::atomic(&*world.host, 0x2008, AtomicOp::Add(0));
        assert_eq!(word, 4, "{smem_atomics:?}");
    }
}

#[test]
fn bus_that_does_not_answer_is_reported_after_some_tries() {
    let world = world(CONFIG);
    world.map(0, RW | 0x7000_0000);
    let kernel = Do(|_, tile: &mut Tile<'_>| tile.load_one::<u64>(0).map(|_word| ()));
    assert!(matches!(world.run(&kernel, 1), Err(Stop::Bus(error)) if error.address == 0x7000_0000));
}

#[test]
fn table_outside_of_device_memory_is_not_present() {
    let world = world(CONFIG);
    world
        .gpu
        .set_fault_service(FaultService::Inline(Arc::new(Refuse::default())));
    world.gpu.write_entries(0x3000, &[RW | 0x7fff_f000]);
    let kernel = Do(|_, tile: &mut Tile<'_>| tile.load_one::<u64>(0).map(|_word| ()));
    assert!(matches!(world.run(&kernel, 1), Err(Stop::Fault(_))));
    world.gpu.write_entries(0x3000, &[RW | LEAVES]);
    world.map(0, RW | pte::DEVICE_MEMORY | 0x10_0000);
    assert!(
        matches!(world.run(&kernel, 1), Err(Stop::Fault(_))),
        "leaf outside"
    );
}

#[test]
fn queued_faults_are_served_though_the_ring_holds_one() {
    let world = world(CONFIG);
    let served = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let kernel = Do(|group, tile: &mut Tile<'_>| tile.store_one(u64::from(group) << 12, 7_u64));
    let dispatch = Dispatch::new(&kernel, 64, 1);
    thread::scope(|scope| {
        let service = scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                world.gpu.wait_fault();
                while let Some(record) = world.gpu.pop_fault() {
                    world.map(record.address >> 12, RW | (record.address & 0x3f_000));
                    served.fetch_add(1, Ordering::Relaxed);
                    world.gpu.ack_fault(&record, FaultResponse::Replay);
                }
            }
        });
        let units: Vec<_> = (0..2)
            .map(|unit| {
                scope.spawn({
                    let d = &dispatch;
                    let gpu = &world.gpu;
                    move || gpu.run(d, unit)
                })
            })
            .collect();
        for unit in units {
            assert_eq!(unit.join().expect("the unit ends"), Ok(()));
        }
        stop.store(true, Ordering::Release);
        world.gpu.kick_service();
        service.join().expect("the service ends");
    });
    assert_eq!(served.load(Ordering::Relaxed), 64);
    assert!((0..64).all(|page| world.host.get(page << 12) == 7));
}

#[test]
fn cancelled_dispatch_and_busy_unit_are_told() {
    let world = world(CONFIG);
    let kernel = Do(|_, tile: &mut Tile<'_>| tile.load_one::<u64>(0).map(|_word| ()));
    let dispatch = Dispatch::new(&kernel, 1, 1);
    dispatch.cancel();
    assert_eq!(world.gpu.run(&dispatch, 0), Err(Stop::Cancelled));
    assert_eq!(world.gpu.run(&dispatch, 9), Err(Stop::NoUnit));
    let busy = Do(|_, _: &mut Tile<'_>| {
        let inner = Dispatch::new(&kernel, 1, 1);
        assert_eq!(world.gpu.run(&inner, 0), Err(Stop::UnitBusy));
        Ok(())
    });
    assert_eq!(world.run(&busy, 1), Ok(()));
}

#[test]
fn copy_outside_of_device_memory_is_refused() {
    let world = world(CONFIG);
    let piece = |vram| CopyPiece {
        kind: CopyKind::Zero,
        vram,
        len: 4096,
    };
    assert_eq!(world.gpu.copy(&[piece(0x9000)]), Ok(()));
    assert!(world.gpu.copy(&[piece(1 << 20)]).is_err());
    assert!(world.gpu.copy(&[piece(u64::MAX - 10)]).is_err());
}

/// A unit stores in a loop; the page under it is exchanged many times, each time with a flush.
/// Returns how many stores landed in a page after its flush.
fn late_stores(config: GpuConfig) -> u64 {
    let world = world(config);
    world.map(0, RW | pte::DEVICE_MEMORY | 0x8000);
    let stop = AtomicBool::new(false);
    let kernel = Do(|_, tile: &mut Tile<'_>| {
        let mut n = 1_u64;
        while !stop.load(Ordering::Relaxed) {
            tile.store_one(0, n)?;
            n += 1;
        }
        Ok(())
    });
    let mut late = 0;
    thread::scope(|scope| {
        let unit = scope.spawn(|| world.run(&kernel, 1));
        for round in 0..2000_u64 {
            let (old, new) = (0x8000 + round % 2 * 0x1000, 0x9000 - round % 2 * 0x1000);
            world.map(0, RW | pte::DEVICE_MEMORY | new);
            world.flush(0);
            let read = || world.vram.word(old).expect("inside").load(Ordering::SeqCst);
            let before = read();
            (0..50).for_each(|_| core::hint::spin_loop());
            thread::yield_now();
            late += u64::from(read() != before);
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(unit.join().expect("the unit ends"), Ok(()));
    });
    late
}

#[test]
fn no_store_lands_in_a_page_after_its_flush() {
    assert_eq!(late_stores(CONFIG), 0);
}

#[test]
fn planted_stale_tlb_is_caught() {
    let planted = GpuConfig {
        planted: Some(Planted::KeepTlb),
        ..CONFIG
    };
    assert!(
        late_stores(planted) > 0,
        "the test above would fail without invalidations"
    );
}
