//! Two devices at a time.

use gpusvm::addr::HostSpan;
use gpusvm_dmirror::uapi::{Command, Errno};

use crate::conformance::hmm::Case;
use crate::conformance::hmm::bench::{Bench, Trouble, failed, part, pattern, wrong};
use crate::conformance::hmm::host::{Memory, Rights};

pub(super) const CASES: [Case; 3] = [
    Case::new("migrate_mixed", migrate_mixed),
    Case::new("snapshot", snapshot),
    Case::new("double_map", double_map),
];

/// One page that may not be read, a hole, the page of zeros and a written one that may only be read,
/// and two or three that may be written.
fn mixed(bench: &Bench<'_>, pages: u64) -> Result<HostSpan, Trouble> {
    let span = bench.map(Memory::Private, pages)?;
    bench.process.protect(part(span, 0, 1), Rights::None)?;
    bench.process.unmap(part(span, 1, 1))?;
    bench.check_zeros(part(span, 2, 1))?;
    bench.process.protect(part(span, 2, 1), Rights::Read)?;
    bench.fill(part(span, 3, pages - 3), 1)?;
    bench.process.protect(part(span, 3, 1), Rights::Read)?;
    Ok(span)
}

fn migrate_mixed(bench: &Bench<'_>) -> Result<(), Trouble> {
    let (first, second) = (bench.open_as('a', 0)?, bench.open_as('b', 1)?);
    let span = mixed(bench, 6)?;
    let send = |pages| bench.ask(&second, Command::MigrateToDevice, pages);
    if send(span) != Err(Errno::Invalid) {
        return wrong("a page that may not be read has moved to the device");
    }
    bench.process.protect(part(span, 0, 1), Rights::ReadWrite)?;
    if send(part(span, 0, 3)) != Err(Errno::Invalid) {
        return wrong("a hole has moved to the device");
    }
    let rest = part(span, 2, 4);
    let found = bench.fetch(&second, Command::MigrateToDevice, rest);
    let found = found.map_err(|errno| failed(Command::MigrateToDevice, errno))?;
    let wanted = [[0; 2], pattern(1, 0), pattern(1, 1), pattern(1, 2)];
    if found != wanted {
        return wrong(format!("the device has {found:x?}, not {wanted:x?}"));
    }
    let last = bench.ask(&first, Command::MigrateToDevice, part(span, 5, 1));
    if last != Err(Errno::NoEnt) {
        return wrong("a page has moved from one device to the other");
    }
    bench.check_zeros(part(span, 2, 1))?;
    bench.check(part(span, 3, 3), 1)
}

fn snapshot(bench: &Bench<'_>) -> Result<(), Trouble> {
    let (first, second) = (bench.open_as('a', 0)?, bench.open_as('b', 1)?);
    let span = mixed(bench, 7)?;
    for (device, page) in [(&first, 5), (&second, 6)] {
        let sent = bench.ask(device, Command::MigrateToDevice, part(span, page, 1));
        sent.map_err(|errno| failed(Command::MigrateToDevice, errno))?;
    }
    bench.snapshot(&first, span)?;
    bench.check(part(span, 3, 4), 1)
}

/// Both devices read; then the pages are in the memory of one of them, and the other one reads again.
fn double_map(bench: &Bench<'_>) -> Result<(), Trouble> {
    let (first, second) = (bench.open_as('a', 0)?, bench.open_as('b', 1)?);
    let span = bench.filled(6, 1)?;
    bench.process.protect(span, Rights::Read)?;
    bench.expect(&first, Command::Read, span, 1)?;
    bench.expect(&second, Command::Read, span, 1)?;
    bench.expect(&second, Command::MigrateToDevice, span, 1)?;
    bench.expect(&first, Command::Read, span, 1)?;
    bench.check(span, 1)
}
