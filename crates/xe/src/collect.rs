//! The garbage collector: removes ranges whose CPU mapping went away (`svm-design.md` section 5.5).
//!
//! It needs the `vm` lock, which an invalidation may not take; so invalidations only mark and queue,
//! and every fault collects first, so that a dead range never answers a look-up.

use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;
use gpusvm::svm::Bindings;

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
///
/// A range that is still valid is flushed before it is gone: an invalidation that comes later does not
/// find it, and so leaves in the TLBs what was bound. Of a closed VM nothing is in the TLBs.
pub(crate) fn remove<P: Platform>(vm: &Vm<P>, state: &mut VmState, range: &RangeRef) {
    let VmState {
        owner,
        table,
        closed,
        ..
    } = state;
    let tables = &*vm.device.tables;
    let detached = vm.svm.remove_range(owner, range, |bound, held| {
        let valid = core::mem::replace(&mut bound.valid, false);
        let detached = table.unbind(tables, &bound.slots, held);
        if valid && !*closed {
            vm.svm.driver().flush(range.span(), held);
        }
        detached
    });
    if let Some(detached) = detached
        && !detached.is_empty()
    {
        vm.svm.driver().flush_all();
        detached.free(tables);
    }
}
