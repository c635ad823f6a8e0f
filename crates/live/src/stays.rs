//! What stays: memory in which a fault cannot be waited for.
//!
//! | what | why | where |
//! |---|---|---|
//! | control blocks of threads | at a thread's end the kernel clears a word there, and whoever joins the thread waits for that; a missing page is passed over | around the head of the robust list; the top of every stack of the C library's, where the block of its next thread will be |
//! | variables of the C library and the dynamic linker, and of the library that the runtime is in | threads that serve faults use them, in `memcpy` for one | as the linker tells |
//! | stacks, where system calls cannot wait for pages | signal frames, and the id of a new thread | memory right above what nobody may access, as the C library makes its stacks; the mapping around a control block, but for the first thread's |
//!
//! A stack of the C library's is known by its shape before it has a thread. A thread on a stack that
//! the program gave it is known once it has told the kernel where its block is, which it does before it
//! does anything else, with all signals blocked. Until then nothing has to stay for it: it will touch
//! its block on the way, and whatever left before that comes home. So threads are looked for when one
//! has been made since the last look, and those that have told nothing are asked again, the last time
//! after a span's pages have been marked as travelling.
//!
//! **What is not covered.** A thread on a stack of the program's own that is made and ends between
//! that last look and the moment a few microseconds later when the pages leave. Robust locks of a
//! dying thread, outside its control block, that are away at its end: their next owner is not told.

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::env::Mutex;
use gpusvm::seam::mm::{Vma, VmaKind};
use rustix::io::Errno;

use crate::env::LiveEnv;
use crate::leg::Refused;
use crate::level::FaultLevel;
use crate::space::LiveSpace;
use crate::spans::SpanSet;
use crate::sys::modules;
use crate::sys::procmap::ProcMap;
use crate::sys::thread;
use crate::sys::threads::{ThreadId, Threads, Told};

/// Bytes on each side of the head of a robust list: more than a control block has.
const AROUND: u64 = 2 << 10;
/// The same for the first thread, where system calls cannot wait: its variables, too, into which the
/// kernel writes.
const AROUND_FIRST: u64 = 64 << 10;
/// Bytes at the top of a stack in which the control block lies.
const TOP: u64 = 16 << 10;

/// What stays.
#[derive(Debug)]
pub(crate) struct Stays {
    threads: Threads,
    level: FaultLevel,
    /// Leaf lock but for looks at the system's tables.
    known: Mutex<LiveEnv, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Never changes.
    variables: SpanSet,
    /// The last thread that had been made before the last complete look.
    made: Option<u64>,
    /// Threads that had told nothing at the last look.
    silent: Vec<ThreadId>,
    blocks: SpanSet,
    stacks: SpanSet,
}

impl Stays {
    /// No thread is known yet.
    ///
    /// # Errors
    /// As [`Threads::open`].
    pub(crate) fn open(level: FaultLevel) -> Result<Self, Errno> {
        let mut known = Known::default();
        modules::variables()
            .into_iter()
            .for_each(|span| known.variables.insert(span));
        Ok(Self {
            threads: Threads::open()?,
            level,
            known: Mutex::<LiveEnv, _>::new(known),
        })
    }

    /// Looks at a mapping that nobody watches yet, and so is whole: whether it is a stack, by its
    /// shape. What was known of that place is of another mapping.
    pub(crate) fn judge(&self, procmap: &ProcMap, mapping: HostSpan) {
        let below = HostVa::new(mapping.start().get().saturating_sub(1));
        let under = procmap.query(below).ok().flatten();
        let stack = under.is_some_and(|under| under.span.contains(below) && !under.read);
        let mut known = self.known.lock();
        known.stacks.remove(mapping);
        if stack {
            let top = mapping.end().get().saturating_sub(TOP);
            let from = HostVa::new(top.max(mapping.start().get()));
            let stays = match self.level {
                FaultLevel::Full => HostSpan::new(from, mapping.end()),
                FaultLevel::UserModeOnly | FaultLevel::Mprotect | FaultLevel::Explicit => mapping,
            };
            known.stacks.insert(stays);
        }
    }

