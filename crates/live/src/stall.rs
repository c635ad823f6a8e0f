//! What the threads of the process are doing: for reports about a process that no longer moves.
//!
//! Only looks: the table of sleepers that [`sys::waits`](crate::sys::waits) keeps, and what the
//! system tells about threads. A holder is found by the stack on which it took the lock, which may
//! be a bracket's.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::fs;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_abi::bus::SystemBus;

use crate::space::LiveSpace;
use crate::sys::fault_copy::{self, LiveBus};
use crate::sys::futex;
use crate::sys::procmap::ProcMap;
use crate::sys::waits::{self, Reason, Sleeper};

/// One thread.
#[derive(Clone, Debug)]
pub struct ThreadState {
    /// Kernel id.
    pub id: u32,
    /// Name.
    pub name: String,
    /// Where in the kernel it sleeps, or `running`.
    pub place: String,
    /// What it waits for, where it waits for something of ours.
    pub wait: Option<Wait>,
}

/// A sleep on something of the runtime's.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// Why.
    pub reason: Reason,
    /// Address of the word slept on, to be named by [`LiveSpace::name_of`].
    pub word: u64,
    /// Kernel id of the thread that holds it, where that is known.
    pub holder: Option<u32>,
    /// For how long.
    pub since: Duration,
}

/// What the fault readers are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReaderState {
    /// One of them is reading or sorting messages.
    pub reading: bool,
    /// A thread has the lead: it reads, or waits for something to read.
    pub led: bool,
    /// Threads without work.
    pub idle: usize,
    /// Messages that wait for a thread.
    pub queued: usize,
    /// What the last fault was about.
    pub last_fault: HostVa,
}

struct Found {
    state: ThreadState,
    stack: Option<HostSpan>,
}

/// All threads of the process. Allocates and reads files: for threads of the runtime.
#[must_use]
pub fn threads() -> Vec<ThreadState> {
    fault_copy::install();
    let sleepers = waits::sleepers();
    let mut found: Vec<Found> = thread_ids().into_iter().map(look_at).collect();
    let stacks: Vec<_> = found
        .iter()
        .map(|thread| (thread.state.id, thread.stack))
        .collect();
    for thread in &mut found {
        let sleeper = sleepers.iter().find(|s| s.thread == thread.state.id);
        thread.state.wait = sleeper.map(|sleeper| wait_of(sleeper, &stacks));
    }
    found.into_iter().map(|thread| thread.state).collect()
}

fn wait_of(sleeper: &Sleeper, stacks: &[(u32, Option<HostSpan>)]) -> Wait {
    // The lock may have changed hands since the thread fell asleep.
    let mark = match sleeper.reason {
        Reason::Lock => holder_of(sleeper.word),
        _ => 0,
    };
    let marked = |stack: HostSpan| {
        let end = |at: HostVa| usize::try_from(at.get()).unwrap_or(0);
        futex::is_marked(mark, end(stack.start())..end(stack.end()))
    };
    let holder = stacks
        .iter()
        .filter(|_| mark != 0)
        .find(|(_, stack)| stack.is_some_and(marked));
    Wait {
        reason: sleeper.reason,
        word: sleeper.word,
        holder: holder.map(|(id, _)| *id),
        since: Duration::from_nanos(futex::now_ns().saturating_sub(sleeper.since_ns)),
    }
}

/// The mark of who holds the lock at `word` right now, 0 where there is none any more.
fn holder_of(word: u64) -> u32 {
    let mut now = [0; 4];
    match LiveBus.read(word, &mut now) {
        Ok(()) => futex::mark_in(u32::from_ne_bytes(now)),
        Err(_gone) => 0,
    }
}

