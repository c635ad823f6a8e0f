//! A device fault, from the record to the answer (`svm-design.md` section 5.4).
//!
//! `service` owns the only loop; `attempt` is the list of steps. A step that finds the world
//! changed answers [`Stale`], and the loop starts over while the budget lasts. Order matters:
//! garbage goes first, so that a dead range never satisfies a look-up; pages are gathered after
//! the migration; entries are written last, under the notifier lock.

use alloc::sync::Arc;

use gpusvm::addr::{HostVa, PAGE, PAGE_64K};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::{Event, FaultEnd};
use gpusvm::mutant::Mutant;
use gpusvm::pagemap::ToDevice;
use gpusvm::pages::PageSet;
use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm::seam::mm::Access;
use gpusvm::svm::FindRange;
use gpusvm_abi::fault::{AccessType, FaultRecord, FaultResponse, KIND_NACK};

use crate::device::Device;
use crate::place::{self, Place, Question};
use crate::vm::{MirrorArea, Rights, Vm, VmState};
use crate::{bind, collect};

/// Time that one fault may spend on retries before it is refused.
const RETRY_BUDGET: Ns = Ns::from_millis(1000);
/// Retries that a fault always has, however slow the machine.
const RETRIES_MIN: u32 = 64;
/// Migrations that a fault tries before it maps pages where they are.
const MIGRATIONS: u32 = 1;

/// A decoded fault.
#[derive(Debug)]
struct DeviceFault<P: Platform> {
    vm: Arc<Vm<P>>,
    gt: u16,
    at: HostVa,
    access: Access,
}

/// What one fault may still spend.
#[derive(Debug)]
struct Budget {
    deadline: Ns,
    retries: u32,
    migrations: u32,
}

/// Serves the fault of `record` and answers it.
pub(crate) fn handle<P: Platform>(device: &Device<P>, record: &FaultRecord) -> FaultResponse {
    let Some(fault) = decode(device, record) else {
        return FaultResponse::Refuse;
    };
    match service(&fault) {
        Ok(()) => FaultResponse::Replay,
        Err(_) if device.seams.env.mutant(Mutant::AckedAfterFailure) => FaultResponse::Replay,
        Err(_reported) => FaultResponse::Refuse,
    }
}

/// The fault behind a record; `None` for one that names no VM or no access we know.
fn decode<P: Platform>(device: &Device<P>, record: &FaultRecord) -> Option<DeviceFault<P>> {
    if record.kind == KIND_NACK {
        return None;
    }
    let access = match record.access_type()? {
        AccessType::Read => Access::Read,
        AccessType::Write | AccessType::Atomic => Access::Write,
    };
    let vm = device.vm(record.asid)?;
    Some(DeviceFault {
        vm,
        gt: record.gt,
        at: HostVa::new(record.address).align_down(PAGE),
        access,
    })
}

/// Makes the access possible or tells why not. Owns the only loop.
fn service<P: Platform>(fault: &DeviceFault<P>) -> Result<(), Failed> {
    let DeviceFault { vm, gt, at, access } = fault;
    let seams = &vm.device.seams;
    let started = seams.env.now();
    seams.emit(&Event::FaultStart {
        gt: *gt,
        at: *at,
        access: *access,
    });
    let mut budget = Budget {
        deadline: started.after(RETRY_BUDGET),
        retries: 0,
        migrations: MIGRATIONS,
    };
    let mut state = vm.state.lock();
    let mut range = None;
    let end = loop {
        match attempt(fault, &mut state, &mut budget, &mut range) {
            Ok(end) => break end,
            Err(Interrupted::Failed(failed)) => break FaultEnd::Refused(failed),
            Err(Interrupted::Stale(why)) => {
                seams.emit(&Event::FaultRetry { at: *at, why });
                if let Err(failed) = budget.spend(why, seams.env.now()) {
                    break FaultEnd::Refused(failed);
                }
                seams.env.yield_point(Point::Retry);
            }
        }
    };
    drop(state);
    let range = range.map(|range: RangeRef| range.span());
    let took = seams.env.now().since(started);
    seams.emit(&Event::FaultDone {
        gt: *gt,
        at: *at,
        range,
        end,
        took,
    });
    match end {
        FaultEnd::Bound | FaultEnd::Valid => Ok(()),
        FaultEnd::Refused(failed) => Err(failed),
    }
}

