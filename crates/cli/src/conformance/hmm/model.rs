//! The model host: a case is an actor of a world, threads and pagers are others.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{Access, PagemapId};
use gpusvm_abi::bus::{SystemBus, VramStore};
use gpusvm_dmirror::uapi::{Arguments, Command, Errno, UserMemory};
use gpusvm_dmirror::{Device, DeviceConfig, Kind, Mirror};
use gpusvm_model::kernel::bus::Bus;
use gpusvm_model::kernel::{Kernel, ModelSpace};
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{Map, Place, What};
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::mm::remap::{Remap, Target};
use gpusvm_model::mm::{DeviceFolios, Shape, Thp};
use gpusvm_model::sched::{Kind as Switch, ModelEnv, Options, Picker, Sim, run as run_world};

use crate::conformance::hmm::bench::{Plan, Trouble, wrong};
use crate::conformance::hmm::host::{
    Advice, Child, ChildWork, Held, Leaves, Memory, Node, Process, Rights, Variant,
};
use crate::conformance::hmm::memory::{DEVICE_PAGES, OnBus, Private, WORDS};

/// Pages of a block.
const BLOCK: u32 = 512;
const HUGEPAGE: i32 = 14;
const FREE: i32 = 8;
const POPULATE_READ: i32 = 22;
const COLLAPSE: i32 = 25;

type Space = ModelSpace<ModelEnv>;

/// Runs a case in a world of its own.
pub(super) fn run(plan: Plan) -> Result<Vec<String>, Trouble> {
    let result = Arc::new(Mutex::new(None));
    let place = Arc::clone(&result);
    let outcome = run_world(&options(), &mut Picker::uniform(1), |sim| {
        let sim = *sim;
        sim.spawn("case", move || {
            let machine = Machine::new(plan.variant, sim);
            let played = plan.play(&machine.process());
            let checked = played.and_then(|record| machine.check().map(|()| record));
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(checked);
        });
    });
    if let Some(trouble) = outcome.trouble {
        return wrong(trouble.failure.to_string());
    }
    let mut result = result.lock().unwrap_or_else(PoisonError::into_inner);
    result
        .take()
        .unwrap_or_else(|| wrong("the case has no end"))
}

/// A case ends by itself.
fn options() -> Options {
    Options {
        scenario: "hmm".into(),
        safety_steps: u64::MAX / 4,
        calm_steps: u64::MAX / 4,
        stack_bytes: 1 << 20,
        ..Options::default()
    }
}

/// A machine with four devices.
struct Machine {
    kernel: Arc<Kernel<ModelEnv>>,
    devices: Arc<Vec<Arc<Device<ModelEnv, Space>>>>,
    sim: Sim,
}

impl Machine {
    fn new(variant: Variant, sim: Sim) -> Self {
        let coherent = match variant {
            Variant::Private => 0,
            Variant::Coherent => 2 * DEVICE_PAGES,
        };
        let shape = Shape {
            pages: 4 * DEVICE_PAGES,
            frames: DEVICE_PAGES + DEVICE_PAGES / 4,
            slots: 0,
            processes: 2,
            pmd_order: 9,
            words: u32::try_from(WORDS).unwrap_or(0),
            thp: Thp::Madvise,
            device_folios: DeviceFolios::Large,
            coherent,
            ..Shape::default()
        };
        let first = gpusvm_model::kernel::bus::address_of(FrameId(shape.frames));
        let kernel = Kernel::new(Arc::new(ModelEnv), shape);
        let bus: Arc<dyn SystemBus> = Arc::new(Bus::new(Arc::clone(&kernel)));
        let nodes = if coherent > 0 { 4 } else { 2 };
        let device = |n: u32| {
            let bytes = u64::from(DEVICE_PAGES) * PAGE;
            let (kind, vram): (_, Arc<dyn VramStore>) = if n < 2 {
                (Kind::Private, Arc::new(Private::new(Arc::clone(&bus))))
            } else {
                let first = first.plus(u64::from(n - 2) * bytes);
                let memory = OnBus::new(Arc::clone(&bus), first, bytes);
                (Kind::Coherent(first), Arc::new(memory))
            };
            Device::new(DeviceConfig {
                env: Arc::new(ModelEnv),
                id: PagemapId(n + 1),
                kind,
                vram,
                bus: Arc::clone(&bus),
            })
        };
        Self {
            devices: Arc::new((0..nodes).map(device).collect()),
            kernel,
            sim,
        }
    }