    /// The parts of `span` that stay, as of the last look.
    fn within(&self, span: HostSpan) -> Vec<HostSpan> {
        let known = self.known.lock();
        let mut all = SpanSet::default();
        for set in [&known.variables, &known.blocks, &known.stacks] {
            set.within(span)
                .into_iter()
                .for_each(|part| all.insert(part));
        }
        all.within(span)
    }

    /// Whether all of `span` may leave at this moment. Not where the system does not show its threads.
    pub(crate) fn check(&self, procmap: &ProcMap, span: HostSpan) -> Result<(), Refused> {
        let seen = self.look(procmap);
        // A stack may have become the runtime's since the mapping was looked at.
        let free = self.within(span).is_empty() && !thread::runtime_owns(span);
        if free && seen.is_ok() {
            Ok(())
        } else {
            Err(Refused::Mapping)
        }
    }

    /// Looks for threads, if one has been made since the last look, and asks those again that have told
    /// nothing.
    fn look(&self, procmap: &ProcMap) -> Result<(), Errno> {
        let made = self.threads.last_made();
        let mut known = self.known.lock();
        let mut threads = core::mem::take(&mut known.silent);
        if made.is_none() || known.made != made {
            // Incomplete, should the look fail.
            known.made = None;
            threads.clear();
            self.threads.each(|thread| threads.push(thread))?;
            known.blocks = SpanSet::default();
            known.made = made;
        }
        for thread in threads {
            match thread.told() {
                Told::Block(head) => known.blocks.insert(self.around(procmap, thread, head)),
                Told::Nothing => known.silent.push(thread),
                Told::Ended => {}
            }
        }
        Ok(())
    }

    /// What stays around a control block.
    fn around(&self, procmap: &ProcMap, thread: ThreadId, head: HostVa) -> HostSpan {
        let bytes = match self.level {
            FaultLevel::Full => AROUND,
            // Its stack lies elsewhere, and is used in place because it grows. Its block is in a mapping of the
            // dynamic linker's, which the system joins with the program's.
            _ if thread.is_first() => AROUND_FIRST,
            FaultLevel::UserModeOnly | FaultLevel::Mprotect | FaultLevel::Explicit => {
                return mapping_of(procmap, head);
            }
        };
        let from = HostVa::new(head.get().saturating_sub(bytes));
        let near = HostSpan::new(from, head.plus(bytes)).align_outward(PAGE);
        // What begins behind a stack is not of the thread.
        near.intersect(mapping_of(procmap, head)).unwrap_or(near)
    }
}

/// The mapping at `at`, or nothing.
fn mapping_of(procmap: &ProcMap, at: HostVa) -> HostSpan {
    let found = procmap.query(at).ok().flatten();
    found
        .filter(|found| found.span.contains(at))
        .map_or(HostSpan::at(at, 0), |found| found.span)
}

impl LiveSpace {
    /// What of `vma` can be used in one way around `at`: cut where guards are, and where memory
    /// stays. Looks no further than the 2 MiB around `at`, in which every range lies.
    pub(crate) fn piece_at(&self, vma: Vma, at: HostVa) -> Vma {
        let mut vma = self.between_guards(vma, at);
        if vma.kind != VmaKind::Anonymous {
            return vma;
        }
        let block = HostSpan::at(at.align_down(PAGE_2M), PAGE_2M);
        let Some(near) = block.intersect(vma.span) else {
            return vma;
        };
        for stays in self.stays.within(near) {
            if stays.contains(at) {
                (vma.span, vma.kind) = (stays, VmaKind::InPlace);
                return vma;
            }
            vma.span = if stays.end() <= at {
                HostSpan::new(stays.end(), vma.span.end())
            } else {
                HostSpan::new(vma.span.start(), stays.start().min(vma.span.end()))
            };
        }
        vma
    }
}

#[cfg(test)]
mod tests;
