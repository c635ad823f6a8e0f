//! The command as its users meet it: exit codes, what goes to which output, and that interrupts lose
//! nothing.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use common::{file, gpusvm, output, text};

mod common;

/// The user `nobody`, who has no privilege.
const NOBODY: u32 = 65534;

/// Whether no machine can be started here; then the command has said why.
#[expect(clippy::print_stdout, reason = "a test's own output")]
fn refused(output: &Output) -> bool {
    let said = text(&output.stderr);
    let refused = said.contains("userfaultfd") || said.contains("/proc/self");
    if refused {
        println!("skipped: {}", said.trim());
    }
    refused
}

#[test]
fn json_is_one_object_with_the_kernels_names() {
    let output = output(&[
        "run", "stream", "--size", "24M", "--vram", "6M", "--seed", "7", "--json",
    ]);
    if refused(&output) {
        return;
    }
    let object: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(object["schema"], 1);
    assert_eq!(object["workload"], "stream");
    assert_eq!(object["verified"], true);
    assert_eq!(object["config"]["seed"], 7);
    assert_eq!(object["host"]["kind"], "live");
    assert!(object["stats"]["evict_count"].as_u64() > Some(0));
    assert_eq!(object["stats"]["late_invalidation_count"], 0);
}

#[test]
fn no_addition_is_lost_between_cpu_and_device() {
    for migration in ["remap", "copy"] {
        let args = ["run", "atomics", "--size", "8M", "--vram", "4M", "--json"];
        let run = output(&[&args[..], &["--migration", migration]].concat());
        if refused(&run) {
            return;
        }
        let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
        assert_eq!(object["verified"], true, "{migration}");
        assert!(
            object["stats"]["evict_count"].as_u64() > Some(0),
            "{migration}"
        );
    }
}

/// Runs additions for two seconds; `None` where the machine cannot.
fn add_for_a_while(atomics: &str) -> Option<(Option<i32>, Value)> {
    let args = ["run", "atomics", "--size", "8M", "--vram", "8M", "--json"];
    let run = output(&[&args[..], &["--seconds", "2", "--atomics", atomics]].concat());
    if refused(&run) {
        return None;
    }
    let object = serde_json::from_slice(&run.stdout);
    Some((run.status.code(), object.expect("one JSON object")))
}

#[test]
fn no_addition_is_lost_under_either_policy() {
    for atomics in ["device", "exclusive"] {
        let Some((code, object)) = add_for_a_while(atomics) else {
            return;
        };
        assert_eq!(code, Some(0), "{object:#}");
        assert_eq!(object["config"]["atomics"], atomics);
        let counts = &object["counts"];
        assert_eq!(counts["lost_additions"], 0, "{atomics}");
        for count in ["cpu_additions", "device_additions", "storm_moves"] {
            assert!(counts[count].as_u64() > Some(0), "{atomics}: {count}");
        }
        assert!(object["elapsed_s"].as_f64() >= Some(1.9), "{atomics}");
    }
}

#[test]
fn there_is_no_storm_where_no_touch_brings_pages_home() {
    let args = ["run", "atomics", "--size", "1M", "--vram", "4M", "--json"];
    let run = output(&[&args[..], &["--level", "explicit"]].concat());
    if refused(&run) {
        return;
    }
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
    assert_eq!(object["counts"]["storm_moves"], 0);
    assert_eq!(object["counts"]["lost_additions"], 0);
}

