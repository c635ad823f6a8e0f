//! The rules that hold between any two steps, and at the end.

use gpusvm::addr::PAGE;
use gpusvm::seam::Platform;
use gpusvm_model::kernel::{Kernel, bus};
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::flags::Bits;
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_model::sched::ModelEnv;
use gpusvm_softgpu::Translation;
use gpusvm_xe::atomics::AtomicPolicy;

use crate::world::Node;
use crate::world::sink::Told;

/// Looks at everything. `pages` are those of the first process that devices may use.
///
/// # Errors
/// Which rule is broken, and where.
pub(crate) fn look(
    kernel: &Kernel<ModelEnv>,
    nodes: &[Node],
    pages: core::ops::Range<u32>,
) -> Result<(), String> {
    if !kernel.is_mapping() {
        kernel.check().map_err(|broken| broken.to_string())?;
    }
    kernel.look(|mm| {
        for node in nodes {
            for page in pages.clone() {
                let at = mm.shape().address(page).get();
                if let Some(found) = node.gpu.translation(node.vm.asid(), at) {
                    entry_agrees(mm, &Owner::of(node), page, found)?;
                }
            }
        }
        Ok::<(), String>(())
    })?;
    trespasses(kernel)
}

/// No device has used memory that is not its process's.
///
/// # Errors
/// Which access did.
pub(crate) fn trespasses(kernel: &Kernel<ModelEnv>) -> Result<(), String> {
    match kernel.violations().first() {
        Some(violation) => Err(violation.to_string()),
        None => Ok(()),
    }
}

/// Whose entries are looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    device: u32,
    atomics: AtomicPolicy,
}

impl Owner {
    /// The VM of a device.
    pub(crate) fn of<P: Platform<Env = ModelEnv>>(node: &Node<P>) -> Self {
        Self {
            device: node.vm.asid(),
            atomics: node.vm.atomics(),
        }
    }

    /// Whether entries may allow atomics on host memory that the CPU has as well.
    fn shares_atomics(&self) -> bool {
        matches!(self.atomics, AtomicPolicy::System | AtomicPolicy::Naive)
    }
}

/// A valid entry of a device leads where the process has the page, and gives no right that the
/// process does not have: invalidations zap before anything changes.
pub(crate) fn entry_agrees(
    mm: &Machine,
    owner: &Owner,
    page: u32,
    found: Translation,
) -> Result<(), String> {
    let device = owner.device;
    let entry = mm.entry(Pid(0), page);
    let wrong = |why: &str| {
        Err(format!(
            "the entry of device {device} for page {page} {why}: {found:?}, the process has {entry:?}"
        ))
    };
    match (found, entry) {
        (Translation::Bus { atomic: true, .. }, Entry::Present(..)) if !owner.shares_atomics() => {
            wrong("allows atomics on a page that the CPU has")
        }
        (Translation::Bus { address, write, .. }, Entry::Present(frame, bits)) => {
            if address != bus::address_of(frame).get() {
                wrong("leads to another page")
            } else if write && !bits.has(Bits::WRITE) {
                wrong("allows stores that the process may not do")
            } else {
                Ok(())
            }
        }
        (
            Translation::Bus {
                address,
                write: false,
                ..
            },
            Entry::Zero(_),
        ) => {
            if address == bus::ZERO_PAGE.get() {
                Ok(())
            } else {
                wrong("leads to another page")
            }
        }
        (
            Translation::Bus {
                address,
                atomic: true,
                ..
            },
            Entry::DeviceExclusive(frame, _),
        ) if owner.atomics == AtomicPolicy::Exclusive => {
            if address == bus::address_of(frame).get() {
                Ok(())
            } else {
                wrong("leads to another page")
            }
        }
        (Translation::Vram { offset, .. }, Entry::DevicePrivate(frame, _)) => {
            if vram_of(mm, frame) == Some(offset) {
                Ok(())
            } else {
                wrong("leads to other device memory")
            }
        }
        (Translation::Bus { .. }, _) => {
            wrong("leads to host memory that the process does not have")
        }
        (Translation::Vram { .. }, _) => wrong("leads to device memory that has no page"),
    }
}

/// Where in device memory a page is.
fn vram_of(mm: &Machine, frame: FrameId) -> Option<u64> {
    let page = mm.memory().device_page(frame)?;
    Some(mm.device(page.place).vram + u64::from(page.page) * PAGE)
}

/// When all VMs are closed and everything was evicted.
///
/// # Errors
/// What is left.
pub(crate) fn nothing_is_left<'a, P: Platform<Env = ModelEnv>>(
    kernel: &Kernel<ModelEnv>,
    nodes: impl IntoIterator<Item = &'a Node<P>>,
    told: &Told,
) -> Result<(), String> {
    kernel.check_quiet().map_err(|broken| broken.to_string())?;
    for node in nodes {
        let used = node.device.pagemap().vram().used();
        if used > 0 {
            return Err(format!("leak: {used} bytes of device memory are in use"));
        }
        if node.vm.svm().range_count() > 0 {
            return Err("leak: a closed VM has ranges".to_owned());
        }
    }
    match told.taken() {
        0 => Ok(()),
        n => Err(format!("leak: {n} pieces of device memory have an owner")),
    }
}
