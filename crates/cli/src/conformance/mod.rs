//! `gpusvm conformance`: do the hosts behave as Linux does?

mod mm;

use std::fmt;
use std::io::Write;

use clap::Subcommand;

pub use mm::{Host, MmArgs};

/// What is compared with Linux.
#[derive(Clone, Debug, Subcommand)]
pub enum Suite {
    /// Run random programs of address-space calls on the running kernel and on the model's mm, and
    /// compare both after every call.
    Mm(MmArgs),
}

/// Why a suite failed.
#[derive(Debug)]
pub enum ConformanceError {
    /// What was asked for does not exist.
    Usage(String),
    /// The machine does not allow it.
    Machine(String),
    /// Something behaves otherwise.
    Failed(String),
    /// Nobody reads the output.
    Output(std::io::Error),
}

impl ConformanceError {
    /// Exit code of the command.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Machine(_) | Self::Failed(_) | Self::Output(_) => 1,
        }
    }
}

impl fmt::Display for ConformanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) | Self::Machine(what) | Self::Failed(what) => f.write_str(what),
            Self::Output(why) => write!(f, "standard output: {why}"),
        }
    }
}

impl std::error::Error for ConformanceError {}

impl From<std::io::Error> for ConformanceError {
    fn from(why: std::io::Error) -> Self {
        Self::Output(why)
    }
}

/// Runs a suite and prints what came out.
///
/// # Errors
/// [`ConformanceError`].
pub fn conformance(suite: &Suite, out: &mut dyn Write) -> Result<(), ConformanceError> {
    match suite {
        Suite::Mm(args) => mm::run(args, out),
    }
}
