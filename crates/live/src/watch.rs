//! Which memory is watched: registrations with userfaultfd and the hull that syscall brackets look
//! at (`livehost.md` sections 2 and 7).
//!
//! * *Watched*: some device may use the mapping. Address-space calls that touch it are bracketed.
//! * *Registered*: watched memory that userfaultfd accepts, in one of the [shards](crate::shard),
//!   write-protect mode only: first touches cost nothing, and changes that no bracket saw still raise
//!   events.
//! * *Armed*: registered memory whose pages may be away: MISSING mode, faults come to the reader.
//!
//! Arming a piece splits the kernel's mapping in two or three. It stays armed after its pages came
//! home, until a fault finds host memory there or a bracket makes the mapping whole again.
//!
//! The lock is held across registration calls, which never wait for the reader. Lock rank: host
//! mm, outside the residency table's.

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::Mutex;
use gpusvm::seam::mm::{Vma, VmaKind};
use rustix::io::Errno;

use crate::env::LiveEnv;
use crate::residency::{Busy, Residency};
use crate::shard::{ShardId, Shards};
use crate::spans::SpanSet;
use crate::sys::advise;
use crate::sys::pagemap::PageMap;
use crate::sys::patch;
use crate::sys::uffd::RegisterMode;

#[derive(Debug)]
struct Sets {
    watched: SpanSet,
    /// Where faults are served by the thread that faults.
    compute_only: SpanSet,
    shards: Vec<ShardSets>,
}

/// What one shard has. What is registered is so in one shard only: older kernels let any descriptor
/// take it out again.
#[derive(Debug)]
struct ShardSets {
    id: ShardId,
    registered: SpanSet,
    armed: SpanSet,
}

impl ShardSets {
    fn new(id: ShardId) -> Self {
        Self {
            id,
            registered: SpanSet::default(),
            armed: SpanSet::default(),
        }
    }

    fn forget(&mut self, span: HostSpan) {
        self.registered.remove(span);
        self.armed.remove(span);
    }
}

impl Sets {
    fn shard(&mut self, id: ShardId) -> Option<&mut ShardSets> {
        self.shards.iter_mut().find(|sets| sets.id == id)
    }

    /// From now on `id` has `span`. What others had there has been replaced.
    fn own(&mut self, span: HostSpan, id: ShardId) {
        for sets in &mut self.shards {
            if sets.id == id {
                sets.registered.insert(span);
            } else {
                sets.forget(span);
            }
        }
    }

    /// The shard that has the page at `at`.
    fn owner(&self, at: HostVa) -> Option<ShardId> {
        let page = HostSpan::at(at, PAGE);
        let owner = self.shards.iter().find(|sets| sets.registered.covers(page));
        owner.map(|sets| sets.id)
    }

    /// The shard that has what touches `span`, if it is not `but`.
    fn beside(&self, span: HostSpan, but: Option<ShardId>) -> Option<ShardId> {
        let reach = around(span);
        let mut others = self.shards.iter().filter(|sets| Some(sets.id) != but);
        let found = others.find(|sets| sets.registered.overlaps(reach));
        found.map(|sets| sets.id)
    }

    /// The parts of `span` that no shard has.
    fn unregistered(&self, span: HostSpan) -> Vec<HostSpan> {
        let all = self.shards.iter();
        let mut taken = SpanSet::default();
        all.flat_map(|sets| sets.registered.within(span))
            .for_each(|part| taken.insert(part));
        taken.without(span)
    }
}

/// The registrations of one process.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) shards: Shards,
    pagemap: PageMap,
    sets: Mutex<LiveEnv, Sets>,
}

/// Who serves faults of some memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// A thread that reads userfaultfd.
    Reader,
    /// The thread that faults.
    Faulting,
}

