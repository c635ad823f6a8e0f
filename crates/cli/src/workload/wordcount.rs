//! `wordcount`: lines, words and bytes of a mapped file, read by the device in place.
//!
//! A word is a run of bytes that are not ASCII white space, as `wc` counts in the C locale.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::size::counted;
use crate::workload::{
    Array, File, Job, JobError, Order, PrepareError, Prepared, count, groups, part,
};

const GROUP: usize = 1 << 20;
const TILE: usize = 32 << 10;

struct WordCount {
    file: File,
    /// Lines and words of each group.
    counts: Array<[u64; 2]>,
}

/// Maps the input.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let path = order.input.as_ref().ok_or(PrepareError::NoInput)?;
    let refused = |why: std::io::Error| PrepareError::Input {
        path: path.clone(),
        why: why.to_string(),
    };
    let file = order.memory.map(path).map_err(refused)?;
    let parts = file.len().div_ceil(GROUP);
    Ok(Box::new(WordCount {
        file,
        counts: order.memory.zeroed(parts),
    }))
}

/// Counts so far, and whether the last byte was inside a word.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    lines: u64,
    words: u64,
    inside: bool,
}

impl Counter {
    fn count(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let inside = !is_space(*byte);
            self.lines += u64::from(*byte == b'\n');
            self.words += u64::from(inside && !self.inside);
            self.inside = inside;
        }
    }
}

/// Space as `isspace` has it in the C locale; with the vertical tab, which Rust leaves out.
const fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

#[derive(Clone)]
struct Count {
    file: u64,
    len: usize,
    counts: u64,
}

impl Kernel for Count {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let range = part(group, GROUP, self.len);
        let mut counter = Counter::default();
        if range.start > 0 {
            // A word that begins in the group before is counted there.
            let before: u8 = tile.load_one(self.file + count(range.start) - 1)?;
            counter.inside = !is_space(before);
        }
        let mut bytes = vec![0_u8; TILE];
        for start in range.clone().step_by(TILE) {
            let bytes = &mut bytes[..TILE.min(range.end - start)];
            tile.load(self.file + count(start), bytes)?;
            counter.count(bytes);
        }
        tile.store(
            self.counts + u64::from(group) * 16,
            &[counter.lines, counter.words],
        )
    }
}

impl WordCount {
    /// Lines and words of the whole file.
    fn totals(&self) -> [u64; 2] {
        let all = self.counts.view();
        [0, 1].map(|which: usize| all.iter().map(|counts| counts[which]).sum())
    }
}

impl Prepared for WordCount {
    fn bytes(&self) -> u64 {
        count(self.file.len())
    }

    fn traffic(&self) -> u64 {
        self.bytes()
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let len = self.file.len();
        job.mirror_read_only(self.file.address(), count(len))?;
        let kernel = Count {
            file: self.file.address(),
            len,
            counts: self.counts.address_mut(),
        };
        job.launch("count", &kernel, groups(len, GROUP))
    }

    fn answer(&self) -> Option<String> {
        let [lines, words] = self.totals();
        Some(format!(
            "{}, {}, {}",
            counted(lines, "line", "lines"),
            counted(words, "word", "words"),
            counted(self.file.len() as u64, "byte", "bytes")
        ))
    }

    fn verify(&self) -> bool {
        let mut counter = Counter::default();
        let mut bytes = vec![0; GROUP];
        for start in (0..self.file.len()).step_by(GROUP) {
            let bytes = &mut bytes[..GROUP.min(self.file.len() - start)];
            if self.file.read(start, bytes).is_err() {
                return false;
            }
            counter.count(bytes);
        }
        self.totals() == [counter.lines, counter.words]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_across_pieces() {
        let mut counter = Counter::default();
        counter.count(b"  two wo");
        counter.count(b"rds\n\x0bthree\t");
        assert_eq!((counter.lines, counter.words), (1, 3));
    }
}
