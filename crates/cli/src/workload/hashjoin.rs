//! `hashjoin`: build a hash table from one relation by device compare-and-swap, probe it with
//! another, count the matches.

use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, below, count, elements, groups, index,
    mix, part,
};

/// Probes per build key. The table has two to four slots per build key: less than a sixth of the
/// data, so that device memory of a quarter holds it and the probes stream past.
const PROBES: usize = 24;
const GROUP: usize = 16 << 10;
const TILE: usize = 1024;
const EMPTY: u64 = 0;

struct HashJoin {
    build: Array<u64>,
    probe: Array<u64>,
    table: Array<u64>,
    /// Matches of each probe group.
    matches: Array<u64>,
    seed: u64,
}

/// Build key `i`: all different, never zero.
fn key(i: usize) -> u64 {
    mix(count(i)) | 1 << 63
}

/// The build key that probe `j` looks for; half of them are not in the table.
fn wanted(seed: u64, j: usize, builds: usize) -> usize {
    below(mix(seed.wrapping_add(count(j))), 2 * builds)
}

/// Two relations and an empty table.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    // Keys, probes, and a table of up to four slots per key.
    let builds = elements(order.size, 8 * (1 + count(PROBES) + 3), 4)?;
    let probes = builds * PROBES;
    let slots = (builds * 2).next_power_of_two();
    let memory = &order.memory;
    Ok(Box::new(HashJoin {
        build: memory.array(builds, key),
        probe: memory.array(probes, |j| key(wanted(order.seed, j, builds))),
        // Empty slots are zeros.
        table: memory.zeroed(slots),
        matches: memory.zeroed(index(u64::from(groups(probes, GROUP)))),
        seed: order.seed,
    }))
}

/// First slot of a key.
fn slot_of(key: u64, slots: usize) -> usize {
    below(mix(key), slots)
}

#[derive(Clone)]
struct Build {
    build: u64,
    n: usize,
    table: u64,
    slots: usize,
}

impl Kernel for Build {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let rows = part(group, GROUP, self.n);
        let mut keys = vec![0_u64; rows.len()];
        tile.load(self.build + count(rows.start) * 8, &mut keys[..])?;
        for key in keys {
            let mut slot = slot_of(key, self.slots);
            loop {
                let at = self.table + count(slot) * 8;
                let swap = AtomicOp::CompareExchange {
                    expected: EMPTY,
                    new: key,
                };
                if tile.atomic(at, swap)? == EMPTY {
                    break;
                }
                slot = (slot + 1) % self.slots;
            }
        }
        Ok(())
    }
}

#[derive(Clone)]
struct Probe {
    probe: u64,
    n: usize,
    table: u64,
    slots: usize,
    matches: u64,
}

impl Probe {
    /// Whether `key` is in the table; `first` is what its first slot holds.
    fn find(&self, key: u64, first: u64, tile: &mut Tile<'_>) -> Result<bool, Stop> {
        let mut slot = slot_of(key, self.slots);
        let mut found = first;
        while found != EMPTY && found != key {
            slot = (slot + 1) % self.slots;
            found = tile.load_one(self.table + count(slot) * 8)?;
        }
        Ok(found == key)
    }
}

impl Kernel for Probe {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let (mut keys, mut first) = (vec![0_u64; TILE], vec![0_u64; TILE]);
        let rows = part(group, GROUP, self.n);
        let mut matches = 0_u64;
        for start in rows.clone().step_by(TILE) {
            let n = TILE.min(rows.end - start);
            tile.load(self.probe + count(start) * 8, &mut keys[..n])?;
            let at = |key: &u64| self.table + count(slot_of(*key, self.slots)) * 8;
            let slots: Vec<u64> = keys[..n].iter().map(at).collect();
            tile.gather(&slots, &mut first[..n])?;
            for (key, first) in keys[..n].iter().zip(&first) {
                matches += u64::from(self.find(*key, *first, tile)?);
            }
        }
        tile.store_one(self.matches + u64::from(group) * 8, matches)
    }
}

impl Prepared for HashJoin {
    fn bytes(&self) -> u64 {
        count(self.build.len() + self.probe.len() + self.table.len()) * 8
    }

    fn traffic(&self) -> u64 {
        count(self.build.len() * 3 + self.probe.len() * 2) * 8
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let (n, slots) = (self.build.len(), self.table.len());
        let table = self.table.address_mut();
        let build = Build {
            build: self.build.address(),
            n,
            table,
            slots,
        };
        job.launch("build", &build, groups(n, GROUP))?;
        let n = self.probe.len();
        let probe = Probe {
            probe: self.probe.address(),
            n,
            table,
            slots,
            matches: self.matches.address_mut(),
        };
        job.launch("probe", &probe, groups(n, GROUP))
    }

    fn verify(&self) -> bool {
        let builds = self.build.len();
        let expected = self
            .matches
            .view()
            .iter()
            .enumerate()
            .all(|(group, matches)| {
                let rows = part(
                    u32::try_from(group).unwrap_or(u32::MAX),
                    GROUP,
                    self.probe.len(),
                );
                let hits = rows
                    .filter(|j| wanted(self.seed, *j, builds) < builds)
                    .count();
                *matches == count(hits)
            });
        expected
            && self
                .table
                .view()
                .iter()
                .filter(|slot| **slot != EMPTY)
                .count()
                == builds
    }
}
