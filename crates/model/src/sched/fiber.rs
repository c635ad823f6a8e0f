//! Coroutines that suspend from anywhere, and the lock that suspends them: the one file of this
//! crate with `unsafe` code.
//!
//! A [`Fiber`] runs a closure on a stack of its own. Whatever the closure calls may [`suspend`]
//! it, without being handed anything: the running fiber is known to its thread.
#![expect(unsafe_code, reason = "the scheduler's one place for it")]

use core::cell::Cell;
use core::fmt;
use core::mem::ManuallyDrop;
use core::panic::Location;
use core::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use lock_api::GuardNoSend;

use crate::sched::lock_word::LockWord;

type Yields = Yielder<(), ()>;

thread_local! {
    /// The yielder of the fiber that runs on this thread; null on the thread's own stack.
    ///
    /// INVARIANT: not null only while code runs on the stack of the fiber that it belongs to,
    /// inside that fiber's closure. `Fiber::new` sets it on entry, `Fiber::resume` sets it before
    /// it enters a suspended fiber, and puts the old value back when control returns.
    static RUNNING: Cell<*const Yields> = const { Cell::new(ptr::null()) };
}

/// Puts the value of the resuming side back, also when a closure panics.
struct Resuming(*const Yields);

impl Drop for Resuming {
    fn drop(&mut self) {
        RUNNING.set(self.0);
    }
}

/// Where a fiber is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It suspended itself, and can be resumed.
    Suspended,
    /// Its closure has returned.
    Done,
}

/// A closure with a stack of its own.
///
/// Dropping a fiber that is not done *leaks* its stack and all that stands on it. Unwinding would
/// run code that may suspend, which nobody could answer: the scheduler ends its fibers before.
pub(super) struct Fiber {
    coroutine: ManuallyDrop<Coroutine<(), (), (), DefaultStack>>,
    yielder: *const Yields,
}

impl fmt::Debug for Fiber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fiber").finish_non_exhaustive()
    }
}

impl Fiber {
    /// Prepares `body`; nothing runs yet.
    pub(super) fn new(stack: DefaultStack, body: impl FnOnce() + 'static) -> Self {
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Yields, ()| {
            RUNNING.set(yielder);
            body();
        });
        Self {
            coroutine: ManuallyDrop::new(coroutine),
            yielder: ptr::null(),
        }
    }

    /// Runs the fiber until it suspends itself or is done.
    ///
    /// # Panics
    /// When it is done already.
    pub(super) fn resume(&mut self) -> Life {
        // Before `RUNNING` is touched: the yielder of a fiber that is done is gone.
        assert!(!self.coroutine.done(), "a fiber runs once");
        let resuming = Resuming(RUNNING.replace(self.yielder));
        let result = self.coroutine.resume(());
        self.yielder = RUNNING.get();
        drop(resuming);
        match result {
            CoroutineResult::Yield(()) => Life::Suspended,
            CoroutineResult::Return(()) => Life::Done,
        }
    }

    /// The stack of a fiber that is done, to be used again.
    pub(super) fn into_stack(self) -> Option<DefaultStack> {
        let coroutine = ManuallyDrop::into_inner(self.coroutine);
        if coroutine.done() {
            return Some(coroutine.into_stack());
        }
        let _leaked = ManuallyDrop::new(coroutine);
        None
    }
}

/// Whether the caller runs on a fiber.
#[cfg(test)]
pub(super) fn on_fiber() -> bool {
    !RUNNING.get().is_null()
}

/// Goes back to whoever resumed the running fiber, until it is resumed again.
///
/// # Panics
/// When no fiber runs.
#[inline]
pub(super) fn suspend() {
    let running = RUNNING.get();
    assert!(!running.is_null(), "only a fiber can be suspended");
    // SAFETY: by the invariant of `RUNNING` this code runs inside the closure of the fiber to
    // which the yielder belongs, on its stack; the coroutine passed the yielder to that closure by
    // a reference that is valid until it returns. Yielders are shared, never mutably borrowed.
    let yielder = unsafe { &*running };
    yielder.suspend(());
}

/// The mutex under every lock of a model world: it blocks the actor, not the thread.
///
/// The world is the one that runs on the locking thread. Outside a world the mutex works as long
/// as nobody has to wait.
#[derive(Debug)]
pub struct ModelMutex {
    word: LockWord,
}

// SAFETY: `LockWord::take` and `LockWord::try_take` return normally, or with true, only after
// they changed the word from free to held by one atomic exchange, and only `LockWord::release`
// makes it free; so there is one holder at a time, on any number of threads.
unsafe impl lock_api::RawMutex for ModelMutex {
    const INIT: Self = Self {
        word: LockWord::new(),
    };
    type Guard = GuardNoSend;

    #[track_caller]
    #[inline]
    fn lock(&self) -> GuardNoSend {
        self.word.take(Location::caller());
        GuardNoSend::new()
    }

    #[track_caller]
    #[inline]
    fn try_lock(&self) -> Option<GuardNoSend> {
        self.word
            .try_take(Location::caller())
            .then(GuardNoSend::new)
    }

    #[inline]
    unsafe fn unlock(&self, _guard: GuardNoSend) {
        self.word.release();
    }

    fn is_locked(&self) -> bool {
        self.word.is_held()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn a_fiber_suspends_from_a_nested_call_and_goes_on() {
        let seen = Rc::new(Cell::new(0));
        let inner = Rc::clone(&seen);
        let stack = DefaultStack::new(64 << 10).expect("memory for a stack");
        let mut fiber = Fiber::new(stack, move || {
            for n in 1..=3 {
                inner.set(n);
                suspend();
            }
        });
        for n in 1..=3 {
            assert_eq!((fiber.resume(), seen.get()), (Life::Suspended, n));
            assert!(!on_fiber());
        }
        assert_eq!(fiber.resume(), Life::Done);
        assert!(fiber.into_stack().is_some());
    }

    #[test]
    fn fibers_nest() {
        let stack = || DefaultStack::new(64 << 10).expect("memory for a stack");
        let mut outer = Fiber::new(stack(), move || {
            let mut inner = Fiber::new(stack(), suspend);
            assert_eq!(inner.resume(), Life::Suspended);
            suspend();
            assert_eq!(inner.resume(), Life::Done);
        });
        assert_eq!(outer.resume(), Life::Suspended);
        assert_eq!(outer.resume(), Life::Done);
    }

    #[test]
    fn a_panic_reaches_the_resuming_side_and_leaves_it_in_order() {
        let stack = DefaultStack::new(256 << 10).expect("memory for a stack");
        let mut fiber = Fiber::new(stack, || std::panic::resume_unwind(Box::new(7_u8)));
        let caught = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| fiber.resume()));
        assert!(caught.is_err());
        assert!(!on_fiber());
    }
}
