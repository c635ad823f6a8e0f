//! What may be read: versions of every word, and what is happening to every page.
//!
//! As in torture ([`ledger`](crate::torture)), but here nothing is lost to chance: whoever looks, looks
//! between two steps of everybody else.
//!
//! ```text
//!   owner:    ceiling = 6 ── store 6 ── floor = 6
//!   reader:   floor? ── load v ── ceiling?       floor <= v <= ceiling, and v > burnt
//! ```
//!
//! An access during which its page changed is judged loosely: its value must be one that was written
//! to that word. An access during which something failed on purpose may be refused.

use core::ops::Range;

use crate::explore::plan::{PAGES_MAX, WORDS};

/// What is happening to a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Flux {
    /// Nothing: content stays, accesses succeed.
    #[default]
    Stable,
    /// Content stays or goes, accesses may be refused.
    Changing,
}

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    floor: u32,
    ceiling: u32,
    burnt: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct PageState {
    flux: Flux,
    epoch: u32,
    words: [Word; WORDS],
    /// Additions to its counter.
    added: u64,
}

/// All words.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pages: [PageState; PAGES_MAX as usize],
    /// Failures so far because of which an access may be refused.
    pub(super) excuses: u32,
}

/// An access that has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) page: u32,
    pub(super) slot: usize,
    flux: Flux,
    epoch: u32,
    floor: u32,
    /// Excuses when it began.
    excuses: u32,
    /// Latest version that may be found, where later ones are not to be seen.
    latest: Option<u32>,
}

/// What an operation does to content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Destroys,
    Keeps,
    /// It stays or goes, word by word, until the page is stored to.
    GivesUp,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    /// Refused: nothing has happened.
    Refused,
}

impl Ledger {
    fn page(&self, page: u32) -> &PageState {
        &self.pages[page as usize]
    }

    fn word_mut(&mut self, look: &Look) -> &mut Word {
        &mut self.pages[look.page as usize].words[look.slot]
    }

    /// An access begins.
    pub(super) fn begin(&self, page: u32, slot: usize) -> Look {
        let state = self.page(page);
        Look {
            page,
            slot,
            flux: state.flux,
            epoch: state.epoch,
            floor: state.words[slot].floor,
            excuses: self.excuses,
            latest: None,
        }
    }

    /// Nothing that is stored from now on may be found.
    pub(super) fn seal(&self, look: &mut Look) {
        look.latest = Some(self.page(look.page).words[look.slot].ceiling);
    }

    /// Whether somebody has stored to a word, or tried to.
    pub(super) fn is_used(&self, page: u32, slot: usize) -> bool {
        self.page(page).words[slot].ceiling > 0
    }

    /// Whether the page was left alone since the access began.
    pub(super) fn is_strict(&self, look: &Look) -> bool {
        look.flux == Flux::Stable && self.page(look.page).epoch == look.epoch
    }

    /// A load has given `value`.
    ///
    /// # Errors
    /// Why that cannot be.
    pub(super) fn loaded(&self, look: &Look, value: u64) -> Result<(), String> {
        let word = self.page(look.page).words[look.slot];
        let strict = self.is_strict(look);
        let wrong = |what: &str, why: String| {
            Err(format!(
                "{what}: page {} word {} {why}",
                look.page, look.slot
            ))
        };
        let floor = look.floor;
        if value == 0 {
            return if strict && floor > 0 {
                wrong(
                    "lost write",
                    format!("is empty, version {floor} was stored"),
                )
            } else {
                Ok(())
            };
        }
        let Some(version) = version(look.page, look.slot, value) else {
            let why = format!("holds {value:#x}, which belongs elsewhere");
            return wrong("wrong bytes", why);
        };
        let holds = |why: &str| format!("holds version {version}, {why}");
        if version > word.ceiling {
            return wrong("wrong bytes", holds("which nobody stored"));
        }
        if look.latest.is_some_and(|latest| version > latest) {
            return wrong("not apart", holds("which was stored after the fork"));
        }
        if strict && version < floor {
            return wrong("lost write", holds(&format!("{floor} was stored")));
        }
        if strict && version <= word.burnt {
            return wrong("stale", holds("which was destroyed"));
        }
        Ok(())
    }

    /// The owner of a word is about to store its next version: the value.
    pub(super) fn announce(&mut self, look: &Look) -> u64 {
        let word = self.word_mut(look);
        word.ceiling += 1;
        let version = word.ceiling;
        value(look.page, look.slot, version)
    }

    /// What was announced has been stored.
    pub(super) fn stored(&mut self, look: &Look) {
        if self.is_strict(look) {
            let word = self.word_mut(look);
            word.floor = word.ceiling;
        }
    }

    /// One was added to the counter of a page.
    pub(super) fn added(&mut self, page: u32) {
        self.pages[page as usize].added += 1;
    }

    /// Whether something was added to the counter of a page.
    pub(super) fn counts(&self, page: u32) -> bool {
        self.page(page).added > 0
    }

