//! The `gpusvm` command.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use gpusvm_cli::args::{self, Cli, Command, RunArgs};
use gpusvm_cli::{bench, conformance, explore, info, run};

/// Keeps the runtime's own memory apart from the memory that migrates.
#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command.unwrap_or_else(demo),
        Err(error) => return refuse(&error),
    };
    let mut out = std::io::stdout();
    match command {
        Command::Run(args) => match do_run(&args, &mut out) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Info(args) => match info::info(args, &mut out) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 1),
        },
        Command::Explore(args) => match explore::explore(&args, &mut out) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Conformance(args) => match conformance::conformance(&args, &mut out) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Bench(args) => match bench::bench(&args, &mut out) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
    }
}

/// Shows help or version where they were asked for; else says in one line what is wrong with the
/// command line.
fn refuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Nobody is left to tell where standard output is closed.
        let _told = error.print();
        return ExitCode::SUCCESS;
    }
    fail(&args::OneLine(error), 2)
}

/// Says in one line what went wrong.
fn fail(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    // Nobody is left to tell where standard error is closed, too.
    let _told = writeln!(std::io::stderr(), "gpusvm: {error}");
    ExitCode::from(code)
}

/// What a bare `gpusvm` does.
fn demo() -> Command {
    Cli::parse_from(["gpusvm", "run"])
        .command
        .unwrap_or_else(|| unreachable!("run is a command"))
}

fn do_run(args: &RunArgs, out: &mut dyn Write) -> Result<(), run::RunError> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // Who asks twice does not want to wait. Registered first, so that it sees what was before.
        let asked = Arc::clone(&interrupted);
        let _default = signal_hook::flag::register_conditional_shutdown(signal, 130, asked);
        // Without the handler the signal ends the process at once, as it would any other.
        let _default = signal_hook::flag::register(signal, Arc::clone(&interrupted));
    }
    run::run(args, &interrupted, out)
}
