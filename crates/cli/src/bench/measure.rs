//! The measurements: each adds pairs of times, of the thing and of its yardstick, taken in turn.

use std::hint::black_box;
use std::io;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm_live::{AnonMapping, FaultLoop, Huge, OpenError, SignalLoop, VramMode, thread};
use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::bench::{BenchError, Samples};
use crate::machine::{Machine, MachineConfig};
use crate::run::Stopwatch;
use crate::workload::{address_of_mut, count, cpu_triad, exact};

const MIB2: usize = 2 << 20;

/// Nanoseconds of `work`.
fn time(work: impl FnOnce()) -> f64 {
    let clock = Stopwatch::start();
    work();
    clock.elapsed().as_secs_f64() * 1e9
}

fn machine(migration: VramMode) -> Result<Machine, BenchError> {
    let config = MachineConfig {
        vram: 64 << 20,
        units: 1,
        migration,
        ..MachineConfig::default()
    };
    Machine::start(config).map_err(BenchError::Machine)
}

fn huge(bytes: usize) -> Result<AnonMapping, BenchError> {
    let mut map = AnonMapping::new(bytes, Huge::Advise).map_err(BenchError::Io)?;
    map.bytes_mut().fill(1);
    Ok(map)
}

fn touch_byte(map: &mut AnonMapping, at: usize) {
    let byte = &mut map.bytes_mut()[at];
    *byte = byte.wrapping_add(1);
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Out,
    Home,
    Pair,
}

/// The first `bytes` bytes of a mapping.
fn span_of(map: &AnonMapping, bytes: u64) -> HostSpan {
    HostSpan::at(HostVa::new(map.address()), bytes)
}

/// Time inside the framework's own migrations, against copies of the same size between them.
pub(super) fn migrate(samples: &mut Samples, mode: VramMode, way: Way) -> Result<(), BenchError> {
    let machine = machine(mode)?;
    let mut data = huge(MIB2)?;
    let (from, mut to) = (huge(MIB2)?, huge(MIB2)?);
    let mut sample = || {
        let out = machine.send(span_of(&data, 2 << 20))?;
        let (out, home) = (exact(out.0), exact(machine.evict_all().0));
        touch_byte(&mut data, 0);
        let copy = time(|| to.bytes_mut().copy_from_slice(from.bytes()));
        match way {
            Way::Out => samples.add(out, copy),
            Way::Home => samples.add(home, copy),
            Way::Pair => samples.add(out + home, 2.0 * copy),
        }
        Ok(())
    };
    thread::run(|| (0..400).try_for_each(|_| sample())).map_err(BenchError::Refused)
}

/// The first migration of small pages, copying: memory that the process has just filled.
pub(super) fn migrate_small(samples: &mut Samples) -> Result<(), BenchError> {
    let machine = machine(VramMode::Copy)?;
    let (from, mut to) = (huge(MIB2)?, huge(MIB2)?);
    let mut sample = || {
        let mut data = AnonMapping::new(2 * MIB2, Huge::Never).map_err(BenchError::Io)?;
        data.bytes_mut().fill(1);
        let start = data.address().next_multiple_of(2 << 20);
        let out = machine
            .send(HostSpan::at(HostVa::new(start), 2 << 20))
            .map_err(BenchError::Refused)?;
        let copy = time(|| to.bytes_mut().copy_from_slice(from.bytes()));
        samples.add(exact(out.0), copy);
        Ok(())
    };
    thread::run(|| (0..100).try_for_each(|_| sample()))
}

/// A CPU touch of a single page on the device, against a touch of a page that a bare loop serves.
pub(super) fn fault_back_4k(samples: &mut Samples) -> Result<(), BenchError> {
    let machine = machine(VramMode::Copy)?;
    let bare = FaultLoop::start().map_err(|error| BenchError::Machine(error.into()))?;
    let mut data = AnonMapping::new(64 << 10, Huge::Never).map_err(BenchError::Io)?;
    data.bytes_mut().fill(1);
    let mut sample = || {
        machine.send(span_of(&data, 4 << 10))?;
        let fault = time(|| touch_byte(&mut data, 8));
        bare.drop_page();
        samples.add(fault, time(|| bare.touch()));
        Ok(())
    };
    thread::run(|| (0..400).try_for_each(|_| sample())).map_err(BenchError::Refused)
}

