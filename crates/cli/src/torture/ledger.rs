//! What every word must hold: the ledger of versions, and the one rule that judges a value.
//!
//! One word per 64 bytes counts. It has exactly one writer, its *owner*, which stores versions
//! 1, 2, 3 … and never an older one again, whatever happens to the memory. Next to the versions the
//! word names its own place, so that a page that turns up elsewhere is noticed.
//!
//! ```text
//!   63      56 55          38 37    32 31                  0
//!  │ area + 1 │     page     │  slot  │       version       │      all zeros: no content
//! ```

use core::sync::atomic::{AtomicU32, Ordering};

/// Counted words per page.
pub(super) const SLOTS: u32 = 64;
/// Bytes from one counted word to the next.
pub(super) const STRIDE: u64 = 64;
/// Most areas that a word can name.
pub(super) const AREAS: usize = 255;
/// Most pages of an area that a word can name.
pub(super) const PAGES: u32 = 1 << 18;

/// The place of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) area: u8,
    pub(super) page: u32,
    pub(super) slot: u32,
}

impl Tag {
    /// The word's content at `version`.
    pub(super) fn raw(self, version: u32) -> u64 {
        self.bits() << 32 | u64::from(version)
    }

    fn bits(self) -> u64 {
        (u64::from(self.area) + 1) << 24 | u64::from(self.page) << 6 | u64::from(self.slot)
    }

    /// The version in `raw`: 0 for no content, `None` for what was never written here.
    pub(super) fn version(self, raw: u64) -> Option<u32> {
        let version = u32::try_from(raw & u64::from(u32::MAX)).unwrap_or(0);
        match raw {
            0 => Some(0),
            _ if raw >> 32 == self.bits() && version != 0 => Some(version),
            _ => None,
        }
    }
}

/// What is known about one word.
#[derive(Debug, Default)]
pub(super) struct Word {
    /// It holds at least this version, unless its content is being destroyed. 0: it may be empty.
    floor: AtomicU32,
    /// The latest version that its owner has begun to write.
    ceiling: AtomicU32,
    /// Versions up to this one were destroyed and must not come back.
    burnt: AtomicU32,
}

/// What was known before a word was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) floor: u32,
    pub(super) burnt: u32,
}

impl Word {
    pub(super) fn known(&self) -> Known {
        Known {
            floor: self.floor.load(Ordering::SeqCst),
            burnt: self.burnt.load(Ordering::SeqCst),
        }
    }

    pub(super) fn ceiling(&self) -> u32 {
        self.ceiling.load(Ordering::SeqCst)
    }

    /// The owner is about to write `version`, or has been refused and takes that back.
    pub(super) fn announce(&self, version: u32) {
        self.ceiling.store(version, Ordering::SeqCst);
    }

    /// The owner has written `version`.
    pub(super) fn wrote(&self, version: u32) {
        self.floor.store(version, Ordering::SeqCst);
    }

    /// The content is about to be destroyed, with nobody accessing it. Where old content may turn
    /// up again (see the module's page on events), it is not burnt.
    pub(super) fn destroy(&self, burn: Burn) {
        self.floor.store(0, Ordering::SeqCst);
        if burn == Burn::Yes {
            self.burnt.store(self.ceiling(), Ordering::SeqCst);
        }
    }

    /// The destruction did not happen.
    pub(super) fn restore(&self, known: Known) {
        self.burnt.store(known.burnt, Ordering::SeqCst);
        // The owner may have written since.
        self.floor.fetch_max(known.floor, Ordering::SeqCst);
    }
}

/// Whether destroyed versions may come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Burn {
    Yes,
    No,
}

/// How much of the rule holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// All of it.
    Strict,
    /// The content is being destroyed: any version that was ever written, or none.
    Loose,
}

/// What is wrong with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It was never written here.
    Bytes,
    /// It is older than what was written before the read began, or missing.
    Old,
    /// It was destroyed before the read began.
    Burnt,
}

/// Judges `raw`, read between `known` and `ceiling`; returns its version.
pub(super) fn judge(
    tag: Tag,
    raw: u64,
    known: Known,
    ceiling: u32,
    trust: Trust,
) -> Result<u32, Wrong> {
    let version = tag.version(raw).ok_or(Wrong::Bytes)?;
    if version > ceiling {
        return Err(Wrong::Bytes);
    }
    if trust == Trust::Loose {
        return Ok(version);
    }
    if version < known.floor {
        return Err(Wrong::Old);
    }
    if version != 0 && version <= known.burnt {
        return Err(Wrong::Burnt);
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag {
        area: 3,
        page: 700,
        slot: 63,
    };

    fn strict(raw: u64, floor: u32, burnt: u32, ceiling: u32) -> Result<u32, Wrong> {
        judge(TAG, raw, Known { floor, burnt }, ceiling, Trust::Strict)
    }

    #[test]
    fn word_names_its_place_and_no_other_does() {
        assert_eq!(TAG.version(TAG.raw(9)), Some(9));
        assert_eq!(TAG.version(0), Some(0));
        assert_eq!(TAG.version(9), None);
        let others = [
            Tag { area: 4, ..TAG },
            Tag { page: 701, ..TAG },
            Tag { slot: 62, ..TAG },
        ];
        for other in others {
            assert_eq!(other.version(TAG.raw(9)), None);
        }
    }

    #[test]
    fn value_lies_between_what_was_written_and_what_is_being_written() {
        assert_eq!(strict(TAG.raw(5), 5, 0, 6), Ok(5));
        assert_eq!(strict(TAG.raw(6), 5, 0, 6), Ok(6));
        assert_eq!(strict(TAG.raw(4), 5, 0, 6), Err(Wrong::Old));
        assert_eq!(strict(0, 5, 0, 6), Err(Wrong::Old));
        assert_eq!(strict(TAG.raw(7), 5, 0, 6), Err(Wrong::Bytes));
    }

    #[test]
    fn destroyed_content_may_not_come_back_but_what_was_written_meanwhile_may_stay() {
        let word = Word::default();
        word.announce(5);
        word.wrote(5);
        word.destroy(Burn::Yes);
        word.announce(6);
        let Known { floor, burnt } = word.known();
        assert_eq!(strict(0, floor, burnt, 6), Ok(0));
        assert_eq!(strict(TAG.raw(6), floor, burnt, 6), Ok(6));
        assert_eq!(strict(TAG.raw(5), floor, burnt, 6), Err(Wrong::Burnt));
        let loose = judge(TAG, TAG.raw(5), word.known(), 6, Trust::Loose);
        assert_eq!(loose, Ok(5));
    }

    #[test]
    fn destruction_that_failed_leaves_the_rule_as_it_was() {
        let word = Word::default();
        word.announce(5);
        word.wrote(5);
        let before = word.known();
        word.destroy(Burn::Yes);
        word.restore(before);
        assert_eq!(word.known(), before);
    }
}
