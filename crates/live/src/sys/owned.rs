//! Which memory is the runtime's own: no device may map it, and it never migrates.
//!
//! That is the arena of [`RuntimeAlloc`](super::arena::RuntimeAlloc), the stacks of the runtime's
//! threads and brackets, and what [`RuntimeMapping`](super::mapping::RuntimeMapping) maps: device memory and
//! staging. A wild device pointer into any of them is refused like one into nothing.
//!
//! The answer is needed inside fault service, so it costs neither a lock nor an allocation: a fixed
//! table of spans, each read like a sequence lock whose sequence is the span's end.
//!
//! The table, as every variable that fault service reads, lies in `.data` and not in `.bss`: the
//! latter is anonymous memory that shares its pages with the program's own variables and migrates
//! with them, the former is mapped from a file and stays.

use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm::addr::{HostSpan, HostVa};

use crate::sys::arena;

/// Spans that can be told apart at one time: threads, device memories, staging.
pub(crate) const PLACES: usize = 512;
/// End of a place that nobody uses.
const FREE: u64 = 0;
/// End of a place whose start is being written.
const TAKEN: u64 = 1;

#[unsafe(link_section = ".data")]
static TABLE: [Place; PLACES] = [const { Place::new() }; PLACES];

struct Place {
    start: AtomicU64,
    end: AtomicU64,
}

/// An entry of the table, until it is dropped.
#[derive(Debug)]
pub(crate) struct OwnedSpan(usize);

impl OwnedSpan {
    /// Declares `span` the runtime's own. `None` where all [`PLACES`] are in use, or for an empty
    /// span.
    pub(crate) fn declare(span: HostSpan) -> Option<Self> {
        if span.is_empty() {
            return None;
        }
        let index = TABLE.iter().position(Place::take)?;
        TABLE[index].fill(span);
        Some(Self(index))
    }
}

impl Drop for OwnedSpan {
    fn drop(&mut self) {
        TABLE[self.0].end.store(FREE, Ordering::Release);
    }
}

/// Whether part of `span` is memory of the runtime's own.
pub(crate) fn owns(span: HostSpan) -> bool {
    let overlaps = |own: HostSpan| own.overlaps(span);
    overlaps(arena::arena_span())
        || overlaps(arena::bracket_stacks())
        || TABLE.iter().filter_map(Place::span).any(overlaps)
}

impl Place {
    const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            end: AtomicU64::new(FREE),
        }
    }

    /// Takes the place if it is free.
    fn take(&self) -> bool {
        self.end
            .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// Publishes a span in a place that was taken.
    fn fill(&self, span: HostSpan) {
        // Release, so that whoever sees this start sees TAKEN or what follows it.
        self.start.store(span.start().get(), Ordering::Release);
        self.end.store(span.end().get(), Ordering::Release);
    }

    /// The span; `None` where there is none, or not yet.
    fn span(&self) -> Option<HostSpan> {
        loop {
            // Pairs with `fill`.
            let end = self.end.load(Ordering::Acquire);
            if end == FREE || end == TAKEN {
                return None;
            }
            let start = self.start.load(Ordering::Acquire);
            // Another end means that the place has changed hands in between, and `start` may be
            // another span's. The same end means that both belong together.
            if self.end.load(Ordering::Relaxed) == end {
                return Some(HostSpan::new(HostVa::new(start), HostVa::new(end)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicBool;

    fn span(start: u64, end: u64) -> HostSpan {
        HostSpan::new(HostVa::new(start), HostVa::new(end))
    }

    #[test]
    fn span_is_owned_while_it_is_declared_and_its_neighbours_never() {
        let mine = span(0x4000, 0x6000);
        let declared = OwnedSpan::declare(mine).expect("there are places");
        assert!(owns(span(0x5000, 0x5001)));
        assert!(!owns(span(0x3000, 0x4000)));
        assert!(!owns(span(0x6000, 0x7000)));
        drop(declared);
        assert!(!owns(mine));
        assert!(OwnedSpan::declare(span(1, 1)).is_none(), "empty");
    }

    #[test]
    fn memory_between_two_users_of_a_place_is_never_taken_for_owned() {
        // A start of one and an end of the other would enclose the middle.
        let (low, middle, high) = (span(0x10, 0x20), span(0x800, 0x900), span(0x1010, 0x1020));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(OwnedSpan::declare(high));
                    drop(OwnedSpan::declare(low));
                }
            });
            let wrong = (0..200_000).filter(|_| owns(middle)).count();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(wrong, 0);
        });
    }
}
