//! The tree keeps its own rules: who may use whom, where `unsafe` stands, how long things are, and
//! that the documents tell the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use gpusvm_tests::{Source, functions, root, skipped, sources, walk};
use syn::visit::{self, Visit};

/// Folder of each crate, and which of ours it may use.
const CRATES: [(&str, &str, &[&str]); 10] = [
    ("core", "gpusvm", &[]),
    ("abi", "gpusvm-abi", &[]),
    ("softgpu", "gpusvm-softgpu", &["gpusvm-abi"]),
    ("xe", "gpusvm-xe", &["gpusvm", "gpusvm-abi"]),
    ("dmirror", "gpusvm-dmirror", &["gpusvm", "gpusvm-abi"]),
    ("live", "gpusvm-live", &["gpusvm", "gpusvm-abi"]),
    ("model", "gpusvm-model", &["gpusvm", "gpusvm-abi"]),
    (
        "cli",
        "gpusvm-cli",
        &[
            "gpusvm",
            "gpusvm-abi",
            "gpusvm-softgpu",
            "gpusvm-xe",
            "gpusvm-dmirror",
            "gpusvm-live",
            "gpusvm-model",
        ],
    ),
    (
        "tests",
        "gpusvm-tests",
        &[
            "gpusvm",
            "gpusvm-abi",
            "gpusvm-softgpu",
            "gpusvm-xe",
            "gpusvm-live",
            "gpusvm-cli",
        ],
    ),
    (
        "guest",
        "gpusvm-guest",
        &[
            "gpusvm",
            "gpusvm-abi",
            "gpusvm-softgpu",
            "gpusvm-xe",
            "gpusvm-live",
            "gpusvm-cli",
        ],
    ),
];
const NO_STD: [&str; 5] = ["core", "abi", "softgpu", "xe", "dmirror"];
const NO_UNSAFE: [&str; 6] = ["core", "abi", "softgpu", "xe", "dmirror", "cli"];
/// Where `unsafe` may stand.
const UNSAFE: [&str; 2] = ["crates/live/src/sys/", "crates/model/src/sched/fiber.rs"];
const DOCUMENTS: [&str; 8] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/differences-from-linux.md",
    "docs/seed-rows.md",
    "docs/model.md",
    "docs/scenarios.md",
];

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Fails with all complaints at once.
fn check(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let mut command = cargo_metadata::MetadataCommand::new();
    command
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".into()]);
    let metadata = command.exec().expect("cargo describes the workspace");
    let ours: BTreeSet<String> = metadata
        .packages
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    let table: BTreeMap<&str, &[&str]> =
        CRATES.iter().map(|(_, name, may)| (*name, *may)).collect();
    let mut complaints = Vec::new();
    for package in &metadata.packages {
        let Some(may) = table.get(package.name.as_str()) else {
            complaints.push(format!(
                "{}: not in the table of crates; add it",
                package.name
            ));
            continue;
        };
        let normal = |dependency: &&cargo_metadata::Dependency| {
            dependency.kind == cargo_metadata::DependencyKind::Normal
        };
        for dependency in package.dependencies.iter().filter(normal) {
            if ours.contains(&dependency.name) && !may.contains(&dependency.name.as_str()) {
                complaints.push(format!("{} must not use {}", package.name, dependency.name));
            }
        }
    }
    assert_eq!(ours.len(), CRATES.len(), "{ours:?}");
    check(complaints);
}

#[test]
fn no_std_crates_know_no_std() {
    let mut complaints = Vec::new();
    for source in sources()
        .iter()
        .filter(|s| NO_STD.contains(&s.krate()) && s.path.contains("/src/") && !s.is_test())
    {
        if source.path.ends_with("src/lib.rs") && !source.text.contains("#![no_std]") {
            complaints.push(format!("{}: says no `#![no_std]`", source.path));
        }
        let code = source
            .text
            .split("#[cfg(test)]\nmod ")
            .next()
            .unwrap_or_default();
        let code = code.replace("#[cfg(test)]\nextern crate std;", "");
        for (n, line) in code.lines().enumerate() {
            let prose = line.trim_start().starts_with("//");
            if !prose && (line.contains("std::") || line.contains("extern crate std")) {
                complaints.push(format!("{}:{}: uses std: {line}", source.path, n + 1));
            }
        }
    }
    check(complaints);
    build_without_std();
}

