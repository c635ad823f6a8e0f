//! [`Vm`]: one device address space (`xe_vm` in fault mode).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;

use gpusvm::addr::{GpuSpan, HostSpan, HostVa};
use gpusvm::error::{Failed, Interrupted};
use gpusvm::mutant::Mutant;
use gpusvm::seam::Platform;
use gpusvm::seam::env::Environment;
use gpusvm::seam::env::Mutex;
use gpusvm::seam::mm::Owner;
use gpusvm::svm::{Svm, SvmConfig, SvmOwner};
use gpusvm::table::PageTable;

use crate::atomics::AtomicPolicy;
use crate::collect;
use crate::device::Device;
use crate::format::XeFormat;
use crate::invalidate::XeBindings;

/// Bytes of a notifier window (`svm_notifier_size`, 512 MiB by default).
pub const NOTIFIER_BYTES: u64 = 512 << 20;

/// What a VM is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Bytes of a notifier window, a power of two of at least 4 KiB (the module parameter
    /// `svm_notifier_size`).
    pub window_bytes: u64,
    /// Where the device does its atomics.
    pub atomics: AtomicPolicy,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            window_bytes: NOTIFIER_BYTES,
            atomics: AtomicPolicy::default(),
        }
    }
}

/// Rights of a mirror area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// The device may read and write; the CPU mapping must allow writes.
    ReadWrite,
    /// The device may read; the CPU mapping may be read-only.
    ReadOnly,
}

/// A part of the address space in which device addresses are host addresses (a VMA with the
/// CPU-address-mirror flag).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorArea {
    /// Addresses.
    pub span: HostSpan,
    /// What the device may do there.
    pub rights: Rights,
}

/// What the `vm` lock protects.
#[derive(Debug)]
pub(crate) struct VmState {
    pub(crate) owner: SvmOwner,
    pub(crate) table: PageTable<XeFormat>,
    areas: BTreeMap<HostVa, MirrorArea>,
    pub(crate) closed: bool,
}

impl VmState {
    /// The mirror area around `at`.
    pub(crate) fn area_at(&self, at: HostVa) -> Option<MirrorArea> {
        let (_, area) = self.areas.range(..=at).next_back()?;
        area.span.contains(at).then_some(*area)
    }

    /// Puts `area` in; what it covers of others goes.
    fn insert_area(&mut self, area: MirrorArea) {
        self.remove_areas(area.span);
        self.areas.insert(area.span.start(), area);
    }

    /// Takes `span` out of all areas; what sticks out of it stays.
    fn remove_areas(&mut self, span: HostSpan) {
        let hit: alloc::vec::Vec<_> = self
            .areas
            .values()
            .filter(|other| other.span.overlaps(span))
            .copied()
            .collect();
        for other in hit {
            self.areas.remove(&other.span.start());
            let head = HostSpan::new(other.span.start(), span.start());
            let tail = HostSpan::new(span.end(), other.span.end());
            for span in [head, tail].into_iter().filter(|rest| !rest.is_empty()) {
                self.areas
                    .insert(span.start(), MirrorArea { span, ..other });
            }
        }
    }
}

/// One device address space.
pub struct Vm<P: Platform> {
    pub(crate) device: Arc<Device<P>>,
    asid: u32,
    atomics: AtomicPolicy,
    pub(crate) svm: Arc<Svm<P, XeBindings<P>>>,
    /// The `vm` lock, outermost: one fault or structural change at a time.
    pub(crate) state: Mutex<P::Env, VmState>,
}

impl<P: Platform> fmt::Debug for Vm<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vm({})", self.asid)
    }
}

impl<P: Platform> Vm<P> {
    /// A VM with address-space id `asid` on `device`, with no areas yet.
    ///
    /// # Errors
    /// [`Failed::OutOfVram`] for its root table; [`Failed::Closed`] where the id is in use.
    pub fn new(device: &Arc<Device<P>>, asid: u32) -> Result<Arc<Self>, Failed> {
        Self::with(device, asid, VmConfig::default())
    }