/// The same where the touching thread serves itself, against a bare signal handler that does.
pub(super) fn fault_back_in_thread(samples: &mut Samples) -> Result<(), BenchError> {
    let machine = machine(VramMode::Copy)?;
    let refused = |error: OpenError| BenchError::Machine(error.into());
    let mut data = AnonMapping::new(64 << 10, Huge::Never).map_err(BenchError::Io)?;
    data.bytes_mut().fill(1);
    let compute_only = machine.space().compute_only(span_of(&data, 64 << 10));
    let _in_thread = compute_only.map_err(refused)?;
    let bare = SignalLoop::start().map_err(refused)?;
    let mut sample = || {
        machine.send(span_of(&data, 4 << 10))?;
        let fault = time(|| touch_byte(&mut data, 8));
        let _served = bare.prepare();
        samples.add(fault, time(|| bare.touch()));
        Ok(())
    };
    thread::run(|| (0..400).try_for_each(|_| sample())).map_err(BenchError::Refused)
}

/// A CPU touch of a huge page on the device, against a copy of as much memory that no cache has.
pub(super) fn fault_back_2m(samples: &mut Samples) -> Result<(), BenchError> {
    const CYCLE: usize = 32;
    let machine = machine(VramMode::Copy)?;
    let mut data = huge(MIB2)?;
    let (from, mut to) = (huge(CYCLE * MIB2)?, huge(CYCLE * MIB2)?);
    let mut sample = |n| {
        let part = (n % CYCLE) * MIB2..(n % CYCLE + 1) * MIB2;
        machine.send(span_of(&data, 2 << 20))?;
        let fault = time(|| touch_byte(&mut data, MIB2 / 2));
        let cold = time(|| to.bytes_mut()[part.clone()].copy_from_slice(&from.bytes()[part]));
        samples.add(fault, cold);
        Ok(())
    };
    thread::run(|| (0..200).try_for_each(&mut sample)).map_err(BenchError::Refused)
}

/// A kernel that stores one word.
pub(super) struct Touch(pub(super) u64);

impl Kernel for Touch {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        tile.store_one(self.0, 1_u64)
    }
}

/// First touches of small pages, with and without a mirror on the mapping.
pub(super) fn first_touch(samples: &mut Samples) -> Result<(), BenchError> {
    const PAGES: usize = 256;
    let machine = machine(VramMode::Adopt)?;
    let touch =
        |map: &mut AnonMapping| time(|| (1..=PAGES).for_each(|n| map.bytes_mut()[n * 4096] = 1));
    let bytes = (PAGES + 1) * 4096;
    for _sample in 0..100 {
        let mut mirrored = AnonMapping::new(bytes, Huge::Never).map_err(BenchError::Io)?;
        let mut plain = AnonMapping::new(bytes, Huge::Never).map_err(BenchError::Io)?;
        // Binding one page in place mirrors the whole mapping.
        mirrored.bytes_mut()[0] = 1;
        machine
            .launch(&Touch(mirrored.address()), 1)
            .map_err(BenchError::Device)?;
        samples.add(touch(&mut mirrored), touch(&mut plain));
    }
    Ok(())
}

/// munmap of memory that no device uses, with patched sites and something else watched, against
/// sites in their own bytes.
pub(super) fn munmap(samples: &mut Samples) -> Result<(), BenchError> {
    const CALLS: usize = 64;
    let unmap = || -> Result<f64, BenchError> {
        let maps: io::Result<Vec<_>> = (0..CALLS)
            .map(|_| {
                let mut map = AnonMapping::new(16 << 10, Huge::Never)?;
                map.bytes_mut().fill(1);
                Ok(map)
            })
            .collect();
        let maps = maps.map_err(BenchError::Io)?;
        Ok(time(|| drop(maps)))
    };
    let mut watched = huge(MIB2)?;
    for _sample in 0..60 {
        let bare = unmap()?;
        let machine = machine(VramMode::Adopt)?;
        machine
            .launch(&Touch(watched.address()), 1)
            .map_err(BenchError::Device)?;
        let bracketed = unmap()?;
        watched.bytes_mut()[0] = 2;
        machine.close();
        samples.add(bracketed, bare);
    }
    Ok(())
}

