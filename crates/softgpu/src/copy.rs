//! The copy engine: runs jobs on the caller's thread, complete on return.

use gpusvm_abi::bus::{BusError, CopyKind, CopyPiece, VramStore};

/// Most bytes in one job.
pub const COPY_JOB_BYTES: u64 = 8 << 20;

/// Runs one job.
///
/// # Panics
/// On a job of more than [`COPY_JOB_BYTES`]: the driver's bug.
#[expect(
    clippy::panic_in_result_fn,
    reason = "a driver's bug, not a condition of the bus"
)]
pub(crate) fn run(vram: &dyn VramStore, pieces: &[CopyPiece]) -> Result<(), BusError> {
    let total: u64 = pieces.iter().map(|piece| piece.len).sum();
    assert!(total <= COPY_JOB_BYTES, "a copy job of {total} bytes");
    for piece in pieces {
        let end = piece.vram.checked_add(piece.len);
        if end.is_none_or(|end| end > vram.size()) {
            return Err(BusError {
                address: piece.vram,
            });
        }
        match piece.kind {
            CopyKind::FromBus(bus) => vram.copy_from_bus(piece.vram, bus, piece.len)?,
            CopyKind::ToBus(bus) => vram.copy_to_bus(piece.vram, bus, piece.len)?,
            CopyKind::Zero => vram.zero(piece.vram, piece.len),
        }
    }
    Ok(())
}