    /// As [`new`](Self::new), made with `config`.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Failed::OutOfArea`] for windows of another size.
    pub fn with(device: &Arc<Device<P>>, asid: u32, config: VmConfig) -> Result<Arc<Self>, Failed> {
        let config_of_svm = SvmConfig {
            vm: asid,
            owner: Owner(u64::from(device.pagemap.id().0) << 32 | u64::from(asid)),
            area: user_space(),
            window_bytes: config.window_bytes,
        };
        let bindings = XeBindings::new(device, asid);
        let (svm, owner) = Svm::new(device.seams.clone(), bindings, config_of_svm)?;
        let table = PageTable::new(&*device.tables).map_err(|why| match why {
            Interrupted::Stale(why) => Failed::Budget(why),
            Interrupted::Failed(why) => why,
        })?;
        let root = table.root().get();
        let state = VmState {
            owner,
            table,
            areas: BTreeMap::new(),
            closed: false,
        };
        let state = Mutex::<P::Env, _>::new(state);
        let vm = Arc::new(Self {
            device: Arc::clone(device),
            asid,
            atomics: config.atomics,
            svm,
            state,
        });
        if !device.add_vm(&vm) {
            vm.state.lock().table.clear(&*device.tables);
            return Err(Failed::Closed);
        }
        device.port.set_root(asid, Some(root));
        Ok(vm)
    }

    /// Address-space id.
    #[must_use]
    pub const fn asid(&self) -> u32 {
        self.asid
    }

    /// Where the device does its atomics.
    #[must_use]
    pub const fn atomics(&self) -> AtomicPolicy {
        self.atomics
    }

    /// The framework's part, for reports and tests.
    #[must_use]
    pub const fn svm(&self) -> &Arc<Svm<P, XeBindings<P>>> {
        &self.svm
    }

    /// Mirrors the host addresses of `area` (VM_BIND with the CPU-address-mirror flag).
    ///
    /// # Errors
    /// [`Failed::Budget`]-free: [`Failed::OutOfArea`] for an empty or kernel-half span,
    /// [`Failed::Permission`] where ranges are live in the span, as their rights would change
    /// under the device, [`Failed::Closed`].
    pub fn mirror(&self, area: MirrorArea) -> Result<(), Failed> {
        self.change_areas(area.span, |state| state.insert_area(area))
    }

    /// Mirrors `span` no longer: device accesses there are refused from now on
    /// (`svm-design.md` section 5.9: `UNMAP` of mirror VMAs). Where nothing is mirrored, nothing
    /// changes.
    ///
    /// # Errors
    /// As [`mirror`](Self::mirror): nothing is taken from under the device.
    pub fn unmirror(&self, span: HostSpan) -> Result<(), Failed> {
        self.change_areas(span, |state| state.remove_areas(span))
    }

    /// Changes the areas of a span that has no live ranges. Dead ones are collected first.
    fn change_areas(
        &self,
        span: HostSpan,
        change: impl FnOnce(&mut VmState),
    ) -> Result<(), Failed> {
        if span.is_empty() || !user_space().covers(span) {
            return Err(Failed::OutOfArea(span.start()));
        }
        let mut state = self.state.lock();
        if state.closed {
            return Err(Failed::Closed);
        }
        collect::run(self, &mut state);
        if self.svm.has_mapping(span) {
            return Err(Failed::Permission(span.start()));
        }
        change(&mut state);
        Ok(())
    }

    /// Closes the VM: no fault is served any more, all entries go, all ranges go
    /// (`svm-design.md` section 5.10). Device pages stay where they are until the CPU or the host
    /// wants them. A second call does nothing.
    pub fn close(&self) {
        let mut state = self.state.lock();
        if core::mem::replace(&mut state.closed, true) {
            return;
        }
        self.svm.close(&mut state.owner);
        let env = &self.device.seams.env;
        if !env.mutant(Mutant::CloseKeepsRoot) {
            self.device.port.set_root(self.asid, None);
        }
        if !env.mutant(Mutant::CloseKeepsTlbs) {
            self.svm.driver().flush_all();
        }
        while !env.mutant(Mutant::CloseKeepsGarbage)
            && let Some(range) = self.svm.pop_garbage(&mut state.owner)
        {
            collect::remove(self, &mut state, &range);
        }
        while let Some(range) = self.svm.any_range(&mut state.owner) {
            collect::remove(self, &mut state, &range);
        }
        state.table.clear(&*self.device.tables);
        drop(state);
        if !self.device.seams.env.mutant(Mutant::ClosedVmKept) {
            self.device.remove_vm(self.asid);
        }
    }
}

/// All addresses a process can have on this architecture, less the null page.
#[must_use]
pub fn user_space() -> HostSpan {
    HostSpan::new(HostVa::new(gpusvm::addr::PAGE), HostVa::new(1 << 47))
}

/// `span` as device addresses.
pub(crate) fn mirrored(span: HostSpan) -> GpuSpan {
    GpuSpan::mirror(span)
}
