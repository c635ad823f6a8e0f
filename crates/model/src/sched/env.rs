//! The environment of a model world, and what an actor can ask and tell.

use core::panic::Location;
use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm::mutant::Mutant;
use gpusvm::seam::env::{Environment, Ns, Point, Work};
use gpusvm_abi::bus::Park;

use crate::sched::chaos::{Fate, Phase};
use crate::sched::fail::FailureKind;
use crate::sched::fiber::ModelMutex;
use crate::sched::lock::Rank;
use crate::sched::lock_word::Site;
use crate::sched::options::Kind;
use crate::sched::pick::What;
use crate::sched::rng::Stream;
use crate::sched::stage::{self, Life};
use crate::sched::world::{Block, NEVER, State, World, with};

/// The environment of the world that runs on this thread.
///
/// It has no state: whatever it is asked, it asks the world of the calling thread. So it can be
/// kept where worlds come and go. Outside a world the clock stands still, locks work where nobody
/// has to wait, and waiting panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelEnv;

/// Delays are powers of two up to this exponent, in steps.
const DELAY_EXPONENTS: u32 = 8;

/// While it lives, the world is not quiescent.
#[derive(Debug)]
pub struct Busy(());

impl Drop for Busy {
    fn drop(&mut self) {
        with(World::leave_busy);
    }
}

impl ModelEnv {
    /// A place where another actor may run.
    #[inline]
    pub fn point(&self, kind: Kind) {
        stage::point(kind);
    }

    /// A number below `n`, which the explorer varies; 0 where there is nothing to choose.
    #[must_use]
    pub fn choose(&self, n: u32) -> u32 {
        with(|world| match world.state {
            State::Building | State::Running if n > 1 => {
                world.choose(n, What::Data, world.nobody())
            }
            _ => 0,
        })
    }

    /// Reports what the actor did: it goes into the world's hash and the last events.
    #[inline]
    pub fn emit(&self, label: &'static str, args: [u64; 2]) {
        with(|world| world.emit(label, args, None));
    }

    /// As [`emit`](Self::emit), with more words for people. They are made only where texts are
    /// kept, and are no part of the hash.
    #[inline]
    pub fn tell(&self, label: &'static str, args: [u64; 2], text: impl FnOnce() -> String) {
        let text = with(|world| world.keeps_texts()).then(text);
        with(|world| world.emit(label, args, text));
    }

    /// Lets chaos fail or delay a call. `site` names the kind of call.
    #[must_use]
    pub fn may_fail(&self, site: &'static str) -> Fate {
        match with(|world| world.chaos(site, 3)) {
            0 => Fate::Go,
            1 => Fate::Fail,
            _ => {
                self.delay();
                Fate::Go
            }
        }
    }

    /// Lets chaos fail a call that cannot be delayed: locks may be held.
    #[must_use]
    pub fn fails(&self, site: &'static str) -> bool {
        with(|world| world.chaos(site, 2)) != 0
    }

    /// Lets chaos delay a call that cannot fail.
    pub fn may_delay(&self, site: &'static str) {
        if with(|world| world.chaos(site, 2)) != 0 {
            self.delay();
        }
    }

    #[track_caller]
    fn delay(&self) {
        let exponent = self.choose(DELAY_EXPONENTS);
        let (now, tick) = with(|world| (world.now(), world.options.tick.0));
        let deadline = now.after(Ns(tick << exponent));
        stage::sleep_until(deadline, Location::caller());
    }

    /// Marks an operation in whose midst the rules of quiet moments do not hold.
    #[must_use]
    pub fn busy(&self) -> Busy {
        with(World::enter_busy);
        Busy(())
    }

    /// Says that something has changed about which [`When::Changed`](crate::sched::When::Changed)
    /// oracles have rules.
    #[inline]
    pub fn touch(&self) {
        with(World::touch);
    }

    /// Takes note that the world has reached the goal of this number: [`Summary`] counts the worlds
    /// that did. No part of the world's hash.
    ///
    /// [`Summary`]: crate::sched::Summary
    pub fn reach(&self, goal: u32) {
        with(|world| world.reach(goal));
    }

    /// Which actor runs, counted from 0 in the order in which they were made; past the last one where
    /// none does.
    #[must_use]
    pub fn actor(&self) -> usize {
        with(|world| world.current)
    }

