//! Bugs that `gpusvm explore` found and that are gone: each in the smallest world that has it, two
//! actors on the model host with the framework's own pagemap, in every order with few preemptions.
//! Tapes end with the code that they were recorded on; these last.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE, VramSpan};
use gpusvm::error::Failed;
use gpusvm::pagemap::{Pagemap, ToDevice};
use gpusvm::seam::copy::{CopyEngine, CopyMove, CopyWith};
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::mm::{Access, PagemapId};
use gpusvm::seam::{Platform, Seams};
use gpusvm::vram::Manager;
use gpusvm_abi::bus::SystemBus;
use gpusvm_model::kernel::bus::Bus;
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::Shape;
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::sched::{Explorer, Kind, ModelEnv, Options, Picker, Points, Sim, When};

const DONTNEED: i32 = 4;
const HUGEPAGE: i32 = 14;
/// Pages of device memory.
const VRAM: usize = 2;
/// Bytes of it.
const VRAM_BYTES: u64 = 2 * PAGE;

#[derive(Debug)]
struct TestPlatform;

impl Platform for TestPlatform {
    type Env = ModelEnv;
    type Space = ModelSpace<ModelEnv>;
    type Copy = Words;
    type Sink = ();
}

/// Copies the first word of every page.
struct Words {
    vram: Mutex<[u64; VRAM]>,
    bus: Bus<ModelEnv>,
}

impl Words {
    /// Never contended: no actor gives way inside.
    fn with<R>(&self, act: impl FnOnce(&mut u64) -> R, page: u64) -> R {
        let mut vram = self.vram.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut vram[usize::try_from(page).expect("small")])
    }

    fn page(&self, page: u64, with: CopyWith, bytes: u64) -> Result<(), Failed> {
        let failed = |_refused| Failed::Copy;
        match with {
            CopyWith::From(at) => {
                let mut word = [0; 8];
                let read = self.bus.read(at.get() + bytes, &mut word);
                self.with(|there| *there = u64::from_ne_bytes(word), page);
                read.map_err(failed)
            }
            CopyWith::To(at) => {
                let word = self.with(|there| there.to_ne_bytes(), page);
                self.bus.write(at.get() + bytes, &word).map_err(failed)
            }
            CopyWith::Hole => {
                self.with(|there| *there = 0, page);
                Ok(())
            }
        }
    }
}

impl CopyEngine for Words {
    fn run(&self, moves: &[CopyMove]) -> Result<(), Failed> {
        for step in moves {
            for n in 0..step.vram.pages().get() {
                let page = step.vram.start().get() / PAGE + n;
                self.page(page, step.with, n * PAGE)?;
            }
        }
        Ok(())
    }

    fn adopt(&self, _vram: VramSpan) -> Option<HostSpan> {
        None
    }

    fn surrender(&self, _vram: VramSpan) -> Option<HostSpan> {
        None
    }
}

/// A process with eight pages, and a device memory.
#[derive(Clone)]
struct Bench {
    kernel: Arc<Kernel<ModelEnv>>,
    space: Arc<ModelSpace<ModelEnv>>,
    pagemap: Arc<Pagemap<TestPlatform>>,
    /// Actors that are not done.
    busy: Arc<AtomicU32>,
}

impl Bench {
    fn new() -> Self {
        Self::of(Shape::default())
    }

    fn of(shape: Shape) -> Self {
        let kernel = Kernel::new(Arc::new(ModelEnv), shape);
        let space = ModelSpace::first(&kernel);
        let copy = Arc::new(Words {
            vram: Mutex::default(),
            bus: Bus::new(Arc::clone(&kernel)),
        });
        let vram = Arc::new(Manager::new(Arc::new(ModelEnv), VRAM_BYTES));
        let seams = Seams {
            env: Arc::new(ModelEnv),
            space: Arc::clone(&space),
            sink: Arc::new(()),
        };
        let bench = Self {
            pagemap: Pagemap::new(seams, PagemapId(1), copy, vram),
            kernel,
            space,
            busy: Arc::default(),
        };
        bench.map();
        bench
    }

