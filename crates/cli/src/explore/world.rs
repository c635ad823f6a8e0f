//! A world: a process in memory, devices on it, and whoever uses both.
//!
//! ```text
//!   cpu actors ── calls, loads, stores ──▶ model host ◀── faults, migrations ── driver ◀── units
//!   conductor  ── when all are done: reads every word on every side, closes the VMs, counts
//! ```

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::PagemapId;
use gpusvm::seam::{Platform, Seams};
use gpusvm_abi::bus::{DevicePort, FaultHandler, Park, SystemBus, VramStore};
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use gpusvm_model::kernel::bus::Bus;
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::{ModelEnv, ModelMutex, Sim, When};
use gpusvm_softgpu::{FaultService, GpuConfig, Planted, SoftGpu};
use gpusvm_xe::copy::XeCopy;
use gpusvm_xe::device::Device;
use gpusvm_xe::vm::{MirrorArea, Rights, Vm, user_space};

use crate::explore::doing::{Doing, Watch};
use crate::explore::ledger::Ledger;
use crate::explore::plan::{Closes, PAGES, Plan, Service, WORDS, address};
use crate::explore::sink::Told;
use crate::explore::space::Space;
use crate::explore::{coverage, oracle};
use crate::explore::{cpu, gpu};

/// The model host, the Xe driver and its copy engine, as one platform.
#[derive(Debug)]
pub(super) struct ModelPlatform;

impl Platform for ModelPlatform {
    type Env = ModelEnv;
    type Space = Space;
    type Copy = XeCopy;
    type Sink = Told;
}

/// One device with its driver and the VM on it.
pub(super) struct Node {
    pub(super) gpu: Arc<SoftGpu<ModelMutex>>,
    pub(super) device: Arc<Device<ModelPlatform>>,
    pub(super) vm: Arc<Vm<ModelPlatform>>,
    pub(super) handler: Arc<Handler>,
}

/// Who serves the faults of a device.
pub(super) struct Handler {
    device: Arc<Device<ModelPlatform>>,
    watch: Arc<Watch>,
}

impl FaultHandler for Handler {
    fn handle(&self, record: &FaultRecord) -> FaultResponse {
        let page = HostSpan::at(HostVa::new(record.address), 1);
        let _ends = self.watch.begin_span(Doing::Serve, page);
        self.device.handle(record)
    }
}

/// What all actors share.
pub(super) struct World {
    pub(super) plan: &'static Plan,
    pub(super) kernel: Arc<Kernel<ModelEnv>>,
    pub(super) space: Arc<ModelSpace<ModelEnv>>,
    pub(super) nodes: Vec<Node>,
    pub(super) told: Arc<Told>,
    /// What actors are doing, where the world is watched.
    pub(super) watch: Arc<Watch>,
    ledger: Mutex<Ledger>,
    /// Writes to device memory so far.
    pub(super) writes: Arc<AtomicU64>,
    /// Actors that are not done.
    pub(super) busy: AtomicU32,
    /// No fault will come any more.
    pub(super) closed: AtomicBool,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

/// Makes the world of a plan.
pub(super) fn build(plan: &'static Plan, watch: Watch, sim: &Sim) {
    let world = Arc::new(World::new(plan, watch));
    map(&world.space, 0..PAGES);
    for n in 0..usize::from(plan.cpus) {
        let world = Arc::clone(&world);
        sim.spawn(CPUS[n % CPUS.len()], move || cpu::run(&world, n));
    }
    for n in 0..world.nodes.len() {
        let world = Arc::clone(&world);
        sim.spawn(UNITS[n % UNITS.len()], move || gpu::run(&world, n));
    }
    if plan.service == Service::Queue {
        for n in 0..world.nodes.len() {
            let world = Arc::clone(&world);
            sim.spawn(SERVICES[n % SERVICES.len()], move || gpu::serve(&world, n));
        }
    }
    collect_garbage(sim, &world);
    let (of_oracle, mut seen) = (Arc::clone(&world), None);
    sim.oracle(When::EveryStep, move || oracle::look(&of_oracle, &mut seen));
    if world.watch.is_on() {
        watch_meetings(sim, &world);
    }
    sim.spawn("conductor", move || conduct(&world));
}

fn watch_meetings(sim: &Sim, world: &Arc<World>) {
    let (world, mut seen) = (Arc::clone(world), None);
    sim.oracle(When::EveryStep, move || {
        let moved = world.kernel.generation();
        world.kernel.look(|mm| {
            world
                .watch
                .visit(&mut seen, moved, |step| coverage::note(mm, step));
        });
        Ok(())
    });
}

const CPUS: [&str; 2] = ["cpu0", "cpu1"];
const UNITS: [&str; 2] = ["gpu0", "gpu1"];
const SERVICES: [&str; 2] = ["service0", "service1"];

fn collect_garbage(sim: &Sim, world: &World) {
    let drivers: Vec<_> = world
        .nodes
        .iter()
        .map(|node| Arc::clone(&node.device))
        .collect();
    sim.worker("worker", move |work| {
        drivers.iter().for_each(|driver| driver.work(work))
    });
}

/// Maps fresh memory that may be written.
pub(super) fn map(space: &ModelSpace<ModelEnv>, pages: core::ops::Range<u32>) {
    let map = Map {
        place: Place::Fixed(address(pages.start, 0)),
        len: u64::from(pages.end - pages.start) * PAGE,
        prot: Prot::READ.with(Prot::WRITE),
        what: What::Private,
        extra: VmFlags::NONE,
    };
    if let Err(errno) = space.mmap(&map) {
        ModelEnv.fail(format!("mmap of pages {pages:?} answers {errno:?}"));
    }
}

impl World {
    fn new(plan: &'static Plan, watch: Watch) -> Self {
        let kernel = Kernel::new(Arc::new(ModelEnv), Plan::shape());
        let space = ModelSpace::first(&kernel);
        let told = Arc::new(Told::default());
        let watch = Arc::new(watch);
        let seams = Seams {
            env: Arc::new(ModelEnv),
            space: Arc::new(Space::new(Arc::clone(&space), Arc::clone(&watch))),
            sink: Arc::clone(&told),
        };
        let writes = Arc::new(AtomicU64::new(0));
        let bus: Arc<dyn SystemBus> = Arc::new(Bus::new(Arc::clone(&kernel)));
        let node = |n: u16| Node::new(plan, n, (&seams, &watch), (&bus, &writes));
        Self {
            plan,
            nodes: (0..plan.gpus).map(node).collect(),
            kernel,
            space,
            told,
            watch,
            ledger: Mutex::default(),
            writes,
            busy: AtomicU32::new(u32::from(plan.cpus + plan.gpus)),
            closed: AtomicBool::new(false),
        }
    }

