//! Threads of the runtime: always in the runtime's memory, never disturbed by signals.

use core::fmt;
use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicU32, Ordering};
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle, ScopedJoinHandle};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use rustix::io::Errno;

use crate::sys::arena::RuntimeScope;
use crate::sys::atfork;
use crate::sys::futex;
use crate::sys::owned::{self, OwnedSpan};
use crate::sys::waits::Reason;

/// Stack of a runtime thread.
const STACK_BYTES: usize = 1 << 20;

/// How often a thread asks where its stack is, if a page is away each time.
const STACK_TRIES: usize = 100;

/// A thread cannot be started.
#[derive(Debug)]
pub struct SpawnError(Cause);

#[derive(Debug)]
enum Cause {
    /// The system's answer.
    System(io::Error),
    /// The thread's stack cannot be kept from migrating.
    StackUnknown,
}

impl SpawnError {
    /// The system's error; `EAGAIN` where there are too many threads already.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match &self.0 {
            Cause::System(error) => error
                .raw_os_error()
                .map_or(Errno::AGAIN, Errno::from_raw_os_error),
            Cause::StackUnknown => Errno::AGAIN,
        }
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot start a runtime thread: ")?;
        match &self.0 {
            Cause::System(error) => write!(f, "{error}; raise the limit of threads"),
            Cause::StackUnknown => f.write_str(TOO_MANY),
        }
    }
}

const TOO_MANY: &str =
    "its stack cannot be kept from migrating, there are too many; use fewer device units";

impl core::error::Error for SpawnError {}

/// A running thread of the runtime.
#[derive(Debug)]
pub struct RuntimeThread(JoinHandle<()>);

impl RuntimeThread {
    /// Waits for the thread to end.
    pub fn join(self) {
        if atfork::is_child() {
            // A child has only the thread that forked.
            let _not_here = ManuallyDrop::new(self);
            return;
        }
        let _in_runtime = RuntimeScope::enter();
        // A panic was reported by the thread itself.
        let _ended = self.0.join();
    }
}

/// Starts a thread of the runtime, and returns when it is ready to work.
///
/// Until then a thread runs code of the C library that allocates. The thread that serves faults
/// must be past that before any page can be away, or it waits for itself. The caller holds no lock
/// that fault service wants.
///
/// # Errors
/// The system refuses another thread, or there are too many.
pub fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<RuntimeThread, SpawnError> {
    let _in_runtime = RuntimeScope::enter();
    let builder = Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    let start = Arc::new(Start(AtomicU32::new(Start::PENDING)));
    let told = Arc::clone(&start);
    let masked = SignalMask::block_all();
    let handle = builder.spawn(move || {
        let _in_runtime = RuntimeScope::enter();
        let stack = own_stack().and_then(take_over);
        match &stack {
            Some(_known) => {
                told.tell(Start::READY);
                work();
            }
            None => told.tell(Start::FAILED),
        }
    });
    drop(masked);
    let thread = handle
        .map(RuntimeThread)
        .map_err(|error| SpawnError(Cause::System(error)))?;
    if start.wait() {
        return Ok(thread);
    }
    thread.join();
    Err(SpawnError(Cause::StackUnknown))
}

/// How a thread tells its creator that it is ready.
struct Start(AtomicU32);

impl Start {
    const PENDING: u32 = 0;
    const READY: u32 = 1;
    const FAILED: u32 = 2;

    fn tell(&self, state: u32) {
        // Pairs with the load in `wait`.
        self.0.store(state, Ordering::Release);
        futex::wake(&self.0);
    }

    /// Waits; true when the thread is ready, false when it gave up.
    fn wait(&self) -> bool {
        while self.0.load(Ordering::Acquire) == Self::PENDING {
            futex::wait(&self.0, Self::PENDING, None, Reason::Start);
        }
        self.0.load(Ordering::Acquire) == Self::READY
    }
}

