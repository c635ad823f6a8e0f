//! `gups`: random exclusive-or updates of a table, by device atomics.
//!
//! The number of updates is bounded: with a table larger than device memory nearly every update
//! faults.

use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, below, count, elements, groups, mix, part,
};

/// Updates: at most this many, at most a quarter of the words.
const UPDATES_MAX: usize = 1 << 16;
const GROUP: usize = 512;

struct Gups {
    table: Array<u64>,
    updates: usize,
    seed: u64,
}

/// One table of words that hold their index.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 8, 4)?;
    let updates = (n / 4).min(UPDATES_MAX);
    Ok(Box::new(Gups {
        table: order.memory.array(n, count),
        updates,
        seed: order.seed,
    }))
}

/// Word and value of the `k`th update.
fn update(seed: u64, k: usize, n: usize) -> (usize, u64) {
    let random = mix(seed.wrapping_add(count(k) * 2));
    (below(random, n), mix(random))
}

#[derive(Clone)]
struct Update {
    table: u64,
    n: usize,
    updates: usize,
    seed: u64,
}

impl Kernel for Update {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        for k in part(group, GROUP, self.updates) {
            let (word, value) = update(self.seed, k, self.n);
            tile.atomic(self.table + count(word) * 8, AtomicOp::Xor(value))?;
        }
        Ok(())
    }
}

impl Prepared for Gups {
    fn bytes(&self) -> u64 {
        count(self.table.len()) * 8
    }

    fn traffic(&self) -> u64 {
        count(self.updates) * 16
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let n = self.table.len();
        let kernel = Update {
            table: self.table.address_mut(),
            n,
            updates: self.updates,
            seed: self.seed,
        };
        job.launch("updates", &kernel, groups(self.updates, GROUP))
    }

    fn verify(&self) -> bool {
        let mut words: Vec<(usize, u64)> = (0..self.updates)
            .map(|k| update(self.seed, k, self.table.len()))
            .collect();
        words.sort_unstable();
        let mut pending = words.into_iter().peekable();
        let table = self.table.view();
        table.iter().enumerate().all(|(at, word)| {
            let mut want = count(at);
            while let Some((_, value)) = pending.next_if(|(word, _)| *word == at) {
                want ^= value;
            }
            *word == want
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_done_twice_or_missed_are_noticed() {
        let mut gups = Gups {
            table: (0..1000).collect::<Vec<_>>().into(),
            updates: 200,
            seed: 3,
        };
        for k in 0..200 {
            let (word, value) = update(3, k, 1000);
            gups.table.change(|table| table[word] ^= value);
        }
        assert!(gups.verify());
        let (word, value) = update(3, 17, 1000);
        gups.table.change(|table| table[word] ^= value);
        assert!(!gups.verify());
    }
}
