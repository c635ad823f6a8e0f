//! Scenarios on the model host: one world for each order of events that is tried.
//!
//! ```text
//!   main ── the lines, one after the other
//!   lane ── waits for a block; does one line of `together`, or what is to be done at a point
//!   worker ── collects dead ranges, where the scenario lets it
//! ```

mod calls;

use core::sync::atomic::{AtomicU32, Ordering};
use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::mutant::Mutant;
use gpusvm::seam::Seams;
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::mm::remap::Target;
use gpusvm_model::mm::{DeviceFolios, Privilege, Shape, Thp};
use gpusvm_model::sched::{Kind, Life, ModelEnv, Options, Outcome, Picker, Sim, Texts, When};
use gpusvm_softgpu::{Dispatch, GpuConfig, Planted, SmemAtomics, Stop, Tile};
use gpusvm_xe::stats::DeviceStats;
use gpusvm_xe::vm::NOTIFIER_BYTES;

use crate::machine::Folds;
use crate::notes::Notes;
use crate::on_tile::OnTile;
use crate::scenario::host::{self, Call, ChildDoes, ChildStep, Host, Refusal};
use crate::scenario::model::calls::{advice, errno, prot, signal};
use crate::scenario::play::{Play, locked};
use crate::scenario::text::{Act, Often, Scenario, Setup};
use crate::scenario::words::{Advice, Answers, Collector, Huge};
use crate::scenario::{HostKind, Verdict};
use crate::world::sink::{Timeouts, Told};
use crate::world::vram::{WORDS, Wires};
use crate::world::{Content, ModelPlatform, Node, NodeConfig, Service, oracle};

/// Bytes that scenarios map things in.
const LAND: u64 = 32 << 20;
const BASE: HostVa = HostVa::new(1 << 40);
/// Steps for which whoever comes to a point gives way there.
const GIVES_WAY: u32 = 4000;
/// Changes, a word or an entry each, between two looks at all entries.
const LOOKS_EVERY: u64 = 1 << 14;

/// Runs a scenario in as many orders of events as it says.
pub(super) fn run(scenario: &Scenario, mutant: Option<Mutant>) -> Verdict {
    gpusvm_model::sched::keep_panics_quiet();
    let scenario = Arc::new(scenario.clone());
    for seed in 0..scenario.setup(HostKind::Model).seeds {
        let outcome = play(&scenario, seed, mutant);
        if let Some(trouble) = outcome.trouble {
            let failure = &trouble.failure.text;
            return Verdict::Failed(format!("seed {seed}: {failure}"));
        }
    }
    Verdict::Passed
}

fn play(scenario: &Arc<Scenario>, seed: u64, mutant: Option<Mutant>) -> Outcome {
    let options = Options {
        scenario: Cow::Owned(format!("scenario {}", scenario.number)),
        seed,
        mutant: mutant.map(|mutant| mutant.name().to_owned()),
        safety_steps: 20_000_000,
        calm_steps: 1_000_000,
        texts: Texts::Dropped,
        ..Options::default()
    };
    let mut picker = match seed {
        0 => Picker::sticky(0, 50),
        seed => Picker::swarm(seed),
    };
    gpusvm_model::sched::run(&options, &mut picker, |sim| build(scenario, sim))
}

fn build(scenario: &Arc<Scenario>, sim: &Sim) {
    let setup = scenario.setup(HostKind::Model);
    let host = ModelHost::new(setup, scenario.width());
    let play = Arc::new(Play::new(host, Arc::clone(scenario)));
    if setup.collector == Collector::Runs {
        let devices: Vec<_> = play
            .host
            .nodes
            .iter()
            .map(|n| Arc::clone(&n.device))
            .collect();
        sim.worker("worker", move |work| {
            devices.iter().for_each(|device| device.work(work));
        });
    }
    for n in 0..play.host.lanes.len() {
        let play = Arc::clone(&play);
        sim.daemon(format!("lane{n}"), move || lane(&play, n));
    }
    let watched = Arc::clone(&play);
    let mut seen = 0;
    sim.oracle(When::EveryStep, move || watched.host.look(&mut seen));
    let hooked = Arc::clone(&play);
    sim.hook(move |point| hooked.host.at_point(point));
    sim.spawn("main", move || conduct(&play));
}

