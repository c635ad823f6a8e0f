//! Who maps a page: chains of small nodes in one arena, a chain per frame.

use crate::mm::Pid;
use crate::mm::memory::{FrameId, Memory, index32};

/// A node of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RmapId(u32);

/// Whether a mapping is by a small entry or by a block entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// One small page.
    Page,
    /// A whole block.
    Block,
}

/// One mapping of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mapping {
    /// Process.
    pub pid: Pid,
    /// Page number in its window; for a block its first.
    pub page: u32,
    /// By which kind of entry.
    pub level: Level,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Node {
    mapping: Mapping,
    next: Option<RmapId>,
}

/// The arena.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rmaps {
    nodes: Vec<Node>,
    free: Option<RmapId>,
}

impl Rmaps {
    fn node(&self, id: RmapId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Enters a mapping of `frame`.
    pub(crate) fn add(&mut self, memory: &mut Memory, frame: FrameId, mapping: Mapping) {
        let next = memory.frame(frame).rmap;
        let node = Node { mapping, next };
        let id = match self.free {
            Some(id) => {
                self.free = self.node(id).next;
                self.nodes[id.0 as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                RmapId(index32(self.nodes.len() - 1))
            }
        };
        memory.frame_mut(frame).rmap = Some(id);
    }

    /// Strikes a mapping of `frame` out.
    pub(crate) fn remove(&mut self, memory: &mut Memory, frame: FrameId, mapping: Mapping) {
        let mut before: Option<RmapId> = None;
        let mut at = memory.frame(frame).rmap;
        while let Some(id) = at {
            let Node {
                mapping: found,
                next,
            } = *self.node(id);
            if found == mapping {
                match before {
                    Some(before) => self.nodes[before.0 as usize].next = next,
                    None => memory.frame_mut(frame).rmap = next,
                }
                self.nodes[id.0 as usize].next = self.free;
                self.free = Some(id);
                return;
            }
            before = Some(id);
            at = next;
        }
    }

    /// The mappings of `frame`.
    pub fn of<'a>(
        &'a self,
        memory: &Memory,
        frame: FrameId,
    ) -> impl Iterator<Item = Mapping> + use<'a> {
        let mut at = memory.frame(frame).rmap;
        core::iter::from_fn(move || {
            let Node { mapping, next } = *self.node(at?);
            at = next;
            Some(mapping)
        })
    }
}
