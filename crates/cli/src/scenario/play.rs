//! The one runner: every line of a scenario is done here, on whichever host.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::error::Interrupted;
use gpusvm::pagemap::ToDevice;
use gpusvm::seam::Platform;
use gpusvm::seam::env::{Environment, Ns};
use gpusvm::vram::{Bo, BoRequest, Evict, From as End};
use gpusvm_abi::bus::AtomicOp;
use gpusvm_softgpu::{Stop, Tile};
use gpusvm_xe::stats::Counter;
use gpusvm_xe::vm::MirrorArea;

use crate::notes::{errno_of, errno_of_interrupted};
use crate::scenario::host::{Call, ChildDoes, ChildStep, Host, Node, Refusal};
use crate::scenario::text::{Access, Act, Drive, Line, Map, Scenario, Span, Value, Who};
use crate::scenario::words::Object;

/// Word of a page that is its content.
const CONTENT: u64 = 0;
/// Word of a page that counts.
const COUNTER: u64 = 8;

/// How a line ended that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The host or a driver refused, with this errno or signal.
    Refused(String),
    /// Something is not as it must be.
    Wrong(String),
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::With(name) => Self::Refused(name),
            Refusal::Unable(what) => Self::Wrong(format!(
                "this host cannot {what}: the scenario has to say `skipped:`"
            )),
        }
    }
}

/// The environment of a host.
type Env<H> = <<H as Host>::Platform as Platform>::Env;

/// A scenario that is being played.
pub(super) struct Play<H: Host> {
    pub(super) host: H,
    pub(super) scenario: Arc<Scenario>,
    areas: Mutex<Areas>,
    pub(super) since: Mutex<Since>,
    objects: Mutex<Vec<Arc<Plain<Env<H>>>>>,
}

/// Where areas are.
#[derive(Default)]
struct Areas {
    named: BTreeMap<String, HostSpan>,
    /// Bytes of the land that are taken.
    taken: u64,
}

/// What counts from the last mark.
#[derive(Default)]
pub(super) struct Since {
    pub(super) counts: Vec<u64>,
    pub(super) time: Ns,
}

/// An object in device memory that no page of a process is in.
struct Plain<E: Environment>(Mutex<Option<Arc<Bo<E>>>>);

