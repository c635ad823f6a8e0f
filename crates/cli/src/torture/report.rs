//! What a torture run has to say.

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};

use gpusvm_xe::stats::{Counter, DeviceStats};
use serde_json::{Map, Value, json};

use crate::args::{RunArgs, value_name};
use crate::size::counted;
use crate::table::Table;
use crate::torture::area::{Area, Past};
use crate::torture::op::Op;
use crate::torture::world::{Fault, Finding, Side, Tally, World};

/// Names of [`Tally::accesses`].
const ACCESSES: [&str; 4] = ["cpu_reads", "cpu_writes", "device_reads", "device_writes"];

/// Operations elsewhere in an area that are told with a finding.
const ELSEWHERE: usize = 6;

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// The `torture` object.
pub(super) fn json(world: &World, stats: &DeviceStats, repeat: &str) -> Value {
    let Tally {
        accesses,
        refused_in_change,
        ops,
        watchdog,
        ..
    } = &world.tally;
    let mut object = Map::new();
    for (name, counter) in ACCESSES.into_iter().zip(accesses) {
        object.insert(name.to_owned(), get(counter).into());
    }
    for fault in Fault::ALL {
        object.insert(fault.name().to_owned(), world.faults(fault).into());
    }
    object.insert("watchdog_reports".to_owned(), get(watchdog).into());
    object.insert(
        "refused_in_change".to_owned(),
        get(refused_in_change).into(),
    );
    for (name, value) in migrations(stats) {
        object.insert(name.to_owned(), value.into());
    }
    let ops: Map<String, Value> = Op::ALL
        .into_iter()
        .zip(ops)
        .map(|(op, [done, refused])| {
            let both = json!({ "done": get(done), "refused": get(refused) });
            (op.name().to_owned(), both)
        })
        .collect();
    object.insert("operations".to_owned(), ops.into());
    object.insert("forks".to_owned(), forks(world).into());
    let finding = world
        .finding()
        .map(|finding| finding_json(world, &finding, repeat));
    object.insert("finding".to_owned(), finding.unwrap_or(Value::Null));
    object.into()
}

/// Children that were made.
fn forks(world: &World) -> u64 {
    let made = [Op::Fork, Op::Exec].map(|op| get(&world.tally.ops[op as usize][0]));
    made.into_iter().sum()
}

fn migrations(stats: &DeviceStats) -> [(&'static str, u64); 4] {
    [
        ("migrations_to_device", stats.migrations_to_device()),
        ("migrations_home", stats.migrations_home()),
        ("device_faults", stats.total(Counter::SvmPagefaultCount)),
        ("cpu_faults", stats.total(Counter::CpuFaultCount)),
    ]
}

fn finding_json(world: &World, finding: &Finding, repeat: &str) -> Value {
    let hex = |value: Option<u64>| value.map(|value| format!("{value:#x}"));
    json!({
        "kind": finding.fault.name(),
        "side": side(finding.side),
        "actor": world.actors[finding.actor].name,
        "area": finding.tag.area,
        "page": finding.tag.page,
        "slot": finding.tag.slot,
        "address": format!("{:#x}", finding.address),
        "found": hex(finding.found),
        "again": hex(finding.again),
        "floor": finding.known.floor,
        "burnt": finding.known.burnt,
        "ceiling": finding.ceiling,
        "repeat": repeat,
    })
}

const fn side(side: Side) -> &'static str {
    match side {
        Side::Cpu => "cpu",
        Side::Device => "device",
    }
}

/// Two tables: what was done, and what was wrong.
pub(super) fn tables(world: &World, stats: &DeviceStats) -> String {
    let mut done = Table::new(&["operation", "done", "refused"]);
    for (op, [yes, no]) in Op::ALL.into_iter().zip(&world.tally.ops) {
        done.row(vec![
            op.name().to_owned(),
            get(yes).to_string(),
            get(no).to_string(),
        ]);
    }
    let mut found = Table::new(&["what", "count"]);
    let mut row = |name: &str, value: u64| found.row(vec![name.to_owned(), value.to_string()]);
    for (name, counter) in ACCESSES.into_iter().zip(&world.tally.accesses) {
        row(name, get(counter));
    }
    migrations(stats)
        .into_iter()
        .for_each(|(name, value)| row(name, value));
    row("forks", forks(world));
    row("refused_in_change", get(&world.tally.refused_in_change));
    Fault::ALL
        .into_iter()
        .for_each(|fault| row(fault.name(), world.faults(fault)));
    row("watchdog_reports", get(&world.tally.watchdog));
    format!("{done}\n{found}")
}

