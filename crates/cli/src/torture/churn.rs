//! Event churners: random operations on the address space at random spans, while everybody else
//! goes on.
//!
//! Each operation is one function below; the module's page says what its pages are turned to
//! meanwhile, and so what everybody may see.

use core::ops::Range;
use std::io;

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_live::{Advise, Leave, Protect};
use gpusvm_softgpu::Tile;

use crate::machine::Machine;
use crate::torture::area::{Area, Kind, Past};
use crate::torture::ledger::{self, Known, SLOTS, Trust};
use crate::torture::random::Stream;
use crate::torture::visit::{CpuPort, OnTile, Port, TilePort, Visitor};
use crate::torture::world::{Doing, Fault, Finding, Side, Sight, World, tick};

/// Most pages that leave for a churner's own place and come back.
pub(super) const AWAY_PAGES: u32 = 2048;
/// Bytes of a churner's own place.
pub(super) const AWAY_BYTES: u64 = 2 * AWAY_PAGES as u64 * PAGE;

macro_rules! operations {
    ($($(#[$doc:meta])* $id:ident = $name:literal,)*) => {
        /// One operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Op {
            $($(#[$doc])* $id,)*
        }

        impl Op {
            /// All operations.
            pub(super) const ALL: [Self; [$(Self::$id,)*].len()] = [$(Self::$id,)*];

            /// Name, as reports show it.
            pub(super) const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }
        }
    };
}

operations! {
    /// `MADV_DONTNEED`.
    Discard = "discard",
    /// `process_madvise` with `MADV_DONTNEED`, two spans at once.
    DiscardAll = "discard_all",
    /// `MADV_FREE`.
    Free = "free",
    /// `munmap`, and a fresh mapping in the hole.
    Unmap = "unmap",
    /// `mmap` with `MAP_FIXED` over what is there.
    MapOver = "map_over",
    /// `mremap` that shrinks and grows again in place.
    Resize = "resize",
    /// `mremap` of everything to the other home.
    Move = "move",
    /// `mremap` of a part to elsewhere and back.
    MoveAway = "move_away",
    /// As above, the first with `MREMAP_DONTUNMAP`.
    MoveKeep = "move_keep",
    /// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`.
    Guard = "guard",
    /// `mprotect` to no access and back.
    ProtectNone = "protect_none",
    /// `mprotect` to read-only and back.
    ProtectRead = "protect_read",
    /// `MADV_COLLAPSE`.
    Collapse = "collapse",
    /// `MADV_PAGEOUT`.
    PageOut = "pageout",
    /// `MADV_COLD`.
    Cold = "cold",
    /// `MADV_POPULATE_WRITE`.
    Populate = "populate",
    /// `mlock` and `munlock`.
    Lock = "lock",
    /// A large block from the allocator, used and freed.
    Heap = "heap",
    /// A thread that starts, works and exits.
    Thread = "thread",
}

impl Op {
    /// Whether the operation's effect is promised where changes are seen afterwards only: rights
    /// and guards raise no event there, and a mapping of armed and unarmed pieces does not move.
    pub(super) const fn is_promised(self, sight: Sight) -> bool {
        match self {
            Self::Resize
            | Self::Move
            | Self::MoveAway
            | Self::MoveKeep
            | Self::Guard
            | Self::ProtectNone
            | Self::ProtectRead => matches!(sight, Sight::Before),
            _ => true,
        }
    }
}

/// One churner.
pub(super) struct Churner<'w> {
    pub(super) world: &'w World,
    pub(super) machine: &'w Machine,
    pub(super) me: usize,
    /// The device unit that it plays.
    pub(super) unit: usize,
    /// Its own place, for what it moves away.
    pub(super) away: HostVa,
    pub(super) random: Stream,
}

/// An operation on some pages of an area whose change lock is held.
struct Span<'a> {
    op: Op,
    area: &'a Area,
    pages: Range<u32>,
}

impl Span<'_> {
    fn host(&self) -> HostSpan {
        self.area.part(&self.pages)
    }
}

