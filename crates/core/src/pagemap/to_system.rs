//! The one way home: CPU fault, eviction, mixed placement, address-space change and teardown all
//! end here (`svm-design.md` sections 3.5 and 3.6). Callers differ in how they pick the allocation.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::PageCount;
use crate::error::Interrupted;
use crate::event::{Event, HomeCause};
use crate::mutant::Mutant;
use crate::pagemap::Allocation;
use crate::seam::Platform;
use crate::seam::copy::CopyEngine;
use crate::seam::env::{Environment, Point};
use crate::seam::mm::{AddressSpace, AllocationRef, DeviceAllocation, MigrateTo, MigrationSet};

/// Brings every page that the allocation still holds to host memory and returns how many came.
/// Takes neither the `vm` lock nor any other that a CPU fault could meet; must not be called with
/// the notifier lock held.
///
/// # Errors
/// `Stale` when another operation holds the pages; `Failed` when the content cannot be moved.
pub fn move_to_system<P: Platform>(
    allocation: &Arc<Allocation<P>>,
    cause: HomeCause,
) -> Result<PageCount, Interrupted> {
    let pagemap = &allocation.pagemap;
    let seams = &pagemap.seams;
    let started = seams.env.now();
    let aperture = pagemap.copy.surrender(allocation.vram());
    let to = MigrateTo::home(
        Arc::<Allocation<P>>::clone(allocation) as AllocationRef,
        aperture,
    );
    let set = seams.space.migrate_begin(allocation.origin(), to)?;
    seams.env.yield_point(Point::AfterCollect);
    let late = seams.env.mutant(Mutant::FinalizeBeforeCopyHome);
    let moves: Vec<_> = if late {
        set.moves().to_vec()
    } else {
        Vec::new()
    };
    if !late {
        pagemap.copy.run(set.moves())?;
        seams.env.yield_point(Point::BeforeFinalize);
    }
    let copied = set.moves().iter().map(|m| m.vram.pages()).sum();
    let adopted = if seams.env.mutant(Mutant::HomeCountedTwice) {
        copied
    } else {
        set.adopted()
    };
    let moved = set.finalize();
    if late {
        seams.env.yield_point(Point::BeforeFinalize);
        pagemap.copy.run(&moves)?;
    }
    if moved > PageCount::ZERO {
        let took = seams.env.now().since(started);
        let span = allocation.origin();
        seams.emit(&Event::ToSystem {
            span,
            cause,
            copied,
            adopted,
            took,
        });
    }
    Ok(moved)
}
