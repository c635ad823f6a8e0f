//! Readers and writers, on either side: one step is one page.

use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_live::LiveBus;
use gpusvm_softgpu::{Stop, Tile};

use crate::torture::area::{Area, Flux, Kind, Look};
use crate::torture::ledger::{self, SLOTS, Trust, Wrong};
use crate::torture::random::Stream;
use crate::torture::world::{Doing, Fault, Finding, Side, World, tick};

/// Words looked at in one step.
const WORDS: u32 = 12;

/// Why an access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The address was refused.
    Refused,
    /// The device stops.
    Stopped,
}

/// Access to memory from one side.
pub(super) trait Port {
    const SIDE: Side;
    fn load(&mut self, at: u64) -> Result<u64, Refusal>;
    /// Loads a word from each address.
    fn load_each(&mut self, at: &[u64], out: &mut [u64]) -> Result<(), Refusal> {
        let mut each = at.iter().zip(out);
        each.try_for_each(|(at, out)| self.load(*at).map(|raw| *out = raw))
    }
    fn store(&mut self, at: u64, value: u64) -> Result<(), Refusal>;
    /// Stores `new` where the word is `expected`; returns what it was.
    fn exchange(&mut self, at: u64, expected: u64, new: u64) -> Result<u64, Refusal>;
}

/// The CPU's side.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuPort(pub(super) LiveBus);

impl Port for CpuPort {
    const SIDE: Side = Side::Cpu;

    fn load(&mut self, at: u64) -> Result<u64, Refusal> {
        let mut word = [0; 8];
        let read = self.0.read(at, &mut word);
        read.map_err(|_error| Refusal::Refused)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn store(&mut self, at: u64, value: u64) -> Result<(), Refusal> {
        let written = self.0.write(at, &value.to_ne_bytes());
        written.map_err(|_error| Refusal::Refused)
    }

    fn exchange(&mut self, at: u64, expected: u64, new: u64) -> Result<u64, Refusal> {
        let op = AtomicOp::CompareExchange { expected, new };
        self.0.atomic(at, op).map_err(|_error| Refusal::Refused)
    }
}

/// The device's side.
#[derive(Debug)]
pub(super) struct TilePort<'a, 't>(pub(super) &'a mut Tile<'t>);

impl Port for TilePort<'_, '_> {
    const SIDE: Side = Side::Device;

    fn load(&mut self, at: u64) -> Result<u64, Refusal> {
        self.0.load_one(at).map_err(refusal)
    }

    fn load_each(&mut self, at: &[u64], out: &mut [u64]) -> Result<(), Refusal> {
        self.0.gather(at, out).map_err(refusal)
    }

    fn store(&mut self, at: u64, value: u64) -> Result<(), Refusal> {
        self.0.store_one(at, value).map_err(refusal)
    }

    fn exchange(&mut self, at: u64, expected: u64, new: u64) -> Result<u64, Refusal> {
        let op = AtomicOp::CompareExchange { expected, new };
        self.0.atomic(at, op).map_err(refusal)
    }
}

fn refusal(stop: Stop) -> Refusal {
    match stop {
        Stop::Fault(_) | Stop::Bus(_) => Refusal::Refused,
        Stop::Cancelled | Stop::UnitBusy | Stop::NoUnit | Stop::Foreign => Refusal::Stopped,
    }
}

/// Who visits pages, from which side, and what is written there.
pub(super) struct Visitor<'w, P> {
    pub(super) world: &'w World,
    pub(super) me: usize,
    /// Its number among the writers, if it is one.
    pub(super) writer: Option<u32>,
    pub(super) port: P,
    pub(super) random: Stream,
}