    fn process(&self) -> ModelProcess {
        ModelProcess {
            space: ModelSpace::first(&self.kernel),
            devices: Arc::clone(&self.devices),
            sim: self.sim,
        }
    }

    /// The machine's own rules hold when a case is over.
    fn check(&self) -> Result<(), Trouble> {
        if let Err(broken) = self.kernel.check_quiet() {
            return wrong(format!("the machine is in disorder: {broken}"));
        }
        match self.kernel.violations().first() {
            Some(violation) => wrong(violation.to_string()),
            None => Ok(()),
        }
    }
}

/// A process of the model.
#[derive(Clone)]
struct ModelProcess {
    space: Arc<Space>,
    devices: Arc<Vec<Arc<Device<ModelEnv, Space>>>>,
    sim: Sim,
}

fn refused(what: &str, why: impl std::fmt::Display) -> Trouble {
    Trouble::Wrong(format!("{what}: {why}"))
}

fn prot(rights: Rights) -> Prot {
    match rights {
        Rights::None => Prot::NONE,
        Rights::Read => Prot::READ,
        Rights::ReadWrite => Prot::READ.with(Prot::WRITE),
    }
}

impl ModelProcess {
    fn file(&self, bytes: u64) -> gpusvm_model::mm::file::FileId {
        let pages = u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
        self.space.create_file(pages)
    }

    fn what(&self, memory: Memory, bytes: u64) -> What {
        match memory {
            Memory::Private | Memory::Large => What::Private,
            Memory::Shared => What::Shared,
            Memory::SharedFile => What::SharedFile(self.file(bytes), 0),
            Memory::PrivateFile | Memory::Device => What::PrivateFile(self.file(bytes), 0),
            Memory::HugePages => What::Hugetlb,
        }
    }
}

impl Process for ModelProcess {
    fn map(&self, memory: Memory, bytes: u64, rights: Rights) -> Result<HostSpan, Trouble> {
        let at = self.room(bytes)?;
        let map = Map {
            place: Place::Fixed(at),
            len: bytes,
            prot: prot(rights),
            what: self.what(memory, bytes),
            extra: VmFlags::NONE,
        };
        let at = self.space.mmap(&map).map_err(|why| refused("mmap", why))?;
        let advice = match memory {
            Memory::Large => Some(HUGEPAGE),
            // The device's mapping comes with its pages.
            Memory::Device => Some(POPULATE_READ),
            Memory::Private
            | Memory::Shared
            | Memory::SharedFile
            | Memory::PrivateFile
            | Memory::HugePages => None,
        };
        if let Some(advice) = advice {
            let advised = self.space.madvise(at, bytes, advice);
            advised.map_err(|why| refused("madvise", why))?;
        }
        Ok(HostSpan::at(at, bytes))
    }

    fn unmap(&self, span: HostSpan) -> Result<(), Trouble> {
        let done = self.space.munmap(span.start(), span.bytes());
        done.map_err(|why| refused("munmap", why))
    }

    fn protect(&self, span: HostSpan, rights: Rights) -> Result<(), Trouble> {
        let done = self
            .space
            .mprotect(span.start(), span.bytes(), prot(rights));
        done.map_err(|why| refused("mprotect", why))
    }

