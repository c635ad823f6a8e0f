//! [`LiveEnv`]: clock, locks, waiting and deferred work on the running system.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::{Arc, OnceLock};

use gpusvm::seam::env::{Environment, Mutex, Ns, Point, Work};
use gpusvm_abi::bus::Park;

use crate::sys::futex::{self, RawFutexMutex, Sleepers};
use crate::sys::thread::{self, RuntimeThread, SpawnError};
use crate::sys::waits::Reason;

/// The longest sleep of [`set_jitter`](LiveEnv::set_jitter).
const NAP: Ns = Ns(300_000);

type Handler = Box<dyn Fn(Work) + Send + Sync>;

/// The environment of a live instance. One background thread does the deferred work.
pub struct LiveEnv {
    /// VMs that asked for their collector, one bit per id modulo 64. Asking twice is one request.
    garbage: AtomicU64,
    /// Ids behind the bits of `garbage`.
    ids: [AtomicU32; 64],
    /// Bumped with each request; what the worker sleeps on.
    asked: AtomicU32,
    stop: AtomicBool,
    handler: OnceLock<Handler>,
    worker: Mutex<Self, Option<RuntimeThread>>,
    random: AtomicU64,
    /// Of how many switch points one is slept at; 0: none.
    jitter: AtomicU32,
    /// Those who wait for the framework.
    framework: Sleepers,
    /// Those who wait for the device, or in it.
    device: Sleepers,
}

impl fmt::Debug for LiveEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveEnv").finish_non_exhaustive()
    }
}

impl LiveEnv {
    /// An environment whose random numbers follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            garbage: AtomicU64::new(0),
            ids: [const { AtomicU32::new(0) }; 64],
            asked: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            handler: OnceLock::new(),
            worker: Mutex::<Self, _>::new(None),
            random: AtomicU64::new(seed),
            jitter: AtomicU32::new(0),
            framework: Sleepers::new(),
            device: Sleepers::new(),
        })
    }

    /// From now on a thread sleeps at one of `odds` switch points, for up to [`NAP`], so that others meet it
    /// where they rarely would; at none, if that is 0. For tests.
    #[doc(hidden)]
    pub fn set_jitter(&self, odds: u32) {
        self.jitter.store(odds, Ordering::Relaxed);
    }

    #[cold]
    fn nap(&self, odds: u32) {
        if self.random().is_multiple_of(u64::from(odds)) {
            self.sleep_until(self.now().after(Ns(self.random() % NAP.0)));
        }
    }

    /// Starts the thread that does deferred work with `handler`. A second call changes nothing.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_worker(
        self: &Arc<Self>,
        handler: impl Fn(Work) + Send + Sync + 'static,
    ) -> Result<(), SpawnError> {
        if self.handler.set(Box::new(handler)).is_err() {
            return Ok(());
        }
        let env = Arc::clone(self);
        *self.worker.lock() = Some(thread::spawn("gpusvm-worker", move || env.work())?);
        Ok(())
    }

    /// Stops the worker after the work that was asked for, and waits for it.
    pub fn stop_worker(&self) {
        self.stop.store(true, Ordering::Release);
        self.asked.fetch_add(1, Ordering::Release);
        futex::wake(&self.asked);
        let worker = self.worker.lock().take();
        if let Some(worker) = worker {
            worker.join();
        }
    }

    fn work(&self) {
        loop {
            let seen = self.asked.load(Ordering::Acquire);
            let mut bits = self.garbage.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let slot = bits.trailing_zeros();
                bits &= bits - 1;
                let vm = self.ids[slot as usize].load(Ordering::Acquire);
                if let Some(handler) = self.handler.get() {
                    handler(Work::CollectGarbage { vm });
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            futex::wait(&self.asked, seen, None, Reason::Work);
        }
    }
}

impl Environment for LiveEnv {
    type RawMutex = RawFutexMutex;

    fn now(&self) -> Ns {
        Ns(futex::now_ns())
    }

    fn random(&self) -> u64 {
        // splitmix64: a counter with a mixing function, so one atomic add per number.
        let mut x = self
            .random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn wait(&self, word: &AtomicU32, seen: u32) {
        self.framework
            .sleep(|| futex::wait(word, seen, None, Reason::Framework));
    }

    fn wake(&self, word: &AtomicU32) {
        if self.framework.are_there() {
            futex::wake(word);
        }
    }

    fn sleep_until(&self, deadline: Ns) {
        let never_woken = AtomicU32::new(0);
        while self.now() < deadline {
            let left = deadline.since(self.now());
            let left = Some(Duration::from_nanos(left.0));
            futex::wait(&never_woken, 0, left, Reason::Clock);
        }
    }

    fn yield_point(&self, _at: Point) {
        let odds = self.jitter.load(Ordering::Relaxed);
        if odds != 0 {
            self.nap(odds);
        }
    }

    fn defer(&self, work: Work) {
        let Work::CollectGarbage { vm } = work;
        let slot = vm % 64;
        self.ids[slot as usize].store(vm, Ordering::Release);
        self.garbage.fetch_or(1 << slot, Ordering::AcqRel);
        self.asked.fetch_add(1, Ordering::Release);
        futex::wake(&self.asked);
    }
}

impl Park for LiveEnv {
    fn wait(&self, word: &AtomicU32, seen: u32, timeout_ns: Option<u64>) {
        let timeout = timeout_ns.map(Duration::from_nanos);
        self.device
            .sleep(|| futex::wait(word, seen, timeout, Reason::Device));
    }

    fn wake(&self, word: &AtomicU32) {
        if self.device.are_there() {
            futex::wake(word);
        }
    }

    fn now_ns(&self) -> u64 {
        futex::now_ns()
    }
}
