//! The fault readers: a few threads that take turns at reading userfaultfd's messages.
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

use core::ops::Deref;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::event::{Event, HomeCause};
use gpusvm::seam::env::{Environment, Mutex, Ns};
use gpusvm::seam::mm::{CpuFaultOutcome, InvalidateReason};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::env::LiveEnv;
use crate::residency::State;
use crate::space::LiveSpace;
use crate::sys::futex::{self, RawFutexMutex};
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::Message;
use crate::sys::waits::Reason;

/// Threads: one reads, the others bring pages home at the same time.
const THREADS: usize = 4;
/// Messages per read.
const BATCH: usize = 16;
/// Faults that can wait for their deadline; more are woken early and come again.
const DEFERRED: usize = 64;
/// How long a page that could not be brought home rests before the next try.
const LOST_RETRY: Ns = Ns::from_millis(10);

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
                reader.stop(&space.pool);
                return Err(error.errno());
            }
        }
    }
    Ok(reader)
}

impl Reader {
    /// Ends the threads after the messages they are working on.
    pub(crate) fn stop(self, pool: &Pool) {
        pool.stop();
        self.threads.into_iter().for_each(RuntimeThread::join);
    }
}

/// Counts the events that were read, and lets pages leave between two reads only.
///
/// The system lets a thread that changed the address space go on when the event is read. So whatever
/// left a mapping before that is of the old mapping, and whatever leaves afterwards finds the new
/// one: the number tells them apart when the event is handled, later. Pages are armed and moved out
/// under this lock, so that no event is read in between.
///
/// Lock rank: host mm, outside the watch's. Its holders wait for nobody: a MOVE into staging or
/// device memory raises no event and meets none.
#[derive(Debug, Default)]
pub(crate) struct Departures(lock_api::Mutex<RawFutexMutex, u64>);

impl Departures {
    /// Keeps events unread until the guard is dropped; it is the number of those that were read.
    pub(crate) fn begin(&self) -> impl Deref<Target = u64> + '_ {
        self.0.lock()
    }

    /// Reads messages and numbers the events among them.
    fn read(&self, space: &LiveSpace, messages: &mut [Message]) -> (usize, u64) {
        let mut number = self.0.lock();
        let first = *number + 1;
        // News of a clone comes with what was away at that moment: pages come home by MOVE, which
        // waits while the news is unread, and then leave the table, which is locked meanwhile.
        let table = space.residency.lock();
        let count = space.watch.uffd.read(messages).unwrap_or(0);
        for message in &mut messages[..count] {
            *number += u64::from(is_event(message));
            if matches!(message, Message::Fork(_))
                && let Message::Fork(child) = core::mem::replace(message, Message::None)
            {
                space.attendant.admit(child, table.departed());
            }
        }
        (count, first)
    }
}

/// A message that waits for a thread, and its number if it is an event.
#[derive(Debug)]
struct Queued {
    message: Message,
    number: u64,
}

/// How the threads share the work.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Leaf lock.
    turns: Mutex<LiveEnv, Turns>,
    /// Bumped when there may be something to do; what idle threads sleep on.
    changed: AtomicU32,
    /// Wakes the thread that leads from its sleep on userfaultfd.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct Turns {
    /// Some thread leads.
    led: bool,
    /// Threads that sleep, or have been woken and do not know yet what for.
    idle: usize,
    stopping: bool,
    /// What was read and waits for a thread.
    work: VecDeque<Queued>,
    /// What the event concerns that a thread is handling: the next one waits.
    in_event: Option<Concern>,
    deferred: Deferred,
}

/// What a thread does next.
enum Job {
    Lead,
    Handle(Queued),
    Stop,
}

