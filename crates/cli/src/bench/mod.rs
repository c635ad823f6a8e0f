//! `gpusvm bench`: ratios against yardsticks that are measured in the same run, interleaved.
//!
//! Each row times a pair in turn, many times: the thing and its yardstick. The ratio of the medians
//! is reported with the middle half of the pairs' own ratios as spread. Absolute times are shown to
//! be read, not compared: they belong to this machine and this minute.

mod churn;
mod measure;

use std::fmt;
use std::io::{self, Write};

use gpusvm::error::Interrupted;
use gpusvm_live::VramMode;
use gpusvm_softgpu::Stop;
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::machine::MachineError;
use crate::table::Table;

use measure::Way;

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

const ROWS: [Row; 12] = [
    Row {
        name: "migrate-out",
        about: "2 MiB to the device, copying / memcpy",
        bound: Bound::AtMost(1.20),
        measure: |s| measure::migrate(s, VramMode::Copy, Way::Out),
    },
    Row {
        name: "migrate-home",
        about: "2 MiB back to the CPU, copying / memcpy",
        bound: Bound::AtMost(1.20),
        measure: |s| measure::migrate(s, VramMode::Copy, Way::Home),
    },
    Row {
        name: "migrate-pair",
        about: "2 MiB out and back, zero-copy / two memcpys",
        bound: Bound::AtMost(0.15),
        measure: |s| measure::migrate(s, VramMode::Adopt, Way::Pair),
    },
    Row {
        name: "migrate-small",
        about: "2 MiB of small pages to the device, first time / memcpy",
        bound: Bound::AtMost(2.8),
        measure: measure::migrate_small,
    },
    Row {
        name: "migrate-churn",
        about: "2 MiB out and back beside a stream of events, sharded / not",
        bound: Bound::AtMost(0.4),
        measure: churn::migrate,
    },
    Row {
        name: "fault-back-4k",
        about: "CPU fault-back 4 KiB / bare userfaultfd loop",
        bound: Bound::AtMost(1.25),
        measure: measure::fault_back_4k,
    },
    Row {
        name: "fault-back-in-thread",
        about: "CPU fault-back 4 KiB of compute-only memory / bare SIGBUS loop",
        bound: Bound::AtMost(1.30),
        measure: measure::fault_back_in_thread,
    },
    Row {
        name: "fault-back-2m",
        about: "CPU fault-back 2 MiB / cold memcpy",
        bound: Bound::AtMost(1.5),
        measure: measure::fault_back_2m,
    },
    Row {
        name: "first-touch",
        about: "first touch in a mirrored mapping / unmirrored",
        bound: Bound::AtMost(1.03),
        measure: measure::first_touch,
    },
    Row {
        name: "munmap",
        about: "bracketed munmap, not mirrored / bare",
        bound: Bound::AtMost(1.05),
        measure: measure::munmap,
    },
    Row {
        name: "device-fault",
        about: "inline fault service, no migration",
        bound: Bound::Micros(2.0),
        measure: measure::device_fault,
    },
    Row {
        name: "triad",
        about: "resident triad on the device / on the CPU",
        bound: Bound::AtLeast(0.8),
        measure: measure::triad,
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
    /// Pages refuse to move.
    Refused(Interrupted),
    /// The system refuses memory.
    Io(io::Error),
    /// Standard output is closed, or its disk is full.
    Output(io::Error),
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
            Self::Refused(why) => write!(f, "pages cannot be moved: {why}"),
            Self::Io(error) => write!(f, "memory for the bench: {error}"),
            Self::Output(why) => write!(f, "standard output: {why}"),
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
    out.write_all(text.as_bytes()).map_err(BenchError::Output)
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
