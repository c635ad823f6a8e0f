//! Scenarios on the live host: this process's own memory, and threads.

use std::sync::Arc;
use std::thread;

use gpusvm::addr::{HostSpan, HostVa};
use gpusvm::seam::env::{Environment, Ns, Point};
use gpusvm_abi::bus::{AtomicOp, SystemBus};
use gpusvm_live::program::{By, Child};
use gpusvm_live::{
    Advise, Backing as LiveBacking, BracketChoice, Huge as LiveHuge, Leave, LiveBus, LiveConfig,
    LiveSpace, Protect, Territory,
};
use gpusvm_softgpu::{Stop, Tile};
use gpusvm_xe::stats::{Counter, DeviceStats};
use gpusvm_xe::vm::NOTIFIER_BYTES;

use crate::machine::{LivePlatform, Machine, MachineConfig, Place, VRAM_MIN};
use crate::notes::Notes;
use crate::on_tile::OnTile;
use crate::scenario::host::{self, Call, ChildDoes, ChildStep, Host, Refusal};
use crate::scenario::play::Play;
use crate::scenario::text::{Act, Often, Scenario, Setup};
use crate::scenario::words::{Advice, Answers, Backing, Collector, Deed, Huge, Rights};
use crate::scenario::{HostKind, Verdict};

/// Bytes that scenarios map things in.
const LAND: u64 = 64 << 20;
/// Looks at device memory that is about to be free.
const LOOKS: u32 = 1_000_000;

/// Runs a scenario.
pub(super) fn run(scenario: &Scenario) -> Verdict {
    if let Some(what) = unable(scenario.setup(HostKind::Live)) {
        return Verdict::Failed(format!(
            "{}: the live host cannot {what}: the scenario has to say `live skipped:`",
            scenario.place
        ));
    }
    let host = match LiveHost::new(scenario) {
        Ok(host) => host,
        Err(why) => return Verdict::Skipped(why),
    };
    let play = Arc::new(Play::new(host, Arc::new(scenario.clone())));
    match play.all().and_then(|()| end(&play)) {
        Ok(()) => Verdict::Passed,
        Err(what) => Verdict::Failed(what),
    }
}

/// What of a setup the host does not have.
fn unable(setup: &Setup) -> Option<&'static str> {
    if setup.collector == Collector::Held {
        Some("hold the collector")
    } else if setup.answers == Answers::Lost {
        Some("lose answers")
    } else {
        None
    }
}

/// Nothing is left in device memory.
fn end(play: &Arc<Play<LiveHost>>) -> Result<(), String> {
    play.close();
    let host = &play.host;
    host.drive(|| host.machine.space().bring_everything_home());
    for node in host.machine.nodes() {
        let vram = node.device().pagemap().vram();
        let used = host.settle(|| vram.used(), |used| *used == 0);
        if used > 0 {
            return Err(format!(
                "at the end: {used} bytes of device memory are in use"
            ));
        }
    }
    host.check()
}

/// A machine, and a stretch of this process's addresses.
pub(super) struct LiveHost {
    machine: Machine,
    land: Territory,
}

impl LiveHost {
    fn new(scenario: &Scenario) -> Result<Self, String> {
        let setup = scenario.setup(HostKind::Live);
        let config = MachineConfig {
            devices: setup.gpus,
            vram: setup.vram.max(VRAM_MIN),
            units: u16::try_from(scenario.width() + 1).unwrap_or(u16::MAX),
            window: setup.window.unwrap_or(NOTIFIER_BYTES),
            atomics: setup.atomics,
            live: LiveConfig {
                brackets: BracketChoice::Patched,
                ..LiveConfig::default()
            },
            ..MachineConfig::default()
        };
        let machine = Machine::start(config).map_err(|why| why.to_string())?;
        let land = Territory::reserve(LAND).map_err(|why| why.to_string())?;
        Ok(Self { machine, land })
    }

