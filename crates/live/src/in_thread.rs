//! CPU faults that are served on the thread that faults: in compute-only memory, and on the
//! migratable heap at level mprotect.
//!
//! The same steps as in [`reader`](crate::reader), with the faulting thread in place of a reader:
//! memory on a device comes home, a span that travels is waited for, and a hole is filled (those of
//! the heap by the system).

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::event::HomeCause;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{CpuFaultOutcome, InvalidateReason};
use rustix::io::Errno;

use crate::bracket;
use crate::level::{FaultLevel, OpenError};
use crate::pool;
use crate::reader::{End, LOST_RETRY, Wanted, bring};
use crate::residency::{DevicePage, State};
use crate::space::LiveSpace;
use crate::sys::heap;
use crate::sys::in_thread::{self, Fault, FaultHook, Served};
use crate::sys::thread;
use crate::watch::Server;

/// Who serves.
struct Service {
    /// A space of level mprotect is open: its heap.
    heap: AtomicBool,
    /// The hull of compute-only memory.
    start: AtomicU64,
    end: AtomicU64,
}

#[unsafe(link_section = ".data")] // See `sys::owned`: the handler must find it in its place.
static SERVICE: Service = Service {
    heap: AtomicBool::new(false),
    start: AtomicU64::new(0),
    end: AtomicU64::new(0),
};

/// The program's allocator uses the heap from now on, where `level` needs it, and faults on it are
/// served, where `level` has that.
///
/// # Errors
/// As [`in_thread::install`].
pub(crate) fn start(level: FaultLevel) -> Result<(), Errno> {
    if level == FaultLevel::Mprotect {
        in_thread::install(&SERVICE)?;
        SERVICE.heap.store(true, Ordering::Release);
    }
    if !level.has_uffd() {
        heap::start_allocating();
    }
    Ok(())
}

/// Ends all of it. Everything is home.
pub(crate) fn stop() {
    SERVICE.set_hull(None);
    SERVICE.heap.store(false, Ordering::Release);
    heap::stop_allocating();
}

impl Service {
    /// A fault that reads one bound old and the other new sees a hull that has all memory of both, or
    /// misses only memory of which nothing is away: spans enter and leave while they are home.
    fn set_hull(&self, hull: Option<HostSpan>) {
        let (start, end) = hull.map_or((0, 0), |hull| (hull.start().get(), hull.end().get()));
        self.end.store(end, Ordering::Release);
        self.start.store(start, Ordering::Release);
    }
}

impl FaultHook for Service {
    fn may_serve(&self, at: HostVa) -> bool {
        let hull = self.start.load(Ordering::Acquire)..self.end.load(Ordering::Acquire);
        hull.contains(&at.get()) || (self.heap.load(Ordering::Acquire) && heap::contains(at))
    }

    fn serve(&self, fault: &Fault) -> Served {
        bracket::current_space().map_or(Served::NotOurs, |space| space.serve_here(fault))
    }
}

/// Memory whose faults are served by the thread that faults, until this is dropped.
#[must_use = "dropping it ends the service"]
pub struct ComputeOnly {
    space: Arc<LiveSpace>,
    span: HostSpan,
}

impl fmt::Debug for ComputeOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ComputeOnly").field(&self.span).finish()
    }
}

impl Drop for ComputeOnly {
    fn drop(&mut self) {
        self.space.set_server(self.span, Server::Reader);
    }
}

impl LiveSpace {
    /// Serves CPU faults in `span`, whole pages, on the thread that faults, which saves waking another
    /// one (`livehost.md` sections 3 and 7). The span is address space that the caller keeps: what is
    /// mapped there, now and later, counts.
    ///
    /// For memory that is computed on and nothing else. System calls on what is on a device fail with
    /// `EFAULT`, children of raw clones read zeros there, and a thread that blocks SIGBUS, or has a
    /// handler installed that does not pass it on, dies of a touch. Where mappings move out of the
    /// span unseen (`mremap` past the brackets), touches die until the news is handled.
    ///
    /// # Errors
    /// [`OpenError::Os`]: `ENOTSUP` where the system or the level has no such faults, or as the system
    /// refuses stacks.
    pub fn compute_only(self: &Arc<Self>, span: HostSpan) -> Result<ComputeOnly, OpenError> {
        let refused = OpenError::os("serve faults on the thread that faults");
        if self.watch.shards.compute_only().is_none() {
            return Err(refused(Errno::NOTSUP));
        }
        in_thread::install(&SERVICE).map_err(refused)?;
        self.set_server(span, Server::Faulting);
        Ok(ComputeOnly {
            space: Arc::clone(self),
            span,
        })
    }

    /// Changes who serves, while nothing of the span is away.
    fn set_server(&self, span: HostSpan, server: Server) {
        // The caller's own stack may be away.
        thread::run(|| {
            self.begin_change(&[span]);
            self.bring_home(span, HomeCause::SpaceChange);
            let invalidation = self.notifiers.start(span, InvalidateReason::Clear);
            let _ended = self.watch.suspend(span);
            self.watch.forget(span);
            self.watch.set_server(span, server);
            SERVICE.set_hull(self.watch.compute_only_hull());
            self.notifiers.end(&self.env, invalidation);
            self.end_change(&[span]);
        });
    }

    /// A thread of the process has failed to access the page of `fault`.
    fn serve_here(&self, fault: &Fault) -> Served {
        let at = fault.at.align_down(PAGE);
        if !heap::contains(at) {
            return self.serve_compute_only(at, fault);
        }
        let state = self.residency.lock().at(at).map(|at| at.1);
        match state {
            Some(State::Resident(page)) => self.fetch(page, at),
            Some(State::Transit(_)) => Served::Later(None),
            // Home by now, or never away.
            Some(State::Claimed) | None => match self.vma_around(at) {
                Some(vma) if vma.span.contains(at) && vma.allows(fault.access) => Served::Retry,
                _ => Served::NotOurs,
            },
        }
    }

    /// The same in compute-only memory.
    fn serve_compute_only(&self, at: HostVa, fault: &Fault) -> Served {
        let shard = self.watch.shards.compute_only();
        let Some(shard) = shard.filter(|_| fault.missing && self.watch.is_compute_only(at)) else {
            return Served::NotOurs;
        };
        let fault = pool::Fault { at, shard };
        match self.look_for(fault) {
            Wanted::Away { page, from } => self.fetch(page, from),
            Wanted::Travels(End::Told) => Served::Later(None),
            Wanted::Hole if self.fill_hole(fault) => Served::Retry,
            Wanted::Hole | Wanted::Travels(End::Untold) => Served::Later(Some(self.soon().0)),
        }
    }

    fn fetch(&self, page: DevicePage, at: HostVa) -> Served {
        match bring(page, at) {
            CpuFaultOutcome::Retry => Served::Retry,
            CpuFaultOutcome::RetryAt(time) => Served::Later(Some(time.0)),
            CpuFaultOutcome::Lost => Served::Later(Some(self.env.now().after(LOST_RETRY).0)),
        }
    }
}