/// Builds the crates for a target that has no std, where this machine has one.
fn build_without_std() {
    const TARGET: &str = "x86_64-unknown-none";
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .current_dir(root())
        .output();
    let sysroot = sysroot.expect("rustc is there").stdout;
    let sysroot = String::from_utf8(sysroot).expect("a path");
    if !Path::new(sysroot.trim())
        .join("lib/rustlib")
        .join(TARGET)
        .exists()
    {
        skipped(&format!("target {TARGET} is not installed"));
        return;
    }
    let packages = [
        "gpusvm",
        "gpusvm-abi",
        "gpusvm-softgpu",
        "gpusvm-xe",
        "gpusvm-dmirror",
    ];
    let mut build = Command::new("cargo");
    build.args(["build", "--offline", "--target", TARGET, "--target-dir"]);
    build.arg(root().join("target/no-std")).current_dir(root());
    for package in packages {
        build.args(["-p", package]);
    }
    assert!(
        build.status().expect("cargo is there").success(),
        "no_std crates must build"
    );
}

#[test]
fn unsafe_code_stands_where_it_may_and_is_proved() {
    let mut complaints = Vec::new();
    for source in sources() {
        let place = source.path.clone();
        if place.ends_with("src/lib.rs")
            && NO_UNSAFE.contains(&source.krate())
            && !source.text.contains("#![forbid(unsafe_code)]")
        {
            complaints.push(format!("{place}: says no `#![forbid(unsafe_code)]`"));
        }
        let lines: Vec<&str> = source.text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let unproved = ["unsafe {", "unsafe impl"]
                .iter()
                .any(|word| code.contains(word))
                && !code.contains('"');
            if !unproved {
                continue;
            }
            if !UNSAFE.iter().any(|folder| place.starts_with(folder)) {
                complaints.push(format!("{place}:{}: no place for unsafe code", n + 1));
            }
            // The proof stands above the statement, which may have begun some lines earlier.
            let above = &lines[n.saturating_sub(8)..=n];
            if !above.iter().any(|line| line.contains("// SAFETY:")) {
                complaints.push(format!("{place}:{}: no `// SAFETY:` above", n + 1));
            }
        }
    }
    check(complaints);
}

#[test]
fn functions_and_files_are_short() {
    let mut complaints = Vec::new();
    let mut lengths = Vec::new();
    for source in sources() {
        for function in functions(&source).into_iter().filter(|f| !f.in_tests) {
            lengths.push(function.lines);
            if function.lines > 70 {
                let place = format!("{}:{}", source.path, function.line);
                complaints.push(format!(
                    "{place}: {} has {} lines",
                    function.name, function.lines
                ));
            }
        }
        let all = source.text.lines().count();
        let code = source
            .text
            .split("#[cfg(test)]\nmod tests {")
            .next()
            .unwrap_or_default();
        let code = if source.is_test() {
            0
        } else {
            code.lines().count()
        };
        if all > 800 || code > 500 {
            complaints.push(format!(
                "{}: {code} lines of code, {all} in all",
                source.path
            ));
        }
    }
    lengths.sort_unstable();
    let (median, p90) = (lengths[lengths.len() / 2], lengths[lengths.len() * 9 / 10]);
    if median > 10 || p90 > 30 {
        complaints.push(format!("function lengths: median {median}, p90 {p90}"));
    }
    check(complaints);
}

/// So many lines in a row that say something stand nowhere else: two hosts, two drivers and several
/// devices share what they have in common.
const TWICE: usize = 10;