/// The device's counters that are not zero.
pub(super) fn counters(stats: &DeviceStats) -> String {
    let counters = Counter::ALL.iter().map(|c| (c.name(), stats.total(*c)));
    let some = counters.filter(|(_, value)| *value > 0);
    some.map(|(name, value)| format!("{name}: {value}\n"))
        .collect()
}

/// The first thing that was wrong, and how to see it again.
pub(super) fn explain(world: &World, finding: &Finding, repeat: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _written = write_explanation(&mut text, world, finding, repeat);
    text
}

fn write_explanation(
    out: &mut String,
    world: &World,
    finding: &Finding,
    repeat: &str,
) -> core::fmt::Result {
    let tag = finding.tag;
    let area = &world.areas[usize::from(tag.area)];
    let who = &world.actors[finding.actor].name;
    writeln!(
        out,
        "torture: {} at {:.3}s, seen by {who} on the {}",
        finding.fault.name(),
        seconds(finding.at_us),
        side(finding.side)
    )?;
    writeln!(
        out,
        "  word:     area {} page {} slot {} at {:#x} (area: {}, {:?}, now at {})",
        tag.area,
        tag.page,
        tag.slot,
        finding.address,
        counted(u64::from(area.plan.pages), "page", "pages"),
        area.plan.huge,
        area.span()
    )?;
    let text = |raw: Option<u64>| match raw {
        None => "no access".to_owned(),
        Some(raw) => match tag.version(raw) {
            Some(version) => format!("version {version}"),
            None => format!("{raw:#x}"),
        },
    };
    writeln!(
        out,
        "  expected: version {} to {}, none up to {}",
        finding.known.floor, finding.ceiling, finding.known.burnt
    )?;
    let (found, again) = (text(finding.found), text(finding.again));
    writeln!(out, "  found:    {found}; again: {again}")?;
    if finding.errno != 0 {
        let error = std::io::Error::from_raw_os_error(finding.errno);
        writeln!(out, "  refused:  {error}")?;
    }
    for past in last_ops(area, tag.page) {
        writeln!(out, "  {}", line(world, &past))?;
    }
    writeln!(out, "  repeat:   {repeat}")
}

/// The last operations on the page, and the very last elsewhere in the area.
fn last_ops(area: &Area, page: u32) -> Vec<Past> {
    let all = area.past();
    let hits = |past: &Past| (past.first..past.first + past.pages).contains(&page);
    let elsewhere = all.len().saturating_sub(ELSEWHERE);
    let kept = |(n, past): (usize, &Past)| (n >= elsewhere || hits(past)).then_some(*past);
    all.iter().enumerate().filter_map(kept).collect()
}

fn line(world: &World, past: &Past) -> String {
    let answer = match past.errno {
        0 => String::new(),
        errno => format!(", errno {errno}"),
    };
    format!(
        "before:   {:.6}s for {}us: {} of pages {}..{} by {}{answer}",
        seconds(past.began_us),
        past.took_us,
        past.op.name(),
        past.first,
        past.first + past.pages,
        world.actors[past.by].name,
    )
}

fn seconds(us: u64) -> f64 {
    core::time::Duration::from_micros(us).as_secs_f64()
}

/// The command that repeats a run.
pub(super) fn repeat(args: &RunArgs, seconds: u64, size: u64, vram: u64) -> String {
    let lower = |value: &dyn core::fmt::Debug| format!("{value:?}").to_lowercase();
    let level = value_name(args.live.level).unwrap_or_default();
    let cpu_faults = value_name(args.cpu_faults).unwrap_or_default();
    let mut command = format!(
        "gpusvm run torture --seconds {seconds} --seed {} --size {size} --vram {vram} --threads {} \
         --migration {} --fault-service {} --brackets {} --level {level} --cpu-faults {cpu_faults}",
        args.seed,
        args.threads,
        lower(&args.migration),
        lower(&args.fault_service),
        lower(&args.live.brackets),
    );
    if !args.ops.is_empty() {
        let names: Vec<_> = args.ops.iter().map(|op| op.name()).collect();
        let _written = write!(command, " --ops {}", names.join(","));
    }
    if let Some(odds) = args.jitter {
        let _written = write!(command, " --jitter {odds}");
    }
    if let Some(planted) = args.planted {
        let _written = write!(command, " --break {}", lower(&planted));
    }
    command
}
