//! The exam: known bugs are re-introduced one by one, and worlds run until one fails. Its tape is then
//! made short, so that it says what it takes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gpusvm::mutant::Mutant;
use gpusvm_model::sched::{Tape, Trouble};
use serde_json::json;

use crate::args::ExploreArgs;
use crate::cpu_time;
use crate::explore::failure::{check_writable, save, shorten, show};
use crate::explore::plan::Plan;
use crate::explore::{ExploreError, explorer, plans};
use crate::progress::Worlds;
use crate::table::Table;

/// Worlds of one plan that run before the next plan has its turn.
const ROUND: u64 = 32;
/// Processor time after which a bug counts as not found.
const BUDGET: Duration = Duration::from_secs(60);
/// Choices that a tape may have.
const SHORT: usize = 30;
/// Other worlds of the same kind that are made short where the first has more.
const OTHERS: u32 = 5;
/// Worlds among which the next one must be.
const OTHER_WORLDS: u64 = 5000;

/// What became of one bug.
struct Answer {
    mutant: Mutant,
    found: Option<Found>,
    /// Worlds until then.
    worlds: u64,
    took: Duration,
}

/// A world that failed.
struct Found {
    plan: &'static Plan,
    seed: u64,
    trouble: Box<Trouble>,
    /// Its tape, made short.
    tape: Tape,
}

/// Looks for each of `mutants`.
pub(super) fn run(
    args: &ExploreArgs,
    mutants: &[Mutant],
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let plans = plans(args, "all")?;
    if let Some(path) = &args.save {
        check_place(path, mutants)?;
    }
    let mut answers = Vec::new();
    for mutant in mutants {
        let answer = look_for(*mutant, &plans, args.seed);
        if !args.output.json {
            writeln!(out, "{}", line(&answer))?;
        }
        answers.push(answer);
    }
    if let Some(path) = &args.save {
        save_all(path, &answers)?;
    }
    let missed = |answer: &&Answer| answer.found.is_none();
    let missed = answers.iter().filter(missed);
    let missed: Vec<_> = missed.map(|answer| answer.mutant.name()).collect();
    if args.output.json {
        let all: Vec<_> = answers.iter().map(answer_json).collect();
        let object = json!({ "schema": 1, "verified": missed.is_empty(), "mutants": all });
        writeln!(out, "{object:#}")?;
    } else {
        writeln!(out, "\n{}", summary(&answers))?;
        if let [
            Answer {
                found: Some(found), ..
            },
        ] = &answers[..]
        {
            show(found.plan, found.seed, (&found.tape, &found.trouble), out)?;
        }
        if let Some(path) = &args.save {
            let path = path.display();
            writeln!(out, "replay: gpusvm explore --mutant NAME --tape {path}")?;
        }
    }
    if missed.is_empty() {
        Ok(())
    } else {
        Err(ExploreError::NotFound(missed))
    }
}

/// Saves the tape of one bug to a file, those of several to a folder.
fn save_all(path: &Path, answers: &[Answer]) -> Result<(), ExploreError> {
    if let [answer] = answers {
        return answer
            .found
            .as_ref()
            .map_or(Ok(()), |found| save(path, &found.tape));
    }
    for answer in answers {
        if let Some(found) = &answer.found {
            save(&tape_in(path, answer.mutant), &found.tape)?;
        }
    }
    Ok(())
}

/// Asks whether their tapes can be written there; makes the folder of several.
fn check_place(path: &Path, mutants: &[Mutant]) -> Result<(), ExploreError> {
    if let [_] = mutants {
        return check_writable(path);
    }
    std::fs::create_dir_all(path).map_err(|why| ExploreError::Place(path.to_owned(), why))?;
    mutants
        .iter()
        .try_for_each(|mutant| check_writable(&tape_in(path, *mutant)))
}

/// The tape of one bug, in the folder of several.
fn tape_in(folder: &Path, mutant: Mutant) -> PathBuf {
    folder.join(format!("{}.tape", mutant.name()))
}

