//! Event churners: random operations on the address space at random spans, while everybody else
//! goes on.
//!
//! Each operation is one function below; the module's page says what its pages are turned to
//! meanwhile, and so what everybody may see.

use core::ops::Range;
use std::io;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_live::{Advise, Huge, Leave, Protect};

use crate::machine::Machine;
use crate::torture::area::{Area, Kind, Past};
use crate::torture::ledger::{self, Known, SLOTS};
use crate::torture::op::Op;
use crate::torture::random::Stream;
use crate::torture::visit::{CpuPort, Port};
use crate::torture::world::{Doing, Fault, Side, World, tick};

/// Most pages that leave for a churner's own place and come back.
pub(super) const AWAY_PAGES: u32 = 2048;
/// Bytes of a churner's own place.
pub(super) const AWAY_BYTES: u64 = 2 * AWAY_PAGES as u64 * PAGE;

/// One churner.
pub(super) struct Churner<'w> {
    pub(super) world: &'w World,
    pub(super) machine: &'w Machine,
    pub(super) me: usize,
    /// The device unit that it plays.
    pub(super) unit: usize,
    /// Its own place, for what it moves away.
    pub(super) away: HostVa,
    /// What it may do; all, if empty.
    pub(super) ops: &'w [Op],
    pub(super) random: Stream,
}

/// An operation on some pages of an area whose change lock is held.
pub(super) struct Span<'a> {
    pub(super) op: Op,
    pub(super) area: &'a Area,
    pub(super) pages: Range<u32>,
}

impl Span<'_> {
    /// Where its pages are.
    pub(super) fn host(&self) -> HostSpan {
        self.area.part(&self.pages)
    }
}

