//! The migrator: sends random pages to the device and, now and then, everything home.

use gpusvm::addr::HostSpan;
use gpusvm_live::thread;

use crate::machine::Machine;
use crate::torture::random::Stream;
use crate::torture::world::{Doing, World};

/// Works until everybody stops.
pub(super) fn work(world: &World, machine: &Machine, me: usize, seed: u64) {
    let mut random = Stream::named(seed, "migrator", 0);
    while !world.stopped() {
        world.jam(me);
        let (area, page) = world.pick(&mut random);
        world.actors[me].does(Doing::MIGRATE, area.id, page);
        world.actors[me].stepped();
        if random.one_in(8) {
            let _took = thread::run(|| machine.evict_all());
            continue;
        }
        let pages = match random.between(0, 3) {
            0 => page..page + random.between(1, 40),
            1 => page / 16 * 16..page / 16 * 16 + 16,
            _ => page / 512 * 512..page / 512 * 512 + 512,
        };
        let pages = pages.start..pages.end.min(area.plan.pages);
        let span: HostSpan = area.part(&pages);
        // Busy, changing or unmapped pages refuse.
        let _sent = thread::run(|| machine.send(span));
        let us = random.between(0, 300);
        world.sleep_us(us.into());
    }
}