impl Pool {
    /// Nothing to do yet.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            turns: Mutex::<LiveEnv, _>::new(Turns::default()),
            changed: AtomicU32::new(0),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Sleeps until there is something to do. Leading comes first: somebody has to read.
    fn next(&self) -> Job {
        let mut turns = self.turns.lock();
        loop {
            if turns.stopping {
                return Job::Stop;
            }
            if !turns.led {
                turns.led = true;
                return Job::Lead;
            }
            if let Some(queued) = turns.take() {
                return Job::Handle(queued);
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
    fn hand_over(&self) -> Option<Queued> {
        let mut turns = self.turns.lock();
        if turns.idle == 0 {
            return None;
        }
        let queued = turns.take()?;
        turns.led = false;
        drop(turns);
        self.call_one();
        Some(queued)
    }

    fn stop(&self) {
        self.turns.lock().stopping = true;
        self.changed.fetch_add(1, Ordering::Release);
        futex::wake(&self.changed);
        self.ring();
    }

    /// Lets the thread that leads look around.
    fn ring(&self) {
        // Full means that it rings already.
        let _written = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// What the leading thread looks at before it sleeps: `None` to end, or how long to sleep.
    fn look_around(&self, now: Ns) -> Option<Option<Duration>> {
        // Empty means that nobody rang.
        let _rang = rustix::io::read(&self.bell, &mut [0; 8]);
        let turns = self.turns.lock();
        (!turns.stopping).then(|| turns.deferred.next_timeout(now))
    }

    /// Whether a thread leads, threads without work, messages that wait.
    pub(crate) fn state(&self) -> (bool, usize, usize) {
        let turns = self.turns.lock();
        (turns.led, turns.idle, turns.work.len())
    }

    /// Whether every event that was read has been handled.
    pub(crate) fn is_settled(&self) -> bool {
        let turns = self.turns.lock();
        turns.in_event.is_none() && !turns.work.iter().any(|queued| is_event(&queued.message))
    }

    /// An event has been handled: the next one may be, and the faults that waited for it.
    fn event_is_over(&self) {
        self.turns.lock().in_event = None;
        self.call_one();
    }
}

impl Turns {
    /// The first message that can be handled now.
    fn take(&mut self) -> Option<Queued> {
        let index = (self.work.iter()).position(|queued| self.is_ready(&queued.message))?;
        let queued = self.work.remove(index)?;
        if is_event(&queued.message) {
            self.in_event = Some(concern(&queued.message));
        }
        Some(queued)
    }

    /// Whether a message need not wait for an event.
    fn is_ready(&self, message: &Message) -> bool {
        let Message::Fault { at } = message else {
            return self.in_event.is_none();
        };
        let concerns = |concern: &Concern| concern.iter().any(|span| span.contains(*at));
        let pending = self.work.iter().map(|queued| concern(&queued.message));
        !pending.chain(self.in_event).any(|event| concerns(&event))
    }
}

/// What an event concerns: at most two spans.
type Concern = [HostSpan; 2];

/// The spans of an event; empty ones for a fault.
fn concern(message: &Message) -> Concern {
    let nothing = HostSpan::at(HostVa::new(0), 0);
    match message {
        Message::Unmap(span) | Message::Remove(span) => [*span, nothing],
        Message::Remap { from, to } => [*from, HostSpan::at(*to, from.bytes())],
        Message::Fault { .. } | Message::Fork(_) | Message::None => [nothing; 2],
    }
}

const fn is_event(message: &Message) -> bool {
    !matches!(message, Message::Fault { .. })
}

fn run(space: &LiveSpace) {
    loop {
        let queued = match space.pool.next() {
            Job::Stop => return,
            Job::Handle(queued) => queued,
            Job::Lead => match lead(space) {
                Some(queued) => queued,
                None => return,
            },
        };
        let event = is_event(&queued.message);
        handle(space, queued);
        if event {
            space.pool.event_is_over();
        }
    }
}

/// Reads until there is work for this thread and another one to read, or until the end: `None`.
fn lead(space: &LiveSpace) -> Option<Queued> {
    let mut messages = [const { Message::None }; BATCH];
    loop {
        if let Some(queued) = space.pool.hand_over() {
            return Some(queued);
        }
        let timeout = space.pool.look_around(space.env.now())?;
        let bell = space.pool.bell.as_fd();
        let readable = space.watch.uffd.wait_readable(bell, timeout);
        wake_due(space);
        if readable {
            space.reader_round.fetch_add(1, Ordering::AcqRel);
            let (count, mut number) = space.departures.read(space, &mut messages);
            messages[..count].sort_by_key(|message| !is_event(message)); // Causes first.
            for message in &mut messages[..count] {
                let message = core::mem::replace(message, Message::None);
                let event = is_event(&message);
                sort(space, Queued { message, number });
                number += u64::from(event);
            }
            // Pairs with `LiveSpace::settle_events`.
            space.reader_round.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// Does at once what waits for nobody, and queues the rest.
fn sort(space: &LiveSpace, queued: Queued) {
    if matches!(queued.message, Message::None) {
        return;
    }
    if let Message::Fault { at } = queued.message {
        let at = at.align_down(PAGE);
        space.reader_at.store(at.get(), Ordering::Relaxed);
        let resident = matches!(space.residency.lock().at(at), Some(State::Resident(_)));
        if !resident {
            if !serve_hole(space, at) && space.pool.is_settled() {
                // No news is out, or the system refuses: the armed hole came as its mapping grew.
                let _refused = space.watch.uffd.zero_page(at);
                wake(space, at);
            }
            return;
        }
    }
    space.pool.turns.lock().work.push_back(queued);
}

/// A thread of the process waits for a page that is on no device. False where nobody has armed it.
fn serve_hole(space: &LiveSpace, at: HostVa) -> bool {
    let travels = matches!(space.residency.lock().at(at), Some(State::Transit(_)));
    // Whoever ends the travel wakes the span.
    let known = travels || space.watch.disarm(at, &space.residency);
    if !travels {
        wake(space, at);
    }
    known
}

fn handle(space: &LiveSpace, queued: Queued) {
    let Queued { message, number } = queued;
    match message {
        Message::Fault { at } => serve_fault(space, at.align_down(PAGE)),
        Message::Unmap(span) => late_change(space, span, InvalidateReason::Unmap, number),
        Message::Remove(span) => late_change(space, span, InvalidateReason::Clear, number),
        Message::Remap { from, to } => late_move(space, from, to, number),
        // Taken out where it was read.
        Message::Fork(_) | Message::None => {}
    }
}

/// A thread of the process waits for the page at `at`.
fn serve_fault(space: &LiveSpace, at: HostVa) {
    let state = space.residency.lock().at(at).cloned();
    let Some(State::Resident(page)) = state else {
        let _or_it_comes_again = serve_hole(space, at);
        return;
    };
    match page.allocation.migrate_to_ram(at) {
        CpuFaultOutcome::Retry => wake(space, at),
        CpuFaultOutcome::RetryAt(time) => defer(space, at, time),
        CpuFaultOutcome::Lost => defer(space, at, space.env.now().after(LOST_RETRY)),
    }
}

fn wake(space: &LiveSpace, at: HostVa) {
    // Refused where the mapping is gone, and with it the waiting thread's page.
    let _gone = space.watch.uffd.wake(HostSpan::at(at, PAGE));
}

/// The process unmapped or cleared `span` and no bracket saw it. Something may be mapped there
/// again, with content that has left for a device again: only what left before the event was read
/// goes.
fn late_change(space: &LiveSpace, span: HostSpan, reason: InvalidateReason, number: u64) {
    space.emit(&Event::LateInvalidation { span });
    space.begin_change(&[span]);
    let pieces = space.recall_settled(span, number);
    space.remembered.forget();
    let invalidation = space.notifiers.start(span, reason);
    if reason == InvalidateReason::Unmap {
        let kept = space.residency.lock().residents(span);
        space.watch.forget_late(span, &kept);
    }
    space.let_go(pieces);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[span]);
}

/// The process moved a mapping and no bracket saw it: the pages follow, and then come home.
fn late_move(space: &LiveSpace, from: HostSpan, to: HostVa, number: u64) {
    space.emit(&Event::LateInvalidation { span: from });
    space.begin_change(&[from]);
    space.remembered.forget();
    let invalidation = space.notifiers.start(from, InvalidateReason::Unmap);
    loop {
        space.wait_settled(from);
        let mut table = space.residency.lock();
        if !table.is_travelling(from) {
            table.rebase(from, to, number);
            break;
        }
    }
    space.watch.moved(from, to);
    // Where the mapping stayed, it is still armed.
    let kept = space.residency.lock().residents(from);
    space.watch.forget_late(from, &kept);
    space.notifiers.end(&space.env, invalidation);
    space.end_change(&[from]);
    space.bring_home(HostSpan::at(to, from.bytes()), HomeCause::SpaceChange);
}

/// Wakes the thread that waits at `at` when it is time, or now if too many wait.
fn defer(space: &LiveSpace, at: HostVa, until: Ns) {
    let kept = space.pool.turns.lock().deferred.add(at, until);
    if kept {
        // Whoever leads may be asleep for longer than that.
        space.pool.ring();
    } else {
        wake(space, at);
    }
}

fn wake_due(space: &LiveSpace) {
    let now = space.env.now();
    while let Some(at) = { space.pool.turns.lock().deferred.take_due(now) } {
        wake(space, at);
    }
}

/// Faults that wait for a timeslice to end.
#[derive(Debug)]
struct Deferred {
    slots: [Option<(HostVa, Ns)>; DEFERRED],
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
    fn add(&mut self, at: HostVa, until: Ns) -> bool {
        let free = self.slots.iter_mut().find(|slot| slot.is_none());
        free.map(|slot| *slot = Some((at, until))).is_some()
    }

    fn next_timeout(&self, now: Ns) -> Option<Duration> {
        let first = self.slots.iter().flatten().map(|(_, until)| *until).min()?;
        Some(Duration::from_nanos(first.since(now).0))
    }

    fn take_due(&mut self, now: Ns) -> Option<HostVa> {
        let due = |slot: &&mut Option<(HostVa, Ns)>| slot.is_some_and(|(_, until)| until <= now);
        let slot = self.slots.iter_mut().find(due)?;
        slot.take().map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests;
