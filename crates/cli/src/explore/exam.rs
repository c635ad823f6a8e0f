//! The exam: known bugs are re-introduced one by one, and worlds run until one fails.

use std::io::Write;
use std::time::Duration;

use gpusvm::mutant::Mutant;
use gpusvm_model::sched::Trouble;
use serde_json::json;

use crate::args::ExploreArgs;
use crate::cpu_time;
use crate::explore::plan::{PLANS, Plan};
use crate::explore::{ExploreError, explain, explorer};
use crate::progress::Worlds;
use crate::table::Table;

/// Worlds of one plan that run before the next plan has its turn.
const ROUND: u64 = 256;
/// Processor time after which a bug counts as not found.
const BUDGET: Duration = Duration::from_secs(60);

/// What became of one bug.
struct Answer {
    mutant: Mutant,
    /// The world that failed, its seed, and how.
    found: Option<(&'static Plan, u64, Box<Trouble>)>,
    /// Worlds until then.
    worlds: u64,
    took: Duration,
}

/// Looks for each of `mutants`.
pub(super) fn run(
    args: &ExploreArgs,
    mutants: &[Mutant],
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let mut answers = Vec::new();
    for mutant in mutants {
        let answer = look_for(*mutant, args.seed);
        if !args.output.json {
            writeln!(out, "{}", line(&answer))?;
        }
        answers.push(answer);
    }
    let missed: Vec<_> = answers
        .iter()
        .filter(|answer| answer.found.is_none())
        .map(|answer| answer.mutant.name())
        .collect();
    if args.output.json {
        let all: Vec<_> = answers.iter().map(answer_json).collect();
        let object = json!({ "schema": 1, "verified": missed.is_empty(), "mutants": all });
        writeln!(out, "{object:#}")?;
    } else {
        writeln!(out, "\n{}", summary(&answers))?;
        if let [
            Answer {
                mutant,
                found: Some((plan, seed, trouble)),
                ..
            },
        ] = &answers[..]
        {
            let _broken = explain(args, (plan, Some(*mutant), *seed), trouble, out)?;
        }
    }
    if missed.is_empty() {
        Ok(())
    } else {
        Err(ExploreError::NotFound(missed))
    }
}

/// Runs worlds of all plans in turn, on one thread, until one fails.
fn look_for(mutant: Mutant, first: u64) -> Answer {
    let bar = Worlds::new(mutant.name(), 0);
    bar.say("not found yet");
    let mut took = Duration::ZERO;
    let mut worlds = 0;
    let mut seed = first;
    let mut found = None;
    while found.is_none() && took < BUDGET {
        for plan in PLANS {
            let explorer = explorer(plan, Some(mutant), 1);
            let run = || explorer.run_seeds(seed..seed + ROUND, &|worlds| bar.ran(worlds));
            let (summary, cpu) = cpu_time::taken(run);
            worlds += summary.worlds;
            took += cpu;
            if let Some((seed, trouble)) = summary.failure {
                found = Some((plan, seed, trouble));
                break;
            }
        }
        seed += ROUND;
    }
    Answer {
        mutant,
        found,
        worlds,
        took,
    }
}

fn line(answer: &Answer) -> String {
    let name = answer.mutant.name();
    let seconds = answer.took.as_secs_f64();
    match &answer.found {
        Some((plan, _, trouble)) => {
            let first = trouble.failure.text.lines().next().unwrap_or_default();
            format!(
                "{name:28} {:>8} worlds {seconds:>7.2} s  {}: {first}",
                answer.worlds, plan.name
            )
        }
        None => format!(
            "{name:28} {:>8} worlds {seconds:>7.2} s  NOT FOUND",
            answer.worlds
        ),
    }
}

fn summary(answers: &[Answer]) -> Table {
    let mut table = Table::new(&["mutant", "found", "worlds", "CPU s", "what it is"]);
    for answer in answers {
        table.row(vec![
            answer.mutant.name().to_owned(),
            match &answer.found {
                Some((plan, _, trouble)) => format!("{}, {:?}", plan.name, trouble.failure.kind),
                None => "NO".to_owned(),
            },
            answer.worlds.to_string(),
            format!("{:.2}", answer.took.as_secs_f64()),
            answer.mutant.what().to_owned(),
        ]);
    }
    table
}

fn answer_json(answer: &Answer) -> serde_json::Value {
    json!({
        "mutant": answer.mutant.name(),
        "what": answer.mutant.what(),
        "found": answer.found.is_some(),
        "scenario": answer.found.as_ref().map(|(plan, ..)| plan.name),
        "violation": answer.found.as_ref().map(|(_, _, trouble)| &trouble.failure.text),
        "worlds": answer.worlds,
        "cpu_s": answer.took.as_secs_f64(),
    })
}
