//! `docs/seed-rows.toml` says of each row of the seed what there is of it. These tests keep it true,
//! as far as a program can, and make `docs/seed-rows.md` of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::fs;

use gpusvm_tests::{assert_page, root};
use proc_macro2::{TokenStream, TokenTree};
use serde::Deserialize;

const TABLE: &str = "docs/seed-rows.toml";
const PAGE: &str = "docs/seed-rows.md";

/// Letters of the rows, how many there are, digits of a number, and what they are.
const PARTS: [(char, usize, usize, &str); 4] = [
    ('X', 12, 2, "Commits of drm/xe"),
    ('M', 52, 2, "Series of the memory management"),
    ('S', 20, 2, "Lines of the short log"),
    ('P', 4, 1, "Passages of the text"),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    row: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: String,
    title: String,
    state: State,
    #[serde(rename = "where")]
    places: Vec<String>,
    tests: Vec<String>,
    note: String,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
enum State {
    #[serde(rename = "works")]
    Works,
    #[serde(rename = "partly")]
    Partly,
    #[serde(rename = "not yet")]
    NotYet,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Works => "works",
            Self::Partly => "partly",
            Self::NotYet => "not yet",
        })
    }
}

fn rows() -> Vec<Row> {
    let text = fs::read_to_string(root().join(TABLE)).expect("the table is there");
    let table: Table = toml::from_str(&text).unwrap_or_else(|error| panic!("{TABLE}: {error}"));
    table.row
}

