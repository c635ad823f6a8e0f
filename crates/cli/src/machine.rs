//! The assembly: this process as host, a software GPU as device, the reference driver between.
//!
//! ```text
//!   workload ── launch ──▶ units (threads) ── fault ──▶ driver ──▶ framework ──▶ live host
//! ```
//!
//! Everything that takes part in serving faults runs on threads of the runtime: the caller of
//! [`Machine::launch`] only waits.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::error::Failed;
use gpusvm::event::EventSink;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::{DevicePort, Park, SystemBus, VramStore};
use gpusvm_live::{
    LiveBus, LiveConfig, LiveEnv, LiveSpace, LiveVram, OpenError, RuntimeScope, VramMode, thread,
};
use gpusvm_softgpu::{ConfigError, Dispatch, FaultService, GpuConfig, Kernel, SoftGpu, Stop};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::stats::{Counter, DeviceStats};
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};

use crate::timeline::Timeline;

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
    type Sink = Folds;
}

/// What a machine makes of events: counters, and a timeline where one is wanted.
type Folds = (Arc<DeviceStats>, Option<Arc<Timeline>>);

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
    /// Keep a [`Timeline`].
    pub timeline: bool,
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
            timeline: false,
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

impl From<OpenError> for MachineError {
    fn from(error: OpenError) -> Self {
        Self::Host(error)
    }
}

/// A running machine. Closing or dropping it brings all data home.
pub struct Machine {
    env: Arc<LiveEnv>,
    space: Arc<LiveSpace>,
    gpu: Arc<Gpu>,
    device: Arc<Device<LivePlatform>>,
    vm: Arc<Vm<LivePlatform>>,
    sink: Arc<Folds>,
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
        let timeline = config.timeline.then(|| Arc::new(Timeline::new()));
        let sink: Arc<Folds> = Arc::new((Arc::new(DeviceStats::new(1)), timeline));
        let of_host = Arc::clone(&sink) as Arc<dyn EventSink>;
        let space =
            LiveSpace::open(&config.live, Arc::clone(&env), of_host).map_err(MachineError::Host)?;
        let built = Self::build(config, env, Arc::clone(&space), sink);
        match &built {
            Ok(machine) => machine.begin_timeline(),
            Err(_) => space.close(),
        }
        built
    }

    /// Time begins now.
    fn begin_timeline(&self) {
        if let Some(timeline) = self.timeline() {
            timeline.begin(self.env.now());
        }
    }

    fn build(
        config: MachineConfig,
        env: Arc<LiveEnv>,
        space: Arc<LiveSpace>,
        sink: Arc<Folds>,
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
            sink: Arc::clone(&sink),
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
            sink,
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
    /// The first [`Stop`] of any unit: a refused fault, or a cancelled dispatch;
    /// [`Stop::Foreign`] in a child of the machine's process.
    pub fn launch(&self, kernel: &dyn Kernel, groups: u32) -> Result<(), Stop> {
        check_ours()?;
        let dispatch = Dispatch::new(kernel, groups, ASID);
        let units = usize::from(self.config.units);
        thread::run_scoped(units, &|unit| self.gpu.run(&dispatch, unit))
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
        check_ours()?;
        let dispatch = Dispatch::new(kernel, groups, ASID);
        let units = usize::from(self.config.units);
        let ended = AtomicU32::new(0);
        let play = |unit: usize| {
            if unit < units {
                let result = self.gpu.run(&dispatch, unit);
                ended.fetch_add(1, Ordering::Release);
                Park::wake(&*self.env, &ended);
                return result;
            }
            loop {
                watch(&dispatch);
                let seen = ended.load(Ordering::Acquire);
                if usize::try_from(seen).is_ok_and(|ended| ended == units) {
                    return Ok(());
                }
                Park::wait(&*self.env, &ended, seen, Some(WATCH_NS));
            }
        };
        thread::run_scoped(units + 1, &play).into_iter().collect()
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
        thread::run(|| self.vm.mirror(area))
    }

    /// Moves an aligned span to the device, without the device touching it; returns the time. Must
    /// be called on a thread of the runtime (see [`thread::run`]).
    ///
    /// # Errors
    /// [`Stop::Cancelled`] where the pages refuse.
    pub fn send(&self, at: u64, bytes: u64) -> Result<Ns, Stop> {
        let start = self.env.now();
        let wish = ToDevice {
            span: HostSpan::at(HostVa::new(at), bytes),
            timeslice: Ns::default(),
        };
        self.device
            .pagemap()
            .to_device(wish)
            .map_err(|_refused| Stop::Cancelled)?;
        Ok(self.env.now().since(start))
    }

    /// Evicts everything that can be evicted; returns the time. Must be called on a thread of the
    /// runtime.
    pub fn evict_all(&self) -> Ns {
        let start = self.env.now();
        let _evicted = self.device.pagemap().vram().evict_all();
        self.env.now().since(start)
    }

    /// Nanoseconds in fault service so far, and the number of faults. For benches.
    #[must_use]
    pub fn fault_service_ns(&self) -> (u64, u64) {
        (
            self.stats().fault_ns(),
            self.stats().total(Counter::SvmPagefaultCount),
        )
    }

    /// Counters of the device.
    #[must_use]
    pub fn stats(&self) -> &Arc<DeviceStats> {
        &self.sink.0
    }

    /// What happened when, where the configuration asked for it.
    #[must_use]
    pub fn timeline(&self) -> Option<&Arc<Timeline>> {
        self.sink.1.as_ref()
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
        if gpusvm_live::is_child() {
            // Threads, locks and device memory are the parent's. Nothing here is torn down.
            let _parents = ManuallyDrop::new(self.service.take());
            return;
        }
        self.stopping.store(true, Ordering::Release);
        self.gpu.kick_service();
        if let Some(service) = self.service.take() {
            service.join();
        }
        thread::run(|| {
            self.vm.close();
            self.space.close();
        });
        self.env.stop_worker();
        // The device refers to the driver, and the driver to the device: part them.
        self.gpu.set_fault_service(FaultService::Queue);
    }
}

/// A child of the machine's process has neither its threads nor its device.
fn check_ours() -> Result<(), Stop> {
    if gpusvm_live::is_child() {
        Err(Stop::Foreign)
    } else {
        Ok(())
    }
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