    fn map(&self) {
        let map = Map {
            place: Place::Fixed(at(0)),
            len: 8 * PAGE,
            prot: Prot::READ.with(Prot::WRITE),
            what: What::Private,
            extra: VmFlags::NONE,
        };
        self.space.mmap(&map).expect("nothing is there");
    }

    /// Both pages to the device, as far as they go.
    fn send(&self, page: u32) {
        let wish = ToDevice {
            span: HostSpan::at(at(page), VRAM_BYTES),
            timeslice: Ns(0),
        };
        let _moved = self.pagemap.to_device(wish);
    }

    fn store(&self, page: u32, value: u64) {
        self.space.store(at(page), value).expect("writable");
    }

    fn is_device(&self, page: u32) -> bool {
        matches!(self.space.entry(at(page)), Some(Entry::DevicePrivate(..)))
    }

    /// Makes an actor, and checks the state between any two steps.
    fn actor(&self, sim: &Sim, name: &'static str, body: impl FnOnce(&Self) + 'static) {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let bench = self.clone();
        sim.spawn(name, move || {
            body(&bench);
            bench.busy.fetch_sub(1, Ordering::Relaxed);
            ModelEnv.wake(&bench.busy);
        });
    }

    /// When both are done, `rule` holds, and after an eviction nothing is left.
    fn afterwards(&self, sim: &Sim, rule: impl FnOnce(&Self) + 'static) {
        let bench = self.clone();
        sim.spawn("afterwards", move || {
            loop {
                let busy = bench.busy.load(Ordering::Relaxed);
                if busy == 0 {
                    break;
                }
                ModelEnv.wait(&bench.busy, busy);
            }
            rule(&bench);
            let _evicted = bench.pagemap.vram().evict_all();
            assert_eq!(bench.pagemap.vram().used(), 0, "device memory is free");
            bench.kernel.check_quiet().expect("the state makes sense");
        });
        let kernel = Arc::clone(&self.kernel);
        sim.oracle(When::EveryStep, move || {
            if kernel.is_mapping() {
                return Ok(());
            }
            kernel.check().map_err(|broken| broken.to_string())
        });
    }
}

fn at(page: u32) -> HostVa {
    Shape::default().address(page)
}

/// Runs every world with at most `preemptions_max` preemptions.
fn exhaust(preemptions_max: u32, build: impl Fn(&Sim) + Sync) {
    let explorer = Explorer {
        // Who has given something back soon takes something else: one switch point is enough.
        options: Options {
            points: Points::ALL.without(&[Kind::Unlock, Kind::Wake]),
            ..Options::default()
        },
        picker: Picker::swarm,
        threads: 1,
        build,
    };
    let summary = explorer.run_all(preemptions_max, 100_000);
    assert!(summary.failure.is_none(), "{summary}");
    assert!(summary.worlds < 100_000, "all of them were run: {summary}");
}

#[test]
fn pages_that_moved_alone_make_room() {
    let alone = Arc::new(AtomicU32::new(0));
    exhaust(1, |sim| {
        let bench = Bench::new();
        bench.actor(sim, "sender", |bench| bench.send(0));
        bench.actor(sim, "cpu", |bench| bench.store(0, 7));
        let alone = Arc::clone(&alone);
        bench.afterwards(sim, move |bench| {
            let one = bench.is_device(1) && !bench.is_device(0);
            alone.fetch_add(u32::from(one), Ordering::Relaxed);
            bench.send(4);
            assert!(bench.is_device(4), "there is no room for pages 4 and 5");
            assert_eq!(bench.space.load(at(0)), Ok(7));
        });
    });
    let alone = alone.load(Ordering::Relaxed);
    assert!(alone > 0, "in no world has page 1 moved without page 0");
}

#[test]
fn pages_that_are_freed_on_their_way_home_stay_free() {
    exhaust(1, |sim| {
        let bench = Bench::new();
        bench.store(0, 1);
        bench.send(0);
        bench.actor(sim, "evictor", |bench| {
            let _evicted = bench.pagemap.vram().evict_all();
        });
        bench.actor(sim, "cpu", |bench| {
            bench.space.munmap(at(0), 2 * PAGE).expect("mapped");
        });
        bench.afterwards(sim, |_| ());
    });
}

