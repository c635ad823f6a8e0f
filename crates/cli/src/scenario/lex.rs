//! Lines and words of the format: numbers, sizes, times, spans, values.

use std::fmt;
use std::sync::Arc;

use gpusvm::addr::PAGE;
use gpusvm::seam::env::Ns;

use crate::scenario::text::{Place, Span, Value};
use crate::scenario::words::Word;
use crate::size;

/// What a line says cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    place: Place,
    what: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

impl std::error::Error for ParseError {}

impl Place {
    pub(super) fn error(&self, what: impl Into<String>) -> ParseError {
        ParseError {
            place: self.clone(),
            what: what.into(),
        }
    }
}

/// Lines with something in them, without remarks.
pub(super) struct Lines<'a> {
    file: Arc<str>,
    rest: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(file: &str, text: &'a str) -> Self {
        Self {
            file: Arc::from(file),
            rest: text.lines().enumerate().peekable(),
        }
    }

    fn place(&self, line: usize) -> Place {
        Place {
            file: Arc::clone(&self.file),
            line: line + 1,
        }
    }

    /// The next line, if it does not begin a scenario.
    pub(super) fn next_inside(&mut self) -> Option<(Place, &'a str)> {
        self.skip_empty();
        let (_, text) = self.rest.peek()?;
        if text.trim_start().starts_with("scenario ") {
            return None;
        }
        self.next()
    }

    pub(super) fn next(&mut self) -> Option<(Place, &'a str)> {
        self.skip_empty();
        let (n, text) = self.rest.next()?;
        Some((self.place(n), without_remark(text)))
    }

    fn skip_empty(&mut self) {
        while self
            .rest
            .next_if(|(_, text)| without_remark(text).is_empty())
            .is_some()
        {}
    }
}

fn without_remark(text: &str) -> &str {
    text.split('#').next().unwrap_or_default().trim()
}

/// The words of a line.
#[derive(Clone)]
pub(super) struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    pub(super) fn next(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    pub(super) fn rest(&self) -> &'a str {
        self.rest.trim()
    }

    /// Takes the next word if it is this one.
    pub(super) fn take(&mut self, word: &str) -> Option<()> {
        let mut ahead = self.clone();
        (ahead.next() == Some(word)).then(|| *self = ahead)
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| format!("{what} is missing"))
    }

    pub(super) fn one<W: Word>(&mut self) -> Result<W, String> {
        W::of(self.word(&W::KIND.to_lowercase())?)
    }

    pub(super) fn one_or<W: Word>(&mut self, default: W) -> Result<W, String> {
        if self.rest().is_empty() {
            Ok(default)
        } else {
            self.one()
        }
    }

    pub(super) fn number(&mut self) -> Result<u64, String> {
        number(self.word("a number")?)
    }

    pub(super) fn size(&mut self) -> Result<u64, String> {
        parse_size(self.word("a size")?)
    }

    pub(super) fn span(&mut self) -> Result<Span, String> {
        parse_span(self.word("a span")?)
    }

    pub(super) fn time(&mut self) -> Result<Ns, String> {
        parse_time(self.word("a time")?)
    }

    pub(super) fn values(&mut self) -> Result<Vec<Value>, String> {
        let text = self.word("a value")?;
        text.split('|').map(value).collect()
    }

    /// Nothing is left over.
    pub(super) fn end(&self) -> Result<(), String> {
        if self.rest().is_empty() {
            Ok(())
        } else {
            Err(format!("`{}` is too much", self.rest()))
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_why| format!("`{text}` is no whole number"))
}

pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    size::parse(text).map_err(|why| why.to_string())
}

/// `5ms`, `20us`, `1s`.
fn parse_time(text: &str) -> Result<Ns, String> {
    let wrong = || format!("`{text}` is no time: write 20us, 5ms or 1s");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_why| wrong())?;
    let unit = match unit {
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    Ok(Ns(number.saturating_mul(unit)))
}

/// `a`, `a[3]`, `a[3..8]`: pages, or bytes where a unit stands behind the number.
fn parse_span(text: &str) -> Result<Span, String> {
    let Some((area, inside)) = text.split_once('[') else {
        return Ok(Span {
            area: name(text)?,
            part: None,
        });
    };
    let inside = inside
        .strip_suffix(']')
        .ok_or_else(|| format!("`{text}` has no end: write for example a[3..8]"))?;
    let (from, to) = match inside.split_once("..") {
        Some((from, to)) => (offset(from)?, offset(to)?),
        None => {
            let from = offset(inside)?;
            (from, from.checked_add(PAGE).ok_or_else(|| far(inside))?)
        }
    };
    if from >= to {
        return Err(format!("`{text}` has no pages"));
    }
    Ok(Span {
        area: name(area)?,
        part: Some((from, to)),
    })
}

/// A page number, or bytes with a unit.
fn offset(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(page) => page.checked_mul(PAGE).ok_or_else(|| far(text)),
        Err(_bytes) => parse_size(text),
    }
}

fn far(text: &str) -> String {
    format!("`{text}` is further than any area")
}

pub(super) fn name(text: &str) -> Result<String, String> {
    let right = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_alphanumeric());
    if right {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "`{text}` is no name: small letters and digits, a letter first"
        ))
    }
}

/// `7`, or `7@16` for what was written as 7 to page 16 and those behind it.
fn value(text: &str) -> Result<Value, String> {
    let (value, from) = match text.split_once('@') {
        Some((value, from)) => (value, Some(number(from)?)),
        None => (text, None),
    };
    Ok(Value {
        value: number(value)?,
        from,
    })
}