    /// Name of the actor that runs.
    #[must_use]
    pub fn actor_name(&self) -> String {
        with(|world| world.name_of(world.current))
    }

    /// Whether the world keeps texts: it is played for people.
    #[must_use]
    pub fn keeps_texts(&self) -> bool {
        with(|world| world.keeps_texts())
    }

    /// Says that a rule is broken: the world has failed. Returns only where the caller is no
    /// actor, or unwinds already.
    pub fn fail(&self, text: impl Into<String>) {
        stage::fail(FailureKind::Violation, text.into());
    }

    /// Whether chaos is on.
    #[must_use]
    pub fn phase(&self) -> Phase {
        with(|world| world.phase())
    }

    /// Starts the liveness phase: no more chaos, and all actors must be done soon.
    pub fn calm(&self) {
        with(World::calm);
    }

    /// The wait of a daemon: sleeps while `*word == seen`, until a wake-up, or until the world is
    /// over.
    #[track_caller]
    pub fn idle(&self, word: &AtomicU32, seen: u32) -> Life {
        let block = Block::Word(address(word), Location::caller());
        stage::wait(block, NEVER, |_| word.load(Ordering::Acquire) == seen)
    }

    /// The world's random stream of this name.
    #[must_use]
    pub fn stream(&self, name: &str) -> Stream {
        Stream::named(with(|world| world.options.seed), name)
    }
}

fn address(word: &AtomicU32) -> usize {
    core::ptr::from_ref(word).addr()
}

fn wait(word: &AtomicU32, seen: u32, deadline: u64, site: Site) {
    if ModelEnv.fails("wait") {
        // Whoever waits may wake for no reason.
        return stage::point(Kind::Wake);
    }
    let still = |_: &_| word.load(Ordering::Acquire) == seen;
    stage::wait_or_die(Block::Word(address(word), site), deadline, still);
}

/// A point only where somebody was woken: else nothing has happened that another actor could see,
/// and what comes next has a point of its own.
fn wake(word: &AtomicU32) {
    if with(|world| world.wake_word(address(word))) {
        stage::point(Kind::Wake);
    }
}

impl Environment for ModelEnv {
    type RawMutex = ModelMutex;

    fn now(&self) -> Ns {
        with(|world| world.now())
    }

    fn random(&self) -> u64 {
        with(World::random)
    }

    #[track_caller]
    fn wait(&self, word: &AtomicU32, seen: u32) {
        stage::check_context("waits", Rank::VM);
        wait(word, seen, NEVER, Location::caller());
    }

    fn wake(&self, word: &AtomicU32) {
        wake(word);
    }

    #[track_caller]
    fn sleep_until(&self, deadline: Ns) {
        stage::check_context("sleeps", Rank::VM);
        stage::sleep_until(deadline, Location::caller());
    }

    fn defer(&self, work: Work) {
        with(|world| world.defer(work));
        stage::point(Kind::Defer);
    }

    /// In a world that has failed there are no bugs: its actors end, and must not fail once more.
    fn mutant(&self, which: Mutant) -> bool {
        with(|world| world.mutant == Some(which) && world.state != State::Dying)
    }

    fn yield_point(&self, at: Point) {
        stage::check_context("lets others run", Rank::VM);
        if let Some(hook) = with(|world| world.hook.clone()) {
            hook(at);
        }
        stage::point(match at {
            Point::Retry => Kind::Spin,
            Point::AfterFaultIn
            | Point::BeforeCommit
            | Point::AfterCollect
            | Point::BeforeFinalize => Kind::Seam,
            Point::PteWrite => Kind::Pte,
            Point::HostLock => Kind::Lock,
        });
    }
}

/// Devices wait for each other with any lock of the driver held.
impl Park for ModelEnv {
    #[track_caller]
    fn wait(&self, word: &AtomicU32, seen: u32, timeout_ns: Option<u64>) {
        let deadline = match timeout_ns {
            Some(ns) => Environment::now(self).after(Ns(ns)).0,
            None => NEVER,
        };
        wait(word, seen, deadline, Location::caller());
    }

    fn wake(&self, word: &AtomicU32) {
        wake(word);
    }

    fn now_ns(&self) -> u64 {
        Environment::now(self).0
    }
}
