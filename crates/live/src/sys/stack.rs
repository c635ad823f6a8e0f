//! Stacks of the runtime for threads of the process: brackets and faults are served on them.
//!
//! A thread's own stack may be memory that can migrate, and an alternate signal stack is often too
//! small. A thread on one of these is in the runtime (see [`arena`]).

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

use crate::sys::arena;

/// How many, one bit of [`FREE`] each.
const STACKS: usize = 64;
/// log2 of a stack's bytes.
pub(super) const STACK_SHIFT: u32 = 16;
const STACK: usize = 1 << STACK_SHIFT;
const GUARD: usize = 4096;

/// Stacks that are free, one bit each.
#[unsafe(link_section = ".data")]
pub(super) static FREE: AtomicU64 = AtomicU64::new(0);
/// End of the first stack; 0 before they are mapped.
#[unsafe(link_section = ".data")]
pub(super) static FIRST_TOP: AtomicUsize = AtomicUsize::new(0);

global_asm!(
    ".text",
    ".globl gpusvm_switch_stack",
    ".hidden gpusvm_switch_stack",
    ".balign 16",
    "gpusvm_switch_stack:",
    "    push rbx",
    "    mov rbx, rsp",
    "    mov rsp, rdi",
    "    mov rdi, rsi",
    "    call rdx",
    "    mov rsp, rbx",
    "    pop rbx",
    "    ret",
);

unsafe extern "sysv64" {
    /// Calls `work(argument)` on the stack that ends at `top`, which is aligned to 16 bytes.
    fn gpusvm_switch_stack(top: usize, argument: *mut (), work: unsafe extern "sysv64" fn(*mut ()));
}

/// Maps the stacks, once per process.
///
/// # Errors
/// The system's.
pub(super) fn prepare() -> Result<(), Errno> {
    if FIRST_TOP.load(Ordering::Relaxed) != 0 {
        return Ok(());
    }
    let base = map()?;
    arena::set_bracket_stacks(base, base + STACKS * STACK);
    FIRST_TOP.store(base + STACK, Ordering::Release);
    FREE.store(u64::MAX, Ordering::Release);
    Ok(())
}

/// In a child, which has only the thread that forked: the stacks of all others are free.
pub(crate) fn begin_anew() {
    if FIRST_TOP.load(Ordering::Relaxed) != 0 {
        FREE.store(u64::MAX, Ordering::Release);
    }
}

/// Maps all stacks, the lowest page of each as a guard, and one more guard behind the last, which
/// keeps the system from joining that stack with a neighbour's mapping.
fn map() -> Result<usize, Errno> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, which overlaps nothing.
    let base = unsafe {
        mmap_anonymous(
            core::ptr::null_mut(),
            STACKS * STACK + GUARD,
            access,
            MapFlags::PRIVATE,
        )
    }?;
    for n in 0..=STACKS {
        let guard = base.wrapping_byte_add(n * STACK);
        // SAFETY: the page belongs to the new mapping, which nobody uses yet.
        unsafe { mprotect(guard, GUARD, MprotectFlags::empty()) }?;
    }
    Ok(base.expose_provenance())
}

/// A stack, taken until it is dropped.
struct Taken(u32);

impl Taken {
    /// Takes one; looks until one is free. The stacks are prepared.
    fn take() -> Self {
        loop {
            let free = FREE.load(Ordering::Relaxed);
            let number = free.trailing_zeros();
            let rest = free & free.wrapping_sub(1);
            if free != 0
                && FREE
                    .compare_exchange_weak(free, rest, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return Self(number);
            }
            core::hint::spin_loop();
        }
    }

    fn top(&self) -> usize {
        let index = usize::try_from(self.0).unwrap_or(0);
        FIRST_TOP.load(Ordering::Acquire) + index * STACK
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        FREE.fetch_or(1 << self.0, Ordering::Release);
    }
}

/// Runs `work` on a stack of the runtime's, where it may not panic. All signals but faults are
/// blocked by the caller, who has called [`prepare`].
pub(super) fn run<R>(work: impl FnOnce() -> R) -> Option<R> {
    struct Job<F, R> {
        work: Option<F>,
        result: Option<R>,
    }
    unsafe extern "sysv64" fn start<F: FnOnce() -> R, R>(job: *mut ()) {
        // SAFETY: `run` passes its job, which lives until the switch back.
        let job = unsafe { &mut *job.cast::<Job<F, R>>() };
        job.result = job.work.take().map(|work| work());
    }
    fn starter<F: FnOnce() -> R, R>(_job: &Job<F, R>) -> unsafe extern "sysv64" fn(*mut ()) {
        start::<F, R>
    }
    let mut job = Job {
        work: Some(work),
        result: None,
    };
    let start = starter(&job);
    let stack = Taken::take();
    // SAFETY: the stack is ours alone until it is dropped, its end is aligned to its size, and
    // `start` is made for this job.
    unsafe { gpusvm_switch_stack(stack.top(), (&raw mut job).cast(), start) };
    job.result
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{HostSpan, HostVa};

    use crate::sys::child::{By, Child};

    #[test]
    fn child_that_begins_anew_has_all_stacks() {
        prepare().expect("stacks can be mapped");
        // As another thread has one, which the child does not have.
        let taken = Taken::take();
        let child = Child::make(By::Fork, || {
            begin_anew();
            FREE.load(Ordering::Relaxed) == u64::MAX
        });
        drop(taken);
        assert!(child.expect("a child").passed().expect("it ends"));
    }

    #[test]
    fn work_runs_on_a_stack_of_the_runtime_which_is_free_again_afterwards() {
        prepare().expect("stacks can be mapped");
        let stacks = arena::bracket_stacks();
        for n in 0..1000_u64 {
            let at = run(|| {
                let local = n;
                (&raw const local).addr()
            });
            let at = u64::try_from(at.expect("it ran")).expect("64-bit");
            assert!(stacks.overlaps(HostSpan::at(HostVa::new(at), 8)));
        }
    }
}
