//! Which pages met which operations: how much of what can happen did happen.
//!
//! A *meeting* is an operation in one of its phases while one of its pages has an entry of some kind.
//! Worlds that are watched note the meetings that they have; a run counts the worlds that had each.
//! What cannot meet stands in one table, [`NEVER`], with the reason.

use gpusvm_model::mm::entry::{Block, Entry};
use gpusvm_model::mm::{Machine, Pid};
use gpusvm_model::sched::ModelEnv;
use serde_json::{Value, json};

use crate::atomics::Atomics;
use crate::explore::doing::{Doing, Phase, Step};
use crate::explore::op::Op;
use crate::explore::plan::Plan;
use crate::table::Table;

/// Kinds of entries, small and large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    None,
    Present,
    Zero,
    Swap,
    Migration,
    DevicePrivate,
    DeviceExclusive,
    HwPoison,
    Guard,
    UffdWp,
    Huge,
    HugeZero,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::None,
        Self::Present,
        Self::Zero,
        Self::Swap,
        Self::Migration,
        Self::DevicePrivate,
        Self::DeviceExclusive,
        Self::HwPoison,
        Self::Guard,
        Self::UffdWp,
        Self::Huge,
        Self::HugeZero,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Present => "present",
            Self::Zero => "zero",
            Self::Swap => "swap",
            Self::Migration => "migration",
            Self::DevicePrivate => "device",
            Self::DeviceExclusive => "exclusive",
            Self::HwPoison => "poison",
            Self::Guard => "guard",
            Self::UffdWp => "uffd",
            Self::Huge => "huge",
            Self::HugeZero => "hugezero",
        }
    }

    fn of(mm: &Machine, page: u32) -> Self {
        match mm.block(Pid(0), page) {
            Block::Huge(..) => Self::Huge,
            Block::Zero(_) => Self::HugeZero,
            Block::Device(..) => Self::DevicePrivate,
            Block::Table => match mm.entry(Pid(0), page) {
                Entry::None => Self::None,
                Entry::Present(..) => Self::Present,
                Entry::Zero(_) => Self::Zero,
                Entry::Swap(..) => Self::Swap,
                Entry::Migration(..) => Self::Migration,
                Entry::DevicePrivate(..) => Self::DevicePrivate,
                Entry::DeviceExclusive(..) => Self::DeviceExclusive,
                Entry::HwPoison(_) => Self::HwPoison,
                Entry::Guard => Self::Guard,
                Entry::UffdWp => Self::UffdWp,
            },
        }
    }
}

/// One thing that may happen.
#[derive(Clone, Copy, Debug)]
struct Meeting {
    doing: Doing,
    kind: Kind,
    phase: Phase,
}

impl Meeting {
    fn all() -> impl Iterator<Item = Self> {
        let phases = |doing, kind| Phase::ALL.map(|phase| Self { doing, kind, phase });
        let kinds = move |doing| {
            Kind::ALL
                .into_iter()
                .flat_map(move |kind| phases(doing, kind))
        };
        Doing::all().flat_map(kinds)
    }

    /// Its number, as a goal of worlds.
    fn goal(self) -> usize {
        let kind = self.doing.index() * Kind::ALL.len() + self.kind as usize;
        kind * Phase::ALL.len() + self.phase as usize
    }

    fn name(self) -> String {
        let (doing, kind, phase) = (self.doing.name(), self.kind.name(), self.phase.name());
        format!("{doing} {kind} {phase}")
    }

    /// Why it cannot be in any world; `None` where it can.
    fn never(self) -> Option<&'static str> {
        NEVER
            .iter()
            .find(|rule| rule.covers(self))
            .map(|rule| rule.why)
    }
}

/// Meetings that cannot be, and why.
struct Never {
    doing: fn(Doing) -> bool,
    kinds: &'static [Kind],
    phases: &'static [Phase],
    why: &'static str,
}

impl Never {
    fn covers(&self, meeting: Meeting) -> bool {
        (self.doing)(meeting.doing)
            && self.kinds.contains(&meeting.kind)
            && self.phases.contains(&meeting.phase)
    }
}

