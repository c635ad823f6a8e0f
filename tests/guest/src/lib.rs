//! A runtime to be preloaded into a program that knows nothing of it (`LD_PRELOAD`).
//!
//! Before `main` it opens a machine: the live host, the driver, a software GPU. From then on a thread
//! of the runtime, the *pilot*, sends whatever it finds to the device: it looks at the process's
//! mappings, draws addresses in its anonymous memory (heap, arenas, chunks, stacks), and lets a
//! kernel touch them. Pages migrate, the program touches them and they come back, or they are
//! evicted, because there is little device memory. The kernel reads, or adds zero atomically: the
//! program must not be able to tell.
//!
//! What happened is written to the file that [`STATS`] names, again and again, so that it is there
//! however the program ends. Without that variable the library does nothing.

#![deny(unsafe_code)]

mod pilot;

use std::env;
use std::fs::File;
use std::os::unix::fs::FileExt;

use gpusvm_cli::machine::{Machine, MachineConfig};
use gpusvm_live::{BracketChoice, LiveConfig, RuntimeScope, VramMode, thread};

#[global_allocator]
static ALLOCATOR: gpusvm_live::RuntimeAlloc = gpusvm_live::RuntimeAlloc;

/// Environment variable: the file for what happened. It exists already.
pub const STATS: &str = "GPUSVM_GUEST_STATS";
/// Environment variable: `copy` for device memory of its own.
pub const MIGRATION: &str = "GPUSVM_GUEST_MIGRATION";
/// Environment variable: `events` for brackets by events alone.
pub const BRACKETS: &str = "GPUSVM_GUEST_BRACKETS";

/// Device memory: less than the programs have.
const VRAM: u64 = 8 << 20;

/// Called by the dynamic linker before `main`.
#[used]
#[expect(unsafe_code, reason = "where the dynamic linker looks for it")]
#[unsafe(link_section = ".init_array")]
static ATTACH: extern "C" fn() = attach;

extern "C" fn attach() {
    let _runtime_memory = RuntimeScope::enter();
    let Some(path) = env::var_os(STATS) else {
        return;
    };
    let Ok(stats) = File::options().write(true).open(path) else {
        return;
    };
    match Machine::start(config()) {
        Ok(machine) => {
            // Without a pilot the file stays empty, which tells.
            let _flies = thread::spawn("gpusvm-pilot", move || pilot::fly(&machine, &stats));
        }
        Err(error) => write(&stats, &format!("skipped: {error}")),
    }
}

fn config() -> MachineConfig {
    let is = |name: &str, value: &str| env::var_os(name).is_some_and(|found| found == value);
    let brackets = if is(BRACKETS, "events") {
        BracketChoice::Events
    } else {
        BracketChoice::Patched
    };
    let migration = if is(MIGRATION, "copy") {
        VramMode::Copy
    } else {
        VramMode::Adopt
    };
    MachineConfig {
        vram: VRAM,
        migration,
        live: LiveConfig {
            brackets,
            ..LiveConfig::default()
        },
        ..Default::default()
    }
}

/// Replaces what the file says by one line.
fn write(stats: &File, line: &str) {
    // A disk that is full shows as an old line.
    let _written = stats.write_all_at(format!("{line:<300}\n").as_bytes(), 0);
}
