//! Pages that the device has for itself, pins, copies on write.

use gpusvm::addr::HostSpan;
use gpusvm_dmirror::uapi::{Command, Errno};

use crate::conformance::hmm::Case;
use crate::conformance::hmm::bench::{Bench, Trouble, addresses, failed, part, pattern, wrong};
use crate::conformance::hmm::host::{Need, Rights};

const PAGES: u64 = 1024;

pub(super) const CASES: [Case; 5] = [
    Case::new("exclusive", exclusive),
    Case::new("exclusive_mprotect", exclusive_mprotect),
    Case::new("exclusive_cow", exclusive_cow),
    Case::new("hmm_gup_test", gup).needing(&[Need::GupTest]),
    Case::new("hmm_cow_in_device", cow_in_device),
];

/// A touch by the CPU takes the pages back.
fn exclusive(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::Exclusive, span, 1)?;
    bench.increment(span)?;
    check_incremented(bench, span)?;
    let none = bench.ask(&device, Command::CheckExclusive, span);
    none.map_err(|errno| failed(Command::CheckExclusive, errno))
}

fn exclusive_mprotect(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::Exclusive, span, 1)?;
    bench.process.protect(span, Rights::Read)?;
    if bench.write(&device, span, 2) != Err(Errno::Perm) {
        return wrong("the device writes what may only be read by now");
    }
    bench.check(span, 1)
}

/// A child gets a copy, and nobody sees what the other one writes.
fn exclusive_cow(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(PAGES, 1)?;
    bench.expect(&device, Command::Exclusive, span, 1)?;
    let (variant, effort) = (bench.variant, bench.effort);
    let child = bench.process.fork(Box::new(move |process| {
        let bench = Bench::new(process, variant, effort);
        bench.increment(span)?;
        check_incremented(&bench, span)?;
        Ok(bench.record())
    }))?;
    bench.increment(span)?;
    bench.append(child.join()?);
    check_incremented(bench, span)
}

fn check_incremented(bench: &Bench<'_>, span: HostSpan) -> Result<(), Trouble> {
    for (n, at) in addresses(span) {
        let (found, wanted) = (bench.process.load(at)?, pattern(1, n)[0] + 1);
        if found != wanted {
            return wrong(format!("the CPU finds {found:x} at {at}, not {wanted:x}"));
        }
    }
    Ok(())
}

/// Pages that the system takes for long are not on a device. Two of the four are only read by a
/// system call, which takes a coherent page where it is.
fn gup(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(4, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    bench.check(part(span, 0, 2), 1)?;
    let pins = [2, 3].map(|n| bench.process.pin(part(span, n, 1).start()));
    bench.check_from(part(span, 2, 2), 1, 2)?;
    bench.snapshot(&device, span)?;
    for pin in pins {
        drop(pin?);
    }
    Ok(())
}

/// The parent writes to pages that a child shares on the device.
fn cow_in_device(bench: &Bench<'_>) -> Result<(), Trouble> {
    let device = bench.open()?;
    let span = bench.filled(4, 1)?;
    bench.expect(&device, Command::MigrateToDevice, span, 1)?;
    let (variant, effort) = (bench.variant, bench.effort);
    let child = bench.process.fork(Box::new(move |process| {
        let bench = Bench::new(process, variant, effort);
        bench.check(span, 1)?;
        Ok(bench.record())
    }))?;
    bench.fill(span, 2)?;
    bench.snapshot(&device, span)?;
    bench.append(child.join()?);
    bench.check(span, 2)
}
