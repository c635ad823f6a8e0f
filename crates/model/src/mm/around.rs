//! What stands around the steps of a call: locks, notifier brackets, switch points, waiting.

use core::cell::RefCell;

use gpusvm::seam::mm::InvalidateReason;

use crate::mm::errno::Signal;
use crate::mm::memory::DevicePage;
use crate::mm::{Machine, Pages, Pid};

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// With other readers.
    Read,
    /// Alone.
    Write,
}

/// What came of waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Something may have changed.
    Again,
    /// Nobody else is there who could change anything.
    Hopeless,
}

/// The surroundings of a call. None of the methods is called with the state borrowed.
pub trait Around {
    /// A bracket that was opened.
    type Open;

    /// Runs one step on the state.
    fn with<R>(&self, act: impl FnOnce(&mut Machine) -> R) -> R;

    /// Takes the mmap lock of a process. May sleep.
    fn lock(&self, pid: Pid, how: Hold);

    /// Gives it back.
    fn unlock(&self, pid: Pid, how: Hold);

    /// Announces a change: on return no device uses `pages`.
    fn open(&self, pid: Pid, pages: Pages, reason: InvalidateReason) -> Self::Open;

    /// The change is complete.
    fn close(&self, pid: Pid, open: Self::Open);

    /// Between two steps: others may run.
    fn step(&self);

    /// A number that changes whenever somebody who waits should look again.
    fn changes(&self) -> u32;

    /// Tells those who wait to look again.
    fn announce(&self);

    /// Waits while [`changes`](Self::changes) is still `seen`. No lock may be held.
    fn wait(&self, seen: u32) -> Waited;

    /// Brings a device page home that a CPU access at `page` met, or waits until that may be tried
    /// again. No lock may be held.
    ///
    /// # Errors
    /// The content is lost.
    fn device_fault(
        &self,
        pid: Pid,
        device: DevicePage,
        page: u32,
        seen: u32,
    ) -> Result<(), Signal>;

    /// Tells the program of a missing page whose faults it serves, and waits. No lock may be held.
    ///
    /// # Errors
    /// Nobody serves it.
    fn pager_fault(&self, pid: Pid, page: u32, seen: u32) -> Result<(), Signal>;
}

/// The mmap lock of a process, held until dropped.
#[derive(Debug)]
pub struct MmapLock<'a, A: Around> {
    around: &'a A,
    pid: Pid,
    how: Hold,
}

impl<'a, A: Around> MmapLock<'a, A> {
    /// Takes it together with other readers.
    pub fn read(around: &'a A, pid: Pid) -> Self {
        Self::take(around, pid, Hold::Read)
    }

    /// Takes it alone.
    pub fn write(around: &'a A, pid: Pid) -> Self {
        Self::take(around, pid, Hold::Write)
    }

    fn take(around: &'a A, pid: Pid, how: Hold) -> Self {
        around.lock(pid, how);
        Self { around, pid, how }
    }
}

impl<A: Around> Drop for MmapLock<'_, A> {
    fn drop(&mut self) {
        self.around.unlock(self.pid, self.how);
    }
}

/// A machine that nobody else uses: no locks, no devices, no waiting.
#[derive(Debug)]
pub struct Solo<'a>(RefCell<&'a mut Machine>);

impl<'a> Solo<'a> {
    /// Calls on `machine`.
    pub const fn new(machine: &'a mut Machine) -> Self {
        Self(RefCell::new(machine))
    }
}

impl Around for Solo<'_> {
    type Open = ();

    fn with<R>(&self, act: impl FnOnce(&mut Machine) -> R) -> R {
        act(&mut self.0.borrow_mut())
    }

    fn lock(&self, _pid: Pid, _how: Hold) {}

    fn unlock(&self, _pid: Pid, _how: Hold) {}

    fn open(&self, _pid: Pid, _pages: Pages, _reason: InvalidateReason) {}

    fn close(&self, _pid: Pid, _open: ()) {}

    fn step(&self) {}

    fn changes(&self) -> u32 {
        0
    }

    fn announce(&self) {}

    fn wait(&self, _seen: u32) -> Waited {
        Waited::Hopeless
    }

    fn device_fault(
        &self,
        _pid: Pid,
        _device: DevicePage,
        _page: u32,
        _seen: u32,
    ) -> Result<(), Signal> {
        Err(Signal::Bus)
    }

    fn pager_fault(&self, _pid: Pid, _page: u32, _seen: u32) -> Result<(), Signal> {
        Err(Signal::Bus)
    }
}
