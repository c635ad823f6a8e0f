//! Transcripts: programs and their answers as lines of text.
//!
//! A line is `[process:] call arguments = answer | mappings | pages`; `seq` begins a program, `seq
//! blocks` one in the large window, `#` a remark. Arguments are pages, with `+` bytes where need be, or
//! negative bytes. An answer is 0, an error number or a signal, and what the call returned if that is
//! not plain from the call. Of a page's word there are present, swapped, file and exclusive as the bits of a
//! hexadecimal digit, `g` for a guard and `.` for nothing; with the `PAGEMAP_SCAN` category of large pages
//! in front, `h`, in the large window, where equal pages are counted.

use std::fmt::Write as _;

use gpusvm::addr::PAGE;
use gpusvm_live::scratch::{Answer, Area, BATCH, Call, How, Kind, Look, Place, Seen, Step, flag};

use crate::conformance::mm::program::{Program, Size};

/// A program of a transcript, with the answers that stand there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// What a remark in front of it says.
    pub(crate) title: String,
    /// The calls.
    pub(crate) program: Program,
    /// The requests as they stand there, one for each call.
    pub(crate) requests: Vec<String>,
    /// What stands behind them; empty where nothing does.
    pub(crate) answers: Vec<String>,
}

impl Told {
    /// The first answer that is not what stands there.
    pub(crate) fn wrong(&self, seen: &[Seen]) -> Option<String> {
        if seen.len() < self.answers.len() {
            return Some("not all calls were made".into());
        }
        let steps = self.program.steps.iter().zip(seen);
        for ((step, seen), (request, wanted)) in steps.zip(self.requests.iter().zip(&self.answers))
        {
            let found = answer(self.program.size, &step.call, seen);
            if found != *wanted {
                return Some(format!("{request} = {found}, and not {wanted}"));
            }
        }
        None
    }

    /// The program's lines, with what stands behind each request now.
    pub(crate) fn with_answers(&self, seen: &[Seen]) -> String {
        let mut text = String::new();
        if !self.title.is_empty() && !self.title.starts_with("Linux ") {
            let _whole = writeln!(text, "# {}", self.title);
        }
        text.push_str(match self.program.size {
            Size::Pages | Size::Roomy => "seq\n",
            Size::Blocks => "seq blocks\n",
        });
        let steps = self.requests.iter().zip(&self.program.steps);
        for ((request, step), seen) in steps.zip(seen) {
            let answer = answer(self.program.size, &step.call, seen);
            let _whole = writeln!(text, "{request} = {answer}");
        }
        text
    }
}

/// Reads a transcript.
///
/// # Errors
/// The line that cannot be understood, or that there is no program.
pub(crate) fn parse(text: &str) -> Result<Vec<Told>, String> {
    let mut all: Vec<Told> = Vec::new();
    let mut title = String::new();
    let lines = text.lines().map(str::trim).zip(1..);
    for (line, number) in lines.filter(|(line, _)| !line.is_empty()) {
        if let Some(remark) = line.strip_prefix('#') {
            remark.trim().clone_into(&mut title);
        } else if let "seq" | "seq blocks" = line {
            all.push(Told {
                title: core::mem::take(&mut title),
                program: Program {
                    size: if line == "seq" {
                        Size::Roomy
                    } else {
                        Size::Blocks
                    },
                    steps: Vec::new(),
                },
                requests: Vec::new(),
                answers: Vec::new(),
            });
        } else {
            add(&mut all, line).map_err(|why| format!("line {number}: {why}"))?;
        }
    }
    if all.is_empty() {
        return Err("there is no program in it: one begins with a line `seq`".to_owned());
    }
    for (told, number) in all.iter_mut().zip(1..) {
        let sensible = told.program.sensible();
        if sensible.steps.len() != told.program.steps.len() {
            return Err(format!("program {number} has a call that cannot be"));
        }
        told.program = sensible;
    }
    Ok(all)
}

/// Adds a line, a call and what it answered, to the last program.
fn add(all: &mut [Told], line: &str) -> Result<(), String> {
    let told = all.last_mut().ok_or("a transcript begins with seq")?;
    let (request, answer) = line.split_once(" = ").unwrap_or((line, ""));
    told.program.steps.push(step(request)?);
    told.requests.push(request.to_owned());
    told.answers.push(answer.to_owned());
    Ok(())
}

