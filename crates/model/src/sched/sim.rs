//! A world from its first actor to its verdict.

use core::fmt;
use core::marker::PhantomData;
use core::panic::AssertUnwindSafe;
use core::sync::atomic::AtomicU64;
use std::borrow::Cow;
use std::panic::catch_unwind;
use std::rc::Rc;
use std::sync::{Arc, Once};

use corosensei::stack::DefaultStack;
use gpusvm::seam::env::{Ns, Point, Work};

use crate::sched::env::ModelEnv;
use crate::sched::fail::{Failure, FailureKind};
use crate::sched::fiber::{Fiber, Life as FiberLife};
use crate::sched::lock::{Order, Rank};
use crate::sched::lock_word::HOST;
use crate::sched::options::{KeepTape, Options};
use crate::sched::oracle::{Moments, Oracle, When};
use crate::sched::pick::Picker;
use crate::sched::rng::mix;
use crate::sched::stage;
use crate::sched::tape::Tape;
use crate::sched::trace::{Entry, timeline};
use crate::sched::world::{Duty, State, try_with, with};

/// The world being made or running on this thread: makes actors and oracles.
#[derive(Clone, Copy, Debug)]
pub struct Sim {
    /// It means this thread's world: it must not go to another thread.
    here: PhantomData<*const ()>,
}

impl Sim {
    /// The environment, for what the actors share.
    #[must_use]
    pub const fn env(&self) -> ModelEnv {
        ModelEnv
    }

    /// Seed of the world.
    #[must_use]
    pub fn seed(&self) -> u64 {
        with(|world| world.options.seed)
    }

    /// Makes an actor. The world is over when all of these are done.
    ///
    /// # Panics
    /// When there are too many actors, or no memory for a stack.
    pub fn spawn(&self, name: impl Into<Cow<'static, str>>, body: impl FnOnce() + 'static) {
        enter(name.into(), Duty::Required, body);
    }

    /// Makes an actor that serves the others. It waits by [`ModelEnv::idle`] and returns when the
    /// world is over; if it waits for anything else then, it is unwound, which is slow.
    ///
    /// # Panics
    /// As [`spawn`](Self::spawn).
    pub fn daemon(&self, name: impl Into<Cow<'static, str>>, body: impl FnOnce() + 'static) {
        enter(name.into(), Duty::Daemon, body);
    }

    /// Makes a daemon that does deferred work.
    ///
    /// # Panics
    /// As [`spawn`](Self::spawn).
    pub fn worker(&self, name: impl Into<Cow<'static, str>>, mut run: impl FnMut(Work) + 'static) {
        self.daemon(name, move || {
            while let Some(work) = stage::next_work() {
                run(work);
            }
        });
    }

    /// Adds an oracle: it looks at such moments, and what it says fails the world.
    ///
    /// While it looks, nothing is a switch point. It must not wait for locks: at a quiet moment,
    /// locks that an actor holds are held.
    pub fn oracle(&self, when: When, look: impl FnMut() -> Result<(), String> + 'static) {
        let look = Box::new(look);
        with(|world| world.watch(Oracle { when, look }));
    }

    /// Lets `hook` act at every point that the framework names, on the actor that comes there and
    /// before another one may run. Locks that the point allows may be held. There is one hook.
    pub fn hook(&self, hook: impl Fn(Point) + 'static) {
        let former = with(|world| world.hook.replace(Rc::new(hook)));
        drop(former);
    }

    /// Adds an oracle that looks after each step that has moved `counter`.
    pub fn oracle_counting(
        &self,
        counter: Arc<AtomicU64>,
        look: impl FnMut() -> Result<(), String> + 'static,
    ) {
        with(|world| world.count(counter));
        self.oracle(When::Counted, look);
    }

    /// Names all locks and words that lie in `owner`, and gives the locks a rank. Where owners
    /// lie in one another, the innermost name holds. What `owner` points to does not belong to it.
    pub fn name_locks<T: ?Sized>(&self, owner: &T, name: impl Into<Cow<'static, str>>, rank: Rank) {
        let start = core::ptr::from_ref(owner).addr();
        let end = start + size_of_val(owner);
        with(|world| world.locks.name(start, end, name.into(), rank));
    }
}

fn enter(name: Cow<'static, str>, duty: Duty, body: impl FnOnce() + 'static) {
    let (stack, bytes) = with(|world| {
        assert!(
            matches!(world.state, State::Building | State::Running),
            "actors live in a world"
        );
        world.enter(name, duty);
        (world.stacks.pop(), world.options.stack_bytes)
    });
    let stack = stack.unwrap_or_else(|| DefaultStack::new(bytes).expect("memory for a stack"));
    let fiber = Fiber::new(stack, move || stage::live(body));
    with(|world| world.newborn.push(fiber));
}

/// What became of a world.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Hash over all choices and events.
    pub hash: u64,
    /// Switch points that were reached.
    pub steps: u64,
    /// Times that another actor went on.
    pub switches: u64,
    /// Choices that were made.
    pub choices: usize,
    /// Virtual time.
    pub time: Ns,
    /// What went wrong.
    pub trouble: Option<Box<Trouble>>,
    /// The tape, where it is kept.
    pub tape: Option<Tape>,
}

/// What is known of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What went wrong.
    pub failure: Failure,
    /// The choices that led there.
    pub tape: Tape,
    /// Names of the actors.
    pub actors: Vec<String>,
    /// The last events.
    pub events: Vec<Entry>,
    /// Actors that could not be ended; their memory is lost.
    pub abandoned: usize,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.failure)?;
        write!(f, "{}", timeline(&self.actors, &self.events))
    }
}

