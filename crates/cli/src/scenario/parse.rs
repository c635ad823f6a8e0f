//! The one reader of the format. `docs/scenarios.md` is its manual.
//!
//! A file is read line by line. `scenario N TITLE` begins one; lines of its setup follow, then what is
//! done. Blocks (`together`, `fork`, `at`) end with `end`.

use core::ops::RangeInclusive;

use gpusvm::addr::PAGE;
use gpusvm::seam::env::{Ns, Point};
use gpusvm_xe::stats::Counter;
use gpusvm_xe::vm::Rights as Mirror;

use crate::atomics::Atomics;
use crate::scenario::HostKind;
use crate::scenario::lex::{Lines, ParseError, Words, name, parse_size};
use crate::scenario::text::{
    Access, Act, Drive, Expect, Line, Map, Often, Place, Scenario, Setup, Who,
};
use crate::scenario::words::{
    Advice, Answers, Backing, Collector, Compare, Deed, Entries, Huge, Object, Rights, Word,
};

/// Most devices: more than any scenario needs, and few enough to be made.
const GPUS_MAX: u64 = 8;
/// Most memory of a device, or of the model's machine: all of it is there from the start.
const BYTES_MAX: u64 = 1 << 30;
/// Largest notifier window: all that a process has.
const WINDOW_MAX: u64 = 1 << 47;

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
        "gpus" => {
            let gpus = within(words.number()?, 1..=GPUS_MAX)?;
            setup.gpus = u16::try_from(gpus).unwrap_or(u16::MAX);
        }
        "vram" => setup.vram = within(words.size()?, PAGE..=BYTES_MAX)?,
        "window" => {
            let bytes = within(words.size()?, PAGE..=WINDOW_MAX)?;
            if !bytes.is_power_of_two() {
                return Err(format!("a window has a power of two of bytes, not {bytes}"));
            }
            setup.window = Some(bytes);
        }
        "memory" => setup.memory = within(words.size()?, PAGE..=BYTES_MAX)?,
        "seeds" => setup.seeds = within(words.number()?, 1..=u64::MAX)?,
        "collector" => setup.collector = words.one::<Collector>()?,
        "tlb-answers" => setup.answers = words.one::<Answers>()?,
        "atomics" => setup.atomics = words.one::<Atomics>()?,
        _ => return Ok(Known::No),
    }
    words.end()?;
    Ok(Known::Yes)
}

/// A number of the setup, if it is one of those.
fn within(number: u64, all: RangeInclusive<u64>) -> Result<u64, String> {
    if all.contains(&number) {
        Ok(number)
    } else {
        let (least, most) = all.into_inner();
        Err(format!("{number} is not in {least} to {most}"))
    }
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
            block.of(block_lines(&place, lines)?).map_err(at)?
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
    let found = text
        .split_once(": ")
        .and_then(|(first, rest)| Some((host(first)?, rest)));
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
    fn of(self, lines: Vec<Line>) -> Result<Act, String> {
        Ok(match self {
            Self::Together => Act::Together(lines),
            Self::Fork if lines.iter().any(is_more_than_an_access) => {
                return Err("in `fork` a child reads and writes, once, and succeeds".to_owned());
            }
            Self::Fork => Act::Fork(lines),
            Self::At(point, often) => Act::At {
                point,
                often,
                lines,
            },
        })
    }
}

/// Whether a line is more than a child can do: it has nobody to tell how something ended.
fn is_more_than_an_access(line: &Line) -> bool {
    let plain = line.answers.is_empty() && line.times == 1 && line.only.is_none();
    let child = matches!(
        line.act,
        Act::Access(Who::Child, Access::Read(_) | Access::Write(_), _)
    );
    !plain || !child
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
        let line = line(place, text, lines)?;
        if matches!(line.act, Act::Together(_) | Act::Fork(_) | Act::At { .. }) {
            return Err(line.place.error("a block holds no other block"));
        }
        inside.push(line);
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
mod tests;