#[test]
fn nothing_is_written_twice() {
    let mut seen: BTreeMap<Vec<&str>, String> = BTreeMap::new();
    let mut complaints = Vec::new();
    let sources = sources();
    let ours = |source: &&Source| source.path.contains("/src/") && !source.is_test();
    for source in sources.iter().filter(ours) {
        let lines = telling_lines(&source.text);
        for window in lines.windows(TWICE) {
            let text: Vec<&str> = window.iter().map(|(_, line)| *line).collect();
            let here = format!("{}:{}", source.path, window[0].0);
            if let Some(there) = seen.insert(text, here.clone()) {
                complaints.push(format!("{here} is {there} once more"));
            }
        }
    }
    check(complaints);
}

/// Lines before the tests of a file that are no comment, import or bracket, with their numbers.
fn telling_lines(text: &str) -> Vec<(usize, &str)> {
    let lines = (1..).zip(text.lines().map(str::trim));
    let code = lines.take_while(|(_, line)| *line != "#[cfg(test)]");
    let tells = |line: &str| {
        let import = line.starts_with("//") || line.starts_with("use ");
        !import && line.contains(|c: char| c.is_alphanumeric())
    };
    code.filter(|(_, line)| tells(line)).collect()
}

#[test]
fn no_globs_no_stubs_and_lints_are_inherited() {
    // Put together, so that this file does not contain them.
    let forbidden = ["todo", "unimplemented", "dbg"].map(|word| format!("{word}!("));
    let attributes = ["ignore", "allow("].map(|word| format!("#[{word}"));
    let mut complaints = Vec::new();
    for source in sources() {
        for (n, line) in source.text.lines().enumerate() {
            let place = format!("{}:{}", source.path, n + 1);
            let code = line.split("//").next().unwrap_or_default().trim();
            let glob = code.starts_with("use ") && code.ends_with("::*;");
            let prelude = code == "use super::*;" || code == "use proptest::prelude::*;";
            if glob && !prelude {
                complaints.push(format!("{place}: glob import: {code}"));
            }
            let words = forbidden.iter().chain(&attributes);
            for word in words.filter(|word| code.contains(word.as_str())) {
                complaints.push(format!("{place}: contains {word}"));
            }
        }
    }
    for (folder, ..) in CRATES {
        let manifest = match folder {
            "tests" => "tests/Cargo.toml".into(),
            "guest" => "tests/guest/Cargo.toml".into(),
            _ => format!("crates/{folder}/Cargo.toml"),
        };
        if !read(&manifest).contains("[lints]\nworkspace = true") {
            complaints.push(format!("{manifest}: does not inherit the lints"));
        }
    }
    check(complaints);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut complaints = Vec::new();
    for document in DOCUMENTS {
        let folder = root()
            .join(document)
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        for target in links(&read(document)) {
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !folder.join(file).exists() {
                complaints.push(format!("{document}: {target} leads nowhere"));
            }
        }
    }
    check(complaints);
}

/// Targets of Markdown links, without those that leave the tree.
fn links(text: &str) -> Vec<&str> {
    let ends = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    ends.filter(|target| !target.contains("://")).collect()
}

