//! `gpusvm conformance mm`: the same calls on the running kernel and on the model.
//!
//! | module | what |
//! |---|---|
//! | `program` | programs of calls, and how one reads |
//! | `random` | programs from numbers |
//! | `model` | a program on the model |
//! | `compare` | where two answers differ |
//! | `shrink` | a failing program made short |
//! | `settings` | what the machine's kernel is and how it is set up |

mod compare;
mod model;
mod notation;
mod program;
mod random;
mod settings;
mod shrink;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gpusvm::addr::HostVa;
use gpusvm::mutant::Mutant;
use gpusvm_live::scratch::{Scratch, ScratchError, Seen};

use crate::args::OutputArgs;
use crate::conformance::ConformanceError;
use crate::conformance::mm::compare::{Difference, What, difference};
use crate::conformance::mm::model::Facts;
use crate::conformance::mm::program::{BASE, Program, Size, line};
use crate::conformance::mm::settings::Settings;

/// Runs of a program that making it short may take.
const SHRINK_RUNS: u32 = 2000;
/// How often a difference has to come again before it counts.
const REPEATS: usize = 2;

/// Options of `conformance mm`.
#[derive(Args, Clone, Debug)]
pub struct MmArgs {
    /// Who runs the programs.
    #[arg(long, value_enum, default_value_t = Host::Both)]
    pub host: Host,
    /// How many random programs.
    #[arg(long, default_value_t = 1000)]
    pub programs: u64,
    /// Calls of each.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=96))]
    pub steps: u16,
    /// Number of the first program.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Plant a difference in the model, to see it found.
    #[arg(long, value_name = "NAME")]
    pub plant: Option<String>,
    /// Run the programs of a transcript instead, and print it with the answers that the host gives now.
    #[arg(long, value_name = "FILE")]
    pub retell: Option<PathBuf>,
    /// Failing programs to show before giving up.
    #[arg(long, default_value_t = 1)]
    pub failures: u64,
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

pub(super) fn run(args: &MmArgs, out: &mut dyn Write) -> Result<(), ConformanceError> {
    let settings = Settings::read().map_err(ConformanceError::Machine)?;
    let facts = Facts {
        thp: settings.thp,
        planted: args.plant.as_deref().map(planted).transpose()?,
    };
    let mut pair = Pair::open(facts)?;
    if let Some(path) = &args.retell {
        return retell(&mut pair, &settings, path, args.host, out);
    }
    let mut failed = 0;
    let mut noise = 0;
    for seed in args.seed..args.seed.saturating_add(args.programs) {
        let program = random::program(seed, args.steps.into());
        let Some(found) = pair.compare(&program)? else {
            continue;
        };
        if !pair.repeats(&program, &found)? {
            noise += 1;
            continue;
        }
        failed += 1;
        let short = pair.shorten(&program, found.what);
        writeln!(
            out,
            "program {seed} differs; {} steps that matter:\n",
            short.steps.len()
        )?;
        write!(out, "{}", short.script())?;
        if let Some(found) = pair.compare(&short)? {
            let all = short.with_last_look();
            let call = all.steps.get(found.step).map(|step| line(&step.call));
            writeln!(
                out,
                "\nafter {}: {}\n",
                call.unwrap_or_default(),
                found.text
            )?;
        }
        if failed >= args.failures {
            break;
        }
    }
    writeln!(out, "{noise} did not repeat")?;
    writeln!(
        out,
        "{} passed, {failed} failed, 0 skipped",
        args.programs - failed
    )?;
    Ok(())
}

/// Runs the programs of a transcript again and prints them with the answers of now.
fn retell(
    pair: &mut Pair,
    settings: &Settings,
    path: &Path,
    host: Host,
    out: &mut dyn Write,
) -> Result<(), ConformanceError> {
    let wrong = |why: String| ConformanceError::Usage(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|why| wrong(why.to_string()))?;
    let release = settings.release.split('-').next().unwrap_or_default();
    writeln!(out, "# Linux {release}")?;
    for told in notation::parse(&text).map_err(wrong)? {
        let (kernel, model) = pair.both(&told.program)?;
        let different = difference(told.program.size, &kernel, &model);
        let seen = if host == Host::Model { model } else { kernel };
        write!(out, "{}", told.with_answers(&seen))?;
        if let (Host::Both, Some(found)) = (host, different) {
            writeln!(
                out,
                "# differs after call {}: {}",
                found.step + 1,
                found.text
            )?;
        }
    }
    Ok(())
}

fn planted(name: &str) -> Result<Mutant, ConformanceError> {
    let found = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
        ConformanceError::Usage(format!(
            "there is nothing to plant called {name}; there are {}",
            names.join(", ")
        ))
    })
}

/// The kernel's windows and the model.
struct Pair {
    pages: Scratch,
    roomy: Scratch,
    blocks: Scratch,
    facts: Facts,
}

impl Pair {
    fn open(facts: Facts) -> Result<Self, ConformanceError> {
        let open = |size: Size| Scratch::open(HostVa::new(BASE), size.pages().into());
        Ok(Self {
            pages: open(Size::Pages).map_err(broken)?,
            roomy: open(Size::Roomy).map_err(broken)?,
            blocks: open(Size::Blocks).map_err(broken)?,
            facts,
        })
    }

    fn scratch(&mut self, size: Size) -> &mut Scratch {
        match size {
            Size::Pages => &mut self.pages,
            Size::Roomy => &mut self.roomy,
            Size::Blocks => &mut self.blocks,
        }
    }

    fn both(&mut self, program: &Program) -> Result<(Vec<Seen>, Vec<Seen>), ConformanceError> {
        let facts = self.facts;
        let scratch = self.scratch(program.size);
        scratch.start(&program.steps).map_err(broken)?;
        let model = model::run(program, facts);
        let kernel = scratch.finish().map_err(broken)?;
        let model = model.map_err(|bad| {
            ConformanceError::Failed(format!(
                "{} after step {} of\n{}",
                bad.rule,
                bad.step,
                program.script()
            ))
        })?;
        Ok((kernel, model))
    }

    fn compare(&mut self, program: &Program) -> Result<Option<Difference>, ConformanceError> {
        let (kernel, model) = self.both(&program.with_last_look())?;
        Ok(difference(program.size, &kernel, &model))
    }

    fn repeats(&mut self, program: &Program, found: &Difference) -> Result<bool, ConformanceError> {
        for _ in 0..REPEATS {
            if self.compare(program)?.as_ref() != Some(found) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn shorten(&mut self, program: &Program, what: What) -> Program {
        shrink::shrink(program, SHRINK_RUNS, &mut |candidate| {
            let found = self.compare(candidate);
            found.is_ok_and(|found| found.is_some_and(|found| found.what == what))
        })
    }
}

fn broken(why: ScratchError) -> ConformanceError {
    ConformanceError::Machine(why.to_string())
}
