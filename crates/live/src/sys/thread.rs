//! Threads of the runtime: always in the runtime's memory, never disturbed by signals.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;
use std::thread::{Builder, JoinHandle, ScopedJoinHandle};

use gpusvm::addr::{HostSpan, HostVa};
use rustix::io::Errno;

use crate::sys::arena::{self, RuntimeScope};

/// Stack of a runtime thread.
const STACK_BYTES: usize = 1 << 20;
/// Runtime threads at one time whose stacks are known; more are refused.
const THREADS: usize = 256;

/// Stacks of living runtime threads; an empty place has end 0. Each pair changes hands by its end.
static STACKS: [(AtomicU64, AtomicU64); THREADS] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; THREADS];

/// A thread cannot be started.
#[derive(Debug)]
pub struct SpawnError(io::Error);

impl SpawnError {
    /// The system's error.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.0
            .raw_os_error()
            .map_or(Errno::AGAIN, Errno::from_raw_os_error)
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cannot start a runtime thread: {}; raise the limit of threads",
            self.0
        )
    }
}

impl core::error::Error for SpawnError {}

/// A running thread of the runtime.
#[derive(Debug)]
pub struct RuntimeThread(JoinHandle<()>);

impl RuntimeThread {
    /// Waits for the thread to end.
    pub fn join(self) {
        let _in_runtime = RuntimeScope::enter();
        // A panic was reported by the thread itself.
        let _ended = self.0.join();
    }
}

/// Starts a thread of the runtime.
///
/// # Errors
/// The system refuses another thread.
pub fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<RuntimeThread, SpawnError> {
    let _in_runtime = RuntimeScope::enter();
    let builder = Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    let masked = SignalMask::block_all();
    let handle = builder.spawn(|| run(work));
    drop(masked);
    handle.map(RuntimeThread).map_err(SpawnError)
}

/// Runs `work(0)` to `work(count - 1)`, each on a runtime thread of its own, and returns their
/// results in order. The caller only waits.
///
/// # Panics
/// Where the system refuses the threads, or `work` panics.
pub fn run_scoped<R: Send>(count: usize, work: &(impl Fn(usize) -> R + Sync)) -> Vec<R> {
    let in_runtime = RuntimeScope::enter();
    let results = std::thread::scope(|scope| {
        let masked = SignalMask::block_all();
        let handles: Vec<ScopedJoinHandle<'_, R>> = (0..count)
            .map(|n| {
                let builder = Builder::new()
                    .name(format!("gpusvm-{n}"))
                    .stack_size(STACK_BYTES);
                let handle = builder.spawn_scoped(scope, move || run(|| work(n)));
                handle.expect("the system refuses a thread; raise the limit of threads")
            })
            .collect();
        drop(masked);
        let join = |handle: ScopedJoinHandle<'_, R>| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        handles.into_iter().map(join).collect()
    });
    drop(in_runtime);
    results
}

fn run<R>(work: impl FnOnce() -> R) -> R {
    let _in_runtime = RuntimeScope::enter();
    let _known = KnownStack::register();
    work()
}

/// Kernel id of the calling thread.
pub(crate) fn current_id() -> u32 {
    u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap_or(0)
}

/// Whether part of `span` is memory of the runtime's own, which never migrates and which no
/// device may map.
pub(crate) fn runtime_owns(span: HostSpan) -> bool {
    arena::arena_span().overlaps(span)
        || STACKS.iter().any(|(start, end)| {
            let end = end.load(Ordering::Acquire);
            let start = start.load(Ordering::Relaxed);
            HostSpan::new(HostVa::new(start), HostVa::new(end)).overlaps(span)
        })
}

/// The entry of this thread's stack among [`STACKS`].
struct KnownStack(usize);

impl KnownStack {
    fn register() -> Option<Self> {
        let (start, end) = own_stack()?;
        let free = |place: &(AtomicU64, AtomicU64)| {
            // 1 marks the place as taken while its start is written.
            place
                .1
                .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let index = STACKS.iter().position(free)?;
        STACKS[index].0.store(start, Ordering::Relaxed);
        STACKS[index].1.store(end, Ordering::Release);
        Some(Self(index))
    }
}

impl Drop for KnownStack {
    fn drop(&mut self) {
        STACKS[self.0].1.store(0, Ordering::Release);
    }
}

/// First and last address of this thread's stack mapping, which holds its thread-locals as well.
fn own_stack() -> Option<(u64, u64)> {
    // SAFETY: all-zero is a valid, uninitialised attribute object for the next call to fill.
    let mut attributes: libc::pthread_attr_t = unsafe { core::mem::zeroed() };
    // SAFETY: always valid.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: asks for the calling thread, which lives.
    let asked = unsafe { libc::pthread_getattr_np(this, &raw mut attributes) };
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
    let start = u64::try_from(start.addr()).ok()?;
    let end = start.checked_add(u64::try_from(bytes).ok()?)?;
    (got == 0).then_some((start, end))
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