    /// What may be read. Nobody gives way inside.
    pub(super) fn ledger<R>(&self, act: impl FnOnce(&mut Ledger) -> R) -> R {
        act(&mut self.ledger.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Words that were stored to.
    pub(super) fn used(&self) -> Vec<(u32, usize)> {
        let all = (0..PAGES).flat_map(|page| (0..WORDS).map(move |slot| (page, slot)));
        self.ledger(|ledger| {
            all.filter(|(page, slot)| ledger.is_used(*page, *slot))
                .collect()
        })
    }

    /// Fails the world where a rule is broken.
    pub(super) fn must(&self, rule: Result<(), String>) {
        if let Err(broken) = rule {
            ModelEnv.fail(broken);
        }
    }

    /// One more actor is done.
    pub(super) fn done(&self) {
        self.busy.fetch_sub(1, Ordering::AcqRel);
        Environment::wake(&ModelEnv, &self.busy);
    }
}

impl Node {
    fn new(
        plan: &Plan,
        n: u16,
        (seams, watch): (&Seams<ModelPlatform>, &Arc<Watch>),
        (bus, writes): (&Arc<dyn SystemBus>, &Arc<AtomicU64>),
    ) -> Self {
        let vram =
            crate::explore::vram::ModelVram::new(plan.vram, Arc::clone(bus), Arc::clone(writes));
        let gpu = SoftGpu::new(
            config(plan),
            Arc::new(vram) as Arc<dyn VramStore>,
            Arc::clone(bus),
            Arc::new(ModelEnv) as Arc<dyn Park>,
        );
        let gpu = gpu.expect("a plan's device has units, a ring and address spaces");
        let port = Arc::clone(&gpu) as Arc<dyn DevicePort>;
        let copy = Arc::new(XeCopy::new(Arc::clone(&port)));
        let id = PagemapId(u32::from(n) + 1);
        let device = Device::new(seams.clone(), id, port, copy);
        let vm = Vm::new(&device, u32::from(n) + 1).expect("a fresh device has room for a table");
        let area = MirrorArea {
            span: user_space(),
            rights: Rights::ReadWrite,
        };
        vm.mirror(area).expect("a fresh VM has no ranges");
        let handler = Arc::new(Handler {
            device: Arc::clone(&device),
            watch: Arc::clone(watch),
        });
        gpu.set_fault_service(match plan.service {
            Service::Inline => FaultService::Inline(Arc::clone(&handler) as Arc<dyn FaultHandler>),
            Service::Queue => FaultService::Queue,
        });
        Self {
            gpu,
            device,
            vm,
            handler,
        }
    }

    /// Parts device and driver, which refer to each other.
    fn part(&self) {
        self.gpu.set_fault_service(FaultService::Queue);
    }
}

fn config(plan: &Plan) -> GpuConfig {
    let planted = [
        (Mutant::TlbKeepsEntries, Planted::KeepTlb),
        (Mutant::WalkOutsideGate, Planted::WalkOutsideGate),
        (Mutant::FaultWakesNobody, Planted::AnswerWakesNobody),
    ];
    let planted = planted
        .into_iter()
        .find(|(mutant, _)| ModelEnv.mutant(*mutant));
    GpuConfig {
        gts: 1,
        units_per_gt: 1,
        tlb_entries: 16,
        fault_ring: 2,
        asids: u32::from(plan.gpus) + 1,
        tlb_timeout_ns: 1_000_000,
        planted: planted.map(|(_, bug)| bug),
    }
}

/// Waits until all are done; then everything must be readable, and nothing must be left.
fn conduct(world: &Arc<World>) {
    loop {
        let seen = world.busy.load(Ordering::Acquire);
        if seen == 0 {
            break;
        }
        Environment::wait(&ModelEnv, &world.busy, seen);
    }
    ModelEnv.calm();
    if world.plan.closes == Closes::AtTheEnd {
        (0..world.nodes.len()).for_each(|n| gpu::sweep(world, n));
    }
    cpu::sweep(world);
    world.closed.store(true, Ordering::Release);
    for node in &world.nodes {
        node.vm.close();
        let _evicted = node.device.pagemap().vram().evict_all();
        node.gpu.kick_service();
    }
    world.must(oracle::nothing_is_left(world));
    world.nodes.iter().for_each(Node::part);
}