const NEVER: &[Never] = &[
    Never {
        doing: |_any| true,
        kinds: &[Kind::UffdWp],
        phases: &Phase::ALL,
        why: "no actor write-protects pages by userfaultfd",
    },
    Never {
        doing: |_any| true,
        kinds: &[Kind::HwPoison],
        phases: &Phase::ALL,
        why: "no page has a memory error",
    },
    Never {
        doing: |doing| !matches!(doing, Doing::ToDevice | Doing::Home),
        kinds: &Kind::ALL,
        phases: &[Phase::Isolated],
        why: "only migrations isolate pages",
    },
    Never {
        doing: asks_others,
        kinds: &Kind::ALL,
        phases: &[Phase::Bracket],
        why: "it changes no entry itself: the look-up or the migration does that it asks for",
    },
    Never {
        doing: |doing| matches!(doing, Doing::Cpu(op) if op.is_alone() && op != Op::Guard),
        kinds: &[Kind::Guard],
        phases: &Phase::ALL,
        why: "who installs guards removes them, and others that change pages keep away meanwhile",
    },
];

/// Operations that leave all changes of entries to others.
const fn asks_others(doing: Doing) -> bool {
    match doing {
        Doing::Cpu(op) => matches!(op, Op::Send | Op::Evict),
        Doing::GpuLoad | Doing::GpuStore | Doing::GpuExchange | Doing::Serve => true,
        Doing::LookUp | Doing::ToDevice | Doing::Home | Doing::TakeAlone => false,
    }
}

/// Takes note of the meetings of one operation.
pub(super) fn note(mm: &Machine, step: &Step) {
    for page in mm.shape().pages_in(step.span).iter() {
        let meeting = Meeting {
            doing: step.doing,
            kind: Kind::of(mm, page),
            phase: step.phase(),
        };
        ModelEnv.reach(u32::try_from(meeting.goal()).unwrap_or(0));
    }
}

/// What a run has reached.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Worlds that had each meeting, by goal.
    worlds: Vec<u64>,
    /// What CPUs did.
    ops: Vec<Op>,
    /// Devices had pages for themselves.
    alone: bool,
}

impl Coverage {
    /// Adds the worlds of a plan.
    pub(super) fn add(&mut self, plan: &Plan, reached: &[u64]) {
        if self.worlds.len() < reached.len() {
            self.worlds.resize(reached.len(), 0);
        }
        for (total, worlds) in self.worlds.iter_mut().zip(reached) {
            *total += worlds;
        }
        self.ops.extend(plan.does());
        self.alone |= plan.atomics == Atomics::Exclusive;
    }

    fn worlds(&self, meeting: Meeting) -> u64 {
        self.worlds.get(meeting.goal()).copied().unwrap_or(0)
    }

    /// Whether the kinds of worlds that ran could have it.
    fn is_possible(&self, meeting: Meeting) -> bool {
        let done = match meeting.doing {
            Doing::Cpu(op) => self.ops.contains(&op),
            Doing::TakeAlone => self.alone,
            _ => true,
        };
        done && meeting.never().is_none()
    }

    fn possible(&self) -> Vec<Meeting> {
        Meeting::all()
            .filter(|meeting| self.is_possible(*meeting))
            .collect()
    }

    fn missing(&self) -> Vec<Meeting> {
        let mut missing = self.possible();
        missing.retain(|meeting| self.worlds(*meeting) == 0);
        missing
    }

    /// Meetings that happened although they cannot.
    fn wonders(&self) -> Vec<Meeting> {
        Meeting::all()
            .filter(|meeting| self.worlds(*meeting) > 0 && meeting.never().is_some())
            .collect()
    }
}

/// Meetings that are named in one line.
const NAMED: usize = 5;

impl Coverage {
    /// One line.
    pub(super) fn line(&self) -> String {
        let (possible, missing) = (self.possible().len(), self.missing());
        let mut line = format!(
            "coverage: {} of {possible} meetings (operation, entry, phase)",
            possible - missing.len()
        );
        let named: Vec<String> = missing.iter().take(NAMED).map(|one| one.name()).collect();
        if !named.is_empty() {
            line = format!("{line}; never: {}", named.join(", "));
        }
        if missing.len() > NAMED {
            line = format!("{line} and {} more", missing.len() - NAMED);
        }
        for wonder in self.wonders() {
            line = format!(
                "{line}\nthe table says that this cannot be: {}",
                wonder.name()
            );
        }
        line
    }

