//! Locks as a world knows them: names, ranks, who holds what, and in which order they were taken.
//!
//! Framework locks are anonymous: a lock gets its name from the object that it lies in
//! ([`Sim::name_locks`](crate::sched::Sim::name_locks)), or else from the place in the source
//! where it was first taken. Locks of one name are one *class*. Two rules are checked whenever a
//! lock is taken: its rank lies above that of every lock held, and the order in which classes are
//! taken has no cycle, whether or not this world would have deadlocked.

use core::fmt;
use std::borrow::Cow;

use crate::sched::lock_word::{HOST, LockWord, NO_NODE, Site};
use crate::sched::pick::ACTORS_MAX;

/// Rank of a lock. A lock may be taken only while every lock held has a lower rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(pub u16);

impl Rank {
    /// Lock of a device's address space.
    pub const VM: Self = Self(10);
    /// Locks of the host's memory management.
    pub const HOST_MM: Self = Self(20);
    /// Notifier lock.
    pub const NOTIFIER: Self = Self(30);
    /// Lock of a device memory.
    pub const VRAM: Self = Self(40);
    /// Locks under which no other is taken.
    pub const LEAF: Self = Self(50);
}

/// What a class of locks is called.
#[derive(Clone, Debug)]
enum Label {
    Named(Cow<'static, str>),
    FirstTaken(Site),
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => write!(f, "`{name}`"),
            Self::FirstTaken(site) => write!(f, "the lock of {}", short(site)),
        }
    }
}

/// `file.rs:12`, without folders.
pub(super) fn short(site: Site) -> String {
    let file = site.file().rsplit('/').next().unwrap_or_default();
    format!("{file}:{}", site.line())
}

#[derive(Debug)]
struct Class {
    label: Label,
    rank: Option<Rank>,
    /// Classes that were taken while this one was held, in this world; one bit each.
    inner: u64,
    /// The same, in any world since the scenario changed.
    inner_ever: u64,
    /// Classes under which this one was taken in this world, and may be.
    outer: u64,
}

/// Classes whose order is watched: one bit each.
const CLASSES_MAX: usize = 64;

/// One lock of this world.
#[derive(Debug)]
struct Node {
    address: usize,
    /// Beyond [`CLASSES_MAX`]: its order is not watched.
    class: usize,
}

/// Which lock of this world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId(u32);

/// Addresses whose locks have a name.
#[derive(Debug)]
struct Named {
    start: usize,
    end: usize,
    class: usize,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    node: NodeId,
    /// Bit of its class; none where its order is not watched.
    bit: u64,
    site: Site,
}

/// One order in which two classes were taken.
#[derive(Clone, Copy, Debug)]
struct Edge {
    outer: usize,
    outer_site: Site,
    inner: usize,
    inner_site: Site,
    seed: u64,
}

/// What a world knows of its locks. Classes outlive worlds, locks do not.
#[derive(Debug)]
pub(super) struct LockTable {
    classes: Vec<Class>,
    nodes: Vec<Node>,
    named: Vec<Named>,
    held: [Vec<Held>; ACTORS_MAX + 1],
    edges: Vec<Edge>,
    edges_ever: Vec<Edge>,
    seed: u64,
}

/// A broken rule, in words that lack the name of the actor.
pub(super) type Broken = String;

impl LockTable {
    pub(super) const fn new() -> Self {
        Self {
            classes: Vec::new(),
            nodes: Vec::new(),
            named: Vec::new(),
            held: [const { Vec::new() }; ACTORS_MAX + 1],
            edges: Vec::new(),
            edges_ever: Vec::new(),
            seed: 0,
        }
    }

    /// Forgets the locks of the last world.
    pub(super) fn start(&mut self, seed: u64) {
        self.nodes.clear();
        self.named.clear();
        self.edges.clear();
        self.held.iter_mut().for_each(Vec::clear);
        for class in &mut self.classes {
            (class.inner, class.outer) = (0, 0);
        }
        self.seed = seed;
    }

    /// Forgets also the classes: another scenario.
    pub(super) fn forget(&mut self) {
        self.classes.clear();
        self.edges_ever.clear();
    }

    /// Names the locks between two addresses.
    pub(super) fn name(&mut self, start: usize, end: usize, name: Cow<'static, str>, rank: Rank) {
        let named = |class: &Class| matches!(&class.label, Label::Named(known) if *known == name);
        let class = match self.classes.iter().position(named) {
            Some(class) => class,
            None => self.new_class(Label::Named(name)),
        };
        self.classes[class].rank = Some(rank);
        self.classes.iter_mut().for_each(|class| class.outer = 0);
        self.named.push(Named { start, end, class });
        let inside = |node: &&mut Node| (start..end).contains(&node.address);
        for node in self.nodes.iter_mut().filter(inside) {
            node.class = class;
        }
    }

