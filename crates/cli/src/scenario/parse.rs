//! The one reader of the format. `docs/scenarios.md` is its manual.
//!
//! A file is read line by line. `scenario N TITLE` begins one; lines of its setup follow, then what is
//! done. Blocks (`together`, `fork`, `at`) end with `end`.

use std::fmt;
use std::sync::Arc;

use gpusvm::seam::env::{Ns, Point};
use gpusvm_xe::stats::Counter;
use gpusvm_xe::vm::Rights as Mirror;

use crate::scenario::HostKind;
use crate::scenario::text::{
    Access, Act, Drive, Expect, Line, Map, Often, Place, Scenario, Setup, Span, Value, Who,
};
use crate::scenario::words::{
    Advice, Answers, Backing, Collector, Compare, Deed, Entries, Huge, Object, Rights, Word,
};
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
    fn error(&self, what: impl Into<String>) -> ParseError {
        ParseError {
            place: self.clone(),
            what: what.into(),
        }
    }
}

/// Reads the scenarios of a file.
///
/// # Errors
/// The first line that cannot be read, and why.
pub fn parse(file: &str, text: &str) -> Result<Vec<Scenario>, ParseError> {
    let mut lines = Lines::new(file, text);
    let mut scenarios = Vec::new();
    while let Some((place, text)) = lines.next() {
        let mut words = Words::new(text);
        if words.next() != Some("scenario") {
            return Err(place.error("a scenario begins with `scenario NUMBER TITLE`"));
        }
        let number = words.number().map_err(|what| place.error(what))?;
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        scenarios.push(scenario(place, number, words.rest(), &mut lines)?);
    }
    Ok(scenarios)
}

/// Lines with something in them, without remarks.
struct Lines<'a> {
    file: Arc<str>,
    rest: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
}

impl<'a> Lines<'a> {
    fn new(file: &str, text: &'a str) -> Self {
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
    fn next_inside(&mut self) -> Option<(Place, &'a str)> {
        self.skip_empty();
        let (_, text) = self.rest.peek()?;
        if text.trim_start().starts_with("scenario ") {
            return None;
        }
        self.next()
    }

    fn next(&mut self) -> Option<(Place, &'a str)> {
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
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    const fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    fn next(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    fn rest(&self) -> &'a str {
        self.rest.trim()
    }

    /// Takes the next word if it is this one.
    fn take(&mut self, word: &str) -> Option<()> {
        let mut ahead = self.clone();
        (ahead.next() == Some(word)).then(|| *self = ahead)
    }

    fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| format!("{what} is missing"))
    }

    fn one<W: Word>(&mut self) -> Result<W, String> {
        W::of(self.word(&W::KIND.to_lowercase())?)
    }

    fn one_or<W: Word>(&mut self, default: W) -> Result<W, String> {
        if self.rest().is_empty() {
            Ok(default)
        } else {
            self.one()
        }
    }

    fn number(&mut self) -> Result<u64, String> {
        number(self.word("a number")?)
    }

    fn size(&mut self) -> Result<u64, String> {
        parse_size(self.word("a size")?)
    }

    fn span(&mut self) -> Result<Span, String> {
        parse_span(self.word("a span")?)
    }

    fn time(&mut self) -> Result<Ns, String> {
        parse_time(self.word("a time")?)
    }

    fn values(&mut self) -> Result<Vec<Value>, String> {
        let text = self.word("a value")?;
        text.split('|').map(value).collect()
    }

