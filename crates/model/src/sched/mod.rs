//! A deterministic scheduler for worlds of a few actors.
//!
//! A world is a handful of actors, closures that run on stacks of their own, exactly one at a time.
//! At *switch points* (locks, waits, seam calls, whatever calls [`ModelEnv::point`]) another one may
//! go on. Who does is a *choice*, as is everything else that may differ between two worlds: every
//! choice is asked from a [`Picker`] and recorded on a [`Tape`], which replays the world bit by bit.
//!
//! | module | what |
//! |---|---|
//! | [`sim`](run) | [`Sim`] makes actors and oracles; [`run`] runs a world to its [`Outcome`] |
//! | `env` | [`ModelEnv`], the framework's [`Environment`](gpusvm::seam::env::Environment) |
//! | `world`, `queue`, `chaos` | who can run, who waits, what time it is, what fails |
//! | `stage` | what actors do to their world |
//! | `inside` | who is inside an invalidation |
//! | `fiber` | coroutines, and [`ModelMutex`], which blocks the actor |
//! | `lock`, `lock_word` | names, ranks and orders of locks; who holds one |
//! | `options`, `oracle` | what may differ between worlds; who looks at them between steps |
//! | `pick`, `dfs`, `rng` | pickers: random, PCT, playback, all worlds; random numbers |
//! | `tape`, `script`, `shrink` | the record of choices, in order and by actor, and how to make it short |
//! | `explore` | many worlds: [`Explorer`] |
//! | `trace`, `fail` | last events, timelines, failures in words |
//!
//! ```
//! use gpusvm_model::sched::{ModelEnv, ModelMutex, Options, Picker, run};
//! use std::sync::Arc;
//!
//! let mut picker = Picker::uniform(7);
//! let outcome = run(&Options::default(), &mut picker, |sim| {
//!     let total = Arc::new(lock_api::Mutex::<ModelMutex, u32>::new(0));
//!     for name in ["a", "b"] {
//!         let total = Arc::clone(&total);
//!         sim.spawn(name, move || {
//!             *total.lock() += 1;
//!             ModelEnv.emit("added", [1, 0]);
//!         });
//!     }
//! });
//! assert!(outcome.trouble.is_none());
//! ```
//!
//! Time is virtual: it moves by a tick with each step, and to the next deadline when nobody can
//! run. Everything of a world happens on one thread; several threads may run worlds beside each
//! other. Memory orderings weaker than sequential consistency are not modelled.

mod chaos;
mod dfs;
mod env;
mod explore;
mod fail;
mod fiber;
mod inside;
mod lock;
mod lock_word;
mod options;
mod oracle;
mod pick;
mod queue;
mod rng;
mod script;
mod shrink;
mod sim;
mod stage;
mod tape;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_locks;
mod trace;
mod world;

pub use chaos::{Fate, Phase};
pub use dfs::Dfs;
pub use env::{Busy, ModelEnv};
pub use explore::{Explorer, Summary};
pub use fail::{Failure, FailureKind};
pub use fiber::ModelMutex;
pub use inside::Invalidating;
pub use lock::{Order, Rank};
pub use options::{Chaos, KeepTape, Kind, LockRules, Options, Points, Texts};
pub use oracle::When;
pub use pick::{ACTORS_MAX, Pct, Picker, Playback, Random, What};
pub use rng::{Stream, hash_text, mix};
pub use script::Scripted;
pub use shrink::{Progress, Verdict, shrink};
pub use sim::{Outcome, Sim, Trouble, keep_panics_quiet, lock_orders, replay, run};
pub use stage::Life;
pub use tape::{CHOICES_MAX, Tape, TapeError};
pub use trace::{Entry, timeline};
