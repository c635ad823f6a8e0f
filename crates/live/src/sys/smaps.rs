//! What only `/proc/self/smaps` tells of mappings. It is slow: the system looks at every page.

use std::io::{BufRead, BufReader};

use gpusvm::addr::{HostSpan, HostVa};

use crate::spans::SpanSet;

/// Memory of this process that is zero in its children (`MADV_WIPEONFORK`). Empty where the system does
/// not tell.
pub(crate) fn wiped_on_fork() -> SpanSet {
    std::fs::File::open("/proc/self/smaps").map_or_else(
        |_untold| SpanSet::default(),
        |file| wiped(BufReader::new(file)),
    )
}

fn wiped(smaps: impl BufRead) -> SpanSet {
    /// Name of the flag.
    const WIPE_ON_FORK: &str = "wf";
    let mut found = SpanSet::default();
    let mut here = None;
    for line in smaps.lines().map_while(Result::ok) {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let wiped = flags.split_whitespace().any(|flag| flag == WIPE_ON_FORK);
            here.filter(|_| wiped)
                .into_iter()
                .for_each(|span| found.insert(span));
        } else if let Some(span) = head(&line) {
            here = Some(span);
        }
    }
    found
}

/// The span of the mapping whose first line this is.
fn head(line: &str) -> Option<HostSpan> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let at = |digits| u64::from_str_radix(digits, 16).ok().map(HostVa::new);
    Some(HostSpan::new(at(start)?, at(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_with_the_flag_are_found_and_no_others() {
        let text = "1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nVmFlags: rd wr wf ac \n\
                    3000-4000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr ac sd \n\
                    f000-10000 r--p 00000000 00:00 0 a-b c\nVmFlags: wf\n";
        let found = wiped(text.as_bytes());
        let span = |start, end| HostSpan::new(HostVa::new(start), HostVa::new(end));
        let all = span(0, u64::MAX);
        assert_eq!(
            found.within(all),
            [span(0x1000, 0x3000), span(0xf000, 0x10000)]
        );
    }
}