    /// The counter of a page was found to be `found`, when nobody adds any more.
    ///
    /// # Errors
    /// That this is not what was added.
    pub(super) fn counted(&self, page: u32, found: u64) -> Result<(), String> {
        let added = self.page(page).added;
        if found == added {
            Ok(())
        } else {
            Err(format!(
                "lost addition: the counter of page {page} is {found}, {added} were added"
            ))
        }
    }

    /// An access was refused.
    ///
    /// # Errors
    /// Why that cannot be.
    pub(super) fn refused(&self, look: &Look, who: &str) -> Result<(), String> {
        if self.is_strict(look) && look.excuses == self.excuses {
            Err(format!(
                "{who} was refused page {}, which is mapped and unchanged",
                look.page
            ))
        } else {
            Ok(())
        }
    }

    /// The pages are about to change. False where some change already.
    pub(super) fn change(&mut self, pages: &Range<u32>, effect: Effect) -> bool {
        if pages
            .clone()
            .any(|page| self.page(page).flux != Flux::Stable)
        {
            return false;
        }
        for page in pages.clone() {
            let state = &mut self.pages[page as usize];
            state.flux = Flux::Changing;
            state.epoch += 1;
            for word in &mut state.words {
                match effect {
                    Effect::Destroys => {
                        word.burnt = word.burnt.max(word.floor);
                        word.floor = 0;
                    }
                    Effect::GivesUp => word.floor = 0,
                    Effect::Keeps => {}
                }
            }
        }
        true
    }

    /// The change is over.
    pub(super) fn changed(&mut self, pages: &Range<u32>, effect: Effect, ended: Ended) {
        for page in pages.clone() {
            let state = &mut self.pages[page as usize];
            state.flux = Flux::Stable;
            state.epoch += 1;
            if effect == Effect::Destroys && ended == Ended::Refused {
                // What was there is there, but stores in between may have come on top.
                state.words.iter_mut().for_each(|word| word.burnt = 0);
            }
        }
    }
}

/// What a word holds at a version.
fn value(page: u32, slot: usize, version: u32) -> u64 {
    let slot = u64::try_from(slot).unwrap_or(0);
    u64::from(page + 1) << 40 | slot << 32 | u64::from(version)
}

fn version(page: u32, slot: usize, raw: u64) -> Option<u32> {
    let version = u32::try_from(raw & u64::from(u32::MAX)).ok()?;
    (value(page, slot, version) == raw && version > 0).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores once; returns the value.
    fn store(ledger: &mut Ledger, page: u32) -> u64 {
        let look = ledger.begin(page, 1);
        let value = ledger.announce(&look);
        ledger.stored(&look);
        value
    }

    #[test]
    fn what_was_stored_must_be_read_and_nothing_else() {
        let mut ledger = Ledger::default();
        let first = store(&mut ledger, 3);
        let second = store(&mut ledger, 3);
        let look = ledger.begin(3, 1);
        assert_eq!(ledger.loaded(&look, second), Ok(()));
        for wrong in [0, first, second + 1, second ^ 1 << 40] {
            assert!(ledger.loaded(&look, wrong).is_err(), "{wrong:#x}");
        }
    }

    #[test]
    fn additions_are_counted() {
        let mut ledger = Ledger::default();
        assert!(!ledger.counts(2));
        ledger.added(2);
        ledger.added(2);
        assert!(ledger.counts(2));
        assert_eq!(ledger.counted(2, 2), Ok(()));
        assert!(ledger.counted(2, 1).is_err());
    }

    #[test]
    fn content_that_was_given_up_may_be_there_and_what_is_stored_later_must() {
        let mut ledger = Ledger::default();
        let old = store(&mut ledger, 0);
        assert!(ledger.change(&(0..1), Effect::GivesUp));
        ledger.changed(&(0..1), Effect::GivesUp, Ended::Done);
        let look = ledger.begin(0, 1);
        assert_eq!(ledger.loaded(&look, 0), Ok(()));
        assert_eq!(ledger.loaded(&look, old), Ok(()));
        let new = store(&mut ledger, 0);
        let look = ledger.begin(0, 1);
        assert_eq!(ledger.loaded(&look, new), Ok(()));
        assert!(ledger.loaded(&look, 0).is_err() && ledger.loaded(&look, old).is_err());
    }

    #[test]
    fn destroyed_content_does_not_come_back() {
        let mut ledger = Ledger::default();
        let old = store(&mut ledger, 0);
        let across = ledger.begin(0, 1);
        assert!(ledger.change(&(0..2), Effect::Destroys));
        assert!(!ledger.change(&(1..2), Effect::Keeps), "one at a time");
        assert_eq!(ledger.refused(&across, "a device"), Ok(()));
        ledger.changed(&(0..2), Effect::Destroys, Ended::Done);
        let look = ledger.begin(0, 1);
        assert_eq!(ledger.loaded(&look, 0), Ok(()));
        assert!(ledger.loaded(&look, old).is_err());
        assert_eq!(ledger.loaded(&across, old), Ok(()), "it began before");
        assert!(ledger.refused(&look, "a device").is_err());
    }
}
