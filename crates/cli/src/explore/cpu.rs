//! What a CPU actor does in a world. Each operation is one function.

use core::ops::Range;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::env::Ns;
use gpusvm::seam::mm::{Access, AddressSpace, Owner};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_model::mm::entry::Entry;
use gpusvm_model::mm::errno::Errno;
use gpusvm_model::mm::flags::Prot;
use gpusvm_model::mm::remap::{Remap, Target};
use gpusvm_model::mm::uffd::Stores;
use gpusvm_model::sched::{Kind, ModelEnv};

use crate::explore::doing::Doing;
use crate::explore::ledger::{Effect, Ended};
use crate::explore::op::Op;
use crate::explore::plan::{COUNTER, address, page_at};
use crate::explore::world::{World, map};

const DONTNEED: i32 = 4;
const FREE: i32 = 8;
const HUGEPAGE: i32 = 14;
const COLLAPSE: i32 = 25;
const HWPOISON: i32 = 100;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
/// What a child stores. No version of any word looks like it.
const MARK: u64 = u64::MAX;
/// Owner of exclusive pages who is no device.
const NOBODY: Owner = Owner(0);
/// Steps for which a page is pinned.
const PINNED_STEPS: u32 = 30;
/// Steps for which a child does nothing, so that its parent has done something when it looks.
const CHILD_RESTS: u32 = 30;
/// Longest timeslice, in virtual nanoseconds.
const TIMESLICE: u32 = 200;

/// Actor `n` does its operations.
pub(super) fn run(world: &World, n: usize) {
    for _ in 0..world.plan.ops {
        let which = ModelEnv.choose(u32::try_from(world.plan.does.len()).unwrap_or(1));
        let op = world.plan.does[which as usize];
        let page = ModelEnv.choose(world.plan.pages);
        ModelEnv.emit(op.name(), [page.into(), 0]);
        world.between.chaos.starve(&world.kernel);
        let ends = world.between.watch.begin(Doing::Cpu(op), page_at(page));
        operate(world, n, op, page);
        drop(ends);
        ModelEnv.point(Kind::Other);
    }
    world.done();
}

/// Reads every word that was stored to.
pub(super) fn sweep(world: &World) {
    for (page, slot) in world.used() {
        load(world, page, slot);
    }
    for page in world.counting() {
        if let Ok(found) = world.space.load(address(page, COUNTER)) {
            world.must(world.ledger(|ledger| ledger.counted(page, found)));
        } else {
            ModelEnv.fail(format!("a CPU was refused the counter of page {page}"));
        }
    }
}

fn operate(world: &World, n: usize, op: Op, page: u32) {
    match op {
        Op::Load => load(world, page, world.any_slot()),
        Op::Store => store(world, n, page),
        Op::Send => send(world, page),
        Op::Evict => evict(world),
        Op::SwapOut => {
            let _out = world.space.reclaim(address(page, 0));
        }
        Op::Discard => change(world, &some(world, page), Effect::Destroys, |at, len| {
            world.space.madvise(at, len, DONTNEED)
        }),
        Op::Unmap => unmap(world, &some(world, page)),
        Op::Move => relocate(world, &some(world, page)),
        Op::ProtectRead => protect_read(world, &some(world, page)),
        Op::Guard => change(world, &some(world, page), Effect::Destroys, |at, len| {
            world.space.madvise(at, len, GUARD_INSTALL)?;
            ModelEnv.point(Kind::Other);
            if world.space.load(at).is_ok() {
                ModelEnv.fail(format!("a guard at {at} lets a load through"));
            }
            world.space.madvise(at, len, GUARD_REMOVE)
        }),
        Op::Collapse => {
            let block = page / 4 * 4;
            let _advised = world.space.madvise(address(block, 0), 4 * PAGE, HUGEPAGE);
            let _collapsed = world.space.madvise(address(block, 0), 4 * PAGE, COLLAPSE);
        }
        Op::Fork => fork(world, page),
        Op::Pin => pin(world, page),
        Op::Exclusive => {
            let at = address(page, 0);
            let _made = world.space.make_exclusive(at, NOBODY, &mut |_bus| {});
        }
        Op::Poison => poison(world, page),
        Op::WriteProtect => write_protect(world, &some(world, page)),
        Op::FreeLazily => change(world, &some(world, page), Effect::GivesUp, |at, len| {
            world.space.madvise(at, len, FREE)
        }),
        Op::Add => add(world, page),
    }
}

/// Adds to the counter of a page.
fn add(world: &World, page: u32) {
    match world.space.atomic(address(page, COUNTER), AtomicOp::Add(1)) {
        Ok(_former) => world.ledger(|ledger| ledger.added(page)),
        Err(_signal) => ModelEnv.fail(format!("a CPU was refused the counter of page {page}")),
    }
}

/// Pages around one: a few.
fn some(world: &World, page: u32) -> Range<u32> {
    let end = page + 1 + ModelEnv.choose(4);
    page..end.min(world.plan.pages)
}

fn load(world: &World, page: u32, slot: usize) {
    let look = world.ledger(|ledger| ledger.begin(page, slot));
    let rule = match world.space.load(address(page, slot)) {
        Ok(value) => world.ledger(|ledger| ledger.loaded(&look, value)),
        Err(_signal) => world.ledger(|ledger| ledger.refused(&look, "a CPU")),
    };
    world.must(rule);
}

fn store(world: &World, n: usize, page: u32) {
    let look = world.ledger(|ledger| ledger.begin(page, n));
    let value = world.ledger(|ledger| ledger.announce(&look));
    match world.space.store(address(page, n), value) {
        Ok(()) => world.ledger(|ledger| ledger.stored(&look)),
        Err(_signal) => world.must(world.ledger(|ledger| ledger.refused(&look, "a CPU"))),
    }
}

