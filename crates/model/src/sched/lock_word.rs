//! The word of a lock, whoever holds it and whatever its name is.

use core::panic::Location;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::sched::pick::ACTORS_MAX;
use crate::sched::stage;

/// A place in the source.
pub(super) type Site = &'static Location<'static>;

/// Value of a free lock word; holders are counted from 1.
const FREE: u32 = 0;
/// Holder on a thread's own stack, not an actor.
pub(super) const HOST: usize = ACTORS_MAX;
/// A lock of which no world knows anything yet.
pub(super) const NO_NODE: u32 = u32::MAX;

/// The word of one lock. Atomic, so that it excludes whoever takes it, on any thread.
#[derive(Debug)]
pub(super) struct LockWord {
    holder: AtomicU32,
    node: AtomicU32,
}

impl LockWord {
    pub(super) const fn new() -> Self {
        Self {
            holder: AtomicU32::new(FREE),
            node: AtomicU32::new(NO_NODE),
        }
    }

    /// Takes the lock for the running actor, which waits for it if need be.
    #[inline]
    pub(super) fn take(&self, site: Site) {
        stage::take_lock(self, site);
    }

    /// Takes the lock if it is free.
    #[inline]
    pub(super) fn try_take(&self, site: Site) -> bool {
        stage::try_lock(self, site)
    }

    /// Frees the lock.
    #[inline]
    pub(super) fn release(&self) {
        stage::release_lock(self);
    }

    pub(super) fn is_held(&self) -> bool {
        self.holder.load(Ordering::Relaxed) != FREE
    }

    /// Who holds it.
    pub(super) fn holder(&self) -> Option<usize> {
        (self.holder.load(Ordering::Relaxed) as usize).checked_sub(1)
    }

    /// Makes `holder` the holder of a free lock.
    #[inline]
    pub(super) fn claim(&self, holder: usize) -> bool {
        let holder = u32::try_from(holder + 1).unwrap_or(u32::MAX);
        let claimed =
            self.holder
                .compare_exchange(FREE, holder, Ordering::Acquire, Ordering::Relaxed);
        claimed.is_ok()
    }

    /// Makes the lock free.
    #[inline]
    pub(super) fn clear(&self) {
        self.holder.store(FREE, Ordering::Release);
    }

    /// Where the world of the last holder keeps what it knows of the lock: a hint.
    pub(super) fn node(&self) -> u32 {
        self.node.load(Ordering::Relaxed)
    }

    pub(super) fn remember(&self, node: u32) {
        self.node.store(node, Ordering::Relaxed);
    }

    pub(super) fn address(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }
}
