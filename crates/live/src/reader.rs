//! The fault reader: one thread that reads userfaultfd's messages.
//!
//! * A **fault** on device memory brings the allocation home, right here: one hop from the
//!   faulting thread and back. A fault on a span that travels is dropped: whoever ends the travel
//!   wakes the span, and the access faults again if it must. A fault on host memory in an armed
//!   piece disarms the piece, and the kernel fills the page itself.
//! * An **event** is news of a change that no bracket saw: bracketed calls take their span out of
//!   userfaultfd first. It is late by nature, and counted.
//!
//! The reader never waits for a lock that is held across a wait for it: it takes the notifier lock,
//! the watch and the residency table, whose holders neither touch memory that can be away nor wait
//! for events. Everything it needs lies in the runtime's own memory.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::event::{Event, HomeCause};
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::seam::mm::{CpuFaultOutcome, InvalidateReason};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::residency::State;
use crate::space::LiveSpace;
use crate::sys::thread::{self, RuntimeThread};
use crate::sys::uffd::Message;

/// Messages per read.
const BATCH: usize = 16;
/// Faults that can wait for their deadline; more are woken early and come again.
const DEFERRED: usize = 64;
/// How long a page that could not be brought home rests before the next try.
const LOST_RETRY: Ns = Ns::from_millis(10);

/// The running reader.
#[derive(Debug)]
pub(crate) struct Reader {
    thread: RuntimeThread,
    stop: Arc<OwnedFd>,
}

/// Starts the thread. It ends by [`Reader::stop`].
pub(crate) fn start(space: &Arc<LiveSpace>) -> Result<Reader, Errno> {
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let (space, told) = (Arc::clone(space), Arc::clone(&stop));
    let thread = thread::spawn("gpusvm-reader", move || run(&space, &told))
        .map_err(|error| error.errno())?;
    Ok(Reader { thread, stop })
}

impl Reader {
    /// Ends the thread after the message it is working on.
    pub(crate) fn stop(self) {
        // The counter of an eventfd takes this write in any state it can have here.
        let _written = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        self.thread.join();
    }
}

fn run(space: &LiveSpace, stop: &OwnedFd) {
    space
        .reader_tid
        .store(thread::current_id(), Ordering::Relaxed);
    let mut deferred = Deferred::default();
    let mut messages = [const { Message::None }; BATCH];
    loop {
        let timeout = deferred.next_timeout(space.env.now());
        let readable = space.watch.uffd.wait_readable(stop.as_fd(), timeout);
        deferred.wake_due(space);
        if readable {
            space.reader_round.fetch_add(1, Ordering::AcqRel);
            let count = space.watch.uffd.read(&mut messages).unwrap_or(0);
            for message in &mut messages[..count] {
                let message = core::mem::replace(message, Message::None);
                handle(space, message, &mut deferred);
            }
            // Pairs with `LiveSpace::settle_events`.
            space.reader_round.fetch_add(1, Ordering::AcqRel);
        } else if stopped(stop) {
            return;
        }
    }
}

fn stopped(stop: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        stop,
        rustix::event::PollFlags::IN,
    )];
    let none = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&none)).is_ok_and(|ready| ready > 0)
}

fn handle(space: &LiveSpace, message: Message, deferred: &mut Deferred) {
    let about = match &message {
        Message::Fault { at } => *at,
        Message::Unmap(span) | Message::Remove(span) => span.start(),
        Message::Remap { from, .. } => from.start(),
        Message::Fork(_) | Message::None => HostVa::new(0),
    };
    space.reader_at.store(about.get(), Ordering::Relaxed);
    match message {
        Message::Fault { at } => serve_fault(space, at.align_down(PAGE), deferred),
        Message::Unmap(span) => late_change(space, span, InvalidateReason::Unmap),
        Message::Remove(span) => late_change(space, span, InvalidateReason::Clear),
        Message::Remap { from, to } => late_move(space, from, to),
        // The child's descriptor closes: it reads what the parent brought home before.
        Message::Fork(_child) => {}
        Message::None => {}
    }
}

