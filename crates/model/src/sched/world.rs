//! The world of a thread: who can run, who waits for what, what time it is, and who runs next.
//!
//! A thread has one world at a time. Its memory is used again for the next one, so that a world
//! costs little more than its actors' steps. Exactly one actor runs at any moment; everything here
//! is called by it, on its fiber, or by the thread between two actors.
//!
//! | state | what happens |
//! |---|---|
//! | `Idle` | no world: locks work where nobody has to wait |
//! | `Building` | actors are being made; nothing is a switch point |
//! | `Running` | points are switch points |
//! | `Dying` | the world is over or has failed: actors end, one by one, and nothing is a choice |
//!
//! Borrows of the world are short and never last while foreign code runs.

use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicU64, Ordering};
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use corosensei::stack::DefaultStack;
use gpusvm::mutant::Mutant;
use gpusvm::seam::env::{Ns, Point, Work};

use crate::sched::chaos::Phase;
use crate::sched::fail::{Failure, FailureKind};
use crate::sched::fiber::Fiber;
use crate::sched::lock::LockTable;
use crate::sched::lock_word::{HOST, Site};
use crate::sched::options::{KeepTape, Kind, Options, Points, Texts};
use crate::sched::oracle::{Moments, Oracle, When};
use crate::sched::pick::{ACTORS_MAX, Candidates, Picker, What};
use crate::sched::rng::{Stream, hash_text, mix};
use crate::sched::trace::{Entry, Ring};

/// Where a world is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    Building,
    Running,
    Dying,
}

/// Why an actor does not run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Block {
    /// It waits for the lock at this address.
    Lock(usize, Site),
    /// It waits for a wake-up on the word at this address.
    Word(usize, Site),
    /// It sleeps.
    Sleep(Site),
    /// It is a worker without work.
    Idle,
}

/// Whether the world waits for an actor's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// The world is over when all of these are done.
    Required,
    /// It serves the others for as long as the world lasts.
    Daemon,
}

#[derive(Debug)]
pub(super) struct Actor {
    pub(super) name: Cow<'static, str>,
    pub(super) block: Option<Block>,
    /// When it runs again at the latest; never, where it is the maximum.
    pub(super) deadline: u64,
}

/// What a point asks of the actor that arrived there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Oracles(Moments),
    Switch,
    Death,
}

/// Acts at the points that the framework names.
pub(super) type Hook = Rc<dyn Fn(Point)>;

/// Steps that an actor runs on end while others could run; then it gives way.
const STREAK_MAX: u32 = 500;
pub(super) const NEVER: u64 = u64::MAX;

