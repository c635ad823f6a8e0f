//! The record of a world's choices: what replays it, anywhere.
//!
//! ```text
//! gpusvm tape 1
//! scenario: lost-update
//! seed: 0x2a
//! mutant: none
//! options: chaos=off
//! hash: 0x9d03f1c8aa27be51
//! choices: 23
//! 0*17 1 0*3 2*2
//! ```
//!
//! The choices are run-length coded: a value, or `value*times`. The seed names the random streams
//! of the world's data; the choices need none.

use core::fmt;
use core::num::ParseIntError;
use core::str::FromStr;

const FIRST_LINE: &str = "gpusvm tape 1";
/// Choices on one tape: more than any world makes, and little enough to be unpacked.
pub const CHOICES_MAX: usize = 1 << 24;
/// Width of a line of choices.
const LINE_CHARS: usize = 100;

/// The choices of one world, and what else says which world it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tape {
    /// Name of the scenario.
    pub scenario: String,
    /// Seed of the random streams.
    pub seed: u64,
    /// The planted bug that was active.
    pub mutant: Option<String>,
    /// Whatever else the scenario needs to know, as it wrote it.
    pub options: String,
    /// Hash of the world, if it is known: what a replay must give again.
    pub hash: Option<u64>,
    /// The answers, in order.
    pub choices: Vec<u32>,
}

impl Tape {
    /// Answers that are not the dullest one.
    #[must_use]
    pub fn interesting(&self) -> usize {
        self.choices.iter().filter(|choice| **choice != 0).count()
    }

    /// The same world with other choices, whose hash is not known.
    #[must_use]
    pub fn with_choices(&self, choices: Vec<u32>) -> Self {
        Self {
            choices,
            hash: None,
            ..self.clone()
        }
    }

    /// Drops the zeros at the end, which mean nothing.
    pub fn trim(&mut self) {
        let last = self.choices.iter().rposition(|choice| *choice != 0);
        self.choices.truncate(last.map_or(0, |last| last + 1));
    }
}

impl fmt::Display for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{FIRST_LINE}")?;
        writeln!(f, "scenario: {}", one_line(&self.scenario))?;
        writeln!(f, "seed: {:#x}", self.seed)?;
        let mutant = self.mutant.as_deref().unwrap_or("none");
        writeln!(f, "mutant: {}", one_line(mutant))?;
        writeln!(f, "options: {}", one_line(&self.options))?;
        if let Some(hash) = self.hash {
            writeln!(f, "hash: {hash:#018x}")?;
        }
        writeln!(f, "choices: {}", self.choices.len())?;
        write_choices(f, &self.choices)
    }
}

/// Header values stand on one line, whatever they contain.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ").trim().to_owned()
}

fn write_choices(f: &mut fmt::Formatter<'_>, choices: &[u32]) -> fmt::Result {
    let mut column = 0;
    for run in choices.chunk_by(|a, b| a == b) {
        let word = match run.len() {
            1 => run[0].to_string(),
            times => format!("{}*{times}", run[0]),
        };
        if column > 0 && column + 1 + word.len() > LINE_CHARS {
            writeln!(f)?;
            column = 0;
        } else if column > 0 {
            write!(f, " ")?;
            column += 1;
        }
        write!(f, "{word}")?;
        column += word.len();
    }
    if column > 0 { writeln!(f) } else { Ok(()) }
}

/// Why a text is no tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapeError {
    /// The first line is not that of a tape that this version reads.
    NoTape,
    /// A line of the header is missing: its name.
    Missing(&'static str),
    /// A line of the header that no tape has: its number, from 1.
    Unknown(usize),
    /// Something that must be a number is not: the number of its line, from 1, and the word.
    Number(usize, String),
    /// There are other than the announced number of choices.
    Count {
        /// What the header says.
        announced: usize,
        /// What follows.
        found: usize,
    },
    /// More than [`CHOICES_MAX`] choices.
    TooLong,
}

impl fmt::Display for TapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTape => write!(f, "not a tape: the first line must be `{FIRST_LINE}`"),
            Self::Missing(name) => write!(f, "the tape has no line `{name}: ...`"),
            Self::Unknown(line) => write!(f, "line {line}: no tape has such a line"),
            Self::Number(line, word) => write!(f, "line {line}: `{word}` is not a number"),
            Self::Count { announced, found } => write!(
                f,
                "the tape announces {announced} {} and has {found}: it was cut or changed",
                if *announced == 1 { "choice" } else { "choices" }
            ),
            Self::TooLong => write!(f, "the tape has more than {CHOICES_MAX} choices"),
        }
    }
}

impl core::error::Error for TapeError {}

impl FromStr for Tape {
    type Err = TapeError;

