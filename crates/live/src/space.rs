//! [`LiveSpace`]: this process as an [`AddressSpace`].
//!
//! What a kernel knows by its page tables, the live host knows from three places: the system's own
//! mappings (`PROCMAP_QUERY`), the residency table (which spans are away), and the watch (which
//! mappings raise faults and brackets). Host memory is reached by its own address: a bus address
//! *is* the host virtual address, and device accesses go through copies that survive a fault.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use gpusvm::addr::{BusAddr, HostSpan, HostVa};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::{Event, EventSink, HomeCause};
use gpusvm::mmu::{Interval, IntervalNotifiers, Seq};
use gpusvm::seam::env::{Environment, Mutex, Point};
use gpusvm::seam::mm::{
    AddressSpace, FaultIn, InvalidationSink, MigrateTo, Owner, PageRun, PagemapId, Placement, Seen,
    Vma,
};

use crate::attendant::Attendant;
use crate::bracket;
use crate::env::LiveEnv;
use crate::exclusive::Lone;
use crate::fork::{self, Forks};
use crate::in_thread;
use crate::inside;
use crate::level::{Descriptors, Holes, Level, LiveConfig, OpenError};
use crate::mappings::Remembered;
use crate::migrate::LiveMigration;
use crate::pool::Pool;
use crate::reader::{self, Reader};
use crate::residency::{Busy, Piece, Residency, State, everything};
use crate::shard::{ShardId, Shards};
use crate::staging::Staging;
use crate::stays::Stays;
use crate::sys::futex::Changes;
use crate::sys::pagemap::PageMap;
use crate::sys::procmap::ProcMap;
use crate::sys::uffd::RegisterMode;
use crate::sys::vram::{LiveVram, VramMode};
use crate::sys::waits::Reason;
use crate::sys::{self, arena, atfork};
use crate::watch::Watch;

/// Times that [`LiveSpace::fault_in`] starts over before it answers `Stale`.
const FAULT_IN_ROUNDS: usize = 16;

/// This process, shared with devices. There is one per process.
pub struct LiveSpace {
    pub(crate) env: Arc<LiveEnv>,
    pub(crate) notifiers: IntervalNotifiers<LiveEnv>,
    pub(crate) residency: Mutex<LiveEnv, Residency>,
    pub(crate) watch: Watch,
    pub(crate) staging: Staging,
    pub(crate) procmap: ProcMap,
    pub(crate) pagemap: PageMap,
    sink: Arc<dyn EventSink>,
    level: Level,
    /// Bumped when a travel or a change ends; what those in its way sleep on.
    changed: Changes,
    pub(crate) forks: Forks,
    pub(crate) attendant: Attendant,
    reader: Mutex<LiveEnv, Option<Reader>>,
    /// How the fault readers share their work.
    pub(crate) pool: Pool,
    /// Odd while a reader reads and sorts messages.
    pub(crate) reader_round: AtomicU32,
    /// What the last fault was about.
    pub(crate) reader_at: AtomicU64,
    /// Test switch, see [`plant_missing_freeze`](Self::plant_missing_freeze).
    pub(crate) skip_freeze: AtomicBool,
    pub(crate) closing: AtomicBool,
    /// Watched memory may have guards in it.
    pub(crate) guards: AtomicBool,
    pub(crate) remembered: Remembered,
    pub(crate) stays: Stays,
    pub(crate) lone: Lone,
    pub(crate) holes: Holes,
}

