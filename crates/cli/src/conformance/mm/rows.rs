//! Programs that have names: each shows one behaviour of Linux, with the answers it must give.
//!
//! They stand in `rows.txt` as a transcript, recorded on Linux 6.18.44 with `--retell`. Those called
//! `found` are what is left of random programs that once differed. The advices of
//! M45 are too many to be written down: what does not exist must be refused everywhere, and the two
//! hosts must agree on the rest.

use gpusvm::addr::PAGE;
use gpusvm_live::scratch::{Answer, BATCH, Call, Kind, Look, Place, Seen, Step};
use gpusvm_model::mm::Thp;

use crate::conformance::ConformanceError;
use crate::conformance::mm::Host;
use crate::conformance::mm::compare::difference;
use crate::conformance::mm::notation::{self, Told};
use crate::conformance::mm::pair::Pair;
use crate::conformance::mm::program::{Program, Size, line};
use crate::conformance::mm::settings::Settings;

const ROWS: &str = include_str!("rows.txt");
/// The row whose programs are made here.
const ADVICES: &str = "M45";
/// Advices that play memory errors: where they work, the machine loses memory.
const HARMFUL: [i32; 2] = [100, 101];

/// What came of a row.
pub(super) struct Outcome {
    /// Its name and what it shows.
    pub(super) title: String,
    /// How it went.
    pub(super) result: Verdict,
}

/// How a row went.
pub(super) enum Verdict {
    /// As written down.
    Passed,
    /// Otherwise, and how.
    Failed(String),
    /// Not at all, and why.
    Skipped(String),
}

/// Runs the rows called `name`, or all.
pub(super) fn run(
    pair: &mut Pair,
    settings: &Settings,
    host: Host,
    name: &str,
) -> Result<Vec<Outcome>, ConformanceError> {
    let all = notation::parse(ROWS).map_err(ConformanceError::Usage)?;
    let wanted = |title: &str| name == "all" || title.split(' ').next() == Some(name);
    let mut outcomes = Vec::new();
    for told in all.iter().filter(|told| wanted(&told.title)) {
        outcomes.push(Outcome {
            title: told.title.clone(),
            result: run_told(pair, settings, host, told)?,
        });
    }
    if wanted(ADVICES) {
        outcomes.push(Outcome {
            title: format!("{ADVICES} every advice on every kind of span"),
            result: run_advices(pair, host)?,
        });
    }
    if outcomes.is_empty() {
        let names: std::collections::BTreeSet<_> = all
            .iter()
            .filter_map(|told| told.title.split(' ').next())
            .chain([ADVICES])
            .collect();
        let names: Vec<_> = names.into_iter().collect();
        let names = names.join(", ");
        return Err(ConformanceError::Usage(format!(
            "there is no row {name}; there are {names}, and all"
        )));
    }
    Ok(outcomes)
}

fn run_told(
    pair: &mut Pair,
    settings: &Settings,
    host: Host,
    told: &Told,
) -> Result<Verdict, ConformanceError> {
    if told.program.size == Size::Blocks && settings.thp == Thp::Never {
        return Ok(Verdict::Skipped("large pages are switched off".into()));
    }
    if matches!(host, Host::Kernel | Host::Both) {
        let seen = pair.kernel(&told.program)?;
        if let Some(wrong) = told.wrong(&seen) {
            let text = format!("Linux {}: {wrong}", settings.release);
            return Ok(Verdict::Failed(text));
        }
    }
    if matches!(host, Host::Model | Host::Both) {
        let seen = pair.model(&told.program);
        let wrong = match &seen {
            Ok(seen) => told.wrong(seen),
            Err(bad) => Some(bad.rule.clone()),
        };
        if let Some(wrong) = wrong {
            return Ok(Verdict::Failed(format!("model: {wrong}")));
        }
    }
    Ok(Verdict::Passed)
}