/// Runs `work(0)` to `work(count - 1)`, each on a runtime thread of its own, and returns their
/// results in order. The caller only waits.
///
/// # Panics
/// Where the system refuses the threads, there are too many, or `work` panics.
pub fn run_scoped<R: Send>(count: usize, work: &(impl Fn(usize) -> R + Sync)) -> Vec<R> {
    let in_runtime = RuntimeScope::enter();
    let results = std::thread::scope(|scope| {
        let masked = SignalMask::block_all();
        let handles: Vec<_> = (0..count)
            .map(|n| spawn_scoped(scope, n, move || work(n)))
            .collect();
        drop(masked);
        handles.into_iter().map(join_scoped).collect()
    });
    drop(in_runtime);
    results
}

/// Runs `work` on a runtime thread of its own and returns its result. The caller only waits.
///
/// # Panics
/// As [`run_scoped`].
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let in_runtime = RuntimeScope::enter();
    let result = std::thread::scope(|scope| {
        let masked = SignalMask::block_all();
        let handle = spawn_scoped(scope, 0, work);
        drop(masked);
        join_scoped(handle)
    });
    drop(in_runtime);
    result
}

fn spawn_scoped<'scope, R: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    n: usize,
    work: impl FnOnce() -> R + Send + 'scope,
) -> ScopedJoinHandle<'scope, R> {
    let builder = Builder::new()
        .name(format!("gpusvm-{n}"))
        .stack_size(STACK_BYTES);
    let handle = builder.spawn_scoped(scope, || on_known_stack(work));
    handle.expect("the system refuses a thread; raise the limit of threads")
}

fn join_scoped<R>(handle: ScopedJoinHandle<'_, R>) -> R {
    match handle.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn on_known_stack<R>(work: impl FnOnce() -> R) -> R {
    let _in_runtime = RuntimeScope::enter();
    let stack = own_stack().and_then(take_over);
    // Going on would work until the stack migrates under the feet of a lock's holder.
    assert!(stack.is_some(), "{TOO_MANY}");
    work()
}

/// From now on the calling thread displaces no other when it wakes up (`SCHED_BATCH`): for work that
/// is not urgent.
pub(crate) fn let_others_first() {
    // SAFETY: all-zero is a valid parameter: no real-time priority.
    let parameter: libc::sched_param = unsafe { core::mem::zeroed() };
    // SAFETY: concerns the calling thread only. A refusal leaves it as urgent as it was.
    let _changed = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter) };
}

/// Kernel id of the calling thread.
pub(crate) fn current_id() -> u32 {
    u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or(0)
}

/// Whether part of `span` is memory of the runtime's own, which never migrates and which no
/// device may map.
pub(crate) fn runtime_owns(span: HostSpan) -> bool {
    owned::owns(span)
}

/// This thread's stack, as [`stack_of`].
fn own_stack() -> Option<HostSpan> {
    // SAFETY: always valid.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: the calling thread lives.
    unsafe { stack_of(this) }
}

/// Declares the calling thread's stack as the runtime's, and brings all of it home: the C library
/// may have given it a stack that was nobody's for a while.
fn take_over(stack: HostSpan) -> Option<OwnedSpan> {
    let owned = OwnedSpan::declare(stack)?;
    for page in 0..stack.pages().get() {
        let at = stack.start().plus(page * PAGE).get();
        let at: *const u8 = core::ptr::with_exposed_provenance(usize::try_from(at).ok()?);
        // SAFETY: readable memory of this thread's own stack, whose value is not used.
        let _home = unsafe { at.read_volatile() };
    }
    Some(owned)
}

