//! The driver's copy engine: framework moves become device jobs of at most 8 MiB
//! (`svm-design.md` section 5.12).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use gpusvm::addr::{HostSpan, HostVa, VramSpan};
use gpusvm::error::Failed;
use gpusvm::seam::copy::{CopyEngine, CopyMove, CopyWith};
use gpusvm_abi::bus::{CopyKind, CopyPiece, DevicePort};

/// Most bytes in one job: about a millisecond of copying, which bounds how long the engine is busy
/// for one caller.
pub const JOB_BYTES: u64 = 8 << 20;

/// Copies through a device's own engine.
pub struct XeCopy {
    port: Arc<dyn DevicePort>,
}

impl fmt::Debug for XeCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XeCopy").finish_non_exhaustive()
    }
}

impl XeCopy {
    /// The engine of the device behind `port`.
    #[must_use]
    pub fn new(port: Arc<dyn DevicePort>) -> Self {
        Self { port }
    }

    fn submit(&self, job: &mut Vec<CopyPiece>) -> Result<(), Failed> {
        let result = self.port.copy(job).map_err(|_no_memory| Failed::Copy);
        job.clear();
        result
    }
}

impl CopyEngine for XeCopy {
    fn run(&self, moves: &[CopyMove]) -> Result<(), Failed> {
        let mut job = Vec::new();
        let mut bytes = 0;
        for piece in moves.iter().flat_map(pieces) {
            if bytes + piece.len > JOB_BYTES {
                self.submit(&mut job)?;
                bytes = 0;
            }
            bytes += piece.len;
            job.push(piece);
        }
        if job.is_empty() {
            Ok(())
        } else {
            self.submit(&mut job)
        }
    }

    fn adopt(&self, vram: VramSpan) -> Option<HostSpan> {
        let at = self.port.adopt(vram.start().get(), vram.bytes())?;
        Some(HostSpan::at(HostVa::new(at), vram.bytes()))
    }

    fn surrender(&self, vram: VramSpan) -> Option<HostSpan> {
        let at = self.port.surrender(vram.start().get(), vram.bytes())?;
        Some(HostSpan::at(HostVa::new(at), vram.bytes()))
    }
}

/// One move, cut to pieces that fit into a job.
fn pieces(m: &CopyMove) -> impl Iterator<Item = CopyPiece> {
    let m = *m;
    let total = m.vram.bytes();
    (0..total.div_ceil(JOB_BYTES)).map(move |n| {
        let done = n * JOB_BYTES;
        let kind = match m.with {
            CopyWith::From(bus) => CopyKind::FromBus(bus.get() + done),
            CopyWith::To(bus) => CopyKind::ToBus(bus.get() + done),
            CopyWith::Hole => CopyKind::Zero,
        };
        CopyPiece {
            kind,
            vram: m.vram.start().get() + done,
            len: (total - done).min(JOB_BYTES),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{BusAddr, VramAddr};

    #[test]
    fn long_moves_are_cut_at_the_job_limit_on_both_sides() {
        let vram = VramSpan::at(VramAddr::new(0x1000), 2 * JOB_BYTES + 0x1000);
        let m = CopyMove {
            vram,
            with: CopyWith::To(BusAddr::new(0x7000)),
        };
        let got: Vec<_> = pieces(&m).collect();
        assert_eq!(got.len(), 3);
        assert_eq!(got[2].len, 0x1000);
        assert_eq!(got[2].vram, 0x1000 + 2 * JOB_BYTES);
        assert_eq!(got[2].kind, CopyKind::ToBus(0x7000 + 2 * JOB_BYTES));
    }
}
