//! The copy engine of one device.

use crate::addr::{BusAddr, HostSpan, VramSpan};
use crate::error::Failed;

/// One move of a copy job: a span of device memory and what is on the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyMove {
    /// The device side.
    pub vram: VramSpan,
    /// The other side.
    pub with: CopyWith,
}

/// The other side of a [`CopyMove`], and with it the direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyWith {
    /// Host memory is copied to the device.
    From(BusAddr),
    /// Device memory is copied to the host.
    To(BusAddr),
    /// A hole: the device side is filled with zeros.
    Hole,
}

/// Moves bytes between host and device memory, or hands pages over without moving bytes.
///
/// May sleep. Never called with the notifier lock held. Never calls back.
pub trait CopyEngine: Send + Sync + 'static {
    /// Runs the moves in order; they are complete on return.
    ///
    /// # Errors
    /// [`Failed::Copy`] where host memory does not answer.
    fn run(&self, moves: &[CopyMove]) -> Result<(), Failed>;

    /// Empties `vram` and returns the host span at which pages placed there *are* that device
    /// memory. `None` where the device has memory of its own and pages must be copied.
    fn adopt(&self, vram: VramSpan) -> Option<HostSpan>;

    /// The host span from which the pages of `vram` can be taken back without a copy, or `None`.
    fn surrender(&self, vram: VramSpan) -> Option<HostSpan>;
}