    fn map(
        &self,
        span: HostSpan,
        rights: Rights,
        backing: Backing,
        huge: Huge,
    ) -> Result<(), Refusal> {
        let backed = |backing| self.land.map_backed(span, backing).map_err(|why| os(&why));
        match backing {
            Backing::Private => {
                let huge = match huge {
                    Huge::Yes => LiveHuge::Advise,
                    Huge::No => LiveHuge::Never,
                };
                self.land.map(span, huge).map_err(|why| os(&why))?;
            }
            Backing::Shared => backed(LiveBacking::SharedAnonymous)?,
            Backing::File => backed(LiveBacking::SharedFile)?,
            Backing::PrivateFile => backed(LiveBacking::PrivateFile)?,
            Backing::Io => return Err(Refusal::Unable("map raw pages")),
        }
        match rights {
            Rights::Write => Ok(()),
            Rights::None | Rights::Read => self.protect(span, rights),
        }
    }

    fn protect(&self, span: HostSpan, rights: Rights) -> Result<(), Refusal> {
        let rights = match rights {
            Rights::None => Protect::None,
            Rights::Read => Protect::Read,
            Rights::Write => Protect::ReadWrite,
        };
        self.land.protect(span, rights).map_err(|why| os(&why))
    }

    fn deed(&self, deed: Deed, span: HostSpan) -> Result<(), Refusal> {
        match deed {
            Deed::Lock => self.land.lock(span).map_err(|why| os(&why)),
            Deed::Unlock => self.land.unlock(span).map_err(|why| os(&why)),
            Deed::Pin | Deed::Unpin => Err(Refusal::Unable("pin pages")),
            Deed::Swap => Err(Refusal::Unable("swap pages out")),
            Deed::Exclusive => Err(Refusal::Unable("give pages to a device alone")),
            Deed::Poison => Err(Refusal::Unable("have memory errors")),
        }
    }
}

const fn advice(advice: Advice) -> Advise {
    match advice {
        Advice::Discard => Advise::Discard,
        Advice::Free => Advise::Free,
        Advice::Huge => Advise::Huge,
        Advice::Small => Advise::Small,
        Advice::Collapse => Advise::Collapse,
        Advice::Guard => Advise::GuardInstall,
        Advice::Unguard => Advise::GuardRemove,
        Advice::Cold => Advise::Cold,
        Advice::PageOut => Advise::PageOut,
        Advice::Populate => Advise::Populate,
    }
}

/// The name of a system call's errno.
fn os(why: &std::io::Error) -> Refusal {
    let name = match why.raw_os_error() {
        Some(1) => "EPERM",
        Some(11) => "EAGAIN",
        Some(12) => "ENOMEM",
        Some(13) => "EACCES",
        Some(14) => "EFAULT",
        Some(16) => "EBUSY",
        Some(17) => "EEXIST",
        Some(22) => "EINVAL",
        _ => return Refusal::With(why.to_string()),
    };
    Refusal::With(name.to_owned())
}

/// What a thread gets that touches nothing.
fn signal() -> Refusal {
    Refusal::With("SIGSEGV".to_owned())
}

impl Host for LiveHost {
    type Platform = LivePlatform;

    const KIND: HostKind = HostKind::Live;

    fn land(&self) -> HostSpan {
        self.land.span()
    }