/// Makes a world and runs it to its end. The picker comes back as the world left it.
///
/// # Panics
/// When this thread runs a world already, and when `build` panics.
pub fn run(options: &Options, picker: &mut Picker, build: impl FnOnce(&Sim)) -> Outcome {
    let taken = std::mem::replace(picker, Picker::NONE);
    with(|world| {
        assert_eq!(world.state, State::Idle, "a thread has one world at a time");
        world.start(options, taken);
    });
    let stopping = Stopping;
    build(&Sim { here: PhantomData });
    with(|world| {
        world.state = State::Running;
        world.pass_on();
    });
    let mut fibers = Vec::new();
    drive(&mut fibers);
    look_at_the_end();
    let abandoned = end_all(fibers);
    drop(with(|world| {
        (std::mem::take(&mut world.oracles), world.hook.take())
    }));
    let outcome = conclude(abandoned);
    drop(stopping);
    *picker = with(|world| world.stop());
    outcome
}

/// Leaves the thread without a world, also when building one panics.
struct Stopping;

impl Drop for Stopping {
    fn drop(&mut self) {
        let left = with(|world| {
            world.state = State::Idle;
            (
                std::mem::take(&mut world.newborn),
                std::mem::take(&mut world.oracles),
                world.hook.take(),
            )
        });
        drop(left);
    }
}

/// Resumes one actor after the other, as they say.
fn drive(fibers: &mut Vec<Option<Fiber>>) {
    loop {
        let next = with(|world| {
            if !world.newborn.is_empty() {
                fibers.extend(world.newborn.drain(..).map(Some));
            }
            world.current = HOST;
            let next = world.next.take();
            if let Some(next) = next {
                world.current = next;
                world.switches += 1;
            }
            next
        });
        let Some(next) = next else { return };
        resume(&mut fibers[next]);
    }
}

/// Resumes an actor; whether it is done.
fn resume(slot: &mut Option<Fiber>) -> FiberLife {
    let Some(fiber) = slot else {
        return FiberLife::Done;
    };
    let life = fiber.resume();
    if life == FiberLife::Done
        && let Some(stack) = slot.take().and_then(Fiber::into_stack)
    {
        with(|world| world.stacks.push(stack));
    }
    life
}

fn look_at_the_end() {
    let running = with(|world| {
        world.current = HOST;
        world.state == State::Running
    });
    if running && catch_unwind(AssertUnwindSafe(|| stage::look(Moments::AT_END))).is_err() {
        let text = with(|world| world.panic_site.take()).unwrap_or_default();
        let text = format!("an oracle panicked at the end {text}");
        with(|world| world.fail(FailureKind::Panic, text));
    }
}

/// Ends the actors that are left; how many refuse.
///
/// They are resumed in turn, because one may need a lock that another has yet to release.
fn end_all(mut fibers: Vec<Option<Fiber>>) -> usize {
    with(|world| {
        world.state = State::Dying;
        fibers.extend(world.newborn.drain(..).map(Some));
    });
    for _ in 0..2 * fibers.len() {
        for (index, fiber) in fibers.iter_mut().enumerate() {
            if fiber.is_some() {
                with(|world| world.current = index);
                resume(fiber);
            }
        }
        if fibers.iter().all(Option::is_none) {
            break;
        }
    }
    with(|world| world.current = HOST);
    fibers.iter().flatten().count()
}

fn conclude(abandoned: usize) -> Outcome {
    with(|world| {
        let failure = world.failure.take();
        let kind = failure
            .as_ref()
            .map_or(0, |failure| failure.kind as u64 + 1);
        let hash = mix(world.hash, kind);
        let keep = world.options.keep_tape == KeepTape::Always || failure.is_some();
        let tape = keep.then(|| Tape {
            scenario: world.options.scenario.to_string(),
            seed: world.options.seed,
            mutant: world.options.mutant.clone(),
            options: world.options.notes.clone(),
            hash: Some(hash),
            choices: world.tape.clone(),
        });
        let trouble = failure.map(|failure| {
            Box::new(Trouble {
                failure: *failure,
                tape: tape.clone().unwrap_or_default(),
                actors: world
                    .actors
                    .iter()
                    .map(|actor| actor.name.to_string())
                    .collect(),
                events: world.ring.take(),
                abandoned,
            })
        });
        Outcome {
            hash,
            steps: world.steps,
            switches: world.switches,
            choices: world.tape.len(),
            time: world.now(),
            trouble,
            tape,
        }
    })
}

/// Replays a tape: the same world, if `build` and `options` make the one that was recorded.
pub fn replay(options: &Options, tape: &Tape, build: impl FnOnce(&Sim)) -> Outcome {
    let options = Options {
        seed: tape.seed,
        ..options.clone()
    };
    run(&options, &mut Picker::playback(&tape.choices), build)
}

/// The orders in which this thread's worlds have taken locks since the scenario changed.
#[must_use]
pub fn lock_orders() -> Vec<Order> {
    with(|world| world.locks.orders())
}

/// Lets panics inside worlds pass without a message: they are findings, and the world tells them,
/// with their place. Panics elsewhere are told as before. Holds for the whole process.
pub fn keep_panics_quiet() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let site = info.location().map(ToString::to_string);
            let inside = try_with(|world| {
                world.panic_site = site;
                world.state != State::Idle
            });
            if inside != Some(true) {
                before(info);
            }
        }));
    });
}
