//! What the running actor does to its world: points, locks, waiting, sleeping, looking, failing.
//!
//! Each function borrows the world for a moment, learns what is due, and does it with the borrow
//! given back: suspend, call the oracles, or die.
//!
//! An actor *dies* by unwinding from a point at which it was suspended in a running world. Nothing
//! suspends an actor that unwinds, but a lock that another dying actor holds; so guards stay
//! exclusive to the end.

use core::any::Any;
use core::panic::AssertUnwindSafe;
use std::panic::{catch_unwind, resume_unwind};
use std::thread::panicking;

use gpusvm::seam::env::{Ns, Work};

use crate::sched::fail::FailureKind;
use crate::sched::fiber;
use crate::sched::lock::{Broken, NodeId, Rank};
use crate::sched::lock_word::{HOST, LockWord, Site};
use crate::sched::options::{Kind, LockRules};
use crate::sched::oracle::{Moments, Oracle};
use crate::sched::world::{Block, Due, NEVER, State, World, with};

/// The payload with which dying actors unwind.
struct Death;

/// Times that a dying actor may wait in vain before it is given up.
const DYING_WAITS_MAX: u32 = 1000;

/// Unwinds the running actor.
fn die() -> ! {
    resume_unwind(Box::new(Death))
}

/// A place where another actor may run.
#[inline]
pub(super) fn point(kind: Kind) {
    let due = with(|world| world.arrive(kind));
    if due != Due::Nothing {
        act(due, kind);
    }
}

#[cold]
fn act(due: Due, kind: Kind) {
    match due {
        Due::Nothing => {}
        Due::Switch => switch(),
        Due::Death => die_unless_unwinding(),
        Due::Oracles(moments) => {
            look(moments);
            let due = with(|world| match world.state {
                State::Running => world.decide(kind),
                _ => Due::Death,
            });
            act(due, kind);
        }
    }
}

fn die_unless_unwinding() {
    if !panicking() {
        die();
    }
}

/// Lets the chosen actor run.
fn switch() {
    if panicking() {
        // A destructor reached a point: the panic comes first.
        let panic = "an actor panics".to_owned();
        with(|world| world.fail(FailureKind::Panic, panic));
        return;
    }
    fiber::suspend();
    if with(|world| world.state) != State::Running {
        die();
    }
}

/// Suspends the running actor, which is blocked; whether the world still runs afterwards.
fn suspend() -> State {
    fiber::suspend();
    with(|world| {
        if world.state == State::Dying {
            // Nobody wakes it any more: it woke to end.
            let current = world.current;
            world.actors[current].block = None;
        }
        world.state
    })
}

/// Calls the oracles that look at such moments.
pub(super) fn look(moments: Moments) {
    let mut oracles = with(|world| {
        world.looking = true;
        std::mem::take(&mut world.oracles)
    });
    let looking = Looking;
    let due = |oracle: &&mut Oracle| moments.has(oracle.when);
    let mut looks = oracles.iter_mut().filter(due);
    let found = looks.find_map(|oracle| (oracle.look)().err());
    drop(looking);
    with(|world| {
        world.looking = false;
        // If one of them has made another one, that is the last.
        std::mem::swap(&mut world.oracles, &mut oracles);
        if !oracles.is_empty() {
            world.oracles.append(&mut oracles);
        }
        if let Some(text) = found {
            world.fail(FailureKind::Violation, text);
        }
    });
}

/// Ends the looking of an oracle that panics, before anything else is dropped.
struct Looking;

impl Drop for Looking {
    fn drop(&mut self) {
        if panicking() {
            with(|world| world.looking = false);
        }
    }
}

/// Says that a rule is broken: the world fails, and the running actor dies.
pub(super) fn fail(kind: FailureKind, text: String) {
    let on_actor = with(|world| {
        world.fail(kind, text);
        world.current != HOST && !world.looking
    });
    if on_actor {
        die_unless_unwinding();
    }
}

/// What became of an attempt to take a lock.
enum Taking {
    Taken,
    /// Suspend, and try again unless the world has died.
    Wait,
    /// Suspend in a dying world, and try again.
    WaitDying,
    Death,
    /// The thread's own code cannot wait.
    Refused,
}

