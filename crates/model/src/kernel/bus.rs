//! [`Bus`]: how a device reaches host memory. Every frame has a bus address; an access to a frame
//! that nobody has is refused and noted, as by an IOMMU that traps use after unmap.

use core::fmt;
use core::sync::atomic::Ordering;
use std::sync::Arc;

use gpusvm::addr::{BusAddr, PAGE};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::Access;
use gpusvm_abi::bus::{AtomicOp, BusError, SystemBus};

use crate::kernel::Kernel;
use crate::mm::Machine;
use crate::mm::around::Around;
use crate::mm::entry::Entry;
use crate::mm::flags::Bits;
use crate::mm::memory::{FrameId, load_bytes, store_bytes};
use crate::mm::rmap::Level;

/// Bus address of frame 0. Nothing answers below it.
const FIRST: u64 = 1 << 32;

/// Bus address of the page of zeros, which may only be read.
pub const ZERO_PAGE: BusAddr = BusAddr::new(FIRST - PAGE);

/// What a device did that it must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// It used the address of a page that nobody has any more.
    UseAfterFree(BusAddr),
    /// It used an address at which there never was a page.
    NoMemory(BusAddr),
    /// It wrote to the page of zeros.
    WroteZeroPage(BusAddr),
    /// A unit used a page in a way in which no process may.
    NoRight(BusAddr, Access),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UseAfterFree(at) => write!(f, "a device used the freed page at bus address {at}"),
            Self::WroteZeroPage(at) => write!(f, "a device wrote to the page of zeros at {at}"),
            Self::NoRight(at, access) => {
                write!(
                    f,
                    "a unit has {access:?} access to the page at {at}, and no process has"
                )
            }
            Self::NoMemory(at) => write!(f, "a device used bus address {at}, where nothing is"),
        }
    }
}

/// Who uses a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// Whoever copies, also to pages that are nobody's yet.
    Copies,
    /// A unit, by translations: what it does some process may do, too. Whoever takes that away waits
    /// for the units first.
    Units,
}

/// The bus of a machine.
pub struct Bus<E: Environment>(Arc<Kernel<E>>, User);

impl<E: Environment> fmt::Debug for Bus<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").finish_non_exhaustive()
    }
}

impl<E: Environment> Bus<E> {
    /// The bus of `kernel`.
    #[must_use]
    pub const fn new(kernel: Arc<Kernel<E>>) -> Self {
        Self(kernel, User::Copies)
    }

    /// The bus of `kernel` for the units of a device: an access that no process could make is noted as
    /// a [`Violation`], as a translation that should be gone was used.
    #[must_use]
    pub const fn of_units(kernel: Arc<Kernel<E>>) -> Self {
        Self(kernel, User::Units)
    }

    /// Runs `act` for every piece of `[address, address + len)` that lies in one page, with the
    /// offset of the piece in the whole and in the page.
    fn pieces(
        &self,
        address: u64,
        len: usize,
        access: Access,
        mut act: impl FnMut(&mut Machine, Option<FrameId>, Piece),
    ) -> Result<(), BusError> {
        let mut done = 0;
        while done < len {
            let at = address + done as u64;
            let offset = usize::try_from(at % PAGE).unwrap_or(0);
            let whole = usize::try_from(PAGE).unwrap_or(4096);
            let piece = Piece {
                done,
                offset,
                len: (whole - offset).min(len - done),
            };
            self.in_page(at, access, |mm, frame| act(mm, frame, piece))?;
            done += piece.len;
        }
        Ok(())
    }

    /// Runs `act` on the page at a bus address.
    fn in_page<R>(
        &self,
        address: u64,
        access: Access,
        act: impl FnOnce(&mut Machine, Option<FrameId>) -> R,
    ) -> Result<R, BusError> {
        let done = self.0.with(|mm| {
            let frame = frame_at(mm, address, access)?;
            let allowed = |frame| self.1 == User::Copies || may(mm, frame, access);
            if !frame.is_none_or(allowed) {
                return Err(Violation::NoRight(BusAddr::new(address), access));
            }
            Ok(act(mm, frame))
        });
        done.map_err(|violation| {
            self.0.violations.lock().push(violation);
            self.0.violated.store(true, Ordering::Relaxed);
            self.0.generation.fetch_add(1, Ordering::Relaxed);
            BusError { address }
        })
    }
}

