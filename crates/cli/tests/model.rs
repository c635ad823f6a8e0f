//! `gpusvm run --host model`: workloads in a world that exists only in memory.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// Small, and four times what device memory holds.
const SMALL: [&str; 4] = ["--size", "2M", "--vram", "512K"];

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.args(["run", "--host", "model"]).args(args);
    command.output().expect("the command runs")
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

/// Asserts that it is right, and the same again; returns the object that it prints.
fn verified_twice(args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    let (first, second) = (run(&args), run(&args));
    assert!(first.status.success(), "{args:?}: {}", text(&first.stderr));
    assert_eq!(text(&first.stdout), text(&second.stdout), "{args:?}");
    let object: Value = serde_json::from_slice(&first.stdout).expect("one JSON object");
    assert_eq!(object["verified"], true, "{args:?}");
    assert_eq!(object["host"]["kind"], "model");
    assert_eq!(object["host"]["clock"], "virtual");
    object
}

fn stat(object: &Value, name: &str) -> u64 {
    object["stats"][name].as_u64().expect(name)
}

/// Asserts that data went to the device, and was evicted; returns how often the CPU wanted some back.
fn assert_migrates(workload: &str) -> u64 {
    let object = verified_twice(&[&[workload], &SMALL[..]].concat());
    for name in ["svm_device_copy_kb", "svm_cpu_copy_kb", "evict_count"] {
        assert!(stat(&object, name) > 0, "{workload}: {name}");
    }
    assert_eq!(stat(&object, "late_invalidation_count"), 0, "{workload}");
    stat(&object, "cpu_fault_count")
}

#[test]
fn streams_migrate_both_ways_and_are_the_same_again() {
    for workload in ["stream", "stencil", "spmv", "pingpong", "gemm"] {
        assert!(assert_migrates(workload) > 0, "{workload}");
    }
}

#[test]
fn additions_by_cpu_and_device_are_all_there() {
    assert!(assert_migrates("atomics") > 0);
}

#[test]
fn additions_are_exact_under_either_policy_and_lost_without_one() {
    let small = ["atomics", "--size", "256K", "--vram", "4M", "--atomics"];
    for atomics in ["device", "exclusive"] {
        let object = verified_twice(&[&small[..], &[atomics]].concat());
        assert_eq!(object["counts"]["lost_additions"], 0, "{atomics}");
        let by_cpu = object["counts"]["cpu_additions"].as_u64();
        assert!(by_cpu > Some(0), "{atomics}");
    }
    let naive = run(&[&small[..], &["naive", "--json"]].concat());
    assert_eq!(naive.status.code(), Some(1), "{}", text(&naive.stderr));
    let object: Value = serde_json::from_slice(&naive.stdout).expect("one JSON object");
    assert!(object["counts"]["lost_additions"].as_i64() > Some(0));
}

#[test]
fn random_accesses_migrate_both_ways_and_are_the_same_again() {
    for workload in ["bfs", "gups"] {
        assert!(assert_migrates(workload) > 0, "{workload}");
    }
}

#[test]
fn what_the_cpu_does_not_look_at_again_is_evicted_all_the_same() {
    // Their results are small, or where nobody had written before: there are no large ranges, and the
    // device writes them at home.
    for workload in ["chase", "hashjoin", "sort"] {
        assert_migrates(workload);
    }
}

#[test]
fn words_of_a_file_are_counted_in_place() {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("model-words.txt");
    let words = "one two\nthree four  \n".repeat(1000);
    fs::write(&path, &words).expect("the target folder can be written");
    let path = path.display().to_string();
    let object = verified_twice(&["wordcount", "--input", &path]);
    assert_eq!(object["answer"], "2000 lines, 4000 words, 21000 bytes");
    assert!(stat(&object, "svm_pagefault_count") > 0);
}

#[test]
fn seed_and_service_choose_the_order_of_events() {
    let hash = |more: &[&str]| {
        let object = verified_twice(&[&["pingpong"], &SMALL[..], more].concat());
        object["host"]["hash"].as_str().map(str::to_owned)
    };
    let usual = hash(&[]);
    assert_ne!(usual, hash(&["--seed", "2"]));
    assert_ne!(usual, hash(&["--fault-service", "queue"]));
    assert_ne!(usual, hash(&["--threads", "5"]));
}

#[test]
fn large_device_memory_has_large_ranges() {
    let object = verified_twice(&["pingpong", "--size", "5M", "--vram", "32M"]);
    assert!(stat(&object, "svm_2M_device_copy_kb") >= 2 << 10);
}

#[test]
fn what_the_model_has_not_is_told_in_one_line() {
    for (args, why) in [
        (
            &["stream", "--level", "full"][..],
            "--level needs the live host",
        ),
        (&["torture"], "torture needs the live host"),
        (&["stream", "--vram", "64K"], "use --vram 512K or more"),
        (&["stream", "--size", "5G"], "use a smaller --size"),
        (&["stream", "--threads", "40"], "use --threads 32 or fewer"),
        (&["stream", "--size", "1"], "use 24 or more"),
        (&["wordcount"], "name one with --input FILE"),
        (&["wordcount", "--input", "/"], "not a regular file"),
    ] {
        let output = run(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(said.contains(why), "{args:?}: {said}");
    }
}

/// A memory error in a full device memory: the page is lost, all others come home, and whatever needs
/// device memory afterwards goes without it.
const BAD_PAGE: &str = "\
scenario 1 a bad page of device memory
  live skipped: this process has no memory errors
  vram 1M
  map a 512K
  cpu write a 7
  gpu write a 8
  expect placed a gpu
  poison a[3]
  expect entries a[0..16] none
  cpu read a[3] 8 -> SIGBUS
  gpu evict
  cpu read a[0..3] 8
  cpu read a[4..128] 8
  expect vram <= 128K
  map b 512K
  cpu write b 1
  gpu write b 2 x20
  cpu read b 2
";

#[test]
fn a_bad_page_of_device_memory_is_neither_copied_nor_used_again() {
    let file = std::env::temp_dir().join(format!("gpusvm-bad-page-{}.scn", std::process::id()));
    fs::write(&file, BAD_PAGE).expect("a file can be written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command
        .args(["conformance", "scenarios", "--file"])
        .arg(&file);
    let output = command.output().expect("the command runs");
    fs::remove_file(&file).expect("it is there");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
}
