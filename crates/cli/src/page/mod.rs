//! [`Page`]: `report.html`, one page for all runs that needs nothing but itself.

mod chart;
mod scale;
mod text;

use std::fmt;

use gpusvm_xe::stats::Counter;
use serde_json::Value;

use self::chart::{Chart, Layer, Panel};
use self::scale::Quantity;
use self::text::Escaped;
use crate::folder::{json_name, stats_name};
use crate::report::{COLUMNS, Picture, Report};
use crate::size;
use crate::timeline::{Columns, Series};

/// The style sheet, which stands in the page.
const STYLE: &str = include_str!("style.css");
/// Units of counters, and how the names of those that have them end.
const KINDS: [(&str, &str); 3] = [("count", "_count"), ("KiB", "_kb"), ("\u{b5}s", "_us")];
/// Heights of plots, in tenths of a pixel.
const PLOT: u64 = 720;
const TALL: u64 = 1300;

/// The page. Its `Display` is HTML, in which everything that comes from elsewhere is escaped.
#[derive(Clone, Copy, Debug, Default)]
pub struct Page<'a> {
    /// Finished runs.
    pub runs: &'a [Report],
    /// Why there are no more, where there should be.
    pub ended: Option<&'a str>,
}

impl fmt::Display for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" \
             content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n\
             <title>gpusvm report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
             <h1>gpusvm report</h1>"
        )?;
        self.summary(f)?;
        self.runs.iter().try_for_each(|run| section(f, run))?;
        writeln!(f, "</body>\n</html>")
    }
}

impl Page<'_> {
    /// What there is, and the table of the command line.
    fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = env!("CARGO_PKG_VERSION");
        let said = match self.runs.len() {
            0 => "no run has finished".to_owned(),
            1 => "one run".to_owned(),
            n => format!("{n} runs"),
        };
        writeln!(f, "<p class=\"quiet\">gpusvm {version}, {said}</p>")?;
        if let Some(why) = self.ended {
            writeln!(f, "<p class=\"note\">It ended early: {}</p>", Escaped(why))?;
        }
        if self.runs.is_empty() {
            return Ok(());
        }
        write!(
            f,
            "<div class=\"wide\"><table class=\"summary\">\n<thead><tr>"
        )?;
        COLUMNS
            .iter()
            .try_for_each(|name| write!(f, "<th>{name}</th>"))?;
        writeln!(f, "</tr></thead>\n<tbody>")?;
        self.runs.iter().try_for_each(|run| summary_row(f, run))?;
        writeln!(f, "</tbody></table></div>")
    }
}

fn summary_row(f: &mut fmt::Formatter<'_>, run: &Report) -> fmt::Result {
    let name = Escaped(run.workload);
    write!(f, "<tr><td><a href=\"#{name}\">{name}</a></td>")?;
    for (column, cell) in COLUMNS.iter().zip(run.row()).skip(1) {
        let wrong = *column == "verified" && !run.verified;
        let class = if wrong { " class=\"bad\"" } else { "" };
        write!(f, "<td{class}>{}</td>", Escaped(cell))?;
    }
    writeln!(f, "</tr>")
}

/// All about one run.
fn section(f: &mut fmt::Formatter<'_>, run: &Report) -> fmt::Result {
    let name = Escaped(run.workload);
    writeln!(f, "<section>\n<h2 id=\"{name}\">{name}</h2>")?;
    verdict(f, run)?;
    if let Some(picture) = &run.picture {
        flows(f, run, picture)?;
        residency(f, run, picture)?;
    }
    counters(f, run)?;
    host(f, run)?;
    writeln!(f, "</section>")
}

/// Whether it was right, with which options, and where the files are.
fn verdict(f: &mut fmt::Formatter<'_>, run: &Report) -> fmt::Result {
    if run.verified {
        write!(f, "<p>Verified against the CPU.")?;
    } else {
        write!(f, "<p><span class=\"bad\">The answer is wrong.</span>")?;
    }
    if let Some(answer) = &run.answer {
        write!(f, " {}.", Escaped(answer))?;
    }
    write!(f, " <span class=\"quiet\">")?;
    let (mut between, options) = ("", run.config.as_object());
    for (key, value) in options.into_iter().flatten().filter(|(_, v)| !v.is_null()) {
        write!(
            f,
            "{between}{} {}",
            Escaped(key.replace('_', " ")),
            option(key, value)
        )?;
        between = ", ";
    }
    let json = json_name(run.workload);
    write!(f, ". Files: <a href=\"{0}\">{0}</a>", Escaped(json))?;
    for gt in 0..run.gts.len() {
        let stats = stats_name(run.workload, gt);
        write!(f, " <a href=\"{0}\">{0}</a>", Escaped(stats))?;
    }
    writeln!(f, "</span></p>")
}

/// The value of an option as it is written on the command line.
fn option(key: &str, value: &Value) -> Escaped<String> {
    let bytes = value.as_u64().filter(|_| matches!(key, "size" | "vram"));
    let text = value.as_str().map(str::to_owned);
    Escaped(bytes.map_or_else(|| text.unwrap_or_else(|| value.to_string()), size::format))
}

