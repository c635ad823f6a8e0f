//! Reads, writes, small pages that migrate.

use gpusvm_dmirror::uapi::{Command, Errno};

use crate::conformance::hmm::Case;
use crate::conformance::hmm::bench::{Bench, Trouble, addresses, failed, part, pattern, wrong};
use crate::conformance::hmm::host::{Memory, Need, Rights, Variant};

/// Pages of most buffers.
const PAGES: u64 = 1024;
/// Rounds of the cases that repeat themselves.
const ROUNDS: u64 = 10;

pub(super) const CASES: [Case; 21] = [
    Case::new("open_close", open_close),
    Case::new("anon_read", anon_read),
    Case::new("anon_read_prot", anon_read_prot),
    Case::new("anon_write", anon_write),
    Case::new("anon_write_prot", anon_write_prot),
    Case::new("anon_write_child", anon_write_child),
    Case::new("anon_write_child_shared", anon_write_child_shared),
    Case::new("anon_write_huge", anon_write_huge),
    Case::new("anon_write_hugetlbfs", anon_write_hugetlbfs),
    Case::new("file_read", file_read),
    Case::new("file_write", file_write),
    Case::new("migrate", migrate),
    Case::new("migrate_file_private", migrate_file_private).needing(&[Need::PrivateFilePages]),
    Case::new("migrate_fault", migrate_fault),
    Case::new("migrate_release", migrate_release),
    Case::new("migrate_shared", migrate_shared),
    Case::new("migrate_multiple", migrate_multiple),
    Case::new("anon_read_multiple", anon_read_multiple),
    Case::new("anon_teardown", anon_teardown),
    Case::new("mixedmap", mixedmap),
    Case::new("compound", compound),
];

fn open_close(bench: &Bench<'_>) -> Result<(), Trouble> {
    drop(bench.open()?);
    Ok(())
}

/// Pages that are missing, zero or written, in a mapping that may only be read.
fn anon_read(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.map(Memory::Private, PAGES)?;
    bench.check_zeros(part(span, 1, 1))?;
    for (n, at) in addresses(part(span, 2, PAGES - 2)) {
        bench.process.store(at, n)?;
    }
    bench.process.protect(span, Rights::Read)?;
    let found = bench.fetch(&device, Command::Read, span);
    let found = found.map_err(|errno| failed(Command::Read, errno))?;
    let wanted = (0..PAGES).map(|n| [n.saturating_sub(2), 0]);
    if found.into_iter().eq(wanted) {
        Ok(())
    } else {
        wrong("the device reads other content than the CPU wrote")
    }
}

fn anon_read_prot(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.process.protect(span, Rights::None)?;
    if bench.fetch(&device, Command::Read, span).is_ok() {
        return wrong("the device reads what nobody may read");
    }
    bench.process.protect(span, Rights::Read)?;
    bench.check(span, 1)
}

fn anon_write(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.map(Memory::Private, PAGES)?;
    bench.write_and_check(&device, span, 1)
}

fn anon_write_prot(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let (bytes, rights) = (PAGES * 4096, Rights::Read);
    let span = bench.process.map(Memory::Private, bytes, rights)?;
    bench.expect_zeros(&device, Command::Read, part(span, 0, 1))?;
    if bench.write(&device, span, 1) != Err(Errno::Perm) {
        return wrong("the device writes what may only be read");
    }
    bench.check_zeros(span)?;
    bench.process.protect(span, Rights::ReadWrite)?;
    bench.write_and_check(&device, span, 1)
}

/// A device of the child writes to the child's copy, wherever the parent's pages were.
fn anon_write_child(bench: &Bench<'_>) -> Result<(), Trouble> {
    for on_device in [false, true] {
        for (what, pages) in [(Memory::Private, PAGES), (Memory::Large, 512)] {
            let device = bench.open()?;
            let span = bench.filled_as(what, pages, 1)?;
            if on_device {
                bench.expect(&device, Command::MigrateToDevice, span, 1)?;
            }
            let (variant, effort) = (bench.variant, bench.effort);
            let child = bench.process.fork(Box::new(move |process| {
                let bench = Bench::new(process, variant, effort);
                bench.check(span, 1)?;
                let device = bench.open_as('b', 0)?;
                bench.write_and_check(&device, span, 2)?;
                Ok(bench.record())
            }))?;
            bench.append(child.join()?);
            bench.check(span, 1)?;
        }
    }
    Ok(())
}