fn step(request: &str) -> Result<Step, String> {
    let (who, call) = match request.split_once(": ") {
        Some((who, call)) => (
            who.parse().map_err(|_bad| format!("{who}: no process"))?,
            call,
        ),
        None => (0, request),
    };
    let words: Vec<&str> = call.split(' ').collect();
    let call = parse_call(&words).ok_or_else(|| format!("{request}: no call"))?;
    Ok(Step {
        who,
        call,
        look: Look::Yes,
    })
}

/// A number of pages, of pages and bytes, or of bytes below zero.
fn bytes(word: &str) -> Option<u64> {
    if let Some(below) = word.strip_prefix('-') {
        return Some(below.parse::<u64>().ok()?.wrapping_neg());
    }
    let (pages, rest) = word.split_once('+').unwrap_or((word, "0"));
    let pages = pages.parse::<u64>().ok()?.checked_mul(PAGE)?;
    pages.checked_add(rest.parse().ok()?)
}

fn parse_call(words: &[&str]) -> Option<Call> {
    let [name, args @ ..] = words else {
        return None;
    };
    let size = |n: usize| args.get(n).copied().and_then(bytes);
    let number = |n: usize| args.get(n)?.parse::<i32>().ok();
    let prot = |n: usize| u8::try_from(number(n)?).ok();
    Some(match *name {
        "map" | "hint" | "noreplace" | "anywhere" => Call::Map {
            at: size(0)?,
            len: size(1)?,
            prot: prot(2)?,
            kind: if number(3)? == 1 {
                Kind::Shared
            } else {
                Kind::Private
            },
            place: match *name {
                "map" => Place::Fixed,
                "hint" => Place::Hint,
                "noreplace" => Place::NoReplace,
                _ => Place::Anywhere,
            },
        },
        "unmap" => Call::Unmap {
            at: size(0)?,
            len: size(1)?,
        },
        "protect" => Call::Protect {
            at: size(0)?,
            len: size(1)?,
            prot: prot(2)?,
        },
        "move" | "resize" | "remap" => remap(name, args)?,
        "advise" => Call::Advise {
            at: size(0)?,
            len: size(1)?,
            advice: number(2)?,
        },
        "advises" => advises(number(0)?, &args[1..])?,
        "lock" => Call::Lock {
            at: size(0)?,
            len: size(1)?,
        },
        "unlock" => Call::Unlock {
            at: size(0)?,
            len: size(1)?,
        },
        "load" => Call::Load { at: size(0)? },
        "store" => Call::Store {
            at: size(0)?,
            value: args.get(1).map_or(Some(0), |word| word.parse().ok())?,
        },
        "fork" => Call::Fork { child: 0 },
        "exit" => Call::Exit,
        _ => return None,
    })
}

/// `move AT LEN TO LEAVE`, `resize AT OLD NEW`, `remap AT OLD NEW anywhere|leave|to TO|leave-at TO`.
fn remap(name: &str, args: &[&str]) -> Option<Call> {
    let size = |n: usize| args.get(n).copied().and_then(bytes);
    let (at, old) = (size(0)?, size(1)?);
    let how = match (name, args.get(3).copied()) {
        ("move", Some("1")) => How::LeaveBehindAt(size(2)?),
        ("move", _) => How::At(size(2)?),
        ("remap", Some("anywhere")) => How::Anywhere,
        ("remap", Some("leave")) => How::LeaveBehind,
        ("remap", Some("to")) => How::At(size(4)?),
        ("remap", Some("leave-at")) => How::LeaveBehindAt(size(4)?),
        _ => How::InPlace,
    };
    let new = if name == "move" { old } else { size(2)? };
    Some(Call::Remap { at, old, new, how })
}

/// `advises ADVICE [AT LEN]...`
fn advises(advice: i32, words: &[&str]) -> Option<Call> {
    let mut spans = [(0, 0); BATCH];
    let count = words.len() / 2;
    for (span, pair) in spans.iter_mut().zip(words.chunks(2)) {
        *span = (bytes(pair.first()?)?, bytes(pair.get(1)?)?);
    }
    Some(Call::AdviseMany {
        spans,
        count: u8::try_from(count.min(BATCH)).ok()?,
        advice,
    })
}

/// What stands behind a request.
pub(crate) fn answer(size: Size, call: &Call, seen: &Seen) -> String {
    let pages = match size {
        Size::Pages | Size::Roomy => seen
            .pages
            .iter()
            .take(size.shown())
            .map(|face| digit(*face))
            .collect(),
        Size::Blocks => runs(&seen.pages),
    };
    let areas: Vec<_> = seen.areas.iter().map(area).collect();
    let (done, areas) = (short(call, seen.answer), areas.join(" "));
    let text = format!("{done} | {areas} | {pages}");
    text.trim_end().to_owned()
}

