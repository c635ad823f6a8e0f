//! Bounded search through all worlds of a small scenario.

use crate::sched::pick::What;

/// One choice on the way to the present world.
#[derive(Clone, Copy, Debug)]
struct Frame {
    choice: u32,
    n: u32,
    what: What,
}

impl Frame {
    /// Whether a picked answer takes the running actor off.
    fn preempts(self) -> bool {
        self.what == What::Stay && self.choice != 0
    }
}

/// Depth-first search: every world with at most so many preemptions, each once.
#[derive(Clone, Debug)]
pub struct Dfs {
    path: Vec<Frame>,
    at: usize,
    preemptions_max: u32,
}

impl Dfs {
    /// Starts a search of worlds with at most `preemptions_max` preemptions.
    #[must_use]
    pub const fn new(preemptions_max: u32) -> Self {
        Self {
            path: Vec::new(),
            at: 0,
            preemptions_max,
        }
    }

    /// # Panics
    /// When a world asks other questions than it did before: it is not deterministic.
    pub(super) fn pick(&mut self, n: u32, what: What) -> u32 {
        if let Some(frame) = self.path.get(self.at) {
            assert_eq!((frame.n, frame.what), (n, what), "the world has changed");
        } else {
            self.path.push(Frame { choice: 0, n, what });
        }
        self.at += 1;
        self.path[self.at - 1].choice
    }

    /// Turns to the next world; `false` when there is none left.
    #[must_use]
    pub fn advance(&mut self) -> bool {
        self.path.truncate(self.at);
        self.at = 0;
        let mut before = self.path.iter().filter(|frame| frame.preempts()).count();
        while let Some(mut frame) = self.path.pop() {
            before -= usize::from(frame.preempts());
            frame.choice += 1;
            let spent = before + usize::from(frame.preempts());
            if frame.choice < frame.n && spent <= self.preemptions_max as usize {
                self.path.push(frame);
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(preemptions_max: u32, questions: &[(u32, What)]) -> u32 {
        let mut dfs = Dfs::new(preemptions_max);
        let mut worlds = 0;
        loop {
            for (n, what) in questions {
                let _answer = dfs.pick(*n, *what);
            }
            worlds += 1;
            if !dfs.advance() {
                return worlds;
            }
        }
    }

    #[test]
    fn every_combination_is_seen_once() {
        assert_eq!(count(9, &[(2, What::Data), (3, What::Next)]), 6);
        assert_eq!(count(9, &[]), 1);
    }

    #[test]
    fn preemptions_are_bounded() {
        let questions = [(2, What::Stay); 3];
        assert_eq!(count(0, &questions), 1);
        assert_eq!(count(1, &questions), 4);
        assert_eq!(count(3, &questions), 8);
    }
}
