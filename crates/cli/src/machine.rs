//! The assembly: this process as host, a software GPU as device, the reference driver between.
//!
//! ```text
//!   workload ── launch ──▶ units (threads) ── fault ──▶ driver ──▶ framework ──▶ live host
//! ```
//!
//! Everything that takes part in serving faults runs on threads of the runtime: the caller of
//! [`Machine::launch`] only waits.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::event::EventSink;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::{DevicePort, Park, SystemBus, VramStore};
use gpusvm_live::{
    LiveBus, LiveConfig, LiveEnv, LiveSpace, LiveVram, OpenError, RuntimeScope, VramMode, thread,
};
use gpusvm_softgpu::{
    ConfigError, Dispatch, FaultService, GpuConfig, Kernel, SoftGpu, Stop, UnitState,
};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::stats::{Counter, DeviceStats};
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};

/// Address-space id of the machine's one VM.
const ASID: u32 = 1;
/// Faults that wait in the ring.
const FAULT_RING: usize = 64;
/// Translations that one unit caches per page size.
const TLB_ENTRIES: usize = 512;
/// Time within which a unit must acknowledge an invalidation.
const TLB_TIMEOUT_NS: u64 = 10_000_000_000;

/// Time between two looks at a running dispatch.
const WATCH_NS: u64 = 100_000_000;

/// Smallest device memory: one huge range, and its page tables at the other end.
pub const VRAM_MIN: u64 = 4 << 20;

/// The live host, the Xe driver and its copy engine, as one platform.
#[derive(Debug)]
pub struct LivePlatform;

impl Platform for LivePlatform {
    type Env = LiveEnv;
    type Space = LiveSpace;
    type Copy = XeCopy;
    type Sink = DeviceStats;
}

/// The software GPU with the live host's locks.
type Gpu = SoftGpu<gpusvm_live::RawFutexMutex>;

/// Where faults are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceMode {
    /// On the unit that raised them.
    #[default]
    Inline,
    /// By a service thread, through the fault ring.
    Queue,
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct MachineConfig {
    /// Bytes of device memory, at least [`VRAM_MIN`].
    pub vram: u64,
    /// Execution units, each one thread.
    pub units: u16,
    /// How pages move.
    pub migration: VramMode,
    /// Where faults are served.
    pub service: ServiceMode,
    /// The host's brackets.
    pub live: LiveConfig,
    /// Seed of the environment's random numbers.
    pub seed: u64,
    /// Planted fault: units acknowledge TLB invalidations and keep their entries.
    pub plant_stale_tlb: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vram: 64 << 20,
            units: 2,
            migration: VramMode::Adopt,
            service: ServiceMode::Inline,
            live: LiveConfig::default(),
            seed: 1,
            plant_stale_tlb: false,
        }
    }
}

