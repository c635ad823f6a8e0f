//! [`Manager`]: allocation of device memory, and eviction when it is short.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::addr::{PAGE, PAGE_2M, VramSpan};
use crate::error::{Failed, Interrupted};
use crate::mutant::Mutant;
use crate::seam::env::{Environment, Mutex, Point};
use crate::vram::bo::Bo;
use crate::vram::buddy::{Buddy, From};
use crate::vram::lru::{Entry, Lru};
use crate::vram::withdrawn::{Balloon, Offline, Usage, Withdrawn};

/// Times that an allocation walks the whole LRU before it gives up (`svm-design.md` section 10).
const EVICT_PASSES: usize = 3;

/// Something whose device memory can be taken away.
pub trait Evict: Send + Sync {
    /// Moves the content elsewhere and lets go of the memory. Called without any lock but `vm`;
    /// may sleep.
    ///
    /// # Errors
    /// `Stale` when somebody else uses it just now: another victim is tried.
    fn evict(self: Arc<Self>) -> Result<(), Interrupted>;
}

/// A wish for device memory.
#[derive(Clone, Copy, Debug)]
pub struct BoRequest {
    /// Bytes, rounded up to pages; contiguous.
    pub bytes: u64,
    /// From which end.
    pub from: From,
    /// What it is for.
    pub purpose: Purpose,
}

/// What device memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Pages of processes: evictable as soon as they are there, and without memory they stay where
    /// they are.
    Pages,
    /// Page tables: never evictable, and nothing can be done without them. Such an allocation waits
    /// for pages that are on their way, to evict them.
    Tables,
    /// What a program wants to stay in device memory: never evictable.
    Pinned,
}

/// One device memory.
pub struct Manager<E: Environment> {
    env: Arc<E>,
    size: u64,
    /// The `vram` lock.
    state: Mutex<E, State>,
    /// Bumped when memory comes back; what an allocation sleeps on while others evict.
    freed: AtomicU32,
}

struct State {
    buddy: Buddy,
    lru: Lru,
    serial: u64,
    /// Objects that are being evicted right now: off the list, not yet free.
    evicting: usize,
    /// Objects whose pages are on their way: not yet on the list.
    filling: usize,
    withdrawn: Withdrawn,
    /// Bytes in balloons.
    balloon: u64,
}

/// How one step of an eviction walk ended.
enum Step {
    /// A victim has let go, or was gone already.
    Freed,
    /// The victim stays.
    Busy,
    /// The list is empty, but others are about to free memory, or to put some on the list.
    Others,
    /// The list is empty.
    Empty,
}

impl<E: Environment> fmt::Debug for Manager<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<E: Environment> Manager<E> {
    /// `size` bytes of free device memory.
    pub fn new(env: Arc<E>, size: u64) -> Self {
        let state = State {
            buddy: Buddy::new(size),
            lru: Lru::default(),
            serial: 0,
            evicting: 0,
            filling: 0,
            withdrawn: Withdrawn::default(),
            balloon: 0,
        };
        Self {
            env,
            size,
            state: Mutex::<E, _>::new(state),
            freed: AtomicU32::new(0),
        }
    }

    /// Bytes managed.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in use, balloons and all.
    pub fn used(&self) -> u64 {
        let usage = self.usage();
        usage.used + usage.balloon
    }

