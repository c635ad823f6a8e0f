//! What a program does besides: blocks of its allocator, threads and their stacks, all of it used by
//! the device as well.

use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::Tile;

use crate::torture::churn::{Churner, Span};
use crate::torture::op::Op;
use crate::torture::world::{Fault, Finding, Side, tick};
use crate::workload::{address_of_mut, count, index};

/// Words of a thread's own frame that the device uses.
const FRAME: usize = 8192;
/// Words between two that the device changes.
const STEP: usize = 512;

impl Churner<'_> {
    /// A block from the allocator: large ones are mappings of their own, small ones lie between
    /// everybody else's. Written by the CPU, changed by the device, read by the CPU.
    pub(super) fn heap(&mut self) {
        let words = if self.random.one_in(2) {
            self.random.between(64 << 10, 1 << 20)
        } else {
            self.random.between(64, 8 << 10)
        };
        let mark = self.random.next() | 1;
        let mut block = vec![mark; index(words.into())];
        self.share(&mut block, mark);
        drop(block);
        tick(&self.world.tally.ops[Op::Heap as usize][0]);
    }

    /// Lets the device change some words, and checks all of them.
    fn share(&self, block: &mut [u64], mark: u64) {
        let (at, words) = (address_of_mut(block), block.len());
        self.on_device(|tile: &mut Tile<'_>| {
            for n in (0..words).step_by(STEP) {
                let _mapped = tile.atomic(at + 8 * count(n), AtomicOp::Add(1));
            }
        });
        // The device has written behind the compiler's back.
        let block = core::hint::black_box(block);
        let expected = |n: usize| mark.wrapping_add(u64::from(n.is_multiple_of(STEP)));
        let mut wrong = block
            .iter()
            .enumerate()
            .filter(|(n, word)| **word != expected(*n));
        if let Some((n, word)) = wrong.next() {
            self.found_elsewhere(at + 8 * count(n), *word, expected(n));
        }
    }

    /// A word of the program itself is wrong.
    fn found_elsewhere(&self, address: u64, word: u64, expected: u64) {
        let span = Span {
            op: Op::Heap,
            area: &self.world.areas[0],
            pages: 0..1,
        };
        let finding = self.finding(&span, Fault::Lost, Side::Cpu, address);
        self.world.found(Finding {
            found: Some(word),
            again: Some(expected),
            ..finding
        });
    }

    /// A thread of the program: its stack comes, is used by the device while the thread runs on it,
    /// and goes.
    pub(super) fn thread(&mut self) {
        let mark = self.random.next() | 1;
        let this = &*self;
        let ended = std::thread::scope(|scope| {
            let work = scope.spawn(move || {
                let mut frame = [mark; FRAME];
                this.share(&mut frame, mark);
            });
            work.join()
        });
        let answer = usize::from(ended.is_err());
        tick(&self.world.tally.ops[Op::Thread as usize][answer]);
    }
}