/// A piece cannot be armed: the kernel refused, so its pages cannot be taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CannotArm;

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// As [`PageMap::open`].
    pub(crate) fn new(shards: Shards) -> Result<Self, Errno> {
        let sets = Sets {
            watched: SpanSet::default(),
            compute_only: SpanSet::default(),
            shards: shards.ids().map(ShardSets::new).collect(),
        };
        Ok(Self {
            shards,
            pagemap: PageMap::open()?,
            sets: Mutex::<LiveEnv, _>::new(sets),
        })
    }

    /// Watches a whole mapping before a device may use any of it. Cheap when it is watched already.
    ///
    /// Returns whether some of it was not watched before.
    ///
    /// # Errors
    /// `Busy` where part of it is being changed. The table is asked under this lock: a bracket takes
    /// out what is registered after it has announced itself.
    pub(crate) fn ensure(
        &self,
        vma: &Vma,
        residency: &Mutex<LiveEnv, Residency>,
    ) -> Result<bool, Busy> {
        let sets = self.sets.lock();
        if sets.watched.covers(vma.span) {
            return Ok(false);
        }
        let fresh = sets.unregistered(vma.span);
        // A touch can wait for a reader, and readers take the lock.
        drop(sets);
        fresh.into_iter().for_each(|part| self.root(part));
        let mut sets = self.sets.lock();
        if residency.lock().is_changing(vma.span) {
            return Err(Busy);
        }
        sets.watched.insert(vma.span);
        publish_hull(&sets.watched);
        // Calls that began before the hull grew may still be changing the mapping: let them end.
        patch::wait_for_unwatched_calls();
        // What grows by itself takes its registration along, and would wait for ever at pages that
        // nobody knows to be missing: it is used in place, as the stack of the main thread is.
        let stays = vma.kind == VmaKind::Anonymous && advise::grows_down(vma);
        if !stays {
            self.enter(&mut sets, vma.span);
        }
        Ok(true)
    }

    /// Registers what is not yet registered of a mapping: with its neighbour, if that is registered, so
    /// that a mapping that grows stays in one shard, or where it belongs. One that has moved may have
    /// brought another shard along: then there.
    fn enter(&self, sets: &mut Sets, mapping: HostSpan) {
        let compute_only = self.shards.compute_only();
        for part in sets.unregistered(mapping) {
            let home = sets.beside(part, compute_only);
            let home = home.unwrap_or_else(|| self.shards.of(mapping.start()));
            for part in sets.compute_only.without(part) {
                self.enter_part(sets, part, home);
            }
            for part in sets.compute_only.within(part) {
                self.enter_part(sets, part, compute_only.unwrap_or(home));
            }
        }
    }

    fn enter_part(&self, sets: &mut Sets, part: HostSpan, home: ShardId) {
        let others = self.shards.ids().filter(|id| *id != home);
        for id in core::iter::once(home).chain(others) {
            let uffd = self.shards.uffd(id);
            match uffd.register(part, RegisterMode::WriteProtect) {
                Ok(()) => return sets.own(part, id),
                // Somebody has it.
                Err(Errno::BUSY) => {}
                Err(_forbidden) => return,
            }
        }
    }

    /// From now on `server` serves faults of `span`. Nothing of it is away, and it is watched anew when
    /// a device next uses it.
    pub(crate) fn set_server(&self, span: HostSpan, server: Server) {
        let mut sets = self.sets.lock();
        match server {
            Server::Faulting => sets.compute_only.insert(span),
            Server::Reader => sets.compute_only.remove(span),
        }
    }

    /// The hull of all memory whose faults are served by the thread that faults.
    pub(crate) fn compute_only_hull(&self) -> Option<HostSpan> {
        self.sets.lock().compute_only.hull()
    }

    /// Whether faults at `at` are served by the thread that faults.
    pub(crate) fn is_compute_only(&self, at: HostVa) -> bool {
        let page = HostSpan::at(at, 1);
        self.sets.lock().compute_only.covers(page)
    }

    /// The shard that has all of `span`.
    pub(crate) fn shard_of(&self, span: HostSpan) -> Option<ShardId> {
        let sets = self.sets.lock();
        let found = sets.shards.iter().find(|sets| sets.registered.covers(span));
        found.map(|sets| sets.id)
    }

    /// Writes to a mapping that nobody has written to, in its first page, which stays zero.
    ///
    /// The system ties pages to a mapping by a root that it makes at the first write. Arming cuts
    /// the mapping; were it cut before it has a root, each piece would get its own, and the pieces
    /// could never be joined again: `mremap` would refuse to grow what the program mapped in one.
    fn root(&self, mapping: HostSpan) {
        if !self.pagemap.was_written(mapping) {
            // Refused where the mapping changes just now: whoever changes it makes it anew.
            let _changed = advise::populate_write(HostSpan::at(mapping.start(), PAGE));
        }
    }

    /// Arms a span that `shard` has, so that a touch of a missing page waits for a reader.
    ///
    /// The system is told even where the span is armed already: an event that was not read yet may
    /// have ended that.
    pub(crate) fn arm(&self, span: HostSpan, shard: ShardId) -> Result<(), CannotArm> {
        let mut sets = self.sets.lock();
        let sets = sets.shard(shard).ok_or(CannotArm)?;
        if !sets.registered.covers(span) {
            return Err(CannotArm);
        }
        self.shards
            .uffd(shard)
            .register(span, RegisterMode::MissingAndWriteProtect)
            .map_err(|_errno| CannotArm)?;
        sets.armed.insert(span);
        Ok(())
    }

    /// A thread waits in `shard` at the missing page at `at`, which is host memory: lets it have
    /// zeros. The block around it is disarmed, so that the kernel fills its pages from now on; where
    /// some of its pages are away, this one page is filled.
    ///
    /// The residency table is asked under this lock, and a migration arms under this lock only
    /// after it has marked its span as travelling: so a block is never disarmed, nor a page filled,
    /// under a migration.
    ///
    /// Nothing is filled where another shard has what is mapped at `at` by now: the mapping in which the
    /// thread waited is gone, and that one's pages leave without asking the reader of this shard. The
    /// system would let this shard fill it. For the same reason the page is filled under this lock also
    /// where nothing is armed, which is so where a mapping has grown and only events tell: without it,
    /// another shard might get what is mapped at `at`, and send the page away, just before it is filled.
    ///
    /// False where that cannot be told yet.
    pub(crate) fn disarm(
        &self,
        at: HostVa,
        shard: ShardId,
        residency: &Mutex<LiveEnv, Residency>,
    ) -> bool {
        let mut sets = self.sets.lock();
        let uffd = self.shards.uffd(shard);
        if sets.owner(at).is_some_and(|owner| owner != shard) {
            return true;
        }
        let is_here = || !residency.lock().has_departed(HostSpan::at(at, PAGE));
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        let Some(sets) = sets.shard(shard) else {
            return false;
        };
        let Some(piece) = sets
            .armed
            .within(block)
            .into_iter()
            .find(|piece| piece.contains(at))
        else {
            return is_here() && uffd.zero_page(at).is_ok();
        };
        if residency.lock().has_departed(piece) {
            if is_here() {
                // Refused where the page has come meanwhile: the thread finds it.
                let _filled = uffd.zero_page(at);
            }
            return true;
        }
        sets.armed.remove(piece);
        let whole = uffd.unregister(piece).is_ok()
            && uffd.register(piece, RegisterMode::WriteProtect).is_ok();
        if !whole {
            sets.registered.remove(piece);
        }
        true
    }

    /// Takes `span` out of userfaultfd, so that a bracketed call raises no events and sees whole
    /// mappings. Returns what [`resume`](Self::resume) needs.
    pub(crate) fn suspend(&self, span: HostSpan) -> Suspended {
        let mut sets = self.sets.lock();
        let mut suspended = Suspended::default();
        for sets in &mut sets.shards {
            let pieces = sets.registered.within(span);
            let armed = sets.armed.within(span);
            for piece in &pieces {
                // A refusal means that the mapping has changed unseen; the events then tell.
                if self.shards.uffd(sets.id).unregister(*piece).is_ok() {
                    sets.forget(*piece);
                }
            }
            let owned = |piece| (sets.id, piece);
            suspended.registered.extend(pieces.into_iter().map(owned));
            suspended.armed.extend(armed.into_iter().map(owned));
        }
        suspended
    }

    /// Registers again what [`suspend`](Self::suspend) took out, as far as it still exists.
    pub(crate) fn resume(&self, suspended: &Suspended) {
        let mut sets = self.sets.lock();
        for (id, piece) in &suspended.registered {
            let uffd = self.shards.uffd(*id);
            if uffd.register(*piece, RegisterMode::WriteProtect).is_ok()
                && let Some(sets) = sets.shard(*id)
            {
                sets.registered.insert(*piece);
            }
        }
    }

    /// Arms again what was armed, where pages are still away after a call that failed.
    pub(crate) fn rearm(&self, suspended: &Suspended) {
        self.resume(suspended);
        for (id, piece) in &suspended.armed {
            // Not armed means that the mapping is gone, and with it the pages.
            let _gone = self.arm(*piece, *id);
        }
    }

    /// The mappings in `span` are gone, or have to be watched anew.
    pub(crate) fn forget(&self, span: HostSpan) {
        let mut sets = self.sets.lock();
        sets.watched.remove(span);
        sets.shards.iter_mut().for_each(|sets| sets.forget(span));
        publish_hull(&sets.watched);
    }

    /// As [`forget`](Self::forget) after a change that `shard` told of late: what is mapped there by
    /// now is no longer registered there either. What is in `kept` has been armed since, and stays; so
    /// does what other shards have.
    pub(crate) fn forget_late(&self, span: HostSpan, shard: ShardId, kept: &[HostSpan]) {
        let mut sets = self.sets.lock();
        let mut keep = SpanSet::default();
        let others = sets.shards.iter().filter(|sets| sets.id != shard);
        others
            .flat_map(|sets| sets.registered.within(span))
            .chain(kept.iter().copied())
            .for_each(|part| keep.insert(part));
        for gap in keep.without(span) {
            // Refused where nothing is mapped.
            let _gone = self.shards.uffd(shard).unregister(gap);
            sets.watched.remove(gap);
            if let Some(sets) = sets.shard(shard) {
                sets.forget(gap);
            }
        }
        publish_hull(&sets.watched);
    }

    /// A mapping moved together with its registration in `shard`.
    pub(crate) fn moved(&self, from: HostSpan, to: HostVa, shard: ShardId) {
        let mut sets = self.sets.lock();
        rebase(&mut sets.watched, from, to);
        if let Some(sets) = sets.shard(shard) {
            rebase(&mut sets.registered, from, to);
            rebase(&mut sets.armed, from, to);
        }
        publish_hull(&sets.watched);
    }

    /// Whether all of `span` is watched.
    pub(crate) fn covers(&self, span: HostSpan) -> bool {
        self.sets.lock().watched.covers(span)
    }

    /// Whether a device may use any of `span`.
    pub(crate) fn is_watched(&self, span: HostSpan) -> bool {
        self.sets.lock().watched.overlaps(span)
    }

    /// Whether arming may have cut a mapping inside `block`.
    pub(crate) fn may_be_cut(&self, block: HostSpan) -> bool {
        let sets = self.sets.lock();
        sets.shards.iter().any(|sets| sets.armed.overlaps(block))
    }

    /// The watched stretch around `span`: what must be taken out to make its mappings whole.
    pub(crate) fn stretch(&self, span: HostSpan) -> HostSpan {
        let sets = self.sets.lock();
        let mut stretch = span;
        loop {
            let pieces = sets.shards.iter();
            let longer = pieces
                .flat_map(|sets| sets.registered.overlapping_whole(around(stretch)))
                .fold(stretch, HostSpan::join);
            if longer == stretch {
                return stretch;
            }
            stretch = longer;
        }
    }

    /// Ends all registrations.
    pub(crate) fn close(&self) {
        let everything = crate::residency::everything();
        let _ended = self.suspend(everything);
        self.forget(everything);
    }
}

/// What a bracket took out of userfaultfd.
#[derive(Debug, Default)]
pub(crate) struct Suspended {
    registered: Vec<(ShardId, HostSpan)>,
    armed: Vec<(ShardId, HostSpan)>,
}

/// A span and a page on each side.
fn around(span: HostSpan) -> HostSpan {
    let below = span.start().get().saturating_sub(PAGE);
    HostSpan::new(HostVa::new(below), span.end().plus(PAGE))
}

/// Moves what is in `from` to `to`.
fn rebase(set: &mut SpanSet, from: HostSpan, to: HostVa) {
    let pieces = set.within(from);
    set.remove(from);
    for piece in pieces {
        let start = to.plus(piece.start().offset_from(from.start()));
        set.insert(HostSpan::at(start, piece.bytes()));
    }
}

fn publish_hull(watched: &SpanSet) {
    match watched.hull() {
        Some(hull) => patch::set_hull(hull.start().get(), hull.end().get()),
        None => patch::set_hull(u64::MAX, 0),
    }
}
