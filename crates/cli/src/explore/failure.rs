//! Worlds that fail: their tapes are made short, saved, shown and replayed.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use gpusvm::mutant::Mutant;
use gpusvm_model::sched::{Options, Outcome, Tape, Texts, Trouble, replay};
use serde_json::{Value, json};

use crate::args::ExploreArgs;
use crate::explore::doing::Watch;
use crate::explore::plan::Plan;
use crate::explore::{ExploreError, SHRINK_RUNS, explorer, mutant_named, options, world};
use crate::size::counted;

/// Where the tape of a failure goes.
pub(super) fn tape_path(args: &ExploreArgs) -> &Path {
    args.save.as_deref().unwrap_or(Path::new("gpusvm.tape"))
}

/// A world that failed.
pub(super) struct Failure {
    pub(super) plan: &'static Plan,
    pub(super) mutant: Option<Mutant>,
    pub(super) seed: u64,
    pub(super) trouble: Box<Trouble>,
}

impl Failure {
    /// What was broken.
    pub(super) fn text(&self) -> String {
        self.trouble.failure.text.clone()
    }

    pub(super) fn shorten(&self) -> Tape {
        shorten(self.plan, self.mutant, &self.trouble)
    }

    pub(super) fn json(&self, tape: &Tape, path: &Path) -> Value {
        json!({
            "scenario": self.plan.name,
            "seed": self.seed,
            "violation": self.text(),
            "choices": tape.interesting(),
            "tape": path.display().to_string(),
        })
    }
}

/// The tape of a failure is made short, shown and saved.
pub(super) fn explain(
    failure: &Failure,
    path: &Path,
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let tape = failure.shorten();
    show(failure.plan, failure.seed, (&tape, &failure.trouble), out)?;
    save(path, &tape)?;
    writeln!(
        out,
        "{}; replay: gpusvm explore --tape {}",
        counted(
            tape.interesting() as u64,
            "choice that matters",
            "choices that matter"
        ),
        path.display()
    )?;
    Ok(())
}

/// Shows the failure of a tape, which is a short form of `trouble`.
pub(super) fn show(
    plan: &'static Plan,
    seed: u64,
    (tape, trouble): (&Tape, &Trouble),
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let short = play(plan, tape, tape_mutant(tape)?);
    let shown = short.trouble.as_deref().unwrap_or(trouble);
    writeln!(out, "\nseed {seed} of {} fails. {shown}", plan.name)?;
    Ok(())
}

/// A tape that fails in the same way, with as few choices as can be found.
pub(super) fn shorten(plan: &'static Plan, mutant: Option<Mutant>, trouble: &Trouble) -> Tape {
    explorer(plan, mutant, 1).shrink(trouble, SHRINK_RUNS, &mut |_progress| {})
}

pub(super) fn save(path: &Path, tape: &Tape) -> Result<(), ExploreError> {
    std::fs::write(path, tape.to_string()).map_err(|why| ExploreError::Save(path.to_owned(), why))
}

/// Asks whether a tape can be written there, before work is done for it. What is there stays.
pub(super) fn check_writable(path: &Path) -> Result<(), ExploreError> {
    let place = |why| ExploreError::Place(path.to_owned(), why);
    let new = !path.exists();
    let mut options = OpenOptions::new();
    drop(
        options
            .append(true)
            .create(true)
            .open(path)
            .map_err(place)?,
    );
    if new {
        std::fs::remove_file(path).map_err(place)?;
    }
    Ok(())
}

/// The bug that a tape was recorded with.
pub(super) fn tape_mutant(tape: &Tape) -> Result<Option<Mutant>, ExploreError> {
    tape.mutant.as_deref().map(mutant_named).transpose()
}

/// Runs the world of a tape, with texts.
pub(super) fn play(plan: &'static Plan, tape: &Tape, mutant: Option<Mutant>) -> Outcome {
    let options = Options {
        texts: Texts::Kept,
        ..options(plan, mutant)
    };
    replay(&options, tape, |sim| {
        world::build(plan, Watch::on(), sim);
    })
}

/// The world of a tape, again.
pub(super) fn again(
    path: &Path,
    args: &ExploreArgs,
    out: &mut dyn Write,
) -> Result<(), ExploreError> {
    let text = std::fs::read_to_string(path);
    let damaged = |why: String| ExploreError::Tape(path.to_owned(), why);
    let text = text.map_err(|why| damaged(format!("cannot be read: {why}")))?;
    let tape: Tape = text.parse().map_err(|why| damaged(format!("{why}")))?;
    let plan = Plan::named(&tape.scenario)
        .ok_or_else(|| ExploreError::NoScenario(tape.scenario.to_string()))?;
    let mutant = match args.mutant.as_deref() {
        None => tape_mutant(&tape)?,
        Some("none") => None,
        Some(name) => Some(mutant_named(name)?),
    };
    gpusvm_model::sched::keep_panics_quiet();
    let outcome = play(plan, &tape, mutant);
    let failure = outcome
        .trouble
        .as_ref()
        .map(|trouble| trouble.failure.text.clone());
    if args.output.json {
        let object = json!({
            "schema": 1,
            "verified": failure.is_none(),
            "scenario": plan.name,
            "steps": outcome.steps,
            "hash": format!("{:#018x}", outcome.hash),
            "as_recorded": tape.hash.map(|hash| hash == outcome.hash),
            "failure": failure,
        });
        writeln!(out, "{object:#}")?;
    } else {
        writeln!(
            out,
            "{}: {}, hash {:#018x}",
            plan.name,
            counted(outcome.steps, "step", "steps"),
            outcome.hash
        )?;
        if args.mutant.is_none() && tape.hash.is_some_and(|hash| hash != outcome.hash) {
            writeln!(
                out,
                "this is another world than the one that was recorded: tapes replay where they were made"
            )?;
        }
        if let Some(trouble) = &outcome.trouble {
            writeln!(out, "{trouble}")?;
        }
    }
    failure.map_or(Ok(()), |text| Err(ExploreError::Failed(text)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};
    use crate::explore::{plans, swarm};

    #[test]
    fn a_world_that_fails_is_one_json_object_and_a_tape() {
        let path = std::env::temp_dir().join(format!("gpusvm-{}.tape", std::process::id()));
        let line = ["gpusvm", "explore", "--json", "--threads", "1", "--save"];
        let line = line.map(std::ffi::OsStr::new);
        let line = line.into_iter().chain([path.as_os_str()]);
        let Some(Command::Explore(args)) = Cli::parse_from(line).command else {
            panic!("it is explore");
        };
        let plans = plans(&args, "swarm").expect("it is there");
        let mut out = Vec::new();
        let ended = swarm(&args, &plans, Some(Mutant::RecheckDropped), &mut out);
        let why = ended.expect_err("it has a bug").to_string();
        let object: Value = serde_json::from_slice(&out).expect("one JSON object");
        let failure = &object["failure"];
        assert_eq!(object["verified"], false);
        assert_eq!(failure["scenario"], "swarm");
        assert!(failure["seed"].is_u64() && failure["choices"].is_u64());
        assert!(why.ends_with(failure["violation"].as_str().expect("text")));
        let tape = std::fs::read_to_string(&path).expect("it was saved");
        std::fs::remove_file(&path).expect("it is ours");
        assert!(tape.parse::<Tape>().is_ok(), "{tape}");
    }
}