impl<E: Environment> Evict for Plain<E> {
    fn evict(self: Arc<Self>) -> Result<(), Interrupted> {
        let bo = locked(&self.0).take();
        drop(bo);
        Ok(())
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<H: Host> Play<H> {
    pub(super) fn new(host: H, scenario: Arc<Scenario>) -> Self {
        let play = Self {
            host,
            scenario,
            areas: Mutex::default(),
            since: Mutex::default(),
            objects: Mutex::default(),
        };
        play.mark();
        play
    }

    /// Does all lines, and looks whether everything is as it must be in the end.
    pub(super) fn all(self: &Arc<Self>) -> Result<(), String> {
        for (index, line) in self.scenario.lines.iter().enumerate() {
            self.line(0, index, line)?;
            if !matches!(line.act, Act::At { .. }) {
                H::disarm(self)?;
            }
            let rule = self.host.drive(|| self.host.check());
            rule.map_err(|broken| format!("{}: after this line: {broken}", line.place))?;
        }
        Ok(())
    }

    /// Nothing of a device is used any more.
    pub(super) fn close(&self) {
        let mut n = 0;
        while let Some(node) = self.host.node(n) {
            self.host.drive(|| {
                self.sell();
                node.vm.close();
                let _evicted = node.device.pagemap().vram().evict_all();
            });
            n += 1;
        }
    }

    /// Does a line, as often as it says. `lane` is the number of who does it.
    pub(super) fn line(
        self: &Arc<Self>,
        lane: usize,
        index: usize,
        line: &Line,
    ) -> Result<(), String> {
        if line.only.is_some_and(|host| host != H::KIND) {
            return Ok(());
        }
        for _time in 0..line.times {
            let ended = self.act(lane, index, &line.act);
            judge(line, ended).map_err(|what| format!("{}: {what}", line.place))?;
        }
        Ok(())
    }

    fn act(self: &Arc<Self>, lane: usize, index: usize, act: &Act) -> Result<(), Trouble> {
        match act {
            Act::Map(map) => self.map(map),
            Act::Unmap(span) => self.call(&Call::Unmap(self.find(span)?)),
            Act::Protect(span, rights) => self.call(&Call::Protect(self.find(span)?, *rights)),
            Act::Advise(span, advice) => self.call(&Call::Advise(self.find(span)?, *advice)),
            Act::Remap { from, to, leaving } => {
                let from = self.find(from)?;
                let at = self.place(to, from);
                self.call(&match leaving {
                    true => Call::MoveLeaving(from, at),
                    false => Call::Move(from, at),
                })
            }
            Act::Deed(deed, span) => self.call(&Call::Deed(*deed, self.find(span)?)),
            Act::Die => self.call(&Call::Die),
            Act::FailCopy(n) => self.call(&Call::FailCopy(*n)),
            Act::Access(who, access, span) => self.access(lane, *who, access, span),
            Act::Drive(gpu, drive) => self.drive(*gpu, drive),
            Act::Sleep(time) => {
                self.host.sleep(*time);
                Ok(())
            }
            Act::Mark => {
                self.mark();
                Ok(())
            }
            Act::Reset => {
                if let Some(gt) = self.host.told().0.gt(0) {
                    gt.reset();
                }
                self.mark();
                Ok(())
            }
            Act::Fork(lines) => {
                let steps = self.child_steps(lines)?;
                self.host.fork(&steps).map_err(Trouble::Wrong)
            }
            Act::Together(_) => H::together(self, index).map_err(Trouble::Wrong),
            Act::At { point, often, .. } => {
                let armed = self.host.arm(index, *point, *often);
                armed.map_err(Trouble::Wrong)
            }
            Act::Expect(expect) => self.expect(expect).map_err(Trouble::Wrong),
        }
    }

    fn call(&self, call: &Call) -> Result<(), Trouble> {
        Ok(self.host.call(call)?)
    }

    fn map(&self, map: &Map) -> Result<(), Trouble> {
        let bytes = map.bytes.next_multiple_of(PAGE);
        let span = {
            let mut areas = locked(&self.areas);
            let known = areas.named.get(&map.area).map(|area| area.start());
            let behind = map.behind.as_ref().and_then(|area| areas.named.get(area));
            let at = match (known, behind) {
                (Some(at), _) => at,
                (None, Some(area)) => area.end(),
                (None, None) => areas.fresh(self.host.land()),
            };
            let span = HostSpan::at(at, bytes);
            areas.claim(self.host.land(), span);
            areas.named.insert(map.area.clone(), span);
            span
        };
        if !self.host.land().covers(span) {
            return Err(Trouble::Wrong("the land is full".to_owned()));
        }
        self.call(&Call::Map(span, map.rights, map.backing, map.huge))
    }

    /// A fresh place for what is at `from` now, and its name.
    fn place(&self, area: &str, from: HostSpan) -> HostVa {
        let mut areas = locked(&self.areas);
        let inside = from.start().get() % PAGE_2M;
        let at = areas.fresh(self.host.land());
        let span = HostSpan::at(at.plus(inside), from.bytes());
        areas.claim(self.host.land(), span);
        areas.named.insert(area.to_owned(), span);
        span.start()
    }

    /// The whole of an area.
    pub(super) fn area(&self, name: &str) -> Result<HostSpan, Trouble> {
        let areas = locked(&self.areas);
        let found = areas.named.get(name).copied();
        found.ok_or_else(|| Trouble::Wrong(format!("there is no area `{name}`")))
    }

    /// The addresses of a span.
    pub(super) fn find(&self, span: &Span) -> Result<HostSpan, Trouble> {
        let area = self.area(&span.area)?;
        Ok(match span.part {
            Some((from, to)) => HostSpan::new(area.start().plus(from), area.start().plus(to)),
            None => area,
        })
    }

    /// The device with this number.
    pub(super) fn node(&self, gpu: usize) -> Result<Node<'_, H::Platform>, Trouble> {
        let node = self.host.node(gpu);
        node.ok_or_else(|| Trouble::Wrong(format!("there is no gpu{gpu}: say `gpus {}`", gpu + 1)))
    }

    /// Counters count from here.
    fn mark(&self) {
        let (stats, notes) = self.host.told();
        let counts = Counter::ALL.iter().map(|counter| stats.total(*counter));
        *locked(&self.since) = Since {
            counts: counts.collect(),
            time: self.host.now(),
        };
        notes.forget();
        self.host.keep();
    }

    fn access(
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
    fn child_steps(&self, lines: &[Line]) -> Result<Vec<ChildStep>, Trouble> {
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

    fn drive(&self, gpu: usize, drive: &Drive) -> Result<(), Trouble> {
        let node = self.node(gpu)?;
        let span = match drive {
            Drive::Prefetch(span) | Drive::Take(span, _) | Drive::Mirror(span, _) => {
                Some(self.find(span)?)
            }
            Drive::Evict | Drive::Close | Drive::Buy(..) | Drive::Fill(_) | Drive::Sell => None,
        };
        let span = span.unwrap_or(self.host.land());
        let ended = self.host.drive(|| self.drive_here(&node, drive, span));
        ended.map_err(|errno| Trouble::Refused(errno.to_owned()))
    }

    fn drive_here(
        &self,
        node: &Node<'_, H::Platform>,
        drive: &Drive,
        span: HostSpan,
    ) -> Result<(), &'static str> {
        let pagemap = node.device.pagemap();
        match drive {
            Drive::Prefetch(_) => node.vm.prefetch(span).map(drop).map_err(errno_of),
            Drive::Take(_, timeslice) => {
                let timeslice = *timeslice;
                let taken = pagemap.to_device(ToDevice { span, timeslice });
                taken.map_err(errno_of_interrupted)
            }
            Drive::Evict => {
                let _evicted = pagemap.vram().evict_all();
                Ok(())
            }
            Drive::Close => {
                node.vm.close();
                Ok(())
            }
            Drive::Mirror(_, rights) => {
                let rights = *rights;
                let area = MirrorArea { span, rights };
                node.vm.mirror(area).map_err(errno_of)
            }
            Drive::Buy(bytes, object) => self.buy(node, *bytes, *object),
            Drive::Fill(leaving) => {
                while pagemap.vram().size() - pagemap.vram().used() > *leaving {
                    self.buy(node, PAGE, Object::Pinned)?;
                }
                Ok(())
            }
            Drive::Sell => {
                self.sell();
                Ok(())
            }
        }
    }

    fn buy(
        &self,
        node: &Node<'_, H::Platform>,
        bytes: u64,
        object: Object,
    ) -> Result<(), &'static str> {
        let vram = node.device.pagemap().vram();
        let from = End::Bottom;
        let bo = vram.allocate(BoRequest { bytes, from }).map_err(errno_of)?;
        let plain = Arc::new(Plain(Mutex::new(Some(Arc::clone(&bo)))));
        if object == Object::Evictable {
            let weak = Arc::downgrade(&plain);
            vram.make_evictable(&bo, weak);
        }
        drop(bo);
        locked(&self.objects).push(plain);
        Ok(())
    }

    fn sell(&self) {
        let sold = core::mem::take(&mut *locked(&self.objects));
        drop(sold);
    }
}

impl Areas {
    /// A place that touches no other area.
    fn fresh(&self, land: HostSpan) -> HostVa {
        land.start().plus(self.taken)
    }

    /// The place is taken, and 2 MiB behind it stay empty.
    fn claim(&mut self, land: HostSpan, span: HostSpan) {
        let end = (span.end().get() - land.start().get()).next_multiple_of(PAGE_2M) + PAGE_2M;
        self.taken = self.taken.max(end);
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
        word => format!("{} of page {}", word >> 32, (word & 0xFFFF_FFFF).wrapping_sub(1)),
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

/// Whether a line ended as it says.
fn judge(line: &Line, ended: Result<(), Trouble>) -> Result<(), String> {
    let may = |name: &str| line.answers.iter().any(|answer| answer.trim() == name);
    match ended {
        Ok(()) if line.answers.is_empty() || may("ok") => Ok(()),
        Ok(()) => Err(format!("succeeds, must end with {}", line.answers.join(" or "))),
        Err(Trouble::Wrong(what)) => Err(what),
        Err(Trouble::Refused(name)) if may(&name) => Ok(()),
        Err(Trouble::Refused(name)) if line.answers.is_empty() => {
            Err(format!("ends with {name}, must succeed"))
        }
        Err(Trouble::Refused(name)) => {
            let wanted = line.answers.join(" or ");
            Err(format!("ends with {name}, must end with {wanted}"))
        }
    }
}
