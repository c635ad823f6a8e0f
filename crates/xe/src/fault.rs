//! A device fault, from the record to the answer (`svm-design.md` section 5.4).
//!
//! `until_done` owns the only loop; `attempt` is the list of steps. A step that finds the world
//! changed answers [`Stale`], and the loop starts over while the budget lasts. Order matters:
//! garbage goes first, so that a dead range never satisfies a look-up; pages are gathered after
//! the migration; entries are written last, under the notifier lock.

use alloc::sync::Arc;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PAGE_64K};
use gpusvm::error::{Failed, Interrupted, Stale};
use gpusvm::event::{Event, FaultEnd};
use gpusvm::mutant::Mutant;
use gpusvm::pagemap::ToDevice;
use gpusvm::pages::PageSet;
use gpusvm::range::RangeRef;
use gpusvm::seam::Platform;
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm::seam::mm::{Access, AddressSpace, Placement};
use gpusvm::svm::FindRange;
use gpusvm_abi::fault::{AccessType, FaultRecord, FaultResponse, KIND_NACK};

use crate::atomics::{self, Need};
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
    kind: AccessType,
    access: Access,
}

/// What one fault may still spend.
#[derive(Debug)]
struct Budget {
    deadline: Ns,
    retries: u32,
    migrations: u32,
    /// Migrations so far.
    migrated: u32,
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
    let kind = record.access_type()?;
    let access = match kind {
        AccessType::Read => Access::Read,
        AccessType::Write | AccessType::Atomic => Access::Write,
    };
    let vm = device.vm(record.asid)?;
    Some(DeviceFault {
        vm,
        gt: record.gt,
        at: HostVa::new(record.address).align_down(PAGE),
        kind,
        access,
    })
}

/// Makes the access possible or tells why not.
fn service<P: Platform>(fault: &DeviceFault<P>) -> Result<(), Failed> {
    let DeviceFault {
        vm, gt, at, access, ..
    } = fault;
    let seams = &vm.device.seams;
    let started = seams.env.now();
    seams.emit(&Event::FaultStart {
        gt: *gt,
        at: *at,
        access: *access,
    });
    let mut range = None;
    let end = match vm.atomics().need(fault.kind, *at) {
        Ok(need) => until_done(fault, need, started, &mut range),
        Err(failed) => FaultEnd::Refused(failed),
    };
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

/// The only loop: attempts until one succeeds, fails, or nothing is left to spend.
fn until_done<P: Platform>(
    fault: &DeviceFault<P>,
    need: Need,
    started: Ns,
    range: &mut Option<RangeRef>,
) -> FaultEnd {
    let seams = &fault.vm.device.seams;
    let mut budget = Budget::new(need, started);
    let mut state = fault.vm.state.lock();
    loop {
        match attempt(fault, &mut state, need, &mut budget, range) {
            Ok(end) => return end,
            Err(Interrupted::Failed(failed)) => return FaultEnd::Refused(failed),
            Err(Interrupted::Stale(why)) => {
                seams.emit(&Event::FaultRetry { at: fault.at, why });
                if let Err(failed) = budget.spend(why, seams.env.now()) {
                    return FaultEnd::Refused(failed);
                }
                seams.env.yield_point(Point::Retry);
            }
        }
    }
}

/// One pass over the steps.
fn attempt<P: Platform>(
    fault: &DeviceFault<P>,
    state: &mut VmState,
    need: Need,
    budget: &mut Budget,
    found: &mut Option<RangeRef>,
) -> Result<FaultEnd, Interrupted> {
    let vm = &*fault.vm;
    if !vm.device.seams.env.mutant(Mutant::CollectorSkipped) {
        collect::run(vm, state);
    }
    let (area, access) = check_area(fault, state)?;
    let range = find_range(fault, state, &find_request(fault, &area, access, need))?;
    vm.device.seams.emit(&Event::FaultRange {
        gt: fault.gt,
        range: range.span(),
    });
    *found = Some(range.clone());
    if vm.svm.is_bound(&range, fault.access, |bound, _pagemap| {
        bound.valid && (bound.atomic || need == Need::Access)
    }) {
        return Ok(FaultEnd::Valid);
    }
    if need == Need::DeviceMemory && !range.migratable() {
        return Err(Failed::NotMigratable(fault.at).into());
    }
    let pages = match place::decide(&question(vm, &range, need, budget)) {
        Place::Device => {
            migrate(fault, &range, need, budget)?;
            get_pages(fault, state, &range, access)?
        }
        Place::AsTheyAre => get_pages(fault, state, &range, access)?,
        Place::Exclusive => take_alone(vm, &range)?,
    };
    need.check(&pages, vm.device.pagemap.id())?;
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
        (Rights::ReadOnly, Access::Write) => {
            if fault.vm.device.seams.env.mutant(Mutant::ReadOnlyAreaStored) {
                return Ok((area, Access::Write));
            }
            Err(Failed::Permission(fault.at))
        }
    }
}