/// Fails with all complaints at once.
fn check(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn each_row_of_the_seed_stands_once_and_in_order() {
    let number = |(letter, count, digits, _): (char, usize, usize, &str)| {
        (1..=count).map(move |n| format!("{letter}{n:0digits$}"))
    };
    let wanted: Vec<String> = PARTS.into_iter().flat_map(number).collect();
    let found: Vec<String> = rows().into_iter().map(|row| row.id).collect();
    assert_eq!(found, wanted);
}

#[test]
fn what_works_has_tests_and_what_lacks_something_says_so() {
    let lacks = |row: &Row| match row.state {
        State::Works if row.tests.is_empty() || row.places.is_empty() => Some("a place and a test"),
        State::Partly if row.note.is_empty() || row.places.is_empty() => Some("a place and a note"),
        State::NotYet if row.note.is_empty() => Some("a note"),
        _ if row.title.is_empty() => Some("a title"),
        State::Works | State::Partly | State::NotYet => None,
    };
    let rows = rows();
    let complaints = rows.iter().filter_map(|row| {
        Some(format!(
            "{}, {}, has not {}",
            row.id,
            row.state,
            lacks(row)?
        ))
    });
    check(complaints.collect());
}

#[test]
fn places_and_tests_are_there() {
    let mut files = BTreeMap::new();
    let mut complaints = Vec::new();
    for row in rows() {
        let missing = |place: &&String| !root().join(place.as_str()).exists();
        for place in row.places.iter().filter(missing) {
            complaints.push(format!("{}: there is no {place}", row.id));
        }
        for test in row.tests {
            let (path, name) = test.split_once("::").unwrap_or((&test, ""));
            let known = files
                .entry(path.to_owned())
                .or_insert_with(|| tests_of(path));
            if !known.contains(name) {
                complaints.push(format!("{}: there is no test {test}", row.id));
            }
        }
    }
    check(complaints);
}

/// Names of the tests of a file; of none that is ignored.
fn tests_of(path: &str) -> BTreeSet<String> {
    let mut finder = Finder::default();
    if let Ok(text) = fs::read_to_string(root().join(path)) {
        finder.look(text.parse().expect("the file is Rust"));
    }
    finder.tests
}

/// Finds tests in tokens, so that it sees into macro calls.
#[derive(Default)]
struct Finder {
    tests: BTreeSet<String>,
    /// Macros of the file that make tests of names, `name = something`.
    makers: BTreeSet<String>,
    /// The macro whose definition this is.
    defined: Option<String>,
}

impl Finder {
    fn look(&mut self, stream: TokenStream) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let mut attributes = Vec::new();
        for (n, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Group(group) if n > 0 && is(&tokens[n - 1], "#") => {
                    attributes.push(group.stream().to_string());
                }
                TokenTree::Group(group) => self.group(&tokens[..n], group.stream()),
                TokenTree::Ident(word) if word == "fn" => {
                    self.function(&attributes, tokens.get(n + 1));
                    attributes.clear();
                }
                TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// What stands in brackets, behind `before`.
    fn group(&mut self, before: &[TokenTree], stream: TokenStream) {
        let former = self.defined.clone();
        match before {
            [.., word, mark, name] if is(word, "macro_rules") && is(mark, "!") => {
                self.defined = Some(name.to_string());
            }
            [.., name, mark] if is(mark, "!") && self.makers.contains(&name.to_string()) => {
                let tokens: Vec<TokenTree> = stream.clone().into_iter().collect();
                let named = tokens.windows(2).filter(|pair| is(&pair[1], "="));
                self.tests.extend(named.map(|pair| pair[0].to_string()));
            }
            _ => {}
        }
        self.look(stream);
        self.defined = former;
    }

    fn function(&mut self, attributes: &[String], name: Option<&TokenTree>) {
        let has = |word: &str| {
            let mut words = attributes.iter().map(|one| one.split(' ').next());
            words.any(|first| first == Some(word))
        };
        if !has("test") || has("ignore") {
            return;
        }
        match (name, &self.defined) {
            (Some(TokenTree::Ident(name)), _) => drop(self.tests.insert(name.to_string())),
            // `fn $name` in the text of a macro.
            (Some(_), Some(maker)) => drop(self.makers.insert(maker.clone())),
            (Some(_) | None, _) => {}
        }
    }
}

fn is(token: &TokenTree, text: &str) -> bool {
    token.to_string() == text
}

#[test]
fn tests_are_found_where_they_are_written_and_made() {
    let mut finder = Finder::default();
    let text = r#"
        #[test] fn plain() {}
        #[test] # [ignore] fn asleep() {}
        fn helper() {}
        proptest! { #![proptest_config(x)] #[test] fn random(a in b) {} }
        macro_rules! rows { ($($n:ident = $l:literal,)*) => { $(#[test] fn $n() {})* }; }
        rows! { first = "A", second = "B", }
        others! { third = "C" }
    "#;
    finder.look(text.parse().expect("Rust"));
    let found: Vec<_> = finder.tests.iter().map(String::as_str).collect();
    assert_eq!(found, ["first", "plain", "random", "second"]);
}

#[test]
fn page_shows_what_the_table_says() {
    assert_page(PAGE, &page(&rows()), "seed_rows");
}

fn page(rows: &[Row]) -> String {
    let of = |state| rows.iter().filter(|row| row.state == state).count();
    let mut page = format!(
        "# What the seed asks for, and what there is of it\n\n\
         The seed of this project is a stretch of the log of Linux 6.15: twelve commits of drm/xe, and between them the pull of the memory \
         management with its 52 series and the beginning of its short log. Each has a row here; rows that say the same refer to each other. \
         What *works* is built, and the tests named show it. What is *partly* there, or not at all, says what is missing.\n\n\
         Works: {}. Partly: {}. Not yet: {}. Made from [seed-rows.toml](seed-rows.toml), which programs can read; a test compares the two, \
         and looks for every file and test named.\n",
        of(State::Works),
        of(State::Partly),
        of(State::NotYet)
    );
    for (letter, _, _, title) in PARTS {
        let head = "| row | what | state | where | shown by | to know |\n|---|---|---|---|---|---|";
        let part = rows.iter().filter(|row| row.id.starts_with(letter));
        let lines: Vec<String> = part.map(line).collect();
        writeln!(page, "\n## {title}\n\n{head}\n{}", lines.join("\n")).expect("a string grows");
    }
    page
}

/// The row as a line of a Markdown table.
fn line(row: &Row) -> String {
    let link = |name: &str, path: &str| format!("[{name}](../{path})");
    let places = row.places.iter().map(|path| {
        let name = path.trim_end_matches('/').rsplit('/').next();
        link(name.unwrap_or(path), path)
    });
    let tests = row.tests.iter().map(|test| {
        let (path, name) = test.split_once("::").unwrap_or((test, test));
        link(&format!("`{name}`"), path)
    });
    let Row {
        id, title, note, ..
    } = row;
    let (places, tests): (Vec<_>, Vec<_>) = (places.collect(), tests.collect());
    let (places, tests) = (places.join(", "), tests.join(", "));
    format!(
        "| {id} | {title} | {} | {places} | {tests} | {note} |",
        row.state
    )
}
