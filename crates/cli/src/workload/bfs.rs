//! `bfs`: level-synchronous breadth-first search of a random graph in compressed rows.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, below, count, elements, groups, index,
    mix, part,
};

/// Edges out of each vertex.
const DEGREE: usize = 32;
/// Bytes of one vertex: its edges and its level.
const VERTEX_BYTES: u64 = 32 * 4 + 4;
const UNSEEN: u32 = u32::MAX;
/// Vertices of one group, and edges looked at together.
const GROUP: usize = 16 << 10;

struct Bfs {
    edges: Array<u32>,
    levels: Array<u32>,
    /// Whether the last level found anything.
    found: Array<u64>,
    depth: u32,
}

/// A graph with random edges; the search starts at vertex 0.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, VERTEX_BYTES, 2)?.min(index(u64::from(u32::MAX - 1)));
    let edge = |i: usize| below(mix(order.seed.wrapping_add(count(i))), n);
    let memory = &order.memory;
    Ok(Box::new(Bfs {
        edges: memory.array(n * DEGREE, |i| u32::try_from(edge(i)).unwrap_or(0)),
        levels: memory.array(n, |vertex| if vertex == 0 { 0 } else { UNSEEN }),
        found: memory.zeroed(1),
        depth: 0,
    }))
}

#[derive(Clone)]
struct Level {
    edges: u64,
    levels: u64,
    n: usize,
    level: u32,
    /// Set to 1 when the level found anything.
    found: u64,
}

impl Kernel for Level {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let vertices = part(group, GROUP, self.n);
        let mut levels = vec![0_u32; vertices.len()];
        tile.load(self.levels + count(vertices.start) * 4, &mut levels[..])?;
        let mut edges = [0_u32; DEGREE];
        let mut seen = [0_u32; DEGREE];
        let mut found = false;
        let frontier = levels
            .iter()
            .zip(vertices)
            .filter(|(level, _)| **level == self.level);
        for (_, vertex) in frontier {
            tile.load(self.edges + count(vertex * DEGREE) * 4, &mut edges)?;
            let targets = edges.map(|edge| self.levels + u64::from(edge) * 4);
            tile.gather(&targets, &mut seen)?;
            // Units that find a vertex at once store the same level.
            for (target, _) in targets.iter().zip(seen).filter(|(_, seen)| *seen == UNSEEN) {
                tile.store_one(*target, self.level + 1)?;
                found = true;
            }
        }
        if found {
            tile.store_one(self.found, 1_u64)
        } else {
            Ok(())
        }
    }
}

impl Prepared for Bfs {
    fn bytes(&self) -> u64 {
        count(self.levels.len()) * VERTEX_BYTES
    }

    fn traffic(&self) -> u64 {
        count(self.edges.len()) * 8 + count(self.levels.len()) * 4 * u64::from(self.depth)
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let n = self.levels.len();
        loop {
            self.found.change(|found| found[0] = 0);
            let kernel = Level {
                edges: self.edges.address(),
                levels: self.levels.address_mut(),
                n,
                level: self.depth,
                found: self.found.address_mut(),
            };
            job.launch("level", &kernel, groups(n, GROUP))?;
            self.depth += 1;
            if self.found.view()[0] == 0 {
                return Ok(());
            }
        }
    }

    fn verify(&self) -> bool {
        *self.levels.view() == search(&self.edges.view(), self.levels.len())
    }
}

/// The search on the CPU.
fn search(edges: &[u32], n: usize) -> Vec<u32> {
    let mut levels = vec![UNSEEN; n];
    levels[0] = 0;
    let (mut frontier, mut level) = (vec![0_usize], 0);
    while !frontier.is_empty() {
        level += 1;
        let mut next = Vec::new();
        for vertex in frontier {
            for edge in &edges[vertex * DEGREE..(vertex + 1) * DEGREE] {
                let target = usize::try_from(*edge).unwrap_or(0);
                if levels[target] == UNSEEN {
                    levels[target] = level;
                    next.push(target);
                }
            }
        }
        frontier = next;
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_level_is_noticed() {
        let edges: Vec<u32> = (0..4).flat_map(|v| [(v + 1) % 4; DEGREE]).collect();
        let mut bfs = Bfs {
            levels: search(&edges, 4).into(),
            edges: edges.into(),
            found: vec![0].into(),
            depth: 3,
        };
        assert_eq!(*bfs.levels.view(), [0, 1, 2, 3]);
        assert!(bfs.verify());
        bfs.levels.change(|levels| levels[3] = 1);
        assert!(!bfs.verify());
    }
}
