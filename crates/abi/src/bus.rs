//! The buses: device to host memory, driver to device, device to driver.
//!
//! The traits are written for their consumer. A host implements [`SystemBus`] and [`VramStore`],
//! a device implements [`DevicePort`], a driver implements [`FaultHandler`]; none of them knows
//! the others' types.

use core::fmt;
use core::sync::atomic::AtomicU32;

use crate::fault::{FaultRecord, FaultResponse};

/// A device access to host memory hit nothing: the address is unmapped or forbids the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusError {
    /// Bus address at which the access stopped.
    pub address: u64,
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory answers at bus address {:#x}", self.address)
    }
}

impl core::error::Error for BusError {}

/// A 64-bit read-modify-write. Every operation returns the value before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// Adds, wrapping.
    Add(u64),
    /// Exclusive or.
    Xor(u64),
    /// Stores the smaller of the two, unsigned.
    Min(u64),
    /// Stores the larger of the two, unsigned.
    Max(u64),
    /// Stores `new` where the word equals `expected`.
    CompareExchange {
        /// Value the word must have.
        expected: u64,
        /// Value to store.
        new: u64,
    },
}

impl AtomicOp {
    /// The word after the operation, given the word before it.
    #[must_use]
    pub const fn apply(self, old: u64) -> u64 {
        match self {
            Self::Add(v) => old.wrapping_add(v),
            Self::Xor(v) => old ^ v,
            Self::Min(v) => {
                if v < old {
                    v
                } else {
                    old
                }
            }
            Self::Max(v) => {
                if v > old {
                    v
                } else {
                    old
                }
            }
            Self::CompareExchange { expected, new } => {
                if old == expected {
                    new
                } else {
                    old
                }
            }
        }
    }
}

/// What a device may do to host memory: read, write and update at a bus address.
///
/// Calls may block while the host brings a page in, so no lock may be held across them that the
/// host's own fault service could want. They never call back into device or driver.
pub trait SystemBus: Send + Sync {
    /// Copies `dst.len()` bytes from bus address `address`.
    ///
    /// # Errors
    /// [`BusError`] at the first byte that no memory answers; a prefix of `dst` may be written.
    fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), BusError>;

    /// Copies `src` to bus address `address`.
    ///
    /// # Errors
    /// [`BusError`] at the first byte that cannot be written; a prefix may be written.
    fn write(&self, address: u64, src: &[u8]) -> Result<(), BusError>;

    /// Updates the 8-byte aligned word at `address` atomically and returns its former value.
    ///
    /// # Errors
    /// [`BusError`] where the word cannot be updated; it is then unchanged.
    fn atomic(&self, address: u64, op: AtomicOp) -> Result<u64, BusError>;
}

/// The memory that a device uses as its VRAM. Offsets count from zero; every access must lie
/// inside [`size`](Self::size).
///
/// # Panics
/// Implementations panic on an access outside: the device checks what its page tables say first.
pub trait VramStore: Send + Sync {
    /// Bytes of device memory.
    fn size(&self) -> u64;

    /// Copies bytes out of device memory.
    fn read(&self, offset: u64, dst: &mut [u8]);

    /// The word at `offset`, 8-byte aligned.
    fn word(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        self.read(offset, &mut word);
        u64::from_ne_bytes(word)
    }

    /// Copies bytes into device memory.
    fn write(&self, offset: u64, src: &[u8]);

    /// Updates the 8-byte aligned word at `offset` atomically and returns its former value.
    fn atomic(&self, offset: u64, op: AtomicOp) -> u64;

    /// Fills `len` bytes with zeros.
    fn zero(&self, offset: u64, len: u64);

    /// Copies `len` bytes of host memory at `bus` to `offset`, without a bounce buffer.
    ///
    /// # Errors
    /// [`BusError`] where host memory does not answer; a prefix may be written.
    fn copy_from_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError>;

    /// Copies `len` bytes at `offset` to host memory at `bus`, without a bounce buffer.
    ///
    /// # Errors
    /// [`BusError`] where host memory does not answer; a prefix may be written.
    fn copy_to_bus(&self, offset: u64, bus: u64, len: u64) -> Result<(), BusError>;

    /// Host virtual address of `offset` where host pages can *become* device memory without a
    /// copy; `None` where this memory cannot take pages over.
    fn aperture(&self, offset: u64) -> Option<u64>;