/// A piece of an access inside one page.
#[derive(Clone, Copy)]
struct Piece {
    done: usize,
    offset: usize,
    len: usize,
}

/// The bus address of a frame of host memory.
#[must_use]
pub fn address_of(frame: FrameId) -> BusAddr {
    BusAddr::new(FIRST + u64::from(frame.0) * PAGE)
}

/// The frame that an address of the bus would be.
pub(super) fn frame_of(at: BusAddr) -> Option<FrameId> {
    let offset = at.get().checked_sub(FIRST)?;
    u32::try_from(offset / PAGE).ok().map(FrameId)
}

/// The frame at a bus address; `None` for the page of zeros.
fn frame_at(mm: &Machine, address: u64, access: Access) -> Result<Option<FrameId>, Violation> {
    let at = BusAddr::new(address);
    if at.align_down(PAGE) == ZERO_PAGE {
        return match access {
            Access::Read => Ok(None),
            Access::Write => Err(Violation::WroteZeroPage(at)),
        };
    }
    let none = Violation::NoMemory(at);
    let offset = address.checked_sub(FIRST).ok_or(none)?;
    let frame = u32::try_from(offset / PAGE).map_err(|_far| none)?;
    if frame >= mm.memory().host_frames() + mm.memory().coherent_frames() {
        return Err(none);
    }
    if mm.memory().is_free(FrameId(frame)) {
        return Err(Violation::UseAfterFree(at));
    }
    Ok(Some(FrameId(frame)))
}

/// Whether some process has a page, with this right. One that a device has for itself gives all.
fn may(mm: &Machine, frame: FrameId, access: Access) -> bool {
    let head = mm.memory().head(frame);
    let behind = frame.0 - head.0;
    let tail = (behind > 0).then_some(head);
    let chains = core::iter::once(frame).chain(tail);
    let mut mappings = chains.flat_map(|frame| mm.rmaps().of(mm.memory(), frame));
    mappings.any(|mapping| {
        let page = match mapping.level {
            Level::Page => mapping.page,
            Level::Block => mapping.page + behind,
        };
        let entry = mm.entry(mapping.pid, page);
        let all = access == Access::Read || matches!(entry, Entry::DeviceExclusive(..));
        entry.mapped_frame() == Some(frame) && (all || entry.bits().has(Bits::WRITE))
    })
}

impl<E: Environment> SystemBus for Bus<E> {
    fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), BusError> {
        let len = dst.len();
        self.pieces(address, len, Access::Read, |mm, frame, piece| {
            let part = &mut dst[piece.done..piece.done + piece.len];
            let words = frame.map_or(&[][..], |frame| mm.memory().content(frame));
            load_bytes(words, piece.offset, part);
        })
    }

    fn write(&self, address: u64, src: &[u8]) -> Result<(), BusError> {
        self.pieces(address, src.len(), Access::Write, |mm, frame, piece| {
            let part = &src[piece.done..piece.done + piece.len];
            if let Some(frame) = frame {
                store_bytes(mm.memory.content_mut(frame), piece.offset, part);
            }
        })
    }

    fn atomic(&self, address: u64, op: AtomicOp) -> Result<u64, BusError> {
        let word = usize::try_from(address % PAGE / 8).unwrap_or(0);
        self.in_page(address, Access::Write, |mm, frame| {
            let words = frame.map(|frame| mm.memory.content_mut(frame));
            let Some(word) = words.and_then(|words| words.get_mut(word)) else {
                return 0;
            };
            let old = *word;
            *word = op.apply(old);
            old
        })
    }
}
