//! `stencil`: Jacobi sweeps of a 5-point average over a grid, between two buffers.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, count, elements, exact, groups, mix, part,
};

/// Columns.
const WIDTH: usize = 2048;
const SWEEPS: usize = 4;
/// Rows of one group.
const GROUP: usize = 32;

struct Stencil {
    grids: [Array<f64>; 2],
    seed: u64,
}

/// Two grids of half the size.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let rows = elements(order.size, 2 * 8 * count(WIDTH), 3)?;
    let grid = |_| {
        let memory = &order.memory;
        memory.array(rows * WIDTH, |i| initial(order.seed, i))
    };
    Ok(Box::new(Stencil {
        grids: [0, 1].map(grid),
        seed: order.seed,
    }))
}

/// Whole numbers, so that averages stay exact for some sweeps.
fn initial(seed: u64, i: usize) -> f64 {
    exact(mix(seed.wrapping_add(count(i))) >> 52)
}

/// One row from the three around it. The border keeps its values.
fn sweep_row(above: &[f64], row: &[f64], below: &[f64], out: &mut [f64]) {
    out.copy_from_slice(row);
    let last = row.len() - 1;
    let sides = row[..last - 1].iter().zip(&row[2..]);
    let poles = above[1..last].iter().zip(&below[1..last]);
    for ((out, (left, right)), (above, below)) in out[1..last].iter_mut().zip(sides).zip(poles) {
        *out = 0.25 * ((left + right) + (above + below));
    }
}

#[derive(Clone)]
struct Sweep {
    from: u64,
    to: u64,
    rows: usize,
}

impl Sweep {
    fn row(grid: u64, row: usize) -> u64 {
        grid + count(row * WIDTH * 8)
    }
}

impl Kernel for Sweep {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let mut lines = [vec![0.0; WIDTH], vec![0.0; WIDTH], vec![0.0; WIDTH]];
        let mut out = vec![0.0; WIDTH];
        let rows = part(group, GROUP, self.rows);
        let rows = rows.start.max(1)..rows.end.min(self.rows - 1);
        if rows.is_empty() {
            return Ok(());
        }
        tile.load(Self::row(self.from, rows.start - 1), &mut lines[1][..])?;
        tile.load(Self::row(self.from, rows.start), &mut lines[2][..])?;
        for row in rows {
            lines.rotate_left(1);
            tile.load(Self::row(self.from, row + 1), &mut lines[2][..])?;
            sweep_row(&lines[0], &lines[1], &lines[2], &mut out);
            tile.store(Self::row(self.to, row), &out[..])?;
        }
        Ok(())
    }
}

impl Prepared for Stencil {
    fn bytes(&self) -> u64 {
        count(self.grids[0].len()) * 16
    }

    fn traffic(&self) -> u64 {
        self.bytes() * count(SWEEPS)
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let rows = self.grids[0].len() / WIDTH;
        for sweep in 0..SWEEPS {
            let [first, second] = &mut self.grids;
            let (from, to) = if sweep % 2 == 0 {
                (first, second)
            } else {
                (second, first)
            };
            let kernel = Sweep {
                from: from.address(),
                to: to.address_mut(),
                rows,
            };
            job.launch("sweep", &kernel, groups(rows, GROUP))?;
        }
        Ok(())
    }

    fn verify(&self) -> bool {
        let rows = self.grids[0].len() / WIDTH;
        let mut from: Vec<f64> = (0..rows * WIDTH).map(|i| initial(self.seed, i)).collect();
        let mut to = from.clone();
        for _sweep in 0..SWEEPS {
            for row in 1..rows - 1 {
                let line = |row: usize| &from[row * WIDTH..(row + 1) * WIDTH];
                let out = &mut to[row * WIDTH..(row + 1) * WIDTH];
                sweep_row(line(row - 1), line(row), line(row + 1), out);
            }
            core::mem::swap(&mut from, &mut to);
        }
        from == *self.grids[SWEEPS % 2].view()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn average_is_taken_inside_and_the_border_stays() {
        let mut out = [0.0; 4];
        sweep_row(
            &[0.0, 4.0, 8.0, 0.0],
            &[1.0, 2.0, 3.0, 5.0],
            &[0.0; 4],
            &mut out,
        );
        assert_eq!(out, [1.0, 2.0, 3.75, 5.0]);
    }
}
