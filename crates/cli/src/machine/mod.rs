//! The assembly: this process as host, software GPUs as devices, the reference driver between.
//!
//! ```text
//!   workload ── launch ──▶ units (threads) ── fault ──▶ driver ──▶ framework ──▶ live host
//! ```
//!
//! A machine has one host and one or more [`Node`]s: a device with its memory, its driver and the
//! VMs on it. Every VM mirrors the whole process.
//!
//! Everything that takes part in serving faults runs on threads of the runtime: the caller of
//! [`Machine::launch`] only waits.

mod node;

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use gpusvm::addr::HostSpan;
use gpusvm::error::{Failed, Interrupted};
use gpusvm::event::EventSink;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::Park;
use gpusvm_live::{LiveConfig, LiveEnv, LiveSpace, OpenError, RuntimeScope, VramMode, thread};
use gpusvm_softgpu::{ConfigError, Dispatch, Kernel, Stop, UnitState};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::stats::{Counter, DeviceStats};
use gpusvm_xe::vm::{MirrorArea, NOTIFIER_BYTES, Rights, Vm};

use crate::atomics::Atomics;
use crate::notes::Notes;
use crate::size;
use crate::timeline::Timeline;

pub use node::Node;

/// Time between two looks at a running dispatch.
const WATCH_NS: u64 = 100_000_000;

/// Most VMs of a machine.
const VMS_MAX: u16 = 64;

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

/// What a machine makes of events: counters, a timeline where one is wanted, and notes.
pub(crate) type Folds = ((Arc<DeviceStats>, Option<Arc<Timeline>>), Notes);

/// Where faults are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceMode {
    /// On the unit that raised them.
    #[default]
    Inline,
    /// By a service thread, through the fault ring.
    Queue,
}