/// One pass over the steps.
fn attempt<P: Platform>(
    fault: &DeviceFault<P>,
    state: &mut VmState,
    budget: &mut Budget,
    found: &mut Option<RangeRef>,
) -> Result<FaultEnd, Interrupted> {
    let vm = &*fault.vm;
    if !vm.device.seams.env.mutant(Mutant::CollectorSkipped) {
        collect::run(vm, state);
    }
    let (area, access) = check_area(fault, state)?;
    let find = find_request(fault, &area, access);
    let range = vm.svm.find_or_insert_range(&mut state.owner, &find)?;
    vm.device.seams.emit(&Event::FaultRange {
        gt: fault.gt,
        range: range.span(),
    });
    *found = Some(range.clone());
    if vm
        .svm
        .is_bound(&range, fault.access, |bound, _pagemap| bound.valid)
    {
        return Ok(FaultEnd::Valid);
    }
    if place::decide(&question(&range, budget)) == Place::Device {
        migrate(fault, &range, budget)?;
    }
    let pages = get_pages(fault, state, &range, access)?;
    let started = vm.device.seams.env.now();
    let plan = bind::plan(vm, state, &range, &pages)?;
    vm.device.seams.env.yield_point(Point::BeforeCommit);
    bind::commit(vm, state, &range, pages, plan)?;
    let took = vm.device.seams.env.now().since(started);
    vm.device.seams.emit(&Event::Bind {
        gt: fault.gt,
        range: range.span(),
        took,
    });
    Ok(FaultEnd::Bound)
}

/// The mirror area of the fault and the right that its pages need. As in the kernel, a writable
/// area asks the CPU mapping for writes even where the device only reads: the entries it gets are
/// writable.
fn check_area<P: Platform>(
    fault: &DeviceFault<P>,
    state: &VmState,
) -> Result<(MirrorArea, Access), Failed> {
    if state.closed {
        return Err(Failed::Closed);
    }
    let area = state.area_at(fault.at).ok_or(Failed::OutOfArea(fault.at))?;
    match (area.rights, fault.access) {
        (Rights::ReadWrite, _) => Ok((area, Access::Write)),
        (Rights::ReadOnly, Access::Read) => Ok((area, Access::Read)),
        (Rights::ReadOnly, Access::Write) => Err(Failed::Permission(fault.at)),
    }
}

fn find_request<P: Platform>(
    fault: &DeviceFault<P>,
    area: &MirrorArea,
    access: Access,
) -> FindRange {
    FindRange {
        at: fault.at,
        area: area.span,
        access,
        device_memory: true,
        populated_up_to: PAGE_64K,
    }
}

fn question(range: &RangeRef, budget: &Budget) -> Question {
    Question {
        migratable: range.migratable(),
        bytes: range.span().bytes(),
        migrations_left: budget.migrations,
    }
}

/// Tries to move the range's pages to the device. A migration that does not happen is no error:
/// the pages are mapped where they are.
fn migrate<P: Platform>(
    fault: &DeviceFault<P>,
    range: &RangeRef,
    budget: &mut Budget,
) -> Result<(), Failed> {
    let device = &fault.vm.device;
    let started = device.seams.env.now();
    budget.migrations -= 1;
    let wish = ToDevice {
        span: range.span(),
        timeslice: Ns::default(),
    };
    let refused = match device.pagemap.to_device(wish) {
        Ok(()) => None,
        Err(Interrupted::Stale(why)) => Some(why),
        Err(Interrupted::Failed(Failed::OutOfVram | Failed::TooLarge | Failed::Copy)) => {
            Some(Stale::PagesRefused)
        }
        // The mapping changed; what follows finds out how.
        Err(Interrupted::Failed(
            Failed::NotMigratable(_)
            | Failed::NoVma(_)
            | Failed::BadPage(_)
            | Failed::Permission(_),
        )) => Some(Stale::CpuMappingChanged),
        Err(Interrupted::Failed(failed)) => return Err(failed),
    };
    let took = device.seams.env.now().since(started);
    let (gt, span) = (fault.gt, range.span());
    device.seams.emit(&Event::MigrateToDevice {
        gt,
        span,
        took,
        refused,
    });
    Ok(())
}

/// Gathers the range's pages. Pages in several places are brought home, and the fault starts over.
/// A range that no longer fits its CPU mapping is removed: the next pass makes one that does.
fn get_pages<P: Platform>(
    fault: &DeviceFault<P>,
    state: &mut VmState,
    range: &RangeRef,
    access: Access,
) -> Result<PageSet, Interrupted> {
    let device = &fault.vm.device;
    let started = device.seams.env.now();
    let svm = &fault.vm.svm;
    let gathered = match svm.get_pages(range, access, Some(device.pagemap.id())) {
        // The mapping may be gone by now as well as in the case below.
        Err(Interrupted::Stale(Stale::MixedPlacement)) => svm
            .evict_range(range)
            .and(Err(Stale::MixedPlacement.into())),
        other => other,
    };
    let pages = match gathered {
        Err(Interrupted::Failed(Failed::BadPage(_) | Failed::Permission(_))) => {
            collect::remove(&fault.vm, state, range);
            return Err(Stale::CpuMappingChanged.into());
        }
        other => other?,
    };
    let took = device.seams.env.now().since(started);
    device.seams.emit(&Event::GetPages {
        gt: fault.gt,
        range: range.span(),
        took,
    });
    Ok(pages)
}

impl Budget {
    /// Pays for one retry.
    fn spend(&mut self, why: Stale, now: Ns) -> Result<(), Failed> {
        self.retries += 1;
        let left = self.retries < RETRIES_MIN || now < self.deadline;
        if left {
            Ok(())
        } else {
            Err(Failed::Budget(why))
        }
    }
}
