//! Sizes on the command line: a whole number with an optional K, M, G or T (powers of 1024).

use std::fmt;

/// A text is no size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Nothing there.
    Empty,
    /// Zero bytes.
    Zero,
    /// More than 64 bits hold.
    TooLarge(String),
    /// Something else.
    Malformed(String),
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a size is missing; write for example 256M"),
            Self::Zero => f.write_str("a size of zero is no work; write for example 256M"),
            Self::TooLarge(text) => write!(f, "`{text}` is more than this machine can address"),
            Self::Malformed(text) => write!(
                f,
                "`{text}` is no size; write a whole number with K, M, G or T, for example 256M"
            ),
        }
    }
}

impl std::error::Error for SizeError {}

/// A number of things in words: `1 page`, `2 pages`.
pub(crate) fn counted(n: u64, one: &str, many: &str) -> String {
    let what = if n == 1 { one } else { many };
    format!("{n} {what}")
}

/// Reads a size: `1536`, `64K`, `256M`, `1G`, `1GiB`.
///
/// # Errors
/// [`SizeError`] says what is wrong and what to write instead.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(SizeError::Empty);
    }
    let malformed = || SizeError::Malformed(text.to_owned());
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(malformed()),
    };
    if number.is_empty() {
        return Err(malformed());
    }
    let too_large = || SizeError::TooLarge(text.to_owned());
    let number: u64 = number.parse().map_err(|_overflow| too_large())?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err(SizeError::Zero),
        Some(bytes) => Ok(bytes),
        None => Err(too_large()),
    }
}

/// Writes a size with the largest unit that keeps three digits or fewer before the point.
#[must_use]
pub fn format(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0..0x400 => return format!("{bytes}"),
        0x400..0x10_0000 => ("K", 10),
        0x10_0000..0x4000_0000 => ("M", 20),
        _ => ("G", 30),
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    if tenths.is_multiple_of(10) || tenths >= 1000 {
        format!("{}{unit}", tenths / 10)
    } else {
        format!("{}.{}{unit}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_told_as_one() {
        let told = |n| counted(n, "check failed", "checks failed");
        assert_eq!(
            [0, 1, 2].map(told),
            ["0 checks failed", "1 check failed", "2 checks failed"]
        );
    }

    #[test]
    fn units_are_powers_of_1024_in_any_case() {
        let cases = [
            ("1", 1),
            ("64k", 65_536),
            ("256M", 256 << 20),
            ("1GiB", 1 << 30),
            (" 2t ", 2 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_told_so() {
        assert_eq!(parse(""), Err(SizeError::Empty));
        assert_eq!(parse("0"), Err(SizeError::Zero));
        assert_eq!(parse("0G"), Err(SizeError::Zero));
        for text in ["99999999999999999999", "17179869184G"] {
            assert!(matches!(parse(text), Err(SizeError::TooLarge(_))), "{text}");
        }
        for text in ["-1", "1.5G", "G", "12X", "1 G", "0x10", "1Gi", "\u{663}"] {
            assert!(
                matches!(parse(text), Err(SizeError::Malformed(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn sizes_are_short_to_read() {
        let cases = [
            (512, "512"),
            (1536, "1.5K"),
            (256 << 20, "256M"),
            (1 << 30, "1G"),
            (3 << 29, "1.5G"),
        ];
        for (bytes, text) in cases {
            assert_eq!(format(bytes), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text: String) {
            let _any = parse(&text);
        }
    }
}
