//! The live host: this process.
//!
//! The CPU's loads and stores are copies that survive a fault, so that a lost page is an answer. A
//! child opens the device in a runtime of its own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::event::EventSink;
use gpusvm::seam::mm::PagemapId;
use gpusvm_abi::bus::{SystemBus, VramStore};
use gpusvm_dmirror::uapi::{Arguments, Command, Errno, UserMemory};
use gpusvm_dmirror::{Device, DeviceConfig, Kind, Mirror};
use gpusvm_live::program::{By, Child as Forked, Claim};
use gpusvm_live::{
    Advise, Backing, Holes, Huge, Leave, LiveBus, LiveConfig, LiveEnv, LiveSpace, OpenError,
    Protect, RuntimeScope, Territory, VramMode, begin_anew, thread,
};

use crate::conformance::hmm::bench::{PageMap, Plan, Trouble, wrong};
use crate::conformance::hmm::host::{
    Advice, Child, ChildWork, Held, Leaves, Memory, Need, Node, Process, Rights,
};

/// Address space that a case may use up.
const LAND_BYTES: u64 = 4 << 30;
/// Bytes of a device's memory. They cost address space only.
const DEVICE_BYTES: u64 = 512 << 20;
/// Bytes of a child's record.
const RECORD_BYTES: u64 = 64 << 10;
/// How many huge pages the pool has.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Why this host cannot show something honestly; `None` where it can.
pub(super) const fn lacks(need: Need) -> Option<&'static str> {
    match need {
        Need::CoherentMemory => Some(
            "device memory that the CPU uses in place needs a second NUMA node; \
             the node does not open, as in a kernel without such memory",
        ),
        Need::GupTest => Some("the kernel's own test of pins (gup_test) is not in this kernel"),
        Need::PrivateFilePages => Some(
            "userfaultfd refuses private mappings of files; copying the pages would show what the \
             case looks at, and not what it is about",
        ),
    }
}

/// Runs a case in this process.
pub(super) fn run(plan: Plan) -> Result<Vec<String>, Trouble> {
    // Marked holes show in the page map, but huge pages do not fit back into their tables.
    let holes = match plan.page_map {
        PageMap::Unseen => Holes::Empty,
        PageMap::Seen => Holes::Marked,
    };
    let process = LiveProcess::new(holes)?;
    let played = process.world().and_then(|_open| plan.play(&process));
    process.close();
    played
}

/// The host and the devices.
struct World {
    space: Arc<LiveSpace>,
    devices: Vec<Arc<Device<LiveEnv, LiveSpace>>>,
}

impl World {
    fn open(holes: Holes) -> Result<Self, Trouble> {
        let _runtime_memory = RuntimeScope::enter();
        let env = LiveEnv::new(1);
        let sink: Arc<dyn EventSink> = Arc::new(());
        let config = LiveConfig {
            holes,
            ..LiveConfig::default()
        };
        let space = LiveSpace::open(&config, Arc::clone(&env), sink);
        let space = space.map_err(lacking)?;
        if space.level().faults != gpusvm_live::FaultLevel::Full {
            space.close();
            return Err(Trouble::Lacking(format!(
                "the level is {}; the cases need all of userfaultfd",
                space.level().faults.name()
            )));
        }
        let bus: Arc<dyn SystemBus> = Arc::new(LiveBus::new());
        let mut devices = Vec::new();
        for n in 1..=2 {
            let vram = space.create_vram(DEVICE_BYTES, VramMode::Adopt);
            let vram: Arc<dyn VramStore> = vram.map_err(lacking)?;
            devices.push(Device::new(DeviceConfig {
                env: Arc::clone(&env),
                id: PagemapId(n),
                kind: Kind::Private,
                vram,
                bus: Arc::clone(&bus),
            }));
        }
        Ok(Self { space, devices })
    }
}

fn lacking(why: OpenError) -> Trouble {
    Trouble::Lacking(why.to_string())
}

fn refused(what: &str, why: impl std::fmt::Display) -> Trouble {
    Trouble::Wrong(format!("{what}: {why}"))
}

/// This process, or a child of it.
struct LiveProcess {
    bus: LiveBus,
    land: Arc<Territory>,
    /// First address that no mapping has had.
    next: AtomicU64,
    world: OnceLock<Result<World, Trouble>>,
    holes: Holes,
    /// Huge pages that were added to the pool.
    pool: OnceLock<Pool>,
}

impl LiveProcess {
    fn new(holes: Holes) -> Result<Self, Trouble> {
        let land = Territory::reserve(LAND_BYTES).map_err(|why| refused("mmap", why))?;
        let next = AtomicU64::new(land.span().start().get());
        Ok(Self {
            bus: LiveBus::new(),
            land: Arc::new(land),
            next,
            holes,
            world: OnceLock::new(),
            pool: OnceLock::new(),
        })
    }

