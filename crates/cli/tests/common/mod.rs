//! What tests of the command have in common.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The command, with no input.
pub(crate) fn gpusvm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub(crate) fn output(args: &[&str]) -> Output {
    gpusvm(args).output().expect("the command can be run")
}

/// What it said.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file of the test's own.
pub(crate) fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, content).expect("the target folder can be written");
    path
}