    fn advise(&self, span: HostSpan, advice: Advice) -> Result<(), Trouble> {
        let number = match advice {
            Advice::Free => FREE,
            Advice::Collapse => COLLAPSE,
        };
        let done = self.space.madvise(span.start(), span.bytes(), number);
        done.map_err(|why| refused("madvise", why))
    }

    fn room(&self, bytes: u64) -> Result<HostVa, Trouble> {
        let pages = u32::try_from(bytes.div_ceil(PAGE)).unwrap_or(u32::MAX);
        let pages = pages.next_multiple_of(BLOCK);
        let found = self.space.kernel().look(|mm| {
            let vmas = &mm.process(self.space.pid()).vmas;
            let mut starts = (0..mm.shape().pages).step_by(BLOCK as usize);
            let free = |start: &u32| {
                let span = gpusvm_model::mm::Pages::new(*start, start.saturating_add(pages));
                span.end <= mm.shape().pages && vmas.overlapping(span).next().is_none()
            };
            starts.find(free).map(|start| mm.shape().address(start))
        });
        found.ok_or_else(|| refused("mmap", "no room"))
    }

    fn relocate(&self, from: HostSpan, to: HostVa, leaves: Leaves) -> Result<(), Trouble> {
        let moved = self.space.mremap(&Remap {
            at: from.start(),
            old_len: from.bytes(),
            new_len: from.bytes(),
            target: match leaves {
                Leaves::Hole => Target::At(to),
                Leaves::Mapping => Target::LeaveBehindAt(to),
            },
        });
        moved.map(|_at| ()).map_err(|why| refused("mremap", why))
    }

    fn load(&self, at: HostVa) -> Result<u64, Trouble> {
        self.space
            .load(at)
            .map_err(|signal| refused("a load", signal))
    }

    fn store(&self, at: HostVa, value: u64) -> Result<(), Trouble> {
        let done = self.space.store(at, value);
        done.map_err(|signal| refused("a store", signal))
    }

    fn pagemap(&self, at: HostVa) -> Result<u64, Trouble> {
        Ok(self.space.pagemap(at))
    }

    fn open(&self, node: usize) -> Result<Box<dyn Node>, Trouble> {
        let device = self
            .devices
            .get(node)
            .ok_or_else(|| Trouble::Lacking(format!("there is no device {node}")))?;
        let mirror = Mirror::open(device, &self.space);
        Ok(Box::new(ModelNode(
            mirror.map_err(|why| refused("open", why))?,
        )))
    }

    fn fork(&self, work: ChildWork) -> Result<Box<dyn Child>, Trouble> {
        let space = self.space.fork().map_err(|why| refused("fork", why))?;
        Ok(Box::new(ModelChild {
            process: Self {
                space,
                ..self.clone()
            },
            work,
        }))
    }

    fn unmap_beside(&self, span: HostSpan) -> Result<Box<dyn Held>, Trouble> {
        let done = Arc::new(AtomicU32::new(0));
        let (space, told) = (Arc::clone(&self.space), Arc::clone(&done));
        self.sim.spawn("unmapper", move || {
            // At any moment of a read, which takes thousands of steps.
            for _step in 0..ModelEnv.choose(4096) {
                ModelEnv.point(Switch::Other);
            }
            let _unmapped = space.munmap(span.start(), span.bytes());
            told.store(1, Ordering::Release);
            Environment::wake(&ModelEnv, &told);
        });
        Ok(Box::new(Beside(done)))
    }

    fn serve_missing(&self, span: HostSpan, word: u64) -> Result<Box<dyn Held>, Trouble> {
        let served = self.space.serve_missing(span);
        served.map_err(|why| refused("userfaultfd", why))?;
        let space = Arc::clone(&self.space);
        let pages = span.pages().get();
        self.sim.spawn("pager", move || {
            for _page in 0..pages {
                let at = space.next_fault();
                // Refused where the page has come meanwhile.
                let _filled = space.fill_missing(at, &[word]);
            }
        });
        Ok(Box::new(Nothing))
    }

