//! `gpusvm explore`: worlds that exist only in memory.
//!
//! The same framework, driver and device as on the live host run on a model of the Linux mm, under a
//! scheduler that chooses who goes on at every step. A world follows from its choices alone: a failure is
//! a tape, which replays bit by bit, and which is made short before it is shown.
//!
//! | module | what |
//! |---|---|
//! | `plan` | what a world is made of; worlds that have names |
//! | `world`, `node` | a process, devices, actors, put together |
//! | `cpu`, `gpu`, `op` | what the actors do |
//! | `chaos` | what fails on purpose |
//! | `ledger` | which values may be read |
//! | `oracle` | when the rules of `crate::world` are looked at |
//! | `orders` | locks that different worlds take in different orders |
//! | `port`, `space` | what stands between the driver and its device, and the host |
//! | `doing`, `coverage` | what every actor is doing; which operations have met which entries |
//! | `births` | where what leaks was taken |
//! | `failure` | what becomes of a world that fails: its tape is made short, saved, shown, replayed |
//! | `exam` | known bugs, each of which must be found |

mod births;
mod chaos;
mod coverage;
mod cpu;
mod doing;
mod exam;
mod failure;
mod gpu;
mod ledger;
mod node;
mod op;
mod oracle;
mod orders;
mod plan;
mod port;
mod space;
mod world;

use std::borrow::Cow;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use gpusvm::mutant::Mutant;
use gpusvm::seam::env::Ns;
use gpusvm_model::sched::{Chaos, Explorer, Kind, Options, Picker, Points, Sim, Summary};
use serde_json::{Value, json};

use crate::args::ExploreArgs;
use crate::cpu_time;
use crate::explore::coverage::{Coverage, Details};
use crate::explore::doing::Watch;
use crate::explore::failure::{Failure, again, check_writable, explain, save, tape_path};
use crate::explore::plan::{PLANS, Plan};
use crate::progress::Worlds;
use crate::table::Table;

/// Runs of a world that shortening a tape may take.
const SHRINK_RUNS: u32 = 3000;
/// Where another actor may go on: wherever something is about to happen that another one can see. What
/// follows a release is local, or has a point of its own: a lock is about to be taken, a word to be
/// waited for, an entry to be written, a unit to try again. The same orders are possible as with more
/// points, but not with the same chances: what needs a long rest at a place that is one point is rare.
/// So some worlds have all points. (The model's own steps end at a point and begin at another one, so
/// that one of the two is enough.)
const POINTS: Points = Points::ALL.without(&[Kind::Unlock, Kind::Pte]);
const ALL_POINTS_ONE_IN: u32 = 4;
/// One world in so many is watched for coverage, where nobody asks for more.
const WATCHED_ONE_IN: u64 = 16;
/// Events that are shown of a failure.
const EVENTS: usize = 90;

/// Why `explore` failed.
#[derive(Debug)]
pub enum ExploreError {
    /// There is no such kind of world.
    NoScenario(String),
    /// There is no such bug.
    NoMutant(String),
    /// A tape cannot be read, is damaged, or of another version.
    Tape(PathBuf, String),
    /// Nothing can be written where tapes are to be saved; nothing has run.
    Place(PathBuf, std::io::Error),
    /// A tape cannot be written after all.
    Save(PathBuf, std::io::Error),
    /// A world failed.
    Failed(String),
    /// These bugs were not found.
    NotFound(Vec<&'static str>),
    /// Nobody reads the output.
    Output(std::io::Error),
}

impl ExploreError {
    /// Exit code of the command.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoScenario(_) | Self::NoMutant(_) | Self::Tape(..) | Self::Place(..) => 2,
            Self::Save(..) | Self::Failed(_) | Self::NotFound(_) | Self::Output(_) => 1,
        }
    }
}

