//! `sort`: merge sort of 64-bit keys. Tiles are sorted locally; passes merge runs between two
//! buffers, each group writing one stretch of output whose inputs it finds by binary search.

use core::cmp::Ordering;

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, count, elements, groups, mix, part,
};

/// Keys that one group sorts, or merges.
const GROUP: usize = 64 << 10;
/// Keys that a merge reads at a time.
const TILE: usize = 2048;

struct Sort {
    keys: Array<u64>,
    spare: Array<u64>,
    seed: u64,
}

/// Random keys, and as much spare memory.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 16, 1)?;
    let memory = &order.memory;
    Ok(Box::new(Sort {
        keys: memory.array(n, |i| mix(order.seed.wrapping_add(count(i)))),
        spare: memory.zeroed(n),
        seed: order.seed,
    }))
}

#[derive(Clone)]
struct SortTiles {
    keys: u64,
    n: usize,
}

impl Kernel for SortTiles {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let range = part(group, GROUP, self.n);
        let mut keys = vec![0_u64; range.len()];
        let at = self.keys + count(range.start) * 8;
        tile.load(at, &mut keys[..])?;
        keys.sort_unstable();
        tile.store(at, &keys[..])
    }
}

/// Merges pairs of runs of `run` keys.
#[derive(Clone)]
struct Merge {
    from: u64,
    to: u64,
    n: usize,
    run: usize,
}

/// A run being read, some keys at a time.
struct Run {
    at: u64,
    left: usize,
    buffer: Vec<u64>,
    next: usize,
}

impl Run {
    const fn new(at: u64, left: usize) -> Self {
        Self {
            at,
            left,
            buffer: Vec::new(),
            next: 0,
        }
    }

    /// The first key, loading more where none is at hand.
    fn peek(&mut self, tile: &mut Tile<'_>) -> Result<Option<u64>, Stop> {
        if self.next == self.buffer.len() {
            let n = self.left.min(TILE);
            self.buffer.resize(n, 0);
            tile.load(self.at, &mut self.buffer[..])?;
            self.at += count(n) * 8;
            self.left -= n;
            self.next = 0;
        }
        Ok(self.buffer.get(self.next).copied())
    }
}

impl Kernel for Merge {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let out = part(group, GROUP, self.n);
        let pair = out.start / (2 * self.run) * (2 * self.run);
        let middle = (pair + self.run).min(self.n);
        let end = (pair + 2 * self.run).min(self.n);
        let first = out.start - pair;
        let taken = self.split(tile, pair, middle, end, first)?;
        let mut left = Run::new(self.address(pair + taken), middle - pair - taken);
        let mut right = Run::new(
            self.address(middle + first - taken),
            end - middle - (first - taken),
        );
        let mut merged = Vec::with_capacity(out.len());
        while merged.len() < out.len() {
            let run = match (left.peek(tile)?, right.peek(tile)?) {
                (Some(l), Some(r)) if l <= r => &mut left,
                (_, Some(_)) => &mut right,
                (_, None) => &mut left,
            };
            merged.push(run.buffer[run.next]);
            run.next += 1;
        }
        tile.store(self.to + count(out.start) * 8, &merged[..])
    }
}

impl Merge {
    fn address(&self, key: usize) -> u64 {
        self.from + count(key) * 8
    }

    /// How many of the first `first` merged keys come from the left run `[pair, middle)`.
    fn split(
        &self,
        tile: &mut Tile<'_>,
        pair: usize,
        middle: usize,
        end: usize,
        first: usize,
    ) -> Result<usize, Stop> {
        let mut low = first.saturating_sub(end - middle);
        let mut high = first.min(middle - pair);
        while low < high {
            let taken = usize::midpoint(low, high);
            let left: u64 = tile.load_one(self.address(pair + taken))?;
            let right: u64 = tile.load_one(self.address(middle + first - taken - 1))?;
            // The left key belongs to the output where it is not above the last right one taken.
            match left.cmp(&right) {
                Ordering::Less | Ordering::Equal => low = taken + 1,
                Ordering::Greater => high = taken,
            }
        }
        Ok(low)
    }
}

impl Sort {
    fn passes(&self) -> u32 {
        self.keys.len().div_ceil(GROUP).next_power_of_two().ilog2()
    }
}

impl Prepared for Sort {
    fn bytes(&self) -> u64 {
        count(self.keys.len()) * 16
    }

    fn traffic(&self) -> u64 {
        self.bytes() * u64::from(1 + self.passes())
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let n = self.keys.len();
        let tiles = SortTiles {
            keys: self.keys.address_mut(),
            n,
        };
        job.launch("tiles", &tiles, groups(n, GROUP))?;
        let mut run = GROUP;
        while run < n {
            let (from, to) = (self.keys.address(), self.spare.address_mut());
            job.launch("merge", &Merge { from, to, n, run }, groups(n, GROUP))?;
            core::mem::swap(&mut self.keys, &mut self.spare);
            run *= 2;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let digest = |keys: &mut dyn Iterator<Item = u64>| {
            keys.fold((0_u64, 0_u64), |(sum, x), key| {
                (sum.wrapping_add(mix(key)), x ^ key)
            })
        };
        let n = count(self.keys.len());
        let given = digest(&mut (0..n).map(|i| mix(self.seed.wrapping_add(i))));
        let keys = self.keys.view();
        keys.is_sorted() && digest(&mut keys.iter().copied()) == given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disorder_and_foreign_keys_are_noticed() {
        let mut keys: Vec<u64> = (0..100).map(|i| mix(5 + i)).collect();
        keys.sort_unstable();
        let mut sort = Sort {
            keys: keys.into(),
            spare: Vec::new().into(),
            seed: 5,
        };
        assert!(sort.verify());
        sort.keys.change(|keys| keys.swap(3, 4));
        assert!(!sort.verify());
        sort.keys.change(|keys| keys.swap(3, 4));
        sort.keys.change(|keys| keys[50] = keys[49]);
        assert!(!sort.verify());
    }
}
