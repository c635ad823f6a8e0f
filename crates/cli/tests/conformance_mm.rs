//! `gpusvm conformance mm`: the running kernel and the model.

use std::path::Path;
use std::process::{Command, Output};

use gpusvm::mutant::Mutant;
use serde_json::Value;

/// The kernel that the model is.
const MODELLED: &str = "6.18.";

fn mm(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.args(["conformance", "mm"]).args(args);
    command.output().expect("the command runs")
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

/// Why this kernel cannot be compared with the model.
fn foreign() -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let release = release.trim();
    let same = release.starts_with(MODELLED);
    (!same).then(|| format!("the model is Linux {MODELLED}x, this kernel is {release}"))
}

fn row(name: &str, host: &str) {
    let output = mm(&["--row", name, "--host", host]);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{shown}");
    assert!(shown.contains(name), "{shown}");
}

macro_rules! rows {
    ($($test:ident = $name:literal,)*) => {
        mod kernel {
            $(
                #[test]
                fn $test() {
                    if let Some(why) = super::foreign() {
                        return println!("skipped: {why}");
                    }
                    super::row($name, "kernel");
                }
            )*
        }
        mod model {
            $(
                #[test]
                fn $test() {
                    super::row($name, "model");
                }
            )*
        }
    };
}

rows! {
    mappings_merge = "M05",
    batches_are_advised_in_order = "M06",
    guards_refuse_accesses = "M13",
    guards_are_seen_in_the_pagemap = "M21",
    entries_change_over_several_tables = "M26",
    mappings_move_and_resize = "M35",
    large_pages_have_owners = "M36",
    large_pages_are_split = "M41",
    advices_are_checked = "M45",
    what_the_model_once_did_otherwise = "found",
}

#[test]
fn every_advice_is_answered_alike_by_both() {
    if let Some(why) = foreign() {
        return println!("skipped: {why}");
    }
    row("M45", "both");
}

#[test]
fn random_programs_do_the_same_on_both() {
    if let Some(why) = foreign() {
        return println!("skipped: {why}");
    }
    let output = mm(&["--programs", "300", "--json"]);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{shown}");
    let object: Value = serde_json::from_str(shown).expect("one JSON object");
    let count = |name: &str| object[name].as_u64().expect("a number");
    let repeated = object["unrepeated"].as_array().expect("a list");
    assert_eq!(count("passed") + repeated.len() as u64, 300, "{shown}");
    assert!(count("passed") > 290, "{shown}");
    assert_eq!(object["verified"], true);
    assert_eq!(object["host"], "both");
}

#[test]
fn planted_bugs_are_found_and_made_short() {
    if let Some(why) = foreign() {
        return println!("skipped: {why}");
    }
    for bug in Mutant::CALLS {
        let output = mm(&["--plant", bug.name(), "--programs", "5000", "--json"]);
        let shown = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{}: {shown}", bug.name());
        let object: Value = serde_json::from_str(shown).expect("one JSON object");
        let steps = object["failures"][0]["steps"].as_u64().expect("a number");
        assert!((1..=5).contains(&steps), "{}: {shown}", bug.name());
    }
}

#[test]
fn models_transcript_is_what_this_kernel_says() {
    if let Some(why) = foreign() {
        return println!("skipped: {why}");
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/linux-6.18.txt");
    let written = std::fs::read_to_string(&file).expect("the transcript is there");
    let path = file.to_str().expect("text");
    let output = mm(&["--retell", path, "--host", "kernel"]);
    let told = text(&output.stdout);
    // The first line names the kernel.
    assert!(told.lines().skip(1).eq(written.lines().skip(1)));
    assert!(told.lines().count() > 2000);
}

#[test]
fn bad_input_gets_a_clear_error() {
    for (args, what) in [
        (["--row", "M99"], "there is no row M99; there are M05, M06"),
        (["--plant", "nothing"], "there is no bug nothing to plant"),
        (["--retell", "/nowhere"], "/nowhere: cannot be read"),
        (["--retell", "/dev/null"], "there is no program in it"),
        (["--programs", "0"], "0 is not in 1.."),
        (["--seed", "18446744073709551615"], "is not in 0.."),
        (["--retell=/dev/null", "--json"], "cannot be used with"),
        (["--row=M35", "--steps=3"], "cannot be used with"),
    ] {
        let output = mm(&args);
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let told = text(&output.stderr);
        assert!(told.contains(what) && told.lines().count() == 1, "{told}");
    }
}
