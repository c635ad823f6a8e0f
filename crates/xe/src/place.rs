//! Where the pages of a fault should be. Pure: it looks at what it is given and changes nothing.

use gpusvm::addr::PAGE_64K;

use crate::atomics::Need;

/// What is known about a fault when its pages have to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The range's memory is of a kind that can move.
    pub migratable: bool,
    /// Bytes of the range.
    pub bytes: u64,
    /// Migrations that this fault may still try.
    pub migrations_left: u32,
    /// What the pages have to be.
    pub need: Need,
    /// Some pages are on a device, as far as anybody knows; asked for exclusive pages only.
    pub on_device: bool,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Migrate to device memory, then map.
    Device,
    /// Map the pages where they are.
    AsTheyAre,
    /// Take them away from the CPU, then map.
    Exclusive,
}

/// Ranges of 64 KiB and more move to the device, once per fault; smaller ones stay: their copy is
/// worth less than its bookkeeping (a 4 KiB move costs 18 times the copy, `livehost.md` section 5).
/// What must be on the device moves whatever its size.
#[must_use]
pub const fn decide(question: &Question) -> Place {
    let may_move = question.migratable && question.migrations_left > 0;
    match question.need {
        Need::Access if may_move && question.bytes >= PAGE_64K => Place::Device,
        Need::DeviceMemory if may_move => Place::Device,
        Need::Exclusive if !question.on_device => Place::Exclusive,
        Need::Access | Need::DeviceMemory | Need::Exclusive | Need::InPlace => Place::AsTheyAre,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOVABLE: Question = Question {
        migratable: true,
        bytes: PAGE_64K,
        migrations_left: 1,
        need: Need::Access,
        on_device: false,
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
    fn atomics_decide_where_small_ranges_are() {
        let small = |need| Question {
            bytes: 4096,
            need,
            ..MOVABLE
        };
        assert_eq!(decide(&small(Need::DeviceMemory)), Place::Device);
        let alone = small(Need::Exclusive);
        assert_eq!(decide(&alone), Place::Exclusive);
        let there = Question {
            on_device: true,
            ..alone
        };
        assert_eq!(decide(&there), Place::AsTheyAre);
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
