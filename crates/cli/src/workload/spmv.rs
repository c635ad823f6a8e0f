//! `spmv`: a sparse matrix in compressed rows times a vector. Whole numbers, so sums are exact.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, below, count, elements, exact, groups,
    index, mix, part,
};

/// Entries of one row.
const PER_ROW: usize = 16;
/// Entries of a row lie within this many columns of the diagonal.
const BAND: usize = 8192;
/// Bytes of one row: columns, values, its elements of both vectors.
const ROW_BYTES: u64 = 16 * (4 + 8) + 8 + 8;
/// Rows of one group, and of one tile.
const GROUP: usize = 4096;
const TILE: usize = 128;

struct Spmv {
    columns: Array<u32>,
    values: Array<f64>,
    x: Array<f64>,
    y: Array<f64>,
}

/// A banded matrix with random entries.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let rows = elements(order.size, ROW_BYTES, 1)?.min(index(u64::from(u32::MAX)));
    let column = |i: usize| {
        let random = mix(order.seed.wrapping_add(count(i)));
        let start = (i / PER_ROW).saturating_sub(BAND / 2);
        u32::try_from((start + below(random, BAND)).min(rows - 1)).unwrap_or(0)
    };
    let memory = &order.memory;
    Ok(Box::new(Spmv {
        columns: memory.array(rows * PER_ROW, column),
        values: memory.array(rows * PER_ROW, |i| exact(mix(count(i)) % 10)),
        x: memory.array(rows, |i| exact(count(i) % 100)),
        y: memory.array(rows, |_| -1.0),
    }))
}

#[derive(Clone)]
struct Multiply {
    columns: u64,
    values: u64,
    x: u64,
    y: u64,
    rows: usize,
}

impl Kernel for Multiply {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut columns = vec![0_u32; TILE * PER_ROW];
        let mut values = vec![0.0_f64; TILE * PER_ROW];
        let mut x = vec![0.0_f64; TILE * PER_ROW];
        let mut y = vec![0.0_f64; TILE];
        let rows = part(group, GROUP, self.rows);
        for row in rows.clone().step_by(TILE) {
            let n = TILE.min(rows.end - row);
            let (first, entries) = (count(row * PER_ROW), n * PER_ROW);
            tile.load(self.columns + first * 4, &mut columns[..entries])?;
            tile.load(self.values + first * 8, &mut values[..entries])?;
            let from: Vec<u64> = columns[..entries]
                .iter()
                .map(|column| self.x + u64::from(*column) * 8)
                .collect();
            tile.gather(&from, &mut x[..entries])?;
            let products = values.chunks(PER_ROW).zip(x.chunks(PER_ROW));
            for (y, (values, x)) in y[..n].iter_mut().zip(products) {
                *y = dot(values, x);
            }
            tile.store(self.y + count(row) * 8, &y[..n])?;
        }
        Ok(())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Prepared for Spmv {
    fn bytes(&self) -> u64 {
        count(self.x.len()) * ROW_BYTES
    }

    fn traffic(&self) -> u64 {
        count(self.columns.len()) * (4 + 8 + 8) + count(self.y.len()) * 8
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let rows = self.y.len();
        let kernel = Multiply {
            columns: self.columns.address(),
            values: self.values.address(),
            x: self.x.address(),
            y: self.y.address_mut(),
            rows,
        };
        job.launch("rows", &kernel, groups(rows, GROUP))
    }

    fn verify(&self) -> bool {
        let (columns, values) = (self.columns.view(), self.values.view());
        let (x, y) = (self.x.view(), self.y.view());
        let product = |(columns, values): (&[u32], &[f64])| -> f64 {
            let x = |column: &u32| x[usize::try_from(*column).unwrap_or(0)];
            let terms = columns.iter().map(x).zip(values);
            terms.map(|(x, value)| x * value).sum()
        };
        let rows = columns.chunks(PER_ROW).zip(values.chunks(PER_ROW));
        y.iter().zip(rows.map(product)).all(|(y, want)| *y == want)
    }
}
