//! The rules that hold between any two steps, and at the end.

use core::fmt;

use gpusvm::addr::PAGE;
use gpusvm::seam::Platform;
use gpusvm_model::kernel::{Kernel, bus};
use gpusvm_model::mm::check::Broken;
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::flags::Bits;
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_model::sched::ModelEnv;
use gpusvm_softgpu::Translation;
use gpusvm_xe::atomics::AtomicPolicy;

use crate::size::counted;
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
    judge(mm, owner, found, entry).map_err(|why| {
        format!("the entry of device {device} for page {page} {why}: {found:?}, the process has {entry:?}")
    })
}

/// What is wrong with an entry of a device that leads to `found`, where the process has `entry`.
fn judge(
    mm: &Machine,
    owner: &Owner,
    found: Translation,
    entry: Entry,
) -> Result<(), &'static str> {
    let leads = |right: bool| {
        if right {
            Ok(())
        } else {
            Err("leads to another page")
        }
    };
    // Not to pages that are shared with a child, protected, or the same as others.
    let right = |has: bool| {
        if has {
            Ok(())
        } else {
            Err("allows stores that the process may not do")
        }
    };
    match (found, entry) {
        (
            Translation::Bus {
                address,
                write,
                atomic,
                ..
            },
            Entry::Present(frame, bits),
        ) => {
            leads(address == bus::address_of(frame).get())?;
            if atomic && !owner.shares_atomics() {
                return Err("allows atomics on a page that the CPU has");
            }
            right(!write || bits.has(Bits::WRITE))
        }
        (
            Translation::Bus {
                address,
                write: false,
                ..
            },
            Entry::Zero(_),
        ) => leads(address == bus::ZERO_PAGE.get()),
        (
            Translation::Bus {
                address,
                atomic: true,
                ..
            },
            Entry::DeviceExclusive(frame, _),
        ) if owner.atomics == AtomicPolicy::Exclusive => {
            leads(address == bus::address_of(frame).get())
        }
        (Translation::Vram { offset, write, .. }, Entry::DevicePrivate(frame, bits)) => {
            leads(vram_of(mm, frame) == Some(offset))?;
            right(!write || bits.has(Bits::WRITE))
        }
        (Translation::Bus { .. }, _) => Err("leads to host memory that the process does not have"),
        (Translation::Vram { .. }, _) => Err("leads to device memory that has no page"),
    }
}

/// Where in device memory a page is.
fn vram_of(mm: &Machine, frame: FrameId) -> Option<u64> {
    let page = mm.memory().device_page(frame)?;
    Some(mm.device(page.place).vram + u64::from(page.page) * PAGE)
}

/// What is left when all VMs are closed and everything was evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// A rule of quiet moments is broken.
    Broken(Broken),
    /// So many bytes of device memory are in use.
    Vram(u64),
    /// A closed VM has ranges.
    Ranges,
    /// So many pieces of device memory have an owner.
    Owned(usize),
    /// The tables of a closed VM are where its device finds them.
    Root,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(broken) => broken.fmt(f),
            Self::Vram(bytes) => write!(f, "leak: {bytes} bytes of device memory are in use"),
            Self::Ranges => f.write_str("leak: a closed VM has ranges"),
            Self::Owned(n) => {
                let pieces = "pieces of device memory have";
                let owned = counted(*n as u64, "piece of device memory has", pieces);
                write!(f, "leak: {owned} an owner")
            }
            Self::Root => f.write_str("leak: a device finds the tables of a closed VM"),
        }
    }
}

/// When all is over, no unit has translations of a closed VM.
///
/// # Errors
/// Whose it has.
pub(crate) fn nothing_is_cached<'a, P: Platform<Env = ModelEnv>>(
    nodes: impl IntoIterator<Item = &'a Node<P>>,
) -> Result<(), String> {
    let mut asids = nodes.into_iter().map(|node| (node, node.vm.asid()));
    asids
        .find(|(node, asid)| node.gpu.caches(*asid))
        .map_or(Ok(()), |(_, asid)| {
            Err(format!(
                "leak: the closed VM {asid} has translations in TLBs"
            ))
        })
}

/// Checks that nothing is left.
///
/// # Errors
/// What is left.
pub(crate) fn nothing_is_left<'a, P: Platform<Env = ModelEnv>>(
    kernel: &Kernel<ModelEnv>,
    nodes: impl IntoIterator<Item = &'a Node<P>>,
    told: &Told,
) -> Result<(), Left> {
    kernel.check_quiet().map_err(Left::Broken)?;
    for node in nodes {
        let used = node.device.pagemap().vram().used();
        if used > 0 {
            return Err(Left::Vram(used));
        }
        if node.vm.svm().range_count() > 0 {
            return Err(Left::Ranges);
        }
        if node.gpu.root(node.vm.asid()).is_some() {
            return Err(Left::Root);
        }
    }
    match told.taken().len() {
        0 => Ok(()),
        n => Err(Left::Owned(n)),
    }
}
