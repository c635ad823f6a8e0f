//! Who waits, who can run, and what time it is.

use gpusvm::seam::env::Work;

use crate::sched::fail::FailureKind;
use crate::sched::lock_word::HOST;
use crate::sched::pick::{ACTORS_MAX, Candidates, What};
use crate::sched::world::{Actor, Block, NEVER, State, World};

impl World {
    /// Chooses who runs when the running actor cannot.
    pub(super) fn pass_on(&mut self) {
        self.next = None;
        if self.state != State::Running {
            return;
        }
        while self.ready == 0 && self.earliest != NEVER && self.unfinished != 0 {
            self.now = self.now.max(self.earliest);
            self.wake_sleepers();
        }
        let first = if self.current == HOST {
            0
        } else {
            self.current + 1
        };
        let among = Candidates {
            ready: self.ready,
            first: u32::try_from(first % ACTORS_MAX).unwrap_or(0),
        };
        self.streak = 0;
        match among.count() {
            0 if self.unfinished != 0 => {
                let text = self.describe_waiting("no actor can run and no deadline lies ahead");
                self.fail(FailureKind::Deadlock, text);
            }
            0 => {}
            1 => self.next = Some(among.actor(0)),
            n => self.next = Some(self.pick_actor(n, What::Next, among)),
        }
    }

    /// Takes the running actor off until it is woken or `deadline` comes.
    pub(super) fn block(&mut self, block: Block, deadline: u64) {
        let current = self.current;
        self.actors[current].block = Some(block);
        self.actors[current].deadline = deadline;
        self.ready &= !(1 << current);
        self.blocked |= 1 << current;
        if let Block::Lock(..) = block {
            self.lock_waiters |= 1 << current;
        }
        self.earliest = self.earliest.min(deadline);
        self.pass_on();
    }

    fn unblock(&mut self, actor: usize) {
        self.actors[actor].block = None;
        self.actors[actor].deadline = NEVER;
        self.ready |= 1 << actor;
        self.blocked &= !(1 << actor);
        self.lock_waiters &= !(1 << actor);
    }

    /// Whether there were any `among` these blocked ones.
    fn unblock_all(&mut self, among: u64, wakes: impl Fn(&Actor) -> bool) -> bool {
        let (mut any, mut rest) = (false, among);
        while rest != 0 {
            let actor = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if wakes(&self.actors[actor]) {
                self.unblock(actor);
                any = true;
            }
        }
        if any {
            let deadlines = self.actors.iter().map(|actor| actor.deadline);
            self.earliest = deadlines.min().unwrap_or(NEVER);
        }
        any
    }

    pub(super) fn wake_sleepers(&mut self) {
        let now = self.now;
        self.unblock_all(self.blocked, |actor| actor.deadline <= now);
    }

    /// Wakes whoever waits for the word at `address`; whether anybody did.
    pub(super) fn wake_word(&mut self, address: usize) -> bool {
        let waits =
            |actor: &Actor| matches!(actor.block, Some(Block::Word(at, _)) if at == address);
        self.unblock_all(self.blocked, waits)
    }

    pub(super) fn wake_lock(&mut self, address: usize) {
        let waits =
            |actor: &Actor| matches!(actor.block, Some(Block::Lock(at, _)) if at == address);
        self.unblock_all(self.lock_waiters, waits);
    }

    /// Queues work, once, and wakes workers.
    pub(super) fn defer(&mut self, work: Work) {
        if !self.deferred.contains(&work) {
            self.deferred.push(work);
        }
        let idles = |actor: &Actor| matches!(actor.block, Some(Block::Idle));
        self.unblock_all(self.blocked, idles);
    }

    /// The running actor is done.
    pub(super) fn finish(&mut self) {
        let bit = 1 << self.current;
        self.ready &= !bit;
        self.unfinished &= !bit;
        if self.is_live() {
            self.step();
        }
        self.pass_on();
    }
}
