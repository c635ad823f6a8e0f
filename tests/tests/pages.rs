//! Pages for people that are made of the source, and pages that say something of it.

use std::fmt::Write;
use std::fs;

use gpusvm_tests::{assert_page, root, sources};
use gpusvm_xe::stats::Counter;
use syn::{Attribute, Item};

const STATISTICS: &str = "docs/statistics.md";

#[test]
fn every_statistic_is_on_its_page() {
    let mut page = String::from(
        "# Statistics\n\n\
         `gpusvm run --report DIR` writes one file for each GT of a device, a line `name: value` for each counter, in this order; reports and \
         `--json` have the same names. The first four are those of the original statistics file of the Xe driver. Numbers grow from the start \
         of the device on, or from their last reset. Made from [stats.rs](../crates/xe/src/stats.rs).\n\n\
         | name | what it counts |\n|---|---|\n",
    );
    for counter in Counter::ALL {
        let (name, meaning) = (counter.name(), counter.meaning());
        writeln!(page, "| `{name}` | {meaning} |").expect("a string grows");
    }
    assert_page(STATISTICS, &page, "pages");
}

#[test]
fn pages_for_people_are_linked_from_the_front_page() {
    let readme = fs::read_to_string(root().join("README.md")).expect("there is one");
    let pages = fs::read_dir(root().join("docs")).expect("there are some");
    let names = pages.map(|page| page.expect("it can be read").file_name());
    let pages = names.filter_map(|name| name.into_string().ok());
    let unseen: Vec<String> = pages
        .filter(|name| name.ends_with(".md") && !readme.contains(&format!("docs/{name}")))
        .collect();
    assert_eq!(unseen, [""; 0], "README.md does not link these");
}

#[test]
fn maps_of_modules_name_every_module() {
    let mut unseen = Vec::new();
    for source in sources() {
        let rows = source.text.lines().filter(|line| line.starts_with("//! |"));
        let map: Vec<&str> = rows.collect();
        if !map.first().is_some_and(|row| row.contains(" module ")) {
            continue;
        }
        for item in &source.file.items {
            if let Item::Mod(module) = item
                && !module.attrs.iter().any(is_for_tests)
                && !map
                    .iter()
                    .any(|row| row.contains(&format!("`{}`", module.ident)))
            {
                unseen.push(format!("{}: {}", source.path, module.ident));
            }
        }
    }
    assert_eq!(unseen, [""; 0], "their maps do not name these");
}

/// `#[cfg(test)]`.
fn is_for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute
            .meta
            .require_list()
            .is_ok_and(|list| list.tokens.to_string().contains("test"))
}
