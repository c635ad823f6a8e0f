//! `stream`: the triad `a = b + s*c`, several passes over three arrays.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, count, elements, exact, groups, part,
};

/// Passes; the scalar of pass `p` is `p + 1`.
const PASSES: u32 = 3;
/// Elements of one group: half a megabyte of each array.
const GROUP: usize = 64 << 10;
/// Elements of one tile: three of them fit into a first cache.
const TILE: usize = 512;

struct Stream {
    a: Array<f64>,
    b: Array<f64>,
    c: Array<f64>,
}

/// Three arrays of a third of the size.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 24, 1)?;
    let seed = order.seed;
    let memory = &order.memory;
    Ok(Box::new(Stream {
        b: memory.array(n, |i| exact((count(i) + seed) % 1000)),
        c: memory.array(n, |i| exact(count(i) % 77)),
        a: memory.array(n, |_| -1.0),
    }))
}

#[derive(Clone)]
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
                a: self.a.address_mut(),
                b: self.b.address(),
                c: self.c.address(),
                n,
                scalar: f64::from(pass),
            };
            job.launch("triad", &kernel, groups(n, GROUP))?;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let scalar = f64::from(PASSES);
        let (a, b, c) = (self.a.view(), self.b.view(), self.c.view());
        let sums = b.iter().zip(&*c).map(|(b, c)| b + scalar * c);
        a.len() == b.len() && a.iter().zip(sums).all(|(a, want)| *a == want)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_is_noticed() {
        let mut stream = Stream {
            a: vec![0.0; 9].into(),
            b: vec![1.0; 9].into(),
            c: vec![2.0; 9].into(),
        };
        let (b, c) = (stream.b.view(), stream.c.view());
        stream.a.change(|a| cpu_triad(a, &b, &c, 3.0));
        assert!(stream.verify());
        stream.a.change(|a| a[8] += 1.0);
        assert!(!stream.verify());
    }
}
