//! What all actors share: the areas, the handshake with which content is destroyed, and what was
//! found.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use gpusvm::seam::env::{Environment, Mutex, Ns};
use gpusvm_live::{BracketLevel, ComputeOnly, LiveBus, LiveEnv, LiveSpace, Territory};

use crate::run::Stopwatch;
use crate::torture::area::{Area, Kind, Look};
use crate::torture::ledger::{Burn, Known, Tag};
use crate::torture::op::Op;
use crate::torture::random::Stream;
use crate::workload::{count, index, mix};

/// Pages that are looked at more often than others, together.
const HOT_PAGES: u64 = 24;
/// How long they are.
const HOT_US: u64 = 150_000;

/// When address-space changes are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// Before they happen.
    Before,
    /// After they happened.
    After,
}

/// Where an access was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Cpu,
    Device,
}

/// One actor, as the others see it.
#[derive(Debug)]
pub(super) struct Actor {
    pub(super) name: String,
    /// Odd inside an access; changes with every step.
    pub(super) beat: AtomicU64,
    /// What it does, for reports.
    doing: AtomicU64,
}

impl Actor {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            beat: AtomicU64::new(0),
            doing: AtomicU64::new(0),
        }
    }

    /// One step that is no access.
    pub(super) fn stepped(&self) {
        self.beat.fetch_add(2, Ordering::SeqCst);
    }

    /// Notes what it does at a page.
    pub(super) fn does(&self, what: Doing, area: u8, page: u32) {
        let word = u64::from(what.0) << 48 | u64::from(area) << 32 | u64::from(page);
        self.doing.store(word, Ordering::Relaxed);
    }

    /// What it did last, in words.
    pub(super) fn activity(&self) -> String {
        let word = self.doing.load(Ordering::Relaxed);
        let (what, area, page) = (word >> 48, word >> 32 & 0xff, word & 0xffff_ffff);
        let name = match what {
            0 => return "-".to_owned(),
            1 => "read",
            2 => "write",
            3 => "migrate",
            4 => "grace",
            5 => "sweep",
            n => Op::ALL.get(index(n - OPS)).map_or("?", |op| op.name()),
        };
        format!("{name} area {area} page {page}")
    }
}

/// First number of an operation.
const OPS: u64 = 16;

/// What an actor does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doing(u16);

impl Doing {
    pub(super) const READ: Self = Self(1);
    pub(super) const WRITE: Self = Self(2);
    pub(super) const MIGRATE: Self = Self(3);
    pub(super) const GRACE: Self = Self(4);
    pub(super) const SWEEP: Self = Self(5);

    pub(super) const fn op(op: Op) -> Self {
        Self(16 + op as u16)
    }
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A word stays older than what was written.
    Lost,
    /// A read gave what had been overwritten or destroyed.
    Stale,
    /// A word holds what was never written there.
    Bytes,
    /// An access was refused although its page was there.
    Refused,
    /// An access succeeded although its page was not there, or forbade it.
    Allowed,
    /// The system refused an operation that cannot fail, and the area is lost.
    Operation,
}

impl Fault {
    pub(super) const ALL: [Self; 6] = [
        Self::Lost,
        Self::Stale,
        Self::Bytes,
        Self::Refused,
        Self::Allowed,
        Self::Operation,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost_writes",
            Self::Stale => "stale_reads",
            Self::Bytes => "wrong_bytes",
            Self::Refused => "refused_accesses",
            Self::Allowed => "allowed_accesses",
            Self::Operation => "failed_operations",
        }
    }
}

/// The first thing that was wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) side: Side,
    pub(super) actor: usize,
    pub(super) tag: Tag,
    pub(super) address: u64,
    /// What was read, and what a second read gave.
    pub(super) found: Option<u64>,
    pub(super) again: Option<u64>,
    pub(super) known: Known,
    pub(super) ceiling: u32,
    pub(super) at_us: u64,
    /// The operation and the system's answer, where one failed.
    pub(super) errno: i32,
}

/// Counters of a run.
#[derive(Debug)]
pub(super) struct Tally {
    /// Reads and writes by the CPU, then by the device.
    pub(super) accesses: [AtomicU64; 4],
    /// Accesses that were refused, as they may be.
    pub(super) refused_in_change: AtomicU64,
    /// By [`Fault`].
    pub(super) faults: [AtomicU64; Fault::ALL.len()],
    /// By [`Op`]: done, and refused by the system.
    pub(super) ops: [[AtomicU64; 2]; Op::ALL.len()],
    /// Reports of the watchdog.
    pub(super) watchdog: AtomicU64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            accesses: [const { AtomicU64::new(0) }; 4],
            refused_in_change: AtomicU64::new(0),
            faults: [const { AtomicU64::new(0) }; Fault::ALL.len()],
            ops: [const { [const { AtomicU64::new(0) }; 2] }; Op::ALL.len()],
            watchdog: AtomicU64::new(0),
        }
    }
}

