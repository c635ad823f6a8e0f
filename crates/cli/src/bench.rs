//! `gpusvm bench`: ratios against yardsticks that are measured in the same run, interleaved.
//!
//! Each row times a pair in turn, many times: the thing and its yardstick. The ratio of the medians
//! is reported with the middle half of the pairs' own ratios as spread. Absolute times are shown to
//! be read, not compared: they belong to this machine and this minute.

use std::fmt;
use std::hint::black_box;
use std::io::{self, Write};

use gpusvm_live::{AnonMapping, FaultLoop, Huge, VramMode, thread};
use gpusvm_softgpu::{Kernel, Stop, Tile};
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::machine::{Machine, MachineConfig, MachineError};
use crate::run::Stopwatch;
use crate::table::Table;
use crate::workload::{address_of_mut, count, cpu_triad, exact};

const MIB2: usize = 2 << 20;

/// One row.
struct Row {
    name: &'static str,
    about: &'static str,
    /// What the ratio should be at most, or at least for bandwidths.
    bound: Bound,
    measure: fn(&mut Samples) -> Result<(), BenchError>,
}

/// Where the ratio should lie.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Microseconds of the thing itself.
    Micros(f64),
}

impl Bound {
    fn holds(self, result: &Summary) -> bool {
        match self {
            Self::AtMost(most) => result.ratio <= most,
            Self::AtLeast(least) => result.ratio >= least,
            Self::Micros(most) => result.thing_us <= most,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "<= {most}"),
            Self::AtLeast(least) => write!(f, ">= {least}"),
            Self::Micros(most) => write!(f, "<= {most} us"),
        }
    }
}

const ROWS: [Row; 9] = [
    Row {
        name: "migrate-out",
        about: "2 MiB to the device, copying / memcpy",
        bound: Bound::AtMost(1.20),
        measure: |s| migrate(s, VramMode::Copy, Way::Out),
    },
    Row {
        name: "migrate-home",
        about: "2 MiB back to the CPU, copying / memcpy",
        bound: Bound::AtMost(1.20),
        measure: |s| migrate(s, VramMode::Copy, Way::Home),
    },
    Row {
        name: "migrate-pair",
        about: "2 MiB out and back, zero-copy / two memcpys",
        bound: Bound::AtMost(0.15),
        measure: |s| migrate(s, VramMode::Adopt, Way::Pair),
    },
    Row {
        name: "fault-back-4k",
        about: "CPU fault-back 4 KiB / bare userfaultfd loop",
        bound: Bound::AtMost(1.25),
        measure: fault_back_4k,
    },
    Row {
        name: "fault-back-2m",
        about: "CPU fault-back 2 MiB / cold memcpy",
        bound: Bound::AtMost(1.5),
        measure: fault_back_2m,
    },
    Row {
        name: "first-touch",
        about: "first touch in a mirrored mapping / unmirrored",
        bound: Bound::AtMost(1.03),
        measure: first_touch,
    },
    Row {
        name: "munmap",
        about: "bracketed munmap, not mirrored / bare",
        bound: Bound::AtMost(1.05),
        measure: munmap,
    },
    Row {
        name: "device-fault",
        about: "inline fault service, no migration",
        bound: Bound::Micros(2.0),
        measure: device_fault,
    },
    Row {
        name: "triad",
        about: "resident triad on the device / on the CPU",
        bound: Bound::AtLeast(0.8),
        measure: triad,
    },
];

/// The bench cannot run.
#[derive(Debug)]
pub enum BenchError {
    /// There is no such row.
    Unknown(String),
    /// The machine cannot be made.
    Machine(MachineError),
    /// The device stopped.
    Device(Stop),
    /// The system refuses memory, or output is closed.
    Io(io::Error),
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "there is no bench `{name}`; there are:")?;
                ROWS.iter().try_for_each(|row| write!(f, " {}", row.name))
            }
            Self::Machine(error) => error.fmt(f),
            Self::Device(stop) => stop.fmt(f),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BenchError {}

impl BenchError {
    /// The process's exit code.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        if matches!(self, Self::Unknown(_)) {
            2
        } else {
            1
        }
    }
}

/// Pairs of times, in nanoseconds.
#[derive(Debug, Default)]
struct Samples {
    thing: Vec<f64>,
    yardstick: Vec<f64>,
}

impl Samples {
    fn add(&mut self, thing: f64, yardstick: f64) {
        self.thing.push(thing);
        self.yardstick.push(yardstick);
    }
}

/// What the pairs say.
struct Summary {
    ratio: f64,
    spread: [f64; 2],
    thing_us: f64,
    yardstick_us: f64,
}

impl Summary {
    fn of(samples: &Samples) -> Self {
        let pairs = samples.thing.iter().zip(&samples.yardstick);
        let ratios: Vec<f64> = pairs.map(|(thing, yardstick)| thing / yardstick).collect();
        let (thing, yardstick) = (quantile(&samples.thing, 2), quantile(&samples.yardstick, 2));
        Self {
            ratio: thing / yardstick,
            spread: [quantile(&ratios, 1), quantile(&ratios, 3)],
            thing_us: thing / 1000.0,
            yardstick_us: yardstick / 1000.0,
        }
    }
}

/// The `quarter`th quarter.
fn quantile(values: &[f64], quarter: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * quarter / 4).copied().unwrap_or(f64::NAN)
}