impl Churner<'_> {
    /// Does operations until everybody stops.
    pub(super) fn work(&mut self) {
        let ops: Vec<Op> = Op::ALL
            .into_iter()
            .filter(|op| op.is_promised(self.world.sight))
            .collect();
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
        if matches!(op, Op::Lock | Op::MoveAway | Op::MoveKeep) {
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
            Op::Free => self.free(span),
            Op::Unmap => self.destroy(span, |churner, at| churner.unmap(span, at)),
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
            Op::Heap | Op::Thread => Ok(()),
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
        self.settle();
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
        self.world.land.unmap(at)?;
        self.settle();
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
        self.settle();
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
        self.world.land.lock(span.host())?;
        self.look_after(span);
        self.pause();
        self.world.land.unlock(span.host())
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

/// What an operation promises, looked at from both sides.
impl Churner<'_> {
    /// Some words of the span, by the ordinary rule.
    fn look_after(&mut self, span: &Span<'_>) {
        let (world, me) = (self.world, self.me);
        let pages: Vec<u32> = (0..3)
            .map(|_| self.random.between(span.pages.start, span.pages.end - 1))
            .collect();
        let random = Stream::named(self.random.next(), "after", me);
        let mut cpu = Visitor {
            world,
            me,
            writer: None,
            port: CpuPort(world.bus),
            random: random.clone(),
        };
        pages.iter().for_each(|page| cpu.read(span.area, *page));
        self.on_device(|tile| {
            let mut device = Visitor {
                world,
                me,
                writer: None,
                port: TilePort(tile),
                random: random.clone(),
            };
            pages.iter().for_each(|page| device.read(span.area, *page));
        });
    }

    /// Nothing is mapped at `at`, or nothing may be accessed: both sides are refused.
    fn expect_nothing(&mut self, span: &Span<'_>, at: HostSpan) {
        let word = self.word_of(at);
        if CpuPort(self.world.bus).load(word).is_ok() {
            self.found(span, Fault::Allowed, Side::Cpu, word);
        }
        let refused = |tile: &mut Tile<'_>| tile.load_one::<u64>(word).is_err();
        self.expect_on_device(span, (Fault::Allowed, word), refused);
    }

    /// Neither side can write. The probe stores nothing even where it is let in.
    fn expect_no_write(&mut self, span: &Span<'_>, at: HostSpan) {
        let word = self.word_of(at);
        let cpu = CpuPort(self.world.bus).exchange(word, u64::MAX, u64::MAX);
        if cpu.is_ok() {
            self.found(span, Fault::Allowed, Side::Cpu, word);
        }
        self.expect_on_device(span, (Fault::Allowed, word), |tile| {
            TilePort(tile).exchange(word, u64::MAX, u64::MAX).is_err()
        });
    }

    /// The moved content is at `at`, on both sides.
    fn expect_content(&mut self, span: &Span<'_>, at: HostSpan) {
        let page = self.random.between(span.pages.start, span.pages.end - 1);
        let slot = self.random.between(0, SLOTS - 1);
        let tag = span.area.tag(page, slot);
        let offset = u64::from(page - span.pages.start) * PAGE + u64::from(slot) * ledger::STRIDE;
        let address = at.start().plus(offset).get();
        let word = span.area.word(page, slot);
        let is_right =
            |raw: u64| ledger::judge(tag, raw, word.known(), word.ceiling(), Trust::Strict).is_ok();
        let cpu = CpuPort(self.world.bus).load(address);
        if !cpu.is_ok_and(is_right) {
            self.found(span, Fault::Lost, Side::Cpu, address);
        }
        self.expect_on_device(span, (Fault::Lost, address), |tile| {
            tile.load_one(address).is_ok_and(is_right)
        });
    }

    /// What was left behind is empty, on both sides.
    fn expect_zeros(&mut self, span: &Span<'_>, at: HostSpan) {
        let word = self.word_of(at);
        if CpuPort(self.world.bus).load(word) != Ok(0) {
            self.found(span, Fault::Stale, Side::Cpu, word);
        }
        let empty = |tile: &mut Tile<'_>| tile.load_one(word) == Ok(0_u64);
        self.expect_on_device(span, (Fault::Stale, word), empty);
    }

    /// `holds` on the device, or this is wrong at this address.
    fn expect_on_device(
        &self,
        span: &Span<'_>,
        wrong: (Fault, u64),
        holds: impl Fn(&mut Tile<'_>) -> bool + Sync,
    ) {
        let (fault, address) = wrong;
        self.on_device(|tile| {
            if !holds(tile) {
                self.found(span, fault, Side::Device, address);
            }
        });
    }

    /// One word per page, as the CPU reads it.
    fn sample(&self, at: HostSpan) -> Vec<u64> {
        let mut cpu = CpuPort(self.world.bus);
        let words = (at.start().get()..at.end().get()).step_by(4096);
        let words = words
            .enumerate()
            .map(|(n, page)| page + (n as u64 % 64) * 64);
        words
            .map(|word| cpu.load(word).unwrap_or(u64::MAX))
            .collect()
    }

    fn word_of(&mut self, at: HostSpan) -> u64 {
        let words = u32::try_from(at.bytes() / ledger::STRIDE).unwrap_or(u32::MAX);
        let n = self.random.between(0, words - 1);
        at.start().plus(u64::from(n) * ledger::STRIDE).get()
    }

    /// Plays this churner's device unit.
    fn on_device(&self, act: impl Fn(&mut Tile<'_>) + Sync) {
        // Refusals are the closure's business, and it passes none on.
        let _done = self.machine.launch_on(self.unit, &OnTile(act));
    }

    /// Where changes are seen afterwards: waits until they are.
    fn settle(&self) {
        if self.world.sight == Sight::After {
            self.world.space.settle_events();
        }
    }

    /// Half of an operation is done: the other half must follow.
    fn must(&self, span: &Span<'_>, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result {
            let errno = error.raw_os_error().unwrap_or(-1);
            let finding =
                self.finding(span, Fault::Operation, Side::Cpu, span.host().start().get());
            self.world.found(Finding { errno, ..finding });
        }
        result
    }

    fn found(&self, span: &Span<'_>, fault: Fault, side: Side, address: u64) {
        self.world.found(self.finding(span, fault, side, address));
    }

    fn finding(&self, span: &Span<'_>, fault: Fault, side: Side, address: u64) -> Finding {
        let inside = address.saturating_sub(span.area.span().start().get());
        let page = u32::try_from(inside / PAGE).unwrap_or(0);
        let page = page.clamp(span.pages.start, span.pages.end - 1);
        let slot = u32::try_from(address % PAGE / ledger::STRIDE).unwrap_or(0);
        let word = span.area.word(page, slot);
        Finding {
            fault,
            side,
            actor: self.me,
            tag: span.area.tag(page, slot),
            address,
            found: CpuPort(self.world.bus).load(address).ok(),
            again: None,
            known: word.known(),
            ceiling: word.ceiling(),
            at_us: self.world.now_us(),
            errno: 0,
        }
    }

    /// Nothing, or a moment.
    fn pause(&mut self) {
        if self.random.one_in(2) {
            let us = self.random.between(1, 200);
            self.world.sleep_us(us.into());
        }
    }
}

/// Operations that have no area.
impl Churner<'_> {
    /// A block from the allocator, large enough that freeing it unmaps it: written by the CPU,
    /// changed by the device, read by the CPU.
    fn heap(&mut self) {
        let words = usize::try_from(self.random.between(64 << 10, 1 << 20)).unwrap_or(1 << 16);
        let mark = self.random.next() | 1;
        let block = vec![mark; words];
        let at = crate::workload::address_of(&block);
        self.on_device(|tile| {
            for page in (0..words).step_by(512) {
                let _mapped = tile.atomic(at + 8 * page as u64, AtomicOp::Add(1));
            }
        });
        let wrong = block
            .iter()
            .enumerate()
            .find(|(n, word)| **word != mark.wrapping_add(u64::from(n % 512 == 0)));
        if let Some((n, word)) = wrong {
            self.found_in_heap(at + 8 * n as u64, *word, mark);
        }
        drop(block);
        tick(&self.world.tally.ops[Op::Heap as usize][0]);
    }

    fn found_in_heap(&self, address: u64, word: u64, mark: u64) {
        let area = &self.world.areas[0];
        let all = Span {
            op: Op::Heap,
            area,
            pages: 0..1,
        };
        let finding = self.finding(&all, Fault::Lost, Side::Cpu, address);
        self.world.found(Finding {
            found: Some(word),
            again: Some(mark),
            ..finding
        });
    }

    /// A thread of the program: its stack comes and goes.
    fn thread(&mut self) {
        let world = self.world;
        let random = Stream::named(self.random.next(), "thread", self.me);
        let sum = std::thread::scope(|scope| {
            let work = scope.spawn(move || {
                let mut random = random;
                let mut frame = [0_u64; 2048];
                frame.iter_mut().for_each(|word| *word = random.next());
                let (area, page) = world.pick(&mut random);
                let at = area.address(area.tag(page, 0));
                let _any = CpuPort(world.bus).load(at);
                core::hint::black_box(&frame)
                    .iter()
                    .fold(0, |sum, word| sum ^ word)
            });
            work.join()
        });
        let answer = usize::from(sum.is_err());
        tick(&world.tally.ops[Op::Thread as usize][answer]);
    }
}
