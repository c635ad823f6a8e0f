//! Brackets: address-space calls of this process, seen before they happen.
//!
//! libc's own system-call sites are patched (`sys::patch`), so that also `free()` and a thread's
//! exit come by here. A call that touches watched memory becomes:
//!
//! ```text
//!  announce ─ wait for travels ─┬─ bring home ──────┬─ start ─ suspend ─ CALL ─ end
//!                               └─ recall, to drop ─┘
//! ```
//!
//! *Announce*: no migration begins in the span any more, no mapping in it is watched anew, and no
//! other call that overlaps it comes in between: two at a time would undo each other's
//! registrations. A call that destroys content (munmap,
//! MADV_DONTNEED) recalls the device pages and lets them go when the call has succeeded; a call
//! that keeps it (mremap, mprotect, mlock) has them brought home first, so the system's own tables
//! tell the whole truth. *Suspend* takes the span out of userfaultfd, so that the call raises no event
//! and sees whole mappings: an event that does arrive is by definition late.
//!
//! This code runs on threads of the process, with signals blocked, on a stack of the runtime's
//! own, because the thread's own stack may be memory that can migrate.

use core::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use gpusvm::addr::{HostSpan, HostVa, PAGE};
use gpusvm::event::HomeCause;
use gpusvm::seam::mm::InvalidateReason;

use crate::level::{BracketChoice, BracketLevel, FaultLevel, OpenError};
use crate::residency::{Piece, everything};
use crate::space::LiveSpace;
use crate::sys::heap;
use crate::sys::patch::{self, BracketHook, Call, PatchError, Patches, SysCall};
use crate::sys::process_lock::{Freed, ProcessLock};
use crate::sys::symbols;
use crate::watch::Suspended;

/// The space that brackets work for. The one piece of process-wide state: patched code has no
/// other way to find it.
struct Service {
    space: ProcessLock<Weak<LiveSpace>>,
    patches: ProcessLock<Option<Patches>>,
}

static SERVICE: Service = Service {
    space: ProcessLock::new(Weak::new()),
    patches: ProcessLock::new(None),
};

/// What children must find free.
pub(crate) fn process_locks() -> [&'static dyn Freed; 2] {
    [&SERVICE.space, &SERVICE.patches]
}

/// Sees to it that calls come by here as far as `choice` asks for it and the process allows it.
///
/// # Errors
/// [`OpenError::AlreadyOpen`], or the reason why what `choice` insists on cannot be had.
pub(crate) fn attach(choice: BracketChoice, faults: FaultLevel) -> Result<BracketLevel, OpenError> {
    if SERVICE.space.lock().strong_count() > 0 {
        return Err(OpenError::AlreadyOpen);
    }
    if !faults.has_uffd() {
        if choice == BracketChoice::Events {
            return Err(OpenError::NoEvents(faults));
        }
        // The heap's own changes come by this way.
        patch::lead_calls(&SERVICE).map_err(OpenError::CannotPatch)?;
    }
    match choice {
        BracketChoice::Events => Ok(BracketLevel::Events { why: None }),
        BracketChoice::Symbols => lead_symbols(None)?.ok_or(OpenError::NoSymbols),
        BracketChoice::Patched => patch_sites()
            .map(|()| BracketLevel::Patched)
            .map_err(OpenError::CannotPatch),
        BracketChoice::Best => match patch_sites() {
            Ok(()) => Ok(BracketLevel::Patched),
            Err(why) => Ok(lead_symbols(Some(why.clone()))?.unwrap_or_else(|| {
                if faults.has_uffd() {
                    BracketLevel::Events { why: Some(why) }
                } else {
                    BracketLevel::Owner { why }
                }
            })),
        },
    }
}

fn patch_sites() -> Result<(), PatchError> {
    let mut patches = SERVICE.patches.lock();
    if patches.is_none() {
        *patches = Some(patch::install(&SERVICE)?);
    }
    Ok(())
}

