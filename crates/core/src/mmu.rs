//! Interval notifiers: the sequence protocol by which address-space changes and device faults
//! meet (`svm-design.md` section 4.1). Both hosts use this one implementation.
//!
//! One [`IntervalNotifiers`] per process holds a sequence `S` (odd while some watched interval is
//! being invalidated) and a count `A` of running invalidations. Each [`Interval`] remembers the
//! sequence of the last invalidation that touched it. A reader takes `S` with
//! [`read_begin`](IntervalNotifiers::read_begin), reads the CPU page tables, locks what its sink
//! locks, and asks [`read_retry`](Interval::read_retry): if an invalidation came in between, the
//! interval's sequence has moved.
//!
//! ```text
//!  invalidation:  start: A += 1, S |= 1, sink.start ──── tables change ──── end: A -= 1, S += 1
//!  reader:        read_begin ─ read tables ─ lock ─ read_retry? ─ use ─ unlock
//! ```
//!
//! Lock rank: `host mm`. The lock is never held while a sink runs.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::addr::{HostSpan, HostVa};
use crate::mutant::Mutant;
use crate::seam::env::{Environment, Mutex};
use crate::seam::mm::{InvalidateReason, InvalidationSink};

/// A value of the invalidation sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seq(u64);

/// One watched window and its sink (`mmu_interval_notifier`).
pub struct Interval {
    window: HostSpan,
    sink: Arc<dyn InvalidationSink>,
    /// Written under the sink's lock, read there by [`read_retry`](Self::read_retry); the atomic
    /// only makes the hint of [`IntervalNotifiers::read_begin`] legal.
    seq: AtomicU64,
}

impl Interval {
    /// The watched window.
    #[must_use]
    pub const fn window(&self) -> HostSpan {
        self.window
    }

    /// Takes note of a running invalidation. Called by the sink, under its lock.
    pub fn set_seq(&self, seq: Seq) {
        self.seq.store(seq.0, Ordering::Release);
    }

    /// Whether an invalidation has touched the interval since `seq` was taken. Definite only
    /// under the sink's lock.
    #[must_use]
    pub fn read_retry(&self, seq: Seq) -> bool {
        self.seq.load(Ordering::Acquire) != seq.0
    }
}

impl fmt::Debug for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Interval({}, seq {})",
            self.window,
            self.seq.load(Ordering::Relaxed)
        )
    }
}

/// The state under the lock.
struct State {
    /// `S`.
    seq: u64,
    /// `A`.
    active: u32,
    /// Windows by their start; they never overlap for one subscriber, but may for several, so
    /// the key carries a serial number.
    tree: BTreeMap<(HostVa, u64), Arc<Interval>>,
    /// The widest window, which bounds how far back a look-up has to start.
    widest: u64,
    serial: u64,
    /// Inserts and removals that wait for the running invalidations to end.
    deferred: Vec<Deferred>,
}

enum Deferred {
    Insert(Arc<Interval>),
    Remove(Arc<Interval>),
}

/// All interval notifiers of one process (`mmu_notifier_subscriptions`).
pub struct IntervalNotifiers<E: Environment> {
    state: Mutex<E, State>,
    /// Changes whenever `S` may have changed from odd to even: what waiters sleep on.
    ended: AtomicU32,
}

/// A running invalidation, to be ended by [`IntervalNotifiers::end`].
#[must_use = "an invalidation that is not ended blocks every reader of the span"]
#[derive(Debug)]
pub struct Invalidation {
    span: HostSpan,
    reason: InvalidateReason,
}

impl Invalidation {
    /// The span being changed.
    #[must_use]
    pub const fn span(&self) -> HostSpan {
        self.span
    }

    /// Why it changes.
    #[must_use]
    pub const fn reason(&self) -> InvalidateReason {
        self.reason
    }
}

impl<E: Environment> fmt::Debug for IntervalNotifiers<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntervalNotifiers").finish_non_exhaustive()
    }
}