    fn from_str(text: &str) -> Result<Self, TapeError> {
        let mut lines = text.lines().enumerate();
        if lines.next().map(|(_, line)| line.trim()) != Some(FIRST_LINE) {
            return Err(TapeError::NoTape);
        }
        let mut header = Header::default();
        for (n, line) in lines.by_ref() {
            header.read(n + 1, line)?;
            if header.announced.is_some() {
                break;
            }
        }
        let announced = header.announced.ok_or(TapeError::Missing("choices"))?;
        let mut tape = header.tape()?;
        for (n, line) in lines {
            read_choices(n + 1, line, &mut tape.choices)?;
        }
        let found = tape.choices.len();
        if found == announced {
            Ok(tape)
        } else {
            Err(TapeError::Count { announced, found })
        }
    }
}

/// The lines before the choices, as far as they were read.
#[derive(Default)]
struct Header {
    tape: Tape,
    scenario: Option<String>,
    seed: Option<u64>,
    announced: Option<usize>,
}

impl Header {
    fn read(&mut self, n: usize, line: &str) -> Result<(), TapeError> {
        let (name, value) = line.split_once(':').ok_or(TapeError::Unknown(n))?;
        let value = value.trim();
        match name.trim() {
            "scenario" => self.scenario = Some(value.to_owned()),
            "seed" => self.seed = Some(number(n, value)?),
            "mutant" => self.tape.mutant = (value != "none").then(|| value.to_owned()),
            "options" => value.clone_into(&mut self.tape.options),
            "hash" => self.tape.hash = Some(number(n, value)?),
            "choices" => {
                let announced = usize::try_from(number(n, value)?);
                self.announced = Some(announced.map_err(|_| TapeError::TooLong)?);
            }
            _ => return Err(TapeError::Unknown(n)),
        }
        Ok(())
    }

    fn tape(self) -> Result<Tape, TapeError> {
        Ok(Tape {
            scenario: self.scenario.ok_or(TapeError::Missing("scenario"))?,
            seed: self.seed.ok_or(TapeError::Missing("seed"))?,
            ..self.tape
        })
    }
}

/// A number, decimal or with `0x`.
fn number(n: usize, word: &str) -> Result<u64, TapeError> {
    let parsed = match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    };
    parsed.map_err(|_: ParseIntError| TapeError::Number(n, word.to_owned()))
}

fn read_choices(n: usize, line: &str, choices: &mut Vec<u32>) -> Result<(), TapeError> {
    for word in line.split_whitespace() {
        let (value, times) = word.split_once('*').unwrap_or((word, "1"));
        let bad = |_| TapeError::Number(n, word.to_owned());
        let value: u32 = value.parse().map_err(bad)?;
        let times: usize = times.parse().map_err(bad)?;
        if times > CHOICES_MAX - choices.len() {
            return Err(TapeError::TooLong);
        }
        choices.extend(core::iter::repeat_n(value, times));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tape(choices: Vec<u32>) -> Tape {
        Tape {
            scenario: "two writers".into(),
            seed: 42,
            mutant: Some("no-recheck".into()),
            options: "chaos=16".into(),
            hash: Some(0xfeed),
            choices,
        }
    }

    #[test]
    fn a_tape_reads_like_this() {
        let text = tape(vec![0, 0, 0, 1, 0, 2, 2]).to_string();
        let expected = "gpusvm tape 1\nscenario: two writers\nseed: 0x2a\nmutant: no-recheck\n\
            options: chaos=16\nhash: 0x000000000000feed\nchoices: 7\n0*3 1 0 2*2\n";
        assert_eq!(text, expected);
    }

    proptest! {
        #[test]
        fn a_tape_survives_its_text(choices in prop::collection::vec(0_u32..3, 0..400)) {
            let tape = tape(choices);
            let text = tape.to_string();
            prop_assert!(text.lines().all(|line| line.len() <= LINE_CHARS));
            prop_assert_eq!(text.parse::<Tape>(), Ok(tape));
        }

        #[test]
        fn no_text_panics(text in "(gpusvm tape 1\n)?([a-z]{1,9}: [0-9x*]{0,5}\n){0,8}[0-9* ]{0,9}") {
            let _parsed = text.parse::<Tape>();
        }
    }

    #[test]
    fn what_is_no_tape_is_refused_with_a_reason() {
        let error = |text: &str| text.parse::<Tape>().unwrap_err().to_string();
        assert!(error("hello").starts_with("not a tape"));
        assert!(error("gpusvm tape 1\nseed: 1\nchoices: 0\n").contains("`scenario: ...`"));
        assert_eq!(
            error("gpusvm tape 1\nseed: one\n"),
            "line 2: `one` is not a number"
        );
        let head = "gpusvm tape 1\nscenario: a\nseed: 1\n";
        assert!(error(&format!("{head}colour: red\n")).starts_with("line 4"));
        assert!(error(&format!("{head}choices: 2\n0*3")).contains("announces 2 choices and has 3"));
        let long = error(&format!("{head}choices: 1\n0*99999999999"));
        assert!(long.contains("more than"), "{long}");
    }

    #[test]
    fn zeros_at_the_end_mean_nothing() {
        let mut tape = tape(vec![0, 1, 0, 0]);
        tape.trim();
        assert_eq!((tape.choices.len(), tape.interesting()), (2, 1));
    }
}