fn short(call: &Call, answer: Option<Answer>) -> String {
    match answer {
        None => "none".to_owned(),
        Some(Answer::Failed(error)) => error.to_string(),
        Some(Answer::Signal(7)) => "bus".to_owned(),
        Some(Answer::Signal(11)) => "segv".to_owned(),
        Some(Answer::Signal(other)) => format!("signal {other}"),
        Some(Answer::Done(value)) => match returned(call, value) {
            Some(value) => format!("0 {value}"),
            None => "0".to_owned(),
        },
    }
}

/// What a call returned, where that is not plain from the call.
fn returned(call: &Call, value: u64) -> Option<u64> {
    match *call {
        Call::Map { at, .. } if value != at => Some(value / PAGE),
        Call::Remap { at, how, .. } => match how {
            How::InPlace | How::Anywhere if value == at => None,
            How::At(to) | How::LeaveBehindAt(to) if value == to => None,
            _ => Some(value / PAGE),
        },
        Call::AdviseMany { .. } | Call::Load { .. } => (value != 0).then_some(value),
        _ => None,
    }
}

fn area(area: &Area) -> String {
    let letter = |name: &[u8], letter| {
        if area.flags & flag(name) == 0 {
            '-'
        } else {
            letter
        }
    };
    let (start, end) = (area.start / PAGE, area.end / PAGE);
    let shared = if area.flags & flag(b"sh") == 0 {
        'p'
    } else {
        's'
    };
    let (read, write, run) = (letter(b"rd", 'r'), letter(b"wr", 'w'), letter(b"ex", 'x'));
    format!("{start}-{end}:{read}{write}{run}{shared}")
}

/// A page as one character.
fn digit(face: u32) -> char {
    let bit = |at: u32| face >> at & 1;
    let value = bit(8) | bit(7) << 1 | bit(6) << 2 | bit(1) << 3;
    match value {
        _ if bit(3) == 1 => 'g',
        0 => '.',
        _ => char::from_digit(value, 16).unwrap_or('?'),
    }
}

/// Pages by runs of equal ones.
fn runs(pages: &[u32]) -> String {
    let mut text = String::new();
    let name = |face: u32| {
        let huge = if face >> 22 & 1 == 1 { "h" } else { "" };
        format!("{huge}{}", digit(face))
    };
    for run in pages.chunk_by(|a, b| name(*a) == name(*b)) {
        let space = if text.is_empty() { "" } else { " " };
        let first = run.first().copied().unwrap_or(0);
        let _whole = write!(text, "{space}{}x{}", name(first), run.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_pages_bytes_or_below_zero() {
        assert_eq!(bytes("3"), Some(3 * PAGE));
        assert_eq!(bytes("3+8"), Some(3 * PAGE + 8));
        assert_eq!(bytes("-1"), Some(u64::MAX));
        for none in ["x", "4503599627370496", "4503599627370495+4096"] {
            assert_eq!(bytes(none), None, "{none}");
        }
    }

    #[test]
    fn programs_are_read_with_their_answers() {
        let all = parse("# two\nseq\nmap 0 2 3 0 = 0 | 0-2:rw-p | .\nseq blocks\n0: load 1\n");
        let all = all.expect("two programs");
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[0].title.as_str(), all[0].program.size),
            ("two", Size::Roomy)
        );
        assert_eq!(all[0].answers, ["0 | 0-2:rw-p | ."]);
        assert_eq!(all[1].program.size, Size::Blocks);
        for (wrong, why) in [
            ("", "there is no program in it"),
            ("# Linux 6.18\n", "there is no program in it"),
            ("load 0", "line 1: a transcript begins with seq"),
            ("seq\nfly 1", "line 2: fly 1: no call"),
            ("seq\n\nload 4503599627370496", "line 3: load "),
            ("seq\nload 99", "program 1 has a call that cannot be"),
            ("seq\nload 0\nseq\n1: load 0", "program 2 has a call"),
        ] {
            let said = parse(wrong).expect_err(wrong);
            assert!(said.starts_with(why), "{wrong}: {said}");
        }
    }

    #[test]
    fn equal_pages_are_counted() {
        let huge = 1 << 22 | 1 << 8;
        assert_eq!(runs(&[0, 0, huge, 1 << 3]), ".x2 h1x1 gx1");
    }
}