pub(super) struct World {
    pub(super) state: State,
    pub(super) options: Options,
    /// The bug that its name means, if it is one that the framework knows.
    pub(super) mutant: Option<Mutant>,
    pub(super) actors: Vec<Actor>,
    pub(super) newborn: Vec<Fiber>,
    pub(super) stacks: Vec<DefaultStack>,
    /// Actors that can run, one bit each.
    pub(super) ready: u64,
    /// Required actors that are not done.
    pub(super) unfinished: u64,
    /// Actors that wait for something.
    pub(super) blocked: u64,
    /// Those of them that wait for a lock.
    pub(super) lock_waiters: u64,
    pub(super) current: usize,
    /// Who is to be resumed by the thread.
    pub(super) next: Option<usize>,
    pub(super) steps: u64,
    pub(super) switches: u64,
    pub(super) now: u64,
    /// Earliest deadline.
    pub(super) earliest: u64,
    pub(super) streak: u32,
    pub(super) phase: Phase,
    /// The last step of the phase.
    phase_ends: u64,
    picker: Picker,
    pub(super) tape: Vec<u32>,
    pub(super) hash: u64,
    pub(super) locks: LockTable,
    pub(super) ring: Ring,
    pub(super) oracles: Vec<Oracle>,
    pub(super) hook: Option<Hook>,
    /// When some oracle looks.
    watched: Moments,
    /// What oracles count, and what it was when they last looked.
    counters: Vec<(Arc<AtomicU64>, u64)>,
    /// Something has changed since oracles looked at changes.
    touched: bool,
    pub(super) looking: bool,
    pub(super) busy: u32,
    pub(super) deferred: Vec<Work>,
    random: Stream,
    pub(super) chaos_sites: Vec<(&'static str, u32)>,
    /// Goals that were reached, one bit each.
    pub(super) reached: Vec<u64>,
    pub(super) failure: Option<Box<Failure>>,
    pub(super) dying_waits: u32,
    pub(super) panic_site: Option<String>,
}

thread_local! {
    /// Without a destructor: then it takes no more than an address to reach it. [`Leaving`] empties it.
    static STAGE: ManuallyDrop<RefCell<World>> =
        const { ManuallyDrop::new(RefCell::new(World::new())) };
    static LEAVING: Leaving = const { Leaving };
}

/// Gives the memory of a thread's world back when the thread ends.
struct Leaving;

impl Drop for Leaving {
    fn drop(&mut self) {
        let last = try_with(|world| std::mem::replace(world, World::new()));
        drop(last);
    }
}

/// Runs `act` on the world of this thread. It must not call foreign code.
#[inline]
pub(super) fn with<R>(act: impl FnOnce(&mut World) -> R) -> R {
    STAGE.with(|stage| act(&mut stage.borrow_mut()))
}

/// As [`with`], where the world may be in use: in a panic hook.
pub(super) fn try_with<R>(act: impl FnOnce(&mut World) -> R) -> Option<R> {
    STAGE.with(|stage| stage.try_borrow_mut().ok().map(|mut world| act(&mut world)))
}

impl World {
    const fn new() -> Self {
        Self {
            state: State::Idle,
            options: Options::USUAL,
            mutant: None,
            actors: Vec::new(),
            newborn: Vec::new(),
            stacks: Vec::new(),
            ready: 0,
            unfinished: 0,
            blocked: 0,
            lock_waiters: 0,
            current: HOST,
            next: None,
            steps: 0,
            switches: 0,
            now: 0,
            earliest: NEVER,
            streak: 0,
            phase: Phase::Safety,
            phase_ends: 0,
            picker: Picker::NONE,
            tape: Vec::new(),
            hash: 0,
            locks: LockTable::new(),
            ring: Ring::new(),
            oracles: Vec::new(),
            hook: None,
            watched: Moments::NONE,
            counters: Vec::new(),
            touched: false,
            looking: false,
            busy: 0,
            deferred: Vec::new(),
            random: Stream::ZERO,
            chaos_sites: Vec::new(),
            reached: Vec::new(),
            failure: None,
            dying_waits: 0,
            panic_site: None,
        }
    }

    /// Makes the thread's world a new one.
    pub(super) fn start(&mut self, options: &Options, picker: Picker) {
        LEAVING.with(|_ends_with_the_thread| ());
        if self.options.scenario != options.scenario {
            self.locks.forget();
        }
        self.options.clone_from(options);
        if Stream::named(options.seed, "points").one_in(options.all_points_one_in) {
            self.options.points = Points::ALL;
        }
        let name = options.mutant.as_deref();
        self.mutant = name.and_then(|name| {
            let mut all = Mutant::ALL.iter().copied();
            all.find(|mutant| mutant.name() == name)
        });
        self.locks.start(options.seed);
        self.ring.start(options.events);
        self.actors.clear();
        self.tape.clear();
        self.deferred.clear();
        self.counters.clear();
        self.chaos_sites.clear();
        self.reached.clear();
        (self.ready, self.unfinished, self.steps, self.switches) = (0, 0, 0, 0);
        (self.now, self.earliest, self.streak, self.dying_waits) = (0, NEVER, 0, 0);
        (self.phase, self.phase_ends) = (Phase::Safety, options.safety_steps);
        (self.watched, self.touched) = (Moments::NONE, true);
        (self.looking, self.busy) = (false, 0);
        (self.blocked, self.lock_waiters) = (0, 0);
        (self.current, self.next) = (HOST, None);
        (self.failure, self.panic_site) = (None, None);
        self.hash = mix(options.seed, hash_text(&options.scenario));
        self.random = Stream::named(options.seed, "environment");
        self.picker = picker;
        self.state = State::Building;
    }