    fn new_class(&mut self, label: Label) -> usize {
        self.classes.push(Class {
            label,
            rank: None,
            inner: 0,
            inner_ever: 0,
            outer: 0,
        });
        self.classes.len() - 1
    }

    /// The entry of a lock.
    #[inline]
    pub(super) fn node(&mut self, word: &LockWord, site: Site) -> NodeId {
        let hint = word.node();
        let known = self.nodes.get(hint as usize);
        if known.is_some_and(|node| node.address == word.address()) {
            return NodeId(hint);
        }
        self.new_node(word, site)
    }

    #[cold]
    fn new_node(&mut self, word: &LockWord, site: Site) -> NodeId {
        let address = word.address();
        // The innermost name: that of the smallest object around the lock.
        let around = |named: &&Named| (named.start..named.end).contains(&address);
        let named = self.named.iter().filter(around);
        let named = named.min_by_key(|named| named.end - named.start);
        let class = match named {
            Some(named) => named.class,
            None => self.class_of_site(site),
        };
        let node = u32::try_from(self.nodes.len()).unwrap_or(NO_NODE);
        self.nodes.push(Node { address, class });
        word.remember(node);
        NodeId(node)
    }

    fn class(&self, node: NodeId) -> usize {
        self.nodes[node.0 as usize].class
    }

    fn class_of_site(&mut self, site: Site) -> usize {
        let same =
            |class: &Class| matches!(class.label, Label::FirstTaken(known) if *known == *site);
        match self.classes.iter().position(same) {
            Some(class) => class,
            None => self.new_class(Label::FirstTaken(site)),
        }
    }

    /// Checks whether `actor` may take a lock, whether or not it is free.
    #[inline]
    pub(super) fn check(&mut self, actor: usize, node: NodeId, site: Site) -> Result<(), Broken> {
        if self.held[actor].is_empty() {
            return Ok(());
        }
        let known = self.classes[self.class(node)].outer;
        if self.held[actor].iter().all(|held| held.bit & known != 0) {
            return Ok(());
        }
        self.check_order(actor, node, site)
    }

    #[cold]
    fn check_order(&mut self, actor: usize, node: NodeId, site: Site) -> Result<(), Broken> {
        let inner = self.class(node);
        for at in 0..self.held[actor].len() {
            let held = self.held[actor][at];
            let edge = Edge {
                outer: self.class(held.node),
                outer_site: held.site,
                inner,
                inner_site: site,
                seed: self.seed,
            };
            // Both, so that the order is known also where the rank is wrong.
            let (rank, order) = (self.check_rank(&edge), self.check_edge(&edge));
            rank.and(order)?;
            self.classes[inner].outer |= held.bit;
        }
        Ok(())
    }

    fn check_rank(&self, edge: &Edge) -> Result<(), Broken> {
        let (outer, inner) = (&self.classes[edge.outer], &self.classes[edge.inner]);
        let (Some(held), Some(taken)) = (outer.rank, inner.rank) else {
            return Ok(());
        };
        if held < taken {
            return Ok(());
        }
        Err(format!(
            "takes {} (rank {}) at {} while it holds {} (rank {}), taken at {}",
            inner.label,
            taken.0,
            short(edge.inner_site),
            outer.label,
            held.0,
            short(edge.outer_site)
        ))
    }

    /// Remembers the order, and refuses one that closes a cycle in this world.
    fn check_edge(&mut self, edge: &Edge) -> Result<(), Broken> {
        let (outer, inner) = (edge.outer, edge.inner);
        if outer == inner || outer.max(inner) >= CLASSES_MAX {
            return Ok(());
        }
        let bit = 1_u64 << inner;
        if self.classes[outer].inner & bit != 0 {
            return Ok(());
        }
        if self.classes[outer].inner_ever & bit == 0 {
            self.classes[outer].inner_ever |= bit;
            self.edges_ever.push(*edge);
        }
        if self.leads(inner, outer)
            && let Some(path) = self.path(inner, outer)
        {
            return Err(self.describe_cycle(edge, &path));
        }
        self.classes[outer].inner |= bit;
        self.edges.push(*edge);
        Ok(())
    }

    /// Whether orders of this world lead from one class to another.
    fn leads(&self, from: usize, to: usize) -> bool {
        let (mut reached, mut new) = (0_u64, 1_u64 << from);
        while new != 0 {
            let class = new.trailing_zeros() as usize;
            reached |= 1 << class;
            new = (new | self.classes[class].inner) & !reached;
        }
        reached >> to & 1 == 1
    }

