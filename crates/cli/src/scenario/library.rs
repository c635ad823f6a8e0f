//! The scenarios that there are, and those that there are not.

use crate::scenario::lex::ParseError;
use crate::scenario::parse::parse;
use crate::scenario::text::Scenario;

macro_rules! files {
    ($($name:literal,)*) => {
        /// Files of scenarios: name and text.
        const FILES: &[(&str, &str)] = &[$((
            concat!("tests/scenarios/", $name),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/scenarios/", $name)),
        ),)*];
    };
}

files! {
    "1-ranges.scn",
    "2-pages.scn",
    "3-invalidation.scn",
    "4-migration.scn",
    "5-eviction.scn",
    "6-binding.scn",
    "7-uapi.scn",
    "8-lifetime.scn",
}

/// Numbers of scenarios that there are not, and what they wait for.
const ABSENT: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/scenarios/absent.txt"
));

/// All scenarios, by number.
///
/// # Errors
/// A line of a file that cannot be read.
pub fn all() -> Result<Vec<Scenario>, ParseError> {
    let mut all = Vec::new();
    for (file, text) in FILES {
        all.extend(parse(file, text)?);
    }
    all.sort_by_key(Scenario::number);
    Ok(all)
}

/// The scenario with this number.
///
/// # Errors
/// As [`all`].
pub fn numbered(number: u32) -> Result<Option<Scenario>, ParseError> {
    Ok(all()?
        .into_iter()
        .find(|scenario| scenario.number == number))
}

/// Scenarios of `svm-design.md` section 7 that wait for something: number, and what for.
#[must_use]
pub fn absent() -> Vec<(u32, &'static str)> {
    let line = |line: &'static str| {
        let (number, why) = line.split_once(' ')?;
        Some((number.parse().ok()?, why.trim()))
    };
    ABSENT.lines().filter_map(line).collect()
}