impl<P: Port> Visitor<'_, P> {
    /// Visits pages until everybody stops.
    pub(super) fn work(&mut self) {
        while !self.world.stopped() {
            self.world.jam(self.me);
            let (area, page) = self.world.pick(&mut self.random);
            if self.writer.is_some() && !self.random.one_in(3) {
                self.write(area, page);
            } else {
                self.read(area, page);
            }
            // A processor is for everybody: what is interesting needs other threads to run.
            if P::SIDE == Side::Cpu && self.random.one_in(4) {
                self.world.sleep_us(50);
            }
        }
    }

    /// Reads some words of a page, whoever owns them.
    pub(super) fn read(&mut self, area: &Area, page: u32) {
        self.world.actors[self.me].does(Doing::READ, area.id, page);
        let first = self.random.between(0, SLOTS - 1);
        let _inside = self.world.enter(self.me);
        let flux = area.flux(page);
        if flux.kind() == Kind::Closed {
            return;
        }
        let looks: [Look; WORDS as usize] = core::array::from_fn(|n| {
            let step = u32::try_from(n).unwrap_or(0) * 5;
            area.look(area.tag(page, (first + step) % SLOTS), flux)
        });
        let at = looks.map(|look| look.address);
        let mut raw = [0; WORDS as usize];
        match self.port.load_each(&at, &mut raw) {
            Err(refusal) => self.refused(area, &looks[0], refusal),
            Ok(()) => {
                let mut each = looks.iter().zip(raw);
                let _right = each.all(|(look, raw)| self.judge(area, look, raw).is_some());
            }
        }
    }

    /// Writes some words of a page that are this writer's own, and checks what they were.
    pub(super) fn write(&mut self, area: &Area, page: u32) {
        self.world.actors[self.me].does(Doing::WRITE, area.id, page);
        let first = self.random.between(0, SLOTS - 1);
        let _inside = self.world.enter(self.me);
        let flux = area.flux(page);
        if flux.kind() == Kind::Closed {
            return;
        }
        let writer = self.writer;
        let mut own = (0..SLOTS)
            .map(|n| (first + n) % SLOTS)
            .filter(|slot| Some(area.plan.owners.of(*slot)) == writer)
            .take(usize::try_from(WORDS / 3).unwrap_or(1));
        while let Some(slot) = own.next()
            && self.advance(area, page, slot, flux).is_some()
        {}
    }

    /// Writes the next version of one word; `None` where the visit is over.
    fn advance(&mut self, area: &Area, page: u32, slot: u32, flux: Flux) -> Option<()> {
        let look = area.look(area.tag(page, slot), flux);
        let word = area.word(page, slot);
        let raw = self.check(area, &look)?;
        let next = word.ceiling() + 1;
        word.announce(next);
        let value = look.tag.raw(next);
        let written = if self.random.one_in(2) {
            self.port.store(look.address, value).map(|()| raw)
        } else {
            self.port.exchange(look.address, raw, value)
        };
        tick(&self.world.tally.accesses[P::SIDE as usize * 2 + 1]);
        match written {
            Ok(former) if former == raw => {
                if trust(flux) == Trust::Strict {
                    word.wrote(next);
                }
                Some(())
            }
            // Destroyed in between, and so not written.
            Ok(_former) if trust(flux) == Trust::Loose => Some(()),
            Ok(former) => {
                self.wrong(&look, Fault::Lost, Some(former), next);
                None
            }
            Err(refusal) => {
                // A word is stored as a whole or not at all.
                word.announce(next - 1);
                self.refused(area, &look, refusal);
                None
            }
        }
    }

    /// Loads a word and judges it; `None` where the visit is over.
    fn check(&mut self, area: &Area, look: &Look) -> Option<u64> {
        match self.port.load(look.address) {
            Ok(raw) => self.judge(area, look, raw),
            Err(refusal) => {
                self.refused(area, look, refusal);
                None
            }
        }
    }

    /// Judges what was loaded; `None` where the visit is over.
    fn judge(&mut self, area: &Area, look: &Look, raw: u64) -> Option<u64> {
        tick(&self.world.tally.accesses[P::SIDE as usize * 2]);
        let ceiling = area.word(look.tag.page, look.tag.slot).ceiling();
        let judged = ledger::judge(look.tag, raw, look.known, ceiling, trust(look.flux));
        let Err(wrong) = judged else { return Some(raw) };
        self.judge_again(look, wrong, raw, ceiling);
        None
    }

    /// A value is wrong: a second look tells a stale read from a lost write.
    fn judge_again(&mut self, look: &Look, wrong: Wrong, raw: u64, ceiling: u32) {
        let again = self.port.load(look.address).ok();
        let recovers = again.and_then(|again| look.tag.version(again));
        let recovers = recovers.is_some_and(|version| version >= look.known.floor);
        let fault = match wrong {
            Wrong::Bytes => Fault::Bytes,
            Wrong::Burnt => Fault::Stale,
            Wrong::Old if recovers => Fault::Stale,
            Wrong::Old => Fault::Lost,
        };
        let mut finding = self.finding(look, fault, ceiling);
        (finding.found, finding.again) = (Some(raw), again);
        self.world.found(finding);
    }

    fn wrong(&self, look: &Look, fault: Fault, found: Option<u64>, ceiling: u32) {
        let finding = self.finding(look, fault, ceiling);
        self.world.found(Finding { found, ..finding });
    }

    fn finding(&self, look: &Look, fault: Fault, ceiling: u32) -> Finding {
        let finding = self.world.statement(self.me, fault, look);
        Finding {
            side: P::SIDE,
            ceiling,
            ..finding
        }
    }

    /// An access was refused: it may be, where its page was changing.
    fn refused(&self, area: &Area, look: &Look, refusal: Refusal) {
        if refusal == Refusal::Stopped {
            return;
        }
        let changing = look.flux.kind() != Kind::Stable || area.flux(look.tag.page) != look.flux;
        if changing {
            tick(&self.world.tally.refused_in_change);
        } else {
            self.wrong(look, Fault::Refused, None, 0);
        }
    }

    /// Reads every counted word of every page; nobody else is at work.
    pub(super) fn sweep(&mut self) {
        for area in &self.world.areas {
            for page in 0..area.plan.pages {
                self.world.actors[self.me].does(Doing::SWEEP, area.id, page);
                self.world.actors[self.me].stepped();
                let flux = area.flux(page);
                let all = (0..SLOTS).all(|slot| {
                    let look = area.look(area.tag(page, slot), flux);
                    self.check(area, &look).is_some()
                });
                if !all {
                    return;
                }
            }
        }
    }
}

/// How much may be said about content. A page whose content is about to go is closed first, and
/// opened again only after every access that began before is over: an access that began while the
/// page was not being destroyed meets no destruction.
const fn trust(flux: Flux) -> Trust {
    match flux.kind() {
        Kind::Destroy => Trust::Loose,
        Kind::Stable | Kind::Deny | Kind::Closed => Trust::Strict,
    }
}