impl Churner<'_> {
    /// Does operations until everybody stops.
    pub(super) fn work(&mut self) {
        let ops: Vec<Op> = Op::ALL
            .into_iter()
            .filter(|op| op.is_churned() && op.is_promised(self.world.sight))
            .filter(|op| self.ops.is_empty() || self.ops.contains(op))
            .collect();
        if ops.is_empty() {
            return;
        }
        while !self.world.stopped() {
            self.world.jam(self.me);
            let op = ops[self.random.index(ops.len())];
            let (area, page) = self.world.pick(&mut self.random);
            self.world.actors[self.me].stepped();
            self.world.actors[self.me].does(Doing::op(op), area.id, page);
            match op {
                Op::Heap => self.heap(),
                Op::Thread => self.thread(),
                _ => self.change(op, area, page),
            }
        }
    }

    fn change(&mut self, op: Op, area: &Area, page: u32) {
        let Some(_one_at_a_time) = area.change.try_lock() else {
            return;
        };
        let pages = self.choose(op, area, page);
        // Only what is one mapping can grow, and something must stay of it.
        if op == Op::Resize && !(area.is_in_one() && pages.start > 0 && !pages.is_empty()) {
            return;
        }
        let span = Span { op, area, pages };
        let cuts = [
            Op::Lock,
            Op::DiscardLocked,
            Op::Huge,
            Op::MoveAway,
            Op::MoveKeep,
        ];
        if cuts.contains(&op) {
            area.cut();
        }
        let began_us = self.world.now_us();
        let result = self.perform(&span);
        let answer = usize::from(result.is_err());
        tick(&self.world.tally.ops[op as usize][answer]);
        let errno = result
            .err()
            .map_or(0, |error| error.raw_os_error().unwrap_or(-1));
        area.remember(Past {
            op,
            first: span.pages.start,
            pages: span.pages.end - span.pages.start,
            by: self.me,
            began_us,
            took_us: self.world.now_us() - began_us,
            errno,
        });
        self.look_after(&span);
        if self.random.one_in(4) {
            self.touch(&span);
        }
    }

    /// Writes a page, and leaves it as it is.
    fn touch(&self, span: &Span<'_>) {
        let _inside = self.world.enter(self.me);
        let at = span.host().start().get();
        let stable = span.area.flux(span.pages.start).kind() == Kind::Stable;
        if stable && self.world.bus.atomic(at, AtomicOp::Add(0)).is_ok() {
            span.area.rooted();
        }
    }

    /// Pages around `page`: few, many, a whole block, all.
    fn choose(&mut self, op: Op, area: &Area, page: u32) -> Range<u32> {
        let all = area.plan.pages;
        let some = match self.random.between(0, 9) {
            0 | 1 => page..page + 1,
            2..=4 => page..page + self.random.between(2, 16),
            5 | 6 => page..page + self.random.between(17, 200),
            7 | 8 => {
                let block = page / 512 * 512;
                block..block + 512
            }
            _ => 0..all,
        };
        let some = some.start..some.end.min(all);
        match op {
            Op::Move => 0..all,
            Op::Resize => page.max(1).min(all - 1)..all,
            Op::MoveAway | Op::MoveKeep => some.start..some.end.min(some.start + AWAY_PAGES),
            _ => some,
        }
    }

    fn perform(&mut self, span: &Span<'_>) -> io::Result<()> {
        let land = &self.world.land;
        match span.op {
            Op::Discard => self.destroy(span, |_, at| land.advise(at, Advise::Discard)),
            Op::DiscardAll => self.destroy(span, |_, at| discard_all(land, at)),
            Op::DiscardRaw => self.destroy(span, |_, at| land.discard_raw(at)),
            Op::DiscardLocked => self.destroy(span, |churner, at| churner.discard_locked(at)),
            Op::Free => self.free(span),
            Op::Unmap | Op::UnmapRaw => self.destroy(span, |churner, at| churner.unmap(span, at)),
            Op::MapOver => self.destroy(span, |_, at| {
                land.map_over(at, span.area.plan.huge)?;
                span.area.mapped(&span.pages);
                Ok(())
            }),
            Op::Resize => self.destroy(span, |churner, at| churner.resize(span, at)),
            Op::Move => self.relocate(span),
            Op::MoveAway => self.move_away(span),
            Op::MoveKeep => self.move_keep(span),
            Op::Guard => self.destroy(span, |churner, at| churner.guard(span, at)),
            Op::ProtectNone => self.protect_none(span),
            Op::ProtectRead => self.protect_read(span),
            Op::Collapse => land.advise(span.host(), Advise::Collapse),
            Op::PageOut => land.advise(span.host(), Advise::PageOut),
            Op::Cold => land.advise(span.host(), Advise::Cold),
            Op::Populate => land.advise(span.host(), Advise::Populate),
            Op::Lock => self.lock(span),
            Op::Huge => self.huge(span),
            Op::Pipe => self.pipe(span),
            Op::Heap | Op::Thread | Op::Fork | Op::Exec => Ok(()),
        }
    }

    /// Destroys content by `act`: everybody may see old content or none, or be refused. Where it
    /// fails, nothing may have happened.
    fn destroy(
        &mut self,
        span: &Span<'_>,
        act: impl FnOnce(&mut Self, HostSpan) -> io::Result<()>,
    ) -> io::Result<()> {
        let Span { area, pages, .. } = span;
        self.world.close(area, pages, self.me);
        let words = area.words(pages);
        let known: Vec<Known> = words.iter().map(ledger::Word::known).collect();
        let burn = self.world.burn(span.op);
        words.iter().for_each(|word| word.destroy(burn));
        area.turn(pages, Kind::Destroy);
        self.pause();
        let result = act(self, span.host());
        if result.is_err() {
            let both = words.iter().zip(known);
            both.for_each(|(word, known)| word.restore(known));
        }
        self.settle(span);
        area.turn(pages, Kind::Stable);
        result
    }

    /// Refuses accesses by `act`, and keeps content.
    fn deny(
        &mut self,
        span: &Span<'_>,
        act: impl FnOnce(&mut Self, HostSpan) -> io::Result<()>,
    ) -> io::Result<()> {
        self.world.close(span.area, &span.pages, self.me);
        span.area.turn(&span.pages, Kind::Deny);
        self.pause();
        let result = act(self, span.host());
        span.area.turn(&span.pages, Kind::Stable);
        result
    }

    fn unmap(&mut self, span: &Span<'_>, at: HostSpan) -> io::Result<()> {
        let land = &self.world.land;
        match span.op {
            Op::UnmapRaw => land.unmap_raw(at)?,
            _ => land.unmap(at)?,
        }
        self.settle(span);
        self.expect_nothing(span, at);
        let mapped = self.world.land.map(at, span.area.plan.huge);
        span.area.mapped(&span.pages);
        self.must(span, mapped)
    }

    fn resize(&mut self, span: &Span<'_>, tail: HostSpan) -> io::Result<()> {
        let land = &self.world.land;
        let start = span.area.span().start();
        let head = HostSpan::new(start, tail.start());
        land.resize(span.area.span(), head.bytes())?;
        self.expect_nothing(span, tail);
        let grown = land.resize(head, span.area.plan.bytes());
        self.must(span, grown)
    }

    fn guard(&mut self, span: &Span<'_>, at: HostSpan) -> io::Result<()> {
        self.world.land.advise(at, Advise::GuardInstall)?;
        self.expect_nothing(span, at);
        let removed = self.world.land.advise(at, Advise::GuardRemove);
        self.must(span, removed)
    }

    /// Everything moves to the other home, on top of what is there: now and then a mapping that
    /// the device has used.
    fn relocate(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.deny(span, |churner, from| {
            let homes = span.area.homes;
            let to = if from.start() == homes[0] {
                homes[1]
            } else {
                homes[0]
            };
            if churner.random.one_in(2) {
                churner.squat(span, HostSpan::at(to, from.bytes()))?;
            }
            churner.world.land.relocate(from, to, Leave::Hole)?;
            span.area.moved(to);
            churner.expect_nothing(span, from);
            Ok(())
        })
    }

    /// Maps something at `at` that both sides use.
    fn squat(&mut self, span: &Span<'_>, at: HostSpan) -> io::Result<()> {
        self.world.land.map(at, span.area.plan.huge)?;
        let mut cpu = CpuPort(self.world.bus);
        for page in (at.start().get()..at.end().get()).step_by(3 * 4096) {
            let _mapped = cpu.store(page, u64::MAX);
        }
        let middle = at.start().plus(at.bytes() / 2 / PAGE * PAGE).get();
        self.on_device(|tile| {
            let _mapped = tile.store_one(middle, u64::MAX);
        });
        Ok(())
    }

    fn move_away(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.deny(span, |churner, from| {
            let land = &churner.world.land;
            let to = churner.place_for(from);
            land.relocate(from, to.start(), Leave::Hole)?;
            churner.expect_nothing(span, from);
            churner.expect_content(span, to);
            let back = land.relocate(to, from.start(), Leave::Hole);
            churner.must(span, back)
        })
    }

    /// As [`move_away`](Self::move_away), but an empty mapping stays behind: a write to it would
    /// be lost, so nobody is let in.
    fn move_keep(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.world.close(span.area, &span.pages, self.me);
        let from = span.host();
        let to = self.place_for(from);
        let land = &self.world.land;
        let result = land.relocate(from, to.start(), Leave::Empty);
        if result.is_ok() {
            self.expect_zeros(span, from);
            self.expect_content(span, to);
            let back = land.relocate(to, from.start(), Leave::Hole);
            // The refusal is reported; the area is lost.
            let _lost = self.must(span, back);
        }
        span.area.turn(&span.pages, Kind::Stable);
        result
    }

    fn protect_none(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.deny(span, |churner, at| {
            let land = &churner.world.land;
            land.protect(at, Protect::None)?;
            churner.expect_nothing(span, at);
            let back = land.protect(at, Protect::ReadWrite);
            churner.must(span, back)
        })
    }

    /// Read-only: reads see the content, no write lands.
    fn protect_read(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.deny(span, |churner, at| {
            let land = &churner.world.land;
            land.protect(at, Protect::Read)?;
            let before = churner.sample(at);
            churner.expect_no_write(span, at);
            churner.pause();
            if churner.sample(at) != before {
                churner.found(span, Fault::Allowed, Side::Cpu, at.start().get());
            }
            let back = land.protect(at, Protect::ReadWrite);
            churner.must(span, back)
        })
    }

    /// The content may go page by page until a page is written: each is written, and then holds
    /// all of its words or none.
    fn free(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.world.close(span.area, &span.pages, self.me);
        let at = span.host();
        let result = self.world.land.advise(at, Advise::Free);
        self.settle(span);
        if result.is_ok() {
            self.pause();
            span.pages
                .clone()
                .for_each(|page| self.settle_freed(span, page));
        }
        span.area.turn(&span.pages, Kind::Stable);
        result
    }

    fn settle_freed(&mut self, span: &Span<'_>, page: u32) {
        let mut cpu = CpuPort(self.world.bus);
        let at = span.area.part(&(page..page + 1)).start().get();
        let kept = self.world.bus.atomic(at, AtomicOp::Add(0));
        let held = |slot: &u32| span.area.word(page, *slot).known().floor > 0;
        let empty = |slot: u32| cpu.load(at + u64::from(slot) * ledger::STRIDE) == Ok(0);
        let held: Vec<u32> = (0..SLOTS).filter(held).collect();
        let gone = held.iter().copied().map(empty).filter(|gone| *gone).count();
        if kept.is_err() || (gone > 0 && gone < held.len()) {
            self.found(span, Fault::Lost, Side::Cpu, at);
        } else if gone > 0 {
            let words = span.area.words(&(page..page + 1));
            words
                .iter()
                .for_each(|word| word.destroy(self.world.burn(span.op)));
        }
    }

    fn lock(&mut self, span: &Span<'_>) -> io::Result<()> {
        self.locked(span.host(), |churner| {
            churner.look_after(span);
            churner.pause();
            Ok(())
        })
    }

    fn discard_locked(&mut self, at: HostSpan) -> io::Result<()> {
        self.locked(at, |churner| {
            churner.pause();
            churner.world.land.advise(at, Advise::DiscardLocked)
        })
    }

    /// Does something to locked pages. A lock that cannot be had in full leaves the mapping locked all
    /// the same, and later discards would stop in the middle.
    fn locked(
        &mut self,
        at: HostSpan,
        act: impl FnOnce(&mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        let locked = self.world.land.lock(at);
        let done = locked.and_then(|()| act(self));
        let unlocked = self.world.land.unlock(at);
        done.and(unlocked)
    }

    /// Other advice about huge pages for a moment, which cuts the mapping.
    fn huge(&mut self, span: &Span<'_>) -> io::Result<()> {
        let (other, own) = match span.area.plan.huge {
            Huge::Advise => (Advise::Small, Advise::Huge),
            Huge::Never => (Advise::Huge, Advise::Small),
        };
        self.world.land.advise(span.host(), other)?;
        self.look_after(span);
        self.world.land.advise(span.host(), own)
    }

    /// One page as the system reads it, by the ordinary rule. Nobody writes it meanwhile.
    fn pipe(&mut self, span: &Span<'_>) -> io::Result<()> {
        let page = span.pages.start..span.pages.start + 1;
        self.world.close(span.area, &page, self.me);
        let mut bytes = [0; 4096];
        let result = self
            .world
            .land
            .through_pipe(span.area.part(&page), &mut bytes);
        if result.is_ok() {
            self.expect_page(span, page.start, &bytes);
        }
        span.area.turn(&page, Kind::Stable);
        result
    }

    /// A place of its own for what is at `from`, aligned as it is there or not.
    fn place_for(&mut self, from: HostSpan) -> HostSpan {
        let inside = from.start().get() & ((2 << 20) - 1);
        let shift = if self.random.one_in(3) { PAGE } else { inside };
        HostSpan::at(self.away.plus(shift), from.bytes())
    }
}

fn discard_all(land: &gpusvm_live::Territory, at: HostSpan) -> io::Result<()> {
    let half = at.pages().get() / 2 * PAGE;
    let middle = at.start().plus(half);
    let parts = [
        HostSpan::new(at.start(), middle),
        HostSpan::new(middle, at.end()),
    ];
    let parts = if half == 0 { &parts[1..] } else { &parts[..] };
    land.advise_all(parts, Advise::Discard).map(|_bytes| ())
}
