//! The attendant: one thread for what has to be done soon, by somebody who may wait.
//!
//! * Children of raw clones get what was away ([`fork`](crate::fork)). The reader may not do it: it
//!   would wait for migrations that wait for it.
//! * A process that dies of a signal gets its data home ([`last_wish`]). The dying thread cannot do
//!   it: it may have been anywhere.
//! * Staging slots get rid of used pages, and get fresh ones ([`staging`](crate::staging)).
//!   Migrations need not do that on their way.

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use gpusvm::addr::HostSpan;
use gpusvm::seam::env::Mutex;

use crate::env::LiveEnv;
use crate::fork::{self, Orphan};
use crate::space::LiveSpace;
use crate::sys::last_wish;
use crate::sys::thread::{self, RuntimeThread, SpawnError};
use crate::sys::uffd::Uffd;

/// The thread and what waits for it.
#[derive(Debug)]
pub(crate) struct Attendant {
    orphans: Mutex<LiveEnv, Vec<Orphan>>,
    stop: AtomicBool,
    thread: Mutex<LiveEnv, Option<RuntimeThread>>,
}

impl Default for Attendant {
    fn default() -> Self {
        Self {
            orphans: Mutex::<LiveEnv, _>::new(Vec::new()),
            stop: AtomicBool::new(false),
            thread: Mutex::<LiveEnv, _>::new(None),
        }
    }
}

impl Attendant {
    /// Starts the thread. It ends by [`stop`](Self::stop).
    pub(crate) fn start(space: &Arc<LiveSpace>) -> Result<(), SpawnError> {
        let served = Arc::clone(space);
        let thread = thread::spawn("gpusvm-attendant", move || served.attendant.run(&served))?;
        *space.attendant.thread.lock() = Some(thread);
        last_wish::attend();
        Ok(())
    }

    /// Takes a child in; `away` are the spans that it misses. Waits for nothing.
    pub(crate) fn admit(&self, memory: Uffd, away: Vec<HostSpan>) {
        if away.is_empty() {
            // Nothing is missing: the child's registrations end with the descriptor.
            return;
        }
        self.adopt(Orphan::new(memory, away));
    }

    /// Takes in a child that misses something.
    pub(crate) fn adopt(&self, orphan: Orphan) {
        self.orphans.lock().push(orphan);
        last_wish::call();
    }

    /// A child that waits, which the caller feeds.
    #[cfg(test)]
    pub(crate) fn next_orphan(&self) -> Option<Orphan> {
        self.orphans.lock().pop()
    }

    /// Ends the thread, after the children that wait.
    pub(crate) fn stop(&self) {
        last_wish::leave();
        self.stop.store(true, Ordering::Release);
        last_wish::call();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            thread.join();
        }
    }

    fn run(&self, space: &LiveSpace) {
        thread::let_others_first();
        loop {
            let seen = last_wish::calls();
            if last_wish::is_made() {
                space.bring_everything_home();
                last_wish::grant();
            }
            let next = self.orphans.lock().pop();
            match next {
                Some(orphan) => fork::feed(space, orphan),
                None if space.staging.tend() => {}
                None if self.stop.load(Ordering::Acquire) => return,
                None => last_wish::wait_called(seen),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{HostVa, PAGE_2M};

    use crate::sys::mapping::{AnonMapping, Huge};
    use crate::sys::vram::VramMode;
    use crate::toy::Bench;

    #[test]
    fn data_of_a_dying_process_comes_home() {
        let Some(bench) = Bench::open(VramMode::Copy) else {
            return;
        };
        let mut map = AnonMapping::new(2 << 20, Huge::Advise).expect("2M can be mapped");
        map.words_mut().fill(3);
        let span = HostSpan::at(HostVa::new(map.address()), PAGE_2M);
        bench.send(span).expect("plain memory migrates");
        assert!(bench.space.residency.lock().has_departed(span));
        // What the signal handler does before the end, which does not come here.
        last_wish::make();
        assert!(!bench.space.residency.lock().has_departed(span));
        assert!(map.words().iter().all(|word| *word == 3));
    }
}