    /// Ends the world's life and gives its picker back.
    pub(super) fn stop(&mut self) -> Picker {
        self.state = State::Idle;
        self.current = HOST;
        std::mem::replace(&mut self.picker, Picker::NONE)
    }

    /// Enters a new actor, which can run at once.
    pub(super) fn enter(&mut self, name: Cow<'static, str>, duty: Duty) -> usize {
        let index = self.actors.len();
        assert!(
            index < ACTORS_MAX,
            "a world has at most {ACTORS_MAX} actors"
        );
        self.actors.push(Actor {
            name,
            block: None,
            deadline: NEVER,
        });
        self.ready |= 1 << index;
        if duty == Duty::Required {
            self.unfinished |= 1 << index;
        }
        index
    }

    pub(super) fn watch(&mut self, oracle: Oracle) {
        self.watched = self.watched.and(oracle.when);
        self.oracles.push(oracle);
    }

    /// Oracles that look at what is counted look when this number moves.
    pub(super) fn count(&mut self, counter: Arc<AtomicU64>) {
        self.counters.push((counter, u64::MAX));
    }

    pub(super) const fn now(&self) -> Ns {
        Ns(self.now)
    }

    pub(super) const fn random(&mut self) -> u64 {
        self.random.draw()
    }

    pub(super) const fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the caller is an actor whose steps are choices.
    pub(super) fn is_live(&self) -> bool {
        self.state == State::Running && self.current != HOST && !self.looking
    }

    /// An actor arrives at a place that may be a point.
    #[inline]
    pub(super) fn arrive(&mut self, kind: Kind) -> Due {
        if self.options.points.has(kind) && self.is_live() {
            self.arrive_at_point(kind)
        } else {
            Due::Nothing
        }
    }

    fn arrive_at_point(&mut self, kind: Kind) -> Due {
        self.step();
        if self.steps > self.phase_ends && self.is_late() {
            return Due::Death;
        }
        match self.moments() {
            Moments::NONE => self.decide(kind),
            moments => Due::Oracles(moments),
        }
    }

    /// Which oracles are to look after a step.
    #[inline]
    pub(super) fn moments(&mut self) -> Moments {
        let mut now = Moments::NONE.and(When::EveryStep);
        if self.busy == 0 {
            now = now.and(When::Quiescent);
            if self.touched {
                now = now.and(When::Changed);
                self.touched = false;
            }
        }
        if self.have_counters_moved() {
            now = now.and(When::Counted);
        }
        now.among(self.watched)
    }

    #[inline]
    fn have_counters_moved(&mut self) -> bool {
        self.counters
            .iter_mut()
            .fold(false, |any, (counter, seen)| {
                let now = counter.load(Ordering::Relaxed);
                core::mem::replace(seen, now) != now || any
            })
    }

    pub(super) const fn touch(&mut self) {
        self.touched = true;
    }

    pub(super) fn step(&mut self) {
        self.steps += 1;
        self.now += self.options.tick.0;
        if self.now >= self.earliest {
            self.wake_sleepers();
        }
    }

    /// Starts the liveness phase when it is due; whether its time is up.
    #[cold]
    fn is_late(&mut self) -> bool {
        self.calm();
        let late = self.steps > self.phase_ends;
        if late {
            let text = self.describe_waiting("the actors are not done in time");
            self.fail(FailureKind::Stuck, text);
        }
        late
    }

    /// Starts the liveness phase.
    pub(super) fn calm(&mut self) {
        if self.phase == Phase::Safety {
            self.phase = Phase::Liveness;
            let began = self.steps.min(self.phase_ends);
            self.phase_ends = began.saturating_add(self.options.calm_steps);
            if let Picker::Pct(_) = self.picker {
                self.picker = Picker::uniform(mix(self.options.seed, self.steps));
            }
        }
    }