/// Lets the program's symbols lead here, if there are any.
fn lead_symbols(why: Option<PatchError>) -> Result<Option<BracketLevel>, OpenError> {
    if !symbols::are_exported() {
        return Ok(None);
    }
    patch::lead_calls(&SERVICE).map_err(OpenError::CannotPatch)?;
    Ok(Some(BracketLevel::Symbols { why }))
}

/// Holds one of the locks of the whole process while `work` runs; and whether somebody holds one.
#[cfg(test)]
pub(crate) mod held {
    use super::SERVICE;

    pub(crate) fn space<R>(work: impl FnOnce() -> R) -> R {
        let _held = SERVICE.space.lock();
        work()
    }

    pub(crate) fn patches<R>(work: impl FnOnce() -> R) -> R {
        let _held = SERVICE.patches.lock();
        work()
    }

    pub(crate) fn any() -> bool {
        SERVICE.space.is_held() || SERVICE.patches.is_held()
    }
}

/// From now on brackets work for `space`.
pub(crate) fn enter_service(space: &Arc<LiveSpace>) {
    *SERVICE.space.lock() = Arc::downgrade(space);
}

/// Brackets work for nobody. The sites stay patched: the next space uses them.
pub(crate) fn forget_space() {
    *SERVICE.space.lock() = Weak::new();
}

/// The space that brackets work for.
pub(crate) fn current_space() -> Option<Arc<LiveSpace>> {
    SERVICE.space.lock().upgrade()
}

/// Brackets work for nobody; the system-call sites get their own bytes back.
pub(crate) fn leave_service() {
    *SERVICE.space.lock() = Weak::new();
    patch::lead_no_calls();
    let patches = SERVICE.patches.lock().take();
    if let Some(patches) = patches {
        patches.restore();
    }
}

impl BracketHook for Service {
    fn call(&self, call: &SysCall) -> isize {
        match current_space() {
            Some(space) => space.bracket(call),
            None => call.raw(),
        }
    }
}

/// What a call does to the content of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Destroys it and the mapping.
    Unmap,
    /// The same, by a call that may well be refused: what is away comes home first, so that other
    /// threads find it meanwhile, and afterwards.
    Replace,
    /// Destroys it, the mapping stays.
    Clear,
    /// Keeps it; the mapping moves away.
    Move,
    /// Keeps it; rights change.
    Protect,
    /// Keeps it and wants all of it present, where it is.
    Populate,
}

impl Effect {
    const fn reason(self) -> InvalidateReason {
        match self {
            Self::Unmap | Self::Replace | Self::Move => InvalidateReason::Unmap,
            Self::Clear | Self::Populate => InvalidateReason::Clear,
            Self::Protect => InvalidateReason::ProtectVma,
        }
    }

    const fn destroys(self) -> bool {
        matches!(self, Self::Unmap | Self::Clear)
    }
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused,
}

impl Outcome {
    /// Advice goes over holes in its span, drops the content around them, and only then complains
    /// of them by `ENOMEM` (madvise(2)).
    const fn of(effect: Effect, result: isize) -> Self {
        let past_holes = matches!(effect, Effect::Clear) && result == -ENOMEM;
        if result < 0 && !past_holes {
            Self::Refused
        } else {
            Self::Done
        }
    }
}

/// What one system call is about to do: at most two spans.
pub(crate) fn effects(call: &SysCall) -> [Option<(HostSpan, Effect)>; 2] {
    let [a0, a1, a2, a3, a4, _] = call.args;
    let one = |effect| [span_of(a0, a1).map(|span| (span, effect)), None];
    let Some(nr) = call.call() else {
        return [None, None];
    };
    match nr {
        Call::Munmap => one(Effect::Unmap),
        Call::Mprotect | Call::PkeyMprotect => one(Effect::Protect),
        Call::Mlock | Call::Mlock2 => one(Effect::Populate),
        Call::Mlockall => [Some((everything(), Effect::Populate)), None],
        Call::Madvise => madvise_effect(a2).map_or([None, None], one),
        Call::Mmap => {
            let replaces = a3 & MAP_FIXED != 0 && a3 & MAP_FIXED_NOREPLACE != MAP_FIXED_NOREPLACE;
            match (replaces, a3 & MAP_ANONYMOUS != 0) {
                (false, _) => [None, None],
                (true, true) => one(Effect::Unmap),
                // The file may be none that can be mapped.
                (true, false) => one(Effect::Replace),
            }
        }
        Call::Mremap => {
            let fixed = a3 & MREMAP_FIXED != 0;
            let onto = if fixed { span_of(a4, a2) } else { None };
            [
                span_of(a0, a1).map(|s| (s, Effect::Move)),
                onto.map(|s| (s, Effect::Replace)),
            ]
        }
        Call::Brk => [
            patch::brk_shrinks(a0).map(|raw| (span(raw), Effect::Unmap)),
            None,
        ],
        Call::ProcessMadvise => {
            let effect = madvise_effect(a3);
            let hull = effect.and_then(|_| patch::iovec_hull(a1, a2));
            [hull.map(|raw| (span(raw), Effect::Move)), None]
        }
    }
}