/// What has no place for atomics at a lower level says which level, why, and what to do.
#[test]
fn atomics_that_a_level_has_no_place_for_are_told_in_one_line() {
    for (level, atomics, why) in [
        // The words lie beside the variables of the first thread.
        ("user-mode-only", "device", "beside a thread's variables"),
        ("user-mode-only", "exclusive", "beside a thread's variables"),
        ("mprotect", "exclusive", "never a device's alone"),
        ("explicit", "device", "nothing moves"),
        ("explicit", "exclusive", "nothing moves"),
    ] {
        let args = ["run", "atomics", "--size", "4M", "--vram", "8M", "--json"];
        let mut run = gpusvm(&[&args[..], &["--level", level, "--atomics", atomics]].concat());
        for (user, run) in [
            ("ours", run.output()),
            ("nobody", run.uid(NOBODY).gid(NOBODY).output()),
        ] {
            let run = match run {
                Ok(run) => run,
                Err(error) => {
                    println!("skipped: another user cannot run the command: {error}");
                    continue;
                }
            };
            if refused(&run) && !text(&run.stderr).contains("device atomic") {
                continue;
            }
            if level == "user-mode-only" && run.status.success() {
                println!("skipped: the words lie elsewhere");
                continue;
            }
            let said = text(&run.stderr);
            assert_eq!(run.status.code(), Some(2), "{level}, {user}: {said}");
            assert_eq!(said.lines().count(), 1, "{level}, {user}: {said}");
            assert!(run.stdout.is_empty(), "{level}, {user}: no object");
            let level = format!("at level {level}; use --atomics system, or level full");
            for part in ["device atomic at 0x", why, &level] {
                assert!(said.contains(part), "{part}, {user}: {said}");
            }
        }
    }
}

#[test]
fn additions_are_lost_without_a_policy() {
    let Some((code, object)) = add_for_a_while("naive") else {
        return;
    };
    assert_eq!(code, Some(1), "{object:#}");
    assert_eq!(object["verified"], false);
    assert!(object["counts"]["lost_additions"].as_i64() > Some(0));
}

#[test]
fn words_of_a_file_are_counted_as_the_shell_would() {
    let path = file("words.txt", "one two\nthree\u{b}four  \n".as_bytes());
    let output = output(&["run", "wordcount", "--input", &path.display().to_string()]);
    if refused(&output) {
        return;
    }
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.contains("2 lines, 4 words, 21 bytes"), "{said}");
}

#[test]
fn user_without_privilege_gets_the_lower_level_or_a_reason() {
    let mut command = gpusvm(&["run", "stream", "--size", "24M", "--vram", "6M", "--json"]);
    command.uid(NOBODY).gid(NOBODY);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: another user cannot run the command: {error}");
            return;
        }
    };
    if refused(&output) {
        return;
    }
    let object: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(object["verified"], true);
    let level = object["host"]["level"].as_str();
    assert!(
        matches!(level, Some("full" | "user-mode-only")),
        "{level:?}"
    );
    let limits = object["host"]["not_covered"].as_array().map(Vec::len);
    assert_eq!(limits, Some(2), "a level says what it does not cover");
}

/// Asserts that a run at `level` verifies and names it, and that `info` does.
fn assert_level(level: &str) {
    let size = ["--size", "24M", "--vram", "32M", "--json"];
    let run = output(&[&["run", "stream", "--level", level][..], &size].concat());
    if refused(&run) {
        return;
    }
    let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
    assert_eq!(object["verified"], true);
    assert_eq!(object["host"]["level"], level);
    assert_eq!(object["config"]["level"], level);
    let info = output(&["info", "--json", "--level", level]);
    let object: Value = serde_json::from_slice(&info.stdout).expect("one JSON object");
    assert_eq!(object["host"]["level"], level);
    assert!(object["host"]["not_covered"][0].is_string());
}

#[test]
fn forced_level_is_the_one_in_use_and_named() {
    assert_level("full");
    assert_level("user-mode-only");
    assert_level("mprotect");
    assert_level("explicit");
}

#[test]
fn data_migrates_without_userfaultfd_where_it_may() {
    let moved = |level: &str| {
        let args = ["run", "stream", "--size", "24M", "--vram", "32M", "--json"];
        let run = output(&[&args[..], &["--level", level]].concat());
        let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
        assert_eq!(object["verified"], true, "{level}");
        object["stats"]["svm_device_copy_kb"].as_u64()
    };
    if refused(&output(&["info", "--level", "mprotect"])) {
        return;
    }
    assert!(moved("mprotect") > Some(16 << 10), "all arrays");
    assert_eq!(moved("explicit"), Some(0));
}

