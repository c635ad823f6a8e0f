//! `gemm`: the product of two dense matrices of whole numbers in single precision.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, count, elements, index, mix,
};

/// Rows and columns of a block; sides are multiples of it.
const BLOCK: usize = 128;

struct Gemm {
    a: Array<f32>,
    b: Array<f32>,
    c: Array<f32>,
    side: usize,
    seed: u64,
}

/// Three square matrices.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let least = BLOCK * BLOCK;
    let n = elements(order.size, 12, count(least))?;
    let side = n.isqrt() / BLOCK * BLOCK;
    let memory = &order.memory;
    let fill = |salt: u64| memory.array(side * side, |i| small(order.seed ^ salt, count(i)));
    Ok(Box::new(Gemm {
        a: fill(1),
        b: fill(2),
        c: memory.array(side * side, |_| -1.0),
        side,
        seed: order.seed,
    }))
}

/// A number of 0 to 3, so that all sums stay exact.
fn small(seed: u64, i: u64) -> f32 {
    f32::from(u8::try_from(mix(seed.wrapping_add(i)) >> 62).unwrap_or(0))
}

#[derive(Clone)]
struct Product {
    a: u64,
    b: u64,
    c: u64,
    side: usize,
}

impl Product {
    fn at(&self, matrix: u64, row: usize, column: usize) -> u64 {
        matrix + count(row * self.side + column) * 4
    }

    /// Loads one block.
    fn load(
        &self,
        tile: &mut Tile<'_>,
        matrix: u64,
        (row, column): (usize, usize),
        out: &mut [f32],
    ) -> Result<(), Stop> {
        out.chunks_mut(BLOCK)
            .zip(row..)
            .try_for_each(|(line, row)| tile.load(self.at(matrix, row, column), line))
    }
}

impl Kernel for Product {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let blocks = self.side / BLOCK;
        let group = usize::try_from(group).unwrap_or(0);
        let (row, column) = (group / blocks * BLOCK, group % blocks * BLOCK);
        let mut a = vec![0.0; BLOCK * BLOCK];
        let mut b = vec![0.0; BLOCK * BLOCK];
        let mut c = vec![0.0; BLOCK * BLOCK];
        for k in (0..self.side).step_by(BLOCK) {
            self.load(tile, self.a, (row, k), &mut a)?;
            self.load(tile, self.b, (k, column), &mut b)?;
            multiply_add(&a, &b, &mut c);
        }
        c.chunks(BLOCK)
            .zip(row..)
            .try_for_each(|(line, row)| tile.store(self.at(self.c, row, column), line))
    }
}

/// `c += a * b` on blocks; the inner loop runs along rows.
fn multiply_add(a: &[f32], b: &[f32], c: &mut [f32]) {
    for (a, c) in a.chunks(BLOCK).zip(c.chunks_mut(BLOCK)) {
        for (a, b) in a.iter().zip(b.chunks(BLOCK)) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
        }
    }
}

impl Prepared for Gemm {
    fn bytes(&self) -> u64 {
        count(self.side * self.side) * 12
    }

    fn traffic(&self) -> u64 {
        let blocks = count(self.side / BLOCK);
        self.bytes() / 3 * (2 * blocks + 1)
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let blocks = self.side / BLOCK;
        let kernel = Product {
            a: self.a.address(),
            b: self.b.address(),
            c: self.c.address_mut(),
            side: self.side,
        };
        job.launch(
            "blocks",
            &kernel,
            u32::try_from(blocks * blocks).unwrap_or(u32::MAX),
        )
    }

    /// Freivalds' check: `c*r == a*(b*r)` for a random vector `r`, exact in whole numbers. A wrong
    /// product passes with a chance of about one in a million per vector.
    fn verify(&self) -> bool {
        let (a, b, c) = (self.a.view(), self.b.view(), self.c.view());
        (0..2_u64).all(|round| {
            let random = |i| index(mix(self.seed.wrapping_add(i) ^ round << 32) >> 44);
            let r: Vec<i64> = (0..count(self.side))
                .map(|i| i64::try_from(random(i)).unwrap_or(0))
                .collect();
            let br = times(&b, &r);
            times(&c, &r) == times(&a, &br)
        })
    }
}

/// A matrix of whole numbers times a vector.
fn times(matrix: &[f32], vector: &[i64]) -> Vec<i64> {
    matrix
        .chunks(vector.len())
        .map(|row| {
            row.iter()
                .zip(vector)
                .map(|(m, v)| whole(*m).wrapping_mul(*v))
                .fold(0, i64::wrapping_add)
        })
        .collect()
}

/// A float that is a whole number; what is none becomes one that fits nowhere.
fn whole(value: f32) -> i64 {
    let bits = i64::from(value.to_bits());
    #[expect(
        clippy::cast_possible_truncation,
        reason = "compared with the float right after"
    )]
    let rounded = value as i64;
    #[expect(
        clippy::cast_precision_loss,
        reason = "only exact numbers compare equal"
    )]
    let same = rounded as f32 == value;
    if same { rounded } else { bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_of_a_product_is_noticed() {
        let side = BLOCK;
        let fill = |salt| {
            (0..count(side * side))
                .map(|i| small(salt, i))
                .collect::<Vec<f32>>()
        };
        let (a, b, mut c) = (fill(1), fill(2), vec![0.0; side * side]);
        multiply_add(&a, &b, &mut c);
        let mut gemm = Gemm {
            a: a.into(),
            b: b.into(),
            c: c.into(),
            side,
            seed: 7,
        };
        assert!(gemm.verify());
        gemm.c.change(|c| c[5 * side + 9] += 1.0);
        assert!(!gemm.verify());
    }
}