/// A thread's stack mapping, which holds its thread-locals as well. Allocates from the C library's
/// heap, so it is for a thread's start only.
///
/// # Safety
/// The thread has not been joined.
unsafe fn stack_of(thread: libc::pthread_t) -> Option<HostSpan> {
    // SAFETY: all-zero is a valid, uninitialised attribute object for the next call to fill.
    let mut attributes: libc::pthread_attr_t = unsafe { core::mem::zeroed() };
    // The C library lets the system write into a block of its heap. Where system calls cannot wait for
    // pages, that fails when the block has just left.
    let mut asked = libc::EFAULT;
    for _try in 0..STACK_TRIES {
        // SAFETY: the thread can be asked, as the caller promises; `attributes` is ours, and as it was
        // before after a failure.
        asked = unsafe { libc::pthread_getattr_np(thread, &raw mut attributes) };
        if asked != libc::EFAULT {
            break;
        }
    }
    if asked != 0 {
        return None;
    }
    let (mut start, mut bytes) = (core::ptr::null_mut(), 0);
    // SAFETY: the attributes were filled above.
    let got = unsafe {
        libc::pthread_attr_getstack(&raw const attributes, &raw mut start, &raw mut bytes)
    };
    // SAFETY: they are not used again.
    let _destroyed = unsafe { libc::pthread_attr_destroy(&raw mut attributes) };
    let start = HostVa::new(u64::try_from(start.addr()).ok()?);
    let bytes = u64::try_from(bytes).ok()?;
    (got == 0).then(|| HostSpan::at(start, bytes))
}

/// All signals blocked in this thread, and so in those it starts, until dropped.
struct SignalMask(libc::sigset_t);

impl SignalMask {
    fn block_all() -> Self {
        // SAFETY: all-zero is a valid set: empty.
        let mut all: libc::sigset_t = unsafe { core::mem::zeroed() };
        // SAFETY: as above.
        let mut former: libc::sigset_t = unsafe { core::mem::zeroed() };
        // SAFETY: `all` is a valid set.
        let _filled = unsafe { libc::sigfillset(&raw mut all) };
        // Faults stay deliverable: the bus turns them into answers.
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: `all` is a valid set, the signals are valid.
            let _removed = unsafe { libc::sigdelset(&raw mut all, signal) };
        }
        // SAFETY: both sets are valid; SIG_BLOCK only delays signals.
        let _blocked =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut former) };
        Self(former)
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // SAFETY: the set is the one this thread had before.
        let _restored = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, core::ptr::null_mut())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicBool;
    use std::os::unix::thread::JoinHandleExt;

    #[test]
    fn scoped_threads_return_in_order_and_their_stacks_are_the_runtimes() {
        let owned = run_scoped(3, &|n| {
            let local = 0_u8;
            let here = u64::try_from((&raw const local).addr()).expect("64-bit");
            (n, runtime_owns(HostSpan::at(HostVa::new(here), 1)), here)
        });
        assert_eq!(
            owned.iter().map(|(n, ..)| *n).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert!(owned.iter().all(|(_, owned, _)| *owned));
        assert!(
            !runtime_owns(HostSpan::at(HostVa::new(owned[0].2), 1)),
            "given up at its end"
        );
    }

    #[test]
    fn spawned_thread_has_left_its_start_behind_when_spawn_returns() {
        for _ in 0..50 {
            let stop = Arc::new(AtomicBool::new(false));
            let told = Arc::clone(&stop);
            let thread = spawn("test", move || {
                while !told.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
            })
            .expect("one more thread");
            // SAFETY: it is joined below.
            let stack = unsafe { stack_of(thread.0.as_pthread_t()) }.expect("a stack");
            let known = runtime_owns(stack);
            stop.store(true, Ordering::Relaxed);
            thread.join();
            assert!(known);
        }
    }

    #[test]
    fn spawned_thread_allocates_runtime_memory() {
        let (send, receive) = std::sync::mpsc::channel();
        let thread = spawn("test", move || {
            let block = Box::new(1_u8);
            let at = u64::try_from((&raw const *block).addr()).expect("64-bit");
            send.send(runtime_owns(HostSpan::at(HostVa::new(at), 1)))
                .expect("the test listens");
        })
        .expect("one more thread");
        assert!(receive.recv().expect("the thread answers"));
        thread.join();
    }
}
