//! The garbage collector: removes ranges whose CPU mapping went away (`svm-design.md` section 5.5).
//!
//! It needs the `vm` lock, which an invalidation may not take; so invalidations only mark and queue,
//! and every fault collects first, so that a dead range never answers a look-up.

use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;

use crate::vm::{Vm, VmState};

/// Removes every dead range. The caller holds the `vm` lock.
pub(crate) fn run<P: Platform>(vm: &Vm<P>, state: &mut VmState) {
    while let Some(range) = vm.svm.pop_garbage(&mut state.owner) {
        remove(vm, state, &range);
    }
}

/// As [`run`], from the environment's worker.
pub(crate) fn run_deferred<P: Platform>(vm: &Vm<P>) {
    let mut state = vm.state.lock();
    if !state.closed {
        run(vm, &mut state);
    }
}

/// Unbinds one range and removes it. Tables that nobody uses any more are freed after a flush: a
/// walk that has begun may still read them.
pub(crate) fn remove<P: Platform>(vm: &Vm<P>, state: &mut VmState, range: &RangeRef) {
    let VmState { owner, table, .. } = state;
    let tables = &*vm.device.tables;
    let detached = vm.svm.remove_range(owner, range, |bound, held| {
        bound.valid = false;
        table.unbind(tables, &bound.slots, held)
    });
    if let Some(detached) = detached
        && !detached.is_empty()
    {
        vm.svm.driver().flush_all();
        detached.free(tables);
    }
}
