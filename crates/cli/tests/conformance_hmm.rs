//! The cases of the HMM test device, on both hosts.

use std::process::Command;

use serde_json::Value;

/// Runs `conformance hmm`, and returns its rows.
fn rows(host: &str) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpusvm"));
    command.args(["conformance", "hmm", "--host", host, "--short", "--json"]);
    let output = command.output().expect("it runs");
    let told = String::from_utf8_lossy(&output.stderr);
    let object: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(object["host"], host);
    let rows = object["rows"].as_array().expect("rows").clone();
    let failed = rows.iter().filter(|row| row["result"] == "failed");
    let failed: Vec<_> = failed.map(Value::to_string).collect();
    assert!(output.status.success(), "{told}{failed:?}");
    rows
}

fn count(rows: &[Value], variant: &str, result: &str) -> usize {
    let wanted = |row: &&Value| row["name"] == variant && row["result"] == result;
    rows.iter().filter(wanted).count()
}

#[test]
fn model_answers_all_cases_as_linux_does() {
    let rows = rows("model");
    assert_eq!(count(&rows, "private", "passed"), 39);
    assert_eq!(count(&rows, "coherent", "passed"), 39);
}

#[test]
fn this_process_answers_what_it_can_honestly_show() {
    let rows = rows("live");
    let lacks = |row: &&Value| row["result"] == "skipped" && row["name"] == "private";
    let skipped: Vec<_> = rows.iter().filter(lacks).collect();
    if skipped.len() == 39 {
        println!("skipped: {}", skipped[0]["why"]);
        return;
    }
    let by_nature = ["migrate_file_private", "hmm_gup_test"];
    for row in &skipped {
        let what = row["what"].as_str().expect("a name");
        let pool = what == "anon_write_hugetlbfs" || what == "compound";
        assert!(by_nature.contains(&what) || pool, "{what}: {}", row["why"]);
        println!("skipped: {what}: {}", row["why"]);
    }
    assert_eq!(count(&rows, "private", "passed") + skipped.len(), 39);
    assert_eq!(count(&rows, "coherent", "skipped"), 39);
}
