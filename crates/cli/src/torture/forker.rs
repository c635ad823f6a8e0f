//! The forker: makes children while everything goes on, and compares what they find with the ledger.
//!
//! A child is a copy of the process at one moment, page by page. Its parent notes what is known of
//! some words before the fork, and what was announced after it: what the child finds lies between.
//! The child finds the same again after it has written to other words of the same pages, and writes
//! to all of them, which its parent must never see: everybody else goes on checking there. Some
//! children run a program instead.
//!
//! ```text
//!   parent:   enter ─ floor? ─ fork ─ ceiling? ─ leave ──────────────── judge
//!   child:                      └─ load all ─ write ─ load all again ─ write ─ exit
//! ```
//!
//! A child allocates nothing, takes no lock and prints nothing: it copies between words that lie
//! ready and a page that it shares with its parent.

use std::io;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm_abi::bus::SystemBus;
use gpusvm_live::program::{By, Child, Ended};
use gpusvm_live::{Backing, Territory};

use crate::torture::area::{Area, Kind, Look, Past};
use crate::torture::ledger::{self, SLOTS, Tag, Trust, Wrong};
use crate::torture::op::Op;
use crate::torture::random::Stream;
use crate::torture::visit::CpuPort;
use crate::torture::visit::Port;
use crate::torture::world::{Doing, Fault, Finding, World, tick};
use crate::workload::count;

/// Pages that a child looks at.
const LOOKS: usize = 24;
/// Words of each.
const WORDS: u32 = 8;
/// Longest pause between two forks. Each one brings everything home and makes every page shared, so
/// that it has to be copied or claimed before it can leave.
const PAUSE_US: u32 = 300_000;
/// What a child writes. No version of any word looks like it.
const MARK: u64 = u64::MAX;
/// What a child reports of a word that it cannot read.
const REFUSED: u64 = u64::MAX - 1;

/// The forker.
pub(super) struct Forker<'w> {
    pub(super) world: &'w World,
    pub(super) me: usize,
    pub(super) random: Stream,
}

impl<'w> Forker<'w> {
    /// Forks until everybody stops.
    pub(super) fn work(&mut self) {
        let report = match Report::new() {
            Ok(report) => report,
            Err(error) => return self.failed(&error),
        };
        while !self.world.stopped() {
            self.world.jam(self.me);
            self.world.actors[self.me].stepped();
            if self.random.one_in(5) {
                self.run_program();
            } else {
                self.fork(&report);
            }
            let us = self.random.between(0, PAUSE_US);
            self.world.sleep_us(us.into());
        }
    }

    /// A child that runs a program.
    fn run_program(&self) {
        self.world.actors[self.me].does(Doing::op(Op::Exec), 0, 0);
        let made = Child::exec(By::Fork, c"/bin/true");
        self.note(Op::Exec, made.and_then(Child::ended), &[]);
    }

    /// A child that looks at pages, and writes to them.
    fn fork(&mut self, report: &Report) {
        let (area, tags) = self.choose();
        let bus = self.world.bus;
        let out = report.start;
        let inside = self.world.enter(self.me);
        let look = |tag: &Tag| area.look(*tag, area.flux(tag.page));
        let looks: Vec<Look> = tags.iter().map(look).collect();
        let made = Child::make(By::Fork, || look_and_write(bus, &looks, out));
        let ceiling = |tag: &Tag| area.word(tag.page, tag.slot).ceiling();
        let ceilings: Vec<u32> = tags.iter().map(ceiling).collect();
        drop(inside);
        let ended = made.and_then(Child::ended);
        let content = matches!(ended, Ok(Ended::Code(0 | 1)));
        self.note(Op::Fork, ended, &looks);
        if content {
            self.judge(&looks, &ceilings, report);
        }
    }

    /// Words of some pages of one area.
    fn choose(&mut self) -> (&'w Area, Vec<Tag>) {
        let world = self.world;
        let (area, page) = world.pick(&mut self.random);
        self.world.actors[self.me].does(Doing::op(Op::Fork), area.id, page);
        let mut tags = Vec::with_capacity(LOOKS * WORDS as usize);
        for n in 0..LOOKS {
            let near = page.saturating_add(u32::try_from(n).unwrap_or(0));
            let page = if n < LOOKS / 2 && near < area.plan.pages {
                near
            } else {
                self.random.between(0, area.plan.pages - 1)
            };
            let first = self.random.between(0, SLOTS - 1);
            let slots = (0..WORDS).map(|n| (first + n * 7) % SLOTS);
            tags.extend(slots.map(|slot| area.tag(page, slot)));
        }
        (area, tags)
    }

