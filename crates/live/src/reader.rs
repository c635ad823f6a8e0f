//! The fault readers: a few threads that take turns at reading the messages of all
//! [shards](crate::shard).
//!
//! * A **fault** on device memory brings the allocation home, on the thread that read it: one hop
//!   from the faulting thread and back. A fault on a span that travels is dropped: whoever ends the
//!   travel wakes the span, and the access faults again if it must. A fault on host memory in an
//!   armed piece disarms the piece, and the kernel fills the page itself.
//! * An **event** is news of a change that no bracket saw: bracketed calls take their span out of
//!   userfaultfd first. It is late by nature, and counted. Events are handled one after the other,
//!   in the order in which they came, and a fault on device memory waits for the events that
//!   concern it: the thread that made the change may be the one that faults next.
//!
//! **Somebody can always read.** Bringing pages home and taking note of an event both invalidate,
//! and an invalidation waits for device units, which may themselves wait at a hole in host memory
//! for a message to be read. So the thread that *leads* reads and serves such holes, which takes
//! the watch and the residency table only; before it does anything else it hands the lead to a
//! thread that is idle, and without one it leaves the work to those that are busy:
//!
//! ```text
//!            ┌─ a hole: filled at once ─┐
//!   lead ── read                        ├─ read ── …
//!            └─ other work, and: idle threads? ── lead goes to one, this one works
//!                                └─ none ── queued for the first that is done ── read ── …
//! ```
//!
//! Everything the threads need lies in the runtime's own memory.

use core::sync::atomic::Ordering;
use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::event::{Event, HomeCause};
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::mm::{CpuFaultOutcome, InvalidateReason};
use rustix::io::Errno;

use crate::pool::{Change, Fault, Job, News, Task};
use crate::residency::State;
use crate::shard::{BATCH, ShardId};
use crate::space::LiveSpace;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::Message;

/// Threads: one reads, the others bring pages home at the same time.
const THREADS: usize = 4;
/// How long a page that could not be brought home rests before the next try.
pub(crate) const LOST_RETRY: Ns = Ns::from_millis(10);
/// As [`LOST_RETRY`], for a page that is of another mapping than the one that is waited at.
const FOREIGN_RETRY: Ns = Ns::from_millis(1);

/// The running readers.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    threads: Vec<RuntimeThread>,
}

/// Starts the threads. They end by [`Reader::stop`].
pub(crate) fn start(space: &Arc<LiveSpace>) -> Result<Reader, Errno> {
    let mut reader = Reader::default();
    for _ in 0..THREADS {
        let mine = Arc::clone(space);
        match thread::spawn("gpusvm-reader", move || run(&mine)) {
            Ok(thread) => reader.threads.push(thread),
            Err(error) => {
                reader.stop(space);
                return Err(error.errno());
            }
        }
    }
    Ok(reader)
}

impl Reader {
    /// Ends the threads after the messages they are working on.
    pub(crate) fn stop(self, space: &LiveSpace) {
        space.pool.stop();
        space.watch.shards.ring();
        self.threads.into_iter().for_each(RuntimeThread::join);
    }
}

fn run(space: &LiveSpace) {
    loop {
        let task = match space.pool.next() {
            Job::Stop => return,
            Job::Handle(task) => task,
            Job::Lead => match lead(space) {
                Some(task) => task,
                None => return,
            },
        };
        match task {
            Task::Fault(fault) => serve_fault(space, fault),
            Task::News(news) => {
                late_news(space, &news);
                space.pool.event_is_over();
            }
        }
    }
}

