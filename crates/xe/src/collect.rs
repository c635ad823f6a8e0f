//! The garbage collector: removes ranges whose CPU mapping went away (`svm-design.md` section 5.5).
//!
//! It needs the `vm` lock, which an invalidation may not take; so invalidations only mark and queue,
//! and every fault collects first, so that a dead range never answers a look-up.

use gpusvm::mutant::Mutant;
use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;
use gpusvm::seam::env::Environment;
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

/// Unbinds one range and removes it. One that is alive may be bound: its translations go while the
/// notifier lock is held, for an invalidation that comes later finds nothing to flush. Tables that nobody
/// uses any more are freed after a flush: a walk that has begun may still read them.
pub(crate) fn remove<P: Platform>(vm: &Vm<P>, state: &mut VmState, range: &RangeRef) {
    let VmState {
        owner,
        table,
        closed,
        ..
    } = state;
    let tables = &*vm.device.tables;
    let driver = vm.svm.driver();
    // Where the VM is closed, nobody finds its tables, and everything was flushed.
    let env = &vm.device.seams.env;
    let keeps = *closed || env.mutant(Mutant::RemovedUnflushed);
    let keeps_all = *closed && env.mutant(Mutant::CloseKeepsTlbs);
    let detached = vm.svm.remove_range(owner, range, |bound, held| {
        let was_valid = core::mem::replace(&mut bound.valid, false);
        let detached = table.unbind(tables, &bound.slots, held);
        if was_valid && !keeps {
            driver.flush(range.span(), held);
        }
        detached
    });
    if let Some(detached) = detached
        && !detached.is_empty()
    {
        if !keeps_all {
            driver.flush_all();
        }
        detached.free(tables);
    }
}
