//! Scenarios: what a process and its devices do, and what must be true then, as text that runs on
//! both hosts.
//!
//! | module | what |
//! |---|---|
//! | [`text`] | what a scenario says, as data |
//! | `parse`, `lex` | the one reader of the format; `docs/scenarios.md` is its manual |
//! | `words` | the words that name things |
//! | `play` | the one runner: every line of a scenario is done here |
//! | `access`, `drive` | accesses to pages; what drivers are told |
//! | `expect` | what must be true |
//! | `host` | what a host has to be able to do |
//! | `model`, `live` | the two hosts |
//! | [`library`] | the scenarios that there are, and those that there are not |

mod access;
mod drive;
mod expect;
mod host;
mod lex;
pub mod library;
mod live;
mod model;
mod parse;
mod play;
pub mod text;
mod words;

use std::fmt;

use gpusvm::mutant::Mutant;

pub use lex::ParseError;
pub use parse::parse;
pub use text::Scenario;

/// Where a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// A Linux mm in memory, under a scheduler.
    Model,
    /// This process.
    Live,
}

impl HostKind {
    /// Its name, in scenarios and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Live => "live",
        }
    }
}

/// How a scenario ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was as it says.
    Passed,
    /// The host cannot express it, or this machine cannot run it: why.
    Skipped(String),
    /// Something was otherwise: where and what.
    Failed(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Skipped(why) => write!(f, "skipped: {why}"),
            Self::Failed(what) => write!(f, "FAILED: {what}"),
        }
    }
}

impl Scenario {
    /// Runs it on a host. On the live host nothing else may use devices meanwhile.
    #[must_use]
    pub fn run(&self, host: HostKind) -> Verdict {
        if let Some(why) = self.skips(host) {
            return Verdict::Skipped(why.to_owned());
        }
        match host {
            HostKind::Model => model::run(self, None),
            HostKind::Live => live::run(self),
        }
    }

    /// Runs it on the model host, which has a known bug meanwhile.
    #[must_use]
    pub fn run_with(&self, mutant: Mutant) -> Verdict {
        model::run(self, Some(mutant))
    }
}