#[test]
fn every_step_of_the_three_flows_is_a_function() {
    let text = read("ARCHITECTURE.md");
    let section = text
        .split("## The three flows")
        .nth(1)
        .expect("the section is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let known = known_functions(&sources());
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let steps: Vec<&str> = rows.filter_map(|row| row.split('`').next()).collect();
    assert!(
        steps.len() >= 20,
        "the tables have lost their steps: {steps:?}"
    );
    let missing = |step: &&&str| !known.contains(**step);
    check(
        steps
            .iter()
            .filter(missing)
            .map(|s| format!("ARCHITECTURE.md: no function {s}"))
            .collect(),
    );
}

/// `Type::function` and `module::function` of everything in the tree.
fn known_functions(sources: &[Source]) -> BTreeSet<String> {
    let mut known = BTreeSet::new();
    for source in sources {
        for function in functions(source) {
            let owner = if function.owner.is_empty() {
                source.module()
            } else {
                &function.owner
            };
            known.insert(format!("{owner}::{}", function.name));
        }
    }
    known
}

#[test]
fn the_project_speaks_of_itself_alone() {
    let mut paths = Vec::new();
    for extension in ["rs", "md", "toml"] {
        walk(&root().join("crates"), extension, &mut paths);
        walk(&root().join("tests"), extension, &mut paths);
        walk(&root().join("docs"), extension, &mut paths);
    }
    paths.extend(DOCUMENTS.iter().map(|document| root().join(document)));
    // Put together, so that this file does not contain them.
    let words = ["work/", "root/", "home/"].map(|folder| format!(" /{folder}"));
    let mut complaints = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).expect("a file can be read");
        for word in words.iter().filter(|word| text.contains(word.as_str())) {
            complaints.push(format!(
                "{}: names a place on a machine:{word}",
                path.display()
            ));
        }
    }
    check(complaints);
}

/// Device memory belongs to a device, not to an address space of it.
#[test]
fn device_memory_knows_no_address_space() {
    let of_memory = |path: &str| {
        let places = ["crates/core/src/pagemap/", "crates/core/src/vram/"];
        places.iter().any(|place| path.starts_with(place))
    };
    let above = ["svm", "range", "chunk", "pages"].map(|module| format!("crate::{module}"));
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| of_memory(&source.path)) {
        for module in above.iter().filter(|module| source.text.contains(*module)) {
            complaints.push(format!("{} must not use {module}", source.path));
        }
    }
    check(complaints);
}

#[test]
fn no_match_over_page_table_entries_has_a_catch_all() {
    let mut finder = CatchAlls::default();
    for source in sources() {
        if source.path.starts_with("crates/model/src") && !source.is_test() {
            finder.path.clone_from(&source.path);
            finder.visit_file(&source.file);
        }
    }
    assert!(finder.seen > 20, "{} matches over entries", finder.seen);
    check(finder.complaints);
}

/// Finds matches over kinds of entries.
#[derive(Default)]
struct CatchAlls {
    path: String,
    seen: usize,
    complaints: Vec<String>,
}

impl<'ast> Visit<'ast> for CatchAlls {
    fn visit_expr_match(&mut self, found: &'ast syn::ExprMatch) {
        let mut kinds = Kinds(0);
        found.arms.iter().for_each(|arm| kinds.visit_pat(&arm.pat));
        let catches = |arm: &syn::Arm| match &arm.pat {
            syn::Pat::Ident(name) => name.subpat.is_none(),
            pattern => matches!(pattern, syn::Pat::Wild(_)),
        };
        self.seen += usize::from(kinds.0 > 0);
        if kinds.0 > 0 && found.arms.iter().any(catches) {
            let line = found.match_token.span.start().line;
            let place = format!("{}:{line}", self.path);
            self.complaints.push(format!("{place}: name all kinds"));
        }
        visit::visit_expr_match(self, found);
    }
}

/// Counts kinds of entries in patterns.
struct Kinds(usize);

impl<'ast> Visit<'ast> for Kinds {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let first = path.segments.first();
        self.0 += usize::from(first.is_some_and(|one| one.ident == "Entry"));
    }
}

#[test]
fn ci_runs_the_test_command_of_the_readme() {
    let readme = read("README.md");
    let section = readme
        .split("## Test")
        .nth(1)
        .expect("README has a section `## Test`");
    let command = section.split("```").nth(1).expect("with a command in it");
    let command = command.trim_start_matches("sh").trim();
    let ci = read(".ci/run");
    assert!(
        ci.lines().any(|line| line.trim() == command),
        ".ci/run does not run `{command}`"
    );
}