    fn node(&self, n: usize) -> Option<host::Node<'_, LivePlatform>> {
        let node = self.machine.nodes().get(n)?;
        Some(host::Node {
            gpu: node.gpu(),
            device: node.device(),
            vm: node.vms().first()?,
        })
    }

    fn space(&self) -> &Arc<LiveSpace> {
        self.machine.space()
    }

    fn told(&self) -> (&DeviceStats, &Notes) {
        (self.machine.stats(), self.machine.notes())
    }

    fn call(&self, call: &Call) -> Result<(), Refusal> {
        let land = &self.land;
        let done = match *call {
            Call::Map(span, rights, backing, huge) => return self.map(span, rights, backing, huge),
            Call::Unmap(span) => land.unmap(span),
            Call::Protect(span, rights) => return self.protect(span, rights),
            Call::Advise(span, told) => land.advise(span, advice(told)),
            Call::Move(span, to) => land.relocate(span, to, Leave::Hole),
            Call::MoveLeaving(span, to) => land.relocate(span, to, Leave::Empty),
            Call::Deed(deed, span) => return self.deed(deed, span),
            Call::FailCopy(_) => return Err(Refusal::Unable("fail a copy")),
            Call::Die => return Err(Refusal::Unable("die, and tell")),
        };
        done.map_err(|why| os(&why))
    }

    fn load(&self, at: HostVa) -> Result<u64, Refusal> {
        let mut word = [0; 8];
        let read = LiveBus.read(at.get(), &mut word);
        read.map_err(|_nothing| signal())?;
        Ok(u64::from_ne_bytes(word))
    }

    fn store(&self, at: HostVa, value: u64) -> Result<(), Refusal> {
        let written = LiveBus.write(at.get(), &value.to_ne_bytes());
        written.map_err(|_nothing| signal())
    }

    fn atomic(&self, at: HostVa, op: AtomicOp) -> Result<(), Refusal> {
        let former = LiveBus.atomic(at.get(), op);
        former.map(drop).map_err(|_nothing| signal())
    }

    fn launch(
        &self,
        device: usize,
        unit: usize,
        act: &(dyn Fn(&mut Tile<'_>) + Sync),
    ) -> Result<(), Stop> {
        let place = Place { device, vm: 0 };
        self.machine.launch_one(place, unit, &OnTile(act))
    }

    fn drive<R: Send>(&self, act: impl FnOnce() -> R + Send) -> R {
        gpusvm_live::thread::run(act)
    }

    fn now(&self) -> Ns {
        self.machine.env().now()
    }

    fn settle<T: Send>(
        &self,
        look: impl Fn() -> T + Send + Sync,
        right: impl Fn(&T) -> bool + Send + Sync,
    ) -> T {
        // Whoever brought pages home wakes their users before it lets go of the memory.
        self.drive(|| {
            let mut found = look();
            for _look in 0..LOOKS {
                if right(&found) {
                    break;
                }
                thread::yield_now();
                found = look();
            }
            found
        })
    }

    fn sleep(&self, time: Ns) {
        self.machine.env().sleep_until(self.now().after(time));
    }

    fn fork(&self, steps: &[ChildStep]) -> Result<(), String> {
        let bus = LiveBus::new();
        // In the child: no allocation, no lock.
        let child = Child::make(By::Fork, || {
            steps.iter().all(|step| {
                let at = step.at.get();
                match &step.does {
                    ChildDoes::Store(value) => bus.write(at, &value.to_ne_bytes()).is_ok(),
                    ChildDoes::Load(wanted) => {
                        let mut word = [0; 8];
                        let read = bus.read(at, &mut word).is_ok();
                        let found = u64::from_ne_bytes(word);
                        read && (wanted.is_empty() || wanted.contains(&found))
                    }
                }
            })
        });
        match child.and_then(Child::passed) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the child finds what it must not, or is refused".to_owned()),
            Err(why) => Err(format!("fork: {why}")),
        }
    }

    fn together(play: &Arc<Play<Self>>, index: usize) -> Result<(), String> {
        let Act::Together(lines) = &play.scenario.lines[index].act else {
            return Err("only `together` does lines together".to_owned());
        };
        thread::scope(|scope| {
            let spawn = |(n, line)| scope.spawn(move || play.line(n + 1, index, line));
            let lanes: Vec<_> = lines.iter().enumerate().map(spawn).collect();
            let ended = lanes.into_iter().map(|lane| match lane.join() {
                Ok(ended) => ended,
                Err(_panic) => Err("a thread panics".to_owned()),
            });
            ended.collect()
        })
    }

    fn arm(&self, _index: usize, _point: Point, _often: Often) -> Result<(), String> {
        Err("this host does nothing at points: the scenario has to say `skipped:`".to_owned())
    }

    fn disarm(_play: &Arc<Play<Self>>) -> Result<(), String> {
        Ok(())
    }

    fn keep(&self) {}

    fn kept(&self, _span: HostSpan) -> Result<(), String> {
        Err("this host does not see page tables: the line has to be the model's".to_owned())
    }

    fn check(&self) -> Result<(), String> {
        let never = [
            Counter::LateInvalidationCount,
            Counter::HostConflictCount,
            Counter::HostGoneCount,
            Counter::TlbTimeoutCount,
        ];
        let stats = self.machine.stats();
        let wrong = never.into_iter().find(|counter| stats.total(*counter) > 0);
        match wrong {
            Some(counter) => Err(format!("{} is not zero", counter.name())),
            None => Ok(()),
        }
    }
}
