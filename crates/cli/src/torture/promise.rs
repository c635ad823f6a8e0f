//! What an operation promises, looked at from both sides, and what is found where it is not kept.

use std::io;

use gpusvm::addr::{HostSpan, PAGE};
use gpusvm_softgpu::Tile;

use crate::on_tile::OnTile;
use crate::torture::churn::{Churner, Span};
use crate::torture::ledger::{self, SLOTS, Trust};
use crate::torture::random::Stream;
use crate::torture::visit::{CpuPort, Port, TilePort, Visitor};
use crate::torture::world::{Fault, Finding, Side, Sight};

impl Churner<'_> {
    /// Some words of the span, by the ordinary rule.
    pub(super) fn look_after(&mut self, span: &Span<'_>) {
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
    pub(super) fn expect_nothing(&mut self, span: &Span<'_>, at: HostSpan) {
        let word = self.word_of(at);
        if CpuPort(self.world.bus).load(word).is_ok() {
            self.found(span, Fault::Allowed, Side::Cpu, word);
        }
        let refused = |tile: &mut Tile<'_>| tile.load_one::<u64>(word).is_err();
        self.expect_on_device(span, (Fault::Allowed, word), refused);
    }

    /// Neither side can write. The probe stores nothing even where it is let in.
    pub(super) fn expect_no_write(&mut self, span: &Span<'_>, at: HostSpan) {
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
    pub(super) fn expect_content(&mut self, span: &Span<'_>, at: HostSpan) {
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

    /// The page's bytes are what its words must hold.
    pub(super) fn expect_page(&self, span: &Span<'_>, page: u32, bytes: &[u8; 4096]) {
        let (words, _rest) = bytes.as_chunks::<8>();
        let counted = words.iter().step_by(8).zip(0..SLOTS);
        for (raw, slot) in counted {
            let tag = span.area.tag(page, slot);
            let word = span.area.word(page, slot);
            let raw = u64::from_ne_bytes(*raw);
            let judged = ledger::judge(tag, raw, word.known(), word.ceiling(), Trust::Strict);
            if judged.is_err() {
                let address = span.area.address(tag);
                let finding = self.finding(span, Fault::Stale, Side::Cpu, address);
                let (found, again) = (Some(raw), finding.found);
                return self.world.found(Finding {
                    found,
                    again,
                    ..finding
                });
            }
        }
    }

    /// What was left behind is empty, on both sides.
    pub(super) fn expect_zeros(&mut self, span: &Span<'_>, at: HostSpan) {
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
    pub(super) fn sample(&self, at: HostSpan) -> Vec<u64> {
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
    pub(super) fn on_device(&self, act: impl Fn(&mut Tile<'_>) + Sync) {
        // Refusals are the closure's business, and it passes none on.
        let _done = self.machine.launch_on(self.unit, &OnTile(act));
    }

    /// Where changes are seen afterwards: waits until they are.
    pub(super) fn settle(&self, span: &Span<'_>) {
        if span.op.sight(self.world.sight) == Sight::After {
            self.world.space.settle_events();
        }
    }

    /// Half of an operation is done: the other half must follow.
    pub(super) fn must(&self, span: &Span<'_>, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result {
            let errno = error.raw_os_error().unwrap_or(-1);
            let finding =
                self.finding(span, Fault::Operation, Side::Cpu, span.host().start().get());
            self.world.found(Finding { errno, ..finding });
        }
        result
    }

    pub(super) fn found(&self, span: &Span<'_>, fault: Fault, side: Side, address: u64) {
        self.world.found(self.finding(span, fault, side, address));
    }

    pub(super) fn finding(
        &self,
        span: &Span<'_>,
        fault: Fault,
        side: Side,
        address: u64,
    ) -> Finding {
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
    pub(super) fn pause(&mut self) {
        if self.random.one_in(2) {
            let us = self.random.between(1, 200);
            self.world.sleep_us(us.into());
        }
    }
}
