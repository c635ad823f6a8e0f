//! `chase`: follow pointers through a linked structure of ordinary boxes.
//!
//! The boxes, arrays of one node, come one by one from the program's allocator; each holds the address of
//! the next in shuffled order. The number of hops is bounded: with more boxes than device memory holds nearly
//! every hop faults.

use gpusvm_softgpu::{Kernel, Stop, Tile};

use crate::workload::{
    Array, Job, JobError, Order, PrepareError, Prepared, below, count, elements, index, mix,
};

/// Words of one node: next address, payload, and what fills 4 KiB.
const WORDS: usize = 512;
/// Chains that are followed independently.
const CHAINS: usize = 4;
/// Hops of one chain.
const HOPS_MAX: usize = 2048;

type Node = [u64; WORDS];

struct Chase {
    nodes: Vec<Array<Node>>,
    /// Order in which the nodes are linked.
    order: Vec<u32>,
    hops: usize,
    sums: Array<u64>,
}

/// Boxes of 4 KiB, linked in a random cycle.
pub(super) fn prepare(order: &Order) -> Result<Box<dyn Prepared>, PrepareError> {
    let n = elements(order.size, 4096, 4)?;
    let n = n.min(index(u64::from(u32::MAX)));
    let one = |i: usize| order.memory.array(1, |_| [count(i); WORDS]);
    let mut nodes: Vec<Array<Node>> = (0..n).map(one).collect();
    let mut shuffled: Vec<u32> = (0..u32::try_from(n).unwrap_or(u32::MAX)).collect();
    for i in (1..n).rev() {
        shuffled.swap(i, below(mix(order.seed.wrapping_add(count(i))), i + 1));
    }
    for i in 0..n {
        let (here, next) = (at(&shuffled, i), at(&shuffled, i + 1));
        let head = [nodes[next].address(), mix(count(here))];
        nodes[here].change(|node| node[0][..2].copy_from_slice(&head));
    }
    let hops = HOPS_MAX.min(n / CHAINS);
    Ok(Box::new(Chase {
        nodes,
        order: shuffled,
        hops,
        sums: order.memory.zeroed(CHAINS),
    }))
}

/// The `i`th node of the cycle.
fn at(order: &[u32], i: usize) -> usize {
    usize::try_from(order[i % order.len()]).unwrap_or(0)
}

#[derive(Clone)]
struct Follow {
    starts: [u64; CHAINS],
    sums: u64,
    hops: usize,
}

impl Kernel for Follow {
    fn run(&self, group: u32, tile: &mut Tile<'_>) -> Result<(), Stop> {
        let chain = usize::try_from(group).unwrap_or(0);
        let mut node = self.starts[chain];
        let mut sum = 0_u64;
        for _hop in 0..self.hops {
            let mut head = [0_u64; 2];
            tile.load(node, &mut head)?;
            node = head[0];
            sum = sum.wrapping_add(head[1]);
        }
        tile.store_one(self.sums + count(chain) * 8, sum)
    }
}

impl Chase {
    fn start_of(&self, chain: usize) -> usize {
        chain * (self.nodes.len() / CHAINS)
    }
}

impl Prepared for Chase {
    fn bytes(&self) -> u64 {
        count(self.nodes.len()) * 4096
    }

    fn traffic(&self) -> u64 {
        count(self.hops * CHAINS) * 16
    }

    fn run(&mut self, job: &Job<'_>) -> Result<(), JobError> {
        let start = |chain| self.nodes[at(&self.order, self.start_of(chain))].address();
        let kernel = Follow {
            starts: core::array::from_fn(start),
            sums: self.sums.address_mut(),
            hops: self.hops,
        };
        job.launch("chains", &kernel, u32::try_from(CHAINS).unwrap_or(0))
    }

    fn verify(&self) -> bool {
        let sum = |chain: usize| {
            let start = self.start_of(chain);
            let hops = start..start + self.hops;
            hops.fold(0_u64, |sum, i| {
                sum.wrapping_add(mix(count(at(&self.order, i))))
            })
        };
        let sums = self.sums.view();
        (0..CHAINS).all(|chain| sums[chain] == sum(chain))
    }
}