/// The block of the first thread is in a mapping that the system joins with large arrays.
#[test]
fn data_migrates_where_system_calls_cannot_wait_for_it() {
    let args = ["run", "stream", "--size", "24M", "--vram", "32M", "--json"];
    let run = output(&[&args[..], &["--level", "user-mode-only"]].concat());
    if refused(&run) {
        return;
    }
    let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
    assert_eq!(object["verified"], true);
    let moved = object["stats"]["adopted_to_device_kb"].as_u64();
    assert!(moved > Some(16 << 10), "{moved:?}");
}

#[test]
fn forced_brackets_are_those_in_use_and_named() {
    for brackets in ["patched", "symbols", "events"] {
        let args = ["run", "stream", "--size", "24M", "--vram", "32M", "--json"];
        let run = output(&[&args[..], &["--brackets", brackets]].concat());
        if refused(&run) {
            return;
        }
        let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
        assert_eq!(object["verified"], true, "{brackets}");
        assert_eq!(object["host"]["bracket"], brackets);
        assert_eq!(object["config"]["brackets"], brackets);
        let info = output(&["info", "--json", "--brackets", brackets]);
        let object: Value = serde_json::from_slice(&info.stdout).expect("one JSON object");
        assert_eq!(object["host"]["bracket"], brackets);
    }
}

#[test]
fn brackets_that_a_level_cannot_have_are_told() {
    let said = text(&output(&["info", "--level", "mprotect", "--brackets", "events"]).stderr);
    assert!(said.contains("take other brackets"), "{said}");
}

#[test]
fn forced_level_that_is_refused_is_told_in_one_line() {
    for what in [&["run", "stream", "--size", "24M"][..], &["info"]] {
        let mut command = gpusvm(&[what, &["--level", "full"]].concat());
        let output = match command.uid(NOBODY).gid(NOBODY).output() {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: another user cannot run the command: {error}");
                return;
            }
        };
        if output.status.success() {
            println!("skipped: every user may have the level here");
            return;
        }
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("level full is refused"), "{said}");
        assert!(said.contains("take level user-mode-only"), "{said}");
    }
}

#[test]
fn interrupt_brings_data_home_and_ends_with_130() {
    // Random updates of far more memory than the device has: never done by itself in this time.
    let args = ["run", "gups", "--size", "512M", "--vram", "8M"];
    let mut child = gpusvm(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command can be run");
    wait_for_threads(&mut child, 4);
    thread_sleep(Duration::from_millis(200));
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.expect("kill can be run").success());
    let status = child.wait().expect("the command ends");
    let mut said = String::new();
    let stderr = child.stderr.as_mut().expect("it is piped");
    stderr.read_to_string(&mut said).expect("text");
    if said.contains("userfaultfd") {
        println!("skipped: {said}");
        return;
    }
    assert_eq!(status.code(), Some(130), "{said}");
    assert_eq!(said, "gpusvm: interrupted; all data is home\n");
}

#[test]
fn who_interrupts_twice_does_not_wait() {
    // Its data takes far longer to fill than this test waits: nobody looks for interrupts meanwhile.
    let args = ["run", "chase", "--size", "1G", "--vram", "8M"];
    let child = gpusvm(&args)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command can be run");
    let handler = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()));
        let status = status.unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.map(|mask| u64::from_str_radix(mask.trim(), 16));
        caught.is_none_or(|mask| mask.is_ok_and(|mask| mask & 0x4002 == 0x4002))
    };
    while !handler() {
        thread::yield_now();
    }
    for _time in 0..2 {
        let sent = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(sent.expect("kill can be run").success());
        thread_sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().expect("the command ends");
    assert_eq!(output.status.code(), Some(130));
    // Else it would have said that all data is home.
    assert_eq!(text(&output.stderr), "");
}

/// Waits until the command runs on so many threads: then the device computes. Or until it ends.
fn wait_for_threads(child: &mut Child, count: usize) {
    let folder = format!("/proc/{}/task", child.id());
    let threads = || fs::read_dir(&folder).map_or(0, Iterator::count);
    while threads() < count && child.try_wait().expect("it is our child").is_none() {
        thread::yield_now();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "another process's time, which no environment of ours keeps"
)]
fn thread_sleep(time: Duration) {
    thread::sleep(time);
}
