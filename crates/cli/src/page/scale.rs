//! Scales of pictures: units, round steps, positions. Whole numbers only.

use std::fmt;

/// What a number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    /// So many of something.
    Count,
    /// Bytes.
    Bytes,
    /// Nanoseconds.
    Time,
}

/// A unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// As it is written; empty for counts.
    pub(super) name: &'static str,
    size: u64,
}

const fn unit(name: &'static str, size: u64) -> Unit {
    Unit { name, size }
}

const COUNTS: [Unit; 1] = [unit("", 1)];
const BYTES: [Unit; 3] = [
    unit("KiB", 1 << 10),
    unit("MiB", 1 << 20),
    unit("GiB", 1 << 30),
];
const TIMES: [Unit; 3] = [
    unit("\u{b5}s", 1_000),
    unit("ms", 1_000_000),
    unit("s", 1_000_000_000),
];

impl Quantity {
    /// The largest unit of which `n` has at least `least`, or the smallest.
    fn unit(self, n: u64, least: u64) -> Unit {
        let units: &[Unit] = match self {
            Self::Count => &COUNTS,
            Self::Bytes => &BYTES,
            Self::Time => &TIMES,
        };
        let fits = |unit: &&Unit| unit.size.saturating_mul(least) <= n;
        *units.iter().rev().find(fits).unwrap_or(&units[0])
    }

    /// `n` for a reader, with its unit.
    pub(super) const fn show(self, n: u64) -> Shown {
        Shown(self, n)
    }
}

/// A number with its unit, to at most one place after the point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown(Quantity, u64);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(quantity, n) = *self;
        let unit = quantity.unit(n, 1);
        let tenths = u128::from(n) * 10 / u128::from(unit.size);
        let (whole, tenth) = (tenths / 10, tenths % 10);
        write!(f, "{whole}")?;
        if tenth > 0 && whole < 100 {
            write!(f, ".{tenth}")?;
        }
        if !unit.name.is_empty() {
            write!(f, " {}", unit.name)?;
        }
        Ok(())
    }
}

/// An axis that starts at zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scale {
    /// What the axis is labelled in.
    pub(super) unit: Unit,
    /// Distance of its ticks.
    step: u64,
    /// Its end.
    top: u64,
}

impl Scale {
    /// An axis that ends at the first of at most `most` ticks that is not below `max`.
    pub(super) fn around(quantity: Quantity, max: u64, most: u64) -> Self {
        let rough = Self::until(quantity, max.max(1), most);
        let top = rough.top.div_ceil(rough.step).saturating_mul(rough.step);
        Self { top, ..rough }
    }

    /// An axis that ends at `end`, with at most `most` ticks after zero.
    pub(super) fn until(quantity: Quantity, end: u64, most: u64) -> Self {
        // Of the unit there are a few, so that ticks are whole numbers of it.
        let unit = quantity.unit(end, 3);
        let steps =
            (0..20).flat_map(|decade| [1, 2, 5].map(|n| n * 10_u64.pow(decade).min(1 << 60)));
        let step = steps
            .map(|step| step.saturating_mul(unit.size))
            .find(|step| end.div_ceil(*step) <= most)
            .unwrap_or(u64::MAX);
        Self {
            unit,
            step,
            top: end.max(1),
        }
    }

    /// Its ticks, as values and as labels.
    pub(super) fn ticks(self) -> impl Iterator<Item = (u64, u64)> {
        let count = self.top / self.step;
        (0..=count).map(move |n| (n * self.step, n * self.step / self.unit.size))
    }

    /// Where `value` lies on an axis of `length`.
    pub(super) fn position(self, value: u64, length: u64) -> u64 {
        let at = u128::from(value.min(self.top)) * u128::from(length) / u128::from(self.top);
        u64::try_from(at).unwrap_or(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale) -> (Vec<u64>, &'static str) {
        (
            scale.ticks().map(|(_, label)| label).collect(),
            scale.unit.name,
        )
    }

    #[test]
    fn ticks_are_round_and_reach_over_the_greatest_value() {
        let cases: [(Quantity, u64, Vec<u64>, &str); 8] = [
            (Quantity::Count, 0, vec![0, 1], ""),
            (Quantity::Count, 1, vec![0, 1], ""),
            (Quantity::Count, 7, vec![0, 2, 4, 6, 8], ""),
            (Quantity::Count, 50_673, vec![0, 20_000, 40_000, 60_000], ""),
            (Quantity::Bytes, 4096, vec![0, 1, 2, 3, 4], "KiB"),
            (Quantity::Bytes, 64 << 20, vec![0, 20, 40, 60, 80], "MiB"),
            (Quantity::Bytes, 2 << 30, vec![0, 1000, 2000, 3000], "MiB"),
            (Quantity::Bytes, 3 << 30, vec![0, 1, 2, 3], "GiB"),
        ];
        for (quantity, max, expected, unit) in cases {
            let scale = Scale::around(quantity, max, 4);
            assert_eq!(labels(scale), (expected, unit), "{max}");
        }
    }

    #[test]
    fn an_axis_of_time_ends_where_the_time_ends() {
        let scale = Scale::until(Quantity::Time, 210_000_000, 8);
        assert_eq!(labels(scale), (vec![0, 50, 100, 150, 200], "ms"));
        assert_eq!(scale.position(210_000_000, 860), 860);
        assert_eq!(scale.position(105_000_000, 860), 430);
        let scale = Scale::until(Quantity::Time, 9_390_000_000, 8);
        assert_eq!(labels(scale), (vec![0, 2, 4, 6, 8], "s"));
        let scale = Scale::until(Quantity::Time, 2_000_000_000, 4);
        assert_eq!(labels(scale), (vec![0, 500, 1000, 1500, 2000], "ms"));
    }

    #[test]
    fn no_number_is_too_great_for_a_scale() {
        for quantity in [Quantity::Count, Quantity::Bytes, Quantity::Time] {
            for max in [0, 1, u64::MAX / 2, u64::MAX] {
                let scale = Scale::around(quantity, max, 4);
                assert!(scale.ticks().count() <= 5, "{quantity:?} {max}");
                assert!(scale.position(max, 700) <= 700);
            }
        }
    }

    #[test]
    fn numbers_are_shown_in_the_unit_that_fits() {
        let cases = [
            (Quantity::Count, 50_673, "50673"),
            (Quantity::Bytes, 0, "0 KiB"),
            (Quantity::Bytes, 1536, "1.5 KiB"),
            (Quantity::Bytes, 772 << 20, "772 MiB"),
            (Quantity::Bytes, (3 << 30) / 2, "1.5 GiB"),
            (Quantity::Time, 100_000, "100 \u{b5}s"),
            (Quantity::Time, 1_300_000, "1.3 ms"),
            (Quantity::Time, 9_390_000_000, "9.3 s"),
        ];
        for (quantity, n, text) in cases {
            assert_eq!(quantity.show(n).to_string(), text);
        }
    }
}