/// Changes pages by `act`, which is told where they are. Not while others change some of them.
fn change(
    world: &World,
    pages: &Range<u32>,
    effect: Effect,
    act: impl FnOnce(HostVa, u64) -> Result<(), Errno>,
) {
    if !world.ledger(|ledger| ledger.change(pages, effect)) {
        return;
    }
    let len = u64::from(pages.end - pages.start) * PAGE;
    let ended = match act(address(pages.start, 0), len) {
        Ok(()) => Ended::Done,
        Err(_errno) => Ended::Refused,
    };
    world.ledger(|ledger| ledger.changed(pages, effect, ended));
}

fn unmap(world: &World, pages: &Range<u32>) {
    change(world, pages, Effect::Destroys, |at, len| {
        world.space.munmap(at, len)?;
        ModelEnv.point(Kind::Other);
        map(&world.space, pages.clone());
        Ok(())
    });
}

fn relocate(world: &World, pages: &Range<u32>) {
    change(world, pages, Effect::Keeps, |at, len| {
        let there = address(pages.start + world.plan.pages, 0);
        let remap = |from, to| {
            world.space.mremap(&Remap {
                at: from,
                old_len: len,
                new_len: len,
                target: Target::At(to),
            })
        };
        // Pieces with different histories do not move in one call.
        if remap(at, there).is_ok() {
            ModelEnv.point(Kind::Other);
            if let Err(errno) = remap(there, at) {
                ModelEnv.fail(format!("mremap back of pages {pages:?} answers {errno:?}"));
            }
        }
        Ok(())
    });
}

fn protect_read(world: &World, pages: &Range<u32>) {
    change(world, pages, Effect::Keeps, |at, len| {
        world.space.mprotect(at, len, Prot::READ)?;
        ModelEnv.point(Kind::Other);
        let back = Prot::READ.with(Prot::WRITE);
        world.space.mprotect(at, len, back)
    });
}

/// A copy on write may save the page at the last moment: then it has no error, and can be loaded.
fn poison(world: &World, page: u32) {
    change(world, &(page..page + 1), Effect::Destroys, |at, len| {
        world.space.madvise(at, len, HWPOISON)?;
        ModelEnv.point(Kind::Other);
        let mapped = world.space.entry(at).and_then(Entry::mapped_frame);
        let bad = |frame| world.kernel.look(|mm| mm.memory().frame(frame).poisoned);
        if mapped.is_some_and(bad) {
            ModelEnv.fail(format!("page {page} has an error, and is mapped"));
        }
        world.space.madvise(at, len, DONTNEED)
    });
}

/// Stores wait meanwhile, but those of devices to their own memory.
fn write_protect(world: &World, pages: &Range<u32>) {
    change(world, pages, Effect::Keeps, |at, len| {
        let span = HostSpan::at(at, len);
        world.space.serve_stores(span)?;
        let protected = world.space.write_protect(span, Stores::Wait);
        ModelEnv.point(Kind::Other);
        world.space.stop_serving(span)?;
        protected
    });
}

fn send(world: &World, page: u32) {
    let devices = u32::try_from(world.nodes.len()).unwrap_or(1);
    let node = &world.nodes[ModelEnv.choose(devices) as usize];
    let pages = match ModelEnv.choose(3) {
        0 => 0..world.plan.pages,
        _ => some(world, page),
    };
    let wish = ToDevice {
        span: HostSpan::new(address(pages.start, 0), address(pages.end, 0)),
        timeslice: Ns(ModelEnv.choose(TIMESLICE).into()),
    };
    // Refused where the pages are busy, or there is no room.
    let _moved = node.device.pagemap().to_device(wish);
}

fn evict(world: &World) {
    let devices = u32::try_from(world.nodes.len()).unwrap_or(1);
    let node = &world.nodes[ModelEnv.choose(devices) as usize];
    let _evicted = node.device.pagemap().vram().evict_all();
}

/// A child sees what its parent had, and nobody sees what it writes.
fn fork(world: &World, page: u32) {
    let pages = some(world, page);
    let mut looks: Vec<_> = pages
        .flat_map(|page| (0..world.plan.slots()).map(move |slot| (page, slot)))
        .map(|(page, slot)| world.ledger(|ledger| ledger.begin(page, slot)))
        .collect();
    // There is one child at a time.
    let Ok(child) = world.space.fork() else {
        return;
    };
    world.ledger(|ledger| looks.iter_mut().for_each(|look| ledger.seal(look)));
    (0..CHILD_RESTS).for_each(|_| ModelEnv.point(Kind::Other));
    for look in looks {
        let at = address(look.page, look.slot);
        if let Ok(value) = child.load(at) {
            world.must(world.ledger(|ledger| ledger.loaded(&look, value)));
        }
        let _stored = child.store(at, MARK);
    }
    child.exit();
}

/// A page that is pinned stays where it is.
fn pin(world: &World, page: u32) {
    let at = address(page, 0);
    let look = world.ledger(|ledger| ledger.begin(page, 0));
    let Ok(frame) = world.space.pin(at, Access::Write) else {
        return;
    };
    (0..PINNED_STEPS).for_each(|_| ModelEnv.point(Kind::Other));
    let stays = world.space.entry(at).and_then(Entry::mapped_frame) == Some(frame);
    if !stays && world.ledger(|ledger| ledger.is_strict(&look)) {
        ModelEnv.fail(format!("page {page} is pinned, and has moved"));
    }
    world.space.unpin(frame);
}