    fn pin(&self, at: HostVa) -> Result<Box<dyn Held>, Trouble> {
        let frame = self.space.pin(at, Access::Write);
        Ok(Box::new(Pin {
            frame: frame.map_err(|signal| refused("a pin", signal))?,
            space: Arc::clone(&self.space),
        }))
    }
}

struct ModelNode(Mirror<ModelEnv, Space>);

impl Node for ModelNode {
    fn command(
        &self,
        command: Command,
        arguments: &mut Arguments,
        user: &(dyn UserMemory + Sync),
    ) -> Result<(), Errno> {
        self.0.command(command, arguments, user)
    }
}

struct ModelChild {
    process: ModelProcess,
    work: ChildWork,
}

impl Child for ModelChild {
    fn join(self: Box<Self>) -> Result<Vec<String>, Trouble> {
        let Self { process, work } = *self;
        let record = work(&process);
        process.space.exit();
        record
    }
}

/// Another actor is at work; waited for.
struct Beside(Arc<AtomicU32>);

impl Held for Beside {}

impl Drop for Beside {
    fn drop(&mut self) {
        while self.0.load(Ordering::Acquire) == 0 {
            Environment::wait(&ModelEnv, &self.0, 0);
        }
    }
}

/// It ends by itself.
struct Nothing;

impl Held for Nothing {}

struct Pin {
    space: Arc<Space>,
    frame: FrameId,
}

impl Held for Pin {}