    /// How all of it is in use.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock();
        let (free, withdrawn) = (state.buddy.free_bytes(), state.withdrawn.bytes());
        Usage {
            free,
            used: state.buddy.size() - free - withdrawn - state.balloon,
            balloon: state.balloon,
            withdrawn,
        }
    }

    /// Takes a block out of use: what is in it is evicted, and nobody gets memory of it until the
    /// answer is dropped. May sleep; only `vm` may be held.
    ///
    /// # Errors
    /// [`Failed::OutOfVram`] where something stays in the block; it is in use as before then.
    pub fn take_offline(self: &Arc<Self>, span: VramSpan) -> Result<Offline<E>, Failed> {
        let offline = Offline {
            manager: Arc::clone(self),
            span,
        };
        let mut state = self.state.lock();
        let State {
            buddy, withdrawn, ..
        } = &mut *state;
        withdrawn.take_offline(buddy, span);
        drop(state);
        self.empty(span).map(|()| offline)
    }

    /// Evicts what has memory of `span`, which is withdrawn.
    fn empty(&self, span: VramSpan) -> Result<(), Failed> {
        for _pass in 0..EVICT_PASSES {
            let mut steps = self.state.lock().lru.len() + 1;
            while steps > 0 {
                let seen = self.freed.load(Ordering::Acquire);
                if self.state.lock().withdrawn.out_of(span) == span.bytes() {
                    return Ok(());
                }
                match self.evict_next(Purpose::Tables, |lru| lru.pop_in(span)) {
                    Step::Freed | Step::Busy => steps -= 1,
                    Step::Others => self.env.wait(&self.freed, seen),
                    Step::Empty => break,
                }
            }
        }
        Err(Failed::OutOfVram)
    }

    pub(super) fn bring_online(&self, span: VramSpan) {
        let mut state = self.state.lock();
        let State {
            buddy, withdrawn, ..
        } = &mut *state;
        withdrawn.online(buddy, span);
        drop(state);
        self.announce();
    }

    /// Notes a memory error in the pages of `span`: who has them keeps them, and nobody gets them
    /// afterwards.
    pub fn lose(&self, span: VramSpan) {
        let mut state = self.state.lock();
        let State {
            buddy, withdrawn, ..
        } = &mut *state;
        withdrawn.lose(buddy, span);
    }

    /// Takes memory for somebody else, wherever it is, in pieces; objects are evicted for it. May
    /// sleep; only `vm` may be held.
    ///
    /// # Errors
    /// [`Failed::OutOfVram`] where so much cannot be had; nothing is taken then.
    pub fn inflate(self: &Arc<Self>, bytes: u64) -> Result<Balloon<E>, Failed> {
        let mut objects = Vec::new();
        let mut left = bytes.next_multiple_of(PAGE);
        while left > 0 {
            let piece = left.min(PAGE_2M);
            objects.push(self.allocate(BoRequest {
                bytes: piece,
                from: From::Top,
                purpose: Purpose::Pinned,
            })?);
            left -= piece;
        }
        self.state.lock().balloon += bytes.next_multiple_of(PAGE);
        Ok(Balloon {
            manager: Arc::clone(self),
            objects,
        })
    }

    pub(super) fn deflated(&self, bytes: u64) {
        self.state.lock().balloon -= bytes;
    }

    /// Allocates an object that nobody evicts until [`make_evictable`](Self::make_evictable). Where
    /// memory is short, the least recently used objects go until it fits. May sleep; only `vm` may
    /// be held.
    ///
    /// # Errors
    /// [`Failed::TooLarge`] for what can never fit, [`Failed::OutOfVram`] where nothing more can
    /// be evicted.
    pub fn allocate(self: &Arc<Self>, request: BoRequest) -> Result<Arc<Bo<E>>, Failed> {
        if request.bytes > self.size {
            return Err(Failed::TooLarge);
        }
        for _pass in 0..EVICT_PASSES {
            // One more step than objects, so that a walk over busy ones ends.
            let mut steps = self.state.lock().lru.len() + 1;
            while steps > 0 {
                let seen = self.freed.load(Ordering::Acquire);
                if let Some(bo) = self.try_allocate(request) {
                    return Ok(bo);
                }
                match self.evict_oldest(request.purpose) {
                    Step::Freed | Step::Busy => steps -= 1,
                    Step::Others => self.env.wait(&self.freed, seen),
                    Step::Empty => break,
                }
            }
        }
        self.try_allocate(request).ok_or(Failed::OutOfVram)
    }

    /// Puts an object on the LRU, at the recently-used end. `who` is asked to let go of it.
    pub fn make_evictable(&self, bo: &Bo<E>, who: Weak<dyn Evict>) {
        let mut state = self.state.lock();
        state.lru.insert(Entry {
            id: bo.id(),
            span: bo.span(),
            who,
        });
        let filled = bo.end_filling();
        state.filling -= usize::from(filled);
        drop(state);
        if filled {
            self.announce();
        }
    }

    /// Notes that an object was used. Pinned objects stay pinned.
    pub fn touch(&self, bo: &Bo<E>) {
        let mut state = self.state.lock();
        if let Some(entry) = state.lru.remove(bo.id()) {
            state.lru.insert(entry);
        }
    }

    /// Evicts what can be evicted, once; returns how many objects went.
    pub fn evict_all(&self) -> usize {
        let on_list = self.state.lock().lru.len();
        (0..on_list)
            .filter(|_| matches!(self.evict_oldest(Purpose::Pages), Step::Freed))
            .count()
    }

    fn try_allocate(self: &Arc<Self>, request: BoRequest) -> Option<Arc<Bo<E>>> {
        let mut state = self.state.lock();
        let span = state.buddy.alloc(request.bytes, request.from)?;
        state.serial += 1;
        let id = state.serial;
        state.filling += usize::from(request.purpose == Purpose::Pages);
        drop(state);
        Some(Arc::new(Bo::new(
            Arc::clone(self),
            span,
            id,
            request.purpose,
        )))
    }

    fn evict_oldest(&self, purpose: Purpose) -> Step {
        self.evict_next(purpose, Lru::pop_oldest)
    }

    /// Takes an object off the list and asks its owner to let go, without the lock.
    fn evict_next(&self, purpose: Purpose, next: impl FnOnce(&mut Lru) -> Option<Entry>) -> Step {
        let mut state = self.state.lock();
        let Some(entry) = next(&mut state.lru) else {
            let filling = purpose == Purpose::Tables && state.filling > 0;
            return if state.evicting > 0 || filling {
                Step::Others
            } else {
                Step::Empty
            };
        };
        state.evicting += 1;
        drop(state);
        let evicted = entry.who.upgrade().map_or(Ok(()), Evict::evict);
        let mut state = self.state.lock();
        state.evicting -= 1;
        // Who could not let go is asked last next time; a dead entry is forgotten.
        if evicted.is_err() && entry.who.strong_count() > 0 {
            state.lru.insert(entry);
        }
        drop(state);
        self.announce();
        if evicted.is_ok() {
            Step::Freed
        } else {
            Step::Busy
        }
    }

    /// The last reference to an object went.
    pub(super) fn release(&self, bo: &Bo<E>) {
        let span = bo.span();
        let mut state = self.state.lock();
        let entry = state.lru.remove(bo.id());
        state.filling -= usize::from(bo.end_filling());
        let State {
            buddy, withdrawn, ..
        } = &mut *state;
        withdrawn.give(buddy, span);
        drop(state);
        drop(entry);
        if self.env.mutant(Mutant::FreedTwice) {
            self.env.yield_point(Point::Retry);
            self.state.lock().buddy.free(span);
        }
        self.announce();
    }

    fn announce(&self) {
        self.freed.fetch_add(1, Ordering::Release);
        if !self.env.mutant(Mutant::FreeWakesNobody) {
            self.env.wake(&self.freed);
        }
    }
}

#[cfg(test)]
mod tests;
