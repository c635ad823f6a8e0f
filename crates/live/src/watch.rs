//! Which memory is watched: registrations with userfaultfd and the hull that syscall brackets look
//! at (`livehost.md` sections 2 and 7).
//!
//! * *Watched*: some device may use the mapping. Address-space calls that touch it are bracketed.
//! * *Registered*: watched memory that userfaultfd accepts, write-protect mode only: first touches
//!   cost nothing, and changes that no bracket saw still raise events.
//! * *Armed*: registered memory whose pages may be away: MISSING mode, faults come to the reader.
//!
//! Arming a piece splits the kernel's mapping in two or three. It stays armed after its pages came
//! home, until a fault finds host memory there or a bracket makes the mapping whole again.
//!
//! The lock is held across registration calls, which never wait for the reader. Lock rank: host
//! mm, outside the residency table's.

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::Mutex;
use gpusvm::seam::mm::Vma;
use rustix::io::Errno;

use crate::env::LiveEnv;
use crate::residency::{Busy, Residency};
use crate::spans::SpanSet;
use crate::sys::advise;
use crate::sys::pagemap::PageMap;
use crate::sys::patch;
use crate::sys::uffd::{RegisterMode, Uffd};

#[derive(Debug, Default)]
struct Sets {
    watched: SpanSet,
    registered: SpanSet,
    armed: SpanSet,
}

/// The registrations of one process.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) uffd: Uffd,
    pagemap: PageMap,
    sets: Mutex<LiveEnv, Sets>,
}