/// Reads until there is work for this thread and another one to read, or until the end: `None`.
fn lead(space: &LiveSpace) -> Option<Task> {
    loop {
        if let Some(task) = space.pool.hand_over() {
            return Some(task);
        }
        let timeout = space.pool.look_around(space.env.now())?;
        let ready = space.watch.shards.wait(timeout);
        wake_due(space);
        for shard in ready {
            space.reader_round.fetch_add(1, Ordering::AcqRel);
            read(space, shard);
            // Pairs with `LiveSpace::settle_events`.
            space.reader_round.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// Reads one shard. News is queued while it is read, so that whoever finds no more to be read also
/// finds what was. Of the faults, those are served at once that wait for nobody.
fn read(space: &LiveSpace, shard: ShardId) {
    let mut faults = [None; BATCH];
    let mut places = faults.iter_mut();
    // News of a clone comes with what was away at that moment: pages come home by MOVE, which waits
    // while the news is unread, and then leave the table, which is locked meanwhile.
    let shards = &space.watch.shards;
    shards.read(shard, &space.residency, |table, number, message| {
        let change = match message {
            Message::Fault { at } => {
                if let Some(place) = places.next() {
                    *place = Some(at.align_down(PAGE));
                }
                return;
            }
            Message::Unmap(span) => Change::Unmap(span),
            Message::Remove(span) => Change::Remove(span),
            Message::Remap { from, to } => Change::Move { from, to },
            Message::Fork(child) => return space.attendant.admit(child, table.departed(shard)),
            Message::None => return,
        };
        space.pool.push(Task::News(News {
            change,
            shard,
            number,
        }));
    });
    for at in faults.into_iter().flatten() {
        space.reader_at.store(at.get(), Ordering::Relaxed);
        sort(space, Fault { at, shard });
    }
}

/// Does at once what waits for nobody, and queues the rest.
fn sort(space: &LiveSpace, fault: Fault) {
    let resident = matches!(
        space.residency.lock().at(fault.at),
        Some((_, State::Resident(_)))
    );
    if resident {
        space.pool.push(Task::Fault(fault));
    } else {
        serve_hole(space, fault);
    }
}

/// A thread of the process waits for a page that is not on a device.
fn serve_hole(space: &LiveSpace, fault: Fault) {
    let travels = match space.residency.lock().at(fault.at) {
        Some((shard, State::Transit(_))) => Some(shard),
        _ => None,
    };
    match travels {
        // Whoever ends the travel wakes the span.
        Some(shard) if shard == fault.shard => {}
        Some(_) => defer(space, fault, space.env.now().after(FOREIGN_RETRY)),
        None => {
            let _or_it_comes_again = space.fill_hole(fault);
            wake(space, fault);
        }
    }
}

impl LiveSpace {
    /// Lets a thread that waits at a page that is on no device have zeros. False where that cannot be
    /// told yet: news of a move is on its way.
    pub(crate) fn fill_hole(&self, fault: Fault) -> bool {
        let Fault { at, shard } = fault;
        if self.watch.disarm(at, shard, &self.residency) {
            return true;
        }
        if self.pool.has_news_of(HostSpan::at(at, PAGE)) {
            return false;
        }
        // A mapping that grows takes its arming along, and where only events tell nobody is told.
        // Refused where news is unread.
        self.watch.shards.uffd(shard).zero_page(at).is_ok()
    }
}

/// A thread of the process waits for a page.
fn serve_fault(space: &LiveSpace, fault: Fault) {
    let state = space.residency.lock().at(fault.at).map(|at| at.1.clone());
    let Some(State::Resident(page)) = state else {
        return serve_hole(space, fault);
    };
    match page.allocation.migrate_to_ram(fault.at) {
        CpuFaultOutcome::Retry => wake(space, fault),
        CpuFaultOutcome::RetryAt(time) => defer(space, fault, time),
        CpuFaultOutcome::Lost => defer(space, fault, space.env.now().after(LOST_RETRY)),
    }
}

fn wake(space: &LiveSpace, fault: Fault) {
    let waiting = HostSpan::at(fault.at, PAGE);
    // Refused where the mapping is gone, and with it the waiting thread's page.
    let _gone = space.watch.shards.uffd(fault.shard).wake(waiting);
}

fn late_news(space: &LiveSpace, news: &News) {
    match news.change {
        Change::Unmap(span) => late_change(space, span, InvalidateReason::Unmap, news),
        Change::Remove(span) => late_change(space, span, InvalidateReason::Clear, news),
        Change::Move { from, to } => late_move(space, from, to, news),
    }
}

/// The process unmapped or cleared `span` and no bracket saw it. Something may be mapped there
/// again, with content that has left for a device again: only what left before the event was read
/// goes.
fn late_change(space: &LiveSpace, span: HostSpan, reason: InvalidateReason, news: &News) {
    space.emit(&Event::LateInvalidation { span });
    space.begin_change(&[span]);
    let pieces = space.recall_settled(span, |shard| (shard == news.shard).then_some(news.number));
    space.remembered.forget();
    let invalidation = space.notifiers.start(span, reason);
    if reason == InvalidateReason::Unmap {
        let kept = space.residency.lock().residents(span);
        space.watch.forget_late(span, news.shard, &kept);
    }
    space.let_go(pieces);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[span]);
}

/// The process moved a mapping and no bracket saw it: the pages follow, and then come home.
fn late_move(space: &LiveSpace, from: HostSpan, to: HostVa, news: &News) {
    space.emit(&Event::LateInvalidation { span: from });
    space.begin_change(&[from]);
    space.remembered.forget();
    let invalidation = space.notifiers.start(from, InvalidateReason::Unmap);
    loop {
        space.wait_settled(from);
        let mut table = space.residency.lock();
        if !table.is_travelling(from) {
            table.rebase(from, to, news.shard, news.number);
            break;
        }
    }
    space.watch.moved(from, to, news.shard);
    // Where the mapping stayed, it is still armed.
    let kept = space.residency.lock().residents(from);
    space.watch.forget_late(from, news.shard, &kept);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[from]);
    space.bring_home(HostSpan::at(to, from.bytes()), HomeCause::SpaceChange);
}

/// Wakes the thread that waits when it is time, or now if too many wait.
fn defer(space: &LiveSpace, fault: Fault, until: Ns) {
    if space.pool.defer(fault, until) {
        // Whoever leads may be asleep for longer than that.
        space.watch.shards.ring();
    } else {
        wake(space, fault);
    }
}

fn wake_due(space: &LiveSpace) {
    let now = space.env.now();
    while let Some(fault) = space.pool.take_due(now) {
        wake(space, fault);
    }
}

#[cfg(test)]
mod tests;