/// Takes a lock, waiting for it if need be.
#[inline]
pub(super) fn take_lock(word: &LockWord, site: Site) {
    let found = with(|world| match world.arrive(Kind::Lock) {
        Due::Nothing => Ok(world.take(word, site)),
        due => Err(due),
    });
    match found {
        Ok(Taking::Taken) => {}
        Ok(taking) => wait_for(taking, word, site),
        Err(due) => {
            act(due, Kind::Lock);
            attempt(word, site);
        }
    }
}

fn attempt(word: &LockWord, site: Site) {
    match with(|world| world.take(word, site)) {
        Taking::Taken => {}
        taking => wait_for(taking, word, site),
    }
}

/// The lock is not free: waits, and tries again.
#[cold]
fn wait_for(taking: Taking, word: &LockWord, site: Site) {
    match taking {
        Taking::Taken => return,
        Taking::Wait => {
            if suspend() != State::Running {
                die();
            }
        }
        Taking::WaitDying => {
            suspend();
        }
        Taking::Death => die(),
        Taking::Refused => refuse(word, site),
    }
    attempt(word, site);
}

#[cold]
fn refuse(word: &LockWord, site: Site) {
    let label = with(|world| world.locks.label(word.address()));
    panic!("{label} is held, and code outside of actors cannot wait for it ({site})");
}

impl World {
    #[inline]
    fn take(&mut self, word: &LockWord, site: Site) -> Taking {
        let node = self.node(word, site);
        if let Some(node) = node
            && self.is_live()
            && let Err(broken) = self.locks.check(self.current, node, site)
            && let Err(taking) = self.break_order(broken)
        {
            return taking;
        }
        if !word.claim(self.current) {
            return self.wait_for_lock(word, site);
        }
        if let Some(node) = node {
            self.locks.took(self.current, node, site);
        }
        Taking::Taken
    }

    /// What is known of a lock, where it is a matter of rules. What an oracle takes is none: it is free
    /// again before anybody goes on.
    #[inline]
    fn node(&mut self, word: &LockWord, site: Site) -> Option<NodeId> {
        let watched = self.state != State::Idle && !self.looking;
        watched.then(|| self.locks.node(word, site))
    }

    #[cold]
    fn break_order(&mut self, broken: Broken) -> Result<(), Taking> {
        if self.options.lock_rules == LockRules::Ignore {
            return Ok(());
        }
        self.fail(FailureKind::LockOrder, broken);
        if panicking() {
            Ok(())
        } else {
            Err(Taking::Death)
        }
    }

    #[cold]
    fn wait_for_lock(&mut self, word: &LockWord, site: Site) -> Taking {
        if self.current == HOST || self.looking || self.state == State::Idle {
            return Taking::Refused;
        }
        let block = Block::Lock(word.address(), site);
        if self.state == State::Running && panicking() {
            // A destructor waits: the panic comes first, the world ends with it.
            self.fail(FailureKind::Panic, "an actor panics".to_owned());
        }
        if self.state == State::Dying {
            let current = self.current;
            self.actors[current].block = Some(block);
            return Taking::WaitDying;
        }
        if self.closes_cycle(word.holder()) {
            let current = self.current;
            self.actors[current].block = Some(block);
            let text = self.describe_waiting("actors wait for each other");
            self.fail(FailureKind::Deadlock, text);
            return Taking::Death;
        }
        self.block(block, NEVER);
        Taking::Wait
    }

    #[inline]
    fn release(&mut self, word: &LockWord) {
        if !self.looking {
            self.locks.released(word);
        }
        word.clear();
        if self.lock_waiters != 0 {
            self.wake_lock(word.address());
        }
    }
}

/// Takes a lock if it is free.
pub(super) fn try_lock(word: &LockWord, site: Site) -> bool {
    point(Kind::Lock);
    with(|world| {
        let claimed = word.claim(world.current);
        if claimed && let Some(node) = world.node(word, site) {
            world.locks.took(world.current, node, site);
        }
        claimed
    })
}

/// Frees a lock.
#[inline]
pub(super) fn release_lock(word: &LockWord) {
    let due = with(|world| {
        world.release(word);
        world.arrive(Kind::Unlock)
    });
    if due != Due::Nothing {
        act(due, Kind::Unlock);
    }
}

/// Whether a wait was for the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// The world goes on.
    Goes,
    /// The world is over: return soon.
    Over,
}

/// What an actor that wants to wait does instead, where it does not.
enum Waiting {
    Suspended,
    Return(Life),
    GiveUp,
}

