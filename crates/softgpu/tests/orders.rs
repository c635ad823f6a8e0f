//! TLB invalidation under a scheduler: the very source of `shootdown`, on atomics at each of which
//! another thread may go on.
//!
//! What is tried are orders of whole operations, as of sequentially consistent ones; those of
//! `shootdown` that matter are.

extern crate alloc;

mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
}

/// A TLB with one entry.
mod tlb {
    #[derive(Debug, Default)]
    pub(crate) struct Tlb {
        pub(crate) cached: Option<u64>,
    }

    impl Tlb {
        pub(crate) fn clear(&mut self) {
            self.cached = None;
        }

        pub(crate) fn invalidate(&mut self, asid: u32, start: u64, end: u64) {
            if asid == super::ASID && (start..end).contains(&super::PAGE) {
                self.cached = None;
            }
        }
    }
}

#[path = "../src/shootdown.rs"]
#[expect(dead_code, reason = "the device uses more of it")]
mod shootdown;

use std::sync::Arc;

use shootdown::{Gate, Shootdown};
use shuttle::thread;
use sync::{AtomicBool, AtomicU64, Ordering};
use tlb::Tlb;

const ASID: u32 = 1;
const PAGE: u64 = 0x1000;
const RUNS: usize = 20_000;

/// A page-table entry, what it leads to, and who invalidates it.
struct World {
    shootdown: Shootdown,
    gates: [Gate; 2],
    /// Where the page is: the number of a frame.
    entry: AtomicU64,
    /// Frames that were given back.
    freed: [AtomicBool; 4],
}

impl World {
    fn new() -> Self {
        Self {
            shootdown: Shootdown::new(),
            gates: [Gate::default(), Gate::default()],
            entry: AtomicU64::new(0),
            freed: [const { AtomicBool::new(false) }; 4],
        }
    }

    /// Accesses, as a unit makes them.
    fn access(&self, unit: usize, times: usize) {
        let mut tlb = Tlb::default();
        for _access in 0..times {
            let gate = &self.gates[unit];
            gate.enter(&self.shootdown, &mut tlb);
            let walk = || self.entry.load(Ordering::Acquire);
            let frame = *tlb.cached.get_or_insert_with(walk);
            let freed = &self.freed[usize::try_from(frame).expect("few frames")];
            assert!(
                !freed.load(Ordering::SeqCst),
                "unit {unit} uses frame {frame}"
            );
            gate.leave();
        }
    }

    /// Moves the page from frame to frame, as a driver does: the old one is free once nobody can use it.
    fn move_page(&self) {
        for (frame, freed) in self.freed.iter().enumerate().take(self.freed.len() - 1) {
            let next = u64::try_from(frame + 1).expect("few frames");
            self.entry.store(next, Ordering::Release);
            let n = self.shootdown.publish(ASID, PAGE, 2 * PAGE);
            for gate in &self.gates {
                while !gate.has_acknowledged(n) {
                    thread::yield_now();
                }
            }
            freed.store(true, Ordering::SeqCst);
        }
    }
}

fn units_beside_moves() {
    let world = Arc::new(World::new());
    let units: Vec<_> = (0..2)
        .map(|unit| {
            let world = Arc::clone(&world);
            thread::spawn(move || world.access(unit, 3))
        })
        .collect();
    world.move_page();
    units
        .into_iter()
        .for_each(|unit| unit.join().expect("it ends"));
}

#[test]
fn nobody_uses_what_was_given_back_after_all_acknowledged() {
    shuttle::check_random(units_beside_moves, RUNS);
    shuttle::check_pct(units_beside_moves, RUNS, 3);
}
