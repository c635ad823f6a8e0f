//! The rules that hold between any two steps.
//!
//! An oracle looks at what has changed since it looked last. Debug builds also look at everything,
//! and say when that finds more.

use gpusvm::addr::PAGE;
use gpusvm_model::kernel::bus;
use gpusvm_model::mm::changes::Changes;
use gpusvm_model::mm::checker::Checker;
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::flags::Bits;
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_softgpu::{Translation, Walked};

use crate::explore::plan::{PAGES_MAX, address};
use crate::explore::vram::Written;
use crate::explore::world::{Node, World};

/// The process that everybody uses.
const FIRST: Pid = Pid(0);

/// Looks at a world, again and again.
pub(super) struct Oracle {
    changes: Changes,
    checker: Checker,
    tables: Vec<Tables>,
}

/// The page tables of one device, as they were.
#[derive(Clone)]
struct Tables {
    root: Option<u64>,
    /// Pages of device memory that they are in: bits of [`Written`].
    pages: u64,
    entries: [Option<Translation>; PAGES_MAX as usize],
}

impl Oracle {
    /// One that has seen nothing.
    pub(super) fn new(world: &World) -> Self {
        let none = Tables {
            root: None,
            pages: 0,
            entries: [None; PAGES_MAX as usize],
        };
        Self {
            changes: Changes::default(),
            checker: world.kernel.look(Checker::new),
            tables: vec![none; world.nodes.len()],
        }
    }

    /// Looks at what has changed.
    ///
    /// # Errors
    /// Which rule is broken, and where.
    pub(super) fn look(&mut self, world: &World) -> Result<(), String> {
        for (node, tables) in world.nodes.iter().zip(&mut self.tables) {
            tables.look(world, node)?;
        }
        self.look_at_memory(world)?;
        if world.kernel.is_violated() {
            let all = world.kernel.violations();
            return all.first().map_or(Ok(()), |one| Err(one.to_string()));
        }
        Ok(())
    }

    /// Pages of the process that have changed, and all accounting that has.
    fn look_at_memory(&mut self, world: &World) -> Result<(), String> {
        let Self {
            changes,
            checker,
            tables,
        } = self;
        world.kernel.look_at_changes(changes, |mm, changes| {
            for page in changes
                .pages(FIRST)
                .iter()
                .filter(|page| *page < world.plan.pages)
            {
                for (node, tables) in world.nodes.iter().zip(&*tables) {
                    agrees(mm, node, page, tables.entries[page as usize])?;
                }
            }
            checker.note(changes);
            if checker.is_idle() || world.kernel.is_mapping() {
                return Ok(());
            }
            checker.check(mm).map_err(|broken| broken.to_string())
        })?;
        debug_assert!(
            world.kernel.is_mapping() || world.kernel.check().is_ok(),
            "the check of what has changed overlooks {:?}",
            world.kernel.check()
        );
        Ok(())
    }
}

impl Tables {
    /// Looks at entries that have changed.
    fn look(&mut self, world: &World, node: &Node) -> Result<(), String> {
        let root = node.gpu.root(node.vm.asid());
        if node.written.take() & self.pages == 0 && root == self.root {
            return Ok(());
        }
        let mut fresh = Self {
            root,
            pages: 0,
            entries: [None; PAGES_MAX as usize],
        };
        let mut places = fresh.entries.iter_mut();
        let span = (address(0, 0).get(), address(world.plan.pages, 0).get());
        node.gpu.walk(node.vm.asid(), span, |walked| match walked {
            Walked::Table(at) => fresh.pages |= Written::bit(at),
            Walked::Page(_, leads) => {
                if let Some(place) = places.next() {
                    *place = leads;
                }
            }
        });
        core::mem::swap(self, &mut fresh);
        if self.entries == fresh.entries {
            return Ok(());
        }
        world.kernel.look(|mm| {
            let mut all = (0..).zip(&self.entries);
            all.try_for_each(|(page, entry)| agrees(mm, node, page, *entry))
        })
    }
}

/// Whether what a device has for a page agrees with the process.
fn agrees(mm: &Machine, node: &Node, page: u32, found: Option<Translation>) -> Result<(), String> {
    found.map_or(Ok(()), |found| entry_agrees(mm, node, page, found))
}

/// A valid entry of a device leads where the process has the page, and gives no right that the
/// process does not have: invalidations zap before anything changes.
fn entry_agrees(mm: &Machine, node: &Node, page: u32, found: Translation) -> Result<(), String> {
    let entry = mm.entry(FIRST, page);
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
    let page = mm.memory().device_page(frame)?;
    Some(mm.device(page.place).vram + u64::from(page.page) * PAGE)
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
