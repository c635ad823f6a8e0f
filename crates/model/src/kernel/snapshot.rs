//! What a device finds without a fault, and pages that it gets for itself.

use gpusvm::addr::{BusAddr, HostSpan, HostVa, PageCount, VramAddr};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{
    Access, AllocationId, InvalidateReason, Location, Owner, PageKind, PagemapId, Seen, SeenPage,
};

use crate::kernel::bus::{ZERO_PAGE, address_of};
use crate::kernel::space::{ModelSpace, pagemap_of};
use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Signal;
use crate::mm::fault::fault;
use crate::mm::flags::{Bits, VmFlags};
use crate::mm::map::split_blocks;
use crate::mm::memory::FrameId;
use crate::mm::vma::Backing;
use crate::mm::{Machine, Pages, Pid};

impl<E: Environment> ModelSpace<E> {
    /// Looks at each page of `span`.
    pub(super) fn glance(&self, span: HostSpan, keep: Option<PagemapId>, out: &mut Vec<Seen>) {
        let _lock = MmapLock::read(&*self.kernel, self.pid);
        self.kernel.look(|mm| {
            let addresses = (0..span.pages().get()).map(|n| {
                let bytes = PageCount::new(n).bytes();
                span.start().plus(bytes)
            });
            let look = |at| {
                let page = mm.shape().page(at);
                page.map_or(Seen::Never, |page| look_at(mm, self.pid, page, keep))
            };
            out.clear();
            out.extend(addresses.map(look));
        });
    }

    /// Takes a page away from the CPU. `commit` is called with the page locked.
    pub(super) fn take_for_device(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        let kernel = &*self.kernel;
        let page = kernel.look(|mm| mm.shape().page(at));
        let page = page.ok_or(Failed::BadPage(at))?;
        let _lock = self.lock_for_exclusive(page, at)?;
        split_blocks(kernel, self.pid, Pages::one(page));
        let open = kernel.open(
            self.pid,
            Pages::one(page),
            InvalidateReason::Exclusive(owner),
        );
        kernel.step();
        // Held, too: its mapping may go before the device has it.
        let made = kernel.with(|mm| {
            let made = mm.make_exclusive(self.pid, page);
            made.inspect(|frame| mm.hold(*frame))
        });
        kernel.close(self.pid, open);
        let frame = made.ok_or(Stale::PagesRefused)?;
        commit(address_of(frame));
        kernel.with(|mm| mm.let_go(frame));
        kernel.announce();
        Ok(())
    }

    /// The mmap lock, with a mapping that allows it at `page`, which was faulted in for writing.
    fn lock_for_exclusive(
        &self,
        page: u32,
        at: HostVa,
    ) -> Result<MmapLock<'_, crate::kernel::Kernel<E>>, Interrupted> {
        let kernel = &*self.kernel;
        let kind = kernel.look(|mm| {
            let vma = mm.process(self.pid).vmas.at(page);
            vma.map(|vma| (vma.is_private(), vma.flags))
        });
        match kind {
            Some((true, flags)) if flags.has(VmFlags::READ) => {}
            Some((false, _)) => return Err(Failed::NotMigratable(at).into()),
            Some(_) | None => return Err(Failed::BadPage(at).into()),
        }
        fault(kernel, self.pid, page, Access::Write).map_err(|signal| match signal {
            Signal::OutOfMemory => Failed::OutOfMemory,
            Signal::Segv | Signal::Bus => Failed::BadPage(at),
        })?;
        Ok(MmapLock::read(kernel, self.pid))
    }
}

fn look_at(mm: &Machine, pid: Pid, page: u32, keep: Option<PagemapId>) -> Seen {
    let Some(vma) = mm.process(pid).vmas.at(page) else {
        return Seen::Never;
    };
    if vma.backing == Backing::Special || !vma.flags.has(VmFlags::READ) {
        return Seen::Never;
    }
    let order = match mm.block(pid, page) {
        Block::Table => 0,
        Block::Huge(..) | Block::Device(..) | Block::Zero(_) => mm.shape().pmd_order,
    };
    let seen = |at, bits: Bits, (kind, folio)| {
        let access = if bits.has(Bits::WRITE) {
            Access::Write
        } else {
            Access::Read
        };
        Seen::Page(SeenPage {
            at,
            access,
            order,
            folio,
            kind,
        })
    };
    match mm.entry(pid, page) {
        Entry::Present(frame, bits) => {
            let kind = pagemap_of(mm, frame).map_or(PageKind::Plain, PageKind::Coherent);
            let at = Location::System(address_of(frame));
            seen(at, bits, (kind, mm.memory().folio(frame).order))
        }
        Entry::Zero(bits) => {
            let at = Location::System(ZERO_PAGE);
            seen(at, bits.without(Bits::WRITE), (PageKind::Zero, 0))
        }
        Entry::DevicePrivate(frame, bits) => match own_location(mm, frame, keep) {
            Some(at) => seen(at, bits, (PageKind::Plain, mm.memory().folio(frame).order)),
            None => Seen::Absent,
        },
        Entry::None
        | Entry::Swap(..)
        | Entry::Migration(..)
        | Entry::DeviceExclusive(..)
        | Entry::UffdWp => Seen::Absent,
        Entry::HwPoison(_) | Entry::Guard => Seen::Never,
    }
}

/// Where a device page is, if it is in the memory `keep`.
pub(super) fn own_location(
    mm: &Machine,
    frame: FrameId,
    keep: Option<PagemapId>,
) -> Option<Location> {
    let page = mm.memory().device_page(frame)?;
    let device = mm.device(page.place);
    let pagemap = PagemapId(device.pagemap);
    let offset = PageCount::new(u64::from(page.page)).bytes();
    (keep == Some(pagemap)).then_some(Location::Device {
        pagemap,
        allocation: AllocationId(device.id),
        vram: VramAddr::new(device.vram + offset),
    })
}