impl fmt::Debug for LiveSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveSpace")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl LiveSpace {
    /// Opens the process: probes what the system allows, starts the fault reader, patches the
    /// system-call sites. Events of the host go to `sink`.
    ///
    /// # Errors
    /// [`OpenError`] tells what the system refuses and what to do about it.
    pub fn open(
        config: &LiveConfig,
        env: Arc<LiveEnv>,
        sink: Arc<dyn EventSink>,
    ) -> Result<Arc<Self>, OpenError> {
        if atfork::is_child() {
            return Err(OpenError::Forked);
        }
        if !arena::is_installed() {
            return Err(OpenError::NoRuntimeAllocator);
        }
        let Descriptors {
            user,
            compute_only,
            staging,
            level: faults,
        } = Descriptors::open(config)?;
        let shards = Shards::new(user, compute_only);
        let shards = shards.map_err(OpenError::os("wait for userfaultfd"))?;
        // A child must find free what this thread holds from here on.
        fork::install();
        let bracket = bracket::attach(config.brackets, faults)?;
        let level = Level { faults, bracket };
        let space = Arc::new(Self {
            env,
            notifiers: IntervalNotifiers::new(),
            residency: Mutex::<LiveEnv, _>::new(Residency::default()),
            watch: Watch::new(shards).map_err(OpenError::os("open /proc/self/pagemap"))?,
            staging: Staging::new(staging).map_err(OpenError::os("map the staging arena"))?,
            procmap: ProcMap::open().map_err(OpenError::os("query this process's mappings"))?,
            pagemap: PageMap::open().map_err(OpenError::os("open /proc/self/pagemap"))?,
            sink,
            changed: Changes::new(),
            forks: Forks::default(),
            attendant: Attendant::default(),
            reader: Mutex::<LiveEnv, _>::new(None),
            pool: Pool::default(),
            reader_round: AtomicU32::new(0),
            reader_at: AtomicU64::new(0),
            skip_freeze: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            // Nobody tells of guards but brackets.
            guards: AtomicBool::new(!level.is_patched()),
            level,
            remembered: Remembered::default(),
            stays: Stays::open(faults).map_err(OpenError::os("open /proc/self/task"))?,
            lone: Lone::default(),
            holes: config.holes,
        });
        space.lone.belong_to(&space);
        if faults.has_uffd() {
            let reader = reader::start(&space).map_err(OpenError::os("start the fault reader"))?;
            *space.reader.lock() = Some(reader);
        }
        in_thread::start(faults).map_err(OpenError::os("map stacks for fault service"))?;
        Attendant::start(&space)?;
        bracket::enter_service(&space);
        Ok(space)
    }

    /// What the system allows and what is in use.
    pub const fn level(&self) -> &Level {
        &self.level
    }

    /// Device memory of `bytes` bytes in this process. Without userfaultfd pages cannot be handed
    /// over: they are copied whatever `mode` says.
    ///
    /// # Errors
    /// The system's errno, from mapping or registering it.
    pub fn create_vram(&self, bytes: u64, mode: VramMode) -> Result<Arc<LiveVram>, OpenError> {
        let mode = if self.level.faults.has_uffd() {
            mode
        } else {
            VramMode::Copy
        };
        let vram = LiveVram::new(bytes, mode).map_err(OpenError::os("map device memory"))?;
        if mode == VramMode::Adopt {
            self.staging
                .uffd
                .register(vram.span(), RegisterMode::WriteProtect)
                .map_err(OpenError::os("register device memory"))?;
        }
        Ok(Arc::new(vram))
    }

    /// Waits until the reader has handled what it has read. The system lets a call that raises an
    /// event go on when the event is read: after this, it is handled, too. For programs whose
    /// changes no bracket sees.
    pub fn settle_events(&self) {
        let round = self.reader_round.load(Ordering::Acquire);
        while round & 1 == 1 && self.reader_round.load(Ordering::Acquire) == round {
            rustix::thread::sched_yield();
        }
        while !self.pool.is_settled() {
            rustix::thread::sched_yield();
        }
    }

    /// Plants a bug: a migration to a device takes the content before it takes the pages, so that
    /// what the CPU writes in between is lost. Tests use it to show that they would notice.
    #[doc(hidden)]
    pub fn plant_missing_freeze(&self) {
        self.skip_freeze.store(true, Ordering::Relaxed);
    }

    /// Brings the pages of `span` home. Must be called on a thread of the runtime, see
    /// [`thread::run`](crate::thread::run).
    pub fn bring_span_home(&self, span: HostSpan) {
        self.bring_home(span, HomeCause::SpaceChange);
    }

    /// Brings every page of the process home. Pages that other operations hold are waited for.
    pub fn bring_everything_home(&self) {
        self.bring_home(everything(), HomeCause::Teardown);
    }

    /// Ends the service: data comes home, registrations and patches are taken back, the reader
    /// stops. Call it after the VMs are closed; a second call does nothing.
    pub fn close(&self) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.bring_everything_home();
        bracket::leave_service();
        in_thread::stop();
        self.watch.close();
        // What the attendant drops may be news, which somebody has to read.
        self.attendant.stop();
        let reader = self.reader.lock().take();
        if let Some(reader) = reader {
            reader.stop(self);
        }
    }

    /// Between two steps of something that others must not see half done, and that they may meet.
    pub(crate) fn step(&self) {
        self.env.yield_point(Point::PteWrite);
    }

    pub(crate) fn emit(&self, event: &Event) {
        self.sink.record(self.env.now(), event);
    }

    /// Tells those who wait for the residency table that it has changed.
    pub(crate) fn announce_change(&self) {
        self.changed.tell();
        sys::in_thread::announce();
    }

    /// Announces changes of all of `spans`, once no other change overlaps them.
    pub(crate) fn begin_change(&self, spans: &[HostSpan]) {
        loop {
            let seen = self.changed.seen();
            if self.residency.lock().change(spans).is_ok() {
                return;
            }
            self.changed.wait(seen, Reason::Travel);
        }
    }

    /// As [`begin_change`](Self::begin_change), for changes that the caller is about to make: children
    /// that miss part of `spans` get it first.
    ///
    /// News of changes does not wait for that: they are made, and cannot be put off.
    pub(crate) fn begin_call(&self, spans: &[HostSpan]) {
        loop {
            let seen = self.changed.seen();
            let mut table = self.residency.lock();
            let owed = spans.iter().any(|span| table.is_owed(*span));
            if !owed && table.change(spans).is_ok() {
                return;
            }
            drop(table);
            self.changed.wait(seen, Reason::Travel);
        }
    }

    /// The changes are made.
    pub(crate) fn end_change(&self, spans: &[HostSpan]) {
        self.residency.lock().unchange(spans);
        self.announce_change();
    }

    /// Watches a whole mapping before a device may use any of it. Waits while part of it is being
    /// changed, which takes the registrations of all of it out.
    pub(crate) fn watch_mapping(&self, vma: &Vma) {
        loop {
            let seen = self.changed.seen();
            match self.watch.ensure(vma, &self.residency) {
                Ok(fresh) => {
                    return if fresh {
                        self.look_for_guards(vma);
                    };
                }
                Err(Busy) => self.changed.wait(seen, Reason::Travel),
            }
        }
    }

    /// Waits until nothing in `span` travels.
    pub(crate) fn wait_settled(&self, span: HostSpan) {
        loop {
            let seen = self.changed.seen();
            if !self.residency.lock().is_travelling(span) {
                return;
            }
            self.changed.wait(seen, Reason::Travel);
        }
    }

    /// Brings all resident pages of `span` home and waits for those that travel. Pages that cannot be
    /// copied were reported, and stay where they are.
    pub(crate) fn bring_home(&self, span: HostSpan, cause: HomeCause) {
        let mut stuck = Vec::new();
        loop {
            self.wait_settled(span);
            // Asked at one moment: what travels may be put back where it was.
            let table = self.residency.lock();
            let (resident, travelling) =
                (table.any_resident(span, &stuck), table.is_travelling(span));
            drop(table);
            match resident {
                Some(allocation) => {
                    let id = allocation.id();
                    if let Err(Interrupted::Failed(_)) = allocation.bring_home(cause) {
                        stuck.push(id);
                    }
                }
                None if travelling => {}
                None => return,
            }
        }
    }

    /// Waits until nothing in `span` travels and recalls, to be dropped, what left before the event was
    /// read whose number in each shard `event` tells.
    pub(crate) fn recall_settled(
        &self,
        span: HostSpan,
        event: impl Fn(ShardId) -> Option<u64>,
    ) -> Vec<Piece> {
        loop {
            self.wait_settled(span);
            if let Ok(pieces) = self.residency.lock().recall_older(span, &event) {
                return pieces;
            }
        }
    }

    /// Ends the travel of recalled pieces by dropping their content.
    pub(crate) fn let_go(&self, pieces: Vec<Piece>) {
        for piece in &pieces {
            self.unmark(piece.span, piece.shard);
            let released = self.residency.lock().release(piece.span);
            self.arrived(piece.span, piece.shard);
            drop(released);
        }
    }
}