    /// Nothing is left over.
    fn end(&self) -> Result<(), String> {
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

fn parse_size(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    size::parse(text).map_err(|why| why.to_string())
}

/// `5ms`, `20us`, `1s`.
fn parse_time(text: &str) -> Result<Ns, String> {
    let wrong = || format!("`{text}` is no time: write 20us, 5ms or 1s");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .ok_or_else(wrong)?;
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
        None => (offset(inside)?, offset(inside)? + gpusvm::addr::PAGE),
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
        Ok(page) => Ok(page * gpusvm::addr::PAGE),
        Err(_bytes) => parse_size(text),
    }
}

fn name(text: &str) -> Result<String, String> {
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

fn host(text: &str) -> Option<HostKind> {
    [HostKind::Model, HostKind::Live]
        .into_iter()
        .find(|host| host.name() == text)
}

/// `gpu` or `gpu1`.
fn gpu(text: &str) -> Option<usize> {
    match text.strip_prefix("gpu")? {
        "" => Some(0),
        digits => digits.parse().ok(),
    }
}

fn scenario(
    place: Place,
    number: u32,
    title: &str,
    lines: &mut Lines<'_>,
) -> Result<Scenario, ParseError> {
    let mut scenario = Scenario {
        number,
        title: title.to_owned(),
        place,
        setups: [Setup::default(), Setup::default()],
        lines: Vec::new(),
        skips: Vec::new(),
    };
    while let Some((place, text)) = lines.next_inside() {
        let known = setup_line(&mut scenario, text).map_err(|what| place.error(what))?;
        if known == Known::No {
            scenario.lines.push(line(place, text, lines)?);
        } else if !scenario.lines.is_empty() {
            return Err(place.error("this belongs before everything that is done"));
        }
    }
    Ok(scenario)
}

/// `model skipped: WHY`, or a line of the setup, for one host or both.
fn setup_line(scenario: &mut Scenario, text: &str) -> Result<Known, String> {
    let mut words = Words::new(text);
    if let Some(host) = words.next().and_then(host)
        && words.take("skipped:").is_some()
    {
        scenario.skips.push((host, words.rest().to_owned()));
        return Ok(Known::Yes);
    }
    let (only, text) = only(text)?;
    let mut known = Known::No;
    for host in [HostKind::Model, HostKind::Live] {
        if only.is_none_or(|only| only == host) {
            known = set_up(&mut scenario.setups[host as usize], Words::new(text))?;
        }
    }
    Ok(known)
}

/// Whether a word was one of the setup.
#[derive(PartialEq, Eq)]
enum Known {
    Yes,
    No,
}

fn set_up(setup: &mut Setup, mut words: Words<'_>) -> Result<Known, String> {
    match words.next().unwrap_or_default() {
        "gpus" => setup.gpus = u16::try_from(words.number()?).unwrap_or(u16::MAX),
        "vram" => setup.vram = words.size()?,
        "window" => setup.window = Some(words.size()?),
        "memory" => setup.memory = words.size()?,
        "seeds" => setup.seeds = words.number()?,
        "collector" => setup.collector = words.one::<Collector>()?,
        "tlb-answers" => setup.answers = words.one::<Answers>()?,
        _ => return Ok(Known::No),
    }
    words.end()?;
    Ok(Known::Yes)
}

/// A line of what is done, with the lines of its block.
fn line(place: Place, text: &str, lines: &mut Lines<'_>) -> Result<Line, ParseError> {
    let at = |what: String| place.error(what);
    let (only, text) = only(text).map_err(at)?;
    let (text, answers) = match text.split_once("->") {
        Some((text, answers)) => (text, answers.trim().split('|').map(str::to_owned).collect()),
        None => (text, Vec::new()),
    };
    let (text, times) = times(text.trim()).map_err(at)?;
    let mut words = Words::new(text);
    let first = words.word("what is done").map_err(at)?;
    let act = match block_of(first, &mut words).map_err(at)? {
        Some(block) => {
            words.end().map_err(at)?;
            block.of(block_lines(&place, lines)?)
        }
        None => {
            let act = act(first, &mut words).map_err(at)?;
            words.end().map_err(at)?;
            act
        }
    };
    Ok(Line {
        place,
        only,
        act,
        answers,
        times,
    })
}

/// `model: LINE -- why it differs`.
fn only(text: &str) -> Result<(Option<HostKind>, &str), String> {
    let found = text.split_once(": ").and_then(|(first, rest)| Some((host(first)?, rest)));
    let Some((host, rest)) = found else {
        return Ok((None, text));
    };
    match rest.split_once(" -- ") {
        Some((line, why)) if !why.trim().is_empty() => Ok((Some(host), line)),
        _ => Err("a line for one host says why: `model: LINE -- WHY`".to_owned()),
    }
}

/// `LINE x100`.
fn times(text: &str) -> Result<(&str, u32), String> {
    let Some((line, last)) = text.rsplit_once(" x") else {
        return Ok((text, 1));
    };
    match last.parse() {
        Ok(0) => Err("nothing is done no times".to_owned()),
        Ok(times) => Ok((line, times)),
        Err(_another_word) => Ok((text, 1)),
    }
}

/// What a block is for.
enum Block {
    Together,
    Fork,
    At(Point, Often),
}

impl Block {
    fn of(self, lines: Vec<Line>) -> Act {
        match self {
            Self::Together => Act::Together(lines),
            Self::Fork => Act::Fork(lines),
            Self::At(point, often) => Act::At {
                point,
                often,
                lines,
            },
        }
    }
}

fn block_of(first: &str, words: &mut Words<'_>) -> Result<Option<Block>, String> {
    Ok(Some(match first {
        "together" => Block::Together,
        "fork" => Block::Fork,
        "at" => Block::At(words.one()?, Often::Once),
        "every" => Block::At(words.one()?, Often::Always),
        _ => return Ok(None),
    }))
}

fn block_lines(begin: &Place, lines: &mut Lines<'_>) -> Result<Vec<Line>, ParseError> {
    let mut inside = Vec::new();
    while let Some((place, text)) = lines.next_inside() {
        if text == "end" {
            return Ok(inside);
        }
        inside.push(line(place, text, lines)?);
    }
    Err(begin.error("the block that begins here has no `end`"))
}

fn act(first: &str, words: &mut Words<'_>) -> Result<Act, String> {
    if let Some(gpu) = gpu(first) {
        return of_gpu(gpu, words);
    }
    if let Ok(deed) = Deed::of(first) {
        return Ok(Act::Deed(deed, words.span()?));
    }
    Ok(match first {
        "map" => Act::Map(map(words)?),
        "unmap" => Act::Unmap(words.span()?),
        "protect" => Act::Protect(words.span()?, words.one::<Rights>()?),
        "advise" => Act::Advise(words.span()?, words.one::<Advice>()?),
        "remap" => remap(words)?,
        "cpu" => of_who(Who::Cpu, words)?,
        "child" => of_who(Who::Child, words)?,
        "die" => Act::Die,
        "fail-copy" => Act::FailCopy(words.number()?),
        "sleep" => Act::Sleep(words.time()?),
        "mark" => Act::Mark,
        "reset" => Act::Reset,
        "expect" => Act::Expect(expect(words)?),
        _ => {
            return Err(format!(
                "`{first}` is nothing that can be done: there are map, unmap, protect, advise, remap, \
                 cpu, child, gpu, die, fail-copy, sleep, mark, reset, expect, fork, together, at, every, and {}",
                names::<Deed>()
            ));
        }
    })
}

fn names<W: Word>() -> String {
    let names: Vec<_> = W::ALL.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

/// `map NAME SIZE [read|none] [BACKING] [huge] [behind NAME]`.
fn map(words: &mut Words<'_>) -> Result<Map, String> {
    let mut map = Map {
        area: name(words.word("a name")?)?,
        bytes: words.size()?,
        rights: Rights::Write,
        backing: Backing::Private,
        huge: Huge::No,
        behind: None,
    };
    while let Some(word) = words.next() {
        if word == "behind" {
            map.behind = Some(name(words.word("a name")?)?);
        } else if let Ok(rights) = Rights::of(word) {
            map.rights = rights;
        } else if let Ok(huge) = Huge::of(word) {
            map.huge = huge;
        } else {
            map.backing = Backing::of(word)?;
        }
    }
    Ok(map)
}

/// `remap SPAN NAME [leaving]`.
fn remap(words: &mut Words<'_>) -> Result<Act, String> {
    Ok(Act::Remap {
        from: words.span()?,
        to: name(words.word("a name")?)?,
        leaving: words.take("leaving").is_some(),
    })
}

fn of_who(who: Who, words: &mut Words<'_>) -> Result<Act, String> {
    let what = words.word("an access")?;
    access(who, what, words)?
        .ok_or_else(|| format!("`{what}` is no access: there are read, write, add, count"))
}

/// `read SPAN [VALUE|VALUE]`, `write SPAN VALUE`, `add SPAN N`, `count SPAN N`.
fn access(who: Who, what: &str, words: &mut Words<'_>) -> Result<Option<Act>, String> {
    if !["read", "write", "add", "count"].contains(&what) {
        return Ok(None);
    }
    let span = words.span()?;
    let access = match what {
        // Without a value whatever is there will do.
        "read" if words.rest().is_empty() => Access::Read(Vec::new()),
        "read" => Access::Read(words.values()?),
        "write" => match words.values()?.as_slice() {
            [value] => Access::Write(*value),
            _ => return Err("one value is written".to_owned()),
        },
        "add" => Access::Add(words.number()?),
        _ => Access::Count(words.number()?),
    };
    Ok(Some(Act::Access(who, access, span)))
}

/// What a device does, or its driver.
fn of_gpu(gpu: usize, words: &mut Words<'_>) -> Result<Act, String> {
    let what = words.word("what it does")?;
    if let Some(act) = access(Who::Gpu(gpu), what, words)? {
        return Ok(act);
    }
    let drive = match what {
        "prefetch" => Drive::Prefetch(words.span()?),
        "take" => {
            let span = words.span()?;
            let time = match words.take("for") {
                Some(()) => words.time()?,
                None => Ns::default(),
            };
            Drive::Take(span, time)
        }
        "evict" => Drive::Evict,
        "close" => Drive::Close,
        "mirror" => Drive::Mirror(words.span()?, words.one::<Mirror>()?),
        "buy" => Drive::Buy(words.size()?, words.one_or(Object::Pinned)?),
        "fill" => Drive::Fill(match words.take("leaving") {
            Some(()) => words.size()?,
            None => 0,
        }),
        "sell" => Drive::Sell,
        _ => {
            return Err(format!(
                "`{what}` is nothing that a device does: there are read, write, add, count, prefetch, \
                 take, evict, close, mirror, buy, fill, sell"
            ));
        }
    };
    Ok(Act::Drive(gpu, drive))
}

/// `expect [gpuN] WHAT ...`.
fn expect(words: &mut Words<'_>) -> Result<Expect, String> {
    let mut what = words.word("what is expected")?;
    let named = gpu(what);
    if named.is_some() {
        what = words.word("what is expected")?;
    }
    let gpu = named.unwrap_or(0);
    Ok(match what {
        "range" => Expect::Range(gpu, words.span()?, size_or_none(words)?),
        "ranges" => Expect::Ranges(gpu, words.number()?),
        "notifiers" => Expect::Notifiers(gpu, words.number()?),
        "vram" => {
            let (how, bytes) = compared(words, Words::size)?;
            Expect::Vram(gpu, how, bytes)
        }
        "tables" => {
            let (how, n) = compared(words, Words::number)?;
            Expect::Tables(gpu, how, n)
        }
        "placed" => Expect::Placed(words.span()?, placed(words)?),
        "entries" => Expect::Entries {
            gpu,
            span: words.span()?,
            entries: words.one::<Entries>()?,
            block: words.next().map(parse_size).transpose()?,
        },
        "count" => {
            let counter = counter(words.word("a counter")?)?;
            let (how, n) = compared(words, Words::number)?;
            Expect::Count(counter, how, n)
        }
        "collected" => Expect::Collected(words.number()?),
        "flushed" => Expect::Flushed(words.span()?),
        "kept" => Expect::Kept(words.span()?),
        "took" => {
            let (how, time) = compared(words, Words::time)?;
            Expect::Took(how, time)
        }
        _ => {
            return Err(format!(
                "`{what}` cannot be expected: there are range, ranges, notifiers, vram, tables, placed, \
                 entries, count, collected, flushed, kept, took"
            ));
        }
    })
}

/// `[=|>=|<=] NUMBER`.
fn compared<'a, T>(
    words: &mut Words<'a>,
    read: impl Fn(&mut Words<'a>) -> Result<T, String>,
) -> Result<(Compare, T), String> {
    let mut ahead = words.clone();
    let how = match ahead.next().map(Compare::of) {
        Some(Ok(how)) => {
            *words = ahead;
            how
        }
        Some(Err(_)) | None => Compare::Equal,
    };
    Ok((how, read(words)?))
}

fn size_or_none(words: &mut Words<'_>) -> Result<Option<u64>, String> {
    match words.take("none") {
        Some(()) => Ok(None),
        None => words.size().map(Some),
    }
}

fn placed(words: &mut Words<'_>) -> Result<Option<usize>, String> {
    let word = words.word("a place")?;
    match (word, gpu(word)) {
        ("system", _) => Ok(None),
        (_, Some(gpu)) => Ok(Some(gpu)),
        _ => Err(format!("`{word}` is no place: there are system, gpu, gpu1")),
    }
}

fn counter(text: &str) -> Result<Counter, String> {
    let found = Counter::ALL.iter().find(|counter| counter.name() == text);
    found
        .copied()
        .ok_or_else(|| format!("there is no counter `{text}`: `gpusvm run --json` shows them all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a scenario with this line in it, which is the third of its file.
    fn said_of(line: &str) -> String {
        let text = format!("# remark\nscenario 1 title\n  {line}\n  map a 2M\n");
        match parse("some.scn", &text) {
            Ok(_) => format!("`{line}` is read"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn bad_lines_are_told_with_their_place_and_what_is_wrong() {
        for (line, what) in [
            ("frobnicate a", "`frobnicate` is nothing that can be done"),
            ("map a", "a size is missing"),
            ("map A 2M", "`A` is no name"),
            ("map a 2M purple", "`purple` is no backing: there are private"),
            ("unmap a[3..3]", "has no pages"),
            ("unmap a[3", "has no end"),
            ("unmap a b", "`b` is too much"),
            ("cpu write a x", "`x` is no whole number"),
            ("cpu write a 1|2", "one value is written"),
            ("gpu dance", "`dance` is nothing that a device does"),
            ("expect luck", "`luck` cannot be expected"),
            ("expect count luck 3", "there is no counter `luck`"),
            ("expect placed a moon", "`moon` is no place"),
            ("sleep 3", "`3` is no time"),
            ("at noon", "`noon` is no point: there are after-walk"),
            ("advise a wisely", "`wisely` is no advice"),
            ("model: mark", "a line for one host says why"),
            ("mark x0", "no times"),
            ("together", "has no `end`"),
            ("mark\n  gpus 2", "belongs before"),
        ] {
            let said = said_of(line);
            assert!(said.starts_with("some.scn:"), "{said}");
            assert!(said.contains(what), "`{line}`: {said}");
        }
        let said = parse("some.scn", "map a 2M").expect_err("no scenario").to_string();
        assert!(said.starts_with("some.scn:1: a scenario begins"), "{said}");
    }

    #[test]
    fn lines_say_for_whom_how_often_and_how_they_end() {
        let text = "scenario 7 a title\n live skipped: why not\n model: seeds 3 -- enough\n map a 2M\n \
                    model: gpu1 write a[1M..5M] 7@3 x9 -> ok|EPERM -- because\n";
        let scenarios = parse("some.scn", text).expect("it can be read");
        let [scenario] = scenarios.as_slice() else {
            panic!("one scenario: {scenarios:?}")
        };
        assert_eq!((scenario.number(), scenario.title()), (7, "a title"));
        assert_eq!(scenario.skips(HostKind::Live), Some("why not"));
        assert_eq!(scenario.setup(HostKind::Model).seeds, 3);
        assert_eq!(scenario.setup(HostKind::Live).seeds, 1);
        let line = &scenario.lines[1];
        assert_eq!((line.only, line.times), (Some(HostKind::Model), 9));
        assert_eq!(line.answers, ["ok", "EPERM"]);
        let Act::Access(Who::Gpu(1), Access::Write(value), span) = &line.act else {
            panic!("{line:?}")
        };
        assert_eq!((value.value, value.from), (7, Some(3)));
        assert_eq!(span.part, Some((1 << 20, 5 << 20)));
    }
}
