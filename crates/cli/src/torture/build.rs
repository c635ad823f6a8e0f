//! A world before anything happens in it.

use std::sync::Arc;

use gpusvm::addr::PAGE_2M;
use gpusvm_live::Territory;

use crate::args::{CpuFaults, Planted, RunArgs};
use crate::machine::Machine;
use crate::run::RunError;
use crate::torture::area::{self, Area, Plan};
use crate::torture::churn::AWAY_BYTES;
use crate::torture::random::Stream;
use crate::torture::world::{Actor, Parts, World};
use crate::torture::{CHURNERS, Crew};
use crate::workload::{PrepareError, count};

/// Maps the areas and puts the world together.
pub(super) fn build(
    args: &RunArgs,
    size: u64,
    crew: Crew,
    machine: &Machine,
) -> Result<World, RunError> {
    let mut random = Stream::named(args.seed, "areas", 0);
    let plans = area::plan(size, crew.writers(), &mut random);
    let room = area::room(&plans) + PAGE_2M;
    let refused = |error: std::io::Error| {
        RunError::Prepare(PrepareError::Input {
            path: "address space".into(),
            why: error.to_string(),
        })
    };
    let land = Territory::reserve(2 * room + AWAY_BYTES * count(CHURNERS)).map_err(refused)?;
    let compute_only = match args.cpu_faults {
        CpuFaults::Monitor => Ok(None),
        CpuFaults::InThread => machine.space().compute_only(land.span()).map(Some),
    };
    let compute_only = compute_only.map_err(|error| RunError::Machine(error.into()))?;
    let start = land.span().start();
    let homes = [0, 1].map(|n| area::place(&plans, start.plus(n * room)));
    let mut areas = Vec::new();
    for (id, plan) in (0..=u8::MAX).zip(plans) {
        let n = usize::from(id);
        let plan: Plan = plan;
        land.map(homes[0][n], plan.huge).map_err(refused)?;
        areas.push(Area::new(
            id,
            plan,
            [homes[0][n].start(), homes[1][n].start()],
        ));
    }
    Ok(World::new(Parts {
        land,
        compute_only,
        areas,
        actors: crew.names().into_iter().map(Actor::new).collect(),
        space: Arc::clone(machine.space()),
        seed: args.seed,
        hang: args.planted == Some(Planted::Hang),
    }))
}
