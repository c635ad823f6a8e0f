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
            let text =
                text.map_err(|why| ConformanceError::Input(format!("{}: {why}", path.display())))?;
            parse(&path.display().to_string(), &text)?
        }
    };
    let there = |number: &&u32| !all.iter().any(|scenario| scenario.number() == **number);
    if let Some(missing) = numbers.iter().find(there) {
        return Err(ConformanceError::Usage(format!(
            "there is no scenario {missing}; tests/scenarios/absent.txt says what it waits for"
        )));
    }
    if !numbers.is_empty() {
        all.retain(|scenario| numbers.contains(&scenario.number()));
    }
    Ok(all)
}
