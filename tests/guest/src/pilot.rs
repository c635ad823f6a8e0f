//! The pilot: sends the program's memory to the device, wherever it is.

use std::fs::{self, File};
use std::ops::Range;

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M, PAGE_64K};
use gpusvm::seam::env::Environment;
use gpusvm::seam::mm::{AddressSpace, VmaKind};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_cli::machine::Machine;
use gpusvm_live::LiveEnv;
use gpusvm_softgpu::{Kernel, Stop, Tile};
use gpusvm_xe::stats::Counter;

use crate::write;

/// Addresses per launch.
const TOUCHES: usize = 32;
/// Launches between two times at which all device memory is emptied.
const ROUNDS: u64 = 50;

/// Flies until the process ends.
pub(crate) fn fly(machine: &Machine, stats: &File) {
    let random = LiveEnv::new(7);
    for round in 0_u64.. {
        let places = draw(&mappings(machine), &random);
        match round % 3 {
            0 => places
                .iter()
                .for_each(|place| send(machine, *place, &random)),
            way => {
                let writes = way == 1;
                // Cannot end before its time: accesses that are refused do not stop it.
                let _ended = machine.launch_on(0, &Touch { places, writes });
            }
        }
        if round % ROUNDS == ROUNDS - 1 {
            machine.evict_all();
        }
        write(stats, &line(machine, round));
    }
}

fn line(machine: &Machine, round: u64) -> String {
    let counters = [
        Counter::CpuFaultCount,
        Counter::EvictCount,
        Counter::LateInvalidationCount,
        Counter::HostConflictCount,
        Counter::HostGoneCount,
        Counter::RefusedPagefaultCount,
    ];
    let stats = machine.stats();
    let level = machine.space().level();
    let mut line = format!(
        "level={} brackets={} rounds={round} moves={}",
        level.faults.name(),
        level.bracket.name(),
        stats.migrations_to_device(),
    );
    for counter in counters {
        line += &format!(" {}={}", counter.name(), stats.total(counter));
    }
    line
}

/// The process's mappings in which memory may migrate.
fn mappings(machine: &Machine) -> Vec<Range<u64>> {
    let text = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let migrates = |mapping: &Range<u64>| {
        let vma = machine.space().find_vma(HostVa::new(mapping.start));
        vma.is_some_and(|vma| vma.kind == VmaKind::Anonymous)
    };
    text.lines().filter_map(span).filter(migrates).collect()
}

fn span(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

/// Sends the block around `place`, also where a device may use it in its place. That is refused where
/// it does not lie in one mapping, or the program is changing it.
fn send(machine: &Machine, place: u64, random: &LiveEnv) {
    let sizes = [PAGE, PAGE_64K, PAGE_64K, PAGE_2M];
    let index = usize::try_from(random.random() % 4).unwrap_or(0);
    let block = HostSpan::aligned_around(HostVa::new(place), sizes[index]);
    let _refused = block.map(|block| machine.send(block));
}

/// Draws mappings, and addresses in them.
fn draw(mappings: &[Range<u64>], random: &LiveEnv) -> Vec<u64> {
    let below = |n: u64| random.random() % n.max(1);
    let one = |_| {
        let index = usize::try_from(below(u64::try_from(mappings.len()).ok()?)).ok()?;
        let mapping = mappings.get(index)?;
        let at = mapping.start + below(mapping.end - mapping.start);
        Some(at & !7)
    };
    (0..TOUCHES).filter_map(one).collect()
}

/// Touches words, without changing them.
struct Touch {
    places: Vec<u64>,
    writes: bool,
}

impl Kernel for Touch {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        for place in &self.places {
            let touched = if self.writes {
                tile.atomic(*place, AtomicOp::Add(0))
            } else {
                tile.load_one::<u64>(*place)
            };
            match touched {
                // Gone, or not the device's: the next one may be there.
                Ok(_) | Err(Stop::Fault(_)) => {}
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }
}
