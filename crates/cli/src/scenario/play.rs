//! The one runner: every line of a scenario is done here, on whichever host.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gpusvm::addr::{HostSpan, HostVa, PAGE, PAGE_2M};
use gpusvm::seam::Platform;
use gpusvm::seam::env::Ns;
use gpusvm_xe::stats::Counter;

use crate::scenario::drive::Plain;
use crate::scenario::host::{Call, Host, Node, Refusal};
use crate::scenario::text::{Act, Line, Map, Scenario, Span};

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
    pub(super) objects: Mutex<Vec<Arc<Plain<Env<H>>>>>,
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
                let at = self.place(to, from)?;
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
        let land = self.host.land();
        if map.bytes > land.bytes() {
            return Err(full());
        }
        let bytes = map.bytes.next_multiple_of(PAGE);
        let span = {
            let mut areas = locked(&self.areas);
            let known = areas.named.get(&map.area).map(|area| area.start());
            let behind = map.behind.as_ref().and_then(|area| areas.named.get(area));
            let at = match (known, behind) {
                (Some(at), _) => at,
                (None, Some(area)) => area.end(),
                (None, None) => areas.fresh(land),
            };
            let span = HostSpan::at(at, bytes);
            areas.claim(land, span)?;
            areas.named.insert(map.area.clone(), span);
            span
        };
        self.call(&Call::Map(span, map.rights, map.backing, map.huge))
    }

    /// A fresh place for what is at `from` now, and its name.
    fn place(&self, area: &str, from: HostSpan) -> Result<HostVa, Trouble> {
        let mut areas = locked(&self.areas);
        let inside = from.start().get() % PAGE_2M;
        let at = areas.fresh(self.host.land());
        let span = HostSpan::at(at.plus(inside), from.bytes());
        areas.claim(self.host.land(), span)?;
        areas.named.insert(area.to_owned(), span);
        Ok(span.start())
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
            Some((from, to)) => {
                let part = HostSpan::new(area.start().plus(from), area.start().plus(to));
                if !self.host.land().covers(part) {
                    let name = &span.area;
                    return Err(Trouble::Wrong(format!("`{name}` does not reach as far")));
                }
                part
            }
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
}

impl Areas {
    /// A place that touches no other area.
    fn fresh(&self, land: HostSpan) -> HostVa {
        land.start().plus(self.taken)
    }

    /// The place is taken, and 2 MiB behind it stay empty.
    fn claim(&mut self, land: HostSpan, span: HostSpan) -> Result<(), Trouble> {
        if !land.covers(span) {
            return Err(full());
        }
        let end = (span.end().get() - land.start().get()).next_multiple_of(PAGE_2M) + PAGE_2M;
        self.taken = self.taken.max(end);
        Ok(())
    }
}

/// There is no room for more areas.
fn full() -> Trouble {
    Trouble::Wrong("the land is full".to_owned())
}

/// Whether a line ended as it says.
fn judge(line: &Line, ended: Result<(), Trouble>) -> Result<(), String> {
    let may = |name: &str| line.answers.iter().any(|answer| answer.trim() == name);
    match ended {
        Ok(()) if line.answers.is_empty() || may("ok") => Ok(()),
        Ok(()) => Err(format!(
            "succeeds, must end with {}",
            line.answers.join(" or ")
        )),
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
