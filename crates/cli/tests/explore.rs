//! `gpusvm explore`: worlds that exist only in memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn explore(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.arg("explore").args(args);
    command.output().expect("the command runs")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

/// A file of this test's own.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn worlds_of_every_kind_keep_the_rules_and_are_the_same_again() {
    let once = |threads: &str| {
        let args = ["--scenario", "all", "--seeds", "64", "--json"];
        let output = explore(&[&args[..], &["--threads", threads]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        json(&output)
    };
    let (first, second) = (once("1"), once("3"));
    assert_eq!(first["verified"], true);
    let speed = first["scenarios"][0]["worlds_per_s_and_core"].as_f64();
    assert!(speed > Some(1.0), "{speed:?}");
    let hashes = |all: &Value| -> Vec<Value> {
        let all = all["scenarios"].as_array().expect("a list");
        all.iter().map(|one| one["hash"].clone()).collect()
    };
    assert!(hashes(&first).len() > 5);
    assert_eq!(hashes(&first), hashes(&second));
}

#[test]
fn known_bugs_are_found_and_their_short_tapes_fail_again() {
    let folder = file("tapes-of-bugs");
    let names = ["recheck-dropped", "newer-page-overwritten"];
    let all = names.join(",");
    let save = folder.to_str().expect("text");
    let output = explore(&["--mutant", &all, "--save", save, "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for answer in json(&output)["mutants"].as_array().expect("a list") {
        assert!(
            answer["choices"].as_u64().expect("a number") < 40,
            "{answer}"
        );
    }
    for name in names {
        let tape = folder.join(format!("{name}.tape"));
        let tape = tape.to_str().expect("text");
        let again = explore(&["--mutant", name, "--tape", tape, "--json"]);
        assert_eq!(again.status.code(), Some(1), "{name}");
        assert!(json(&again)["failure"].is_string());
        let twice = explore(&["--tape", tape, "--json"]);
        assert_eq!(json(&again)["hash"], json(&twice)["hash"]);
        assert_eq!(json(&twice)["as_recorded"], true);
        let without = explore(&["--mutant", "none", "--tape", tape]);
        assert!(without.status.success(), "{name}: it is the bug that fails");
    }
}

#[test]
fn one_known_bug_is_explained() {
    let tape = file("explained.tape");
    let save = tape.to_str().expect("text");
    let output = explore(&["--mutant", "recheck-dropped", "--save", save]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for part in [" cpu0 ", "replay: gpusvm explore --mutant NAME --tape"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // A tape of another version makes another world.
    let written = std::fs::read_to_string(&tape).expect("it was saved");
    let lines = written
        .lines()
        .map(|line| match line.strip_prefix("hash: ") {
            Some(_) => "hash: 0x1\n".to_owned(),
            None => format!("{line}\n"),
        });
    std::fs::write(&tape, lines.collect::<String>()).expect("written");
    let again = explore(&["--tape", save]);
    let shown = text(&again.stdout);
    assert!(shown.contains("this is another world"), "{shown}");
}

#[test]
fn a_leak_is_told_with_the_place_where_it_was_taken() {
    // What has an owner at the end, and what nobody refers to in between.
    for (bug, what) in [
        ("release-forgotten", "device memory ["),
        ("fork-drops-reference", "frame "),
    ] {
        let save = file(&format!("{bug}.tape"));
        let save = save.to_str().expect("text");
        let output = explore(&["--mutant", bug, "--save", save]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let shown = text(&output.stdout);
        let mut lines = shown.lines().map(str::trim);
        let place = lines.find(|line| line.starts_with(what) && line.contains(": taken by "));
        let place = place.unwrap_or_else(|| panic!("{bug}: {shown}"));
        assert!(place.contains(" in ") && place.ends_with(" ns"), "{place}");
    }
}

#[test]
fn coverage_is_the_same_on_any_number_of_threads() {
    let args = ["--scenario", "swarm", "--seeds", "128", "--coverage"];
    let with = |more: &[&str]| {
        let output = explore(&[&args[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        output
    };
    let coverage = |threads| json(&with(&["--json", "--threads", threads]))["coverage"].clone();
    let alone = coverage("1");
    assert_eq!(alone, coverage("3"));
    let number = |name: &str| alone[name].as_u64().expect("a number");
    assert!(number("reached") > 200 && number("reached") < number("possible"));
    let missing = alone["never"].as_array().expect("a list").len() as u64;
    assert_eq!(number("possible") - number("reached"), missing);
    let output = with(&[]);
    let shown = text(&output.stdout);
    assert!(shown.contains("\nserve_fault "), "{shown}");
    assert!(shown.contains("\ncoverage: "), "{shown}");
    assert!(!shown.contains("this cannot be"), "{shown}");
}

#[test]
fn bad_input_gets_a_clear_error() {
    let damaged = file("damaged.tape");
    std::fs::write(&damaged, "gpusvm tape 1\nscenario: swarm\nchoices: x\n").expect("written");
    let damaged = damaged.to_str().expect("text");
    for (args, code, what) in [
        (
            &["--scenario", "nowhere"][..],
            2,
            "there is no scenario nowhere",
        ),
        (&["--mutant", "nothing"], 2, "there is no mutant nothing"),
        (&["--tape", "/nowhere"], 2, "tape /nowhere: cannot be read"),
        (&["--tape", "/"], 2, "tape /: cannot be read"),
        (&["--tape", damaged], 2, "line 3: `x` is not a number"),
        (
            &["--tape", damaged, "--scenario", "full"],
            2,
            "cannot be used with",
        ),
        (&["--mutant", "all", "--coverage"], 2, "cannot be used with"),
        (&["--seed", "18446744073709551615"], 2, "is not in 0.."),
        (&["--seeds", "18446744073709551615"], 2, "is not in 1.."),
        (
            &["--save", "/nowhere/a.tape"],
            2,
            "cannot write a tape to /nowhere/a.tape",
        ),
        (
            &["--mutant", "recheck-dropped", "--save", "/nowhere/a.tape"],
            2,
            "name another place with --save",
        ),
        (
            &["--mutant", "all", "--save", "/dev/null"],
            2,
            "cannot write a tape to /dev/null",
        ),
    ] {
        let output = explore(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        let told = text(&output.stderr);
        assert!(told.contains(what) && told.lines().count() == 1, "{told}");
        assert!(output.stdout.is_empty(), "{args:?}: nothing was done");
    }
}

#[test]
fn a_place_for_tapes_is_left_as_it_was() {
    let (new, old) = (file("no-failure.tape"), file("old.tape"));
    std::fs::write(&old, "old").expect("written");
    for path in [&new, &old] {
        let save = path.to_str().expect("text");
        assert!(explore(&["--seeds", "1", "--save", save]).status.success());
    }
    assert!(!new.exists());
    assert_eq!(std::fs::read_to_string(&old).expect("it stays"), "old");
}
