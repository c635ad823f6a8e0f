//! The fault ring: bounded, and nothing is ever lost. A unit that finds it full waits; a unit
//! whose fault is in it waits for the answer.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use gpusvm_abi::bus::Park;
use gpusvm_abi::fault::{FaultRecord, FaultResponse};
use lock_api::{Mutex, RawMutex};

const WAITING: u32 = 0;
const REPLAY: u32 = 1;
const REFUSE: u32 = 2;

/// The ring, and one answer word per unit.
#[derive(Debug)]
pub(crate) struct FaultRing<R: RawMutex> {
    records: Mutex<R, VecDeque<FaultRecord>>,
    room: usize,
    /// Bumped when a record comes or goes: what the service and full units sleep on.
    changed: AtomicU32,
    answers: Vec<AtomicU32>,
}

impl<R: RawMutex> FaultRing<R> {
    pub(crate) fn new(room: usize, units: usize) -> Self {
        Self {
            records: Mutex::new(VecDeque::with_capacity(room)),
            room,
            changed: AtomicU32::new(0),
            answers: (0..units).map(|_| AtomicU32::new(WAITING)).collect(),
        }
    }

    /// Puts the fault of `unit` in and waits for its answer.
    pub(crate) fn report(
        &self,
        unit: usize,
        mut record: FaultRecord,
        park: &dyn Park,
    ) -> FaultResponse {
        record.ticket = u64::try_from(unit).unwrap_or(u64::MAX);
        let answer = &self.answers[unit];
        answer.store(WAITING, Ordering::Release);
        loop {
            let seen = self.changed.load(Ordering::Acquire);
            if self.push(record) {
                break;
            }
            park.wait(&self.changed, seen, None);
        }
        self.announce(park);
        loop {
            match answer.load(Ordering::Acquire) {
                WAITING => park.wait(answer, WAITING, None),
                REPLAY => return FaultResponse::Replay,
                _ => return FaultResponse::Refuse,
            }
        }
    }

    fn push(&self, record: FaultRecord) -> bool {
        let mut records = self.records.lock();
        let fits = records.len() < self.room;
        if fits {
            records.push_back(record);
        }
        fits
    }

    pub(crate) fn pop(&self, park: &dyn Park) -> Option<FaultRecord> {
        let record = self.records.lock().pop_front()?;
        self.announce(park);
        Some(record)
    }

    /// Answers a record and wakes its unit by `park`. One with a ticket that no unit has is ignored.
    pub(crate) fn answer(
        &self,
        record: &FaultRecord,
        response: FaultResponse,
        park: Option<&dyn Park>,
    ) {
        let unit = usize::try_from(record.ticket).ok();
        let Some(answer) = unit.and_then(|unit| self.answers.get(unit)) else {
            return;
        };
        let word = match response {
            FaultResponse::Replay => REPLAY,
            FaultResponse::Refuse => REFUSE,
        };
        answer.store(word, Ordering::Release);
        if let Some(park) = park {
            park.wake(answer);
        }
    }

    /// Sleeps until a record is there or [`announce`](Self::announce) is called.
    pub(crate) fn wait(&self, park: &dyn Park) {
        let seen = self.changed.load(Ordering::Acquire);
        if self.records.lock().is_empty() {
            park.wait(&self.changed, seen, None);
        }
    }

    pub(crate) fn announce(&self, park: &dyn Park) {
        self.changed.fetch_add(1, Ordering::Release);
        park.wake(&self.changed);
    }
}