/// Waits until something happens to the running actor. `still` says whether there is still
/// something to wait for; nothing can change between its answer and the wait.
pub(super) fn wait(block: Block, deadline: u64, still: impl FnOnce(&World) -> bool) -> Life {
    point(Kind::Wait);
    let waiting = with(|world| world.begin_wait(block, deadline, still));
    match waiting {
        Waiting::Return(life) => life,
        Waiting::Suspended if suspend() == State::Running => Life::Goes,
        Waiting::Suspended => Life::Over,
        Waiting::GiveUp => loop {
            fiber::suspend();
        },
    }
}

/// As [`wait`], for actors that know nothing of the world's end: they die with it.
pub(super) fn wait_or_die(block: Block, deadline: u64, still: impl FnOnce(&World) -> bool) {
    let running = with(|world| world.state == State::Running);
    if wait(block, deadline, still) == Life::Over && running && !panicking() {
        die();
    }
}

impl World {
    fn begin_wait(
        &mut self,
        block: Block,
        deadline: u64,
        still: impl FnOnce(&Self) -> bool,
    ) -> Waiting {
        assert!(self.current != HOST, "only actors wait");
        if self.state == State::Dying {
            self.dying_waits += 1;
            let patient = self.dying_waits < DYING_WAITS_MAX;
            return if patient {
                Waiting::Return(Life::Over)
            } else {
                Waiting::GiveUp
            };
        }
        if self.looking || !still(self) || self.now().0 >= deadline {
            return Waiting::Return(Life::Goes);
        }
        if panicking() {
            self.fail(FailureKind::Panic, "an actor panics".to_owned());
            return Waiting::Return(Life::Over);
        }
        self.block(block, deadline);
        Waiting::Suspended
    }
}

/// Fails the world when the running actor holds a lock above `rank`.
pub(super) fn check_context(what: &str, rank: Rank) {
    let held = with(|world| {
        let live = world.is_live() && world.options.lock_rules == LockRules::Forbid;
        let held = live.then(|| world.locks.held_above(world.current, rank));
        held.flatten()
    });
    if let Some(held) = held {
        fail(
            FailureKind::Context,
            format!("{what} while it holds {held}"),
        );
    }
}

/// Work for a worker; nothing when the world is over.
pub(super) fn next_work() -> Option<Work> {
    loop {
        point(Kind::Other);
        let work = with(|world| {
            let any = !world.deferred.is_empty() && world.state == State::Running;
            any.then(|| world.deferred.remove(0))
        });
        if work.is_some() {
            return work;
        }
        if wait(Block::Idle, NEVER, |world| world.deferred.is_empty()) == Life::Over {
            return None;
        }
    }
}

/// The whole life of an actor, on its fiber.
pub(super) fn live(body: impl FnOnce()) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        if with(|world| world.state) == State::Running {
            body();
            last_look();
        }
    }));
    if let Err(payload) = result {
        tell_panic(payload.as_ref());
    }
    with(World::finish);
}

/// Oracles also look at the state in which an actor ends.
fn last_look() {
    let due = with(|world| match world.is_live() {
        true => world.moments(),
        false => Moments::NONE,
    });
    if due != Moments::NONE {
        look(due);
    }
}

fn tell_panic(payload: &(dyn Any + Send)) {
    if payload.is::<Death>() {
        return;
    }
    let text = payload.downcast_ref::<String>().cloned();
    let text = text.or_else(|| {
        payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
    });
    let text = text.unwrap_or_else(|| "a panic without a message".to_owned());
    with(|world| {
        let site = world.panic_site.take();
        let at = site.map_or_else(String::new, |site| format!(" ({site})"));
        if world.state == State::Dying {
            world.name_panic(&format!("{text}{at}"));
        } else {
            world.fail(FailureKind::Panic, format!("{text}{at}"));
        }
    });
}

impl World {
    /// Gives the panic because of which the world dies its message.
    fn name_panic(&mut self, text: &str) {
        let name = self.name_of(self.current);
        if let Some(failure) = &mut self.failure
            && failure.kind == FailureKind::Panic
            && failure.actor == name
            && failure.text == "an actor panics"
        {
            text.clone_into(&mut failure.text);
        }
    }
}

/// Sleeps until a time.
pub(super) fn sleep_until(deadline: Ns, site: Site) {
    wait_or_die(Block::Sleep(site), deadline.0, |_| true);
}
