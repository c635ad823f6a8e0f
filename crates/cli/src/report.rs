//! What a run has to say, as a table row and as JSON.

use std::time::Duration;

use gpusvm::seam::env::Ns;
use gpusvm_live::Level;
use gpusvm_xe::stats::{Counter, DeviceStats};
use serde_json::{Map, Value, json};

use crate::args::{RunArgs, value_name};
use crate::size;
use crate::timeline::{Columns, Timeline};

/// Version of the JSON object.
const SCHEMA: u32 = 1;

/// Most columns of a picture.
const PICTURE_COLUMNS: u64 = 200;

/// Columns of the table at the end of a run.
pub const COLUMNS: [&str; 11] = [
    "workload",
    "bytes",
    "VRAM",
    "verified",
    "dev faults",
    "to dev",
    "from dev",
    "evicted",
    "CPU faults",
    "bandwidth",
    "time",
];

/// One finished workload.
#[derive(Debug)]
pub struct Report {
    /// Name.
    pub workload: &'static str,
    /// Every answer was right.
    pub verified: bool,
    /// Time on the device.
    pub elapsed: Duration,
    /// By which clock.
    pub clock: Clock,
    /// Bytes of data.
    pub bytes: u64,
    /// Bytes that the kernels read and wrote.
    pub traffic: u64,
    /// Bytes of device memory.
    pub vram: u64,
    /// The answer, where it is short.
    pub answer: Option<String>,
    /// What the workload counted, where it counted something.
    pub counts: Option<Value>,
    /// What the host used.
    pub host: Value,
    /// The options.
    pub config: Value,
    /// Counters.
    pub stats: Map<String, Value>,
    /// The counters as text, of each GT.
    pub gts: Vec<String>,
    /// What happened when, where a report was asked for.
    pub picture: Option<Picture>,
}

/// By which clock time is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The wall's.
    Real,
    /// A world's: a nanosecond for each step. Says nothing of speed.
    Virtual,
}

impl Clock {
    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Virtual => "virtual",
        }
    }
}

/// What happened when.
#[derive(Debug)]
pub struct Picture {
    /// From the start to the last thing that happened, or to the end of the run.
    pub columns: Columns,
    /// When the run ended; verification follows.
    pub ran: Ns,
}

impl Picture {
    /// A picture of a run that took `elapsed`.
    #[must_use]
    pub fn of(timeline: &Timeline, elapsed: Duration) -> Self {
        let ran = Ns(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX));
        let end = timeline.busy_until().max(ran);
        Self {
            columns: timeline.columns(end, PICTURE_COLUMNS),
            ran,
        }
    }
}

/// The host's levels as JSON.
#[must_use]
pub fn host_json(level: &Level, facts: &gpusvm_live::Facts) -> Value {
    json!({
        "kind": "live",
        "clock": Clock::Real.name(),
        "level": level.faults.name(),
        "bracket": level.bracket.name(),
        "thp": facts.thp,
        "kernel": facts.kernel,
        "not_covered": [level.faults.limits(), level.bracket.limits()],
    })
}

/// The options as JSON.
#[must_use]
pub fn config_json(args: &RunArgs, size: u64, vram: u64) -> Value {
    json!({
        "size": size,
        "vram": vram,
        "threads": args.threads,
        "migration": format!("{:?}", args.migration).to_lowercase(),
        "fault_service": format!("{:?}", args.fault_service).to_lowercase(),
        "cpu_faults": value_name(args.cpu_faults),
        "atomics": value_name(args.atomics),
        "level": value_name(args.live.level),
        "brackets": value_name(args.live.brackets),
        "seed": args.seed,
        "input": args.input.as_ref().map(|path| path.display().to_string()),
    })
}

/// All counters, summed over GTs.
#[must_use]
pub fn stats_json(stats: &DeviceStats) -> Map<String, Value> {
    let value = |counter: &Counter| (counter.name().to_owned(), json!(stats.total(*counter)));
    Counter::ALL.iter().map(value).collect()
}

/// The statistics file of each GT.
#[must_use]
pub fn stats_text(stats: &DeviceStats) -> Vec<String> {
    (0..)
        .map_while(|gt| stats.gt(gt).map(ToString::to_string))
        .collect()
}

impl Report {
    /// The JSON object.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "schema": SCHEMA,
            "workload": self.workload,
            "verified": self.verified,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "bytes": self.bytes,
            "bandwidth_bytes_per_s": self.bandwidth(),
            "answer": self.answer,
            "counts": self.counts,
            "host": self.host,
            "config": self.config,
            "stats": self.stats,
        })
    }

    /// The row of the table.
    #[must_use]
    pub fn row(&self) -> Vec<String> {
        let stat = |name: &str| self.stats.get(name).and_then(Value::as_u64).unwrap_or(0);
        let moved = |copied, adopted| size::format((stat(copied) + stat(adopted)) * 1024);
        vec![
            self.workload.to_owned(),
            size::format(self.bytes),
            size::format(self.vram),
            if self.verified { "yes" } else { "NO" }.to_owned(),
            stat("svm_pagefault_count").to_string(),
            moved("svm_device_copy_kb", "adopted_to_device_kb"),
            moved("svm_cpu_copy_kb", "adopted_to_system_kb"),
            stat("evict_count").to_string(),
            stat("cpu_fault_count").to_string(),
            self.bandwidth().map_or_else(
                || "-".to_owned(),
                |rate| format!("{}/s", size::format(rate)),
            ),
            match self.clock {
                Clock::Real => format!("{:.2}s", self.elapsed.as_secs_f64()),
                Clock::Virtual => format!("{:.3}ms virtual", self.elapsed.as_secs_f64() * 1e3),
            },
        ]
    }

    /// Bytes per second that the kernels read and wrote; none where time says nothing of speed.
    fn bandwidth(&self) -> Option<u64> {
        let nanos = self.elapsed.as_nanos().max(1);
        let rate = u128::from(self.traffic) * 1_000_000_000 / nanos;
        (self.clock == Clock::Real).then(|| u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_promised_keys_and_the_row_all_columns() {
        let stats = DeviceStats::new(1);
        let report = Report {
            workload: "stream",
            verified: true,
            elapsed: Duration::from_millis(500),
            clock: Clock::Real,
            bytes: 1 << 20,
            traffic: 1 << 20,
            vram: 1 << 22,
            answer: None,
            counts: None,
            host: json!({}),
            config: json!({}),
            stats: stats_json(&stats),
            gts: stats_text(&stats),
            picture: None,
        };
        let object = report.json();
        for key in [
            "schema",
            "workload",
            "verified",
            "elapsed_s",
            "bytes",
            "host",
            "config",
            "stats",
        ] {
            assert!(object.get(key).is_some(), "{key}");
        }
        for name in [
            "svm_pagefault_count",
            "evict_count",
            "late_invalidation_count",
            "adopted_kb",
        ] {
            assert_eq!(object["stats"][name], 0, "{name}");
        }
        assert_eq!(report.row().len(), COLUMNS.len());
        assert_eq!(report.row()[9], "2M/s");
    }
}
