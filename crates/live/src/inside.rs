//! Who is inside an invalidation, in debug builds: so that a test's allocator can tell who allocates
//! where nobody may.
//!
//! A thread of the process is on a stack of the runtime then, and its thread-locals may be away. So
//! what is marked is the stack: what is called from the mark lies below it.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use gpusvm::addr::HostSpan;
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::mm::{InvalidateReason, InvalidationSink};

/// Invalidations that are marked at a time; more are not.
const MARKS: usize = 64;
/// Bytes of stack below a mark that belong to it: half of a bracket's stack, and more than an
/// invalidation needs.
const BELOW: usize = 32 << 10;

/// Addresses of marks; 0 where a place is free.
static MARKED: [AtomicUsize; MARKS] = [const { AtomicUsize::new(0) }; MARKS];

/// Whether the caller runs inside an invalidation. Always `false` in builds without debug assertions.
/// Neither allocates nor locks, and may be asked on any stack.
#[must_use]
pub fn is_invalidating() -> bool {
    let here = here();
    let mut marks = MARKED.iter().map(|mark| mark.load(Ordering::Relaxed));
    cfg!(debug_assertions) && marks.any(|mark| (mark.saturating_sub(BELOW)..mark).contains(&here))
}

/// An address on the stack of the caller, or just below it.
#[inline(never)]
fn here() -> usize {
    let here = 0_u8;
    (&raw const here).addr()
}

/// Marks the stack below its owner for as long as it lives.
struct Mark(Option<&'static AtomicUsize>);

impl Mark {
    /// `top` is an address in the frame of the caller.
    fn set(top: usize) -> Self {
        let set = |mark: &&AtomicUsize| {
            mark.compare_exchange(0, top, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        Self(MARKED.iter().find(set))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(mark) = self.0 {
            mark.store(0, Ordering::Relaxed);
        }
    }
}

/// `sink`, with its calls marked in debug builds.
pub(crate) fn marked(sink: Arc<dyn InvalidationSink>) -> Arc<dyn InvalidationSink> {
    if cfg!(debug_assertions) {
        Arc::new(Marked(sink))
    } else {
        sink
    }
}

struct Marked(Arc<dyn InvalidationSink>);

impl InvalidationSink for Marked {
    fn start(&self, interval: &Interval, span: HostSpan, reason: InvalidateReason, seq: Seq) {
        let top = 0_u8;
        let _inside = Mark::set((&raw const top).addr());
        self.0.start(interval, span, reason, seq);
    }

    fn end(&self, interval: &Interval, span: HostSpan) {
        let top = 0_u8;
        let _inside = Mark::set((&raw const top).addr());
        self.0.end(interval, span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_for_what_it_calls_and_for_nobody_else() {
        let other = || {
            std::thread::scope(|scope| {
                let asked = scope.spawn(is_invalidating);
                asked.join().expect("it answers")
            })
        };
        let top = 0_u8;
        assert!(!is_invalidating());
        let mark = Mark::set((&raw const top).addr());
        assert_eq!(
            (is_invalidating(), other()),
            (cfg!(debug_assertions), false)
        );
        drop(mark);
        assert!(!is_invalidating());
    }
}