/// Faults on single pages, which stay where they are: service alone, from the device's own
/// counters. The yardstick is a null kernel's time per page.
pub(super) fn device_fault(samples: &mut Samples) -> Result<(), BenchError> {
    let machine = machine(VramMode::Adopt)?;
    for _sample in 0..50 {
        // No huge range fits, and of every block of 64 KiB half the pages have no content: what is
        // left are ranges of one page.
        let mut data = AnonMapping::new(SINGLES * 8192, Huge::Never).map_err(BenchError::Io)?;
        (0..SINGLES).for_each(|n| data.bytes_mut()[n * 8192] = 1);
        let pages = EverySecondPage(data.address());
        let before = machine.fault_service_ns();
        machine.launch(&pages, 1).map_err(BenchError::Device)?;
        let after = machine.fault_service_ns();
        let faults = exact(after.1 - before.1).max(1.0);
        let service = exact(after.0 - before.0) / faults;
        let warm = time(|| {
            let _hits = machine.launch(&pages, 1);
        });
        samples.add(service, warm / exact(count(SINGLES)));
    }
    Ok(())
}

/// Pages of a sample of [`device_fault`]: with the holes between them less than a huge range.
const SINGLES: usize = 128;

struct EverySecondPage(u64);

impl Kernel for EverySecondPage {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        (0..count(SINGLES))
            .try_for_each(|n| tile.load_one::<u64>(self.0 + n * 8192).map(|_word| ()))
    }
}

/// The triad over data that is on the device already, against the plain loop, as bandwidths.
pub(super) fn triad(samples: &mut Samples) -> Result<(), BenchError> {
    const N: usize = 1 << 20;
    const ROUNDS: u32 = 4;
    let machine = machine(VramMode::Adopt)?;
    let (mut a, mut b, mut c) = (huge(N * 8)?, huge(N * 8)?, huge(N * 8)?);
    let kernel = TriadRounds {
        a: address_of_mut(a.bytes_mut()),
        b: address_of_mut(b.bytes_mut()),
        c: address_of_mut(c.bytes_mut()),
        n: N,
        rounds: ROUNDS,
    };
    let (mut x, y, z) = (vec![0.0; N], vec![1.0; N], vec![2.0; N]);
    for _sample in 0..20 {
        machine.launch(&kernel, 1).map_err(BenchError::Device)?;
        let device = time(|| {
            let _resident = machine.launch(&kernel, 1);
        });
        let cpu =
            time(|| (0..ROUNDS).for_each(|_| cpu_triad(black_box(&mut x), black_box(&y), &z, 3.0)));
        // Bandwidths: the same bytes, so the ratio of the times upside down.
        samples.add(cpu, device);
    }
    Ok(())
}

struct TriadRounds {
    a: u64,
    b: u64,
    c: u64,
    n: usize,
    rounds: u32,
}

impl Kernel for TriadRounds {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        // Three tiles fit into a first cache.
        const TILE: usize = 512;
        let (mut b, mut c) = (vec![0.0_f64; TILE], vec![0.0_f64; TILE]);
        for _round in 0..self.rounds {
            for offset in (0..u64::try_from(self.n).unwrap_or(0) * 8).step_by(TILE * 8) {
                tile.load(self.b + offset, &mut b[..])?;
                tile.load(self.c + offset, &mut c[..])?;
                b.iter_mut().zip(&c).for_each(|(b, c)| *b += 3.0 * c);
                tile.store(self.a + offset, &b[..])?;
            }
        }
        Ok(())
    }
}