impl fmt::Display for ExploreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoScenario(name) => {
                let names: Vec<_> = PLANS.iter().map(|plan| plan.name).collect();
                write!(
                    f,
                    "there is no scenario {name}; there are {}, and all",
                    names.join(", ")
                )
            }
            Self::NoMutant(name) => {
                let names: Vec<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
                write!(
                    f,
                    "there is no mutant {name}; there are {}, and all",
                    names.join(", ")
                )
            }
            Self::Tape(path, why) => write!(f, "tape {}: {why}", path.display()),
            Self::Place(path, why) | Self::Save(path, why) => write!(
                f,
                "cannot write a tape to {}: {why}; name another place with --save",
                path.display()
            ),
            Self::Failed(what) => write!(f, "a world failed: {what}"),
            Self::NotFound(names) => write!(f, "not found: {}", names.join(", ")),
            Self::Output(why) => write!(f, "standard output: {why}"),
        }
    }
}

impl std::error::Error for ExploreError {}

impl From<std::io::Error> for ExploreError {
    fn from(why: std::io::Error) -> Self {
        Self::Output(why)
    }
}

/// Runs what `args` ask for and prints what came out.
///
/// # Errors
/// [`ExploreError`]; [`Failed`](ExploreError::Failed) where a rule was broken.
pub fn explore(args: &ExploreArgs, out: &mut dyn Write) -> Result<(), ExploreError> {
    if let Some(path) = &args.tape {
        return again(path, args, out);
    }
    match args.mutant.as_deref() {
        Some("all") => exam::run(args, Mutant::ALL, out),
        Some(names) => exam::run(args, &mutants_named(names)?, out),
        None => {
            let plans = plans(args, "swarm")?;
            args.save.as_deref().map_or(Ok(()), check_writable)?;
            swarm(args, &plans, None, out)
        }
    }
}

fn mutants_named(names: &str) -> Result<Vec<Mutant>, ExploreError> {
    names.split(',').map(mutant_named).collect()
}

/// Kinds of worlds that are asked for.
fn plans(args: &ExploreArgs, default: &str) -> Result<Vec<&'static Plan>, ExploreError> {
    let name = args.scenario.as_deref().unwrap_or(default);
    if name == "all" {
        return Ok(PLANS.iter().collect());
    }
    let plan = Plan::named(name).ok_or_else(|| ExploreError::NoScenario(name.to_owned()))?;
    Ok(vec![plan])
}

fn mutant_named(name: &str) -> Result<Mutant, ExploreError> {
    let found = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
    found
        .copied()
        .ok_or_else(|| ExploreError::NoMutant(name.to_owned()))
}

/// How worlds of a plan run, with a bug or without.
fn options(plan: &'static Plan, mutant: Option<Mutant>) -> Options {
    Options {
        scenario: Cow::Borrowed(plan.name),
        mutant: mutant.map(|mutant| mutant.name().to_owned()),
        safety_steps: 20_000,
        calm_steps: 40_000,
        tick: Ns(1),
        jump_one_in: 40,
        points: POINTS,
        all_points_one_in: ALL_POINTS_ONE_IN,
        chaos: match plan.chaos {
            0 => Chaos::Off,
            n => Chaos::OneIn(n),
        },
        events: EVENTS,
        ..Options::default()
    }
}

fn explorer(
    plan: &'static Plan,
    mutant: Option<Mutant>,
    threads: usize,
) -> Explorer<impl Fn(&Sim) + Sync> {
    watching(plan, mutant, threads, 0)
}

/// As [`explorer`], with one in so many worlds watched; 0 for none.
fn watching(
    plan: &'static Plan,
    mutant: Option<Mutant>,
    threads: usize,
    one_in: u64,
) -> Explorer<impl Fn(&Sim) + Sync> {
    let watch = move |seed: u64| match one_in {
        0 => Watch::default(),
        n if seed.is_multiple_of(n) => Watch::on(),
        _ => Watch::default(),
    };
    Explorer {
        options: options(plan, mutant),
        picker: Picker::swarm,
        threads,
        build: move |sim: &Sim| world::build(plan, watch(sim.seed()), sim),
    }
}

