//! Pages leave mappings that may be read only.
//!
//! The system moves pages out of mappings that may be written, and into them. So while pages leave, the
//! mapping may be: all of it is write-protected meanwhile, and its missing pages raise faults, so that
//! a store finds no moment in which it goes through. It waits for the end of the travel, and is
//! refused then. The way home is by copies, which such mappings take.

use gpusvm::addr::HostSpan;
use gpusvm::seam::mm::Vma;
use rustix::io::Errno;

use crate::leg::Refused;
use crate::shard::ShardId;
use crate::space::LiveSpace;
use crate::sys::advise;
use crate::sys::procmap::{NameKind, Sharing};
use crate::sys::thread;

impl LiveSpace {
    /// Whether `span` is private anonymous memory that may be read only, in one mapping without guards.
    /// Only where brackets see changes of rights before they happen: they wait for the travel.
    pub(crate) fn is_read_only(&self, vma: &Vma, span: HostSpan) -> bool {
        if !vma.read || vma.write || !self.level().is_patched() {
            return false;
        }
        let Ok(Some(map)) = self.procmap.query(span.start()) else {
            return false;
        };
        let anonymous = map.sharing == Sharing::Private && map.inode == 0;
        let plain = map.name == NameKind::Plain && !map.exec && !thread::runtime_owns(map.span);
        let whole = map.span.covers(span) && self.pagemap.first_guard(span).is_none();
        anonymous && plain && whole && map.read && !map.write
    }

    /// Does `leave` while the mapping at `span`, which travels and is armed, may be written. What stayed
    /// is write-protected afterwards, until [`unprotect`](Self::unprotect).
    pub(crate) fn with_stores(
        &self,
        span: HostSpan,
        shard: ShardId,
        leave: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let uffd = self.watch.shards.uffd(shard);
        uffd.protect(span).map_err(|errno| match errno {
            Errno::AGAIN => Refused::News,
            _other => Refused::Mapping,
        })?;
        // What is looked up meanwhile is not to be remembered.
        self.remembered.forget();
        let left = match advise::allow_stores(span) {
            Ok(()) => leave(),
            Err(_too_many_mappings) => Err(Refused::Mapping),
        };
        while advise::forbid_stores(span) == Err(Errno::NOMEM) {
            // Another thread gives mappings back; the program must not find these rights.
            rustix::thread::sched_yield();
        }
        self.remembered.forget();
        left
    }
}