    /// Chooses who goes on after a point that the running actor could pass.
    #[inline]
    pub(super) fn decide(&mut self, kind: Kind) -> Due {
        if self.earliest != NEVER && self.time_jumps(kind) {
            self.now = self.now.max(self.earliest);
            self.wake_sleepers();
        }
        if self.ready & self.ready.wrapping_sub(1) == 0 {
            // Nobody else can run.
            return Due::Nothing;
        }
        let gives_way = kind == Kind::Spin || self.streak >= STREAK_MAX;
        let current = u32::try_from(self.current).unwrap_or(0);
        let (what, first) = match gives_way {
            true => (What::Yield, (current + 1) % 64),
            false => (What::Stay, current),
        };
        if gives_way {
            self.streak = 0;
        }
        let ready = self.ready;
        let among = Candidates { ready, first };
        let chosen = self.pick_actor(among.count(), what, among);
        if chosen == self.current {
            self.streak += 1;
            return Due::Nothing;
        }
        self.next = Some(chosen);
        Due::Switch
    }

    /// Whether the next sleeper wakes now, before its time has come step by step.
    fn time_jumps(&mut self, kind: Kind) -> bool {
        if kind == Kind::Spin && self.ready.count_ones() < 2 {
            // Who spins can only wait for the sleeper.
            return true;
        }
        let one_in = self.options.jump_one_in;
        let nobody = Candidates { ready: 0, first: 0 };
        one_in != 0 && self.choose(2, What::Rare(one_in), nobody) != 0
    }

    pub(super) fn pick_actor(&mut self, n: u32, what: What, among: Candidates) -> usize {
        let index = self.choose(n, what, among);
        among.actor(index)
    }

    /// Every choice of a world, of whatever kind.
    #[inline]
    pub(super) fn choose(&mut self, n: u32, what: What, among: Candidates) -> u32 {
        let choice = self.picker.pick(n, what, among);
        if self.options.keep_tape != KeepTape::Never {
            self.tape.push(choice);
        }
        self.hash = mix(self.hash, (u64::from(n) << 32) | u64::from(choice));
        choice
    }

    /// Takes note of the first thing that goes wrong: from now on the world dies.
    pub(super) fn fail(&mut self, kind: FailureKind, text: String) {
        if matches!(self.state, State::Idle | State::Dying) {
            return;
        }
        self.failure = Some(Box::new(Failure {
            kind,
            text,
            actor: self.name_of(self.current),
            at: self.now(),
        }));
        self.state = State::Dying;
        self.next = None;
    }

    pub(super) fn name_of(&self, actor: usize) -> String {
        let actor = self.actors.get(actor);
        actor.map_or_else(|| "the world".into(), |actor| actor.name.to_string())
    }

    /// Reports something that the running actor did.
    #[inline]
    pub(super) fn emit(&mut self, label: &'static str, args: [u64; 2], text: Option<String>) {
        let who = mix(self.now, hash_text(label)) ^ self.current as u64;
        self.hash = mix(mix(self.hash, who), mix(args[0], args[1]));
        self.ring.push(Entry {
            at: Ns(self.now),
            actor: self.current,
            label,
            args,
            text,
        });
    }

    pub(super) fn keeps_texts(&self) -> bool {
        self.options.texts == Texts::Kept
    }

    /// Takes note that the world has reached a goal.
    pub(super) fn reach(&mut self, goal: u32) {
        let at = goal as usize / 64;
        if self.reached.len() <= at {
            self.reached.resize(at + 1, 0);
        }
        self.reached[at] |= 1 << (goal % 64);
    }

    pub(super) const fn enter_busy(&mut self) {
        self.busy += 1;
    }

    pub(super) const fn leave_busy(&mut self) {
        self.busy = self.busy.saturating_sub(1);
    }
}
