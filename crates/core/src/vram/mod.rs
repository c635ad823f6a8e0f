//! Device memory: which parts are free, who holds the others, and who has to go when there is
//! not enough (`svm-design.md` section 5.11).
//!
//! [`Manager`] hands out [`Bo`]s, contiguous blocks of a [`Buddy`]. A BO is *pinned* until it is
//! made evictable; then it is on the one LRU that page allocations and plain buffer objects share.

mod bo;
mod buddy;
mod lru;
mod manager;
mod withdrawn;

pub use bo::Bo;
pub use buddy::{Buddy, From};
pub use manager::{BoRequest, Evict, Manager, Purpose};
pub use withdrawn::{Balloon, Offline, Usage};
