//! Processor time that this process has used: it says what work costs, whoever else is at work.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time of all threads so far.
#[must_use]
pub(crate) fn used() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The result of `act`, and the processor time of the process meanwhile.
pub(crate) fn taken<R>(act: impl FnOnce() -> R) -> (R, Duration) {
    let before = used();
    let result = act();
    (result, used().saturating_sub(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_processor_time() {
        let (sum, time) = taken(|| (0..20_000_000_u64).fold(0, |sum: u64, n| sum ^ (n * n)));
        assert!(sum > 0 && time > Duration::ZERO);
    }
}