/// Does the lines, and leaves nothing behind.
fn conduct(play: &Arc<Play<ModelHost>>) {
    let host = &play.host;
    let ended = play.all().and_then(|()| {
        play.close();
        oracle::nothing_is_left(&host.kernel, &host.nodes, &host.told)
            .map_err(|left| format!("at the end: {left}"))
    });
    host.nodes.iter().for_each(Node::part);
    if let Err(what) = ended {
        ModelEnv.fail(what);
    }
}

/// A lane does what it is given, until the world is over.
fn lane(play: &Arc<Play<ModelHost>>, n: usize) {
    let lane = &play.host.lanes[n];
    loop {
        let seen = lane.given.load(Ordering::Acquire);
        if seen == 0 {
            if ModelEnv.idle(&lane.given, 0) == Life::Over {
                return;
            }
            continue;
        }
        let block = (seen - 1) as usize;
        let ended = match &play.scenario.lines[block].act {
            Act::Together(lines) => play.line(n + 1, block, &lines[n]),
            Act::At { lines, .. } => lines
                .iter()
                .try_for_each(|line| play.line(n + 1, block, line)),
            _ => Ok(()),
        };
        if let Err(what) = ended {
            ModelEnv.fail(what);
        }
        lane.given.store(0, Ordering::Release);
        Environment::wake(&ModelEnv, &lane.given);
    }
}

/// Somebody who does a block's lines: what he was given, as the line's number and one.
#[derive(Default)]
struct Lane {
    given: AtomicU32,
}

impl Lane {
    fn give(&self, index: usize) {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        self.given.store(index + 1, Ordering::Release);
        Environment::wake(&ModelEnv, &self.given);
    }

    fn is_busy(&self) -> bool {
        self.given.load(Ordering::Acquire) != 0
    }

    fn wait(&self) {
        loop {
            let seen = self.given.load(Ordering::Acquire);
            if seen == 0 {
                return;
            }
            Environment::wait(&ModelEnv, &self.given, seen);
        }
    }
}

/// What is to be done at a point.
#[derive(Clone, Copy)]
struct Armed {
    index: usize,
    point: Point,
    often: Often,
}

/// A process in memory, devices on it.
pub(super) struct ModelHost {
    kernel: Arc<Kernel<ModelEnv>>,
    space: Arc<ModelSpace<ModelEnv>>,
    nodes: Vec<Node>,
    told: Arc<Told>,
    folds: Arc<Folds>,
    wires: Wires,
    lanes: Vec<Lane>,
    armed: Mutex<Option<Armed>>,
    pins: Mutex<Vec<FrameId>>,
    kept: Mutex<Vec<Entry>>,
}

