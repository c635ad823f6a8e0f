//! Calls of the model's process, in the words of scenarios.

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm::seam::mm::{Access, AddressSpace, Owner};
use gpusvm_model::mm::around::Around;
use gpusvm_model::mm::errno::{Errno, Signal};
use gpusvm_model::mm::flags::{Prot, VmFlags};
use gpusvm_model::mm::map::{self, What};
use gpusvm_model::mm::remap::{Remap, Target};

use crate::scenario::host::Refusal;
use crate::scenario::model::ModelHost;
use crate::scenario::play::locked;
use crate::scenario::words::{Advice, Backing, Deed, Rights};

impl ModelHost {
    pub(super) fn map(
        &self,
        span: HostSpan,
        rights: Rights,
        backing: Backing,
    ) -> Result<(), Errno> {
        let pages = u32::try_from(span.pages().get()).unwrap_or(u32::MAX);
        let file = |pages| self.kernel.with(|mm| mm.create_file(pages));
        let what = match backing {
            Backing::Private => What::Private,
            Backing::Shared => What::Shared,
            Backing::File => What::SharedFile(file(pages), 0),
            Backing::PrivateFile => What::PrivateFile(file(pages), 0),
            Backing::Io => What::Special,
        };
        let map = map::Map {
            place: map::Place::NoReplace(span.start()),
            len: span.bytes(),
            prot: prot(rights),
            what,
            extra: VmFlags::NONE,
        };
        self.space.mmap(&map).map(drop)
    }

    pub(super) fn deed(&self, deed: Deed, span: HostSpan) -> Result<(), Refusal> {
        let (start, len) = (span.start(), span.bytes());
        let pages = (0..span.pages().get()).map(|n| start.plus(n * PAGE));
        match deed {
            Deed::Lock => return self.space.mlock(start, len).map_err(errno),
            Deed::Unlock => return self.space.munlock(start, len).map_err(errno),
            Deed::Unpin => {
                let pins = core::mem::take(&mut *locked(&self.pins));
                pins.into_iter().for_each(|frame| self.space.unpin(frame));
            }
            Deed::Pin => {
                for at in pages {
                    let frame = self.space.pin(at, Access::Write).map_err(signal)?;
                    locked(&self.pins).push(frame);
                }
            }
            Deed::Swap => {
                for at in pages {
                    if !self.space.reclaim(at) {
                        return Err(Refusal::With("EBUSY".to_owned()));
                    }
                }
            }
            Deed::Exclusive => {
                for at in pages {
                    let made = self.space.make_exclusive(at, Owner(0), &mut |_page| {});
                    made.map_err(|_why| Refusal::With("EBUSY".to_owned()))?;
                }
            }
            Deed::Poison => pages.for_each(|at| self.space.poison(at)),
        }
        Ok(())
    }

    pub(super) fn remap(&self, from: HostSpan, target: Target) -> Result<(), Errno> {
        let remap = Remap {
            at: from.start(),
            old_len: from.bytes(),
            new_len: from.bytes(),
            target,
        };
        self.space.mremap(&remap).map(drop)
    }
}

pub(super) fn prot(rights: Rights) -> Prot {
    match rights {
        Rights::None => Prot::NONE,
        Rights::Read => Prot::READ,
        Rights::Write => Prot::READ.with(Prot::WRITE),
    }
}

/// The number that `madvise` takes.
pub(super) const fn advice(advice: Advice) -> i32 {
    match advice {
        Advice::Discard => 4,
        Advice::Free => 8,
        Advice::Huge => 14,
        Advice::Small => 15,
        Advice::Cold => 20,
        Advice::PageOut => 21,
        Advice::Populate => 23,
        Advice::Collapse => 25,
        Advice::Guard => 102,
        Advice::Unguard => 103,
    }
}

pub(super) fn errno(errno: Errno) -> Refusal {
    Refusal::With(
        match errno {
            Errno::Perm => "EPERM",
            Errno::Io => "EIO",
            Errno::Again => "EAGAIN",
            Errno::NoMem => "ENOMEM",
            Errno::Access => "EACCES",
            Errno::Fault => "EFAULT",
            Errno::Busy => "EBUSY",
            Errno::Exist => "EEXIST",
            Errno::Invalid => "EINVAL",
            Errno::NotSupported => "EOPNOTSUPP",
            Errno::HwPoison => "EHWPOISON",
        }
        .to_owned(),
    )
}

pub(super) fn signal(signal: Signal) -> Refusal {
    Refusal::With(
        match signal {
            Signal::Segv => "SIGSEGV",
            Signal::Bus => "SIGBUS",
            Signal::OutOfMemory => "ENOMEM",
        }
        .to_owned(),
    )
}
