//! How the fault readers share their work: who leads, what waits for a thread, and what waits for
//! its time.
//!
//! News of changes is handled one after the other, in the order in which it came. Until it has been
//! handled, [`Pool::fate`] tells what it means for pages that left before.
//!
//! Lock rank: leaf.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::VecDeque;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::seam::env::{Mutex, Ns};

use crate::env::LiveEnv;
use crate::shard::ShardId;
use crate::sys::futex;
use crate::sys::waits::Reason;

/// Faults that can wait for their deadline; more are woken early and come again.
const DEFERRED: usize = 64;

/// A thread of the process waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) at: HostVa,
    /// Where it waits.
    pub(crate) shard: ShardId,
}

/// A change that no bracket saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Mapping and content are gone.
    Unmap(HostSpan),
    /// The content is gone.
    Remove(HostSpan),
    /// The mapping is now at `to`.
    Move {
        /// Where it was.
        from: HostSpan,
        /// Where it starts.
        to: HostVa,
    },
}

impl Change {
    /// What it took content from.
    const fn from(&self) -> HostSpan {
        match self {
            Self::Unmap(span) | Self::Remove(span) | Self::Move { from: span, .. } => *span,
        }
    }

    fn concerns(&self, span: HostSpan) -> bool {
        let onto = match self {
            Self::Move { from, to } => HostSpan::at(*to, from.bytes()).overlaps(span),
            Self::Unmap(_) | Self::Remove(_) => false,
        };
        onto || self.from().overlaps(span)
    }
}

/// An event that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct News {
    pub(crate) change: Change,
    pub(crate) shard: ShardId,
    /// Its number in its shard.
    pub(crate) number: u64,
}

/// What a thread can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Fault(Fault),
    News(News),
}

/// What a thread does next.
pub(crate) enum Job {
    Lead,
    Handle(Task),
    Stop,
}

/// What became of pages while they were away: of the first `bytes` of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fate {
    pub(crate) bytes: u64,
    /// Where they belong now; `None` where they are gone.
    pub(crate) place: Option<HostVa>,
}

/// How the threads share the work.
#[derive(Debug)]
pub(crate) struct Pool {
    turns: Mutex<LiveEnv, Turns>,
    /// Bumped when there may be something to do; what idle threads sleep on.
    changed: AtomicU32,
}

#[derive(Debug, Default)]
struct Turns {
    /// Some thread leads.
    led: bool,
    /// Threads that sleep, or have been woken and do not know yet what for.
    idle: usize,
    stopping: bool,
    /// What was read and waits for a thread.
    work: VecDeque<Task>,
    /// What a thread is handling: the next news waits.
    in_event: Option<News>,
    deferred: Deferred,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            turns: Mutex::<LiveEnv, _>::new(Turns::default()),
            changed: AtomicU32::new(0),
        }
    }
}

impl Pool {
    /// Sleeps until there is something to do. Leading comes first: somebody has to read.
    pub(crate) fn next(&self) -> Job {
        let mut turns = self.turns.lock();
        loop {
            if turns.stopping {
                return Job::Stop;
            }
            if !turns.led {
                turns.led = true;
                return Job::Lead;
            }
            if let Some(task) = turns.take() {
                return Job::Handle(task);
            }
            turns.idle += 1;
            let seen = self.changed.load(Ordering::Acquire);
            drop(turns);
            futex::wait(&self.changed, seen, None, Reason::Work);
            turns = self.turns.lock();
            turns.idle -= 1;
        }
    }

    /// Lets an idle thread look at what there is to do.
    fn call_one(&self) {
        self.changed.fetch_add(1, Ordering::Release);
        futex::wake_one(&self.changed);
    }

    /// Gives the lead away and takes work for it, if an idle thread can lead.
    pub(crate) fn hand_over(&self) -> Option<Task> {
        let mut turns = self.turns.lock();
        if turns.idle == 0 {
            return None;
        }
        let task = turns.take()?;
        turns.led = false;
        drop(turns);
        self.call_one();
        Some(task)
    }

    /// Leaves work for whoever has time.
    pub(crate) fn push(&self, task: Task) {
        self.turns.lock().work.push_back(task);
    }

    /// Sends the threads home.
    pub(crate) fn stop(&self) {
        self.turns.lock().stopping = true;
        self.changed.fetch_add(1, Ordering::Release);
        futex::wake(&self.changed);
    }