/// A piece cannot be armed: the kernel refused, so its pages cannot be taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CannotArm;

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// As [`PageMap::open`].
    pub(crate) fn new(uffd: Uffd) -> Result<Self, Errno> {
        Ok(Self {
            uffd,
            pagemap: PageMap::open()?,
            sets: Mutex::<LiveEnv, _>::new(Sets::default()),
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
        let fresh = sets.registered.without(vma.span);
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
        if self
            .uffd
            .register(vma.span, RegisterMode::WriteProtect)
            .is_ok()
        {
            sets.registered.insert(vma.span);
        }
        Ok(true)
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

    /// Arms a span, so that a touch of a missing page waits for a reader.
    ///
    /// The system is told even where the span is armed already: an event that was not read yet may
    /// have ended that.
    pub(crate) fn arm(&self, span: HostSpan) -> Result<(), CannotArm> {
        let mut sets = self.sets.lock();
        if !sets.registered.covers(span) {
            return Err(CannotArm);
        }
        self.uffd
            .register(span, RegisterMode::MissingAndWriteProtect)
            .map_err(|_errno| CannotArm)?;
        sets.armed.insert(span);
        Ok(())
    }

    /// A thread waits at the missing page at `at`, which is host memory: lets it have zeros. The
    /// block around it is disarmed, so that the kernel fills its pages from now on; where some of
    /// its pages are away, this one page is filled.
    ///
    /// The residency table is asked under this lock, and a migration arms under this lock only
    /// after it has marked its span as travelling: so a block is never disarmed, nor a page filled,
    /// under a migration.
    ///
    /// False where the page is in no armed piece: the access comes again until there is news of a
    /// move.
    pub(crate) fn disarm(&self, at: HostVa, residency: &Mutex<LiveEnv, Residency>) -> bool {
        let mut sets = self.sets.lock();
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        let Some(piece) = sets
            .armed
            .within(block)
            .into_iter()
            .find(|piece| piece.contains(at))
        else {
            return false;
        };
        if residency.lock().has_departed(piece) {
            if !residency.lock().has_departed(HostSpan::at(at, PAGE)) {
                // Refused where the page has come meanwhile: the thread finds it.
                let _filled = self.uffd.zero_page(at);
            }
            return true;
        }
        sets.armed.remove(piece);
        let whole = self.uffd.unregister(piece).is_ok()
            && self
                .uffd
                .register(piece, RegisterMode::WriteProtect)
                .is_ok();
        if !whole {
            sets.registered.remove(piece);
        }
        true
    }

    /// Takes `span` out of userfaultfd, so that a bracketed call raises no events and sees whole
    /// mappings. Returns what [`resume`](Self::resume) needs.
    pub(crate) fn suspend(&self, span: HostSpan) -> Suspended {
        let mut sets = self.sets.lock();
        let registered = sets.registered.within(span);
        let armed = sets.armed.within(span);
        for piece in &registered {
            // A refusal means that the mapping has changed unseen; the events then tell.
            if self.uffd.unregister(*piece).is_ok() {
                sets.registered.remove(*piece);
                sets.armed.remove(*piece);
            }
        }
        Suspended { registered, armed }
    }

    /// Registers again what [`suspend`](Self::suspend) took out, as far as it still exists.
    pub(crate) fn resume(&self, suspended: &Suspended) {
        let mut sets = self.sets.lock();
        for piece in &suspended.registered {
            if self
                .uffd
                .register(*piece, RegisterMode::WriteProtect)
                .is_ok()
            {
                sets.registered.insert(*piece);
            }
        }
    }

    /// Arms again what was armed, where pages are still away after a call that failed.
    pub(crate) fn rearm(&self, suspended: &Suspended) {
        self.resume(suspended);
        for piece in &suspended.armed {
            // Not armed means that the mapping is gone, and with it the pages.
            let _gone = self.arm(*piece);
        }
    }

    /// The mappings in `span` are gone, or have to be watched anew.
    pub(crate) fn forget(&self, span: HostSpan) {
        let mut sets = self.sets.lock();
        sets.watched.remove(span);
        sets.registered.remove(span);
        sets.armed.remove(span);
        publish_hull(&sets.watched);
    }

    /// As [`forget`](Self::forget) after a change that was seen late: what is mapped there by now is
    /// no longer registered either. What is in `kept` has been armed since, and stays.
    pub(crate) fn forget_late(&self, span: HostSpan, kept: &[HostSpan]) {
        let mut sets = self.sets.lock();
        let mut keep = SpanSet::default();
        kept.iter().for_each(|kept| keep.insert(*kept));
        for gap in keep.without(span) {
            // Refused where nothing is mapped.
            let _gone = self.uffd.unregister(gap);
            sets.watched.remove(gap);
            sets.registered.remove(gap);
            sets.armed.remove(gap);
        }
        publish_hull(&sets.watched);
    }

    /// A mapping moved together with its registration.
    pub(crate) fn moved(&self, from: HostSpan, to: HostVa) {
        let mut sets = self.sets.lock();
        let Sets {
            watched,
            registered,
            armed,
        } = &mut *sets;
        for set in [watched, registered, armed] {
            let pieces = set.within(from);
            set.remove(from);
            for piece in pieces {
                let start = to.plus(piece.start().offset_from(from.start()));
                set.insert(HostSpan::at(start, piece.bytes()));
            }
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
        self.sets.lock().armed.overlaps(block)
    }

    /// The watched stretch around `span`: what must be taken out to make its mappings whole.
    pub(crate) fn stretch(&self, span: HostSpan) -> HostSpan {
        let sets = self.sets.lock();
        let reach = HostSpan::new(
            HostVa::new(span.start().get().saturating_sub(PAGE)),
            span.end().plus(PAGE),
        );
        sets.registered
            .overlapping_whole(reach)
            .fold(span, HostSpan::join)
    }

    /// Ends all registrations.
    pub(crate) fn close(&self) {
        let everything = crate::residency::everything();
        let _ended = self.suspend(everything);
        self.forget(everything);
    }
}

/// What a bracket took out of userfaultfd.
#[derive(Debug)]
pub(crate) struct Suspended {
    registered: Vec<HostSpan>,
    armed: Vec<HostSpan>,
}

fn publish_hull(watched: &SpanSet) {
    match watched.hull() {
        Some(hull) => patch::set_hull(hull.start().get(), hull.end().get()),
        None => patch::set_hull(u64::MAX, 0),
    }
}
