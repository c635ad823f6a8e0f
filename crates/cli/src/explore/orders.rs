//! Orders in which locks were taken in different worlds. One world alone need not break a rule for two of
//! them to block each other for good, once they meet.

use std::fmt::Write;

use gpusvm_model::sched::Order;

use crate::explore::ExploreError;

/// Whether a plan's worlds agree on an order of all locks.
///
/// # Errors
/// [`ExploreError::Failed`] with the cycles.
pub(super) fn must_agree(plan: &str, cycles: &[Vec<Order>]) -> Result<(), ExploreError> {
    if cycles.is_empty() {
        return Ok(());
    }
    let mut text = format!("in worlds of {plan}, locks are taken in orders that go round");
    for order in cycles.iter().flatten() {
        // Text has room.
        let _written = write!(text, "\n  {order}");
    }
    Err(ExploreError::Failed(text))
}

/// The cycles, for machines: the orders of each.
pub(super) fn json(cycles: &[Vec<Order>]) -> serde_json::Value {
    let all = cycles.iter().map(|cycle| {
        let orders = cycle.iter().map(ToString::to_string);
        orders.collect::<serde_json::Value>()
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(outer: &str, inner: &str) -> Order {
        Order {
            outer: outer.to_owned(),
            outer_at: "a.rs:1".to_owned(),
            inner: inner.to_owned(),
            inner_at: "b.rs:2".to_owned(),
            seed: 5,
        }
    }

    #[test]
    fn a_cycle_is_a_failure_that_names_its_locks() {
        assert!(must_agree("swarm", &[]).is_ok());
        let cycle = vec![order("left", "right"), order("right", "left")];
        let cycles = [cycle];
        let why = must_agree("swarm", &cycles).expect_err("they go round");
        let text = why.to_string();
        assert_eq!(why.exit_code(), 1);
        for part in [
            "swarm",
            "left (a.rs:1), then right (b.rs:2)",
            "right (a.rs:1), then left",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(json(&cycles)[0].as_array().map(Vec::len), Some(2));
    }
}