impl ModelHost {
    fn new(setup: &Setup, lanes: usize) -> Self {
        let kernel = Kernel::new(Arc::new(ModelEnv), shape(setup));
        let space = ModelSpace::first(&kernel);
        let told = Arc::new(Told::new(match setup.answers {
            Answers::Arrive => Timeouts::Forbidden,
            Answers::Lost => Timeouts::Expected,
        }));
        let counted = (Arc::new(DeviceStats::new(1)), None);
        let folds = Arc::new((counted, Notes::default()));
        let seams = Seams {
            env: Arc::new(ModelEnv),
            space: Arc::clone(&space),
            sink: Arc::new((Arc::clone(&told), Some(Arc::clone(&folds)))),
        };
        let wires = Wires::of(&kernel);
        let config = node_config(setup, lanes);
        let node = |n| Node::new(&config, n, &seams, &wires);
        Self {
            nodes: (0..setup.gpus).map(node).collect(),
            kernel,
            space,
            told,
            folds,
            wires,
            lanes: (0..lanes).map(|_| Lane::default()).collect(),
            armed: Mutex::default(),
            pins: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// What happens at a point, on whoever comes there: a lane does the block that was armed for it,
    /// and he gives way until it is done, or cannot go on without him.
    fn at_point(&self, point: Point) {
        let Some(first) = self.lanes.first().filter(|lane| !lane.is_busy()) else {
            return;
        };
        let mut armed = locked(&self.armed);
        let Some(found) = armed.filter(|armed| armed.point == point) else {
            return;
        };
        if found.often == Often::Once {
            *armed = None;
        }
        drop(armed);
        first.give(found.index);
        let mut left = GIVES_WAY;
        while left > 0 && first.is_busy() {
            ModelEnv.point(Kind::Spin);
            left -= 1;
        }
    }

    /// The rules that hold between any two steps; all entries are looked at now and then.
    fn look(&self, seen: &mut u64) -> Result<(), String> {
        oracle::trespasses(&self.kernel)?;
        let now = self.wires.changes.load(Ordering::Relaxed);
        if now < *seen + LOOKS_EVERY {
            return Ok(());
        }
        *seen = now;
        self.rules()
    }

    fn rules(&self) -> Result<(), String> {
        let pages = u32::try_from(LAND / PAGE).unwrap_or(0);
        oracle::look(&self.kernel, &self.nodes, 0..pages)
    }

    fn entries(&self, span: HostSpan) -> Vec<Entry> {
        let pages = (0..span.pages().get()).map(|n| span.start().plus(n * PAGE));
        pages.filter_map(|at| self.space.entry(at)).collect()
    }
}

fn child_step(child: &ModelSpace<ModelEnv>, step: &ChildStep) -> Result<(), String> {
    let ended = match &step.does {
        ChildDoes::Store(value) => child.store(step.at, *value),
        ChildDoes::Load(wanted) => child.load(step.at).map(|found| {
            if !wanted.is_empty() && !wanted.contains(&found) {
                ModelEnv.fail(format!("the child finds {found:#x} at {}", step.at));
            }
        }),
    };
    ended.map_err(|signal| format!("the child is refused {}: {signal}", step.at))
}

fn shape(setup: &Setup) -> Shape {
    let pages = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
    Shape {
        base: BASE,
        pages: pages(LAND),
        frames: pages(setup.memory),
        slots: 1024,
        processes: 2,
        pmd_order: 9,
        words: u32::try_from(WORDS).unwrap_or(2),
        thp: Thp::Madvise,
        device_folios: DeviceFolios::Small,
        coherent: 0,
        privilege: Privilege::Admin,
    }
}

fn node_config(setup: &Setup, lanes: usize) -> NodeConfig {
    NodeConfig {
        vram: usize::try_from(setup.vram / PAGE).unwrap_or(usize::MAX),
        content: Content::FewWords,
        gpu: GpuConfig {
            gts: 1,
            units_per_gt: u16::try_from(lanes + 1).unwrap_or(u16::MAX),
            tlb_entries: 64,
            fault_ring: 16,
            asids: u32::from(setup.gpus) + 1,
            tlb_timeout_ns: 250_000_000,
            smem_atomics: SmemAtomics::default(),
            planted: match setup.answers {
                Answers::Arrive => None,
                Answers::Lost => Some(Planted::LosesTlbAnswers),
            },
        },
        service: Service::Inline,
        window: setup.window.unwrap_or(NOTIFIER_BYTES),
        atomics: setup.atomics,
        rights: gpusvm_xe::vm::Rights::ReadWrite,
    }
}

impl Host for ModelHost {
    type Platform = ModelPlatform;

    const KIND: HostKind = HostKind::Model;

    fn land(&self) -> HostSpan {
        HostSpan::at(BASE, LAND)
    }

    fn node(&self, n: usize) -> Option<host::Node<'_, ModelPlatform>> {
        let node = self.nodes.get(n)?;
        Some(host::Node {
            gpu: &node.gpu,
            device: &node.device,
            vm: &node.vm,
        })
    }

    fn space(&self) -> &Arc<ModelSpace<ModelEnv>> {
        &self.space
    }

    fn told(&self) -> (&DeviceStats, &Notes) {
        (&self.folds.0.0, &self.folds.1)
    }

    fn call(&self, call: &Call) -> Result<(), Refusal> {
        let space = &self.space;
        let done = match *call {
            Call::Map(span, rights, backing, huge) => {
                let mapped = self.map(span, rights, backing);
                mapped.and_then(|()| match huge {
                    Huge::Yes => space.madvise(span.start(), span.bytes(), advice(Advice::Huge)),
                    Huge::No => Ok(()),
                })
            }
            Call::Unmap(span) => space.munmap(span.start(), span.bytes()),
            Call::Protect(span, rights) => space.mprotect(span.start(), span.bytes(), prot(rights)),
            Call::Advise(span, told) => space.madvise(span.start(), span.bytes(), advice(told)),
            Call::Move(span, to) => self.remap(span, Target::At(to)),
            Call::MoveLeaving(span, to) => self.remap(span, Target::LeaveBehindAt(to)),
            Call::Deed(deed, span) => return self.deed(deed, span),
            Call::FailCopy(n) => {
                self.wires.fails_in.store(n, Ordering::Relaxed);
                Ok(())
            }
            Call::Die => {
                space.exit();
                Ok(())
            }
        };
        done.map_err(errno)
    }

    fn load(&self, at: HostVa) -> Result<u64, Refusal> {
        self.space.load(at).map_err(signal)
    }

    fn store(&self, at: HostVa, value: u64) -> Result<(), Refusal> {
        self.space.store(at, value).map_err(signal)
    }

    fn atomic(&self, at: HostVa, op: AtomicOp) -> Result<(), Refusal> {
        self.space.atomic(at, op).map(drop).map_err(signal)
    }

    fn launch(
        &self,
        device: usize,
        unit: usize,
        act: &(dyn Fn(&mut Tile<'_>) + Sync),
    ) -> Result<(), Stop> {
        let node = self.nodes.get(device).ok_or(Stop::NoUnit)?;
        let kernel = OnTile(act);
        let dispatch = Dispatch::new(&kernel, 1, node.vm.asid());
        node.gpu.run(&dispatch, unit)
    }

    fn drive<R: Send>(&self, act: impl FnOnce() -> R + Send) -> R {
        act()
    }

    fn now(&self) -> Ns {
        Environment::now(&ModelEnv)
    }

    fn settle<T: Send>(
        &self,
        look: impl Fn() -> T + Send + Sync,
        _right: impl Fn(&T) -> bool + Send + Sync,
    ) -> T {
        look()
    }

    fn sleep(&self, time: Ns) {
        ModelEnv.sleep_until(self.now().after(time));
    }

    fn fork(&self, steps: &[ChildStep]) -> Result<(), String> {
        let child = self.space.fork().map_err(|why| format!("fork: {why}"))?;
        let ended = steps.iter().try_for_each(|step| child_step(&child, step));
        child.exit();
        ended
    }

    fn together(play: &Arc<Play<Self>>, index: usize) -> Result<(), String> {
        let Act::Together(lines) = &play.scenario.lines[index].act else {
            return Err("only `together` does lines together".to_owned());
        };
        let lanes = &play.host.lanes[..lines.len()];
        lanes.iter().for_each(|lane| lane.give(index));
        lanes.iter().for_each(Lane::wait);
        Ok(())
    }

    fn arm(&self, index: usize, point: Point, often: Often) -> Result<(), String> {
        *locked(&self.armed) = Some(Armed {
            index,
            point,
            often,
        });
        Ok(())
    }

    fn disarm(play: &Arc<Play<Self>>) -> Result<(), String> {
        if let Some(first) = play.host.lanes.first() {
            first.wait();
        }
        match locked(&play.host.armed).take() {
            Some(Armed {
                often: Often::Once, ..
            }) => Err("nobody came to the point at which something was to be done".to_owned()),
            Some(_) | None => Ok(()),
        }
    }

    fn keep(&self) {
        let entries = self.entries(self.land());
        *locked(&self.kept) = entries;
    }

    fn kept(&self, span: HostSpan) -> Result<(), String> {
        let first = (span.start().get() - BASE.get()) / PAGE;
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let kept = locked(&self.kept);
        for (n, now) in self.entries(span).into_iter().enumerate() {
            let then = kept.get(first + n).copied().unwrap_or(Entry::None);
            if then != now {
                return Err(format!("page {n} of the span was {then:?}, is {now:?}"));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        self.rules()
    }
}
