//! [`OnTile`]: work for one unit of a device, as a closure.

use gpusvm_softgpu::{Kernel, Stop, Tile};

/// A closure as a kernel of one group.
pub(crate) struct OnTile<F>(pub(crate) F);

impl<F: Fn(&mut Tile<'_>) + Sync> Kernel for OnTile<F> {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        (self.0)(tile);
        Ok(())
    }
}
