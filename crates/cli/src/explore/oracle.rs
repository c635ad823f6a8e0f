//! When an oracle looks at a world.

use core::sync::atomic::Ordering;

use crate::explore::plan::PAGES;
use crate::explore::world::World;
use crate::world::oracle;

/// What an oracle had seen when it last looked.
pub(super) type Seen = Option<(u64, u64)>;

/// Looks at everything, if something has changed.
///
/// # Errors
/// Which rule is broken, and where.
pub(super) fn look(world: &World, seen: &mut Seen) -> Result<(), String> {
    let now = (
        world.kernel.generation(),
        world.writes.load(Ordering::Relaxed),
    );
    if seen.replace(now) == Some(now) {
        return Ok(());
    }
    oracle::look(&world.kernel, &world.nodes, 0..PAGES)
}