    /// What the leading thread asks before it sleeps: `None` to end, or how long to sleep.
    pub(crate) fn look_around(&self, now: Ns) -> Option<Option<Duration>> {
        let turns = self.turns.lock();
        (!turns.stopping).then(|| turns.deferred.next_timeout(now))
    }

    /// Whether a thread leads, threads without work, tasks that wait.
    pub(crate) fn state(&self) -> (bool, usize, usize) {
        let turns = self.turns.lock();
        (turns.led, turns.idle, turns.work.len())
    }

    /// Whether all news that was read has been handled.
    pub(crate) fn is_settled(&self) -> bool {
        self.turns.lock().news().next().is_none()
    }

    /// Whether news waits to be handled that concerns `span`.
    pub(crate) fn has_news_of(&self, span: HostSpan) -> bool {
        let turns = self.turns.lock();
        turns.news().any(|news| news.change.concerns(span))
    }

    /// Where the content of the page at `at` may be found that left a mapping of `shard`, by moves of
    /// which news has not been handled: here, or where it was before each of them, the latest first;
    /// with the number that the events read when it left lie below.
    pub(crate) fn trace(&self, at: HostVa, shard: ShardId) -> Vec<(HostVa, u64)> {
        let turns = self.turns.lock();
        let mut places = vec![(at, u64::MAX)];
        let mut news: Vec<_> = turns.news().filter(|news| news.shard == shard).collect();
        let mut at = at;
        while let Some(news) = news.pop() {
            match news.change {
                Change::Move { from, to } if HostSpan::at(to, from.bytes()).contains(at) => {
                    at = from.start().plus(at.offset_from(to));
                    places.push((at, news.number));
                }
                Change::Unmap(gone) | Change::Remove(gone) if gone.contains(at) => break,
                Change::Move { .. } | Change::Unmap(_) | Change::Remove(_) => {}
            }
        }
        places
    }

    /// What became of pages of `span` that left from `shard` when it had read `left_at` events,
    /// as far as has been read but not handled: of as many of the first pages as share it.
    pub(crate) fn fate(&self, span: HostSpan, shard: ShardId, left_at: u64) -> Fate {
        let turns = self.turns.lock();
        let later = |news: &&News| news.shard == shard && news.number > left_at;
        turns
            .news()
            .filter(later)
            .fold(Fate::home(span), |fate, news| fate.after(&news.change))
    }

    /// News has been handled: the next may be, and the faults that waited for it.
    pub(crate) fn event_is_over(&self) {
        self.turns.lock().in_event = None;
        self.call_one();
    }

    /// Keeps a fault until it is time; `false` where too many wait.
    pub(crate) fn defer(&self, fault: Fault, until: Ns) -> bool {
        self.turns.lock().deferred.add(fault, until)
    }

    /// A fault whose time has come.
    pub(crate) fn take_due(&self, now: Ns) -> Option<Fault> {
        self.turns.lock().deferred.take_due(now)
    }
}

impl Fate {
    /// Nothing happened to them.
    pub(crate) fn home(span: HostSpan) -> Self {
        Self {
            bytes: span.bytes(),
            place: Some(span.start()),
        }
    }

    /// What it is after one more change.
    pub(crate) fn after(self, change: &Change) -> Self {
        let Some(at) = self.place else {
            return self;
        };
        let (here, from) = (HostSpan::at(at, self.bytes), change.from());
        if !from.contains(at) {
            let until = here.intersect(from).map_or(here.end(), HostSpan::start);
            return Self::home(HostSpan::new(at, until));
        }
        Self {
            bytes: here.end().min(from.end()).offset_from(at),
            place: match change {
                Change::Unmap(_) | Change::Remove(_) => None,
                Change::Move { to, .. } => Some(to.plus(at.offset_from(from.start()))),
            },
        }
    }
}

impl Turns {
    /// What was read and is not handled, in order.
    fn news(&self) -> impl Iterator<Item = &News> {
        let waiting = self.work.iter().filter_map(|task| match task {
            Task::News(news) => Some(news),
            Task::Fault(_) => None,
        });
        self.in_event.iter().chain(waiting)
    }

    /// The first task that can be done now. A fault need not wait for news to be handled: it asks for
    /// what there is.
    fn take(&mut self) -> Option<Task> {
        let index = self
            .work
            .iter()
            .position(|task| self.in_event.is_none() || matches!(task, Task::Fault(_)))?;
        let task = self.work.remove(index)?;
        if let Task::News(news) = task {
            self.in_event = Some(news);
        }
        Some(task)
    }
}

