//! `gpusvm conformance`: whether a host does what Linux and its drivers do.
//!
//! Each suite makes rows; here they become a table that ends with `N passed, N failed, N skipped`,
//! or one JSON object.

mod hmm;
mod mm;
mod scenarios;

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::args::OutputArgs;
use crate::scenario::{HostKind, ParseError, Verdict};
use crate::size::counted;

pub use mm::MmArgs;

/// Options of `conformance`.
#[derive(Args, Clone, Debug)]
pub struct ConformanceArgs {
    /// Which suite.
    #[command(subcommand)]
    pub suite: Suite,
}

/// The suites.
#[derive(Clone, Debug, Subcommand)]
pub enum Suite {
    /// The HMM test device: 39 cases, on private and on coherent device memory, against what Linux
    /// 7.3.4 answered.
    Hmm(HmmArgs),
    /// The scenarios of `svm-design.md` section 7.
    Scenarios(ScenariosArgs),
    /// Random programs of address-space calls on the running kernel and on the model's mm, compared
    /// after every call.
    Mm(MmArgs),
}

/// Options of `conformance hmm`.
#[derive(Args, Clone, Debug)]
pub struct HmmArgs {
    /// The host on which the cases run.
    #[arg(long, value_enum, default_value_t = Host::Model)]
    pub host: Host,
    /// Only the cases with these names.
    pub cases: Vec<String>,
    /// Leave out what takes long: the sizes of the benchmark above 16 MiB.
    #[arg(long)]
    pub short: bool,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `conformance scenarios`.
#[derive(Args, Clone, Debug)]
pub struct ScenariosArgs {
    /// The host on which they run.
    #[arg(long, value_enum, default_value_t = Host::Model)]
    pub host: Host,
    /// Only the scenarios with these numbers.
    pub numbers: Vec<u32>,
    /// The scenarios of this file, in place of those that are built in.
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// A host on which checks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// A Linux mm in memory.
    Model,
    /// This process.
    Live,
}

impl Host {
    const fn kind(self) -> HostKind {
        match self {
            Self::Model => HostKind::Model,
            Self::Live => HostKind::Live,
        }
    }
}

/// Why `conformance` failed.
#[derive(Debug)]
pub enum ConformanceError {
    /// Something behaves otherwise.
    Failed(String),
    /// The machine does not allow it.
    Machine(String),
    /// What was asked for does not exist.
    Usage(String),
    /// A file cannot be read, or what it says cannot.
    Input(String),
    /// Nobody reads the output.
    Output(std::io::Error),
}

impl ConformanceError {
    /// Exit code of the command.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Input(_) => 2,
            Self::Failed(_) | Self::Machine(_) | Self::Output(_) => 1,
        }
    }
}

impl fmt::Display for ConformanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) | Self::Input(what) | Self::Machine(what) | Self::Failed(what) => {
                f.write_str(what)
            }
            Self::Output(why) => write!(f, "standard output: {why}"),
        }
    }
}

impl std::error::Error for ConformanceError {}

impl From<std::io::Error> for ConformanceError {
    fn from(why: std::io::Error) -> Self {
        Self::Output(why)
    }
}

impl From<ParseError> for ConformanceError {
    fn from(error: ParseError) -> Self {
        Self::Input(error.to_string())
    }
}

/// One check, and how it ended.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Number or name.
    pub(crate) name: String,
    /// What it is about.
    pub(crate) what: String,
    pub(crate) verdict: Verdict,
}

/// Runs a suite and prints what came out.
///
/// # Errors
/// [`ConformanceError`]; [`Failed`](ConformanceError::Failed) where a check failed.
pub fn conformance(args: &ConformanceArgs, out: &mut dyn Write) -> Result<(), ConformanceError> {
    match &args.suite {
        Suite::Hmm(args) => {
            let rows = hmm::rows(args, out)?;
            finish(("hmm", args.host), args.output, &rows, out)
        }
        Suite::Scenarios(args) => {
            let rows = scenarios::rows(args, out)?;
            finish(("scenarios", args.host), args.output, &rows, out)
        }
        Suite::Mm(args) => mm::run(args, out),
    }
}

/// One line of the text form.
pub(crate) fn show(row: &Row, out: &mut dyn Write) -> std::io::Result<()> {
    let Row {
        name,
        what,
        verdict,
    } = row;
    writeln!(out, "{name:>4}  {what}: {verdict}")
}

/// Counts, as the last line or as a JSON object.
fn finish(
    (suite, host): (&str, Host),
    output: OutputArgs,
    rows: &[Row],
    out: &mut dyn Write,
) -> Result<(), ConformanceError> {
    let count = |of: fn(&Verdict) -> bool| rows.iter().filter(|row| of(&row.verdict)).count();
    let passed = count(|verdict| matches!(verdict, Verdict::Passed));
    let failed = count(|verdict| matches!(verdict, Verdict::Failed(_)));
    let skipped = count(|verdict| matches!(verdict, Verdict::Skipped(_)));
    if output.json {
        let object = json!({
            "schema": 1,
            "suite": suite,
            "host": host.kind().name(),
            "verified": failed == 0,
            "passed": passed,
            "failed": failed,
            "skipped": skipped,
            "rows": rows.iter().map(row_json).collect::<Vec<_>>(),
        });
        writeln!(out, "{object:#}")?;
    } else {
        writeln!(out, "{passed} passed, {failed} failed, {skipped} skipped")?;
    }
    if failed > 0 {
        return Err(ConformanceError::Failed(format!(
            "{}; the table says which and why",
            counted(failed as u64, "check failed", "checks failed")
        )));
    }
    Ok(())
}

fn row_json(row: &Row) -> Value {
    let (result, why) = match &row.verdict {
        Verdict::Passed => ("passed", None),
        Verdict::Failed(why) => ("failed", Some(why)),
        Verdict::Skipped(why) => ("skipped", Some(why)),
    };
    json!({ "name": row.name, "what": row.what, "result": result, "why": why })
}