fn threads(args: &ExploreArgs) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.map_or_else(all, usize::from)
}

/// Worlds of each plan, until one fails; with a bug, in tests.
fn swarm(
    args: &ExploreArgs,
    plans: &[&'static Plan],
    mutant: Option<Mutant>,
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let mut table = Table::new(&[
        "scenario", "worlds", "steps", "worlds/s", "per core", "hash", "result",
    ]);
    let mut all = Vec::new();
    let mut failure = None;
    let mut agree = Ok(());
    let mut coverage = Coverage::default();
    for plan in plans {
        let one_in = if args.coverage { 1 } else { WATCHED_ONE_IN };
        let explorer = watching(plan, mutant, threads(args), one_in);
        let seeds = args.seed..args.seed.saturating_add(args.seeds);
        let bar = Worlds::new(plan.name, args.seeds);
        let run = || explorer.run_seeds(seeds, &|worlds| bar.ran(worlds));
        let (summary, cpu) = cpu_time::taken(run);
        drop(bar);
        coverage.add(plan, &summary.reached);
        table.row(row(plan, &summary, cpu));
        all.push(summary_json(plan, &summary, cpu));
        if let Some((seed, trouble)) = summary.failure {
            failure = Some(Failure {
                plan,
                mutant,
                seed,
                trouble,
            });
            break;
        }
        agree = agree.and(orders::must_agree(plan.name, &summary.lock_cycles));
    }
    if args.output.json {
        let short = failure.as_ref().map(|failure| (failure, failure.shorten()));
        let details = if args.coverage {
            Details::All
        } else {
            Details::Summary
        };
        let object = json!({
            "schema": 1,
            "verified": failure.is_none() && agree.is_ok(),
            "scenarios": all,
            "coverage": coverage.json(details),
            "failure": short.as_ref().map(|(failure, tape)| failure.json(tape, tape_path(args))),
        });
        writeln!(out, "{object:#}")?;
        if let Some((_, tape)) = short {
            save(tape_path(args), &tape)?;
        }
    } else {
        write!(out, "{table}")?;
        if args.coverage {
            write!(out, "\n{}", coverage.table())?;
        }
        writeln!(out, "{}", coverage.line())?;
        if let Some(failure) = &failure {
            explain(failure, tape_path(args), out)?;
        }
    }
    failure.map_or(agree, |failure| Err(ExploreError::Failed(failure.text())))
}

/// Worlds in a second of processor time: what one core does that has nothing else to do.
fn per_core(summary: &Summary, cpu: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown to people")]
    let worlds = summary.worlds as f64;
    worlds / cpu.as_secs_f64().max(1e-9)
}

fn row(plan: &Plan, summary: &Summary, cpu: Duration) -> Vec<String> {
    vec![
        plan.name.to_owned(),
        summary.worlds.to_string(),
        summary.steps.to_string(),
        format!("{:.0}", summary.rate()),
        format!("{:.0}", per_core(summary, cpu)),
        format!("{:#018x}", summary.hash),
        if summary.failure.is_some() || !summary.lock_cycles.is_empty() {
            "FAILED"
        } else {
            "ok"
        }
        .to_owned(),
    ]
}

fn summary_json(plan: &Plan, summary: &Summary, cpu: Duration) -> Value {
    json!({
        "scenario": plan.name,
        "what": plan.what,
        "worlds": summary.worlds,
        "steps": summary.steps,
        "worlds_per_s": summary.rate(),
        "worlds_per_s_and_core": per_core(summary, cpu),
        "hash": format!("{:#018x}", summary.hash),
        "failed_seed": summary.failure.as_ref().map(|(seed, _)| *seed),
        "lock_cycles": orders::json(&summary.lock_cycles),
    })
}