    /// What the child found must lie between what was known before it and after.
    fn judge(&self, looks: &[Look], ceilings: &[u32], report: &Report) {
        for (n, (look, ceiling)) in looks.iter().zip(ceilings).enumerate() {
            let [found, again] = report.pair(n);
            let fault = match (found, look.flux.kind()) {
                // Nobody says what was there.
                (_, Kind::Closed | Kind::Destroy) => None,
                (REFUSED, Kind::Deny) => None,
                (REFUSED, Kind::Stable) => Some(Fault::Refused),
                _ if found != again => Some(Fault::Stale),
                _ => match ledger::judge(look.tag, found, look.known, *ceiling, Trust::Strict) {
                    Ok(_version) => None,
                    Err(Wrong::Bytes) => Some(Fault::Bytes),
                    Err(Wrong::Burnt) => Some(Fault::Stale),
                    Err(Wrong::Old) => Some(Fault::Lost),
                },
            };
            if let Some(fault) = fault {
                let value = |raw: u64| (raw != REFUSED).then_some(raw);
                return self.world.found(Finding {
                    found: value(found),
                    again: value(again),
                    ceiling: *ceiling,
                    ..self.world.statement(self.me, fault, look)
                });
            }
        }
    }

    /// Counts a child, and tells where it did not end as it should.
    fn note(&self, op: Op, ended: io::Result<Ended>, looks: &[Look]) {
        let right = match &ended {
            Ok(Ended::Code(0)) => true,
            // A page where nobody may write.
            Ok(Ended::Code(1)) => looks.iter().any(|look| look.flux.kind() != Kind::Stable),
            _ => false,
        };
        tick(&self.world.tally.ops[op as usize][usize::from(ended.is_err())]);
        if let Some(look) = looks.first() {
            let area = &self.world.areas[usize::from(look.tag.area)];
            let now = self.world.now_us();
            area.remember(Past {
                op,
                first: 0,
                pages: area.plan.pages,
                by: self.me,
                began_us: now,
                took_us: 0,
                errno: 0,
            });
        }
        match ended {
            Ok(_) if right => {}
            Ok(Ended::Code(code) | Ended::Signal(code)) => {
                self.failed(&io::Error::from_raw_os_error(code));
            }
            Err(error) => self.failed(&error),
        }
    }

    /// A child cannot be made, or did not end as it should.
    fn failed(&self, error: &io::Error) {
        let area = &self.world.areas[0];
        let look = area.look(area.tag(0, 0), area.flux(0));
        let finding = self.world.statement(self.me, Fault::Operation, &look);
        let errno = error.raw_os_error().unwrap_or(-1);
        self.world.found(Finding { errno, ..finding });
    }
}

/// The child's part: loads all, writes next to what it has loaded, loads all again, and writes over
/// it. False where it cannot write, or does not find what it has written.
fn look_and_write(bus: gpusvm_live::LiveBus, looks: &[Look], out: u64) -> bool {
    let mut port = CpuPort(bus);
    let mut note = |round: u64, n: usize, at: u64| {
        let raw = port.load(at).unwrap_or(REFUSED);
        bus.write(out + (2 * count(n) + round) * 8, &raw.to_ne_bytes())
            .is_ok()
    };
    let all = |note: &mut dyn FnMut(u64, usize, u64) -> bool, round: u64| {
        let mut each = looks.iter().enumerate();
        each.all(|(n, look)| note(round, n, look.address))
    };
    let told = all(&mut note, 0);
    let mut port = CpuPort(bus);
    let mut mark = |at: u64| port.store(at, MARK).is_ok() && port.load(at) == Ok(MARK);
    // All of them: also behind a page where it is refused.
    let mut mark_all = |offset: u64| {
        let refused = looks.iter().filter(|look| !mark(look.address + offset));
        refused.count() == 0
    };
    // Next to what was loaded, and at last over it, where everybody in the parent would notice.
    let next_to_it = mark_all(8);
    told && all(&mut note, 1) && mark_all(0) && next_to_it
}

/// Memory that a child shares with its parent: two values per word.
struct Report {
    _land: Territory,
    start: u64,
}

impl Report {
    fn new() -> io::Result<Self> {
        let bytes = count(LOOKS) * u64::from(WORDS) * 16;
        let land = Territory::reserve(bytes)?;
        let span = HostSpan::at(land.span().start(), bytes.next_multiple_of(PAGE));
        land.map_backed(span, Backing::SharedAnonymous)?;
        Ok(Self {
            start: span.start().get(),
            _land: land,
        })
    }

    /// What a child found at word `n`, first and again.
    fn pair(&self, n: usize) -> [u64; 2] {
        let mut port = CpuPort(gpusvm_live::LiveBus::new());
        [0, 1].map(|round| {
            let at = self.start + (2 * count(n) + round) * 8;
            port.load(at).unwrap_or(0)
        })
    }
}
