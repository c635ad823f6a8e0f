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
        vma.read && !vma.write && self.level().is_patched() && self.shows_read_only(span)
    }

    /// The same, as the system shows it at this moment.
    fn shows_read_only(&self, span: HostSpan) -> bool {
        let Ok(Some(map)) = self.procmap.query(span.start()) else {
            return false;
        };
        let anonymous = map.sharing == Sharing::Private && map.inode == 0;
        let plain = map.name == NameKind::Plain && !map.exec && !thread::runtime_owns(map.span);
        let whole = map.span.covers(span) && self.pagemap.first_guard(span).is_none();
        anonymous && plain && whole && map.read && !map.write
    }

    /// Does `leave` while the mapping at `span`, which travels and is armed, may be written. What stayed
    /// is write-protected afterwards, until [`unprotect`](Self::unprotect). Refused where the program may
    /// write by now: it must keep that right. From here on its calls wait for the travel.
    pub(crate) fn with_stores(
        &self,
        span: HostSpan,
        shard: ShardId,
        leave: impl FnOnce() -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        if !self.shows_read_only(span) {
            return Err(Refused::Mapping);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm::addr::{HostVa, PAGE};

    use crate::sys::mapping::{AnonMapping, Huge};
    use crate::sys::vram::VramMode;
    use crate::toy::Bench;

    #[test]
    fn program_that_may_write_again_keeps_that_right() {
        let Some(bench) = Bench::open(VramMode::Adopt) else {
            return;
        };
        let mut map = AnonMapping::new(4096, Huge::Never).expect("a page can be mapped");
        map.words_mut().fill(3);
        let span = HostSpan::at(HostVa::new(map.address()), PAGE);
        // It was read only when the migration began.
        let left = bench
            .space
            .with_stores(span, ShardId::FIRST, || unreachable!("nothing leaves"));
        assert!(matches!(left, Err(Refused::Mapping)));
        map.words_mut().fill(4);
        assert!(map.words().iter().all(|word| *word == 4));
    }
}