fn anon_write_child_shared(bench: &Bench<'_>) -> Result<(), Trouble> {
    let _device = bench.open()?;
    let span = bench.filled_as(Memory::Shared, PAGES, 1)?;
    let (variant, effort) = (bench.variant, bench.effort);
    let child = bench.process.fork(Box::new(move |process| {
        let bench = Bench::new(process, variant, effort);
        bench.check(span, 1)?;
        let device = bench.open_as('b', 0)?;
        bench.write_and_check(&device, span, 2)?;
        Ok(bench.record())
    }))?;
    bench.append(child.join()?);
    bench.check(span, 2)
}

fn anon_write_huge(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.map(Memory::Large, 512)?;
    bench.write_and_check(&device, span, 1)
}

fn anon_write_hugetlbfs(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.map(Memory::HugePages, 512)?;
    bench.write_and_check(&device, span, 1)
}

fn file_read(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::SharedFile, PAGES, 1)?;
    bench.process.protect(span, Rights::Read)?;
    bench.expect(&device, Command::Read, span, 1)
}

fn file_write(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.map(Memory::SharedFile, PAGES)?;
    bench.write_and_check(&device, span, 1)
}

fn migrate(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(span, 1)
}

/// Pages of a private file mapping that were written are the process's own.
fn migrate_file_private(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::PrivateFile, PAGES, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(span, 1)
}

/// Half of the pages are home again when all are sent.
fn migrate_fault(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(part(span, 0, PAGES / 2), 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(span, 1)
}

fn migrate_release(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    let released = bench.ask(&device, Command::Release, span);
    released.map_err(|errno| failed(Command::Release, errno))?;
    bench.check(span, 1)
}

/// Memory that others see stays.
fn migrate_shared(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::Shared, PAGES, 1)?;
    let sent = bench.ask(&device, Command::MigrateToDevice, span);
    if sent != Err(Errno::NoEnt) {
        return wrong("shared memory has moved to the device");
    }
    bench.check(span, 1)
}

fn migrate_multiple(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for round in 1..=ROUNDS {
        let span = bench.filled(PAGES, round)?;
        bench.expect(&device, Command::MigrateToDevice, span, round)?;
        // What is on a coherent device stays there when it is touched.
        if bench.variant == Variant::Coherent {
            let came = bench.ask(&device, Command::MigrateToSystem, span);
            came.map_err(|errno| failed(Command::MigrateToSystem, errno))?;
        }
        bench.check(span, round)?;
        bench.process.unmap(span)?;
    }
    Ok(())
}

/// What was unmapped is forgotten: the next mapping at the same place is read anew.
fn anon_read_multiple(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for round in 1..=ROUNDS {
        let span = bench.filled(PAGES, round)?;
        bench.expect(&device, Command::Read, span, round)?;
        bench.process.unmap(span)?;
    }
    Ok(())
}

/// The device reads while a thread unmaps half of it: all of it, or an error.
fn anon_teardown(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    for round in 1..=ROUNDS {
        let span = bench.filled(PAGES, round)?;
        let racing = bench
            .process
            .unmap_beside(part(span, PAGES / 2, PAGES / 2))?;
        let found = bench.fetch(&device, Command::Read, span);
        drop(racing);
        if let Ok(found) = found {
            let wanted = (0..PAGES).map(|n| pattern(round, n));
            if !found.into_iter().eq(wanted) {
                return wrong("the device reads other content than the CPU wrote");
            }
        }
        bench.process.unmap(part(span, 0, PAGES / 2))?;
    }
    Ok(())
}

fn mixedmap(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.process.map(Memory::Device, 4096, Rights::Read)?;
    bench.snapshot(&device, span)
}

fn compound(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled_as(Memory::HugePages, 512, 1)?;
    bench.snapshot(&device, span)?;
    bench.process.protect(span, Rights::Read)?;
    bench.snapshot(&device, span)
}
