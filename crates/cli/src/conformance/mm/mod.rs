//! `gpusvm conformance mm`: the same calls on the running kernel and on the model.
//!
//! | module | what |
//! |---|---|
//! | `program` | programs of calls, and how one reads |
//! | `random` | programs from numbers |
//! | `rows` | programs that have names, with their answers |
//! | `notation` | programs and answers as text |
//! | `model` | a program on the model |
//! | `pair` | a program on both |
//! | `compare` | where two answers differ, and what is left open |
//! | `shrink` | a failing program made short |
//! | `settings` | what the machine's kernel is and how it is set up |
//! | `report` | what is shown |

mod compare;
mod model;
mod notation;
mod pair;
mod program;
mod random;
mod report;
mod rows;
mod settings;
mod shrink;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gpusvm::mutant::Mutant;

use crate::args::{MOST_SEEDS, OutputArgs};
use crate::conformance::ConformanceError;
use crate::conformance::mm::model::Facts;
use crate::conformance::mm::pair::{Extent, Pair, Verdict};
use crate::conformance::mm::program::{Program, line};
use crate::conformance::mm::report::{Failure, Report};
use crate::conformance::mm::settings::Settings;

/// Options of `conformance mm`.
#[derive(Args, Clone, Debug)]
pub struct MmArgs {
    /// Who runs the programs. One host alone is compared with itself.
    #[arg(long, value_enum, default_value_t = Host::Both)]
    pub host: Host,
    /// How many random programs.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=MOST_SEEDS))]
    pub programs: u64,
    /// Calls of each.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=96))]
    pub steps: u16,
    /// Number of the first program.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..MOST_SEEDS))]
    pub seed: u64,
    /// Give up after this many failing programs, each of which is made short and shown.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub failures: u64,
    /// Run the programs of this name, or all that have one, instead of random ones.
    #[arg(long, value_name = "NAME|all", conflicts_with_all = ["retell", "programs", "steps", "seed", "failures"])]
    pub row: Option<String>,
    /// Run the programs of a transcript instead, and print it with the answers of now.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "programs", "steps", "seed", "failures"])]
    pub retell: Option<PathBuf>,
    /// Plant a bug in the model, to see it found.
    #[arg(long, value_name = "NAME")]
    pub plant: Option<String>,
    /// How results are shown.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Who runs the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// The running kernel.
    Kernel,
    /// The model.
    Model,
    /// Both; they are compared.
    Both,
}

/// Runs what `args` ask for and prints what came out.
pub(super) fn run(args: &MmArgs, out: &mut dyn Write) -> Result<(), ConformanceError> {
    let settings = Settings::read().map_err(ConformanceError::Machine)?;
    let facts = Facts {
        thp: settings.thp,
        planted: args.plant.as_deref().map(planted).transpose()?,
    };
    let mut pair = Pair::open(facts, args.host)?;
    if let Some(path) = &args.retell {
        return retell(&mut pair, &settings, (path, args.host), out);
    }
    let mut report = Report::new(settings);
    match &args.row {
        Some(name) => {
            let outcomes = rows::run(&mut pair, &report.settings, args.host, name)?;
            report.add_rows(outcomes);
        }
        None => random_programs(args, &mut pair, &mut report)?,
    }
    report.print(args, out)
}

fn planted(name: &str) -> Result<Mutant, ConformanceError> {
    let all = Mutant::CALLS;
    let found = all.iter().find(|mutant| mutant.name() == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|mutant| mutant.name()).collect();
        let names = names.join(", ");
        ConformanceError::Usage(format!(
            "there is no bug {name} to plant; there are {names}"
        ))
    })
}

fn random_programs(
    args: &MmArgs,
    pair: &mut Pair,
    report: &mut Report,
) -> Result<(), ConformanceError> {
    for seed in args.seed..args.seed.saturating_add(args.programs) {
        let program = random::program(seed, args.steps.into(), &report.settings);
        match pair.judge(&program)? {
            Verdict::Same(Extent::Whole) => report.passed += 1,
            Verdict::Same(Extent::Part) => {
                report.passed += 1;
                report.cut += 1;
            }
            Verdict::Unrepeated => report.unrepeated.push(seed),
            Verdict::Different(found) => {
                let short = pair.shorten(&program, found.what);
                match describe(pair, seed, short)? {
                    Some(failure) => report.failures.push(failure),
                    // It went away while it was looked at: memory was short for a while.
                    None => report.unrepeated.push(seed),
                }
            }
        }
        if report.failures.len() as u64 >= args.failures {
            break;
        }
    }
    Ok(())
}

/// The difference that a short program shows; `None` if it shows none any more.
fn describe(
    pair: &mut Pair,
    seed: u64,
    short: Program,
) -> Result<Option<Failure>, ConformanceError> {
    let Err(found) = pair.compare(&short)? else {
        return Ok(None);
    };
    let whole = short.with_last_look();
    let call = whole.steps.get(found.step).map(|step| line(&step.call));
    let found = format!("after {}: {}", call.unwrap_or_default(), found.text);
    Ok(Some(Failure { seed, short, found }))
}

/// Runs the programs of a transcript again and prints them with the answers of now.
fn retell(
    pair: &mut Pair,
    settings: &Settings,
    what: (&Path, Host),
    out: &mut dyn Write,
) -> Result<(), ConformanceError> {
    let (path, host) = what;
    let wrong = |why: String| ConformanceError::Usage(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|why| wrong(format!("cannot be read: {why}")))?;
    let programs = notation::parse(&text).map_err(wrong)?;
    let release = settings.release.split('-').next().unwrap_or_default();
    writeln!(out, "# Linux {release}")?;
    for told in programs {
        let seen = if host == Host::Model {
            let seen = pair.model(&told.program);
            seen.map_err(|bad| ConformanceError::Failed(bad.rule))?
        } else {
            pair.kernel(&told.program)?
        };
        write!(out, "{}", told.with_answers(&seen))?;
    }
    Ok(())
}