impl AddressSpace for LiveSpace {
    type Migration<'a> = LiveMigration<'a>;

    fn find_vma(&self, at: HostVa) -> Option<Vma> {
        let vma = self.vma_for_device(at)?;
        if vma.span.contains(at) {
            Some(self.piece_at(vma, at))
        } else {
            Some(vma)
        }
    }

    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Failed::AddressSpaceGone.into());
        }
        Ok(self.notifiers.insert(window, inside::marked(sink)))
    }

    fn unsubscribe(&self, interval: &Arc<Interval>) {
        self.notifiers.remove(&self.env, interval);
    }

    fn read_begin(&self, interval: &Interval) -> Seq {
        self.notifiers.read_begin(&self.env, interval)
    }

    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        for _round in 0..FAULT_IN_ROUNDS {
            if self.try_fault_in(request, runs)?.is_some() {
                return Ok(());
            }
        }
        Err(Stale::PagesBusy.into())
    }

    fn is_populated(&self, span: HostSpan) -> bool {
        let table = self.residency.lock();
        let away: Vec<_> = table.overlapping(span).map(|(away, _)| away).collect();
        drop(table);
        let mut at = span.start();
        for part in away {
            let gap = HostSpan::new(at, part.start());
            if !gap.is_empty() && !self.populated(gap) {
                return false;
            }
            at = at.max(part.end());
        }
        let rest = HostSpan::new(at, span.end());
        rest.is_empty() || self.populated(rest)
    }

    fn placement(&self, span: HostSpan) -> Placement {
        let table = self.residency.lock();
        let mut at = span.start();
        let mut found: Option<PagemapId> = None;
        for (part, state) in table.overlapping(span) {
            let State::Resident(page) = state else {
                return Placement::Mixed;
            };
            let here = page.allocation.pagemap();
            if part.start() > at || found.is_some_and(|other| other != here) {
                return Placement::Mixed;
            }
            found = Some(here);
            at = part.end();
        }
        match found {
            None => Placement::System,
            Some(pagemap) if at >= span.end() => Placement::Device(pagemap),
            Some(_) => Placement::Mixed,
        }
    }

    fn migrate_begin(
        &self,
        span: HostSpan,
        to: MigrateTo,
    ) -> Result<LiveMigration<'_>, Interrupted> {
        self.begin(span, to)
    }

    fn snapshot(
        &self,
        span: HostSpan,
        keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Failed::AddressSpaceGone.into());
        }
        self.glance(span, keep, pages);
        Ok(())
    }

    fn make_exclusive(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        self.take_for_device(at, owner, commit)
    }
}
