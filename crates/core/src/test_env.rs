//! An environment for unit tests: real threads, real time.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::seam::env::{Environment, Ns, Work};

/// Clock by counting, waiting by yielding.
#[derive(Debug, Default)]
pub(crate) struct TestEnv {
    now: AtomicU64,
    random: AtomicU64,
    /// Requests for deferred work so far.
    pub(crate) deferred: AtomicU64,
}

impl Environment for TestEnv {
    type RawMutex = parking_lot::RawMutex;

    fn now(&self) -> Ns {
        Ns(self.now.fetch_add(1, Ordering::Relaxed))
    }

    fn random(&self) -> u64 {
        self.random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
    }

    fn wait(&self, word: &AtomicU32, seen: u32) {
        while word.load(Ordering::Acquire) == seen {
            thread::park_timeout(Duration::from_micros(50));
        }
    }

    fn wake(&self, _word: &AtomicU32) {}

    fn sleep_until(&self, deadline: Ns) {
        self.now.fetch_max(deadline.0, Ordering::Relaxed);
    }

    fn defer(&self, _work: Work) {
        self.deferred.fetch_add(1, Ordering::Relaxed);
    }
}
