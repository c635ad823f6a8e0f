//! [`ModelSpace`]: one process, as the framework sees it.

use core::fmt;
use std::sync::Arc;

use gpusvm::addr::{BusAddr, HostSpan, HostVa};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::mmu::{Interval, Seq};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{
    AddressSpace, FaultIn, InvalidationSink, MigrateTo, Owner, PageRun, PagemapId, Placement, Seen,
    Vma, VmaKind,
};

use crate::kernel::Kernel;
use crate::kernel::migrate::ModelMigration;
use crate::mm::around::MmapLock;
use crate::mm::entry::Entry;
use crate::mm::flags::VmFlags;
use crate::mm::memory::FrameId;
use crate::mm::vma::{self, Backing};
use crate::mm::{Machine, Pid};

/// One process of a machine.
pub struct ModelSpace<E: Environment> {
    pub(super) kernel: Arc<Kernel<E>>,
    pub(super) pid: Pid,
}

impl<E: Environment> fmt::Debug for ModelSpace<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelSpace({})", self.pid.0)
    }
}

impl<E: Environment> ModelSpace<E> {
    /// The process that a machine starts with.
    #[must_use]
    pub fn first(kernel: &Arc<Kernel<E>>) -> Arc<Self> {
        Self::of(kernel, Pid(0))
    }

    /// The process `pid`.
    #[must_use]
    pub fn of(kernel: &Arc<Kernel<E>>, pid: Pid) -> Arc<Self> {
        Arc::new(Self {
            kernel: Arc::clone(kernel),
            pid,
        })
    }

    /// The machine.
    pub const fn kernel(&self) -> &Arc<Kernel<E>> {
        &self.kernel
    }

    /// Which process it is.
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// The process is alive.
    fn alive(&self) -> Result<(), Failed> {
        self.kernel.look(|mm| alive(mm, self.pid))
    }
}

/// A process is alive.
pub(super) fn alive(mm: &Machine, pid: Pid) -> Result<(), Failed> {
    if mm.process(pid).alive {
        Ok(())
    } else {
        Err(Failed::AddressSpaceGone)
    }
}

/// The device memory that a device page is in.
pub(super) fn pagemap_of(mm: &Machine, frame: FrameId) -> Option<PagemapId> {
    let device = mm.memory().device_page(frame)?;
    Some(PagemapId(mm.device(device.place).pagemap))
}

/// A mapping as the framework knows it.
fn seam_vma(mm: &Machine, vma: &vma::Vma) -> Vma {
    Vma {
        span: mm.shape().span(vma.pages),
        read: vma.flags.has(VmFlags::READ),
        write: vma.flags.has(VmFlags::WRITE),
        kind: match vma.backing {
            Backing::Anon => VmaKind::Anonymous,
            Backing::File(_) if vma.is_private() => VmaKind::PrivateFile,
            Backing::File(_) => VmaKind::InPlace,
            Backing::HugePages => VmaKind::HugePages,
            Backing::Special => VmaKind::Special,
        },
    }
}

/// Where one page is, for [`AddressSpace::placement`].
fn place_of(mm: &Machine, entry: Entry) -> Placement {
    match entry {
        Entry::DevicePrivate(frame, _) => {
            pagemap_of(mm, frame).map_or(Placement::Mixed, Placement::Device)
        }
        Entry::Migration(..) => Placement::Mixed,
        Entry::None
        | Entry::Present(..)
        | Entry::Zero(_)
        | Entry::Swap(..)
        | Entry::DeviceExclusive(..)
        | Entry::HwPoison(_)
        | Entry::Guard
        | Entry::UffdWp => Placement::System,
    }
}

/// Whether a page has content that is in memory.
fn has_content(entry: Entry) -> bool {
    match entry {
        Entry::Present(..)
        | Entry::Zero(_)
        | Entry::DevicePrivate(..)
        | Entry::DeviceExclusive(..) => true,
        Entry::None
        | Entry::Swap(..)
        | Entry::Migration(..)
        | Entry::HwPoison(_)
        | Entry::Guard
        | Entry::UffdWp => false,
    }
}

impl<E: Environment> AddressSpace for ModelSpace<E> {
    type Migration<'a> = ModelMigration<'a, E>;

    fn find_vma(&self, at: HostVa) -> Option<Vma> {
        let _lock = MmapLock::read(&*self.kernel, self.pid);
        self.kernel.look(|mm| {
            let shape = mm.shape();
            let page = if at < shape.base { 0 } else { shape.page(at)? };
            let vma = mm.process(self.pid).vmas.first_from(page)?;
            Some(seam_vma(mm, vma))
        })
    }

    fn subscribe(
        &self,
        window: HostSpan,
        sink: Arc<dyn InvalidationSink>,
    ) -> Result<Arc<Interval>, Interrupted> {
        self.alive()?;
        Ok(self.kernel.sync(self.pid).notifiers.insert(window, sink))
    }

    fn unsubscribe(&self, interval: &Arc<Interval>) {
        let notifiers = &self.kernel.sync(self.pid).notifiers;
        notifiers.remove(self.kernel.env(), interval);
    }

    fn read_begin(&self, interval: &Interval) -> Seq {
        let notifiers = &self.kernel.sync(self.pid).notifiers;
        notifiers.read_begin(self.kernel.env(), interval)
    }

    fn fault_in(&self, request: &FaultIn, runs: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        self.walk(request, runs)
    }

    fn is_populated(&self, span: HostSpan) -> bool {
        self.kernel.look(|mm| {
            let pages = mm.shape().pages_in(span);
            let whole = mm.shape().span(pages).covers(span);
            whole
                && pages
                    .iter()
                    .all(|page| has_content(mm.entry(self.pid, page)))
        })
    }

    fn placement(&self, span: HostSpan) -> Placement {
        self.kernel.look(|mm| {
            let pages = mm.shape().pages_in(span);
            let mut places = pages
                .iter()
                .map(|page| place_of(mm, mm.entry(self.pid, page)));
            let first = places.next().unwrap_or(Placement::System);
            if places.all(|place| place == first) {
                first
            } else {
                Placement::Mixed
            }
        })
    }

    fn migrate_begin(
        &self,
        span: HostSpan,
        to: MigrateTo,
    ) -> Result<ModelMigration<'_, E>, Interrupted> {
        match to {
            MigrateTo::Device {
                allocation, folios, ..
            } => self.begin_out(span, &allocation, folios),
            MigrateTo::System {
                allocation,
                part,
                folios,
                ..
            } => self.kernel.begin_home(&allocation, part, folios),
        }
    }

    fn snapshot(
        &self,
        span: HostSpan,
        keep: Option<PagemapId>,
        pages: &mut Vec<Seen>,
    ) -> Result<(), Interrupted> {
        self.alive()?;
        self.glance(span, keep, pages);
        Ok(())
    }

    fn make_exclusive(
        &self,
        at: HostVa,
        owner: Owner,
        commit: &mut dyn FnMut(BusAddr),
    ) -> Result<(), Interrupted> {
        self.alive()?;
        self.take_for_device(at, owner, commit)
    }
}
