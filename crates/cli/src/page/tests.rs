use super::*;

use std::time::Duration;

use gpusvm::seam::env::Ns;
use serde_json::json;

use crate::report::stats_json;
use gpusvm_xe::stats::DeviceStats;

fn run() -> Report {
    let stats = DeviceStats::new(1);
    let mut counters = stats_json(&stats);
    counters.insert("evict_count".into(), json!(439));
    Report {
        workload: "stream",
        verified: true,
        elapsed: Duration::from_millis(5),
        clock: crate::report::Clock::Real,
        bytes: 1 << 20,
        traffic: 1 << 20,
        vram: 64 << 20,
        answer: None,
        counts: None,
        host: json!({
            "level": "full", "bracket": "patched", "thp": "always", "kernel": "6.11",
            "not_covered": ["a & b", "c"],
        }),
        config: json!({ "size": 268_435_456, "seed": 7, "input": "<script>alert('x')</script>" }),
        stats: counters,
        gts: vec!["svm_pagefault_count: 0\n".into()],
        picture: Some(Picture {
            columns: Columns {
                width: Ns(100_000),
                columns: vec![Default::default(); 60],
            },
            ran: Ns(5_000_000),
        }),
    }
}

fn page(runs: &[Report]) -> String {
    Page { runs, ended: None }.to_string()
}

#[test]
fn text_from_elsewhere_is_escaped() {
    let page = page(&[run()]);
    assert!(page.contains("input &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"));
    assert!(!page.contains("<script"));
    assert!(page.contains("not covered: a &amp; b"));
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let page = page(&[run(), run()]);
    for word in [
        "://", "@import", "url(", "<link", "<img", "<script", " src=",
    ] {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn each_run_has_its_row_two_pictures_its_files_and_counters_that_are_not_zero() {
    let page = page(&[run()]);
    assert!(page.contains("<a href=\"#stream\">stream</a>"));
    assert_eq!(page.matches("<svg ").count(), 2);
    assert!(page.contains("href=\"stream.json\"") && page.contains("href=\"stream.gt0.stats\""));
    assert!(page.contains("<tr><td>evict_count</td><td>439</td></tr>"));
    assert!(!page.contains("cpu_fault_count"));
    assert_eq!(
        page.matches("<th>counter</th>").count(),
        1,
        "no empty table"
    );
    assert!(page.contains("seed 7, size 256M. Files: "), "{page}");
    assert!(page.contains("VRAM 64 MiB"));
    assert!(page.contains("Shaded: after the run"));
}

#[test]
fn every_counter_belongs_to_one_of_the_tables() {
    let known = |name: &str| KINDS.iter().any(|(_, end)| name.ends_with(end));
    assert!(Counter::ALL.iter().all(|counter| known(counter.name())));
}

#[test]
fn a_wrong_answer_and_an_early_end_are_plain_to_see() {
    let wrong = Report {
        verified: false,
        ..run()
    };
    let text = Page {
        runs: &[wrong],
        ended: Some("gups: <stopped>"),
    }
    .to_string();
    assert!(text.contains("<td class=\"bad\">NO</td>"));
    assert!(text.contains("The answer is wrong."));
    assert!(text.contains("It ended early: gups: &lt;stopped&gt;"));
    assert!(Page::default().to_string().contains("no run has finished"));
}
