//! Failing programs made short: fewer steps first, then plainer arguments.

use gpusvm::addr::PAGE;
use gpusvm_live::scratch::{Call, How, Kind, Place, Step};

use crate::conformance::mm::program::Program;

/// The shortest program found for which `fails` still holds, in at most `tries` tries.
pub(crate) fn shrink(
    program: &Program,
    tries: u32,
    fails: &mut dyn FnMut(&Program) -> bool,
) -> Program {
    let mut search = Search {
        best: program.clone(),
        tries,
        fails,
    };
    loop {
        let before = search.best.clone();
        search.fewer_steps();
        search.plainer_arguments();
        if search.best == before || search.tries == 0 {
            return search.best;
        }
    }
}

struct Search<'a> {
    best: Program,
    tries: u32,
    fails: &'a mut dyn FnMut(&Program) -> bool,
}

impl Search<'_> {
    fn accept(&mut self, steps: Vec<Step>) -> bool {
        let size = self.best.size;
        let candidate = Program { size, steps }.sensible();
        if self.tries == 0 || candidate == self.best {
            return false;
        }
        self.tries -= 1;
        let accepted = (self.fails)(&candidate);
        if accepted {
            self.best = candidate;
        }
        accepted
    }

    /// Leaves out runs of steps, long ones first.
    fn fewer_steps(&mut self) {
        let mut run = self.best.steps.len() / 2;
        while run > 0 {
            let mut at = 0;
            while at < self.best.steps.len() {
                let mut steps = self.best.steps.clone();
                steps.drain(at..(at + run).min(steps.len()));
                if !self.accept(steps) {
                    at += run;
                }
            }
            run /= 2;
        }
    }

    fn plainer_arguments(&mut self) {
        let mut at = 0;
        while let Some(step) = self.best.steps.get(at).copied() {
            for plainer in plainer(&step) {
                let mut steps = self.best.steps.clone();
                steps[at] = plainer;
                let _kept = self.accept(steps);
            }
            at += 1;
        }
    }
}

/// Steps that are plainer than `step` in one respect.
fn plainer(step: &Step) -> Vec<Step> {
    let with = |call: Call| Step { call, ..*step };
    let mut all = Vec::new();
    if step.who != 0 {
        all.push(Step { who: 0, ..*step });
    }
    all.extend(plainer_calls(&step.call).into_iter().map(with));
    all
}

fn plainer_calls(call: &Call) -> Vec<Call> {
    match *call {
        Call::Map {
            at,
            len,
            prot,
            kind,
            place,
        } => plainer_maps(at, len, prot, kind, place),
        Call::Unmap { at, len } => lengths(at, len, |at, len| Call::Unmap { at, len }),
        Call::Protect { at, len, prot } => {
            lengths(at, len, |at, len| Call::Protect { at, len, prot })
        }
        Call::Lock { at, len } => lengths(at, len, |at, len| Call::Lock { at, len }),
        Call::Unlock { at, len } => lengths(at, len, |at, len| Call::Unlock { at, len }),
        Call::Advise { at, len, advice } => {
            lengths(at, len, |at, len| Call::Advise { at, len, advice })
        }
        Call::AdviseMany {
            spans,
            count,
            advice,
        } => {
            let fewer = (0..count).map(|count| Call::AdviseMany {
                spans,
                count,
                advice,
            });
            let [(at, len), ..] = spans;
            fewer.chain([Call::Advise { at, len, advice }]).collect()
        }
        Call::Remap { at, old, new, how } => {
            let hows = [How::InPlace, How::Anywhere];
            let mut all: Vec<_> = hows.map(|how| Call::Remap { at, old, new, how }).into();
            all.extend(lengths(at, old, |at, old| Call::Remap {
                at,
                old,
                new,
                how,
            }));
            all.extend(lengths(at, new, |at, new| Call::Remap {
                at,
                old,
                new,
                how,
            }));
            all
        }
        Call::Store { at, value } if value > 1 => vec![Call::Store { at, value: 1 }],
        Call::Load { .. } | Call::Store { .. } | Call::Fork { .. } | Call::Exit => Vec::new(),
    }
}

fn plainer_maps(at: u64, len: u64, prot: u8, kind: Kind, place: Place) -> Vec<Call> {
    let map = |at, len, prot, kind, place| Call::Map {
        at,
        len,
        prot,
        kind,
        place,
    };
    let mut all = vec![
        map(at, len, prot, kind, Place::Fixed),
        map(at, len, prot, Kind::Private, place),
        map(at, len, 3, kind, place),
    ];
    all.extend(lengths(at, len, |at, len| map(at, len, prot, kind, place)));
    all
}

/// The same call on one page, on less at either end, and rounded to pages.
fn lengths(at: u64, len: u64, call: impl Fn(u64, u64) -> Call) -> Vec<Call> {
    let (start, whole) = (at / PAGE * PAGE, len / PAGE * PAGE);
    let mut all = vec![call(start, PAGE)];
    if whole > PAGE && whole < 1 << 40 {
        all.push(call(start, whole / 2 / PAGE * PAGE));
        all.push(call(start, whole - PAGE));
        all.push(call(start + PAGE, whole - PAGE));
    }
    if (start, whole) != (at, len) {
        all.push(call(start, whole));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::mm::program::Size;
    use crate::conformance::mm::random;
    use crate::conformance::mm::settings::Settings;

    #[test]
    fn what_does_not_matter_goes() {
        let settings = Settings::read().expect("a kernel");
        let has = |program: &Program, advice: i32| {
            let mut calls = program.steps.iter().map(|step| step.call);
            calls.any(|call| matches!(call, Call::Advise { advice: found, .. } if found == advice))
        };
        let both = |program: &Program| has(program, 4) && has(program, 8);
        let long = (0..).map(|seed| random::program(seed, 30, &settings));
        let long = long.into_iter().find(|program| both(program));
        let long = long.expect("some program has both");
        let short = shrink(&long, 2000, &mut |program| both(program));
        assert_eq!(short.steps.len(), 2);
        assert!(short.steps.iter().all(|step| step.who == 0));
        let page = |call: Call| matches!(call, Call::Advise { len: PAGE, .. });
        assert!(short.steps.iter().all(|step| page(step.call)));
        assert!(matches!(short.size, Size::Pages | Size::Blocks));
    }
}
