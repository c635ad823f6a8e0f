//! Accesses to pages, by the CPU, by devices and by children: what is stored, and what must be found.

use std::sync::Mutex;

use gpusvm::addr::{HostVa, PAGE};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Stop, Tile};

use crate::scenario::host::{ChildDoes, ChildStep, Host};
use crate::scenario::play::{Play, Trouble, locked};
use crate::scenario::text::{Access, Act, Line, Span, Value, Who};

/// Word of a page that is its content.
const CONTENT: u64 = 0;
/// Word of a page that counts.
const COUNTER: u64 = 8;

impl<H: Host> Play<H> {
    pub(super) fn access(
        &self,
        lane: usize,
        who: Who,
        access: &Access,
        span: &Span,
    ) -> Result<(), Trouble> {
        let pages = self.pages(span)?;
        match who {
            Who::Gpu(gpu) => return self.device(gpu, lane, access, &pages),
            Who::Child => return Err(Trouble::Wrong("a child acts inside of `fork`".to_owned())),
            Who::Cpu => {}
        }
        for spot in &pages {
            let (host, at) = (&self.host, spot.at);
            match access {
                Access::Read(values) => {
                    is_one_of(values, spot, host.load(at.plus(CONTENT))?)?;
                }
                Access::Write(value) => {
                    host.store(at.plus(CONTENT), value.word(spot))?;
                }
                Access::Add(by) => {
                    host.atomic(at.plus(COUNTER), AtomicOp::Add(*by))?;
                }
                Access::Count(wanted) => {
                    counts(*wanted, spot, host.load(at.plus(COUNTER))?)?;
                }
            }
        }
        Ok(())
    }

    /// The pages of a span.
    fn pages(&self, span: &Span) -> Result<Vec<Spot>, Trouble> {
        let area = self.area(&span.area)?;
        let found = self.find(span)?;
        let first = (found.start().get() - area.start().get()) / PAGE;
        let spot = |n| Spot {
            at: found.start().plus(n * PAGE),
            page: first + n,
            n,
        };
        Ok((0..found.pages().get()).map(spot).collect())
    }

    /// What a child does, word by word.
    pub(super) fn child_steps(&self, lines: &[Line]) -> Result<Vec<ChildStep>, Trouble> {
        let mut steps = Vec::new();
        for line in lines {
            let Act::Access(Who::Child, access, span) = &line.act else {
                let what = "in `fork` a child reads and writes, and nothing else".to_owned();
                return Err(Trouble::Wrong(what));
            };
            for spot in self.pages(span)? {
                let at = spot.at.plus(CONTENT);
                let does = match access {
                    Access::Read(values) => {
                        ChildDoes::Load(values.iter().map(|value| value.word(&spot)).collect())
                    }
                    Access::Write(value) => ChildDoes::Store(value.word(&spot)),
                    Access::Add(_) | Access::Count(_) => {
                        return Err(Trouble::Wrong("a child does not count".to_owned()));
                    }
                };
                steps.push(ChildStep { at, does });
            }
        }
        Ok(steps)
    }

    fn device(
        &self,
        gpu: usize,
        lane: usize,
        access: &Access,
        pages: &[Spot],
    ) -> Result<(), Trouble> {
        let ended = Mutex::new(Ok(()));
        self.host.told().1.forget_refusal();
        let launched = self.host.launch(gpu, lane, &|tile| {
            let found = on_tile(tile, access, pages);
            *locked(&ended) = found;
        });
        launched.map_err(|stop| self.stopped(stop))?;
        let ended = locked(&ended).clone();
        ended.map_err(|stop| match stop {
            Halt::Stop(stop) => self.stopped(stop),
            Halt::Wrong(what) => Trouble::Wrong(what),
        })
    }

    fn stopped(&self, stop: Stop) -> Trouble {
        match stop {
            Stop::Fault(_) => Trouble::Refused(self.host.told().1.refused().to_owned()),
            other => Trouble::Wrong(format!("the unit stops: {other}")),
        }
    }
}

/// A page of a span.
struct Spot {
    at: HostVa,
    /// Its number in its area.
    page: u64,
    /// Its number in the span.
    n: u64,
}

impl Value {
    /// The word that a page has of it.
    fn word(self, spot: &Spot) -> u64 {
        let page = self.from.map_or(spot.page, |from| from + spot.n);
        match self.value {
            0 => 0,
            value => value << 32 | (page + 1),
        }
    }
}

/// Whether a word is what one of `values` has there.
fn is_one_of(values: &[Value], spot: &Spot, word: u64) -> Result<(), Trouble> {
    let page = spot.page;
    if values.is_empty() || values.iter().any(|value| value.word(spot) == word) {
        return Ok(());
    }
    let wanted: Vec<_> = values.iter().map(|v| v.value.to_string()).collect();
    let found = match word {
        0 => "0".to_owned(),
        word => format!(
            "{} of page {}",
            word >> 32,
            (word & 0xFFFF_FFFF).wrapping_sub(1)
        ),
    };
    Err(Trouble::Wrong(format!(
        "page {page} holds {found}, must be {}",
        wanted.join(" or ")
    )))
}

fn counts(wanted: u64, spot: &Spot, found: u64) -> Result<(), Trouble> {
    let page = spot.page;
    if found == wanted {
        Ok(())
    } else {
        Err(Trouble::Wrong(format!(
            "page {page} has counted {found}, must be {wanted}"
        )))
    }
}

/// How an access by a unit ended.
#[derive(Clone)]
enum Halt {
    Stop(Stop),
    Wrong(String),
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

impl From<Trouble> for Halt {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(what) | Trouble::Wrong(what) => Self::Wrong(what),
        }
    }
}

fn on_tile(tile: &mut Tile<'_>, access: &Access, pages: &[Spot]) -> Result<(), Halt> {
    for spot in pages {
        let at = spot.at.get();
        match access {
            Access::Read(values) => {
                is_one_of(values, spot, tile.load_one(at + CONTENT)?)?;
            }
            Access::Write(value) => tile.store_one(at + CONTENT, value.word(spot))?,
            Access::Add(by) => {
                tile.atomic(at + COUNTER, AtomicOp::Add(*by))?;
            }
            Access::Count(wanted) => counts(*wanted, spot, tile.load_one(at + COUNTER)?)?,
        }
    }
    Ok(())
}