/// Whether a call puts guards into memory.
fn installs_guards(call: &SysCall) -> bool {
    match call.call() {
        Some(Call::Madvise) => call.args[2] == GUARD_INSTALL,
        Some(Call::ProcessMadvise) => call.args[3] == GUARD_INSTALL,
        _ => false,
    }
}

const GUARD_INSTALL: usize = 102;
const ENOMEM: isize = 12;
const MAP_FIXED: usize = 0x10;
const MAP_ANONYMOUS: usize = 0x20;
const MAP_FIXED_NOREPLACE: usize = 0x10_0000;
const MREMAP_FIXED: usize = 2;

/// What an advice does to content; `None` where it neither changes it, nor needs it present, nor says
/// what children get of it.
fn madvise_effect(advice: usize) -> Option<Effect> {
    const DONTNEED: usize = 4;
    const FREE: usize = 8;
    const REMOVE: usize = 9;
    const POPULATE_READ: usize = 22;
    const POPULATE_WRITE: usize = 23;
    const DONTNEED_LOCKED: usize = 24;
    const COLLAPSE: usize = 25;
    // Children that wait for pages get none of memory that is wiped for them: see `fork`.
    const WIPE_ON_FORK: usize = 18;
    const KEEP_ON_FORK: usize = 19;
    match advice {
        WIPE_ON_FORK | KEEP_ON_FORK => Some(Effect::Protect),
        DONTNEED | FREE | DONTNEED_LOCKED | GUARD_INSTALL => Some(Effect::Clear),
        // It is for pages of files, and refused where pages may be away, but on the heap.
        REMOVE => Some(Effect::Populate),
        POPULATE_READ | POPULATE_WRITE | COLLAPSE => Some(Effect::Populate),
        _ => None,
    }
}

/// The pages of `[start, start + bytes)`; `None` for arguments that the system will refuse.
fn span_of(start: usize, bytes: usize) -> Option<HostSpan> {
    let start = HostVa::new(u64::try_from(start).ok()?);
    let bytes = u64::try_from(bytes).ok()?;
    let valid = bytes > 0 && start.is_aligned(PAGE) && start.get().checked_add(bytes).is_some();
    valid.then(|| HostSpan::at(start, bytes).align_outward(PAGE))
}

fn span(raw: core::ops::Range<u64>) -> HostSpan {
    HostSpan::new(HostVa::new(raw.start), HostVa::new(raw.end)).align_outward(PAGE)
}

fn spans_of(whats: &[(HostSpan, Effect)]) -> Vec<HostSpan> {
    whats.iter().map(|(span, _)| *span).collect()
}

impl LiveSpace {
    /// Runs one call inside its brackets and returns what the system answered.
    pub(crate) fn bracket(&self, call: &SysCall) -> isize {
        let whats = self.announce(effects(call));
        // What is not watched now stays so until the change ends.
        let watched: Vec<_> = whats
            .iter()
            .filter(|(span, _)| self.watch.is_watched(*span))
            .collect();
        if !watched.is_empty() && installs_guards(call) {
            self.guards.store(true, Ordering::Release);
        }
        let result = match &watched[..] {
            [first, second] => {
                self.bracket_span(**first, || self.bracket_span(**second, || call.raw()))
            }
            [only] => self.bracket_span(**only, || call.raw()),
            _ => call.raw(),
        };
        self.end_change(&spans_of(&whats));
        result
    }

