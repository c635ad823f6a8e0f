//! Binding: page-table entries for the pages of one range (`svm-design.md` section 5.8).
//!
//! `plan` may allocate tables and fail; `commit` writes, under the notifier lock, after the
//! sequence was checked, and cannot fail.

use alloc::vec::Vec;

use gpusvm::error::{Interrupted, Stale};
use gpusvm::mutant::Mutant;
use gpusvm::pages::PageSet;
use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{Access, Location};
use gpusvm::seam::table::{LeafFlags, LeafTarget};
use gpusvm::table::{Segment, TablePlan};

use crate::vm::{Vm, VmState, mirrored};

/// Entries for `pages` of `range`, not yet written.
///
/// # Errors
/// Where there is no memory for a table, or none just now; nothing has changed then.
pub(crate) fn plan<P: Platform>(
    vm: &Vm<P>,
    state: &mut VmState,
    range: &RangeRef,
    pages: &PageSet,
) -> Result<TablePlan, Interrupted> {
    let flags = LeafFlags {
        write: pages.access() == Access::Write
            || vm.device.seams.env.mutant(Mutant::WritableAnyway),
        atomic: allows_atomics(vm, pages),
    };
    let segments: Vec<_> = pages
        .runs()
        .iter()
        .map(|run| {
            let target = match run.at {
                Location::System(bus) => LeafTarget::System(bus),
                Location::Device { vram, .. } => LeafTarget::Vram(vram),
            };
            Segment {
                pages: run.pages,
                target,
                flags,
            }
        })
        .collect();
    state
        .table
        .plan(&*vm.device.tables, mirrored(range.span()), &segments)
}

/// Whether the entries for `pages` have the bit AE (`svm-design.md` section 5.8.3).
fn allows_atomics<P: Platform>(vm: &Vm<P>, pages: &PageSet) -> bool {
    let mutant = vm.device.seams.env.mutant(Mutant::AtomicsOnPlainPages);
    pages.access() == Access::Write && (mutant || vm.atomics().allows(pages))
}

/// Writes the planned entries, unless the host changed its tables since the pages were gathered.
///
/// # Errors
/// [`Stale`]; the plan is undone then, and nothing was written.
pub(crate) fn commit<P: Platform>(
    vm: &Vm<P>,
    state: &mut VmState,
    range: &RangeRef,
    pages: PageSet,
    plan: TablePlan,
) -> Result<(), Stale> {
    let tables = &*vm.device.tables;
    let mut plan = Some(plan);
    let mut replaced = None;
    let atomic = allows_atomics(vm, &pages);
    let committed = vm.svm.commit(range, pages, |bound, held| {
        if let Some(plan) = plan.take() {
            let done = state.table.commit(plan, tables, held);
            bound.slots = done.slots;
            bound.valid = true;
            bound.atomic = atomic;
            replaced = Some(done.garbage);
        }
    });
    if let Some(plan) = plan
        && !vm.device.seams.env.mutant(Mutant::PlanNotAborted)
    {
        state.table.abort(plan, tables);
    }
    if let Some(garbage) = replaced
        && !garbage.is_empty()
    {
        vm.svm.driver().flush_all();
        garbage.free(tables);
    }
    committed
}
