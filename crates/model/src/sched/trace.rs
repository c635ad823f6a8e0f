//! The last events of a world, and their picture: one column per actor.

use core::fmt::Write;

use gpusvm::seam::env::Ns;

/// One thing that an actor reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Virtual time.
    pub at: Ns,
    /// Index of the actor; past the last one for what no actor did.
    pub actor: usize,
    /// What happened.
    pub label: &'static str,
    /// Its numbers.
    pub args: [u64; 2],
    /// What happened in more words, where texts are kept.
    pub text: Option<String>,
}

impl Entry {
    fn words(&self) -> String {
        match (&self.text, self.args) {
            (Some(text), _) => text.clone(),
            (None, [0, 0]) => self.label.to_owned(),
            (None, [a, 0]) => format!("{} {a:#x}", self.label),
            (None, [a, b]) => format!("{} {a:#x} {b:#x}", self.label),
        }
    }
}

/// The last events.
#[derive(Debug, Default)]
pub(super) struct Ring {
    entries: Vec<Entry>,
    room: usize,
    /// Where the oldest entry stands once the ring is full.
    oldest: usize,
}

impl Ring {
    pub(super) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            room: 0,
            oldest: 0,
        }
    }

    pub(super) fn start(&mut self, room: usize) {
        self.entries.clear();
        self.room = room;
        self.oldest = 0;
    }

    pub(super) fn push(&mut self, entry: Entry) {
        if self.entries.len() < self.room {
            self.entries.push(entry);
        } else if self.room > 0 {
            self.entries[self.oldest] = entry;
            self.oldest = (self.oldest + 1) % self.room;
        }
    }

    /// All entries, oldest first.
    pub(super) fn take(&mut self) -> Vec<Entry> {
        self.entries.rotate_left(self.oldest);
        self.oldest = 0;
        std::mem::take(&mut self.entries)
    }
}

/// Widest column of a timeline.
const COLUMN_MAX: usize = 36;
/// Narrowest one.
const COLUMN_MIN: usize = 8;

/// Draws events as one column per actor; longer texts go on in the next line.
#[must_use]
pub fn timeline(actors: &[String], entries: &[Entry]) -> String {
    let others = entries.iter().any(|entry| entry.actor >= actors.len());
    let mut names: Vec<&str> = actors.iter().map(String::as_str).collect();
    names.extend(others.then_some("(world)"));
    let widths: Vec<usize> = names
        .iter()
        .enumerate()
        .map(|(column, name)| width(column, name, actors.len(), entries))
        .collect();
    let mut out = String::new();
    let mut head = vec![String::from("time")];
    head.extend(names.iter().map(|name| (*name).to_owned()));
    write_row(&mut out, &head, &widths);
    for entry in entries {
        write_entry(&mut out, entry, actors.len(), &widths);
    }
    out
}

fn width(column: usize, name: &str, actors: usize, entries: &[Entry]) -> usize {
    let mine = entries
        .iter()
        .filter(|entry| entry.actor.min(actors) == column);
    let longest = mine.map(|entry| entry.words().chars().count()).max();
    let wanted = longest.unwrap_or(0).max(name.chars().count());
    wanted.clamp(COLUMN_MIN, COLUMN_MAX)
}

fn write_entry(out: &mut String, entry: &Entry, actors: usize, widths: &[usize]) {
    let column = entry.actor.min(actors);
    let mut time = entry.at.0.to_string();
    for piece in pieces(&entry.words(), widths[column]) {
        let mut row = vec![String::new(); widths.len() + 1];
        row[0] = std::mem::take(&mut time);
        row[column + 1] = piece;
        write_row(out, &row, widths);
    }
}

/// Cuts a text into pieces that fit, between words where that works.
fn pieces(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let characters: Vec<char> = text.replace('\n', " ").chars().collect();
    for word in characters.split(|c| *c == ' ') {
        for part in word.chunks(width) {
            let line = lines.last().map_or(0, |line| line.chars().count());
            let gap = usize::from(line > 0);
            if line + gap + part.len() > width {
                lines.push(String::new());
            }
            if let Some(line) = lines.last_mut() {
                line.extend((!line.is_empty()).then_some(' '));
                line.extend(part);
            }
        }
    }
    lines
}

/// Width of the column with the time.
const TIME_WIDTH: usize = 10;

fn write_row(out: &mut String, cells: &[String], widths: &[usize]) {
    let mut line = format!("{:>TIME_WIDTH$}", cells[0]);
    for (cell, width) in cells[1..].iter().zip(widths) {
        let written = write!(line, " | {cell:width$}");
        debug_assert!(written.is_ok(), "a string takes any text");
    }
    out.push_str(line.trim_end());
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(at: u64, actor: usize, text: &str) -> Entry {
        Entry {
            at: Ns(at),
            actor,
            label: "said",
            args: [at, 0],
            text: (!text.is_empty()).then(|| text.to_owned()),
        }
    }

    #[test]
    fn columns_line_up() {
        let actors = ["cpu0".to_owned(), "gpu0".to_owned()];
        let long = "an invalidation of the span that the other one wanted to map";
        let entries = [entry(3, 0, ""), entry(14, 1, long), entry(150, 0, "done")];
        let drawn = timeline(&actors, &entries);
        let expected = [
            "      time | cpu0     | gpu0",
            "         3 | said 0x3 |",
            "        14 |          | an invalidation of the span that the",
            "           |          | other one wanted to map",
            "       150 | done     |",
            "",
        ];
        assert_eq!(drawn, expected.join("\n"), "\n{drawn}");
    }

    #[test]
    fn the_ring_keeps_the_last_ones_in_order() {
        let mut ring = Ring::default();
        ring.start(3);
        for n in 0..5 {
            ring.push(entry(n, 0, ""));
        }
        let kept: Vec<u64> = ring.take().iter().map(|entry| entry.at.0).collect();
        assert_eq!(kept, [2, 3, 4]);
    }
}
