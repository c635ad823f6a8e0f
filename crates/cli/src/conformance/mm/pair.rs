//! The running kernel and the model, side by side.

use gpusvm::addr::HostVa;
use gpusvm_live::scratch::{Scratch, ScratchError, Seen};

use crate::conformance::ConformanceError;
use crate::conformance::mm::Host;
use crate::conformance::mm::compare::{Difference, What, difference};
use crate::conformance::mm::model::{self, Facts, Inconsistent};
use crate::conformance::mm::program::{BASE, Program, Size};
use crate::conformance::mm::shrink;

/// Runs of a program that making it short may take.
const SHRINK_RUNS: u32 = 2000;
/// How often a difference has to come again before it counts.
const REPEATS: usize = 2;

/// Windows of the kernel, one for each size, and what the model is to be.
pub(super) struct Pair {
    pages: Scratch,
    roomy: Scratch,
    blocks: Scratch,
    facts: Facts,
    host: Host,
}

/// What came of comparing a program.
pub(super) enum Verdict {
    /// The two agree, up to the end or to a call that the model leaves out.
    Same(Extent),
    /// They differ, each time.
    Different(Difference),
    /// They differed once.
    Unrepeated,
}

/// How much of a program was compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// What comes before a call that the model leaves out.
    Part,
}

impl Pair {
    /// Opens the windows.
    pub(super) fn open(facts: Facts, host: Host) -> Result<Self, ConformanceError> {
        let open = |size: Size| Scratch::open(HostVa::new(BASE), size.pages().into());
        Ok(Self {
            pages: open(Size::Pages).map_err(broken)?,
            roomy: open(Size::Roomy).map_err(broken)?,
            blocks: open(Size::Blocks).map_err(broken)?,
            facts,
            host,
        })
    }

    fn scratch(&mut self, size: Size) -> &mut Scratch {
        match size {
            Size::Pages => &mut self.pages,
            Size::Roomy => &mut self.roomy,
            Size::Blocks => &mut self.blocks,
        }
    }

    /// The kernel's answers.
    pub(super) fn kernel(&mut self, program: &Program) -> Result<Vec<Seen>, ConformanceError> {
        let seen = self.scratch(program.size).run(&program.steps);
        seen.map_err(broken)
    }

    /// The model's answers.
    pub(super) fn model(&self, program: &Program) -> Result<Vec<Seen>, Inconsistent> {
        model::run(program, self.facts)
    }

    /// The first difference between the two hosts. One host alone is compared with itself.
    pub(super) fn compare(
        &mut self,
        program: &Program,
    ) -> Result<Result<Extent, Difference>, ConformanceError> {
        let program = program.with_last_look();
        let (first, second) = match self.host {
            Host::Both => {
                let facts = self.facts;
                let scratch = self.scratch(program.size);
                scratch.start(&program.steps).map_err(broken)?;
                // Both work at the same time.
                let model = model::run(&program, facts);
                (scratch.finish().map_err(broken)?, model)
            }
            Host::Kernel => (self.kernel(&program)?, Ok(self.kernel(&program)?)),
            Host::Model => match self.model(&program) {
                Ok(seen) => (seen.clone(), Ok(seen)),
                Err(bad) => (Vec::new(), Err(bad)),
            },
        };
        let second = match second {
            Ok(second) => second,
            Err(bad) => return Ok(Err(rule_broken(bad))),
        };
        let extent = if second.len() < program.steps.len() {
            Extent::Part
        } else {
            Extent::Whole
        };
        Ok(difference(program.size, &first, &second).map_or(Ok(extent), Err))
    }

    /// What comes of comparing a program, again where need be.
    pub(super) fn judge(&mut self, program: &Program) -> Result<Verdict, ConformanceError> {
        let found = match self.compare(program)? {
            Ok(extent) => return Ok(Verdict::Same(extent)),
            Err(found) => found,
        };
        for _ in 0..REPEATS {
            if self.compare(program)? != Err(found.clone()) {
                return Ok(Verdict::Unrepeated);
            }
        }
        Ok(Verdict::Different(found))
    }

    /// A short program that differs in the same respect.
    pub(super) fn shorten(&mut self, program: &Program, what: What) -> Program {
        shrink::shrink(
            program,
            SHRINK_RUNS,
            &mut |candidate| matches!(self.compare(candidate), Ok(Err(found)) if found.what == what),
        )
    }
}

fn rule_broken(bad: Inconsistent) -> Difference {
    Difference {
        step: bad.step,
        what: What::Rule,
        text: format!("the model breaks a rule of its own: {}", bad.rule),
    }
}

fn broken(why: ScratchError) -> ConformanceError {
    ConformanceError::Machine(why.to_string())
}
