//! The layer that runs the steps of the [`mm`](crate::mm) as Linux runs them.
//!
//! [`Kernel`] holds the state of a machine, a lock and interval notifiers per process, and the
//! counted references to device allocations. [`ModelSpace`] is one process: what the framework
//! calls ([`AddressSpace`](gpusvm::seam::mm::AddressSpace)), what a program calls (`mmap`, loads
//! and stores, ...). [`Bus`](bus::Bus) is what a device may do to host memory.
//!
//! ```text
//!  a change:   mmap lock ─ start(span) ─ step ─ yield ─ step ─ ... ─ end ─ unlock
//! ```
//!
//! The state is behind one mutex that is held for a step and never across a call into a notifier,
//! an allocation, or a switch point: between any two steps another actor may run. The mmap lock is
//! a word of its own, waited for through the environment.
//!
//! Lock order: mmap lock → notifiers → what their sinks take; the state and the table of
//! allocations are leaves.

pub mod bus;
mod fault_in;
mod lock;
mod migrate;
mod pager;
mod program;
mod snapshot;
mod space;

#[cfg(test)]
mod tests;

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use gpusvm::addr::PageCount;
use gpusvm::mmu::{IntervalNotifiers, Invalidation};
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::{Environment, Mutex, Point};
use gpusvm::seam::mm::{AllocationRef, CpuFault, CpuFaultOutcome, InvalidateReason};

use crate::kernel::bus::Violation;
use crate::kernel::lock::MmapWord;
use crate::mm::around::{Around, Hold, Waited};
use crate::mm::changes::Changes;
use crate::mm::check::{Broken, check, check_quiet};
use crate::mm::errno::Signal;
use crate::mm::memory::DevicePage;
use crate::mm::{Machine, Pages, Pid, Shape};

pub use migrate::ModelMigration;
pub use space::ModelSpace;

/// What a process has outside of the plain state.
struct Sync<E: Environment> {
    mmap: MmapWord,
    notifiers: IntervalNotifiers<E>,
}

/// A machine at work.
pub struct Kernel<E: Environment> {
    env: Arc<E>,
    shape: Shape,
    state: Mutex<E, Machine>,
    processes: Vec<Sync<E>>,
    /// Faults that a program has to serve.
    faults: Mutex<E, pager::Faults>,
    /// Device allocations, in the places by which the state knows them.
    allocations: Mutex<E, Vec<Option<AllocationRef>>>,
    /// What waits for pages sleeps on this.
    changed: AtomicU32,
    /// Grows with every step that may change what somebody checks.
    generation: Arc<AtomicU64>,
    /// As [`Memory::refused`](crate::mm::memory::Memory::refused), to be read with no lock.
    refused: AtomicU32,
    violations: Mutex<E, Vec<Violation>>,
    violated: AtomicBool,
}

impl<E: Environment> fmt::Debug for Kernel<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").finish_non_exhaustive()
    }
}

impl<E: Environment> Kernel<E> {
    /// A machine with one process; [`ModelSpace::first`] is its address space.
    #[must_use]
    pub fn new(env: Arc<E>, shape: Shape) -> Arc<Self> {
        Self::with_machine(env, Machine::new(shape))
    }

    /// A machine in a given state, which must not have device pages.
    #[must_use]
    pub fn with_machine(env: Arc<E>, machine: Machine) -> Arc<Self> {
        let process = |_pid: Pid| Sync {
            mmap: MmapWord::default(),
            notifiers: IntervalNotifiers::new(),
        };
        let mut machine = machine;
        let mut all = Mutant::ALL.iter().copied();
        machine.mutant = all.find(|mutant| env.mutant(*mutant));
        Arc::new(Self {
            env,
            shape: machine.shape().clone(),
            processes: machine.pids().map(process).collect(),
            state: Mutex::<E, _>::new(machine),
            faults: Mutex::<E, _>::new(pager::Faults::default()),
            allocations: Mutex::<E, _>::new(Vec::new()),
            changed: AtomicU32::new(0),
            generation: Arc::new(AtomicU64::new(0)),
            refused: AtomicU32::new(0),
            violations: Mutex::<E, _>::new(Vec::new()),
            violated: AtomicBool::new(false),
        })
    }

    /// Clock, locks, waiting.
    pub const fn env(&self) -> &Arc<E> {
        &self.env
    }

    /// Sizes of the machine, which never change.
    pub const fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Looks at the state.
    pub fn look<R>(&self, at: impl FnOnce(&Machine) -> R) -> R {
        at(&self.state.lock())
    }

    /// Looks at the state, and moves what has changed since the last such look into `changes`.
    pub fn look_at_changes<R>(
        &self,
        changes: &mut Changes,
        at: impl FnOnce(&Machine, &mut Changes) -> R,
    ) -> R {
        let mut state = self.state.lock();
        state.take_changes(changes);
        at(&state, changes)
    }

    /// A copy of the state.
    pub fn snapshot(&self) -> Machine {
        self.look(Clone::clone)
    }

