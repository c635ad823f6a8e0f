//! Large pages, and pages whose faults somebody else serves.

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_dmirror::uapi::{Command, FAIL_ALLOC};

use crate::conformance::hmm::Case;
use crate::conformance::hmm::bench::{
    Bench, Device, Effort, Trouble, addresses, failed, part, pattern, wrong,
};
use crate::conformance::hmm::host::{Advice, Leaves, Memory, Rights, Variant};

/// Pages of a large page.
const LARGE: u64 = 512;
/// Half of one, and where it begins.
const HALF: u64 = 256;
const STARTS: [u64; 3] = [0, 128, 256];
const BOTH: [Memory; 2] = [Memory::Large, Memory::Private];

pub(super) const CASES: [Case; 10] = [
    Case::new("migrate_anon_huge_empty", huge_empty),
    Case::new("migrate_anon_huge_zero", huge_zero),
    Case::new("migrate_anon_huge_free", huge_free),
    Case::new("migrate_anon_huge_fault", huge_fault).seeing_page_map(),
    Case::new("migrate_partial_unmap_fault", partial_unmap_fault),
    Case::new("migrate_remap_fault", remap_fault),
    Case::new("migrate_anon_huge_err", huge_err),
    Case::new("migrate_anon_huge_zero_err", huge_zero_err),
    Case::new("benchmark_thp_migration", benchmark),
    Case::new("userfaultfd_read", userfaultfd_read),
];

/// Nothing was ever there, and it may only be read.
fn huge_empty(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench
        .process
        .map(Memory::Large, LARGE * 4096, Rights::Read)?;
    bench.expect_zeros(&device, Command::MigrateToDevice, span)?;
    bench.check_zeros(span)
}

/// The large page of zeros is there.
fn huge_zero(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench
        .process
        .map(Memory::Large, LARGE * 4096, Rights::Read)?;
    bench.check_zeros(span)?;
    bench.expect_zeros(&device, Command::MigrateToDevice, span)?;
    bench.check_zeros(span)
}

/// Content that may be dropped is there, or zero.
fn huge_free(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::Large, LARGE, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.process.advise(span, Advice::Free)?;
    for (n, at) in addresses(span) {
        let found = bench.process.load(at)?;
        if found != 0 && found != pattern(1, n)[0] {
            return wrong(format!("the CPU finds {found:x} at {at}"));
        }
    }
    Ok(())
}

fn huge_fault(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::Large, LARGE, 1)?;
    bench.process.advise(span, Advice::Collapse)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    if bench.variant == Variant::Private {
        bench.snapshot(&device, span)?;
        check_pagemap(bench, span)?;
    }
    bench.check(span, 1)
}

/// `/proc/self/pagemap` shows pages of private device memory as not present, and not empty.
fn check_pagemap(bench: &Bench<'_>, span: HostSpan) -> Result<(), Trouble> {
    const PRESENT: u64 = 1 << 63;
    const SWAP: u64 = 1 << 62;
    for (_, at) in addresses(span) {
        let word = bench.process.pagemap(at)?;
        if word & (PRESENT | SWAP) != SWAP {
            return wrong(format!("the page map says {word:x} at {at}"));
        }
    }
    Ok(())
}

/// Half of what is on the device is unmapped.
fn partial_unmap_fault(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for what in BOTH {
        for start in STARTS {
            let span = bench.filled_as(what, LARGE, 1)?;
            bench.expect(&device, Command::MigrateToDevice, span, 1)?;
            bench.process.unmap(part(span, start, HALF))?;
            let end = start + HALF;
            bench.check(part(span, 0, start), 1)?;
            bench.check_from(part(span, end, LARGE - end), 1, end)?;
            for left in [part(span, 0, start), part(span, end, LARGE - end)] {
                if !left.is_empty() {
                    bench.process.unmap(left)?;
                }
            }
        }
    }
    Ok(())
}

/// Half of what is on the device moves: to a place like its own, or to another one.
fn remap_fault(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for what in BOTH {
        for leaves in [Leaves::Hole, Leaves::Mapping] {
            for start in STARTS {
                for shift in [0, 1] {
                    remap_half(bench, &device, (what, leaves), (start, shift))?;
                }
            }
        }
    }
    Ok(())
}