    /// One row for each operation, one column for each kind of entry: the initials of the phases that
    /// were reached, a dot for one that was not, nothing for one that cannot be.
    pub(super) fn table(&self) -> String {
        let kinds = Kind::ALL.map(Kind::name);
        let header: Vec<&str> = core::iter::once("operation").chain(kinds).collect();
        let mut table = Table::new(&header);
        for doing in Doing::all() {
            let cells = Kind::ALL.map(|kind| self.cell(doing, kind));
            if cells.iter().any(|cell| !cell.trim().is_empty()) {
                let name = doing.name().to_owned();
                table.row(core::iter::once(name).chain(cells).collect());
            }
        }
        let phases = Phase::ALL.map(|phase| format!("{} {}", initial(phase), phase.name()));
        format!("{table}phases: {}; a dot: not reached\n", phases.join(", "))
    }

    fn cell(&self, doing: Doing, kind: Kind) -> String {
        let mut cell = String::new();
        for phase in Phase::ALL {
            let meeting = Meeting { doing, kind, phase };
            cell.push(match (self.worlds(meeting), self.is_possible(meeting)) {
                (0, true) => '.',
                (0, false) => ' ',
                _ => initial(phase),
            });
        }
        cell
    }

    /// All of it; single meetings where `details` are asked for.
    pub(super) fn json(&self, details: Details) -> Value {
        let missing = self.missing();
        let possible = self.possible();
        let name = |meeting: &Meeting| meeting.name();
        let mut all = json!({
            "possible": possible.len(),
            "reached": possible.len() - missing.len(),
            "never": missing.iter().map(name).collect::<Vec<_>>(),
        });
        if details == Details::All {
            let worlds = |meeting: &Meeting| (meeting.name(), self.worlds(*meeting).into());
            let reached: serde_json::Map<_, _> = possible.iter().map(worlds).collect();
            all["worlds"] = reached.into();
            let reasons = NEVER.iter().map(|rule| rule.why);
            all["impossible"] = reasons.collect::<Vec<_>>().into();
        }
        all
    }
}

/// How much is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Details {
    Summary,
    All,
}

const fn initial(phase: Phase) -> char {
    match phase {
        Phase::Open => 'o',
        Phase::Bracket => 'b',
        Phase::Isolated => 'i',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_meeting_has_its_own_goal() {
        let goals: Vec<usize> = Meeting::all().map(Meeting::goal).collect();
        let expected: Vec<usize> = (0..goals.len()).collect();
        assert_eq!(goals, expected);
    }

    #[test]
    fn each_reason_is_needed() {
        for rule in NEVER {
            let mut all = Meeting::all();
            let needed = all.any(|one| one.never() == Some(rule.why));
            assert!(needed, "{}", rule.why);
        }
    }

    #[test]
    fn what_was_reached_and_what_not_is_told() {
        let plan = Plan::named("unmap").expect("it is there");
        let meeting = |phase| Meeting {
            doing: Doing::Cpu(Op::Discard),
            kind: Kind::Swap,
            phase,
        };
        let mut reached = vec![0; meeting(Phase::Bracket).goal() + 1];
        reached[meeting(Phase::Bracket).goal()] = 3;
        let mut coverage = Coverage::default();
        coverage.add(plan, &reached);
        coverage.add(plan, &reached);
        assert_eq!(coverage.worlds(meeting(Phase::Bracket)), 6);
        assert!(
            coverage.line().starts_with("coverage: 1 of "),
            "{}",
            coverage.line()
        );
        assert_eq!(coverage.cell(Doing::Cpu(Op::Discard), Kind::Swap), ".b ");
        assert_eq!(
            coverage.cell(Doing::Cpu(Op::Fork), Kind::Swap),
            "   ",
            "no such operation"
        );
        let all = coverage.json(Details::All);
        assert_eq!(all["worlds"]["discard swap bracket"], 6);
        assert_eq!(all["reached"], 1);
    }
}