/// What moved and what happened, over time.
fn flows(f: &mut fmt::Formatter<'_>, run: &Report, picture: &Picture) -> fmt::Result {
    let columns = &picture.columns;
    let layer = |name, class, series| Layer {
        name,
        class,
        values: columns.columns.iter().map(|c| c.get(series)).collect(),
    };
    let panel = |title, quantity, layers| Panel {
        title,
        quantity,
        per_column: true,
        height: PLOT,
        layers,
        limit: None,
    };
    let faults = layer("faults", "faults", Series::Faults);
    let out = layer("to device", "out", Series::ToDevice);
    let home = vec![
        layer("CPU fault", "cpu", Series::HomeCpuFault),
        layer("eviction under pressure", "pressure", Series::HomePressure),
        layer("other", "other", Series::HomeOther),
    ];
    let tlb = layer("TLB invalidations", "tlb", Series::TlbInvalidations);
    let chart = Chart {
        about: &format!(
            "{}: faults, migrations and TLB invalidations over time",
            run.workload
        ),
        columns,
        ran: picture.ran,
        panels: vec![
            panel("Device faults", Quantity::Count, vec![faults]),
            panel("Migrated to device", Quantity::Bytes, vec![out]),
            panel("Migrated home, by cause", Quantity::Bytes, home),
            panel("TLB invalidations", Quantity::Count, vec![tlb]),
        ],
    };
    let note = if picture.ran.0 < columns.end().0 {
        "Shaded: after the run, while the CPU verifies the answer. "
    } else {
        ""
    };
    writeln!(
        f,
        "<h3>What happened</h3>\n<figure>\n{chart}<figcaption>One column is {}; the numbers in the \
         legends are sums over all of them. {note}</figcaption>\n</figure>",
        Quantity::Time.show(columns.width.0)
    )
}

/// Where memory is, over time.
fn residency(f: &mut fmt::Formatter<'_>, run: &Report, picture: &Picture) -> fmt::Result {
    let columns: &Columns = &picture.columns;
    let panel = Panel {
        title: "In device memory",
        quantity: Quantity::Bytes,
        per_column: false,
        height: TALL,
        layers: vec![Layer {
            name: "pages, at most",
            class: "resident",
            values: columns.columns.iter().map(|c| c.resident).collect(),
        }],
        limit: Some(("VRAM", run.vram)),
    };
    let chart = Chart {
        about: &format!(
            "{}: device memory that holds pages, over time",
            run.workload
        ),
        columns,
        ran: picture.ran,
        panels: vec![panel],
    };
    writeln!(
        f,
        "<h3>Where memory is</h3>\n<figure>\n{chart}<figcaption>Device memory that holds pages of the \
         process; of each column, its peak. Page tables take some of the rest.</figcaption>\n</figure>"
    )
}

/// Every counter that is not zero, by kind.
fn counters(f: &mut fmt::Formatter<'_>, run: &Report) -> fmt::Result {
    writeln!(
        f,
        "<h3>Counters that are not zero</h3>\n<div class=\"counters\">"
    )?;
    for (unit, ending) in KINDS {
        let value = |name: &str| run.stats.get(name).and_then(Value::as_u64).unwrap_or(0);
        let names = Counter::ALL.iter().map(|counter| counter.name());
        let of_kind = names.filter(|name| name.ends_with(ending));
        let rows = of_kind.map(|name| (name, value(name)));
        counter_table(f, unit, rows.filter(|(_, value)| *value > 0))?;
    }
    writeln!(f, "</div>")
}

/// One kind of counters; nothing where there are none.
fn counter_table<'a>(
    f: &mut fmt::Formatter<'_>,
    unit: &str,
    rows: impl Iterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    writeln!(
        f,
        "<table><thead><tr><th>counter</th><th>{unit}</th></tr></thead><tbody>"
    )?;
    for (name, value) in rows {
        writeln!(f, "<tr><td>{}</td><td>{value}</td></tr>", Escaped(name))?;
    }
    writeln!(f, "</tbody></table>")
}

/// What the host used, and what that does not cover.
fn host(f: &mut fmt::Formatter<'_>, run: &Report) -> fmt::Result {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let rows = [
        (
            "Faults",
            text(&run.host["level"]),
            text(&run.host["not_covered"][0]),
        ),
        (
            "Brackets",
            text(&run.host["bracket"]),
            text(&run.host["not_covered"][1]),
        ),
    ];
    writeln!(f, "<h3>Host</h3>\n<table class=\"facts\"><tbody>")?;
    for (what, level, limits) in rows {
        let (level, limits) = (Escaped(level), Escaped(limits));
        writeln!(
            f,
            "<tr><th>{what}</th><td>{level}</td><td>not covered: {limits}</td></tr>"
        )?;
    }
    let (kernel, thp) = (text(&run.host["kernel"]), text(&run.host["thp"]));
    writeln!(
        f,
        "<tr><th>Kernel</th><td>{}</td><td>transparent huge pages: {}</td></tr>\n</tbody></table>",
        Escaped(kernel),
        Escaped(thp)
    )
}

#[cfg(test)]
mod tests;