    /// Announces `effects`, alone among overlapping changes, whether watched or not: they must not
    /// become so in the middle of the call. A mapping that moves must be whole: its span grows by
    /// all the pieces that arming cut.
    fn announce(&self, effects: [Option<(HostSpan, Effect)>; 2]) -> Vec<(HostSpan, Effect)> {
        let whole = |(span, effect)| match effect {
            Effect::Move => (self.watch.stretch(span), effect),
            _ => (span, effect),
        };
        let found = || -> Vec<_> { effects.into_iter().flatten().map(whole).collect() };
        loop {
            let whats = found();
            let spans = spans_of(&whats);
            self.begin_call(&spans);
            // What is announced cannot grow any more, but it may have grown before.
            if found() == whats {
                return whats;
            }
            self.end_change(&spans);
        }
    }

    /// One span's bracket around `raw`.
    fn bracket_span(&self, what: (HostSpan, Effect), raw: impl FnOnce() -> isize) -> isize {
        let (span, effect) = what;
        let pieces = self.clear_the_way(span, effect);
        let invalidation = self.notifiers.start(span, effect.reason());
        let suspended = self.watch.suspend(span);
        // Before and after, so that no look in between is remembered.
        self.remembered.forget();
        self.step();
        let result = raw();
        self.step();
        self.remembered.forget();
        let outcome = Outcome::of(effect, result);
        self.settle_call(span, effect, outcome, &suspended);
        self.notifiers.end(&self.env, invalidation);
        self.close_pieces(pieces, outcome);
        result
    }

    /// Nothing in the span travels, and nothing in it is away but what is returned: recalled, to be
    /// dropped.
    fn clear_the_way(&self, span: HostSpan, effect: Effect) -> Vec<Piece> {
        // Advice that drops private pages keeps those of the heap, which are a file's.
        let keeps = effect == Effect::Clear && heap::overlaps(span);
        if !effect.destroys() || keeps {
            self.bring_home(span, HomeCause::SpaceChange);
            return Vec::new();
        }
        self.recall_settled(span, |_any| Some(u64::MAX))
    }

    /// Adjusts the watch to what the call did.
    fn settle_call(&self, span: HostSpan, effect: Effect, outcome: Outcome, suspended: &Suspended) {
        match effect {
            Effect::Unmap | Effect::Replace if outcome == Outcome::Done => self.watch.forget(span),
            // The new place is watched when a device first uses it.
            Effect::Move if outcome == Outcome::Done => self.watch.forget(span),
            Effect::Clear if outcome == Outcome::Done => self.watch.resume(suspended),
            Effect::Protect | Effect::Populate => self.watch.resume(suspended),
            Effect::Unmap | Effect::Replace | Effect::Clear | Effect::Move => {
                self.watch.rearm(suspended);
            }
        }
    }

    /// Lets recalled pages go, or leaves them where they were if the call failed.
    fn close_pieces(&self, pieces: Vec<Piece>, outcome: Outcome) {
        if outcome == Outcome::Done {
            self.let_go(pieces);
            return;
        }
        // Calls that replace mappings may fail after they have unmapped what was there.
        let (kept, gone): (Vec<_>, Vec<_>) = pieces
            .into_iter()
            .partition(|piece| self.is_mapped(piece.span.start()));
        gone.iter().for_each(|piece| self.watch.forget(piece.span));
        self.let_go(gone);
        for piece in &kept {
            self.residency.lock().put_back(piece);
            self.arrived(piece.span, piece.shard);
        }
    }

    /// Whether something is mapped at `at`, as far as the system tells.
    fn is_mapped(&self, at: HostVa) -> bool {
        let found = self.procmap.query(at);
        found.is_ok_and(|found| found.is_some_and(|map| map.span.contains(at)))
    }
}

#[cfg(test)]
mod tests;