/// Runs worlds of all plans in turn, on one thread, until one fails.
fn look_for(mutant: Mutant, plans: &[&'static Plan], first: u64) -> Answer {
    let bar = Worlds::new(mutant.name(), 0);
    bar.say("not found yet");
    let mut took = Duration::ZERO;
    let mut worlds = 0;
    let mut seed = first;
    let mut failed = None;
    while failed.is_none() && took < BUDGET {
        for plan in plans {
            let explorer = explorer(plan, Some(mutant), 1);
            let run = || explorer.run_seeds(seed..seed + ROUND, &|worlds| bar.ran(worlds));
            let (summary, cpu) = cpu_time::taken(run);
            worlds += summary.worlds;
            took += cpu;
            if let Some((seed, trouble)) = summary.failure {
                failed = Some((*plan, seed, trouble));
                break;
            }
        }
        seed += ROUND;
    }
    let found = failed.map(|(plan, seed, trouble)| shortest(plan, mutant, seed, trouble));
    Answer {
        mutant,
        found,
        worlds,
        took,
    }
}

/// The failure with its tape made short. Where that is not short enough other worlds are asked: one race
/// can be told in many ways.
fn shortest(plan: &'static Plan, mutant: Mutant, seed: u64, trouble: Box<Trouble>) -> Found {
    let shortened = |seed, trouble: Box<Trouble>| Found {
        plan,
        seed,
        tape: shorten(plan, Some(mutant), &trouble),
        trouble,
    };
    let mut best = shortened(seed, trouble);
    let mut next = seed + 1;
    for _other in 0..OTHERS {
        if best.tape.interesting() <= SHORT {
            break;
        }
        let explorer = explorer(plan, Some(mutant), 1);
        let failure = explorer
            .run_seeds(next..next + OTHER_WORLDS, &|_worlds| {})
            .failure;
        let Some((seed, trouble)) = failure else {
            break;
        };
        let other = shortened(seed, trouble);
        if other.tape.interesting() < best.tape.interesting() {
            best = other;
        }
        next = seed + 1;
    }
    best
}

fn line(answer: &Answer) -> String {
    let name = answer.mutant.name();
    let seconds = answer.took.as_secs_f64();
    let worlds = answer.worlds;
    let result = match &answer.found {
        Some(found) => {
            let first = found
                .trouble
                .failure
                .text
                .lines()
                .next()
                .unwrap_or_default();
            format!("{}: {first}", found.plan.name)
        }
        None => "NOT FOUND".to_owned(),
    };
    format!("{name:28} {worlds:>8} worlds {seconds:>7.2} s  {result}")
}

fn summary(answers: &[Answer]) -> Table {
    let mut table = Table::new(&[
        "mutant",
        "found",
        "worlds",
        "CPU s",
        "choices",
        "what it is",
    ]);
    for answer in answers {
        let found = answer.found.as_ref();
        table.row(vec![
            answer.mutant.name().to_owned(),
            found.map_or_else(
                || "NO".to_owned(),
                |found| format!("{}, {:?}", found.plan.name, found.trouble.failure.kind),
            ),
            answer.worlds.to_string(),
            format!("{:.2}", answer.took.as_secs_f64()),
            found.map_or_else(String::new, |found| found.tape.interesting().to_string()),
            answer.mutant.what().to_owned(),
        ]);
    }
    table
}

fn answer_json(answer: &Answer) -> serde_json::Value {
    let found = answer.found.as_ref();
    json!({
        "mutant": answer.mutant.name(),
        "what": answer.mutant.what(),
        "found": found.is_some(),
        "scenario": found.map(|found| found.plan.name),
        "seed": found.map(|found| found.seed),
        "violation": found.map(|found| &found.trouble.failure.text),
        "choices": found.map(|found| found.tape.interesting()),
        "worlds": answer.worlds,
        "cpu_s": answer.took.as_secs_f64(),
    })
}
