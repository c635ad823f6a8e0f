//! `gpusvm conformance hmm`: the cases of the HMM test device, on a host of ours, compared command by
//! command with what Linux answered.
//!
//! | module | what |
//! |---|---|
//! | `facts` | what Linux answered |
//! | `host` | what a case needs of a process and of the device: traits |
//! | `bench` | a case at work: devices, patterns, the record |
//! | `basic`, `exclusive`, `large`, `two` | the cases |
//! | `model` with `memory`, `live` | the hosts |
//!
//! A case passes when it finds the content that it should *and* its record is that of Linux. One that
//! a host could pass only without the mechanism behind it is skipped, with the reason.

mod basic;
mod bench;
mod exclusive;
mod facts;
mod host;
mod large;
mod live;
mod memory;
mod model;
mod two;

use std::io::Write;

use crate::conformance::hmm::bench::{Bench, PageMap, Trouble};
use crate::conformance::hmm::facts::Facts;
use crate::conformance::hmm::host::{Need, Variant};
use crate::conformance::{ConformanceError, HmmArgs, Host, Row, show};
use crate::scenario::Verdict;

/// One case.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    run: fn(&Bench<'_>) -> Result<(), Trouble>,
    needs: &'static [Need],
    page_map: PageMap,
}

impl Case {
    const fn new(name: &'static str, run: fn(&Bench<'_>) -> Result<(), Trouble>) -> Self {
        Self {
            name,
            run,
            needs: &[],
            page_map: PageMap::Unseen,
        }
    }

    const fn needing(self, needs: &'static [Need]) -> Self {
        Self { needs, ..self }
    }

    const fn seeing_page_map(self) -> Self {
        Self {
            page_map: PageMap::Seen,
            ..self
        }
    }
}

/// All cases, in the order of the record.
fn cases() -> impl Iterator<Item = Case> {
    let groups: [&[Case]; 4] = [&basic::CASES, &exclusive::CASES, &large::CASES, &two::CASES];
    groups.into_iter().flatten().copied()
}

/// Runs the cases that are asked for. Rows are shown when they are there.
pub(super) fn rows(args: &HmmArgs, out: &mut dyn Write) -> Result<Vec<Row>, ConformanceError> {
    let unknown = |name: &&String| !cases().any(|case| case.name == **name);
    if let Some(name) = args.cases.iter().find(unknown) {
        return Err(ConformanceError::Usage(format!(
            "there is no case {name}; without a name all are run, and shown with theirs"
        )));
    }
    let facts = Facts::read();
    let mut rows = Vec::new();
    for variant in [Variant::Private, Variant::Coherent] {
        for case in cases() {
            if !args.cases.is_empty() && !args.cases.iter().any(|name| name == case.name) {
                continue;
            }
            let row = Row {
                name: variant.name().to_owned(),
                what: case.name.to_owned(),
                verdict: verdict(args, variant, case, &facts),
            };
            if !args.output.json {
                show(&row, out)?;
                out.flush()?;
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

fn verdict(args: &HmmArgs, variant: Variant, case: Case, facts: &Facts) -> Verdict {
    let effort = if args.short {
        bench::Effort::Short
    } else {
        bench::Effort::Full
    };
    let plan = bench::Plan {
        variant,
        effort,
        page_map: case.page_map,
        run: case.run,
    };
    let coherent = (variant == Variant::Coherent).then_some(Need::CoherentMemory);
    let mut needs = coherent.iter().chain(case.needs);
    let result = match args.host {
        Host::Model => model::run(plan),
        Host::Live => match needs.find_map(|need| live::lacks(*need)) {
            Some(why) => return Verdict::Skipped(why.to_owned()),
            None => live::run(plan),
        },
    };
    let record = match result {
        Ok(record) => record,
        Err(Trouble::Lacking(why)) => return Verdict::Skipped(why),
        Err(Trouble::Wrong(why)) => return Verdict::Failed(why),
    };
    match facts.compare(variant, case.name, &record, effort) {
        Ok(()) => Verdict::Passed,
        Err(why) => Verdict::Failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_39_cases_and_facts_for_each() {
        assert_eq!(cases().count(), 39);
        let facts = Facts::read();
        for case in cases() {
            for variant in [Variant::Private, Variant::Coherent] {
                assert!(facts.has(variant, case.name), "{}", case.name);
            }
        }
    }
}