fn remap_half(
    bench: &Bench<'_>,
    device: &Device,
    (what, leaves): (Memory, Leaves),
    (start, shift): (u64, u64),
) -> Result<(), Trouble> {
    let span = bench.filled_as(what, LARGE, 1)?;
    bench.expect(device, Command::MigrateToDevice, span, 1)?;
    let room = bench.process.room(2 * LARGE * 4096)?;
    let half = part(span, start, HALF);
    let there = part(HostSpan::at(room, 2 * LARGE * 4096), start + shift, HALF);
    bench.process.relocate(half, there.start(), leaves)?;
    bench.check_from(there, 1, start)?;
    let end = start + HALF;
    bench.check(part(span, 0, start), 1)?;
    bench.check_from(part(span, end, LARGE - end), 1, end)?;
    if leaves == Leaves::Mapping {
        bench.check_zeros(half)?;
        bench.process.unmap(half)?;
    }
    for left in [there, part(span, 0, start), part(span, end, LARGE - end)] {
        if !left.is_empty() {
            bench.process.unmap(left)?;
        }
    }
    Ok(())
}

/// A large page gets small ones where there is no large one, on both sides.
fn huge_err(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::Large, LARGE, 1)?;
    fail_next(bench, &device)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(span, 1)?;
    bench.process.unmap(span)?;
    let span = bench.filled_as(Memory::Large, LARGE, 2)?;
    bench.expect(&device, Command::MigrateToDevice, span, 2)?;
    fail_next(bench, &device)?;
    let came = bench.ask(&device, Command::MigrateToSystem, span);
    // Pages of coherent memory are small: there is nothing smaller to fall back to.
    if bench.variant == Variant::Private {
        came.map_err(|errno| failed(Command::MigrateToSystem, errno))?;
    }
    bench.check(span, 2)
}

fn huge_zero_err(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for _time in 0..2 {
        let span = bench.map(Memory::Large, LARGE)?;
        bench.check_zeros(part(span, 0, 1))?;
        fail_next(bench, &device)?;
        bench.expect_zeros(&device, Command::MigrateToDevice, span)?;
        bench.fill(span, 3)?;
        bench.check(span, 3)?;
        bench.process.unmap(span)?;
    }
    Ok(())
}

fn fail_next(bench: &Bench<'_>, device: &Device) -> Result<(), Trouble> {
    let set = bench.set_flags(device, FAIL_ALLOC);
    set.map_err(|errno| failed(Command::Flags, errno))
}

/// There and back, in sizes around those of large pages, with them and without.
fn benchmark(bench: &Bench<'_>) -> Result<(), Trouble> {
    const SIZES: [u64; 7] = [128, 256, 512, 1024, 2048, 4096, 65536];
    const TIMES: usize = 6;
    let device = bench.open()?;
    for pages in SIZES {
        if bench.effort == Effort::Short && pages > 4096 {
            break;
        }
        for what in BOTH {
            let span = bench.filled_as(what, pages, 1)?;
            for _time in 0..TIMES {
                bench.expect(&device, Command::MigrateToDevice, span, 1)?;
                let came = bench.ask(&device, Command::MigrateToSystem, span);
                came.map_err(|errno| failed(Command::MigrateToSystem, errno))?;
            }
            bench.check(span, 1)?;
            bench.process.unmap(span)?;
        }
    }
    Ok(())
}

/// The program serves the faults of pages that the device reads.
fn userfaultfd_read(bench: &Bench<'_>) -> Result<(), Trouble> {
    const WORD: u64 = 0x5EED;
    let device = bench.open()?;
    let span = bench.map(Memory::Private, 4)?;
    let serving = bench.process.serve_missing(span, WORD)?;
    let found = bench.fetch(&device, Command::ReadUnlocked, span);
    let found = found.map_err(|errno| failed(Command::ReadUnlocked, errno))?;
    if found.iter().any(|words| words[0] != WORD) {
        return wrong(format!("the device reads {found:x?}"));
    }
    let first: HostVa = span.start();
    if bench.process.load(first)? != WORD {
        return wrong("the CPU reads something else than the device");
    }
    drop(serving);
    Ok(())
}
