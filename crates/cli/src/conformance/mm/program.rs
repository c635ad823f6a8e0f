//! Programs of address-space calls: what makes one sensible, and how one reads.

use std::fmt::Write as _;

use gpusvm::addr::PAGE;
use gpusvm_live::scratch::{Call, How, Kind, Look, PROCESSES, Place, Step};

/// First address of every window: below all mappings of this process, a multiple of 2 MiB.
pub(crate) const BASE: u64 = 1 << 28;
/// Pages of a block on x86-64.
pub(crate) const BLOCK: u64 = 512;

/// More bytes than a process can have.
const ABSURD: u64 = u64::MAX - (1 << 20);

/// The window that a program runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Size {
    /// Sixteen pages: no large page fits.
    Pages,
    /// Sixteen pages and as many behind them, at which nobody looks, for calls that go too far.
    Roomy,
    /// Three blocks.
    Blocks,
}

impl Size {
    /// Pages of the window.
    pub(crate) const fn pages(self) -> u16 {
        match self {
            Self::Pages => 16,
            Self::Roomy => 32,
            Self::Blocks => 1536,
        }
    }

    /// Pages that transcripts show.
    pub(crate) const fn shown(self) -> usize {
        match self {
            Self::Pages | Self::Roomy => 16,
            Self::Blocks => 1536,
        }
    }

    /// Whether a call stays in the window: what lies beyond is the process itself. Lengths that
    /// nobody can have are refused before they reach anything.
    fn holds(self, call: &Call) -> bool {
        spans(call).iter().all(|(at, len)| {
            let end = at.saturating_add(*len).max(at.saturating_add(1));
            end <= u64::from(self.pages()) * PAGE || *len >= ABSURD
        })
    }
}

/// Calls of one process and its children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Where.
    pub(crate) size: Size,
    /// What.
    pub(crate) steps: Vec<Step>,
}

impl Program {
    /// The program without steps that cannot be: by processes that are not there, forks for which
    /// there is no room, the exit of the first process, calls that reach out of the window. Children
    /// get the lowest free number.
    pub(crate) fn sensible(&self) -> Self {
        let mut alive = [false; PROCESSES];
        alive[0] = true;
        let mut steps = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let who = usize::from(step.who);
            if !alive.get(who).copied().unwrap_or(false) || !self.size.holds(&step.call) {
                continue;
            }
            let mut step = *step;
            match &mut step.call {
                Call::Exit if who == 0 => continue,
                Call::Exit => alive[who] = false,
                Call::Fork { child } => {
                    let Some(free) = (0..).zip(&alive).find(|(_, alive)| !**alive) else {
                        continue;
                    };
                    *child = free.0;
                    alive[usize::from(free.0)] = true;
                }
                _ => {}
            }
            steps.push(step);
        }
        Self {
            size: self.size,
            steps,
        }
    }

    /// The program with loads of `pages` by every process at its end, and a last look.
    pub(crate) fn with_last_look(&self) -> Self {
        let mut alive = vec![0];
        for step in &self.steps {
            match step.call {
                Call::Fork { child } => alive.push(child),
                Call::Exit => alive.retain(|who| *who != step.who),
                _ => {}
            }
        }
        let mut all = self.clone();
        for who in alive {
            let pages = probes(self.size);
            let last = pages.last().copied();
            all.steps.extend(pages.iter().map(|page| Step {
                who,
                call: Call::Load { at: page * PAGE },
                look: if Some(*page) == last {
                    Look::Yes
                } else {
                    Look::No
                },
            }));
        }
        all
    }

    /// The program as text that looks like C.
    pub(crate) fn script(&self) -> String {
        let mut text = String::new();
        let forks = self
            .steps
            .iter()
            .any(|step| matches!(step.call, Call::Fork { .. }));
        for step in &self.steps {
            let who = if forks {
                format!("p{}: ", step.who)
            } else {
                String::new()
            };
            let _whole = writeln!(text, "{who}{};", line(&step.call));
        }
        text
    }
}

/// Places and lengths that a call names.
fn spans(call: &Call) -> Vec<(u64, u64)> {
    match *call {
        Call::Map { at, len, place, .. } => match place {
            Place::Anywhere => Vec::new(),
            Place::Hint | Place::Fixed | Place::NoReplace => vec![(at, len)],
        },
        Call::Unmap { at, len }
        | Call::Protect { at, len, .. }
        | Call::Advise { at, len, .. }
        | Call::Lock { at, len }
        | Call::Unlock { at, len } => vec![(at, len)],
        Call::Remap { at, old, new, how } => match how {
            How::At(to) | How::LeaveBehindAt(to) => vec![(at, old), (to, new)],
            How::InPlace | How::Anywhere | How::LeaveBehind => vec![(at, old)],
        },
        Call::AdviseMany { spans, count, .. } => spans[..count.into()].to_vec(),
        Call::Load { at } | Call::Store { at, .. } => vec![(at, 8)],
        Call::Fork { .. } | Call::Exit => Vec::new(),
    }
}

/// The pages that are read at the end.
fn probes(size: Size) -> Vec<u64> {
    match size {
        Size::Pages | Size::Roomy => (0..16).collect(),
        Size::Blocks => (0..3)
            .flat_map(|n| [0, 1, 255, 510, 511].map(|page| n * BLOCK + page))
            .collect(),
    }
}

/// A place in the window: `w` is the window, `P` the size of a page.
pub(crate) fn place(at: u64) -> String {
    let (page, rest) = (at / PAGE, at % PAGE);
    match (page, rest) {
        _ if page > 1 << 40 => format!("w - {:#x}", at.wrapping_neg()),
        (0, 0) => "w".to_owned(),
        (_, 0) => format!("w + {page}*P"),
        _ => format!("w + {page}*P + {rest}"),
    }
}

