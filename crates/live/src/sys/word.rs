//! The words of [`futex`](crate::sys::futex), and how the system waits on them: `tests/orders.rs` puts
//! others in their place, with which a scheduler tries every order.

pub(crate) use core::sync::atomic::{AtomicU32, Ordering, fence};
pub(crate) use rustix::thread::futex::{Flags, wait, wake};
