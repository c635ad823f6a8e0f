//! The rules that hold between any two steps.

use core::sync::atomic::Ordering;

use gpusvm::addr::PAGE;
use gpusvm_model::kernel::bus;
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::flags::Bits;
use gpusvm_model::mm::memory::{FrameId, Owner};
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_softgpu::Translation;

use crate::explore::node::Node;
use crate::explore::plan::{PAGES, address};
use crate::explore::world::World;

/// What an oracle had seen when it last looked.
pub(super) type Seen = Option<(u64, u64)>;

/// Looks at everything, if something has changed.
///
/// # Errors
/// Which rule is broken, and where.
pub(super) fn look(world: &World, seen: &mut Seen) -> Result<(), String> {
    let now = (
        world.kernel.generation(),
        world.writes.load(Ordering::Relaxed),
    );
    if seen.replace(now) == Some(now) {
        return Ok(());
    }
    if !world.kernel.is_mapping() {
        world.kernel.check().map_err(|broken| broken.to_string())?;
    }
    world.kernel.look(|mm| {
        for node in &world.nodes {
            for page in 0..PAGES {
                let found = node.gpu.translation(node.vm.asid(), address(page, 0).get());
                if let Some(translation) = found {
                    entry_agrees(mm, node, page, translation)?;
                }
            }
        }
        Ok::<(), String>(())
    })?;
    match world.kernel.violations().first() {
        Some(violation) => Err(violation.to_string()),
        None => Ok(()),
    }
}

/// A valid entry of a device leads where the process has the page, and gives no right that the
/// process does not have: invalidations zap before anything changes.
fn entry_agrees(mm: &Machine, node: &Node, page: u32, found: Translation) -> Result<(), String> {
    let entry = mm.entry(Pid(0), page);
    let wrong = |why: &str| {
        let device = node.vm.asid();
        Err(format!(
            "the entry of device {device} for page {page} {why}: {found:?}, the process has {entry:?}"
        ))
    };
    match (found, entry) {
        (Translation::Bus { address, write }, Entry::Present(frame, bits)) => {
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
            },
            Entry::Zero(_),
        ) => {
            if address == bus::ZERO_PAGE.get() {
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
    match mm.memory().folio(frame).owner {
        Owner::Device(place, n) => Some(mm.device(place).vram + u64::from(n) * PAGE),
        Owner::Free | Owner::Anon | Owner::Ksm | Owner::File(..) | Owner::Poisoned => None,
    }
}

/// When all VMs are closed and everything was evicted.
///
/// # Errors
/// What is left.
pub(super) fn nothing_is_left(world: &World) -> Result<(), String> {
    world
        .kernel
        .check_quiet()
        .map_err(|broken| broken.to_string())?;
    for node in &world.nodes {
        let used = node.device.pagemap().vram().used();
        if used > 0 {
            return Err(format!("leak: {used} bytes of device memory are in use"));
        }
        if node.vm.svm().range_count() > 0 {
            return Err("leak: a closed VM has ranges".to_owned());
        }
    }
    match world.told.taken() {
        0 => Ok(()),
        n => Err(format!("leak: {n} pieces of device memory have an owner")),
    }
}

/// When the process has ended, too.
///
/// # Errors
/// How many pages of host memory are left.
pub(super) fn host_is_empty(world: &World) -> Result<(), String> {
    let left = world.kernel.look(|mm| {
        let memory = mm.memory();
        memory.host_frames() - memory.free_frames()
    });
    match left {
        0 => Ok(()),
        n => Err(format!("leak: {n} pages of host memory belong to nobody")),
    }
}
