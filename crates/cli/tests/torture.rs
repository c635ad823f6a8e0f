//! `gpusvm run torture` as a process: it finds nothing where nothing is wrong, and every planted
//! bug within its time.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

const SECONDS: &str = "5";

/// Runs torture; says why not and answers `None` where the machine has no userfaultfd.
#[expect(clippy::print_stdout, reason = "a test's own output")]
fn torture(more: &[&str]) -> Option<Output> {
    // Side by side they would share the processors, and find less in the same time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    let output = command.args(["run", "torture"]).args(more).output();
    let output = output.expect("the program runs");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("userfaultfd") {
        println!("skipped: {said}");
        return None;
    }
    Some(output)
}

/// A planted bug ends the run early, with exit code 1 and a report of how to repeat it.
fn assert_found(bug: &str, migration: &str) {
    let more = [
        "--seconds",
        SECONDS,
        "--break",
        bug,
        "--migration",
        migration,
    ];
    let Some(output) = torture(&more) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("--break {bug}")), "{said}");
}

#[test]
fn nothing_is_found_where_nothing_is_wrong() {
    assert_clean(&["--seconds", "3", "--json"]);
}

/// Where threads sleep in the middle, more of them meet.
#[test]
fn nothing_is_found_where_threads_sleep_between_steps() {
    assert_clean(&["--seconds", "3", "--jitter", "20", "--json"]);
}

fn assert_clean(options: &[&str]) {
    let Some(output) = torture(options) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let object: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(object["workload"], "torture");
    assert_eq!(object["verified"], true);
    let torture = &object["torture"];
    for zero in [
        "lost_writes",
        "stale_reads",
        "wrong_bytes",
        "refused_accesses",
        "watchdog_reports",
    ] {
        assert_eq!(torture[zero], 0, "{zero}");
    }
    for some in [
        "migrations_to_device",
        "migrations_home",
        "device_writes",
        "forks",
    ] {
        assert!(torture[some].as_u64() > Some(0), "{some}");
    }
    assert!(torture["operations"]["discard"]["done"].as_u64() > Some(0));
    // Nothing came home to a place with other content.
    assert_eq!(object["stats"]["host_conflict_count"], 0);
}

/// Where a user without privileges cannot be, the reason is told.
#[test]
fn nothing_is_found_without_privileges() {
    const NOBODY: u32 = 65534;
    let folder = std::env::temp_dir().join(format!("gpusvm-torture-{}", std::process::id()));
    let program = folder.join("gpusvm");
    // The tree that this was built in may be closed to others.
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    std::fs::copy(env!("CARGO_BIN_EXE_gpusvm"), &program).expect("a program can be copied");
    for path in [&folder, &program] {
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, all).expect("it is ours");
    }
    let mut command = Command::new(&program);
    command.args(["run", "torture", "--seconds", "5", "--json"]);
    let output = command
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir(&folder)
        .output();
    let _removed = std::fs::remove_dir_all(&folder);
    let output = match output {
        Ok(output) => output,
        Err(why) => return println!("skipped: another user cannot run it: {why}"),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("userfaultfd") {
        return println!("skipped: {said}");
    }
    assert_eq!(output.status.code(), Some(0), "{said}");
    let object: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(object["verified"], true);
    for some in ["migrations_to_device", "device_writes", "forks"] {
        assert!(object["torture"][some].as_u64() > Some(0), "{some}");
    }
    if object["host"]["level"] == "user-mode-only" {
        println!(
            "skipped: operations on system calls' buffers and stacks: {}",
            object["host"]
        );
    }
}

#[test]
fn missing_recheck_is_found() {
    assert_found("recheck", "remap");
}

#[test]
fn stale_tlb_is_found() {
    assert_found("tlb", "remap");
}

#[test]
fn copy_without_freezing_is_found() {
    assert_found("freeze", "copy");
}

#[test]
fn deadlock_is_told_by_the_watchdog() {
    let Some(output) = torture(&["--seconds", "30", "--break", "hang"]) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("nothing has moved for 5 seconds"), "{said}");
    let waits = said.lines().filter(|line| line.contains("planted lock"));
    assert!(waits.count() >= 2, "{said}");
}

#[test]
fn options_of_torture_go_with_nothing_else() {
    for option in [["--seconds", "3"], ["--break", "tlb"], ["--jitter", "9"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
        let output = command.args(["run", "stream"]).args(option).output();
        let output = output.expect("the program runs");
        assert_eq!(output.status.code(), Some(2), "{option:?}");
    }
}
