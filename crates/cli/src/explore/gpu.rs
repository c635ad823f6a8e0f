//! What a device does in a world: loads and stores of one unit, and the service of its faults.

use core::sync::atomic::Ordering;

use gpusvm_abi::bus::{AtomicOp, DevicePort, FaultHandler};
use gpusvm_model::sched::{Kind, ModelEnv};
use gpusvm_softgpu::{Dispatch, Stop, Tile};
use gpusvm_xe::vm::Rights;

use crate::atomics::Atomics;
use crate::explore::doing::Doing;
use crate::explore::plan::{COUNTER, Closes, PAGES_MAX, address, page_at};
use crate::explore::world::World;
use crate::on_tile::OnTile;

/// A page behind the process's window.
const NOWHERE: u32 = 2 * PAGES_MAX;

/// The unit of device `n` does its operations.
pub(super) fn run(world: &World, n: usize) {
    launch(world, n, |tile| {
        for _ in 0..world.plan.ops {
            operate(world, n, tile);
        }
    });
    if world.plan.closes == Closes::Early {
        world.nodes[n].vm.close();
    }
    world.done();
}

/// The unit of device `n` reads every word that was stored to.
pub(super) fn sweep(world: &World, n: usize) {
    launch(world, n, |tile| {
        for (page, slot) in world.used() {
            load(world, tile, page, slot);
        }
        for page in world.counting() {
            count(world, tile, page);
        }
    });
}

fn launch(world: &World, n: usize, act: impl Fn(&mut Tile<'_>) + Sync) {
    let node = &world.nodes[n];
    let kernel = OnTile(act);
    let dispatch = Dispatch::new(&kernel, 1, node.vm.asid());
    if let Err(stop) = node.gpu.run(&dispatch, 0) {
        ModelEnv.fail(format!("the unit of device {n} stops: {stop:?}"));
    }
}

fn operate(world: &World, n: usize, tile: &mut Tile<'_>) {
    let page = ModelEnv.choose(world.plan.pages);
    match ModelEnv.choose(8) {
        7 => load_nothing(tile),
        5 | 6 if world.plan.adds() => {
            let _refused = add(world, tile, page);
        }
        0 | 1 => load(world, tile, page, world.any_slot()),
        _ if world.plan.rights == Rights::ReadOnly => store_refused(tile, page),
        2..=4 => store(world, n, tile, page),
        _ => exchange(world, n, tile, page),
    }
    ModelEnv.point(Kind::Access);
}

/// Where nothing is ever mapped, a device is refused.
fn load_nothing(tile: &mut Tile<'_>) {
    let nowhere = address(NOWHERE, 0).get();
    if tile.load_one::<u64>(nowhere).is_ok() {
        ModelEnv.fail("a device loads where nothing is mapped");
    }
}

/// Where a device may only read, it is refused a store.
fn store_refused(tile: &mut Tile<'_>, page: u32) {
    ModelEnv.emit("gpu store", [page.into(), 0]);
    if tile.store_one(address(page, 0).get(), 0_u64).is_ok() {
        ModelEnv.fail(format!(
            "a device stores to page {page}, which it may only read"
        ));
    }
}

/// The slot that the unit of device `n` owns.
fn own(world: &World, n: usize) -> usize {
    usize::from(world.plan.cpus) + n
}

fn load(world: &World, tile: &mut Tile<'_>, page: u32, slot: usize) {
    let _ends = world.between.watch.begin(Doing::GpuLoad, page_at(page));
    let look = world.ledger(|ledger| ledger.begin(page, slot));
    ModelEnv.emit("gpu load", [page.into(), slot as u64]);
    let rule = match tile.load_one(address(page, slot).get()) {
        Ok(value) => world.ledger(|ledger| ledger.loaded(&look, value)),
        Err(_stop) => world.ledger(|ledger| ledger.refused(&look, "a device")),
    };
    world.must(rule);
}

fn store(world: &World, n: usize, tile: &mut Tile<'_>, page: u32) {
    let _ends = world.between.watch.begin(Doing::GpuStore, page_at(page));
    let slot = own(world, n);
    let look = world.ledger(|ledger| ledger.begin(page, slot));
    let value = world.ledger(|ledger| ledger.announce(&look));
    ModelEnv.emit("gpu store", [page.into(), value]);
    match tile.store_one(address(page, slot).get(), value) {
        Ok(()) => world.ledger(|ledger| ledger.stored(&look)),
        Err(_stop) => world.must(world.ledger(|ledger| ledger.refused(&look, "a device"))),
    }
}

/// Replaces what is there by the next version, if nobody changes it meanwhile.
fn exchange(world: &World, n: usize, tile: &mut Tile<'_>, page: u32) {
    let _ends = world.between.watch.begin(Doing::GpuExchange, page_at(page));
    let slot = own(world, n);
    let at = address(page, slot).get();
    let look = world.ledger(|ledger| ledger.begin(page, slot));
    let Ok(expected) = tile.load_one(at) else {
        return world.must(world.ledger(|ledger| ledger.refused(&look, "a device")));
    };
    world.must(world.ledger(|ledger| ledger.loaded(&look, expected)));
    let new = world.ledger(|ledger| ledger.announce(&look));
    ModelEnv.emit("gpu exchange", [page.into(), new]);
    ModelEnv.point(Kind::Access);
    match tile.atomic(at, AtomicOp::CompareExchange { expected, new }) {
        Ok(found) if found == expected => world.ledger(|ledger| ledger.stored(&look)),
        // Destroyed in between.
        Ok(found) => world.must(world.ledger(|ledger| ledger.loaded(&look, found))),
        // Where pages have to move first, they may be busy for too long.
        Err(_stop) if world.plan.atomics != Atomics::System => {}
        Err(_stop) => world.must(world.ledger(|ledger| ledger.refused(&look, "a device"))),
    }
}

/// Adds to the counter of a page.
fn add(world: &World, tile: &mut Tile<'_>, page: u32) -> Result<u64, Stop> {
    let _ends = world.between.watch.begin(Doing::GpuExchange, page_at(page));
    ModelEnv.emit("gpu add", [page.into(), 0]);
    let former = tile.atomic(address(page, COUNTER).get(), AtomicOp::Add(1))?;
    world.ledger(|ledger| ledger.added(page));
    Ok(former)
}

/// When nobody adds any more, a device finds every addition, and can add.
fn count(world: &World, tile: &mut Tile<'_>, page: u32) {
    match add(world, tile, page) {
        Ok(former) => world.must(world.ledger(|ledger| ledger.counted(page, former + 1))),
        Err(stop) => ModelEnv.fail(format!(
            "a device was refused the counter of page {page}, which nobody uses: {stop:?}"
        )),
    }
}

/// Serves the faults of device `n` out of its ring.
pub(super) fn serve(world: &World, n: usize) {
    let node = &world.nodes[n];
    while !world.closed.load(Ordering::Acquire) {
        node.gpu.wait_fault();
        while let Some(record) = node.gpu.pop_fault() {
            let answer = world.handlers[n].handle(&record);
            node.gpu.ack_fault(&record, answer);
        }
    }
}