fn run_advices(pair: &mut Pair, host: Host) -> Result<Verdict, ConformanceError> {
    for advice in (-1..=255).filter(|advice| !HARMFUL.contains(advice)) {
        let program = advices(advice);
        let kernel = match host {
            Host::Kernel | Host::Both => Some(pair.kernel(&program)?),
            Host::Model => None,
        };
        let model = match host {
            Host::Model | Host::Both => match pair.model(&program) {
                Ok(seen) => Some(seen),
                Err(bad) => return Ok(Verdict::Failed(format!("model: {}", bad.rule))),
            },
            Host::Kernel => None,
        };
        for seen in [&kernel, &model].into_iter().flatten() {
            if let Some(wrong) = accepted(&program, seen, advice) {
                return Ok(Verdict::Failed(format!("{wrong} is not refused")));
            }
        }
        if let (Some(kernel), Some(model)) = (kernel, model)
            && let Some(found) = difference(program.size, &kernel, &model)
        {
            let call = line(&program.steps[found.step].call);
            return Ok(Verdict::Failed(format!("{call}: {}", found.text)));
        }
    }
    Ok(Verdict::Passed)
}

/// A call with an advice that does not exist and was not refused.
fn accepted(program: &Program, seen: &[Seen], advice: i32) -> Option<String> {
    let exists = matches!(advice, 0..=4 | 8..=25 | 102 | 103);
    let refused = Some(Answer::Failed(22));
    let asks = |call: &Call| match call {
        Call::Advise { .. } => true,
        // Of no spans at all nobody looks at the advice.
        Call::AdviseMany { spans, .. } => spans[0].1 > 0,
        _ => false,
    };
    let steps = program.steps.iter().zip(seen);
    let mut wrong = steps.filter(|(step, seen)| asks(&step.call) && seen.answer != refused);
    let (step, _) = wrong.next().filter(|_| !exists)?;
    Some(line(&step.call))
}

/// One advice on memory of all kinds, on holes, and on spans that cannot be.
fn advices(advice: i32) -> Program {
    let spans = [
        (0, 4 * PAGE),
        (2 * PAGE, 2 * PAGE),
        (2 * PAGE, 5 * PAGE),
        (4 * PAGE, 2 * PAGE),
        (6 * PAGE, 2 * PAGE),
        (8 * PAGE, 2 * PAGE),
        (10 * PAGE, 2 * PAGE),
        (11 * PAGE, 3 * PAGE),
        (8, PAGE),
        (PAGE, 0),
        (PAGE, 1),
        (PAGE, u64::MAX),
        (PAGE, u64::MAX - 4095),
    ];
    let mut calls = vec![
        map(0, 4, 3, Kind::Private),
        map(6, 2, 3, Kind::Shared),
        map(8, 2, 0, Kind::Private),
        map(10, 2, 3, Kind::Private),
        Call::Lock {
            at: 10 * PAGE,
            len: 2 * PAGE,
        },
        Call::Store { at: 0, value: 1 },
        Call::Store {
            at: 6 * PAGE,
            value: 2,
        },
        Call::Load { at: PAGE },
    ];
    calls.extend(spans.map(|(at, len)| Call::Advise { at, len, advice }));
    calls.extend(spans.map(|span| batch(&[span], advice)));
    calls.push(batch(&spans[..2], advice));
    calls.push(batch(&spans[1..4], advice));
    let steps = calls.into_iter().map(|call| Step {
        who: 0,
        call,
        look: Look::Yes,
    });
    Program {
        size: Size::Roomy,
        steps: steps.collect(),
    }
}

fn map(page: u64, pages: u64, prot: u8, kind: Kind) -> Call {
    Call::Map {
        at: page * PAGE,
        len: pages * PAGE,
        prot,
        kind,
        place: Place::Fixed,
    }
}

fn batch(some: &[(u64, u64)], advice: i32) -> Call {
    let mut spans = [(0, 0); BATCH];
    for (place, span) in spans.iter_mut().zip(some) {
        *place = *span;
    }
    Call::AdviseMany {
        spans,
        count: u8::try_from(some.len().min(BATCH)).unwrap_or(0),
        advice,
    }
}
