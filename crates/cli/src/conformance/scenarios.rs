//! `gpusvm conformance scenarios`.

use std::io::Write;

use crate::conformance::{ConformanceError, Row, ScenariosArgs, show};
use crate::scenario::{Scenario, library, parse};

/// Runs the scenarios that are asked for. Rows are shown when they are there; one can take a while.
pub(super) fn rows(
    args: &ScenariosArgs,
    out: &mut dyn Write,
) -> Result<Vec<Row>, ConformanceError> {
    let mut rows = Vec::new();
    for scenario in wanted(args)? {
        let row = Row {
            name: scenario.number().to_string(),
            what: scenario.title().to_owned(),
            verdict: scenario.run(args.host.kind()),
        };
        if !args.output.json {
            show(&row, out)?;
            out.flush()?;
        }
        rows.push(row);
    }
    Ok(rows)
}

fn wanted(args: &ScenariosArgs) -> Result<Vec<Scenario>, ConformanceError> {
    let numbers = &args.numbers;
    let mut all = match &args.file {
        None => library::all()?,
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let input = |why: String| ConformanceError::Input(format!("{}: {why}", path.display()));
            let text = text.map_err(|why| input(format!("cannot be read: {why}")))?;
            let scenarios = parse(&path.display().to_string(), &text)?;
            if scenarios.is_empty() {
                let none = "there is no scenario in it: one begins with `scenario NUMBER TITLE`";
                return Err(input(none.to_owned()));
            }
            scenarios
        }
    };
    let there = |number: &&u32| !all.iter().any(|scenario| scenario.number() == **number);
    if let Some(missing) = numbers.iter().find(there) {
        return Err(ConformanceError::Usage(missing_one(args, *missing, &all)));
    }
    if !numbers.is_empty() {
        all.retain(|scenario| numbers.contains(&scenario.number()));
    }
    Ok(all)
}

/// That a scenario is not there, and why, or which ones are.
fn missing_one(args: &ScenariosArgs, number: u32, all: &[Scenario]) -> String {
    let mut absent = library::absent().into_iter();
    let absent = absent.find(|(n, _)| args.file.is_none() && *n == number);
    match absent {
        Some((_, why)) => format!("there is no scenario {number}; it waits for: {why}"),
        None => {
            let there: Vec<_> = all.iter().map(|one| one.number().to_string()).collect();
            let there = there.join(", ");
            format!("there is no scenario {number}; there are {there}")
        }
    }
}