impl<E: Environment> Default for IntervalNotifiers<E> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E: Environment> IntervalNotifiers<E> {
    /// No intervals, idle.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: Mutex::<E, _>::new(State {
                seq: 2,
                active: 0,
                tree: BTreeMap::new(),
                widest: 0,
                serial: 0,
                deferred: Vec::new(),
            }),
            ended: AtomicU32::new(0),
        }
    }

    /// Opens an invalidation of `span`: on return no subscriber uses the span. Does not allocate.
    /// Must be called without the notifier lock of any subscriber.
    pub fn start(&self, span: HostSpan, reason: InvalidateReason) -> Invalidation {
        let mut state = self.state.lock();
        state.active += 1;
        let mut next = state.next_overlap(span, None);
        if next.is_some() {
            state.seq |= 1;
        }
        let seq = Seq(state.seq);
        drop(state);
        while let Some(found) = next {
            let interval = &found.interval;
            interval.sink.start(interval, span, reason, seq);
            // Nothing comes or goes while an invalidation runs: what was the last one still is.
            next = match found.place {
                Place::Last => None,
                Place::Before(more) => self.state.lock().next_overlap(span, Some(more)),
            };
        }
        Invalidation { span, reason }
    }

    /// Closes an invalidation; readers go on when the last one has ended.
    pub fn end(&self, env: &E, invalidation: Invalidation) {
        let span = invalidation.span;
        let mut state = self.state.lock();
        let mut next = state.next_overlap(span, None);
        while let Some(found) = next {
            drop(state);
            found.interval.sink.end(&found.interval, span);
            state = self.state.lock();
            next = match found.place {
                Place::Last => None,
                Place::Before(more) => state.next_overlap(span, Some(more)),
            };
        }
        state.active -= 1;
        if state.active == 0 && state.seq & 1 == 1 {
            state.seq += 1;
            state.apply_deferred();
            self.ended.fetch_add(1, Ordering::Release);
            drop(state);
            env.wake(&self.ended);
        }
    }

    /// Starts watching `window`. May be called while invalidations run: the interval then counts
    /// as busy until they end.
    pub fn insert(&self, window: HostSpan, sink: Arc<dyn InvalidationSink>) -> Arc<Interval> {
        let interval = Arc::new(Interval {
            window,
            sink,
            seq: AtomicU64::new(0),
        });
        let mut state = self.state.lock();
        if state.active == 0 {
            // Odd and different from S: not busy, and equal to no sequence a reader will get.
            interval.seq.store(state.seq - 1, Ordering::Release);
            state.insert(Arc::clone(&interval));
        } else {
            state.seq |= 1;
            interval.seq.store(state.seq, Ordering::Release);
            state.deferred.push(Deferred::Insert(Arc::clone(&interval)));
        }
        interval
    }

    /// Stops watching. On return no callback of `interval` runs or will run. Must not be called
    /// from a callback, nor with a lock held that a callback takes.
    pub fn remove(&self, env: &E, interval: &Arc<Interval>) {
        let mut state = self.state.lock();
        if state.active == 0 {
            state.remove(interval);
            return;
        }
        // Callbacks may be running: wait for S to change, so that start and end stay balanced.
        state.seq |= 1;
        let busy = state.seq;
        state.deferred.push(Deferred::Remove(Arc::clone(interval)));
        drop(state);
        self.wait_while(env, busy);
    }

    /// Sequence for a read side; waits while an invalidation of the interval runs. The sequence
    /// may be stale on return, which [`Interval::read_retry`] tells.
    pub fn read_begin(&self, env: &E, interval: &Interval) -> Seq {
        let state = self.state.lock();
        let seq = interval.seq.load(Ordering::Acquire);
        let busy = seq == state.seq;
        drop(state);
        if busy && !env.mutant(Mutant::ReadBeginDoesNotWait) {
            self.wait_while(env, seq);
        }
        Seq(seq)
    }

    /// Sleeps until `S != busy`.
    fn wait_while(&self, env: &E, busy: u64) {
        loop {
            let seen = self.ended.load(Ordering::Acquire);
            if self.state.lock().seq != busy {
                return;
            }
            env.wait(&self.ended, seen);
        }
    }
}

/// An interval that a span overlaps.
struct Overlap {
    interval: Arc<Interval>,
    place: Place,
}

/// Where it stands among those.
enum Place {
    /// The one with this key comes next.
    Before((HostVa, u64)),
    Last,
}

impl State {
    /// First interval that overlaps `span`, from the key `from` on.
    fn next_overlap(&self, span: HostSpan, from: Option<(HostVa, u64)>) -> Option<Overlap> {
        let first = HostVa::new(span.start().get().saturating_sub(self.widest));
        let mut all = self
            .tree
            .range(from.unwrap_or((first, 0))..(span.end(), 0))
            .filter(|(_, interval)| interval.window.overlaps(span));
        let (_, interval) = all.next()?;
        let place = all
            .next()
            .map_or(Place::Last, |(key, _)| Place::Before(*key));
        Some(Overlap {
            interval: Arc::clone(interval),
            place,
        })
    }

    fn insert(&mut self, interval: Arc<Interval>) {
        self.serial += 1;
        self.widest = self.widest.max(interval.window.bytes());
        self.tree
            .insert((interval.window.start(), self.serial), interval);
    }

    fn remove(&mut self, interval: &Arc<Interval>) {
        self.tree.retain(|_, other| !Arc::ptr_eq(other, interval));
    }

    fn apply_deferred(&mut self) {
        for change in core::mem::take(&mut self.deferred) {
            match change {
                Deferred::Insert(interval) => self.insert(interval),
                Deferred::Remove(interval) => self.remove(&interval),
            }
        }
    }
}

#[cfg(test)]
mod tests;
