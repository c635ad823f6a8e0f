//! The mmap lock: one word, shared by readers or held by one writer, waited for through the
//! environment. Readers go before waiting writers, so a reader may take it again.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm::seam::env::Environment;

use crate::mm::around::Hold;

/// The value while a writer has it; otherwise the number of readers.
const WRITER: u32 = u32::MAX;

/// The lock.
#[derive(Debug, Default)]
pub(crate) struct MmapWord(AtomicU32);

impl MmapWord {
    pub(crate) fn lock<E: Environment>(&self, env: &E, how: Hold) {
        loop {
            let seen = self.0.load(Ordering::Acquire);
            let next = match how {
                Hold::Read if seen != WRITER => seen + 1,
                Hold::Write if seen == 0 => WRITER,
                Hold::Read | Hold::Write => {
                    env.wait(&self.0, seen);
                    continue;
                }
            };
            let taken = self
                .0
                .compare_exchange(seen, next, Ordering::AcqRel, Ordering::Acquire);
            if taken.is_ok() {
                return;
            }
        }
    }

    /// Whether a writer has it.
    pub(crate) fn is_written(&self) -> bool {
        self.0.load(Ordering::Acquire) == WRITER
    }

    pub(crate) fn unlock<E: Environment>(&self, env: &E, how: Hold) {
        match how {
            Hold::Read => {
                self.0.fetch_sub(1, Ordering::Release);
            }
            Hold::Write => self.0.store(0, Ordering::Release),
        }
        env.wake(&self.0);
    }
}
