//! fork: a child gets the memory that the parent has, and nobody gets the other's writes.
//!
//! `fork()` copies page tables, and pages that are away are not in them. So before it everything
//! comes home, and nothing leaves until it is over:
//!
//! ```text
//!  fork():      hold(everything) ─ bring all home ─ FORK ─┬─ parent: pages may leave again
//!                                                         └─ child: gives the runtime up
//!  raw clone:   FORK ─ event ─ [what was away] ─ bring home ─ copy into the child ─ close
//! ```
//!
//! A clone that bypasses the C library is seen afterwards, by an event that brings a descriptor of
//! the child's memory. The child waits at the pages that were away, and gets copies of them. What
//! the parent or a device has written to them since the clone is in those copies: the only way in
//! which such a child can see a later write. Until it has its copies, calls of the parent that change
//! the mappings or drop the content wait: from the moment in which the event is read, which is before
//! the clone returns. A call past the brackets does not wait, and the child reads zeros where it took
//! content away. `vfork` and `posix_spawn` share the parent's memory and need nothing.
//!
//! Memory that the parent keeps from its children (`MADV_WIPEONFORK`) is zero there in both cases: the
//! system copies none, and neither is it copied here.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::{Environment, Ns};
use rustix::io::Errno;

use crate::bracket;
use crate::in_thread;
use crate::pool::{Change, Fate};
use crate::residency::everything;
use crate::shard::BATCH;
use crate::space::LiveSpace;
use crate::sys::atfork::{self, ForkHook};
use crate::sys::heap;
use crate::sys::process_lock::Freed;
use crate::sys::smaps;
use crate::sys::stack;
use crate::sys::thread;
use crate::sys::uffd::{Message, Uffd};

/// Forks that are going on.
#[derive(Debug, Default)]
pub(crate) struct Forks(AtomicU32);

/// Lets a child of a process with a live space have one of its own. Elsewhere it does nothing.
///
/// Only the thread that forked may be there, and nothing of the parent's space may be used any more:
/// what the child still has of it is given up as it is.
pub fn begin_anew() {
    if atfork::begin_anew() {
        bracket::forget_space();
        in_thread::stop();
        heap::begin_anew();
        stack::begin_anew();
    }
}

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

    fn locks(&self) -> [&'static dyn Freed; 2] {
        bracket::process_locks()
    }
}

impl LiveSpace {
    fn before_fork(&self) {
        self.forks.0.fetch_add(1, Ordering::AcqRel);
        self.residency.lock().hold(everything());
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
            self.residency.lock().release_hold(everything());
            self.announce_change();
        }
    }
}

/// A child of a raw clone, with the spans that were away when it was made.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) memory: Uffd,
    /// What it has not got yet. The residency table knows it as owed.
    pub(crate) away: Vec<HostSpan>,
    /// What it has done to its memory since, as far as that has been read.
    changes: Vec<Change>,
    /// How often it may still find no memory for a page.
    patience: u32,
}

/// How long a child that finds no memory for its pages waits for some in all: two seconds.
const PATIENCE: u32 = 2000;
const NAP: Ns = Ns::from_millis(1);

impl Orphan {
    pub(crate) const fn new(memory: Uffd, away: Vec<HostSpan>) -> Self {
        Self {
            memory,
            away,
            changes: Vec::new(),
            patience: PATIENCE,
        }
    }

    /// Reads what the child is about to do. It waits for that, and until then its memory takes nothing.
    fn read(&mut self, space: &LiveSpace) {
        let mut messages = [const { Message::None }; BATCH];
        let count = self.memory.read(&mut messages).unwrap_or(0);
        for message in messages.into_iter().take(count) {
            self.changes.push(match message {
                Message::Unmap(span) => Change::Unmap(span),
                Message::Remove(span) => Change::Remove(span),
                Message::Remap { from, to } => Change::Move { from, to },
                // A child of the child's misses the same.
                Message::Fork(memory) => {
                    let away = self.away.clone();
                    space.residency.lock().owe(&away);
                    space.attendant.adopt(Self {
                        changes: self.changes.clone(),
                        ..Self::new(memory, away)
                    });
                    continue;
                }
                // Whoever waits goes on at the end.
                Message::Fault { .. } | Message::None => continue,
            });
        }
    }

    /// Where the child has the first pages of `span` by now.
    fn fate(&self, span: HostSpan) -> Fate {
        let changes = self.changes.iter();
        changes.fold(Fate::home(span), |fate, change| fate.after(change))
    }
}

/// Copies into a child what it misses. Closing its descriptor afterwards lets it go on.
pub(crate) fn feed(space: &LiveSpace, mut orphan: Orphan) {
    let wiped = smaps::wiped_on_fork();
    while let Some(span) = orphan.away.last().copied() {
        space.residency.lock().hold(span);
        for part in wiped.without(span) {
            space.bring_home(part, HomeCause::SpaceChange);
            copy_present(space, &mut orphan, part);
        }
        let mut table = space.residency.lock();
        table.release_hold(span);
        table.settle_debt(span);
        drop(table);
        space.announce_change();
        orphan.away.pop();
    }
}

/// Copies the pages of `span` that are home to where a child has them.
fn copy_present(space: &LiveSpace, child: &mut Orphan, span: HostSpan) {
    let mut rest = span;
    // Bytes of one copy: what does not lie in one mapping of the child is refused as a whole.
    let mut most = u64::MAX;
    while let Some(run) = space.first_populated(rest) {
        let fate = child.fate(run);
        let run = HostSpan::at(run.start(), fate.bytes.min(most));
        let next = match fate.place {
            // The child has dropped them.
            None => run.end(),
            Some(place) => {
                let copied = child.memory.copy(place, run);
                let done = run.start().plus(copied.bytes);
                match copied.error {
                    None => {
                        most = most.saturating_mul(2);
                        run.end()
                    }
                    Some(Errno::AGAIN) => {
                        child.read(space);
                        rustix::thread::sched_yield();
                        done
                    }
                    Some(Errno::NOMEM) if child.patience > 0 => {
                        child.patience -= 1;
                        space.env.sleep_until(space.env.now().after(NAP));
                        done
                    }
                    Some(Errno::NOENT) if run.bytes() > PAGE => {
                        most = run.bytes().div_ceil(2).next_multiple_of(PAGE);
                        done
                    }
                    // The child is gone.
                    Some(Errno::SRCH) => return,
                    // It has no mapping there that waits for pages; or it has the page.
                    Some(_) => done.plus(PAGE),
                }
            }
        };
        rest = HostSpan::new(next, span.end());
    }
}

#[cfg(test)]
mod tests;
