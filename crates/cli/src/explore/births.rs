//! Where what is in use was taken: for reports of leaks.
//!
//! Only worlds that keep texts take note of it. What fails is shown by playing its tape, with texts; no
//! other world pays for it.

use std::cell::LazyCell;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use gpusvm::addr::VramSpan;
use gpusvm_model::mm::check::{At, Broken};
use gpusvm_model::mm::memory::FrameId;
use gpusvm_model::sched::ModelEnv;

use crate::explore::world::World;
use crate::size::counted;
use crate::world::oracle::Left;

/// Places that one report names.
const NAMED: usize = 4;

/// Who took what, in words.
#[derive(Debug, Default)]
pub(super) struct Births(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    /// By frame; nothing for those that are free.
    frames: Vec<Option<String>>,
    vram: Vec<(VramSpan, String)>,
}

impl Births {
    /// Looks at what has been taken since the last look: it was the actor that runs now.
    pub(super) fn look(&self, world: &World) {
        let who = LazyCell::new(|| who(world));
        let mut taken = self.taken();
        world.kernel.look(|mm| {
            let memory = mm.memory();
            taken.frames.resize(memory.all_frames() as usize, None);
            for (n, birth) in (0..).zip(&mut taken.frames) {
                match (memory.is_free(FrameId(n)), &birth) {
                    (true, _) => *birth = None,
                    (false, None) => *birth = Some(who.clone()),
                    (false, Some(_)) => {}
                }
            }
        });
        let now = world.told.taken();
        taken.vram.retain(|(vram, _)| now.contains(vram));
        for vram in now {
            if taken.vram.iter().all(|(known, _)| *known != vram) {
                taken.vram.push((vram, who.clone()));
            }
        }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines that say where these frames were taken.
    fn of_frames(&self, frames: &[FrameId]) -> String {
        let taken = self.taken();
        let known = |frame: &FrameId| taken.frames.get(frame.0 as usize)?.as_ref();
        let births = frames.iter().filter_map(|frame| {
            let birth = known(frame)?;
            Some(format!("frame {}: {birth}", frame.0))
        });
        lines(births)
    }

    /// Lines that say where device memory was taken that has an owner.
    fn of_vram(&self) -> String {
        let taken = self.taken();
        let births = taken.vram.iter();
        lines(births.map(|(vram, birth)| format!("device memory {vram}: {birth}")))
    }
}

/// The actor that runs, what it does, and when.
fn who(world: &World) -> String {
    let mut text = format!("taken by {}", ModelEnv.actor_name());
    if let Some((doing, span)) = world.between.watch.now() {
        // Text has room.
        let _written = write!(text, " in {} of {span}", doing.name());
    }
    let at = gpusvm::seam::env::Environment::now(&ModelEnv);
    let _written = write!(text, " at {} ns", at.0);
    text
}

fn lines(all: impl Iterator<Item = String>) -> String {
    all.take(NAMED).map(|line| format!("\n  {line}")).collect()
}

impl World {
    /// A broken rule in words, and where what breaks it was taken.
    pub(super) fn explain(&self, broken: &Broken) -> String {
        let frame = match broken.at {
            At::Frame(frame, ..) => Some(frame),
            At::Page(..) | At::Slot(_) | At::Allocation(_) | At::Count(..) => None,
        };
        let known = self.births.as_ref().zip(frame);
        let births = known.map(|(births, frame)| births.of_frames(&[frame]));
        format!("{broken}{}", births.unwrap_or_default())
    }

    /// What is left when all is over, and where it was taken.
    pub(super) fn explain_left(&self, left: &Left) -> String {
        match left {
            Left::Broken(broken) => self.explain(broken),
            Left::Vram(_) | Left::Owned(_) => {
                let births = self.births.as_ref().map(Births::of_vram);
                format!("{left}{}", births.unwrap_or_default())
            }
            Left::Ranges | Left::Root => left.to_string(),
        }
    }

    /// Frames of host memory that belong to nobody, and where they were taken.
    pub(super) fn explain_frames(&self, frames: &[FrameId]) -> String {
        let births = self.births.as_ref().map(|births| births.of_frames(frames));
        format!(
            "leak: {} to nobody{}",
            counted(
                frames.len() as u64,
                "page of host memory belongs",
                "pages of host memory belong"
            ),
            births.unwrap_or_default()
        )
    }
}
