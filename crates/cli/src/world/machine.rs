//! [`Machine`]: a process and a device in a world, for a program that is one actor and launches kernels. The
//! device's units are actors too.
//!
//! ```text
//!   program ── launch ──▶ unit0, unit1, ... ── fault ──▶ driver (on the unit, or the actor `service`)
//!      ◀── each group that begins, each unit that ends ──┘
//! ```

use core::ops::ControlFlow;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gpusvm::addr::HostSpan;
use gpusvm::error::Failed;
use gpusvm::seam::Seams;
use gpusvm::seam::env::Environment;
use gpusvm_abi::bus::{DevicePort, FaultHandler};
use gpusvm_model::kernel::{Kernel as Host, ModelSpace};
use gpusvm_model::mm::Shape;
use gpusvm_model::sched::{Kind, Life, ModelEnv, Sim};
use gpusvm_softgpu::{Dispatch, Kernel, Stop, Tile};
use gpusvm_xe::vm::{MirrorArea, Rights};

use crate::machine::Folds;
use crate::workload::Storm;
use crate::world::sink::Told;
use crate::world::vram::Wires;
use crate::world::{Node, NodeConfig, Service, oracle};

/// A process and a device that mirrors it.
pub(crate) struct Machine {
    host: Arc<Host<ModelEnv>>,
    space: Arc<ModelSpace<ModelEnv>>,
    node: Node,
    told: Arc<Told>,
    /// What units do, or did last.
    launch: Mutex<Option<Arc<Launch>>>,
    /// How many there were.
    launches: AtomicU32,
    units: u32,
    /// What moves pages meanwhile.
    storm: Mutex<Option<Storm>>,
    /// Changes with each storm that begins.
    storms: AtomicU32,
    /// How often the storm moved pages.
    gusts: AtomicU64,
    /// No fault will come any more.
    closed: AtomicBool,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes a machine in the world of `sim`, with its actors. Events go to `folds`, too.
    pub(crate) fn build(
        sim: &Sim,
        shape: Shape,
        config: &NodeConfig,
        folds: Arc<Folds>,
    ) -> Arc<Self> {
        let host = Host::new(Arc::new(ModelEnv), shape);
        let space = ModelSpace::first(&host);
        let told = Arc::new(Told::default());
        let seams = Seams {
            env: Arc::new(ModelEnv),
            space: Arc::clone(&space),
            sink: Arc::new((Arc::clone(&told), Some(folds))),
        };
        let wires = Wires::of(&host);
        let machine = Arc::new(Self {
            node: Node::new(config, 0, &seams, &wires),
            host,
            space,
            told,
            launch: Mutex::default(),
            launches: AtomicU32::new(0),
            units: config.gpu.units_per_gt.into(),
            storm: Mutex::default(),
            storms: AtomicU32::new(0),
            gusts: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        });
        machine.spawn(sim, config.service);
        machine
    }

    fn spawn(self: &Arc<Self>, sim: &Sim, service: Service) {
        for n in 0..self.units {
            let machine = Arc::clone(self);
            sim.daemon(format!("unit{n}"), move || machine.unit(n));
        }
        let machine = Arc::clone(self);
        sim.daemon("storm", move || machine.rage());
        if service == Service::Queue {
            let machine = Arc::clone(self);
            sim.spawn("service", move || machine.serve());
        }
        let driver = Arc::clone(&self.node.device);
        sim.worker("worker", move |work| driver.work(work));
    }

    /// The process.
    pub(crate) const fn space(&self) -> &Arc<ModelSpace<ModelEnv>> {
        &self.space
    }

    /// Has all units run `groups` groups of `kernel`. Whoever calls waits for them before the next launch.
    pub(crate) fn begin(&self, kernel: Arc<dyn Kernel + Send>, groups: u32) -> Arc<Launch> {
        let launch = Arc::new(Launch::new(kernel, groups));
        *locked(&self.launch) = Some(Arc::clone(&launch));
        self.launches.fetch_add(1, Ordering::AcqRel);
        Environment::wake(&ModelEnv, &self.launches);
        launch
    }

    /// Waits for the units. `watch` is told how many groups were begun, whenever that has changed, and may
    /// call the launch off.
    ///
    /// # Errors
    /// The first [`Stop`] of any unit.
    pub(crate) fn wait(
        &self,
        launch: &Launch,
        watch: &dyn Fn(u32) -> ControlFlow<()>,
    ) -> Result<(), Stop> {
        loop {
            let seen = launch.news.load(Ordering::Acquire);
            if watch(launch.begun()).is_break() {
                launch.stop(Stop::Cancelled);
            }
            if self.is_over(launch) {
                break;
            }
            Environment::wait(&ModelEnv, &launch.news, seen);
        }
        let stopped = locked(&launch.stopped).take();
        stopped.map_or(Ok(()), Err)
    }

    /// Whether all units have ended.
    pub(crate) fn is_over(&self, launch: &Launch) -> bool {
        launch.ended.load(Ordering::Acquire) == self.units
    }