/// A machine cannot be made.
#[derive(Debug)]
pub enum MachineError {
    /// Device memory below the minimum.
    VramTooSmall(u64),
    /// The host refuses.
    Host(OpenError),
    /// The device refuses its configuration.
    Device(ConfigError),
    /// The driver refuses.
    Driver(Failed),
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VramTooSmall(bytes) => write!(
                f,
                "{bytes} bytes of VRAM hold not one 2 MiB range and its page tables; \
                 use --vram {}M or more",
                VRAM_MIN >> 20
            ),
            Self::Host(error) => error.fmt(f),
            Self::Device(error) => error.fmt(f),
            Self::Driver(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for MachineError {}

/// A running machine. Closing or dropping it brings all data home.
pub struct Machine {
    env: Arc<LiveEnv>,
    space: Arc<LiveSpace>,
    gpu: Arc<Gpu>,
    device: Arc<Device<LivePlatform>>,
    vm: Arc<Vm<LivePlatform>>,
    stats: Arc<DeviceStats>,
    service: Option<thread::RuntimeThread>,
    stopping: Arc<AtomicBool>,
    config: MachineConfig,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Builds and starts a machine whose VM mirrors the whole process.
    ///
    /// # Errors
    /// [`MachineError`] says which part refused and what to do.
    pub fn start(config: MachineConfig) -> Result<Self, MachineError> {
        if config.vram < VRAM_MIN {
            return Err(MachineError::VramTooSmall(config.vram));
        }
        let _runtime_memory = RuntimeScope::enter();
        let env = LiveEnv::new(config.seed);
        let stats = Arc::new(DeviceStats::new(1));
        let sink = Arc::clone(&stats) as Arc<dyn EventSink>;
        let space =
            LiveSpace::open(&config.live, Arc::clone(&env), sink).map_err(MachineError::Host)?;
        let built = Self::build(config, env, Arc::clone(&space), stats);
        if built.is_err() {
            space.close();
        }
        built
    }

    fn build(
        config: MachineConfig,
        env: Arc<LiveEnv>,
        space: Arc<LiveSpace>,
        stats: Arc<DeviceStats>,
    ) -> Result<Self, MachineError> {
        let vram: Arc<LiveVram> = space
            .create_vram(config.vram, config.migration)
            .map_err(MachineError::Host)?;
        let gpu = SoftGpu::new(
            gpu_config(&config),
            vram as Arc<dyn VramStore>,
            Arc::new(LiveBus) as Arc<dyn SystemBus>,
            Arc::clone(&env) as Arc<dyn Park>,
        )
        .map_err(MachineError::Device)?;
        let seams = Seams {
            env: Arc::clone(&env),
            space: Arc::clone(&space),
            sink: Arc::clone(&stats),
        };
        let port = Arc::clone(&gpu) as Arc<dyn DevicePort>;
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let device = Device::new(seams, PagemapId(1), port, copy);
        let vm = Vm::new(&device, ASID).map_err(MachineError::Driver)?;
        vm.mirror(MirrorArea {
            span: user_space(),
            rights: Rights::ReadWrite,
        })
        .map_err(MachineError::Driver)?;
        let worker = Arc::clone(&device);
        env.start_worker(move |work| worker.work(work))
            .map_err(|error| MachineError::Host(error.into()))?;
        let mut machine = Self {
            env,
            space,
            gpu,
            device,
            vm,
            stats,
            service: None,
            stopping: Arc::new(AtomicBool::new(false)),
            config,
        };
        machine.start_service()?;
        Ok(machine)
    }

    fn start_service(&mut self) -> Result<(), MachineError> {
        let handler = Arc::clone(&self.device);
        if self.config.service == ServiceMode::Inline {
            self.gpu.set_fault_service(FaultService::Inline(handler));
            return Ok(());
        }
        self.gpu.set_fault_service(FaultService::Queue);
        let (gpu, stopping) = (Arc::clone(&self.gpu), Arc::clone(&self.stopping));
        let serve = move || {
            while !stopping.load(Ordering::Acquire) {
                gpu.wait_fault();
                while let Some(record) = gpu.pop_fault() {
                    let answer = gpusvm_abi::bus::FaultHandler::handle(&*handler, &record);
                    gpu.ack_fault(&record, answer);
                }
            }
        };
        let thread = thread::spawn("gpusvm-service", serve)
            .map_err(|error| MachineError::Host(error.into()))?;
        self.service = Some(thread);
        Ok(())
    }

    /// Runs `groups` groups of `kernel` on all units and waits.
    ///
    /// # Errors
    /// The first [`Stop`] of any unit: a refused fault, or a cancelled dispatch.
    pub fn launch(&self, kernel: &dyn Kernel, groups: u32) -> Result<(), Stop> {
        let order = Order::new(kernel, groups);
        let units = usize::from(self.config.units);
        thread::run_scoped(units, &|unit| self.gpu.run(&order.dispatch, unit))
            .into_iter()
            .collect()
    }

    /// As [`launch`](Self::launch); meanwhile one more thread calls `watch` ten times a second, and
    /// once at the end.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_watched(
        &self,
        kernel: &dyn Kernel,
        groups: u32,
        watch: &(dyn Fn(&Dispatch<'_>) + Sync),
    ) -> Result<(), Stop> {
        let order = Order::new(kernel, groups);
        let Order { dispatch, ended } = &*order;
        let units = usize::from(self.config.units);
        let play = |unit: usize| {
            if unit < units {
                let result = self.gpu.run(dispatch, unit);
                ended.fetch_add(1, Ordering::Release);
                Park::wake(&*self.env, ended);
                return result;
            }
            loop {
                watch(dispatch);
                let seen = ended.load(Ordering::Acquire);
                if usize::try_from(seen).is_ok_and(|ended| ended == units) {
                    return Ok(());
                }
                Park::wait(&*self.env, ended, seen, Some(WATCH_NS));
            }
        };
        thread::run_scoped(units + 1, &play).into_iter().collect()
    }

    /// Runs `kernel`, one group, on the unit `unit` alone, and waits. Units that are launched
    /// together by [`launch`](Self::launch) must not run meanwhile.
    ///
    /// # Errors
    /// The kernel's [`Stop`], or that the unit is busy or does not exist.
    pub fn launch_on(&self, unit: usize, kernel: &dyn Kernel) -> Result<(), Stop> {
        let order = Order::new(kernel, 1);
        thread::run_scoped(1, &|_| self.gpu.run(&order.dispatch, unit))
            .into_iter()
            .collect()
    }

    /// Moves pages to the device, without the device touching them.
    ///
    /// # Errors
    /// The framework's, where the pages refuse or are busy.
    pub fn send(&self, span: HostSpan) -> Result<(), Interrupted> {
        let wish = ToDevice {
            span,
            timeslice: Ns::default(),
        };
        thread::run_scoped(1, &|_| self.device.pagemap().to_device(wish))
            .into_iter()
            .collect()
    }

    /// Brings home what is on the device; returns how many allocations went.
    #[must_use]
    pub fn evict_all(&self) -> usize {
        thread::run_scoped(1, &|_| self.device.pagemap().vram().evict_all())
            .into_iter()
            .sum()
    }

    /// Tells what the units are doing, also while the machine is being closed.
    pub fn unit_viewer(&self) -> impl Fn() -> Vec<UnitState> + Sync + use<> {
        let gpu = Arc::clone(&self.gpu);
        move || gpu.unit_states()
    }

    /// Lets the device read `span`, whose CPU mappings may be read-only.
    ///
    /// # Errors
    /// The driver's, where ranges are live in the span.
    pub fn mirror_read_only(&self, span: HostSpan) -> Result<(), Failed> {
        let area = MirrorArea {
            span,
            rights: Rights::ReadOnly,
        };
        thread::run_scoped(1, &|_| self.vm.mirror(area))
            .into_iter()
            .collect()
    }

    /// Moves an aligned span to the device and back, without the device touching it; returns the
    /// nanoseconds of each way. For benches.
    ///
    /// # Errors
    /// [`Stop::Cancelled`] where the pages refuse.
    pub fn migrate_once(&self, at: u64, bytes: u64) -> Result<(f64, f64), Stop> {
        let span = HostSpan::at(HostVa::new(at), bytes);
        let pagemap = self.device.pagemap();
        let go = |_| {
            let start = self.env.now();
            let wish = ToDevice {
                span,
                timeslice: Ns::default(),
            };
            pagemap
                .to_device(wish)
                .map_err(|_refused| Stop::Cancelled)?;
            let middle = self.env.now();
            let _evicted = pagemap.vram().evict_all();
            let end = self.env.now();
            Ok((nanos(middle.since(start)), nanos(end.since(middle))))
        };
        thread::run_scoped(1, &go)
            .pop()
            .unwrap_or(Err(Stop::NoUnit))
    }

    /// Nanoseconds in fault service so far, and the number of faults. For benches.
    #[must_use]
    pub fn fault_service_ns(&self) -> (u64, u64) {
        (
            self.stats.fault_ns(),
            self.stats.total(Counter::SvmPagefaultCount),
        )
    }

    /// Counters of the device.
    #[must_use]
    pub const fn stats(&self) -> &Arc<DeviceStats> {
        &self.stats
    }

    /// The host.
    #[must_use]
    pub const fn space(&self) -> &Arc<LiveSpace> {
        &self.space
    }

    /// The VM.
    #[must_use]
    pub const fn vm(&self) -> &Arc<Vm<LivePlatform>> {
        &self.vm
    }

    /// The device's driver.
    #[must_use]
    pub const fn device(&self) -> &Arc<Device<LivePlatform>> {
        &self.device
    }

    /// Units of the device.
    #[must_use]
    pub const fn units(&self) -> u16 {
        self.config.units
    }

    /// Stops the machine; all data is in host memory afterwards.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.gpu.kick_service();
        if let Some(service) = self.service.take() {
            service.join();
        }
        thread::run_scoped(1, &|_| {
            self.vm.close();
            self.space.close();
        });
        self.env.stop_worker();
        // The device refers to the driver, and the driver to the device: part them.
        self.gpu.set_fault_service(FaultService::Queue);
    }
}

/// What units look at between two tries of an access, in the runtime's memory: on the caller's stack
/// it could be in the very range that the access needs, and each look would call the range home
/// again.
struct Order<'k> {
    dispatch: Dispatch<'k>,
    /// Units that have ended.
    ended: AtomicU32,
}

impl<'k> Order<'k> {
    fn new(kernel: &'k dyn Kernel, groups: u32) -> Box<Self> {
        let _runtime_memory = RuntimeScope::enter();
        Box::new(Self {
            dispatch: Dispatch::new(kernel, groups, ASID),
            ended: AtomicU32::new(0),
        })
    }
}

/// A time as a number to calculate with.
fn nanos(time: Ns) -> f64 {
    f64::from(u32::try_from(time.0).unwrap_or(u32::MAX))
}

fn gpu_config(config: &MachineConfig) -> GpuConfig {
    GpuConfig {
        gts: 1,
        units_per_gt: config.units,
        tlb_entries: TLB_ENTRIES,
        fault_ring: FAULT_RING,
        asids: ASID + 1,
        tlb_timeout_ns: TLB_TIMEOUT_NS,
        ignore_tlb_invalidation: config.plant_stale_tlb,
    }
}
