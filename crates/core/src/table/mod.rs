//! The page-table engine, generic over a format (`svm-design.md` section 5.8).
//!
//! Three parts with three locks. The **shadow** ([`PageTable`]) knows which tables exist; it belongs
//! to whoever holds `vm`. **Entries** are written under the notifier lock only, by
//! [`commit`](PageTable::commit), [`unbind`](PageTable::unbind) and [`zap`]. A bound range keeps the
//! [`LeafSlot`]s where its entries stand, so that an invalidation, which may not take `vm`, zaps
//! them without the shadow.
//!
//! ```text
//!   plan (vm; may allocate, may fail) ──▶ TablePlan ──▶ commit (vm + notifier; cannot fail)
//!                                             └───────▶ abort  (vm)
//!   zap (notifier)                     unbind (vm + notifier) ──▶ DetachedTables ──▶ free (vm)
//! ```
//!
//! A range is an aligned block of 4 KiB, 64 KiB or 2 MiB, so its entries stand in one table, one
//! behind the other: one slot. Larger spans give several.

mod plan;
mod shadow;

pub use plan::{LeafSlot, Segment, TablePlan, zap};
pub use shadow::{Committed, DetachedTables, PageTable};

#[cfg(test)]
mod tests;