    /// Lets the device read `span`, whose mappings may be read-only.
    ///
    /// # Errors
    /// The driver's, where ranges are live in the span.
    pub(crate) fn mirror_read_only(&self, span: HostSpan) -> Result<(), Failed> {
        self.node.vm.mirror(MirrorArea {
            span,
            rights: Rights::ReadOnly,
        })
    }

    /// Evicts everything that can be evicted from the device.
    pub(crate) fn evict_all(&self) {
        let _evicted = self.node.device.pagemap().vram().evict_all();
    }

    /// From now on an actor moves pages.
    pub(crate) fn begin_storm(&self, storm: Storm) {
        *locked(&self.storm) = Some(storm);
        self.gusts.store(0, Ordering::Relaxed);
        self.storms.fetch_add(1, Ordering::AcqRel);
        Environment::wake(&ModelEnv, &self.storms);
    }

    /// No more; returns how often it did.
    pub(crate) fn end_storm(&self) -> u64 {
        *locked(&self.storm) = None;
        self.gusts.load(Ordering::Relaxed)
    }

    /// What the storm's actor does, until the world is over.
    fn rage(&self) {
        loop {
            let seen = self.storms.load(Ordering::Acquire);
            let storm = *locked(&self.storm);
            if let Some(storm) = storm {
                let n = self.gusts.fetch_add(1, Ordering::Relaxed);
                storm.gust(self.node.device.pagemap(), n);
                ModelEnv.point(Kind::Other);
            } else if ModelEnv.idle(&self.storms, seen) == Life::Over {
                return;
            }
        }
    }

    /// Brings all data home and ends what serves the device. Before, device and process must agree; after,
    /// nothing may be left.
    ///
    /// # Errors
    /// Which rule is broken.
    pub(crate) fn close(&self) -> Result<(), String> {
        let node = core::slice::from_ref(&self.node);
        let pages = self.host.look(|mm| mm.shape().pages);
        let agreed = oracle::look(&self.host, node, 0..pages);
        self.node.vm.close();
        self.evict_all();
        self.closed.store(true, Ordering::Release);
        self.node.gpu.kick_service();
        let left = oracle::nothing_is_left(&self.host, node, &self.told);
        self.node.part();
        agreed.and(left.map_err(|left| left.to_string()))
    }

    /// What a unit does, until the world is over.
    fn unit(&self, n: u32) {
        let mut done = 0;
        loop {
            let seen = self.launches.load(Ordering::Acquire);
            if seen != done {
                done = seen;
                self.play(n);
            } else if ModelEnv.idle(&self.launches, seen) == Life::Over {
                return;
            }
        }
    }

    /// The part of unit `n` in the last launch.
    fn play(&self, n: u32) {
        let Some(launch) = locked(&self.launch).clone() else {
            return;
        };
        let share = Share(&launch);
        let dispatch = Dispatch::new(&share, 1, self.node.vm.asid());
        let unit = usize::try_from(n).unwrap_or(usize::MAX);
        if let Err(stop) = self.node.gpu.run(&dispatch, unit) {
            launch.stop(stop);
        }
        launch.ended.fetch_add(1, Ordering::AcqRel);
        launch.tell();
    }

    /// Serves faults out of the ring, until the machine is closed.
    fn serve(&self) {
        while !self.closed.load(Ordering::Acquire) {
            self.node.gpu.wait_fault();
            while let Some(record) = self.node.gpu.pop_fault() {
                let answer = self.node.device.handle(&record);
                self.node.gpu.ack_fault(&record, answer);
            }
        }
    }
}

/// One launch of a kernel: what its units share.
pub(crate) struct Launch {
    kernel: Arc<dyn Kernel + Send>,
    groups: u32,
    /// The next group.
    next: AtomicU32,
    /// Units that have ended.
    ended: AtomicU32,
    /// Grows with each group that begins and each unit that ends.
    news: AtomicU32,
    /// Why no further group begins.
    stopped: Mutex<Option<Stop>>,
}

impl Launch {
    fn new(kernel: Arc<dyn Kernel + Send>, groups: u32) -> Self {
        Self {
            kernel,
            groups,
            next: AtomicU32::new(0),
            ended: AtomicU32::new(0),
            news: AtomicU32::new(0),
            stopped: Mutex::default(),
        }
    }

    /// The first reason holds.
    fn stop(&self, why: Stop) {
        locked(&self.stopped).get_or_insert(why);
    }

    fn begun(&self) -> u32 {
        self.next.load(Ordering::Relaxed).min(self.groups)
    }

    fn take(&self) -> Option<u32> {
        if locked(&self.stopped).is_some() {
            return None;
        }
        let group = self.next.fetch_add(1, Ordering::Relaxed);
        (group < self.groups).then_some(group)
    }

    fn tell(&self) {
        self.news.fetch_add(1, Ordering::AcqRel);
        Environment::wake(&ModelEnv, &self.news);
    }
}

/// One unit's share of a launch, as a kernel of one group: groups, for as long as there are some.
struct Share<'a>(&'a Launch);

impl Kernel for Share<'_> {
    fn run(&self, _whole: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        while let Some(group) = self.0.take() {
            self.0.tell();
            self.0.kernel.run(group, tile)?;
            ModelEnv.point(Kind::Other);
        }
        Ok(())
    }
}

/// Never contended: no actor gives way inside.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
