//! fork: a child gets the memory that the parent has, and nobody gets the other's writes.
//!
//! `fork()` copies page tables, and pages that are away are not in them. So before it everything
//! comes home, and nothing leaves until it is over:
//!
//! ```text
//!  fork():      change(everything) ─ bring all home ─ FORK ─┬─ parent: changes may go on
//!                                                           └─ child: gives the runtime up
//!  raw clone:   FORK ─ event ─ [what was away] ─ bring home ─ copy into the child ─ close
//! ```
//!
//! A clone that bypasses the C library is seen afterwards, by an event that brings a descriptor of
//! the child's memory. The child waits at the pages that were away, and gets copies of them. What
//! the parent or a device has written to them since the clone is in those copies: the only way in
//! which such a child can see a later write. `vfork` and `posix_spawn` share the parent's memory
//! and need nothing.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::Mutex;
use rustix::io::Errno;

use crate::bracket;
use crate::env::LiveEnv;
use crate::residency::everything;
use crate::space::LiveSpace;
use crate::sys::atfork::{self, ForkHook};
use crate::sys::futex;
use crate::sys::thread::{self, RuntimeThread, SpawnError};
use crate::sys::uffd::Uffd;

/// Forks that are going on.
#[derive(Debug, Default)]
pub(crate) struct Forks(AtomicU32);

struct Hook;

/// Makes forks of this process safe. Once per process.
pub(crate) fn install() {
    atfork::install(&Hook);
}

impl ForkHook for Hook {
    /// On a stack of the runtime's, because the forking thread's own may be away.
    fn prepare(&self) {
        if let Some(space) = bracket::current_space() {
            thread::run(|| space.before_fork());
        }
    }

    /// On the forking thread's own stack, which is home until the change ends.
    fn parent(&self) {
        if let Some(space) = bracket::current_space() {
            space.after_fork();
        }
    }
}

impl LiveSpace {
    fn before_fork(&self) {
        self.forks.0.fetch_add(1, Ordering::AcqRel);
        self.residency.lock().change(everything());
        self.bring_home(everything(), HomeCause::SpaceChange);
    }

    fn after_fork(&self) {
        let end_one = |n: u32| n.checked_sub(1);
        // None is running where the space was opened during the fork.
        if self
            .forks
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, end_one)
            .is_ok()
        {
            self.residency.lock().unchange(everything());
            self.announce_change();
        }
    }
}

/// A child of a raw clone, with the spans that were away when it was made.
#[derive(Debug)]
struct Orphan {
    memory: Uffd,
    away: Vec<HostSpan>,
}

/// The thread that gives children of raw clones what was away. The reader may not: it would wait
/// for migrations that wait for it.
#[derive(Debug)]
pub(crate) struct Nursery {
    waiting: Mutex<LiveEnv, Vec<Orphan>>,
    /// Bumped when one comes, or at the end.
    called: AtomicU32,
    stop: AtomicBool,
    thread: Mutex<LiveEnv, Option<RuntimeThread>>,
}

impl Default for Nursery {
    fn default() -> Self {
        Self {
            waiting: Mutex::<LiveEnv, _>::new(Vec::new()),
            called: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            thread: Mutex::<LiveEnv, _>::new(None),
        }
    }
}

impl Nursery {
    /// Starts the thread. It ends by [`stop`](Self::stop).
    pub(crate) fn start(space: &Arc<LiveSpace>) -> Result<(), SpawnError> {
        let nurse = Arc::clone(space);
        let thread = thread::spawn("gpusvm-children", move || nurse.nursery.run(&nurse))?;
        *space.nursery.thread.lock() = Some(thread);
        Ok(())
    }

    /// Takes a child in; `away` are the spans that it misses. For the reader: waits for nothing.
    pub(crate) fn admit(&self, memory: Uffd, away: Vec<HostSpan>) {
        if away.is_empty() {
            // Nothing is missing: the child's registrations end with the descriptor.
            return;
        }
        self.waiting.lock().push(Orphan { memory, away });
        self.call();
    }

    /// Ends the thread, after the children that wait.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.call();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            thread.join();
        }
    }

    fn call(&self) {
        self.called.fetch_add(1, Ordering::Release);
        futex::wake(&self.called);
    }

    fn run(&self, space: &LiveSpace) {
        loop {
            let seen = self.called.load(Ordering::Acquire);
            let next = self.waiting.lock().pop();
            match next {
                Some(orphan) => feed(space, &orphan),
                None if self.stop.load(Ordering::Acquire) => return,
                None => futex::wait(&self.called, seen, None),
            }
        }
    }
}

/// Copies into a child what it misses. Closing its descriptor afterwards lets it go on.
fn feed(space: &LiveSpace, orphan: &Orphan) {
    for span in &orphan.away {
        space.residency.lock().change(*span);
        space.bring_home(*span, HomeCause::SpaceChange);
        copy_present(space, &orphan.memory, *span);
        space.residency.lock().unchange(*span);
        space.announce_change();
    }
}

/// Copies the pages of `span` that are home into the same places of a child.
fn copy_present(space: &LiveSpace, child: &Uffd, span: HostSpan) {
    let mut rest = span;
    while let Some(run) = space.first_populated(rest) {
        let copied = child.copy(run.start(), run);
        let done = run.start().plus(copied.bytes);
        let next = match copied.error {
            None => run.end(),
            Some(Errno::AGAIN) => done,
            // The child, or its mapping there, is gone; or it has the page.
            Some(Errno::SRCH) => return,
            Some(_) => done.plus(PAGE),
        };
        rest = HostSpan::new(next, span.end());
    }
}

#[cfg(test)]
mod tests;
