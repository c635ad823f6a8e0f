//! When the rules that hold between any two steps are looked at.
//!
//! An oracle looks at what has changed since it looked last. Debug builds also look at everything,
//! and say when that finds more.

use gpusvm_model::mm::changes::Changes;
use gpusvm_model::mm::checker::Checker;
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_softgpu::{Translation, Walked};

use crate::explore::node::Node;
use crate::explore::plan::{PAGES_MAX, address};
use crate::explore::world::World;
use crate::world::oracle::{Owner, entry_agrees};
use crate::world::vram::Written;

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
    found.map_or(Ok(()), |found| {
        entry_agrees(mm, &Owner::of(node), page, found)
    })
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