    /// The same memory in a child, which has no runtime yet.
    fn inherited(&self) -> Self {
        Self {
            bus: self.bus,
            land: Arc::clone(&self.land),
            next: AtomicU64::new(self.next.load(Ordering::Relaxed)),
            holes: self.holes,
            world: OnceLock::new(),
            pool: OnceLock::new(),
        }
    }

    /// The host; opened at the first call.
    fn world(&self) -> Result<&World, Trouble> {
        let world = self.world.get_or_init(|| {
            begin_anew();
            World::open(self.holes)
        });
        world.as_ref().map_err(Clone::clone)
    }

    fn close(self) {
        if let Some(Ok(world)) = self.world.into_inner() {
            let ended = world.space.clone();
            thread::run(move || drop(world));
            thread::run(|| ended.close());
        }
    }

    /// Puts a huge page into the pool, where it has none left.
    fn fill_pool(&self) {
        self.pool.get_or_init(Pool::grow);
    }

    fn map_at(&self, what: Memory, span: HostSpan) -> std::io::Result<()> {
        match what {
            Memory::Private => self.land.map(span, Huge::Never),
            Memory::Large => self.land.map(span, Huge::Advise),
            Memory::Shared => self.land.map_backed(span, Backing::SharedAnonymous),
            Memory::SharedFile => self.land.map_backed(span, Backing::SharedFile),
            Memory::PrivateFile | Memory::Device => {
                self.land.map_backed(span, Backing::PrivateFile)
            }
            Memory::HugePages => {
                self.fill_pool();
                self.land.map_backed(span, Backing::HugeTlb)
            }
        }
    }

    /// Lets a child write its record where the parent finds it.
    fn write_record(&self, at: HostVa, record: &str) -> bool {
        let len = u64::try_from(record.len()).unwrap_or(u64::MAX);
        let fits = len < RECORD_BYTES - 8;
        let told = |from: u64, bytes: &[u8]| self.bus.write(from, bytes).is_ok();
        fits && told(at.get() + 8, record.as_bytes()) && told(at.get(), &len.to_ne_bytes())
    }

    fn read_record(&self, at: HostVa) -> Result<String, Trouble> {
        let len = self.load(at)?.min(RECORD_BYTES);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let read = self.bus.read(at.get() + 8, &mut bytes);
        read.map_err(|why| refused("a child's record", why))?;
        String::from_utf8(bytes).map_err(|why| refused("a child's record", why))
    }
}

const fn rights_of(rights: Rights) -> Protect {
    match rights {
        Rights::None => Protect::None,
        Rights::Read => Protect::Read,
        Rights::ReadWrite => Protect::ReadWrite,
    }
}

impl Process for LiveProcess {
    fn map(&self, what: Memory, bytes: u64, rights: Rights) -> Result<HostSpan, Trouble> {
        let span = HostSpan::at(self.room(bytes)?, bytes);
        match self.map_at(what, span) {
            Err(why) if what == Memory::HugePages => {
                return Err(Trouble::Lacking(format!(
                    "the pool of huge pages is empty ({why}); write a number to {POOL}"
                )));
            }
            mapped => mapped.map_err(|why| refused("mmap", why))?,
        }
        if what == Memory::Device {
            // The device's mapping comes with its pages.
            for page in 0..span.pages().get() {
                self.load(span.start().plus(page * PAGE))?;
            }
        }
        if rights != Rights::ReadWrite {
            self.protect(span, rights)?;
        }
        Ok(span)
    }

    fn unmap(&self, span: HostSpan) -> Result<(), Trouble> {
        self.land.unmap(span).map_err(|why| refused("munmap", why))
    }

    fn protect(&self, span: HostSpan, rights: Rights) -> Result<(), Trouble> {
        let done = self.land.protect(span, rights_of(rights));
        done.map_err(|why| refused("mprotect", why))
    }

    fn advise(&self, span: HostSpan, advice: Advice) -> Result<(), Trouble> {
        let advice = match advice {
            Advice::Free => Advise::Free,
            Advice::Collapse => Advise::Collapse,
        };
        let done = self.land.advise(span, advice);
        done.map_err(|why| refused("madvise", why))
    }

    fn room(&self, bytes: u64) -> Result<HostVa, Trouble> {
        // A page stays free, so that neighbours do not become one mapping.
        let bytes = (bytes + PAGE).next_multiple_of(PAGE_2M);
        let at = self.next.fetch_add(bytes, Ordering::Relaxed);
        let span = HostSpan::at(HostVa::new(at), bytes);
        if self.land.span().covers(span) {
            Ok(span.start())
        } else {
            wrong("the case has used up its addresses")
        }
    }

    fn relocate(&self, from: HostSpan, to: HostVa, leaves: Leaves) -> Result<(), Trouble> {
        let leave = match leaves {
            Leaves::Hole => Leave::Hole,
            Leaves::Mapping => Leave::Empty,
        };
        let moved = self.land.relocate(from, to, leave);
        moved.map_err(|why| refused("mremap", why))
    }

    fn load(&self, at: HostVa) -> Result<u64, Trouble> {
        let mut word = [0; 8];
        let read = self.bus.read(at.get(), &mut word);
        read.map_err(|why| refused("a load", why))?;
        Ok(u64::from_ne_bytes(word))
    }