impl Drop for Pin {
    fn drop(&mut self) {
        self.space.unpin(self.frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_model::mm::entry::Entry;

    /// Takes what it is given, and has zeros.
    struct Nowhere;

    impl UserMemory for Nowhere {
        fn copy_in(&self, _from: u64, to: &mut [u8]) -> Result<(), Errno> {
            to.fill(0);
            Ok(())
        }

        fn copy_out(&self, _from: &[u8], _to: u64) -> Result<(), Errno> {
            Ok(())
        }
    }

    /// Entries of the device's page table after a command on pages of `span`.
    fn entries_after(
        mirror: &Mirror<ModelEnv, Space>,
        command: Command,
        span: HostSpan,
        pages: std::ops::Range<u64>,
    ) -> usize {
        let mut arguments = Arguments {
            addr: span.start().plus(pages.start * PAGE).get(),
            npages: pages.end - pages.start,
            ..Arguments::default()
        };
        let done = mirror.command(command, &mut arguments, &Nowhere);
        done.expect("the pages are there");
        mirror.entries()
    }

    /// One page of a large one is unmapped and its neighbour touched by the CPU.
    fn cut(process: &ModelProcess, mirror: &Mirror<ModelEnv, Space>) {
        let span = process.map(Memory::Large, 512 * PAGE, Rights::ReadWrite);
        let span = span.expect("room");
        let page = |n: u64| HostSpan::at(span.start().plus(n * PAGE), PAGE);
        process.store(page(100).start(), 7).expect("writable");
        let large = entries_after(mirror, Command::MigrateToDevice, span, 0..512);
        assert_eq!(large, 1);
        process.unmap(page(101)).expect("mapped");
        assert_eq!(process.load(page(100).start()).expect("mapped"), 7);
        assert_eq!(mirror.entries(), 0, "the device has let go of all of it");
        entries_after(mirror, Command::Read, span, 0..101);
        let left = entries_after(mirror, Command::Read, span, 102..512);
        assert_eq!(
            left, 9,
            "64, 32, 4, the one that came home, 2, 8, 16, 128, 256"
        );
    }

    #[test]
    fn a_large_page_that_loses_two_pages_needs_nine_entries() {
        let outcome = run_world(&options(), &mut Picker::uniform(1), |sim| {
            let sim = *sim;
            sim.spawn("case", move || {
                let machine = Machine::new(Variant::Private, sim);
                let process = machine.process();
                let mirror = Mirror::open(&machine.devices[0], &process.space);
                cut(&process, &mirror.expect("alive"));
                machine.check().expect("in order");
            });
        });
        let trouble = outcome.trouble.map(|trouble| trouble.failure.to_string());
        assert_eq!(trouble, None);
    }

    /// The caller's buffer is memory of the process, also where that is on the device.
    struct Own(Arc<Space>);

    impl UserMemory for Own {
        fn copy_in(&self, _from: u64, _to: &mut [u8]) -> Result<(), Errno> {
            Err(Errno::Fault)
        }

        fn copy_out(&self, from: &[u8], to: u64) -> Result<(), Errno> {
            let mut word = [0; 8];
            word.copy_from_slice(&from[..8]);
            let stored = self.0.store(HostVa::new(to), u64::from_ne_bytes(word));
            stored.map_err(|_signal| Errno::Fault)
        }
    }

    /// Runs `case` in a world of its own, on a machine with devices.
    fn in_a_world(seed: u64, case: impl Fn(&Machine) + Send + Sync + 'static) -> Option<String> {
        let case = Arc::new(case);
        let outcome = run_world(&options(), &mut Picker::uniform(seed), |sim| {
            let (sim, case) = (*sim, Arc::clone(&case));
            sim.spawn("case", move || {
                let machine = Machine::new(Variant::Private, sim);
                case(&machine);
                machine.check().expect("in order");
            });
        });
        outcome.trouble.map(|trouble| trouble.failure.to_string())
    }

    fn of_pages(span: HostSpan) -> Arguments {
        Arguments {
            addr: span.start().get(),
            npages: span.pages().get(),
            ..Arguments::default()
        }
    }

    #[test]
    fn buffer_of_a_command_may_be_on_the_device_itself() {
        let trouble = in_a_world(1, |machine| {
            let process = machine.process();
            let mirror = Mirror::open(&machine.devices[0], &process.space).expect("alive");
            let span = process.map(Memory::Private, PAGE, Rights::ReadWrite);
            let span = span.expect("room");
            process.store(span.start(), 7).expect("writable");
            let mut arguments = Arguments {
                ptr: span.start().get() + 8,
                ..of_pages(span)
            };
            let own = Own(Arc::clone(&process.space));
            let done = mirror.command(Command::MigrateToDevice, &mut arguments, &own);
            done.expect("the page is there");
            assert_eq!(process.load(span.start().plus(8)).expect("mapped"), 7);
        });
        assert_eq!(trouble, None);
    }

    /// `MADV_DONTNEED` of a page that a device takes for itself: whoever is last, the device has no page
    /// that the process does not have.
    #[test]
    fn exclusive_page_that_is_discarded_meanwhile_is_not_the_devices() {
        const DONTNEED: i32 = 4;
        for seed in 0..200 {
            let trouble = in_a_world(seed, |machine| {
                let process = machine.process();
                let mirror = Mirror::open(&machine.devices[0], &process.space).expect("alive");
                let span = process.map(Memory::Private, PAGE, Rights::ReadWrite);
                let span = span.expect("room");
                let done = Arc::new(AtomicU32::new(0));
                let (space, told) = (Arc::clone(&process.space), Arc::clone(&done));
                machine.sim.spawn("discarder", move || {
                    let _discarded = space.madvise(span.start(), PAGE, DONTNEED);
                    told.store(1, Ordering::Release);
                    Environment::wake(&ModelEnv, &told);
                });
                let _taken = mirror.command(Command::Exclusive, &mut of_pages(span), &Nowhere);
                drop(Beside(done));
                let entry = process.space.entry(span.start());
                let is_alone = matches!(entry, Some(Entry::DeviceExclusive(..)));
                let has = mirror.entries() > 0;
                assert!(is_alone || !has, "the process has {entry:?}");
            });
            assert_eq!(trouble, None, "seed {seed}");
        }
    }
}
