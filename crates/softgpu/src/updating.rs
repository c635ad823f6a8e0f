//! [`Updating`]: one unit at a time updates a word of host memory.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm_abi::bus::Park;

/// Nobody updates.
const FREE: u32 = 0;
/// Somebody does, and perhaps others wait.
const TAKEN: u32 = 1;

/// A lock for which its waiters sleep, as whoever has it may: a page may have to come home first.
#[derive(Debug, Default)]
pub(crate) struct Updating(AtomicU32);

impl Updating {
    /// Runs `act` while no other unit does.
    pub(crate) fn alone<T>(&self, park: &dyn Park, act: impl FnOnce() -> T) -> T {
        while self.0.swap(TAKEN, Ordering::Acquire) == TAKEN {
            park.wait(&self.0, TAKEN, None);
        }
        let done = act();
        self.0.store(FREE, Ordering::Release);
        park.wake(&self.0);
        done
    }
}
