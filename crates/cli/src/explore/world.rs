//! A world: a process in memory, devices on it, and whoever uses both.
//!
//! ```text
//!   cpu actors ── calls, loads, stores ──▶ model host ◀── faults, migrations ── driver ◀── units
//!   conductor  ── when all are done: reads every word on every side, closes the VMs, counts
//! ```

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::PAGE;
use gpusvm::seam::Seams;
use gpusvm::seam::env::Environment;
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::{ModelEnv, Sim, When};

use crate::explore::births::Births;
use crate::explore::chaos::Chaos;
use crate::explore::doing::Watch;
use crate::explore::ledger::Ledger;
use crate::explore::node::{self, Handler, Node, Shared};
use crate::explore::oracle::{Oracle, host_is_empty};
use crate::explore::plan::{Begins, Closes, Plan, address};
use crate::explore::space::{Between, Moved, Space};
use crate::explore::{coverage, cpu, gpu};
use crate::world::Service;
use crate::world::oracle::{nothing_is_cached, nothing_is_left};
use crate::world::sink::Told;
use crate::world::vram::Wires;

/// What all actors share.
pub(super) struct World {
    pub(super) plan: &'static Plan,
    pub(super) kernel: Arc<Kernel<ModelEnv>>,
    pub(super) space: Arc<ModelSpace<ModelEnv>>,
    pub(super) nodes: Vec<Node>,
    /// Who serves the faults of each.
    pub(super) handlers: Vec<Arc<Handler>>,
    pub(super) told: Arc<Told>,
    pub(super) between: Arc<Between>,
    /// Where what is in use was taken; in worlds that keep texts.
    pub(super) births: Option<Births>,
    ledger: Mutex<Ledger>,
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
    map(&world.space, 0..plan.pages);
    if plan.begins == Begins::Touched {
        touch(&world.space, plan.pages);
    }
    let named = |node| node::name_locks(node, sim);
    world.nodes.iter().for_each(named);
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
    watch_births(sim, &world);
    let (of_oracle, mut oracle) = (Arc::clone(&world), Oracle::new(&world));
    // Whatever changes memory of the host or of a device counts in it.
    let changes = Arc::clone(world.kernel.generation());
    sim.oracle_counting(changes, move || oracle.look(&of_oracle));
    let closed = Arc::clone(&world);
    sim.oracle(When::AtEnd, move || {
        nothing_is_cached(&closed.nodes)?;
        nobody_watches(&closed)
    });
    if world.between.watch.is_on() {
        watch_meetings(sim, &world);
    }
    sim.spawn("conductor", move || conduct(&world));
}

/// When all VMs are closed nobody watches the process for them, and no device knows them.
fn nobody_watches(world: &World) -> Result<(), String> {
    let watched = world.between.watched.load(Ordering::Relaxed);
    if watched > 0 {
        return Err(format!(
            "leak: {watched} windows are watched for closed VMs"
        ));
    }
    let mut vms = world.nodes.iter().map(|node| &node.vm);
    vms.find(|vm| Arc::strong_count(vm) > 1)
        .map_or(Ok(()), |vm| {
            let asid = vm.asid();
            Err(format!("leak: somebody refers to the closed VM {asid}"))
        })
}

/// Before other oracles: what they find is to be explained.
fn watch_births(sim: &Sim, world: &Arc<World>) {
    if world.births.is_none() {
        return;
    }
    let world = Arc::clone(world);
    sim.oracle(When::EveryStep, move || {
        if let Some(births) = &world.births {
            births.look(&world);
        }
        Ok(())
    });
}

fn watch_meetings(sim: &Sim, world: &Arc<World>) {
    let (world, mut seen) = (Arc::clone(world), None);
    sim.oracle(When::EveryStep, move || {
        let moved = world.kernel.generation().load(Ordering::Relaxed);
        world.between.watch.visit(&mut seen, moved, |step| {
            world.kernel.look(|mm| coverage::note(mm, step));
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

/// Gives content to all pages: zeros.
fn touch(space: &ModelSpace<ModelEnv>, pages: u32) {
    for page in 0..pages {
        if let Err(signal) = space.store(address(page, 0), 0) {
            ModelEnv.fail(format!(
                "a store to the fresh page {page} answers {signal:?}"
            ));
        }
    }
}

impl World {
    fn new(plan: &'static Plan, watch: Watch) -> Self {
        let kernel = Kernel::new(Arc::new(ModelEnv), plan.shape());
        let space = ModelSpace::first(&kernel);
        let told = Arc::new(Told::default());
        let between = Arc::new(Between {
            watch,
            chaos: match plan.chaos {
                0 => Chaos::default(),
                _ => Chaos::drawn(),
            },
            moved: Moved::default(),
            watched: AtomicU64::new(0),
        });
        let shared = Shared {
            kernel: Arc::clone(&kernel),
            seams: Seams {
                env: Arc::new(ModelEnv),
                space: Arc::new(Space::new(Arc::clone(&space), Arc::clone(&between))),
                sink: Arc::clone(&told),
            },
            between: Arc::clone(&between),
            wires: Wires::of(&kernel),
        };
        let made = (0..plan.gpus).map(|n| node::make(plan, n, &shared));
        let (nodes, handlers) = made.unzip();
        Self {
            plan,
            nodes,
            handlers,
            kernel,
            space,
            told,
            between,
            births: ModelEnv.keeps_texts().then(Births::default),
            ledger: Mutex::default(),
            busy: AtomicU32::new(u32::from(plan.cpus + plan.gpus)),
            closed: AtomicBool::new(false),
        }
    }

    /// What may be read. Nobody gives way inside.
    pub(super) fn ledger<R>(&self, act: impl FnOnce(&mut Ledger) -> R) -> R {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.excuses = self.between.chaos.excuses() + self.kernel.refused();
        act(&mut ledger)
    }

    /// Words that were stored to.
    pub(super) fn used(&self) -> Vec<(u32, usize)> {
        let all = (0..self.plan.pages)
            .flat_map(|page| (0..self.plan.slots()).map(move |slot| (page, slot)));
        self.ledger(|ledger| {
            all.filter(|(page, slot)| ledger.is_used(*page, *slot))
                .collect()
        })
    }

    /// A word that holds versions.
    pub(super) fn any_slot(&self) -> usize {
        ModelEnv.choose(4) as usize % self.plan.slots()
    }

    /// Pages whose counters count.
    pub(super) fn counting(&self) -> Vec<u32> {
        let counts = |page: &u32| self.ledger(|ledger| ledger.counts(*page));
        (0..self.plan.pages).filter(counts).collect()
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
    world.kernel.refuse(0);
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
    let left = nothing_is_left(&world.kernel, &world.nodes, &world.told);
    world.must(left.map_err(|left| world.explain_left(&left)));
    world.must(world.told.agrees(world.between.moved.pages()));
    world.space.exit();
    world.must(host_is_empty(world));
    world.nodes.iter().for_each(|node| node.part());
}