/// A device and one of its VMs, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Which device.
    pub device: usize,
    /// Which of its VMs.
    pub vm: usize,
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct MachineConfig {
    /// Devices, at least one.
    pub devices: u16,
    /// VMs on each device, at least one.
    pub vms: u16,
    /// Bytes of memory of each device, at least [`VRAM_MIN`].
    pub vram: u64,
    /// Bytes of a notifier window, a power of two of at least 4 KiB (`svm_notifier_size`).
    pub window: u64,
    /// Execution units of each device, each one thread.
    pub units: u16,
    /// How pages move.
    pub migration: VramMode,
    /// Where faults are served.
    pub service: ServiceMode,
    /// Where devices do their atomics.
    pub atomics: Atomics,
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
            devices: 1,
            vms: 1,
            vram: 64 << 20,
            window: NOTIFIER_BYTES,
            units: 2,
            migration: VramMode::Adopt,
            service: ServiceMode::Inline,
            atomics: Atomics::System,
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
    /// Device memory of so many bytes, below the minimum.
    VramTooSmall(u64, u64),
    /// No device, no VM, or more than there are address-space ids.
    Count,
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
            Self::VramTooSmall(bytes, least) => write!(
                f,
                "{bytes} bytes of VRAM do not hold a large range and its page tables; \
                 use --vram {} or more",
                size::format(*least)
            ),
            Self::Count => write!(
                f,
                "a machine has 1 to {VMS_MAX} devices and VMs on each, and no more VMs in all"
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
    sink: Arc<Folds>,
    /// At least one.
    nodes: Vec<Node>,
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
            return Err(MachineError::VramTooSmall(config.vram, VRAM_MIN));
        }
        if !(1..=VMS_MAX).contains(&config.devices.saturating_mul(config.vms)) {
            return Err(MachineError::Count);
        }
        let _runtime_memory = RuntimeScope::enter();
        let env = LiveEnv::new(config.seed);
        let timeline = config.timeline.then(|| Arc::new(Timeline::new()));
        let counted = (Arc::new(DeviceStats::new(1)), timeline);
        let sink: Arc<Folds> = Arc::new((counted, Notes::default()));
        let of_host = Arc::clone(&sink) as Arc<dyn EventSink>;
        let space =
            LiveSpace::open(&config.live, Arc::clone(&env), of_host).map_err(MachineError::Host)?;
        let mut machine = Self {
            env,
            space,
            sink,
            nodes: Vec::new(),
            config,
        };
        // From here on dropping it closes what there is.
        machine.add_nodes()?;
        machine.start_worker()?;
        machine.begin_timeline();
        Ok(machine)
    }

    fn add_nodes(&mut self) -> Result<(), MachineError> {
        for index in 0..self.config.devices {
            let seams = Seams {
                env: Arc::clone(&self.env),
                space: Arc::clone(&self.space),
                sink: Arc::clone(&self.sink),
            };
            self.nodes.push(Node::new(&self.config, seams, index)?);
        }
        Ok(())
    }

    /// Dead ranges are collected in the background: each VM's by its own device.
    fn start_worker(&self) -> Result<(), MachineError> {
        let drivers: Vec<_> = self.nodes.iter().map(Node::driver).collect();
        let work = move |work| drivers.iter().for_each(|driver| driver.work(work));
        self.env
            .start_worker(work)
            .map_err(|error| MachineError::Host(error.into()))
    }

    /// Time begins now.
    fn begin_timeline(&self) {
        if let Some(timeline) = self.timeline() {
            timeline.begin(self.env.now());
        }
    }

    fn first(&self) -> &Node {
        &self.nodes[0]
    }

    /// Runs `groups` groups of `kernel` on all units of the device at `place`, in the VM there, and
    /// waits.
    ///
    /// # Errors
    /// As [`launch`](Self::launch); [`Stop::NoUnit`] where there is no such place, and
    /// [`Stop::UnitBusy`] where somebody else computes on the device.
    pub fn launch_at(&self, place: Place, kernel: &dyn Kernel, groups: u32) -> Result<(), Stop> {
        check_ours()?;
        let node = self.nodes.get(place.device).ok_or(Stop::NoUnit)?;
        let asid = node.asid(place.vm).ok_or(Stop::NoUnit)?;
        let order = Order::new(kernel, groups, asid);
        thread::run_scoped(self.unit_count(), &|unit| {
            node.gpu().run(&order.dispatch, unit)
        })
        .into_iter()
        .collect()
    }

    fn unit_count(&self) -> usize {
        usize::from(self.config.units)
    }

    /// Runs `groups` groups of `kernel` on all units of the first device and waits.
    ///
    /// # Errors
    /// The first [`Stop`] of any unit: a refused fault, or a cancelled dispatch;
    /// [`Stop::Foreign`] in a child of the machine's process.
    pub fn launch(&self, kernel: &dyn Kernel, groups: u32) -> Result<(), Stop> {
        self.launch_at(Place::default(), kernel, groups)
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
        let node = self.first();
        let asid = node.asid(0).ok_or(Stop::NoUnit)?;
        let order = Order::new(kernel, groups, asid);
        let Order { dispatch, ended } = &*order;
        let units = self.unit_count();
        let play = |unit: usize| {
            if unit < units {
                let result = node.gpu().run(dispatch, unit);
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

    /// Runs `kernel`, one group, on the unit `unit` of the first device alone, and waits. Units that
    /// are launched together by [`launch`](Self::launch) must not run meanwhile.
    ///
    /// # Errors
    /// The kernel's [`Stop`], or that the unit is busy or does not exist.
    pub fn launch_on(&self, unit: usize, kernel: &dyn Kernel) -> Result<(), Stop> {
        self.launch_one(Place::default(), unit, kernel)
    }

    /// As [`launch_on`](Self::launch_on), for a unit of the device at `place`.
    ///
    /// # Errors
    /// As there.
    pub fn launch_one(&self, place: Place, unit: usize, kernel: &dyn Kernel) -> Result<(), Stop> {
        check_ours()?;
        let node = self.nodes.get(place.device).ok_or(Stop::NoUnit)?;
        let order = Order::new(kernel, 1, node.asid(place.vm).ok_or(Stop::NoUnit)?);
        thread::run(|| node.gpu().run(&order.dispatch, unit))
    }

    /// Tells what the units of the first device are doing, also while the machine is being closed.
    pub fn unit_viewer(&self) -> impl Fn() -> Vec<UnitState> + Sync + use<> {
        let gpu = Arc::clone(self.first().gpu());
        move || gpu.unit_states()
    }

    /// Lets all devices read `span`, whose CPU mappings may be read-only.
    ///
    /// # Errors
    /// The driver's, where ranges are live in the span.
    pub fn mirror_read_only(&self, span: HostSpan) -> Result<(), Failed> {
        let area = MirrorArea {
            span,
            rights: Rights::ReadOnly,
        };
        let mut vms = self.nodes.iter().flat_map(Node::vms);
        thread::run(|| vms.try_for_each(|vm| vm.mirror(area)))
    }

    /// Moves pages to the first device, without it touching them; returns the time. Must be called
    /// on a thread of the runtime (see [`thread::run`]).
    ///
    /// # Errors
    /// The framework's, where the pages refuse or are busy.
    pub fn send(&self, span: HostSpan) -> Result<Ns, Interrupted> {
        let start = self.env.now();
        let wish = ToDevice {
            span,
            timeslice: Ns::default(),
        };
        self.device().pagemap().to_device(wish)?;
        Ok(self.env.now().since(start))
    }

    /// Evicts everything that can be evicted from the first device; returns the time. Must be called
    /// on a thread of the runtime.
    pub fn evict_all(&self) -> Ns {
        let start = self.env.now();
        let _evicted = self.device().pagemap().vram().evict_all();
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

    /// Counters of all devices together.
    #[must_use]
    pub fn stats(&self) -> &Arc<DeviceStats> {
        &self.sink.0.0
    }

    /// What no counter tells.
    pub(crate) fn notes(&self) -> &Notes {
        &self.sink.1
    }

    /// The machine's clock.
    pub(crate) const fn env(&self) -> &Arc<LiveEnv> {
        &self.env
    }

    /// What happened when, where the configuration asked for it.
    #[must_use]
    pub fn timeline(&self) -> Option<&Arc<Timeline>> {
        self.sink.0.1.as_ref()
    }

    /// The host.
    #[must_use]
    pub const fn space(&self) -> &Arc<LiveSpace> {
        &self.space
    }

    /// The devices, at least one.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The first device's driver.
    #[must_use]
    pub fn device(&self) -> &Arc<Device<LivePlatform>> {
        self.first().device()
    }

    /// The first device's first VM.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm<LivePlatform>> {
        &self.first().vms()[0]
    }

    /// Units of each device.
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
            let _parents = ManuallyDrop::new(core::mem::take(&mut self.nodes));
            return;
        }
        self.nodes.iter_mut().for_each(Node::stop_service);
        thread::run(|| {
            self.nodes
                .iter()
                .flat_map(Node::vms)
                .for_each(|vm| vm.close());
            self.space.close();
        });
        self.env.stop_worker();
        self.nodes.iter().for_each(Node::part);
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
    fn new(kernel: &'k dyn Kernel, groups: u32, asid: u32) -> Box<Self> {
        let _runtime_memory = RuntimeScope::enter();
        Box::new(Self {
            dispatch: Dispatch::new(kernel, groups, asid),
            ended: AtomicU32::new(0),
        })
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
