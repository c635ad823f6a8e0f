//! Work for the device: kernels, the tile through which they see memory, and dispatches.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use gpusvm_abi::bus::{AtomicOp, BusError};
use gpusvm_abi::fault::AccessType;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Work that the device does in groups. A group runs on one unit, from beginning to end.
pub trait Kernel: Sync {
    /// Does the work of `group`.
    ///
    /// # Errors
    /// What an access answered: pass it on.
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop>;
}

/// An access that the driver refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// Address.
    pub address: u64,
    /// Wanted right.
    pub access: AccessType,
}

/// Why a kernel stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The driver refused an access.
    Fault(DeviceFault),
    /// Host memory did not answer, although a translation said so.
    Bus(BusError),
    /// The dispatch was cancelled.
    Cancelled,
    /// Another thread plays this unit.
    UnitBusy,
    /// There is no such unit.
    NoUnit,
    /// The device belongs to another process.
    Foreign,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => {
                let what = match fault.access {
                    AccessType::Read => "read",
                    AccessType::Write => "write",
                    AccessType::Atomic => "atomic",
                };
                write!(f, "device {what} at {:#x} was refused", fault.address)
            }
            Self::Bus(error) => error.fmt(f),
            Self::Cancelled => f.write_str("cancelled"),
            Self::UnitBusy => f.write_str("another thread plays this unit"),
            Self::NoUnit => f.write_str("the device has no such unit"),
            Self::Foreign => f.write_str("the device belongs to the process that forked this one"),
        }
    }
}

impl core::error::Error for Stop {}

/// What a unit offers to a kernel; bytes only.
pub(crate) trait Access {
    fn load(&mut self, va: u64, out: &mut [u8]) -> Result<(), Stop>;
    fn store(&mut self, va: u64, data: &[u8]) -> Result<(), Stop>;
    fn atomic(&mut self, va: u64, op: AtomicOp) -> Result<u64, Stop>;
    /// Loads one element of `size` bytes from each address.
    fn gather(&mut self, from: &[u64], size: usize, out: &mut [u8]) -> Result<(), Stop>;
}

/// A kernel's view of device addresses. Every method translates, faults where it must, and moves
/// bytes between memory and the kernel's own buffers.
pub struct Tile<'a> {
    access: &'a mut dyn Access,
}

impl fmt::Debug for Tile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tile").finish_non_exhaustive()
    }
}

impl<'a> Tile<'a> {
    pub(crate) fn new(access: &'a mut dyn Access) -> Self {
        Self { access }
    }

    /// Loads elements from `va` on.
    ///
    /// # Errors
    /// [`Stop`]; a prefix of `out` may be filled.
    pub fn load<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        va: u64,
        out: &mut [T],
    ) -> Result<(), Stop> {
        self.access.load(va, out.as_mut_bytes())
    }

    /// Stores elements from `va` on.
    ///
    /// # Errors
    /// [`Stop`]; a prefix may be stored.
    pub fn store<T: IntoBytes + Immutable>(&mut self, va: u64, data: &[T]) -> Result<(), Stop> {
        self.access.store(va, data.as_bytes())
    }

    /// Loads one element.
    ///
    /// # Errors
    /// [`Stop`].
    pub fn load_one<T: FromBytes + IntoBytes + Immutable + Copy>(
        &mut self,
        va: u64,
    ) -> Result<T, Stop> {
        let mut one = [T::new_zeroed()];
        self.load(va, &mut one)?;
        Ok(one[0])
    }

    /// Stores one element.
    ///
    /// # Errors
    /// [`Stop`].
    pub fn store_one<T: IntoBytes + Immutable>(&mut self, va: u64, value: T) -> Result<(), Stop> {
        self.store(va, &[value])
    }

    /// Loads one element from each address, as many as the shorter of the two has.
    ///
    /// # Errors
    /// [`Stop`]; a prefix of `out` may be filled.
    pub fn gather<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        from: &[u64],
        out: &mut [T],
    ) -> Result<(), Stop> {
        let count = from.len().min(out.len());
        self.access
            .gather(&from[..count], size_of::<T>(), out[..count].as_mut_bytes())
    }

    /// Stores one element to each address, as many as the shorter of the two has.
    ///
    /// # Errors
    /// [`Stop`]; a prefix may be stored.
    pub fn scatter<T: IntoBytes + Immutable>(
        &mut self,
        to: &[u64],
        data: &[T],
    ) -> Result<(), Stop> {
        to.iter()
            .zip(data)
            .try_for_each(|(va, one)| self.access.store(*va, one.as_bytes()))
    }

    /// Updates the 8-byte aligned word at `va` atomically; returns its former value.
    ///
    /// # Errors
    /// [`Stop`]; the word is unchanged then.
    pub fn atomic(&mut self, va: u64, op: AtomicOp) -> Result<u64, Stop> {
        self.access.atomic(va, op)
    }
}

/// One launch of a kernel: groups `0..groups`, each done once by whichever unit comes first.
pub struct Dispatch<'k> {
    pub(crate) kernel: &'k dyn Kernel,
    pub(crate) asid: u32,
    groups: u32,
    next: AtomicU32,
    cancelled: AtomicBool,
    /// Some unit stopped on an error, which it returns: the others end quietly.
    failed: AtomicBool,
    /// What its units did.
    pub counts: Counts,
}

/// What the units of a dispatch did.
#[derive(Debug, Default)]
pub struct Counts {
    /// Bytes loaded.
    pub loaded: AtomicU64,
    /// Bytes stored.
    pub stored: AtomicU64,
    /// Faults raised.
    pub faults: AtomicU64,
    /// Page-table walks.
    pub walks: AtomicU64,
}

impl fmt::Debug for Dispatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatch")
            .field("groups", &self.groups)
            .finish_non_exhaustive()
    }
}

impl<'k> Dispatch<'k> {
    /// `groups` groups of `kernel` in address space `asid`.
    #[must_use]
    pub fn new(kernel: &'k dyn Kernel, groups: u32, asid: u32) -> Self {
        Self {
            kernel,
            asid,
            groups,
            next: AtomicU32::new(0),
            cancelled: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            counts: Counts::default(),
        }
    }

    /// Makes every unit stop at its next access or group.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Groups that were begun.
    pub fn begun(&self) -> u32 {
        self.next.load(Ordering::Relaxed).min(self.groups)
    }

    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Whether units should stop, and whether that is an error of this unit's.
    pub(crate) fn check(&self) -> Result<(), Stop> {
        let stop = self.cancelled.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed);
        if stop { Err(Stop::Cancelled) } else { Ok(()) }
    }

    /// Whether a unit's [`Stop::Cancelled`] only follows another unit's error.
    pub(crate) fn follows_failure(&self) -> bool {
        self.failed.load(Ordering::Relaxed) && !self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn take_group(&self) -> Option<u32> {
        let group = self.next.fetch_add(1, Ordering::Relaxed);
        (group < self.groups).then_some(group)
    }
}
