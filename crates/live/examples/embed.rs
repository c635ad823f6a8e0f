//! A device on this process's own memory: all that a program needs to embed it.
//!
//! The host is this process, the driver is the reference driver, and the device is the software
//! GPU. `main` puts them together, mirrors the whole address space, and lets the device compute on
//! a plain vector: its pages migrate as the device touches them, and come home as `main` does.

use std::error::Error;
use std::sync::Arc;

use gpusvm::seam::{Platform, Seams, mm::PagemapId};
use gpusvm_live::{LiveBus, LiveConfig, LiveEnv, LiveSpace, RuntimeAlloc, VramMode, thread};
use gpusvm_softgpu::{Dispatch, FaultService, GpuConfig, Kernel, SmemAtomics, SoftGpu, Stop, Tile};
use gpusvm_xe::stats::{Counter as C, DeviceStats};
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};
use gpusvm_xe::{copy::XeCopy, device::Device};

/// What the runtime allocates stays apart from what migrates.
#[global_allocator]
static ALLOCATOR: RuntimeAlloc = RuntimeAlloc;

type Answer<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Which parts are put together.
struct Embedded;

impl Platform for Embedded {
    type Env = LiveEnv;
    type Space = LiveSpace;
    type Copy = XeCopy;
    type Sink = DeviceStats;
}

/// Adds one to every number; a group does 64 Ki of them.
struct AddOne(u64);

impl Kernel for AddOne {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut part = vec![0_u64; 64 << 10];
        let at = self.0 + u64::from(group) * (512 << 10);
        tile.load(at, &mut part)?;
        part.iter_mut().for_each(|number| *number += 1);
        tile.store(at, &part)
    }
}

const GPU: GpuConfig = GpuConfig {
    gts: 1,
    units_per_gt: 2,
    tlb_entries: 64,
    fault_ring: 64,
    asids: 2,
    tlb_timeout_ns: 1_000_000_000,
    smem_atomics: SmemAtomics::OnTheBus,
    planted: None,
};

fn main() -> Answer<()> {
    let mut numbers: Vec<u64> = (0..4 << 20).collect();
    let kernel = AddOne(u64::try_from(numbers.as_mut_ptr().expose_provenance())?);
    // On a thread of the runtime, as all that takes part in serving faults.
    let stats = thread::run(|| compute(&kernel))?;
    // Reading brings home what is still on the device.
    if !(1..).zip(&numbers).all(|(wanted, is)| wanted == *is) {
        return Err("the device has not added one to every number".into());
    }
    report(&stats);
    Ok(())
}

/// Runs a kernel of 64 groups over this process's memory, on a device with 16 MiB of its own.
fn compute(kernel: &AddOne) -> Answer<Arc<DeviceStats>> {
    let (env, sink) = (LiveEnv::new(1), Arc::new(DeviceStats::new(1)));
    let space = LiveSpace::open(&LiveConfig::default(), env.clone(), sink.clone())?;
    let vram = space.create_vram(16 << 20, VramMode::Adopt)?;
    let gpu: Arc<SoftGpu<gpusvm_live::RawFutexMutex>> =
        SoftGpu::new(GPU, vram, Arc::new(LiveBus), env.clone())?;
    let copy = Arc::new(XeCopy::new(gpu.clone()));
    let seams = Seams::<Embedded> {
        env: env.clone(),
        space: space.clone(),
        sink: sink.clone(),
    };
    let driver = Device::new(seams, PagemapId(1), gpu.clone(), copy);
    gpu.set_fault_service(FaultService::Inline(driver.clone()));
    env.start_worker({
        let driver = driver.clone();
        move |work| driver.work(work)
    })?;
    let vm = Vm::new(&driver, 1)?;
    vm.mirror(MirrorArea {
        span: user_space(),
        rights: Rights::ReadWrite,
    })?;
    let dispatch = Dispatch::new(kernel, 64, 1);
    let ended: Result<(), Stop> = thread::run_scoped(2, &|unit| gpu.run(&dispatch, unit))
        .into_iter()
        .collect();
    vm.close();
    space.close();
    env.stop_worker();
    ended?;
    Ok(sink)
}

#[expect(clippy::print_stdout, reason = "what an example is for")]
fn report(stats: &DeviceStats) {
    for counter in [
        C::SvmPagefaultCount,
        C::AdoptedToDeviceKb,
        C::EvictCount,
        C::CpuFaultCount,
    ] {
        println!("{}: {}", counter.name(), stats.total(counter));
    }
}
