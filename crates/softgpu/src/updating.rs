//! Atomics on host memory: carried by the bus, or by one unit at a time.

use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm_abi::bus::{AtomicOp, BusError, Park};
use lock_api::RawMutex;

use crate::device::SoftGpu;

/// What a device does about an atomic on host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SmemAtomics {
    /// The bus carries it: one access, between which nothing comes.
    #[default]
    OnTheBus,
    /// A read and a write. Units keep out of each other's way; the CPU knows nothing of it.
    ReadThenWrite,
}

/// Nobody updates.
const FREE: u32 = 0;
/// Somebody does, and perhaps others wait.
const TAKEN: u32 = 1;

/// A lock for which its waiters sleep, as whoever has it may: a page may have to come home first.
#[derive(Debug, Default)]
pub(crate) struct Updating(AtomicU32);

impl Updating {
    /// Runs `act` while no other unit does.
    pub(crate) fn alone<T>(&self, park: &dyn Park, act: impl FnOnce() -> T) -> T {
        while self.0.swap(TAKEN, Ordering::Acquire) == TAKEN {
            park.wait(&self.0, TAKEN, None);
        }
        let done = act();
        self.0.store(FREE, Ordering::Release);
        park.wake(&self.0);
        done
    }
}

impl<R: RawMutex> SoftGpu<R> {
    /// Updates a word of host memory.
    pub(crate) fn atomic_on_bus(&self, at: u64, op: AtomicOp) -> Result<u64, BusError> {
        match self.config().smem_atomics {
            SmemAtomics::OnTheBus => self.bus.atomic(at, op),
            SmemAtomics::ReadThenWrite => self.updating.alone(&*self.park, || {
                let mut word = [0; 8];
                self.bus.read(at, &mut word)?;
                let former = u64::from_ne_bytes(word);
                self.bus.write(at, &op.apply(former).to_ne_bytes())?;
                Ok(former)
            }),
        }
    }
}