/// Faults that wait for a timeslice to end.
#[derive(Debug)]
struct Deferred {
    slots: [Option<(Fault, Ns)>; DEFERRED],
}

impl Default for Deferred {
    fn default() -> Self {
        Self {
            slots: [None; DEFERRED],
        }
    }
}

impl Deferred {
    /// Keeps a fault, if there is room.
    fn add(&mut self, fault: Fault, until: Ns) -> bool {
        let free = self.slots.iter_mut().find(|slot| slot.is_none());
        free.map(|slot| *slot = Some((fault, until))).is_some()
    }

    fn next_timeout(&self, now: Ns) -> Option<Duration> {
        let first = self.slots.iter().flatten().map(|(_, until)| *until).min()?;
        Some(Duration::from_nanos(first.since(now).0))
    }

    fn take_due(&mut self, now: Ns) -> Option<Fault> {
        let due = |slot: &&mut Option<(Fault, Ns)>| slot.is_some_and(|(_, until)| until <= now);
        let slot = self.slots.iter_mut().find(due)?;
        slot.take().map(|(fault, _)| fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::tests::SECOND;
    use gpusvm::addr::PAGE_2M;

    fn span(n: u64) -> HostSpan {
        HostSpan::at(HostVa::new(n * PAGE_2M), PAGE_2M)
    }

    fn news(change: Change, number: u64) -> Task {
        Task::News(News {
            change,
            shard: ShardId::FIRST,
            number,
        })
    }

    #[test]
    fn news_is_handled_in_turn_and_faults_at_any_time() {
        let fault = Task::Fault(Fault {
            at: span(1).start(),
            shard: ShardId::FIRST,
        });
        let first = news(Change::Unmap(span(1)), 1);
        let second = news(Change::Unmap(span(2)), 2);
        let mut turns = Turns::default();
        turns.work.extend([first, second, fault]);
        assert_eq!(turns.take(), Some(first));
        assert_eq!(turns.take(), Some(fault));
        assert_eq!(turns.take(), None, "one at a time");
        turns.in_event = None;
        assert_eq!(turns.take(), Some(second));
    }

    #[test]
    fn content_is_traced_back_through_moves_until_it_ends() {
        let pool = Pool::default();
        let moved = |from: u64, to: u64| Change::Move {
            from: span(from),
            to: span(to).start(),
        };
        pool.push(news(moved(1, 2), 1));
        pool.push(news(Change::Unmap(span(3)), 2));
        pool.push(news(moved(2, 3), 3));
        let place = |n: u64| span(n).start().plus(4096);
        let trace = pool.trace(place(3), ShardId::FIRST);
        assert_eq!(trace, [(place(3), u64::MAX), (place(2), 3), (place(1), 1)]);
        let trace = pool.trace(place(1), ShardId::FIRST);
        assert_eq!(trace, [(place(1), u64::MAX)]);
        pool.push(news(Change::Remove(span(3)), 4));
        let trace = pool.trace(place(3), ShardId::FIRST);
        assert_eq!(trace, [(place(3), u64::MAX)], "nothing from before");
    }

    #[test]
    fn pages_follow_the_news_that_came_after_they_left() {
        let pool = Pool::default();
        let (from, to) = (span(3), span(5).start());
        pool.push(news(Change::Move { from, to }, 2));
        let half = HostSpan::at(to, PAGE_2M / 2);
        pool.push(news(Change::Remove(half), 3));
        let fate = |at: HostSpan, left_at| {
            let fate = pool.fate(at, ShardId::FIRST, left_at);
            (fate.bytes, fate.place)
        };
        assert_eq!(fate(span(3), 1), (PAGE_2M / 2, None), "moved, then gone");
        let rest = HostSpan::new(from.start().plus(PAGE_2M / 2), span(4).end());
        let there = to.plus(PAGE_2M / 2);
        assert_eq!(fate(rest, 1), (PAGE_2M / 2, Some(there)), "moved only");
        let before = HostSpan::new(span(2).start(), from.end());
        assert_eq!(fate(before, 1), (PAGE_2M, Some(before.start())), "neither");
        assert_eq!(
            fate(span(3), 3),
            (PAGE_2M, Some(from.start())),
            "left later"
        );
    }

    #[test]
    fn news_of_another_shard_takes_nothing() {
        let pool = Pool::default();
        pool.push(news(Change::Unmap(span(1)), 7));
        let other = Fate::home(span(1));
        assert_eq!(pool.fate(span(1), SECOND, 0), other);
        assert!(pool.has_news_of(span(1)));
    }
}