    /// Orders of this world that lead from one class to another, if there are any.
    fn path(&self, from: usize, to: usize) -> Option<Vec<Edge>> {
        let mut reached: Vec<(usize, Vec<Edge>)> = vec![(from, Vec::new())];
        let mut at = 0;
        while let Some((class, path)) = reached.get(at).cloned() {
            if class == to {
                return Some(path);
            }
            at += 1;
            for edge in self.edges.iter().filter(|edge| edge.outer == class) {
                if reached.iter().all(|(known, _)| *known != edge.inner) {
                    let longer = path.iter().chain([edge]).copied().collect();
                    reached.push((edge.inner, longer));
                }
            }
        }
        None
    }

    fn describe_cycle(&self, edge: &Edge, path: &[Edge]) -> Broken {
        let label = |class: usize| &self.classes[class].label;
        let mut text = format!(
            "takes {} at {} while it holds {}, taken at {}; elsewhere the order is",
            label(edge.inner),
            short(edge.inner_site),
            label(edge.outer),
            short(edge.outer_site)
        );
        for (n, step) in path.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            let (outer, inner) = (label(step.outer), label(step.inner));
            text += &format!(
                "{comma} {outer} ({}), then {inner} ({})",
                short(step.outer_site),
                short(step.inner_site)
            );
        }
        text
    }

    /// Takes note of a new holder.
    #[inline]
    pub(super) fn took(&mut self, actor: usize, node: NodeId, site: Site) {
        let class = self.class(node);
        let bit = if class < CLASSES_MAX { 1 << class } else { 0 };
        self.held[actor].push(Held { node, bit, site });
    }

    /// Takes note that a lock is about to be free.
    #[inline]
    pub(super) fn released(&mut self, word: &LockWord) {
        let Some(holder) = word.holder().filter(|holder| *holder <= HOST) else {
            return;
        };
        let node = NodeId(word.node());
        let held = &mut self.held[holder];
        match held.last() {
            Some(last) if last.node == node => {
                held.pop();
            }
            Some(_) | None => held.retain(|held| held.node != node),
        }
    }

    /// What `actor` holds above `rank`, if anything.
    pub(super) fn held_above(&self, actor: usize, rank: Rank) -> Option<String> {
        let held = self.held[actor].iter().find(|held| {
            let class = self.class(held.node);
            self.classes[class].rank.is_some_and(|held| held > rank)
        })?;
        let class = self.class(held.node);
        let label = &self.classes[class].label;
        Some(format!("{label}, taken at {}", short(held.site)))
    }

    /// How a lock is called.
    pub(super) fn label(&self, address: usize) -> String {
        let node = self.nodes.iter().rfind(|node| node.address == address);
        node.map_or_else(
            || "a lock".into(),
            |node| self.classes[node.class].label.to_string(),
        )
    }

    /// Where `actor` took the lock at `address`.
    pub(super) fn taken_at(&self, actor: usize, address: usize) -> Option<String> {
        let lock = |held: &&Held| self.nodes[held.node.0 as usize].address == address;
        let held = self.held.get(actor)?.iter().find(lock)?;
        Some(short(held.site))
    }

    /// How the word at `address` is called: by the object that it lies in.
    pub(super) fn word_label(&self, address: usize) -> Option<String> {
        let around = |named: &&Named| (named.start..named.end).contains(&address);
        let named = self.named.iter().filter(around);
        let named = named.min_by_key(|named| named.end - named.start)?;
        Some(self.classes[named.class].label.to_string())
    }

    /// Every order that was seen since the scenario changed.
    pub(super) fn orders(&self) -> Vec<Order> {
        let order = |edge: &Edge| Order {
            outer: self.classes[edge.outer].label.to_string(),
            outer_at: short(edge.outer_site),
            inner: self.classes[edge.inner].label.to_string(),
            inner_at: short(edge.inner_site),
            seed: edge.seed,
        };
        self.edges_ever.iter().map(order).collect()
    }
}

/// Two classes of locks, taken one inside the other in some world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Name of the lock that was held.
    pub outer: String,
    /// Where it was taken.
    pub outer_at: String,
    /// Name of the lock that was taken.
    pub inner: String,
    /// Where it was taken.
    pub inner_at: String,
    /// Seed of the first world that did so.
    pub seed: u64,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}), then {} ({}), first with seed {:#x}",
            self.outer, self.outer_at, self.inner, self.inner_at, self.seed
        )
    }
}
