//! The fault readers: a few threads that take turns at reading the messages of all
//! [shards](crate::shard).
//!
//! * A **fault** on device memory brings the allocation home. A fault on a span that travels is
//!   dropped: whoever ends the travel wakes the span, and the access faults again if it must. A fault
//!   on host memory in an armed piece disarms the piece, and the kernel fills the page itself.
//! * An **event** is news of a change that no bracket saw: bracketed calls take their span out of
//!   userfaultfd first. It is late by nature, and counted. Events are handled one after the other,
//!   in the order in which they came. The thread that made the change may be the one that faults
//!   next, before it is handled: the fault looks for its content also where it was before, and what
//!   comes home follows the news (see [`Pool`](crate::pool::Pool)).
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
use gpusvm::seam::mm::{CpuFault, CpuFaultOutcome, InvalidateReason};
use rustix::io::Errno;

use crate::pool::{Change, Fault, Job, News, Task};
use crate::residency::{DevicePage, State};
use crate::shard::{BATCH, ShardId};
use crate::space::LiveSpace;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::Message;

/// Threads: one reads, the others bring pages home at the same time.
const THREADS: usize = 4;
/// How long a page that could not be brought home rests before the next try.
pub(crate) const LOST_RETRY: Ns = Ns::from_millis(10);
/// As [`LOST_RETRY`], for what is over in a moment.
const SOON: Ns = Ns(100_000);

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
            Message::Fork(child) => {
                let away = table.departed_from(shard);
                table.owe(&away);
                return space.attendant.admit(child, away);
            }
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

/// Does at once what waits for nobody, and queues the rest: who leads may not bring pages home, which
/// waits while news is unread.
fn sort(space: &LiveSpace, fault: Fault) {
    match space.look_for(fault) {
        Wanted::Away { .. } => space.pool.push(Task::Fault(fault)),
        Wanted::Travels(end) => wait_for_end(space, fault, end),
        Wanted::Hole => fill(space, fault),
    }
}

/// A thread of the process waits for a page.
fn serve_fault(space: &LiveSpace, fault: Fault) {
    match space.look_for(fault) {
        Wanted::Away { page, from } => match bring(page, from) {
            CpuFaultOutcome::Retry => wake(space, fault),
            CpuFaultOutcome::RetryAt(time) => defer(space, fault, time),
            CpuFaultOutcome::Lost => defer(space, fault, space.env.now().after(LOST_RETRY)),
        },
        Wanted::Travels(end) => wait_for_end(space, fault, end),
        Wanted::Hole => fill(space, fault),
    }
}

/// Asks the owner of a page to bring it home.
pub(crate) fn bring(page: DevicePage, at: HostVa) -> CpuFaultOutcome {
    let vram = page.vram();
    page.allocation.migrate_to_ram(CpuFault { at, vram })
}

fn wait_for_end(space: &LiveSpace, fault: Fault, end: End) {
    match end {
        // Whoever ends the travel wakes the span.
        End::Told => {}
        End::Untold => defer(space, fault, space.soon()),
    }
}

fn fill(space: &LiveSpace, fault: Fault) {
    let _or_it_comes_again = space.fill_hole(fault);
    wake(space, fault);
}

/// Where a page is that a thread wants.
pub(crate) enum Wanted {
    /// On no device.
    Hole,
    /// On a device, and so far known by the address `from`.
    Away { page: DevicePage, from: HostVa },
    /// Between two places.
    Travels(End),
}

/// Whether those who wait for a page are told that its travel ends.
pub(crate) enum End {
    Told,
    Untold,
}

impl LiveSpace {
    /// Looks for the content of a page, also where it was before moves that are not handled yet.
    pub(crate) fn look_for(&self, fault: Fault) -> Wanted {
        let places = self.pool.trace(fault.at, fault.shard);
        let table = self.residency.lock();
        for (at, before) in places {
            match table.at(at) {
                Some((shard, State::Transit(_))) => {
                    let told = shard == fault.shard && at == fault.at;
                    return Wanted::Travels(if told { End::Told } else { End::Untold });
                }
                Some((_, State::Resident(page))) if page.left_at < before => {
                    return Wanted::Away { page, from: at };
                }
                Some((_, State::Resident(_) | State::Claimed)) | None => {}
            }
        }
        Wanted::Hole
    }

    /// Lets a thread that waits at a page that is on no device have zeros. False where that cannot be
    /// told yet: there is news to be read, or some was handled meanwhile.
    pub(crate) fn fill_hole(&self, fault: Fault) -> bool {
        let Fault { at, shard } = fault;
        // What is not read might say that the page is another one's, which is away.
        let _unread = self.watch.shards.hold(shard);
        let changing = self.watch.shards.uffd(shard).is_changing();
        if changing || !matches!(self.look_for(fault), Wanted::Hole) {
            return false;
        }
        self.step();
        self.watch.disarm(at, shard, &self.residency)
    }

    /// When to look again at what is over in a moment.
    pub(crate) fn soon(&self) -> Ns {
        self.env.now().after(SOON)
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
        let mut kept = space.residency.lock().departed_in(span);
        // What is about to be let go was armed in a mapping that is gone.
        kept.retain(|kept| !pieces.iter().any(|piece| piece.span == *kept));
        space.watch.forget_late(span, news.shard, &kept);
    }
    space.let_go(pieces);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[span]);
}

/// The process moved a mapping and no bracket saw it: the pages follow, and then come home. Nothing may
/// be on its way at the new place meanwhile: what a migration has begun there, before it has heard of the
/// news, would be taken for what moved there, and end with it.
fn late_move(space: &LiveSpace, from: HostSpan, to: HostVa, news: &News) {
    let there = HostSpan::at(to, from.bytes());
    space.emit(&Event::LateInvalidation { span: from });
    space.begin_change(&[from, there]);
    space.remembered.forget();
    let invalidation = space.notifiers.start(from, InvalidateReason::Unmap);
    loop {
        space.wait_settled(from);
        space.wait_settled(there);
        let mut table = space.residency.lock();
        if !table.is_travelling(from) && !table.is_travelling(there) {
            table.rebase(from, to, news.shard, news.number);
            break;
        }
    }
    space.watch.moved(from, to, news.shard);
    // Where the mapping stayed, it is still armed.
    let kept = space.residency.lock().departed_in(from);
    space.watch.forget_late(from, news.shard, &kept);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[from, there]);
    space.bring_home(there, HomeCause::SpaceChange);
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