/// One more.
pub(super) fn tick(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What all actors share. It lies in the runtime's memory, so that looking at it never waits.
pub(super) struct World {
    pub(super) bus: LiveBus,
    /// Who serves faults of the land; ends before the land does.
    _compute_only: Option<ComputeOnly>,
    pub(super) land: Territory,
    pub(super) areas: Vec<Area>,
    pub(super) actors: Vec<Actor>,
    pub(super) space: Arc<LiveSpace>,
    pub(super) sight: Sight,
    pub(super) seed: u64,
    pub(super) tally: Tally,
    pub(super) clock: Stopwatch,
    pub(super) env: Arc<LiveEnv>,
    stop: AtomicBool,
    finding: Mutex<LiveEnv, Option<Finding>>,
    /// Planted: two locks that actors take crosswise.
    pub(super) jam: Option<[Mutex<LiveEnv, ()>; 2]>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// Parts of a [`World`].
pub(super) struct Parts {
    pub(super) land: Territory,
    pub(super) compute_only: Option<ComputeOnly>,
    pub(super) areas: Vec<Area>,
    pub(super) actors: Vec<Actor>,
    pub(super) space: Arc<LiveSpace>,
    pub(super) seed: u64,
    pub(super) hang: bool,
}

impl World {
    pub(super) fn new(parts: Parts) -> Self {
        let sight = match parts.space.level().bracket {
            BracketLevel::Patched => Sight::Before,
            BracketLevel::Symbols { .. }
            | BracketLevel::Events { .. }
            | BracketLevel::Owner { .. } => Sight::After,
        };
        let jam = || [(); 2].map(Mutex::<LiveEnv, _>::new);
        Self {
            bus: LiveBus::new(),
            _compute_only: parts.compute_only,
            land: parts.land,
            areas: parts.areas,
            actors: parts.actors,
            space: parts.space,
            sight,
            seed: parts.seed,
            tally: Tally::default(),
            clock: Stopwatch::start(),
            env: LiveEnv::new(parts.seed),
            stop: AtomicBool::new(false),
            finding: Mutex::<LiveEnv, _>::new(None),
            jam: parts.hang.then(jam),
        }
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Microseconds since the start.
    pub(super) fn now_us(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn sleep_us(&self, us: u64) {
        self.env.sleep_until(self.env.now().after(Ns(us * 1000)));
    }

    /// Begins an access of `actor`, until the guard is dropped.
    pub(super) fn enter(&self, actor: usize) -> Inside<'_> {
        let beat = &self.actors[actor].beat;
        beat.fetch_add(1, Ordering::SeqCst);
        Inside(beat)
    }

    /// Waits until every access that began before is over. `me` is not inside one.
    pub(super) fn grace(&self, me: usize) {
        for actor in &self.actors {
            let seen = actor.beat.load(Ordering::SeqCst);
            while seen & 1 == 1 && actor.beat.load(Ordering::SeqCst) == seen {
                self.sleep_us(20);
            }
        }
        self.actors[me].stepped();
    }

    /// Closes some pages and waits until nobody is accessing them. The caller holds the area's
    /// `change`.
    pub(super) fn close(&self, area: &Area, pages: &Range<u32>, me: usize) {
        area.turn(pages, Kind::Closed);
        self.actors[me].does(Doing::GRACE, area.id, pages.start);
        self.grace(me);
    }

    /// Whether content that an operation destroyed may come back.
    pub(super) const fn burn(&self, op: Op) -> Burn {
        let cleared = matches!(
            op,
            Op::Discard | Op::DiscardAll | Op::DiscardRaw | Op::DiscardLocked | Op::Free
        );
        match op.sight(self.sight) {
            Sight::After if cleared => Burn::No,
            Sight::After | Sight::Before => Burn::Yes,
        }
    }

    /// A page to look at: often one that others look at, too.
    pub(super) fn pick(&self, random: &mut Stream) -> (&Area, u32) {
        if random.one_in(2) {
            let round = mix(self.seed ^ (self.now_us() / HOT_US) << 20);
            let mut hot = Stream::named(round, "hot", 0);
            let (area, page) = self.pick_from(&mut hot);
            let more = random.between(0, u32::try_from(HOT_PAGES).unwrap_or(1));
            return (area, (page + more).min(area.plan.pages - 1));
        }
        self.pick_from(random)
    }

    fn pick_from(&self, random: &mut Stream) -> (&Area, u32) {
        let area = &self.areas[random.index(self.areas.len())];
        (area, random.between(0, area.plan.pages - 1))
    }

    /// What `actor` has to say of a look, before it says what it found.
    pub(super) fn statement(&self, actor: usize, fault: Fault, look: &Look) -> Finding {
        Finding {
            fault,
            side: Side::Cpu,
            actor,
            tag: look.tag,
            address: look.address,
            found: None,
            again: None,
            known: look.known,
            ceiling: 0,
            at_us: self.now_us(),
            errno: 0,
        }
    }

    /// Something is wrong: it is counted, the first is kept, and everybody stops.
    pub(super) fn found(&self, finding: Finding) {
        tick(&self.tally.faults[finding.fault as usize]);
        let mut first = self.finding.lock();
        if first.is_none() {
            *first = Some(finding);
        }
        drop(first);
        self.stop();
    }

    pub(super) fn finding(&self) -> Option<Finding> {
        *self.finding.lock()
    }

    /// Faults of a kind so far.
    pub(super) fn faults(&self, fault: Fault) -> u64 {
        self.tally.faults[fault as usize].load(Ordering::Relaxed)
    }

    /// The planted deadlock: from the first second on, each actor takes both locks, half of them in
    /// the other order.
    pub(super) fn jam(&self, actor: usize) {
        let Some([one, two]) = &self.jam else { return };
        if self.now_us() < 1_000_000 {
            return;
        }
        let (first, second) = if actor.is_multiple_of(2) {
            (one, two)
        } else {
            (two, one)
        };
        let _first = first.lock();
        self.sleep_us(300_000);
        let _second = second.lock();
    }

    /// Bytes of all areas.
    pub(super) fn bytes(&self) -> u64 {
        self.areas.iter().map(|area| area.plan.bytes()).sum()
    }

    /// Number of actors that may be named.
    pub(super) fn crew(&self) -> u64 {
        count(self.actors.len())
    }
}

/// An access that is under way.
pub(super) struct Inside<'w>(&'w AtomicU64);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