/// Runs the benches that `args` name and prints them.
///
/// # Errors
/// [`BenchError`].
pub fn bench(args: &BenchArgs, out: &mut dyn Write) -> Result<(), BenchError> {
    let wanted = |row: &&Row| args.name.as_deref().is_none_or(|name| name == row.name);
    let rows: Vec<&Row> = ROWS.iter().filter(wanted).collect();
    if rows.is_empty() {
        return Err(BenchError::Unknown(args.name.clone().unwrap_or_default()));
    }
    let header = [
        "bench",
        "ratio",
        "middle half",
        "thing us",
        "yardstick us",
        "bound",
        "holds",
        "what",
    ];
    let mut table = Table::new(&header);
    let mut objects = Vec::new();
    for row in rows {
        let mut samples = Samples::default();
        (row.measure)(&mut samples)?;
        let summary = Summary::of(&samples);
        table.row(cells(row, &summary));
        objects.push(object(row, &summary));
    }
    let text = if args.output.json {
        format!("{:#}\n", json!({ "schema": 1, "benches": objects }))
    } else {
        table.to_string()
    };
    out.write_all(text.as_bytes()).map_err(BenchError::Io)
}

fn cells(row: &Row, summary: &Summary) -> Vec<String> {
    vec![
        row.name.to_owned(),
        format!("{:.3}", summary.ratio),
        format!("{:.2} - {:.2}", summary.spread[0], summary.spread[1]),
        format!("{:.2}", summary.thing_us),
        format!("{:.2}", summary.yardstick_us),
        row.bound.to_string(),
        if row.bound.holds(summary) {
            "yes"
        } else {
            "no"
        }
        .to_owned(),
        row.about.to_owned(),
    ]
}

fn object(row: &Row, summary: &Summary) -> Value {
    json!({
        "name": row.name,
        "about": row.about,
        "ratio": summary.ratio,
        "quartiles": summary.spread,
        "thing_us": summary.thing_us,
        "yardstick_us": summary.yardstick_us,
        "bound": row.bound.to_string(),
        "holds": row.bound.holds(summary),
    })
}

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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    Home,
    Pair,
}

/// Time inside the framework's own migrations, against copies of the same size between them.
fn migrate(samples: &mut Samples, mode: VramMode, way: Way) -> Result<(), BenchError> {
    let machine = machine(mode)?;
    let mut data = huge(MIB2)?;
    let (from, mut to) = (huge(MIB2)?, huge(MIB2)?);
    let mut sample = || {
        let out = machine.send(data.address(), 2 << 20)?;
        let (out, home) = (exact(out.0), exact(machine.evict_all().0));
        data.bytes_mut()[0] += 1;
        let copy = time(|| to.bytes_mut().copy_from_slice(from.bytes()));
        match way {
            Way::Out => samples.add(out, copy),
            Way::Home => samples.add(home, copy),
            Way::Pair => samples.add(out + home, 2.0 * copy),
        }
        Ok(())
    };
    thread::run(|| (0..400).try_for_each(|_| sample())).map_err(BenchError::Device)
}

/// A CPU touch of a single page on the device, against a touch of a page that a bare loop serves.
fn fault_back_4k(samples: &mut Samples) -> Result<(), BenchError> {
    let machine = machine(VramMode::Copy)?;
    let bare = FaultLoop::start().map_err(|error| BenchError::Machine(error.into()))?;
    let mut data = AnonMapping::new(64 << 10, Huge::Never).map_err(BenchError::Io)?;
    data.bytes_mut().fill(1);
    let mut sample = || {
        machine.send(data.address(), 4 << 10)?;
        let fault = time(|| data.bytes_mut()[8] += 1);
        bare.drop_page();
        samples.add(fault, time(|| bare.touch()));
        Ok(())
    };
    thread::run(|| (0..400).try_for_each(|_| sample())).map_err(BenchError::Device)
}

/// A CPU touch of a huge page on the device, against a copy of as much memory that no cache has.
fn fault_back_2m(samples: &mut Samples) -> Result<(), BenchError> {
    const CYCLE: usize = 32;
    let machine = machine(VramMode::Copy)?;
    let mut data = huge(MIB2)?;
    let (from, mut to) = (huge(CYCLE * MIB2)?, huge(CYCLE * MIB2)?);
    let mut sample = |n| {
        let part = (n % CYCLE) * MIB2..(n % CYCLE + 1) * MIB2;
        machine.send(data.address(), 2 << 20)?;
        let fault = time(|| data.bytes_mut()[MIB2 / 2] += 1);
        let cold = time(|| to.bytes_mut()[part.clone()].copy_from_slice(&from.bytes()[part]));
        samples.add(fault, cold);
        Ok(())
    };
    thread::run(|| (0..200).try_for_each(&mut sample)).map_err(BenchError::Device)
}

/// A kernel that stores one word.
struct Touch(u64);

impl Kernel for Touch {
    fn run(&self, _group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        tile.store_one(self.0, 1_u64)
    }
}

/// First touches of small pages, with and without a mirror on the mapping.
fn first_touch(samples: &mut Samples) -> Result<(), BenchError> {
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
fn munmap(samples: &mut Samples) -> Result<(), BenchError> {
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
fn device_fault(samples: &mut Samples) -> Result<(), BenchError> {
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
fn triad(samples: &mut Samples) -> Result<(), BenchError> {
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
        const TILE: usize = 2048;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_of_medians_and_spread_of_pairs() {
        let mut samples = Samples::default();
        for n in 1..=5 {
            samples.add(f64::from(n), 2.0);
        }
        let summary = Summary::of(&samples);
        assert!((summary.ratio - 1.5).abs() < 1e-9);
        assert!((summary.spread[0] - 1.0).abs() < 1e-9);
        assert!(Bound::AtMost(1.5).holds(&summary) && !Bound::AtLeast(1.6).holds(&summary));
    }
}
