//! CPU faults on the migratable heap, served on the thread that faults (level mprotect).
//!
//! The same steps as in [`reader`](crate::reader), with the faulting thread in place of a reader:
//! memory on a device comes home, and a span that travels is waited for. There are no holes to fill,
//! the system does that.

use core::sync::atomic::{AtomicBool, Ordering};

use gpusvm::addr::{HostVa, PAGE};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::CpuFaultOutcome;
use rustix::io::Errno;

use crate::bracket;
use crate::level::FaultLevel;
use crate::reader::LOST_RETRY;
use crate::residency::State;
use crate::space::LiveSpace;
use crate::sys::heap;
use crate::sys::in_thread::{self, Fault, FaultHook, Served};

/// Who serves, while a space of level mprotect is open.
struct Service {
    on: AtomicBool,
}

#[unsafe(link_section = ".data")] // See `sys::owned`: the handler must find it in its place.
static SERVICE: Service = Service {
    on: AtomicBool::new(false),
};

/// The program's allocator uses the heap from now on, where `level` needs it, and faults on it are
/// served, where `level` has that.
///
/// # Errors
/// As [`in_thread::install`].
pub(crate) fn start(level: FaultLevel) -> Result<(), Errno> {
    if level == FaultLevel::Mprotect {
        in_thread::install(&SERVICE)?;
        SERVICE.on.store(true, Ordering::Release);
    }
    if !level.has_uffd() {
        heap::start_allocating();
    }
    Ok(())
}

/// Ends both. Everything is home.
pub(crate) fn stop() {
    SERVICE.on.store(false, Ordering::Release);
    heap::stop_allocating();
}

impl FaultHook for Service {
    fn may_serve(&self, at: HostVa) -> bool {
        self.on.load(Ordering::Acquire) && heap::contains(at)
    }

    fn serve(&self, fault: &Fault) -> Served {
        bracket::current_space().map_or(Served::NotOurs, |space| space.serve_in_thread(fault))
    }
}

impl LiveSpace {
    /// A thread of the process has failed to access the page of `fault`.
    fn serve_in_thread(&self, fault: &Fault) -> Served {
        let at = fault.at.align_down(PAGE);
        let state = self.residency.lock().at(at).map(|at| at.1.clone());
        match state {
            Some(State::Resident(page)) => match page.allocation.migrate_to_ram(at) {
                CpuFaultOutcome::Retry => Served::Retry,
                CpuFaultOutcome::RetryAt(time) => Served::Later(Some(time.0)),
                CpuFaultOutcome::Lost => Served::Later(Some(self.env.now().after(LOST_RETRY).0)),
            },
            Some(State::Transit(_)) => Served::Later(None),
            // Home by now, or never away.
            Some(State::Claimed) | None => match self.vma_around(at) {
                Some(vma) if vma.span.contains(at) && vma.allows(fault.access) => Served::Retry,
                _ => Served::NotOurs,
            },
        }
    }
}