fn thread_ids() -> Vec<u32> {
    let entries = fs::read_dir("/proc/self/task").into_iter().flatten();
    let mut ids: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

fn look_at(id: u32) -> Found {
    let text = |file: &str| {
        fs::read_to_string(format!("/proc/self/task/{id}/{file}"))
            .map_or_else(|_gone| String::new(), |text| text.trim().to_owned())
    };
    let call = text("syscall");
    let place = match text("wchan") {
        place if place.is_empty() || place == "0" => call.split(' ').next().map(str::to_owned),
        place => Some(place),
    };
    let state = ThreadState {
        id,
        name: text("comm"),
        place: place.unwrap_or_default(),
        wait: None,
    };
    Found {
        state,
        stack: stack_of(&call),
    }
}

/// The mapping of a sleeping thread's stack, from its line in `/proc`: the stack pointer is the last
/// but one.
fn stack_of(call: &str) -> Option<HostSpan> {
    let pointer = call.split(' ').rev().nth(1)?.strip_prefix("0x")?;
    let at = HostVa::new(u64::from_str_radix(pointer, 16).ok()?);
    let map = ProcMap::open().ok()?.query(at).ok()??;
    map.span.contains(at).then_some(map.span)
}

/// Whether the word at `word` is part of `object`.
#[must_use]
pub fn lies_in<T>(object: &T, word: u64) -> bool {
    let start = core::ptr::from_ref(object).addr();
    usize::try_from(word).is_ok_and(|word| (start..start + size_of::<T>()).contains(&word))
}

impl LiveSpace {
    /// What the fault readers are doing right now.
    #[must_use]
    pub fn reader_state(&self) -> ReaderState {
        let (led, idle, queued) = self.pool.state();
        ReaderState {
            reading: self.reader_round.load(Ordering::Relaxed) & 1 == 1,
            led,
            idle,
            queued,
            last_fault: HostVa::new(self.reader_at.load(Ordering::Relaxed)),
        }
    }

    /// Which part of the host the word at `word` belongs to.
    #[must_use]
    pub fn name_of(&self, word: u64) -> Option<&'static str> {
        let parts = [
            (lies_in(&self.notifiers, word), "notifiers"),
            (lies_in(&self.residency, word), "residency"),
            (lies_in(&self.watch, word), "watch"),
            (self.watch.shards.owns_lock(word), "events of a shard"),
            (lies_in(&self.staging, word), "staging"),
            (lies_in(self, word), "host"),
            (lies_in(&*self.env, word), "environment"),
        ];
        parts.iter().find(|(here, _)| *here).map(|(_, name)| *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::futex::RawFutexMutex;
    use crate::sys::thread;
    use std::sync::Arc;
    use std::sync::mpsc::{Sender, channel};

    type Lock = lock_api::Mutex<RawFutexMutex, ()>;

    /// Takes `first`, says so, waits for the word to go on, and takes `second`.
    fn take_both(first: Arc<Lock>, second: Arc<Lock>, ready: Sender<u32>) -> Sender<()> {
        let (go, wait) = channel();
        let ended = thread::spawn("crossed", move || {
            let _one = first.lock();
            ready.send(thread::current_id()).expect("the test listens");
            wait.recv().expect("the test answers");
            let _two = second.lock();
        });
        // It never ends, and nobody waits for it: that is the test.
        drop(ended.expect("one more thread"));
        go
    }

    #[test]
    fn threads_that_wait_for_each_other_are_told_with_what_they_hold() {
        let (a, b) = (Arc::new(Lock::new(())), Arc::new(Lock::new(())));
        let (ready, ids) = channel();
        let first = take_both(Arc::clone(&a), Arc::clone(&b), ready.clone());
        let one = ids.recv().expect("it takes the first");
        let second = take_both(Arc::clone(&b), Arc::clone(&a), ready);
        let two = ids.recv().expect("it takes the first");
        first.send(()).expect("it waits");
        second.send(()).expect("it waits");
        let crossed = |from: u32, to: u32, lock: &Lock| {
            threads().iter().any(|thread| {
                thread.id == from
                    && thread.name == "crossed"
                    && thread.wait.is_some_and(|wait| {
                        wait.reason == Reason::Lock
                            && wait.holder == Some(to)
                            && lies_in(lock, wait.word)
                    })
            })
        };
        while !(crossed(one, two, &b) && crossed(two, one, &a)) {
            std::thread::yield_now();
        }
    }
}