/// A thread of the process waits for the page at `at`.
fn serve_fault(space: &LiveSpace, at: HostVa, deferred: &mut Deferred) {
    let state = space.residency.lock().at(at).cloned();
    match state {
        None | Some(State::Claimed) => {
            space.watch.disarm(at, &space.residency);
            wake(space, at);
        }
        // Whoever ends the travel wakes the span.
        Some(State::Transit(_)) => {}
        Some(State::Resident(page)) => match page.allocation.migrate_to_ram(at) {
            CpuFaultOutcome::Retry => wake(space, at),
            CpuFaultOutcome::RetryAt(time) => deferred.add(space, at, time),
            CpuFaultOutcome::Lost => {
                deferred.add(space, at, space.env.now().after(LOST_RETRY));
            }
        },
    }
}

fn wake(space: &LiveSpace, at: HostVa) {
    // Refused where the mapping is gone, and with it the waiting thread's page.
    let _gone = space.watch.uffd.wake(HostSpan::at(at, PAGE));
}

/// The process unmapped or cleared `span` and no bracket saw it.
fn late_change(space: &LiveSpace, span: HostSpan, reason: InvalidateReason) {
    space.emit(&Event::LateInvalidation { span });
    let invalidation = space.notifiers.start(span, reason);
    let unmapped = reason == InvalidateReason::Unmap;
    let mapped_again = unmapped && space.is_mapped(span);
    if !mapped_again {
        space.drop_pages(span);
    }
    if unmapped && !mapped_again {
        space.watch.forget(span);
    }
    space.notifiers.end(&space.env, invalidation);
    if mapped_again {
        // Something is mapped there again. Whether the pages are its own cannot be told from
        // here; at home they do no harm, and content that is there already wins.
        bring_home_now(space, span);
    }
}

/// Brings home what is resident in `span`, without waiting for what travels: whoever travels may
/// be waiting for this thread to read on.
fn bring_home_now(space: &LiveSpace, span: HostSpan) {
    while let Some(allocation) = { space.residency.lock().any_resident(span) } {
        if allocation.bring_home(HomeCause::SpaceChange).is_err() {
            return;
        }
    }
}

/// The process moved a mapping and no bracket saw it: the pages follow.
fn late_move(space: &LiveSpace, from: HostSpan, to: HostVa) {
    space.emit(&Event::LateInvalidation { span: from });
    let invalidation = space.notifiers.start(from, InvalidateReason::Unmap);
    space.residency.lock().rebase(from, to);
    space.watch.moved(from, to);
    space.notifiers.end(&space.env, invalidation);
    bring_home_now(space, HostSpan::at(to, from.bytes()));
}

/// Reads and handles what is there, from inside the handling of another message: a MOVE waits for
/// events to be read. Faults are sent back to be raised again.
pub(crate) fn drain(space: &LiveSpace) {
    let mut messages = [const { Message::None }; BATCH];
    let count = space.watch.uffd.read(&mut messages).unwrap_or(0);
    let mut none = Deferred::default();
    for message in &mut messages[..count] {
        match core::mem::replace(message, Message::None) {
            Message::Fault { at } => wake(space, at.align_down(PAGE)),
            other => handle(space, other, &mut none),
        }
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
    fn add(&mut self, space: &LiveSpace, at: HostVa, until: Ns) {
        match self.slots.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some((at, until)),
            None => wake(space, at),
        }
    }

    fn next_timeout(&self, now: Ns) -> Option<Duration> {
        let first = self.slots.iter().flatten().map(|(_, until)| *until).min()?;
        Some(Duration::from_nanos(first.since(now).0))
    }

    fn wake_due(&mut self, space: &LiveSpace) {
        let now = space.env.now();
        for slot in &mut self.slots {
            if let Some((at, until)) = *slot
                && until <= now
            {
                *slot = None;
                wake(space, at);
            }
        }
    }
}
