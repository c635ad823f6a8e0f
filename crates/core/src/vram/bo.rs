//! [`Bo`]: one contiguous block of device memory.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::addr::VramSpan;
use crate::seam::env::Environment;
use crate::vram::manager::{Manager, Purpose};

/// A buffer object. Its memory is free again when the last reference goes.
///
/// Dropping the last reference takes the `vram` lock: not with a leaf lock held, and not inside an
/// invalidation.
pub struct Bo<E: Environment> {
    manager: Arc<Manager<E>>,
    span: VramSpan,
    /// Place on the LRU; never reused.
    stamp: u64,
    /// Its pages are on their way. Changed under the `vram` lock.
    filling: AtomicBool,
}

impl<E: Environment> fmt::Debug for Bo<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bo{}", self.span)
    }
}

impl<E: Environment> Bo<E> {
    pub(super) const fn new(
        manager: Arc<Manager<E>>,
        span: VramSpan,
        stamp: u64,
        purpose: Purpose,
    ) -> Self {
        Self {
            manager,
            span,
            stamp,
            filling: AtomicBool::new(matches!(purpose, Purpose::Pages)),
        }
    }

    /// Where it lies.
    #[must_use]
    pub const fn span(&self) -> VramSpan {
        self.span
    }

    pub(super) const fn id(&self) -> u64 {
        self.stamp
    }

    /// Notes that nothing is on its way any more; whether something was. The caller holds the `vram`
    /// lock.
    pub(super) fn end_filling(&self) -> bool {
        self.filling.swap(false, Ordering::Relaxed)
    }
}

impl<E: Environment> Drop for Bo<E> {
    fn drop(&mut self) {
        self.manager.release(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_2M;
    use crate::test_env::TestEnv;

    #[test]
    fn an_object_costs_nothing_beside_what_it_holds() {
        let bytes = u64::try_from(size_of::<Bo<TestEnv>>()).expect("64-bit");
        // Five in ten thousand.
        assert!(bytes * 10_000 < PAGE_2M * 5, "{bytes}");
    }
}
