//! `stream`: the triad `a = b + s*c`, several passes over three arrays.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Job, JobError, Order, PrepareError, Prepared, address_of, address_of_mut, count, elements,
    exact, groups, index, part,
};

/// Passes; the scalar of pass `p` is `p + 1`.
const PASSES: u32 = 3;
/// Elements of one group: half a megabyte of each array.
const GROUP: usize = 64 << 10;
/// Elements of one tile: three of them fit into a first cache.
const TILE: usize = 512;

struct Stream {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

/// Three arrays of a third of the size.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 24, 1)?;
    let seed = order.seed;
    let b = (0..count(n)).map(|i| exact((i + seed) % 1000)).collect();
    let c = (0..count(n)).map(|i| exact(i % 77)).collect();
    Ok(Box::new(Stream {
        a: vec![-1.0; n],
        b,
        c,
    }))
}

struct Triad {
    a: u64,
    b: u64,
    c: u64,
    n: usize,
    scalar: f64,
}

impl Kernel for Triad {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let (mut b, mut c) = (vec![0.0; TILE], vec![0.0; TILE]);
        for start in part(group, GROUP, self.n).step_by(TILE) {
            let len = TILE.min(part(group, GROUP, self.n).end - start);
            let offset = count(start) * 8;
            tile.load(self.b + offset, &mut b[..len])?;
            tile.load(self.c + offset, &mut c[..len])?;
            triad(&mut b[..len], &c[..len], self.scalar);
            tile.store(self.a + offset, &b[..len])?;
        }
        Ok(())
    }
}

fn triad(b: &mut [f64], c: &[f64], scalar: f64) {
    b.iter_mut().zip(c).for_each(|(b, c)| *b += scalar * c);
}

/// The plain loop on the CPU over arrays of `n` elements; the yardstick of the bench.
pub fn cpu_triad(a: &mut [f64], b: &[f64], c: &[f64], scalar: f64) {
    a.iter_mut()
        .zip(b)
        .zip(c)
        .for_each(|((a, b), c)| *a = b + scalar * c);
}

impl Prepared for Stream {
    fn bytes(&self) -> u64 {
        count(self.a.len()) * 24
    }

    fn traffic(&self) -> u64 {
        self.bytes() * u64::from(PASSES)
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let n = self.a.len();
        for pass in 1..=PASSES {
            let kernel = Triad {
                a: address_of_mut(&mut self.a),
                b: address_of(&self.b),
                c: address_of(&self.c),
                n,
                scalar: f64::from(pass),
            };
            job.launch("triad", &kernel, groups(n, GROUP))?;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let scalar = f64::from(PASSES);
        let sum = |(b, c): (&f64, &f64)| b + scalar * c;
        index(count(self.a.len())) == self.b.len()
            && self
                .a
                .iter()
                .zip(self.b.iter().zip(&self.c).map(sum))
                .all(|(a, want)| *a == want)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_is_noticed() {
        let mut stream = Stream {
            a: vec![0.0; 9],
            b: vec![1.0; 9],
            c: vec![2.0; 9],
        };
        cpu_triad(&mut stream.a, &stream.b, &stream.c, 3.0);
        assert!(stream.verify());
        stream.a[8] += 1.0;
        assert!(!stream.verify());
    }
}
