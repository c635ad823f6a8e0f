//! What crosses the borders of the command: bad input is told in one line and loses nothing, and so is output that
//! cannot be written.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use common::{file, gpusvm, output, text};

mod common;

/// The user `nobody`, who has no privilege.
const NOBODY: u32 = 65534;

/// Asserts that the command refuses `args` in one line that contains `why`, and with exit code 2.
fn assert_usage(args: &[&str], why: &str) {
    let output = output(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    assert!(said.starts_with("gpusvm: "), "{args:?}: {said}");
    assert!(said.contains(why), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}: nothing was done");
}

#[test]
fn bad_command_lines_are_told_in_one_line() {
    for (args, why) in [
        (&["frob"][..], "unrecognized subcommand 'frob'"),
        (&["run", "nope"], "there is no workload `nope`"),
        (&["run", "--size"], "a value is required"),
        (&["run", "stream", "--size", "0"], "a size of zero"),
        (&["run", "stream", "--size", "12X"], "`12X` is no size"),
        (&["run", "stream", "--size", "-1"], "'-1'"),
        (
            &["run", "stream", "--size", "17179869184G"],
            "more than this machine can address",
        ),
        (&["run", "stream", "--size", "1"], "use 24 or more"),
        (&["run", "stream", "--size", "900T"], "are available"),
        (&["run", "stream", "--vram", "1M"], "use --vram 4M or more"),
        (&["run", "stream", "--threads", "0"], "1..=256"),
        (&["run", "stream", "--host", "mars"], "possible values"),
        (
            &["run", "stream", "--input", "x"],
            "--input does not go with",
        ),
        (
            &["run", "wordcount", "--size", "1M"],
            "--size does not go with",
        ),
        (&["bench", "nope"], "there is no bench `nope`"),
        (&["conformance"], "requires a subcommand"),
    ] {
        assert_usage(args, why);
    }
}

#[test]
fn scenarios_that_are_not_there_are_told_in_one_line() {
    let scenarios = |args: &[&str], why| {
        assert_usage(&[&["conformance", "scenarios"], args].concat(), why);
    };
    scenarios(&["9"], "it waits for: cannot come about");
    scenarios(&["999"], "there are 1, 2, ");
    scenarios(&["--file", "/nowhere/at/all"], "cannot be read: No such");
    scenarios(&["--file", "/dev/null"], "there is no scenario in it");
    let own = file("own.scn", b"scenario 3 mine\n  map a 2M\n");
    let own = own.display().to_string();
    scenarios(&["--file", &own, "9"], "there are 3");
    let binary = file("binary.scn", b"\xff\xfe");
    scenarios(
        &["--file", &binary.display().to_string()],
        "cannot be read: ",
    );
}

#[test]
fn scenarios_that_ask_for_too_much_fail_with_their_line() {
    for (line, why) in [
        ("map b 900T", "own.scn:3: the land is full"),
        (
            "cpu read a[1000000000] 0",
            "own.scn:3: `a` does not reach as far",
        ),
        ("map b 20M\n  remap b c", "own.scn:4: the land is full"),
    ] {
        let text = format!("scenario 1 mine\n  map a 2M\n  {line}\n");
        let own = file("much-own.scn", text.as_bytes());
        let output = output(&[
            "conformance",
            "scenarios",
            "--file",
            &own.display().to_string(),
        ]);
        let said = text_of(&output);
        assert_eq!(output.status.code(), Some(1), "{line}: {said}");
        assert!(said.contains(why), "{line}: {said}");
    }
}

fn text_of(output: &Output) -> String {
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn demo_set_that_ends_early_shows_what_it_has_done() {
    // Enough for the first workloads of the set, and too little for a later one.
    let args = ["run", "--host", "model", "--size", "32K", "--vram", "512K"];
    let shown = output(&args);
    assert_eq!(shown.status.code(), Some(2));
    assert!(text(&shown.stderr).contains("--size is too small"));
    let said = text(&shown.stdout);
    assert!(
        said.contains("\nstream ") && !said.contains("stencil"),
        "{said}"
    );
    let output = output(&[&args[..], &["--json"]].concat());
    let object: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(object["verified"], false);
    assert_eq!(object["runs"][0]["verified"], true);
    let ended = object["ended"].as_str().expect("a reason");
    assert!(ended.contains("too small"), "{ended}");
}

#[test]
fn input_that_cannot_be_read_is_told_in_one_line() {
    assert_usage(&["run", "wordcount"], "name one with --input FILE");
    let count = |path: &str, why| assert_usage(&["run", "wordcount", "--input", path], why);
    count("/nowhere/at/all", "No such file");
    count("/", "not a regular file");
    count("/dev/null", "not a regular file");
    let pipe = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("input.pipe");
    // What is not there need not go.
    let _gone = fs::remove_file(&pipe);
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo can be run").success());
    count(&pipe.display().to_string(), "not a regular file");
    let empty = file("empty.txt", b"");
    count(&empty.display().to_string(), "the file is empty");
}

#[test]
fn output_that_cannot_be_written_is_told_by_every_command() {
    let all: [&[&str]; 4] = [
        &[
            "run", "stream", "--size", "1M", "--vram", "512K", "--host", "model",
        ],
        &["info"],
        &["explore", "--seeds", "1"],
        &["conformance", "scenarios", "1"],
    ];
    for args in all {
        let full = fs::File::create("/dev/full").expect("Linux has one");
        let output = gpusvm(args).stdout(full).output().expect("it runs");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(said.contains("standard output: No space"), "{said}");
    }
}

#[test]
fn help_and_version_are_answers() {
    for args in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let output = output(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(text(&output.stdout).contains("gpusvm"), "{args:?}");
        assert!(output.stderr.is_empty(), "{args:?}");
    }
    let help = text(&output(&["--help"]).stdout);
    assert!(help.starts_with("GPU shared virtual memory"), "{help}");
    let help = text(&output(&["run", "--help"]).stdout);
    for workload in gpusvm_cli::workload::ALL {
        assert!(help.contains(workload.about), "{}", workload.name);
    }
}

#[test]
fn unreadable_input_is_told_to_a_user_without_privilege() {
    use std::os::unix::fs::PermissionsExt;
    let path = file("secret.txt", b"words");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("the file is ours");
    let mut command = gpusvm(&["run", "wordcount", "--input", &path.display().to_string()]);
    command.uid(NOBODY).gid(NOBODY);
    match command.output() {
        Ok(output) => {
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            assert!(said.contains("Permission denied"), "{said}");
        }
        Err(error) => println!("skipped: another user cannot run the command: {error}"),
    }
}
