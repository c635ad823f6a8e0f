//! What can go wrong in a world, and how it is told: who waits for what, and who holds it.

use core::fmt::{self, Write};

use gpusvm::seam::env::Ns;

use crate::sched::lock::short;
use crate::sched::world::{Block, World};

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// An oracle, or the scenario itself, found a rule broken.
    Violation,
    /// An actor panicked.
    Panic,
    /// No actor can run any more.
    Deadlock,
    /// Locks were taken out of order.
    LockOrder,
    /// A lock was held where none may be.
    Context,
    /// The actors were not done in time.
    Stuck,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Violation => "violation",
            Self::Panic => "panic",
            Self::Deadlock => "deadlock",
            Self::LockOrder => "lock order",
            Self::Context => "wrong context",
            Self::Stuck => "no progress",
        })
    }
}

/// The first thing that went wrong in a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of thing.
    pub kind: FailureKind,
    /// In words.
    pub text: String,
    /// The actor that ran.
    pub actor: String,
    /// Virtual time.
    pub at: Ns,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} at {} ns, {}: {}",
            self.kind, self.at.0, self.actor, self.text
        )
    }
}

impl World {
    /// `what`, then a line for each actor that is not done.
    pub(super) fn describe_waiting(&self, what: &str) -> String {
        let mut text = what.to_owned();
        for actor in 0..self.actors.len() {
            let runs = self.ready >> actor & 1 == 1;
            let line = match self.actors[actor].block {
                Some(block) => self.describe_block(&block),
                None if runs => "can run".to_owned(),
                None => continue,
            };
            let written = write!(text, "\n  {} {line}", self.actors[actor].name);
            debug_assert!(written.is_ok(), "a string takes any text");
        }
        text
    }

    fn describe_block(&self, block: &Block) -> String {
        match *block {
            Block::Idle => "is idle".to_owned(),
            Block::Sleep(site) => format!("sleeps at {}", short(site)),
            Block::Word(address, site) => {
                let label = self.locks.word_label(address);
                let label = label.map_or_else(String::new, |label| format!(" in {label}"));
                format!("waits for a word{label} at {}", short(site))
            }
            Block::Lock(address, site) => {
                let label = self.locks.label(address);
                let held = self.describe_holder(address);
                format!("waits for {label} at {}, {held}", short(site))
            }
        }
    }

    fn describe_holder(&self, address: usize) -> String {
        let holder = |actor: &usize| self.locks.taken_at(*actor, address).is_some();
        let Some(holder) = (0..self.actors.len()).find(holder) else {
            return "which no actor holds".to_owned();
        };
        let site = self.locks.taken_at(holder, address).unwrap_or_default();
        format!("held by {}, taken at {site}", self.name_of(holder))
    }

    /// Whether the running actor, were it to wait for a lock of `holder`, would wait for itself.
    pub(super) fn closes_cycle(&self, holder: Option<usize>) -> bool {
        let mut holder = holder;
        for _ in 0..self.actors.len() {
            match holder {
                Some(actor) if actor == self.current => return true,
                Some(actor) => holder = self.waits_for(actor),
                None => return false,
            }
        }
        false
    }

    /// The actor whose lock `actor` waits for.
    fn waits_for(&self, actor: usize) -> Option<usize> {
        let Some(Block::Lock(address, _)) = self.actors.get(actor)?.block else {
            return None;
        };
        (0..self.actors.len()).find(|holder| self.locks.taken_at(*holder, address).is_some())
    }
}