fn bytes(len: u64) -> String {
    match (len / PAGE, len % PAGE) {
        _ if len > 1 << 52 => format!("-{:#x}", len.wrapping_neg()),
        (0, rest) => rest.to_string(),
        (pages, 0) => format!("{pages}*P"),
        (pages, rest) => format!("{pages}*P + {rest}"),
    }
}

fn rights(prot: u8) -> String {
    let names = [(1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC")];
    let named: Vec<_> = names
        .iter()
        .filter(|(bit, _)| prot & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    if named.is_empty() {
        "PROT_NONE".to_owned()
    } else {
        named.join("|")
    }
}

/// The name of an advice, or its number.
pub(crate) fn advice_name(advice: i32) -> String {
    let name = match advice {
        0 => "NORMAL",
        1 => "RANDOM",
        2 => "SEQUENTIAL",
        3 => "WILLNEED",
        4 => "DONTNEED",
        8 => "FREE",
        9 => "REMOVE",
        10 => "DONTFORK",
        11 => "DOFORK",
        12 => "MERGEABLE",
        13 => "UNMERGEABLE",
        14 => "HUGEPAGE",
        15 => "NOHUGEPAGE",
        16 => "DONTDUMP",
        17 => "DODUMP",
        18 => "WIPEONFORK",
        19 => "KEEPONFORK",
        20 => "COLD",
        21 => "PAGEOUT",
        22 => "POPULATE_READ",
        23 => "POPULATE_WRITE",
        24 => "DONTNEED_LOCKED",
        25 => "COLLAPSE",
        102 => "GUARD_INSTALL",
        103 => "GUARD_REMOVE",
        _ => return advice.to_string(),
    };
    format!("MADV_{name}")
}

/// A call as C has it.
pub(crate) fn line(call: &Call) -> String {
    let span = |at, len| format!("{}, {}", place(at), bytes(len));
    match *call {
        Call::Map { .. } => mmap_line(call),
        Call::Unmap { at, len } => format!("munmap({})", span(at, len)),
        Call::Protect { at, len, prot } => {
            format!("mprotect({}, {})", span(at, len), rights(prot))
        }
        Call::Remap { at, old, new, how } => {
            let (span, new, how) = (span(at, old), bytes(new), how_line(how));
            format!("mremap({span}, {new}, {how})")
        }
        Call::Advise { at, len, advice } => {
            format!("madvise({}, {})", span(at, len), advice_name(advice))
        }
        Call::AdviseMany {
            spans,
            count,
            advice,
        } => {
            let spans = spans.iter().take(count.into());
            let spans: Vec<_> = spans
                .map(|(at, len)| format!("{{{}}}", span(*at, *len)))
                .collect();
            let (spans, name) = (spans.join(", "), advice_name(advice));
            format!("process_madvise(self, {{{spans}}}, {count}, {name}, 0)")
        }
        Call::Lock { at, len } => format!("mlock({})", span(at, len)),
        Call::Unlock { at, len } => format!("munlock({})", span(at, len)),
        Call::Load { at } => format!("load({})", place(at)),
        Call::Store { at, value } => format!("store({}, {value})", place(at)),
        Call::Fork { child } => format!("fork() /* p{child} */"),
        Call::Exit => "_exit(0)".to_owned(),
    }
}

fn mmap_line(call: &Call) -> String {
    let Call::Map {
        at,
        len,
        prot,
        kind,
        place: how,
    } = *call
    else {
        return String::new();
    };
    let kind = match kind {
        Kind::Private => "MAP_PRIVATE",
        Kind::Shared => "MAP_SHARED",
    };
    let (at, fixed) = match how {
        Place::Hint => (place(at), ""),
        Place::Fixed => (place(at), "|MAP_FIXED"),
        Place::NoReplace => (place(at), "|MAP_FIXED_NOREPLACE"),
        Place::Anywhere => ("0".to_owned(), ""),
    };
    let (len, prot) = (bytes(len), rights(prot));
    format!("mmap({at}, {len}, {prot}, {kind}|MAP_ANONYMOUS{fixed}, -1, 0)")
}

fn how_line(how: How) -> String {
    match how {
        How::InPlace => "0".to_owned(),
        How::Anywhere => "MREMAP_MAYMOVE".to_owned(),
        How::At(to) => format!("MREMAP_MAYMOVE|MREMAP_FIXED, {}", place(to)),
        How::LeaveBehind => "MREMAP_MAYMOVE|MREMAP_DONTUNMAP".to_owned(),
        How::LeaveBehindAt(to) => format!(
            "MREMAP_MAYMOVE|MREMAP_FIXED|MREMAP_DONTUNMAP, {}",
            place(to)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(who: u8, call: Call) -> Step {
        Step {
            who,
            call,
            look: Look::Yes,
        }
    }

    #[test]
    fn steps_that_cannot_be_go() {
        let fork = Call::Fork { child: 9 };
        let load = |page: u64| Call::Load { at: page * PAGE };
        let program = Program {
            size: Size::Pages,
            steps: vec![
                step(1, load(0)),
                step(0, Call::Exit),
                step(0, load(16)),
                step(0, fork),
                step(1, load(15)),
                step(1, fork),
                step(0, fork),
                step(1, Call::Exit),
                step(1, load(0)),
            ],
        };
        let left = program.sensible();
        assert_eq!(
            left.script(),
            "p0: fork() /* p1 */;\np1: load(w + 15*P);\np1: fork() /* p2 */;\np1: _exit(0);\n"
        );
        assert_eq!(left.sensible(), left);
    }
}
