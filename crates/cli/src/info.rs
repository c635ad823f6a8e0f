//! `gpusvm info`: what this machine and kernel allow, and what follows for the user.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use gpusvm_live::{Facts, LiveConfig, LiveEnv, LiveSpace, RuntimeScope, probe, thread};
use serde_json::{Map, Value, json};

use crate::args::InfoArgs;
use crate::size;
use crate::table::Table;

/// Prints the facts, and the levels that a live space would have here.
///
/// # Errors
/// A level that is insisted on cannot be had, or standard output is closed.
pub fn info(args: InfoArgs, out: &mut dyn Write) -> Result<(), InfoError> {
    let facts = probe();
    let config = args.live.config();
    let levels = match levels(&config) {
        Err(why) if config != LiveConfig::default() => return Err(InfoError::Refused(why)),
        levels => levels,
    };
    print(args, &facts, &levels, out).map_err(InfoError::Output)
}

/// `info` failed.
#[derive(Debug)]
pub enum InfoError {
    /// What was insisted on cannot be had; why.
    Refused(String),
    /// Standard output is closed, or its disk is full.
    Output(io::Error),
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => f.write_str(why),
            Self::Output(why) => write!(f, "standard output: {why}"),
        }
    }
}

impl std::error::Error for InfoError {}

type Levels = Result<[String; 4], String>;

fn print(args: InfoArgs, facts: &Facts, levels: &Levels, out: &mut dyn Write) -> io::Result<()> {
    if args.output.json {
        return writeln!(out, "{:#}", as_json(facts, levels));
    }
    let mut table = Table::new(&["what", "here"]);
    for (what, here) in rows(facts) {
        table.row(vec![what.to_owned(), here]);
    }
    writeln!(out, "{table}")?;
    match levels {
        Ok(levels) => {
            writeln!(out, "faults:   {}; not covered: {}", levels[0], levels[1])?;
            writeln!(out, "brackets: {}; not covered: {}", levels[2], levels[3])?;
        }
        Err(why) => writeln!(out, "a live space cannot be opened here: {why}")?,
    }
    for advice in advice(facts) {
        writeln!(out, "note: {advice}")?;
    }
    Ok(())
}

fn rows(facts: &Facts) -> Vec<(&'static str, String)> {
    let works = |result: &Result<(), String>| match result {
        Ok(()) => "yes".to_owned(),
        Err(why) => format!("no: {why}"),
    };
    vec![
        ("kernel", facts.kernel.clone()),
        ("processors", facts.cpus.to_string()),
        (
            "memory available",
            facts
                .memory_available
                .map_or("unknown".into(), size::format),
        ),
        ("userfaultfd, full", works(&facts.uffd_full)),
        ("userfaultfd, user mode only", works(&facts.uffd_user)),
        (
            "UFFDIO_MOVE",
            if facts.uffd_move { "yes" } else { "no" }.to_owned(),
        ),
        (
            "faults on the faulting thread",
            if facts.uffd_features.contains(&"sigbus") {
                "yes"
            } else {
                "no"
            }
            .to_owned(),
        ),
        ("PROCMAP_QUERY", works(&facts.procmap_query)),
        ("PAGEMAP_SCAN", works(&facts.pagemap_scan)),
        ("transparent huge pages", facts.thp.clone()),
        (
            "mappings per process",
            facts
                .max_map_count
                .map_or("unknown".into(), |n| n.to_string()),
        ),
        (
            "userfaultfd features",
            facts.uffd_features.len().to_string(),
        ),
    ]
}

/// Names and limits of the fault level and the bracket level, found by opening a space.
fn levels(config: &LiveConfig) -> Levels {
    let open = || {
        let env = LiveEnv::new(0);
        let space = LiveSpace::open(config, Arc::clone(&env), Arc::new(()))
            .map_err(|error| error.to_string())?;
        let level = space.level();
        let names = [
            level.faults.name(),
            level.faults.limits(),
            level.bracket.name(),
            level.bracket.limits(),
        ];
        let names = names.map(str::to_owned);
        space.close();
        Ok(names)
    };
    let _in_runtime = RuntimeScope::enter();
    thread::run(open)
}

fn advice(facts: &Facts) -> Vec<&'static str> {
    let mut advice = Vec::new();
    if facts.uffd_full.is_err() {
        advice.push(
            "run as root or set vm.unprivileged_userfaultfd=1 for system calls on device memory",
        );
    }
    if facts.thp == "never" {
        advice.push("huge pages are off: moving 2 MiB takes 20 times longer");
    }
    if !facts.uffd_move {
        advice.push("a kernel of at least 6.8 is needed to move pages");
    }
    if facts.procmap_query.is_err() {
        advice.push("a kernel of at least 6.11 is needed to look mappings up");
    }
    advice
}

fn as_json(facts: &Facts, levels: &Levels) -> Value {
    let host = match levels {
        Ok([level, fault_limits, bracket, bracket_limits]) => json!({
            "kind": "live", "level": level, "bracket": bracket,
            "not_covered": [fault_limits, bracket_limits],
        }),
        Err(why) => json!({ "kind": "live", "level": "none", "why": why }),
    };
    json!({
        "schema": 1,
        "host": host,
        "kernel": facts.kernel,
        "cpus": facts.cpus,
        "memory_available": facts.memory_available,
        "thp": facts.thp,
        "uffd_full": facts.uffd_full.is_ok(),
        "uffd_user_mode_only": facts.uffd_user.is_ok(),
        "uffd_move": facts.uffd_move,
        "uffd_features": facts.uffd_features,
        "procmap_query": facts.procmap_query.is_ok(),
        "pagemap_scan": facts.pagemap_scan.is_ok(),
        "max_map_count": facts.max_map_count,
        "refused": refused(facts),
        "advice": advice(facts),
    })
}

/// Why the system refuses what it refuses, by the names that it has elsewhere.
fn refused(facts: &Facts) -> Map<String, Value> {
    let asked = [
        ("uffd_full", &facts.uffd_full),
        ("uffd_user_mode_only", &facts.uffd_user),
        ("procmap_query", &facts.procmap_query),
        ("pagemap_scan", &facts.pagemap_scan),
    ];
    let why = |(what, result): (&str, &Result<(), String>)| {
        let why = result.as_ref().err()?;
        Some((what.to_owned(), Value::from(why.as_str())))
    };
    asked.into_iter().filter_map(why).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_tell_why_something_is_refused() {
        let facts = Facts {
            uffd_full: Err("not for you".to_owned()),
            uffd_user: Ok(()),
            procmap_query: Err("too old".to_owned()),
            pagemap_scan: Err("older".to_owned()),
            ..probe()
        };
        let told = json!({
            "uffd_full": "not for you", "procmap_query": "too old", "pagemap_scan": "older",
        });
        let levels = Err("nothing goes".to_owned());
        let object = as_json(&facts, &levels);
        assert_eq!(object["refused"], told);
        assert_eq!(object["host"]["why"], "nothing goes");
        let text = rows(&facts);
        for why in ["no: not for you", "no: too old", "no: older"] {
            assert!(text.iter().any(|(_, here)| here == why), "{why}");
        }
    }
}
