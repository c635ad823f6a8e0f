//! Waiting under a scheduler: the very source of `futex`, on words at each access of which another
//! thread may go on, and that have no spurious wake-ups to help.

#[path = "../src/sys/futex.rs"]
#[expect(dead_code, unreachable_pub, reason = "the host uses more of it")]
mod futex;

/// What it stands on.
mod sys {
    /// Nobody reads reports here.
    pub(crate) mod waits {
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum Reason {
            Lock,
            Clock,
        }

        pub(crate) struct Waiting;

        impl Waiting {
            pub(crate) fn enter(_reason: Reason, _word: usize) -> Self {
                Self
            }
        }
    }

    /// The system's side of waiting, as `futex(2)` describes it.
    pub(crate) mod word {
        use std::collections::VecDeque;
        use std::sync::Arc;

        use rustix::io::Errno;
        pub(crate) use rustix::thread::futex::Flags;
        use rustix::time::Timespec;
        pub(crate) use shuttle::sync::atomic::{AtomicU32, Ordering, fence};
        use shuttle::sync::{Condvar, Mutex};

        /// One who sleeps.
        struct Sleeper {
            word: usize,
            woken: Mutex<bool>,
            called: Condvar,
        }

        shuttle::lazy_static! {
            static ref SLEEPERS: Mutex<VecDeque<Arc<Sleeper>>> = Mutex::new(VecDeque::new());
        }

        fn address(word: &AtomicU32) -> usize {
            core::ptr::from_ref(word).addr()
        }

        pub(crate) fn wait(
            word: &AtomicU32,
            _flags: Flags,
            seen: u32,
            _timeout: Option<&Timespec>,
        ) -> Result<(), Errno> {
            let sleeper = Arc::new(Sleeper {
                word: address(word),
                woken: Mutex::new(false),
                called: Condvar::new(),
            });
            let mut sleepers = SLEEPERS.lock().expect("nobody panics");
            if word.load(Ordering::SeqCst) != seen {
                return Err(Errno::AGAIN);
            }
            sleepers.push_back(Arc::clone(&sleeper));
            drop(sleepers);
            let mut woken = sleeper.woken.lock().expect("nobody panics");
            while !*woken {
                woken = sleeper.called.wait(woken).expect("nobody panics");
            }
            Ok(())
        }

        pub(crate) fn wake(word: &AtomicU32, _flags: Flags, most: u32) -> Result<usize, Errno> {
            let mut sleepers = SLEEPERS.lock().expect("nobody panics");
            let mut count = 0;
            let most = usize::try_from(most).expect("64-bit");
            while count < most
                && let Some(at) = sleepers.iter().position(|s| s.word == address(word))
                && let Some(sleeper) = sleepers.remove(at)
            {
                *sleeper.woken.lock().expect("nobody panics") = true;
                sleeper.called.notify_all();
                count += 1;
            }
            Ok(count)
        }
    }
}

use std::sync::Arc;

use futex::{Changes, RawFutexMutex};
use shuttle::thread;
use sys::waits::Reason;
use sys::word::{AtomicU32, Ordering};

const RUNS: usize = 20_000;

fn check(world: fn()) {
    shuttle::check_random(world, RUNS);
    shuttle::check_pct(world, RUNS, 3);
}

/// Three threads count what nothing but the mutex protects.
fn contention() {
    let total = Arc::new(lock_api::Mutex::<RawFutexMutex, u32>::new(0));
    let count = |total: &lock_api::Mutex<RawFutexMutex, u32>| {
        for _ in 0..2 {
            let mut total = total.lock();
            let seen = *total;
            thread::yield_now();
            *total = seen + 1;
        }
    };
    let others: Vec<_> = (0..2)
        .map(|_| {
            let total = Arc::clone(&total);
            thread::spawn(move || count(&total))
        })
        .collect();
    count(&total);
    others
        .into_iter()
        .for_each(|other| other.join().expect("it ends"));
    assert_eq!(*total.lock(), 6);
}

/// Two threads wait for what a third one makes true, and tells.
fn changes() {
    let told = Arc::new((Changes::new(), AtomicU32::new(0)));
    let waiters: Vec<_> = (1..=2)
        .map(|goal| {
            let told = Arc::clone(&told);
            thread::spawn(move || {
                let mut seen = told.0.seen();
                while told.1.load(Ordering::Acquire) < goal {
                    told.0.wait(seen, Reason::Clock);
                    seen = told.0.seen();
                }
            })
        })
        .collect();
    for _ in 0..2 {
        told.1.fetch_add(1, Ordering::AcqRel);
        told.0.tell();
    }
    waiters
        .into_iter()
        .for_each(|waiter| waiter.join().expect("it ends"));
}

#[test]
fn mutex_excludes_and_wakes_whoever_waits() {
    check(contention);
}

#[test]
fn no_change_is_slept_through() {
    check(changes);
}
