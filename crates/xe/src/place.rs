//! Where the pages of a fault should be. Pure: it looks at what it is given and changes nothing.

use gpusvm::addr::PAGE_64K;

/// What is known about a fault when its pages have to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The range's memory is of a kind that can move.
    pub migratable: bool,
    /// Bytes of the range.
    pub bytes: u64,
    /// Migrations that this fault may still try.
    pub migrations_left: u32,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Migrate to device memory, then map.
    Device,
    /// Map the pages where they are.
    AsTheyAre,
}

/// Ranges of 64 KiB and more move to the device, once per fault; smaller ones stay: their copy is
/// worth less than its bookkeeping (a 4 KiB move costs 18 times the copy, `livehost.md` section 5).
#[must_use]
pub const fn decide(question: &Question) -> Place {
    if question.migratable && question.bytes >= PAGE_64K && question.migrations_left > 0 {
        Place::Device
    } else {
        Place::AsTheyAre
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOVABLE: Question = Question {
        migratable: true,
        bytes: PAGE_64K,
        migrations_left: 1,
    };

    #[test]
    fn movable_ranges_of_64k_move_once() {
        assert_eq!(decide(&MOVABLE), Place::Device);
        assert_eq!(
            decide(&Question {
                migrations_left: 0,
                ..MOVABLE
            }),
            Place::AsTheyAre
        );
    }

    #[test]
    fn small_and_immovable_ranges_stay() {
        assert_eq!(
            decide(&Question {
                bytes: 4096,
                ..MOVABLE
            }),
            Place::AsTheyAre
        );
        assert_eq!(
            decide(&Question {
                migratable: false,
                ..MOVABLE
            }),
            Place::AsTheyAre
        );
    }
}
