//! What `conformance mm` shows.

use std::io::Write;

use serde_json::{Value, json};

use crate::args::value_name;
use crate::conformance::ConformanceError;
use crate::conformance::mm::MmArgs;
use crate::conformance::mm::program::Program;
use crate::conformance::mm::rows::{Outcome, Verdict};
use crate::conformance::mm::settings::Settings;
use crate::size::counted;

/// A random program that differs.
pub(super) struct Failure {
    /// Its number.
    pub(super) seed: u64,
    /// What is left of it.
    pub(super) short: Program,
    /// The difference, in words.
    pub(super) found: String,
}

/// What came of a run.
pub(super) struct Report {
    /// The machine's.
    pub(super) settings: Settings,
    /// Programs that agree.
    pub(super) passed: u64,
    /// Of these, those that were compared up to a call that the model leaves out.
    pub(super) cut: u64,
    /// Programs that differed once and then not again.
    pub(super) unrepeated: Vec<u64>,
    /// Programs that differ.
    pub(super) failures: Vec<Failure>,
    rows: Vec<Outcome>,
}

impl Report {
    pub(super) const fn new(settings: Settings) -> Self {
        Self {
            settings,
            passed: 0,
            cut: 0,
            unrepeated: Vec::new(),
            failures: Vec::new(),
            rows: Vec::new(),
        }
    }

    pub(super) fn add_rows(&mut self, rows: Vec<Outcome>) {
        self.rows.extend(rows);
    }

    /// Prints it.
    ///
    /// # Errors
    /// [`ConformanceError::Failed`] where something failed.
    pub(super) fn print(&self, args: &MmArgs, out: &mut dyn Write) -> Result<(), ConformanceError> {
        let count = |wanted: fn(&Verdict) -> bool| {
            self.rows.iter().filter(|row| wanted(&row.result)).count() as u64
        };
        let passed = self.passed + count(|row| matches!(row, Verdict::Passed));
        let failed = self.failures.len() as u64 + count(|row| matches!(row, Verdict::Failed(_)));
        let skipped = count(|row| matches!(row, Verdict::Skipped(_)));
        if args.output.json {
            let object = self.json(args, [passed, failed, skipped]);
            writeln!(out, "{object:#}")?;
        } else {
            self.text(out)?;
            writeln!(out, "{passed} passed, {failed} failed, {skipped} skipped")?;
        }
        if failed == 0 {
            return Ok(());
        }
        let version = self.settings.foreign();
        Err(ConformanceError::Failed(format!(
            "{}{version}",
            counted(failed, "program differs", "programs differ")
        )))
    }

    fn text(&self, out: &mut dyn Write) -> Result<(), std::io::Error> {
        for failure in &self.failures {
            let steps = failure.short.steps.len() as u64;
            let steps = counted(steps, "step that matters", "steps that matter");
            writeln!(out, "program {} differs; {steps}:\n", failure.seed)?;
            writeln!(out, "{}\n{}\n", failure.short.script(), failure.found)?;
        }
        for row in &self.rows {
            match &row.result {
                Verdict::Passed => writeln!(out, "{}: ok", row.title)?,
                Verdict::Failed(why) => writeln!(out, "{}: FAILED: {why}", row.title)?,
                Verdict::Skipped(why) => writeln!(out, "{}: skipped: {why}", row.title)?,
            }
        }
        if self.cut > 0 {
            writeln!(
                out,
                "{} compared up to a call that the model leaves out",
                self.cut
            )?;
        }
        if !self.unrepeated.is_empty() {
            writeln!(out, "differed once and not again: {:?}", self.unrepeated)?;
        }
        Ok(())
    }

    fn json(&self, args: &MmArgs, counts: [u64; 3]) -> Value {
        let failures = self.failures.iter().map(|failure| {
            json!({
                "program": failure.seed,
                "steps": failure.short.steps.len(),
                "script": failure.short.script(),
                "difference": failure.found,
            })
        });
        let rows = self.rows.iter().map(|row| {
            let (result, why) = match &row.result {
                Verdict::Passed => ("passed", None),
                Verdict::Failed(why) => ("failed", Some(why)),
                Verdict::Skipped(why) => ("skipped", Some(why)),
            };
            json!({ "row": row.title, "result": result, "why": why })
        });
        let [passed, failed, skipped] = counts;
        json!({
            "schema": 1,
            "suite": "mm",
            "host": value_name(args.host),
            "verified": failed == 0,
            "kernel": self.settings.release,
            "thp": format!("{:?}", self.settings.thp).to_lowercase(),
            "swap": self.settings.swap,
            "seed": args.seed,
            "steps": args.steps,
            "passed": passed,
            "failed": failed,
            "skipped": skipped,
            "cut": self.cut,
            "unrepeated": self.unrepeated,
            "failures": failures.collect::<Vec<_>>(),
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}