    /// Drops the content of `[offset, offset + len)`, 4 KiB aligned. The span reads as zeros
    /// afterwards and, where there is an [`aperture`](Self::aperture), has no pages at all.
    fn discard(&self, offset: u64, len: u64);
}

/// One piece of a copy job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyPiece {
    /// What is copied where.
    pub kind: CopyKind,
    /// Offset in device memory.
    pub vram: u64,
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
}

/// Source and direction of a [`CopyPiece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyKind {
    /// From host memory at this bus address to device memory.
    FromBus(u64),
    /// From device memory to host memory at this bus address.
    ToBus(u64),
    /// Zeros to device memory.
    Zero,
}

/// A TLB invalidation was not acknowledged in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbTimeout {
    /// Sequence number that was waited for.
    pub seqno: u32,
}

impl fmt::Display for TlbTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "TLB invalidation {} was not acknowledged in time",
            self.seqno
        )
    }
}

impl core::error::Error for TlbTimeout {}

/// What a driver may do to a device. All calls are safe from any thread.
///
/// [`write_entries`](Self::write_entries), [`invalidate_tlb`](Self::invalidate_tlb) and
/// [`wait_tlb`](Self::wait_tlb) are used inside invalidations: they neither allocate nor take a
/// lock that is held across an access to host memory.
pub trait DevicePort: Send + Sync {
    /// Bytes of device memory.
    fn vram_size(&self) -> u64;

    /// Number of GTs. TLBs and statistics are kept per GT.
    fn gt_count(&self) -> u16;

    /// Writes page-table entries into device memory at `offset` (8-byte aligned), in order, so
    /// that a walk that starts afterwards sees them.
    fn write_entries(&self, offset: u64, entries: &[u64]);

    /// Reads one page-table entry.
    fn read_entry(&self, offset: u64) -> u64;

    /// Points address space `asid` at the root table at `root`; `None` makes every walk fault.
    fn set_root(&self, asid: u32, root: Option<u64>);

    /// Starts an invalidation of `[start, start + len)` of `asid` in every TLB of the device and
    /// returns its sequence number (1 to 0xFFFFF, wrapping past zero).
    fn invalidate_tlb(&self, asid: u32, start: u64, len: u64) -> u32;

    /// Waits until every unit has acknowledged invalidation `seqno`: no access that used an older
    /// translation is still running.
    ///
    /// # Errors
    /// [`TlbTimeout`] when a unit does not answer within the device's time-out.
    fn wait_tlb(&self, seqno: u32) -> Result<(), TlbTimeout>;

    /// Runs a copy job of at most 8 MiB. Jobs are complete on return.
    ///
    /// # Errors
    /// [`BusError`] where host memory does not answer; what was copied before stays copied.
    fn copy(&self, pieces: &[CopyPiece]) -> Result<(), BusError>;

    /// The host address of device memory that can take host pages over, emptied first; `None`
    /// where this device has to copy. See [`VramStore::aperture`].
    fn adopt(&self, vram: u64, len: u64) -> Option<u64>;

    /// The host address from which the pages of `[vram, vram + len)` can be taken back without a
    /// copy; `None` where this device has to copy.
    fn surrender(&self, vram: u64, len: u64) -> Option<u64>;

    /// Takes the oldest fault out of the ring.
    fn pop_fault(&self) -> Option<FaultRecord>;

    /// Answers a fault that [`pop_fault`](Self::pop_fault) returned.
    fn ack_fault(&self, record: &FaultRecord, response: FaultResponse);
}

/// Services faults inline, on the unit that raised them. Implemented by the driver.
///
/// The caller holds nothing and is quiescent for TLB invalidations during the call.
pub trait FaultHandler: Send + Sync {
    /// Makes the access of `record` possible, or refuses it.
    fn handle(&self, record: &FaultRecord) -> FaultResponse;
}

/// How device code waits: the embedder's futex.
pub trait Park: Send + Sync {
    /// Sleeps while `*word == seen`, at most `timeout_ns` where given. May return early.
    fn wait(&self, word: &AtomicU32, seen: u32, timeout_ns: Option<u64>);

    /// Wakes every sleeper on `word`.
    fn wake(&self, word: &AtomicU32);

    /// Monotonic time in nanoseconds.
    fn now_ns(&self) -> u64;
}