#[test]
fn page_for_a_hole_is_freed_once() {
    exhaust(1, |sim| {
        let bench = Bench::new();
        bench.actor(sim, "sender", |bench| bench.send(0));
        bench.actor(sim, "cpu", |bench| {
            assert_eq!(bench.space.load(at(0)), Ok(0));
        });
        // Freed twice, it would be handed out twice.
        bench.afterwards(sim, |bench| bench.send(4));
    });
}

#[test]
fn number_of_a_process_that_is_ending_is_taken() {
    exhaust(2, |sim| {
        let bench = Bench::new();
        bench.store(0, 1);
        let first = bench.space.fork().expect("room for one");
        bench.actor(sim, "child", move |_| first.exit());
        bench.actor(sim, "parent", |bench| {
            if let Ok(second) = bench.space.fork() {
                assert_eq!(second.load(at(0)), Ok(1), "it has what its parent has");
                second.exit();
            }
        });
        bench.afterwards(sim, |_| ());
    });
}

#[test]
fn number_of_a_process_that_ends_with_no_mapping_is_taken() {
    exhaust(1, |sim| {
        let bench = Bench::new();
        bench.store(0, 1);
        let first = bench.space.fork().expect("room for one");
        first.munmap(at(0), 8 * PAGE).expect("mapped");
        bench.actor(sim, "child", move |_| first.exit());
        let second = Rc::new(OnceCell::new());
        let born = Rc::clone(&second);
        bench.actor(sim, "parent", move |bench| {
            born.set(bench.space.fork()).expect("once");
        });
        bench.afterwards(sim, move |_| {
            if let Some(Ok(second)) = second.get() {
                assert_eq!(second.load(at(0)), Ok(1), "it has what its parent has");
            }
        });
    });
}

#[test]
fn processes_that_fork_at_the_same_time_have_a_child_each() {
    exhaust(1, |sim| {
        let bench = Bench::of(Shape {
            processes: 4,
            ..Shape::default()
        });
        let other = bench.space.fork().expect("room for three");
        bench.store(0, 1);
        other.store(at(0), 2).expect("writable");
        let fork = |space: &ModelSpace<ModelEnv>, value| {
            let child = space.fork().expect("room for all");
            assert_eq!(child.load(at(0)), Ok(value), "it has what its parent has");
        };
        bench.actor(sim, "parent", move |bench| fork(&bench.space, 1));
        bench.actor(sim, "child", move |_| fork(&other, 2));
        bench.afterwards(sim, |_| ());
    });
}

#[test]
fn discarding_a_part_of_a_block_that_came_late_keeps_the_rest() {
    exhaust(1, |sim| {
        let bench = Bench::new();
        bench
            .space
            .madvise(at(0), 8 * PAGE, HUGEPAGE)
            .expect("anonymous");
        bench.actor(sim, "discarder", |bench| {
            bench
                .space
                .madvise(at(1), PAGE, DONTNEED)
                .expect("anonymous");
        });
        bench.actor(sim, "cpu", |bench| bench.store(0, 7));
        bench.afterwards(sim, |bench| {
            assert_eq!(bench.space.load(at(0)), Ok(7));
        });
    });
}

#[test]
fn page_that_is_pinned_under_reclaim_stays() {
    exhaust(2, |sim| {
        let bench = Bench::new();
        bench.store(0, 1);
        bench.actor(sim, "reclaim", |bench| {
            let _out = bench.space.reclaim(at(0));
        });
        bench.actor(sim, "cpu", |bench| {
            let frame = bench.space.pin(at(0), Access::Write).expect("writable");
            let entry = bench.space.entry(at(0)).and_then(Entry::mapped_frame);
            assert_eq!(
                entry,
                Some(frame),
                "who pinned it sees what is written to it"
            );
            bench.space.unpin(frame);
        });
        bench.afterwards(sim, |_| ());
    });
}
