//! Who is inside an invalidation, where much is forbidden.

use crate::sched::env::ModelEnv;
use crate::sched::world::{State, World, try_with, with};

/// While it lives, its actor is inside an invalidation.
#[derive(Debug)]
#[must_use = "the invalidation ends when this is dropped"]
pub struct Invalidating(());

impl Drop for Invalidating {
    fn drop(&mut self) {
        with(World::leave_invalidation);
    }
}

impl ModelEnv {
    /// Marks the running actor as inside an invalidation.
    pub fn invalidating(&self) -> Invalidating {
        with(World::enter_invalidation);
        Invalidating(())
    }

    /// Whether the code that asks runs inside an invalidation. The scheduler's own code and that of
    /// oracles does not, whoever runs. May be asked from anywhere, also by an allocator.
    #[must_use]
    pub fn is_invalidating(&self) -> bool {
        try_with(|world| world.is_invalidating()) == Some(true)
    }
}

impl World {
    /// The bit of the running actor; none where nobody runs.
    fn current_bit(&self) -> u64 {
        let bit = u32::try_from(self.current).ok();
        bit.and_then(|bit| 1_u64.checked_shl(bit)).unwrap_or(0)
    }

    fn enter_invalidation(&mut self) {
        self.invalidating |= self.current_bit();
    }

    fn leave_invalidation(&mut self) {
        self.invalidating &= !self.current_bit();
    }

    fn is_invalidating(&self) -> bool {
        let inside = self.invalidating & self.current_bit() != 0;
        inside && self.state == State::Running && !self.looking
    }
}
