//! `gpusvm run --report DIR` as a user meets it: files, exit codes, what is said.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The arguments of a small run.
const STREAM: [&str; 6] = ["run", "stream", "--size", "4M", "--vram", "4M"];

fn gpusvm(args: &[&str], report: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.args(args).arg("--report").arg(report);
    command.output().expect("the binary runs")
}

/// A path in the tests' own folder at which nothing is.
fn fresh(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("report")
        .join(name);
    // What is not there need not go.
    let _gone = fs::remove_dir_all(&path);
    let _gone = fs::remove_file(&path);
    path
}

/// Whether workloads can run here; says why not.
#[expect(clippy::print_stdout, reason = "a test's own output")]
fn can_run() -> bool {
    let mut info = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    let info = info.args(["info", "--json"]).output();
    let info = info.expect("the binary runs").stdout;
    let info: Value = serde_json::from_slice(&info).expect("info is JSON");
    let level = &info["host"]["level"];
    if level == "none" {
        println!("skipped: {}", info["host"]["why"]);
    }
    level != "none"
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn a_run_leaves_its_page_its_json_and_its_statistics() {
    if !can_run() {
        return;
    }
    let folder = fresh("made/on/the/way");
    let output = gpusvm(&STREAM, &folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stats = read(&folder, "stream.gt0.stats");
    let names = [
        "svm_pagefault_count",
        "tlb_inval_count",
        "vma_pagefault_count",
        "vma_pagefault_kb",
    ];
    for (line, name) in stats.lines().zip(names) {
        let (found, value) = line.split_once(": ").expect("`name: value`");
        assert_eq!(found, name);
        assert!(value.parse::<u64>().is_ok(), "{line}");
    }
    let json: Value = serde_json::from_str(&read(&folder, "stream.json")).expect("JSON");
    assert_eq!(json["verified"], true);
    let page = read(&folder, "report.html");
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(page.contains("<h2 id=\"stream\">stream</h2>"));
    let names = fs::read_dir(&folder).expect("a folder").count();
    assert_eq!(names, 3, "nothing else is written");
}

#[test]
fn the_json_file_is_what_json_prints_and_both_at_once_work() {
    if !can_run() {
        return;
    }
    let folder = fresh("json");
    let output = gpusvm(&[&STREAM[..], &["--json"]].concat(), &folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), read(&folder, "stream.json"));
}

#[test]
fn pictures_account_for_every_fault_that_was_counted() {
    if !can_run() {
        return;
    }
    let folder = fresh("sums");
    let output = gpusvm(&STREAM, &folder);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stats = read(&folder, "stream.gt0.stats");
    let faults = stats
        .lines()
        .next()
        .and_then(|line| line.split(": ").nth(1));
    let faults = faults.expect("the first counter");
    assert_ne!(faults, "0");
    let page = read(&folder, "report.html");
    let legend = format!("</tspan> faults {faults}</text>");
    assert!(page.contains(&legend), "{legend}");
}

#[test]
fn what_finished_before_a_failure_is_reported() {
    if !can_run() {
        return;
    }
    let folder = fresh("partly");
    // Enough for `stream`, too little for a later workload of the set.
    let output = gpusvm(&["run", "--size", "16K", "--vram", "4M"], &folder);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let page = read(&folder, "report.html");
    assert!(page.contains("<h2 id=\"stream\">"));
    assert!(page.contains("It ended early: --size is too small"));
    assert!(!page.contains("<h2 id=\"sort\">"));
    assert!(folder.join("stream.json").exists());
}

#[test]
fn a_folder_that_does_not_do_is_refused_before_the_work() {
    let file = fresh("a-file");
    fs::create_dir_all(file.parent().expect("it has one")).expect("a folder can be made");
    fs::write(&file, "content").expect("a file can be written");
    for bad in [file.clone(), file.join("below"), "/proc/nowhere".into()] {
        let output = gpusvm(&STREAM, &bad);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(output.stdout.is_empty(), "no work was done");
        assert!(
            said.starts_with("gpusvm: cannot write the report to "),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(fs::read(&file).expect("it is there"), b"content");
}

#[test]
fn bad_usage_touches_no_report() {
    let folder = fresh("usage");
    let output = gpusvm(&["run", "nothing-of-that-name"], &folder);
    assert_eq!(output.status.code(), Some(2));
    assert!(!folder.exists());
}
