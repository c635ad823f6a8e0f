//! The atomics of [`shootdown`](crate::shootdown): `tests/orders.rs` puts others in their place, with
//! which a scheduler tries every order.

pub(crate) use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
