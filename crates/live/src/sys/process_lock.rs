//! Locks that a process has once, and what becomes of them in a child of `fork()`.
//!
//! A child has the forking thread only. What another thread held at that moment nobody gives back, and
//! what it protects may be half changed. Holding such locks across the fork would not do: handlers of
//! the program run in between, and may make calls that take them.

use lock_api::MutexGuard;

use crate::sys::futex::RawFutexMutex;

/// A lock that children find free.
#[derive(Debug)]
pub(crate) struct ProcessLock<T>(lock_api::Mutex<RawFutexMutex, T>);

/// Proof that the caller is the only thread, just after a fork, and holds no lock.
pub(crate) struct Alone(());

impl Alone {
    /// # Safety
    /// It is as the type says, and stays so while the proof lives.
    pub(super) const unsafe fn new() -> Self {
        Self(())
    }
}

impl<T> ProcessLock<T> {
    /// A free one.
    pub(crate) const fn new(value: T) -> Self {
        Self(lock_api::Mutex::from_raw(lock_api::RawMutex::INIT, value))
    }

    /// Waits for it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, RawFutexMutex, T> {
        self.0.lock()
    }

    /// Whether somebody holds it.
    #[cfg(test)]
    pub(crate) fn is_held(&self) -> bool {
        self.0.is_locked()
    }
}

/// A lock that a child can free.
pub(crate) trait Freed: Sync {
    /// Frees it where a thread that is not here held it. Then it protects what it does at first, and
    /// what it did protect is given up as it is. Allocates nothing.
    fn free(&self, alone: &Alone);
}

impl<T: Default + Send> Freed for ProcessLock<T> {
    fn free(&self, _alone: &Alone) {
        if !self.0.is_locked() {
            return;
        }
        // SAFETY: the holder is a thread that this process does not have, so nobody else reads or
        // writes the value, nor ever will by the guard. It may be half changed, so it is not dropped.
        unsafe { self.0.data_ptr().write(T::default()) };
        // SAFETY: as above: its guard is in nobody's hands.
        unsafe { self.0.force_unlock(lock_api::GuardSend::new()) };
    }
}
