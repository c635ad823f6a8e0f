//! Faults that a program serves itself: what there is of userfaultfd.

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::Access;

use crate::kernel::Kernel;
use crate::kernel::space::ModelSpace;
use crate::mm::around::{Around, MmapLock};
use crate::mm::entry::{Block, Entry};
use crate::mm::errno::Errno;
use crate::mm::fault::stores_are_served;
use crate::mm::flags::VmFlags;
use crate::mm::uffd::{self, Stores};
use crate::mm::{Machine, Pages, Pid};

/// Faults that wait, and whether they were read.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fault {
    pid: Pid,
    page: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Raised,
    Read,
}

impl<E: Environment> Kernel<E> {
    /// Tells of a fault, or waits where that is done.
    pub(super) fn raise(&self, pid: Pid, page: u32, seen: u32) {
        let mut faults = self.faults.lock();
        let same = |fault: &Fault| fault.pid == pid && fault.page == page;
        if faults.0.iter().any(same) {
            drop(faults);
            self.wait(seen);
            return;
        }
        let state = State::Raised;
        faults.0.push(Fault { pid, page, state });
        drop(faults);
        self.announce();
    }
}

impl<E: Environment> ModelSpace<E> {
    /// From now on the program serves faults at missing pages of `span` (`UFFDIO_REGISTER`).
    ///
    /// # Errors
    /// `EINVAL` where not all of it is private anonymous memory.
    pub fn serve_missing(&self, span: HostSpan) -> Result<(), Errno> {
        self.register(span, VmFlags::UFFD_MISSING)
    }

    /// From now on the program serves stores to pages of `span` that it protects.
    ///
    /// # Errors
    /// `EINVAL` where not all of it is memory.
    pub fn serve_stores(&self, span: HostSpan) -> Result<(), Errno> {
        self.register(span, VmFlags::UFFD_WP)
    }

    fn register(&self, span: HostSpan, faults: VmFlags) -> Result<(), Errno> {
        uffd::register(&*self.kernel, self.pid, self.pages(span)?, faults)
    }

    /// From now on the program serves no faults in `span`; who waits goes on (`UFFDIO_UNREGISTER`).
    ///
    /// # Errors
    /// `EINVAL` for a span that cannot be.
    pub fn stop_serving(&self, span: HostSpan) -> Result<(), Errno> {
        let pages = self.pages(span)?;
        uffd::unregister(&*self.kernel, self.pid, pages);
        self.answer(pages);
        Ok(())
    }

    /// Protects pages against stores, or lets those that wait go on (`UFFDIO_WRITEPROTECT`).
    ///
    /// # Errors
    /// `ENOENT` where stores are not served, `EINVAL` for a span that cannot be.
    pub fn write_protect(&self, span: HostSpan, stores: Stores) -> Result<(), Errno> {
        let pages = self.pages(span)?;
        let done = uffd::write_protect(&*self.kernel, self.pid, pages, stores);
        if stores == Stores::Go {
            self.answer(pages);
        }
        done
    }

    fn pages(&self, span: HostSpan) -> Result<Pages, Errno> {
        self.kernel
            .look(|mm| mm.argument(span.start(), span.bytes()))
    }

    /// Wakes who waits for these pages.
    fn answer(&self, pages: Pages) {
        let mut faults = self.kernel.faults.lock();
        faults
            .0
            .retain(|fault| fault.pid != self.pid || !pages.contains(fault.page));
        drop(faults);
        self.kernel.announce();
    }

    /// Waits for a fault that nobody has read, and reads it.
    pub fn next_fault(&self) -> HostVa {
        loop {
            let seen = self.kernel.changes();
            let mut faults = self.kernel.faults.lock();
            let raised = |fault: &&mut Fault| {
                let mine = fault.pid == self.pid;
                mine && fault.state == State::Raised
            };
            if let Some(fault) = faults.0.iter_mut().find(raised) {
                fault.state = State::Read;
                let page = fault.page;
                drop(faults);
                return self.kernel.look(|mm| mm.shape().address(page));
            }
            drop(faults);
            self.kernel.wait(seen);
        }
    }

    /// Fills a missing page with `words`, zeros behind them, and wakes whoever waits for it
    /// (`UFFDIO_COPY`).
    ///
    /// # Errors
    /// `EEXIST` where there is a page, `ENOMEM`; `EINVAL` where nothing is mapped.
    pub fn fill_missing(&self, at: HostVa, words: &[u64]) -> Result<(), Errno> {
        let kernel = &*self.kernel;
        let page = kernel.look(|mm| mm.shape().page(at));
        let page = page.ok_or(Errno::Invalid)?;
        let lock = MmapLock::read(kernel, self.pid);
        let filled = kernel.with(|mm| mm.fill_missing(self.pid, page, words));
        drop(lock);
        self.answer(Pages::one(page));
        filled
    }
}

impl Machine {
    fn fill_missing(&mut self, pid: Pid, page: u32, words: &[u64]) -> Result<(), Errno> {
        let vma = self.process(pid).vmas.at(page).copied();
        let vma = vma.ok_or(Errno::Invalid)?;
        if self.block(pid, page) != Block::Table || self.entry(pid, page) != Entry::None {
            return Err(Errno::Exist);
        }
        self.prepare_anon(pid, page);
        let frame = self.new_page().ok_or(Errno::NoMem)?;
        for (word, value) in self.memory.content_mut(frame).iter_mut().zip(words) {
            *word = *value;
        }
        let bits = Self::fresh_bits(vma.flags);
        self.replace(pid, page, Entry::Present(frame, bits));
        Ok(())
    }

    /// Whether the program serves the fault that an access of `page` would be.
    pub(super) fn is_served(&self, pid: Pid, page: u32, access: Access) -> bool {
        let Some(vma) = self.process(pid).vmas.at(page) else {
            return false;
        };
        let entry = self.entry(pid, page);
        let missing = matches!(entry, Entry::None | Entry::UffdWp);
        let store = access == Access::Write && stores_are_served(vma, entry.bits());
        store || (missing && vma.flags.has(VmFlags::UFFD_MISSING))
    }
}
