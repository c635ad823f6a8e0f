//! What the machine's kernel is, and how it is set up, as far as answers depend on it.

use std::fs;

use gpusvm_model::mm::Thp;

/// What answers depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The kernel's version, such as 6.18.
    pub(crate) version: (u32, u32),
    /// Its name in full.
    pub(crate) release: String,
    /// When there are large pages.
    pub(crate) thp: Thp,
    /// Whether there is swap: then what `MADV_PAGEOUT` does is a matter of time.
    pub(crate) swap: bool,
}

/// The kernel that the model is.
const MODELLED: (u32, u32) = (6, 18);
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

impl Settings {
    /// Reads them from /proc and /sys.
    ///
    /// # Errors
    /// What cannot be read.
    pub(crate) fn read() -> Result<Self, String> {
        let read = |path: &str| fs::read_to_string(path).map_err(|why| format!("{path}: {why}"));
        let release = read("/proc/sys/kernel/osrelease")?.trim().to_owned();
        // A kernel without large pages has no such file.
        let thp = chosen(&fs::read_to_string(THP).unwrap_or_default());
        let swap = read("/proc/swaps")?.lines().count() > 1;
        Ok(Self {
            version: version(&release).ok_or_else(|| format!("{release} is no version"))?,
            release,
            thp,
            swap,
        })
    }

    /// What is to be said of differences that may come from the kernel's version alone.
    pub(crate) fn foreign(&self) -> String {
        if self.version == MODELLED {
            return String::new();
        }
        let (major, minor) = MODELLED;
        let release = &self.release;
        format!("; this kernel is {release}, the model is {major}.{minor}: they may differ by that")
    }
}

/// The choice in brackets.
fn chosen(text: &str) -> Thp {
    match text.split(['[', ']']).nth(1) {
        Some("always") => Thp::Always,
        Some("madvise") => Thp::Madvise,
        _ => Thp::Never,
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']);
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_and_versions_are_read() {
        assert_eq!(chosen("always [madvise] never"), Thp::Madvise);
        assert_eq!(chosen("[always] madvise never"), Thp::Always);
        assert_eq!(chosen(""), Thp::Never);
        assert_eq!(version("6.18.44-x"), Some((6, 18)));
        assert_eq!(version("7.3-rc1"), Some((7, 3)));
        assert_eq!(version("next"), None);
    }
}