    fn store(&self, at: HostVa, value: u64) -> Result<(), Trouble> {
        let written = self.bus.write(at.get(), &value.to_ne_bytes());
        written.map_err(|why| refused("a store", why))
    }

    fn pagemap(&self, at: HostVa) -> Result<u64, Trouble> {
        let mut word = [0; 8];
        let file = File::open("/proc/self/pagemap");
        let read = file.and_then(|file| file.read_exact_at(&mut word, at.get() / PAGE * 8));
        read.map_err(|why| refused("/proc/self/pagemap", why))?;
        Ok(u64::from_ne_bytes(word))
    }

    fn open(&self, node: usize) -> Result<Box<dyn Node>, Trouble> {
        let world = self.world()?;
        let device = world
            .devices
            .get(node)
            .ok_or_else(|| Trouble::Lacking(format!("there is no device {node}")))?;
        let mirror = thread::run(|| Mirror::open(device, &world.space));
        let mirror = mirror.map_err(|why| refused("open", why))?;
        Ok(Box::new(LiveNode(Some(mirror))))
    }

    fn fork(&self, work: ChildWork) -> Result<Box<dyn Child>, Trouble> {
        let span = HostSpan::at(self.room(RECORD_BYTES)?, RECORD_BYTES);
        let shared = self.land.map_backed(span, Backing::SharedAnonymous);
        shared.map_err(|why| refused("mmap", why))?;
        let (inherited, place) = (self.inherited(), span.start());
        let child = Forked::make(By::Fork, || {
            let record = match work(&inherited) {
                Ok(record) => record.join("\n"),
                Err(Trouble::Lacking(why) | Trouble::Wrong(why)) => {
                    inherited.write_record(place, &why);
                    return false;
                }
            };
            inherited.write_record(place, &record)
        });
        Ok(Box::new(LiveChild {
            child: child.map_err(|why| refused("fork", why))?,
            record: Box::new(self.inherited()),
            place,
        }))
    }

    fn unmap_beside(&self, span: HostSpan) -> Result<Box<dyn Held>, Trouble> {
        let land = Arc::clone(&self.land);
        let unmapper = thread::spawn("hmm-unmapper", move || {
            // An error would show in the case, which unmaps the rest.
            let _unmapped = land.unmap(span);
        });
        let unmapper = unmapper.map_err(|why| refused("a thread", why))?;
        Ok(Box::new(Beside(Some(unmapper))))
    }

    fn serve_missing(&self, span: HostSpan, word: u64) -> Result<Box<dyn Held>, Trouble> {
        Ok(Box::new(Pager(Claim::take(span, word).map_err(lacking)?)))
    }

    fn pin(&self, _at: HostVa) -> Result<Box<dyn Held>, Trouble> {
        Err(Trouble::Lacking("pins are the kernel's own here".into()))
    }
}

/// An open node. Commands run on threads of the runtime.
struct LiveNode(Option<Mirror<LiveEnv, LiveSpace>>);

impl Node for LiveNode {
    fn command(
        &self,
        command: Command,
        arguments: &mut Arguments,
        user: &(dyn UserMemory + Sync),
    ) -> Result<(), Errno> {
        let mirror = self.0.as_ref().ok_or(Errno::Invalid)?;
        thread::run(|| mirror.command(command, arguments, user))
    }
}

impl Drop for LiveNode {
    fn drop(&mut self) {
        let mirror = self.0.take();
        thread::run(move || drop(mirror));
    }
}

struct LiveChild {
    child: Forked,
    record: Box<LiveProcess>,
    place: HostVa,
}

impl Child for LiveChild {
    fn join(self: Box<Self>) -> Result<Vec<String>, Trouble> {
        let ended = self.child.ended().map_err(|why| refused("wait", why))?;
        let text = self.record.read_record(self.place)?;
        if ended != gpusvm_live::program::Ended::Code(0) {
            return wrong(format!("the child ended with {ended:?}: {text}"));
        }
        Ok(text.lines().map(str::to_owned).collect())
    }
}

/// Another thread is at work; waited for.
struct Beside(Option<thread::RuntimeThread>);

impl Held for Beside {}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            thread.join();
        }
    }
}

/// Somebody serves faults of memory.
struct Pager(#[expect(dead_code, reason = "it serves until it is dropped")] Claim);

impl Held for Pager {}

/// A huge page that was added to the pool, and is taken out again.
struct Pool {
    before: Option<String>,
}

impl Pool {
    fn grow() -> Self {
        let before = std::fs::read_to_string(POOL).ok();
        let count = before.as_ref().and_then(|text| text.trim().parse().ok());
        let more = count.map(|count: u64| (count + 1).to_string());
        let grown = more.and_then(|more| std::fs::write(POOL, more).ok());
        Self {
            before: before.filter(|_| grown.is_some()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // The page stays in the pool where somebody uses it by now.
            let _shrunk = std::fs::write(POOL, before);
        }
    }
}