    /// Checks the state; true at every switch point.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self) -> Result<(), Broken> {
        self.look(check)
    }

    /// Refuses one allocation, of host memory, of a device page or for a page table: the `nth` one from
    /// now, counted from 1; none, where it is 0.
    pub fn refuse(&self, nth: u32) {
        self.with(|mm| mm.memory.refuse(nth));
    }

    /// Allocations of host memory that were refused so far, by [`refuse`](Self::refuse). Takes no lock.
    #[must_use]
    pub fn refused(&self) -> u32 {
        self.refused.load(Ordering::Relaxed)
    }

    /// A number that grows with everything that [`look_at_changes`](Self::look_at_changes) may find,
    /// and with every violation.
    #[must_use]
    pub const fn generation(&self) -> &Arc<AtomicU64> {
        &self.generation
    }

    /// Whether some process changes its mappings: they may be in the middle of it, and
    /// [`check`](Self::check) finds fault with that.
    #[must_use]
    pub fn is_mapping(&self) -> bool {
        self.processes.iter().any(|sync| sync.mmap.is_written())
    }

    /// Checks the state when no operation is under way.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check_quiet(&self) -> Result<(), Broken> {
        self.look(check_quiet)
    }

    /// Whether a device has used memory that is not its own.
    #[must_use]
    pub fn is_violated(&self) -> bool {
        self.violated.load(Ordering::Relaxed)
    }

    /// Accesses by devices to memory that is not theirs, so far.
    pub fn violations(&self) -> Vec<Violation> {
        self.violations.lock().clone()
    }

    fn sync(&self, pid: Pid) -> &Sync<E> {
        &self.processes[usize::from(pid.0)]
    }

    /// Enters an allocation and returns its place.
    fn enter(&self, allocation: &AllocationRef) -> u32 {
        let mut table = self.allocations.lock();
        let free = table.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            table.push(None);
            table.len() - 1
        });
        table[place] = Some(Arc::clone(allocation));
        u32::try_from(place).unwrap_or(u32::MAX)
    }

    fn allocation(&self, place: u32) -> Option<AllocationRef> {
        self.allocations.lock().get(place as usize)?.clone()
    }

    /// Drops the references to allocations that have lost their last page.
    fn release(&self, places: Vec<u32>) {
        for place in places {
            let gone = self.allocations.lock()[place as usize].take();
            drop(gone);
        }
    }
}

impl<E: Environment> Around for Kernel<E> {
    type Open = Invalidation;

    fn with<R>(&self, act: impl FnOnce(&mut Machine) -> R) -> R {
        let mut state = self.state.lock();
        let result = act(&mut state);
        if state.has_changes() {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        let released = core::mem::take(&mut state.released);
        self.refused
            .store(state.memory.refused(), Ordering::Relaxed);
        drop(state);
        if !released.is_empty() {
            self.release(released);
        }
        result
    }

    fn lock(&self, pid: Pid, how: Hold) {
        self.env.yield_point(Point::HostLock);
        self.sync(pid).mmap.lock(&*self.env, how);
    }

    fn unlock(&self, pid: Pid, how: Hold) {
        self.sync(pid).mmap.unlock(&*self.env, how);
    }

    fn open(&self, pid: Pid, pages: Pages, reason: InvalidateReason) -> Invalidation {
        let forgotten = match reason {
            InvalidateReason::Unmap => self.env.mutant(Mutant::NotBracketed),
            InvalidateReason::ProtectPage => self.env.mutant(Mutant::ForkNotBracketed),
            InvalidateReason::Clear
            | InvalidateReason::ProtectVma
            | InvalidateReason::Release
            | InvalidateReason::Migrate
            | InvalidateReason::Exclusive(_) => false,
        };
        let told = if forgotten { Pages::new(0, 0) } else { pages };
        let span = self.shape.span(told);
        self.sync(pid).notifiers.start(span, reason)
    }

    fn close(&self, pid: Pid, open: Invalidation) {
        self.sync(pid).notifiers.end(&self.env, open);
    }

    fn step(&self) {
        self.env.yield_point(Point::PteWrite);
    }

    fn changes(&self) -> u32 {
        self.changed.load(Ordering::Acquire)
    }

    fn announce(&self) {
        self.changed.fetch_add(1, Ordering::Release);
        self.env.wake(&self.changed);
    }

    fn wait(&self, seen: u32) -> Waited {
        self.env.wait(&self.changed, seen);
        Waited::Again
    }

    fn device_fault(
        &self,
        _pid: Pid,
        device: DevicePage,
        page: u32,
        _seen: u32,
    ) -> Result<(), Signal> {
        let Some(allocation) = self.allocation(device.place) else {
            return Ok(());
        };
        let offset = PageCount::new(device.page.into()).bytes();
        let fault = CpuFault {
            at: self.shape.address(page),
            vram: allocation.vram().start().plus(offset),
        };
        match allocation.migrate_to_ram(fault) {
            CpuFaultOutcome::Retry => self.env.yield_point(Point::Retry),
            CpuFaultOutcome::RetryAt(time) => self.env.sleep_until(time),
            CpuFaultOutcome::Lost => return Err(Signal::Bus),
        }
        Ok(())
    }

    fn pager_fault(&self, pid: Pid, page: u32, seen: u32) -> Result<(), Signal> {
        self.raise(pid, page, seen);
        Ok(())
    }
}