fn find_request<P: Platform>(
    fault: &DeviceFault<P>,
    area: &MirrorArea,
    access: Access,
    need: Need,
) -> FindRange {
    FindRange {
        at: fault.at,
        area: area.span,
        access,
        device_memory: true,
        populated_up_to: PAGE_64K,
        largest: match need {
            Need::Access | Need::DeviceMemory | Need::InPlace => PAGE_2M,
            Need::Exclusive => PAGE,
        },
    }
}

/// The range of a fault. An exclusive page is a range of its own: a larger one makes room, unless its
/// pages are on the device.
fn find_range<P: Platform>(
    fault: &DeviceFault<P>,
    state: &mut VmState,
    find: &FindRange,
) -> Result<RangeRef, Interrupted> {
    let vm = &*fault.vm;
    let range = vm.svm.find_or_insert_range(&mut state.owner, find)?;
    if range.span().bytes() <= find.largest || on_device(vm, range.span()) {
        return Ok(range);
    }
    collect::remove(vm, state, &range);
    vm.svm.find_or_insert_range(&mut state.owner, find)
}

/// Takes the page of a range for the device alone. A larger range came home since it was found, or died:
/// the next attempt makes one of a page.
fn take_alone<P: Platform>(vm: &Vm<P>, range: &RangeRef) -> Result<PageSet, Interrupted> {
    if range.span().bytes() > PAGE {
        return Err(Stale::PagesBusy.into());
    }
    vm.svm.make_exclusive(range)
}

/// Whether all pages of `span` are in the memory of the VM's device. Old when it arrives.
fn on_device<P: Platform>(vm: &Vm<P>, span: HostSpan) -> bool {
    let placement = vm.device.seams.space.placement(span);
    placement == Placement::Device(vm.device.pagemap.id())
}

fn question<P: Platform>(vm: &Vm<P>, range: &RangeRef, need: Need, budget: &Budget) -> Question {
    Question {
        migratable: range.migratable(),
        bytes: range.span().bytes(),
        migrations_left: budget.migrations,
        need,
        on_device: need == Need::Exclusive && on_device(vm, range.span()),
    }
}

/// Tries to move the range's pages to the device. Where they do not have to be there, a migration
/// that does not happen is no error, whatever the reason: the pages are mapped where they are
/// (`svm-design.md` section 5.4.4).
///
/// # Errors
/// Why the last migration did not happen that pages needed.
fn migrate<P: Platform>(
    fault: &DeviceFault<P>,
    range: &RangeRef,
    need: Need,
    budget: &mut Budget,
) -> Result<(), Failed> {
    let device = &fault.vm.device;
    let started = device.seams.env.now();
    let wish = ToDevice {
        span: range.span(),
        timeslice: need.timeslice(budget.migrated),
    };
    let ended = device.pagemap.to_device(wish);
    let refused = ended.as_ref().err().map(|why| as_stale(*why));
    budget.pay_migration(need, refused);
    let took = device.seams.env.now().since(started);
    let (gt, span) = (fault.gt, range.span());
    device.seams.emit(&Event::MigrateToDevice {
        gt,
        span,
        took,
        refused,
    });
    match ended {
        Err(why) if need == Need::DeviceMemory && budget.migrations == 0 => Err(match why {
            Interrupted::Stale(why) => Failed::Budget(why),
            Interrupted::Failed(failed) => failed,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Why a migration did not happen, as something that may be different the next time.
const fn as_stale(why: Interrupted) -> Stale {
    match why {
        Interrupted::Stale(why) => why,
        // The mapping changed; what follows finds out how.
        Interrupted::Failed(
            Failed::NotMigratable(_)
            | Failed::NoVma(_)
            | Failed::BadPage(_)
            | Failed::Permission(_),
        ) => Stale::CpuMappingChanged,
        Interrupted::Failed(_) => Stale::PagesRefused,
    }
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
    fn new(need: Need, started: Ns) -> Self {
        Self {
            deadline: started.after(RETRY_BUDGET),
            retries: 0,
            migrations: match need {
                Need::Access | Need::Exclusive | Need::InPlace => MIGRATIONS,
                Need::DeviceMemory => atomics::ATTEMPTS,
            },
            migrated: 0,
        }
    }

    /// Pays for one migration. Those that pages need are paid for when they do not happen: pages that
    /// were there, and were gone before they were bound, are one more retry.
    fn pay_migration(&mut self, need: Need, refused: Option<Stale>) {
        self.migrated += 1;
        if need != Need::DeviceMemory || refused.is_some() {
            self.migrations -= 1;
        }
    }

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
