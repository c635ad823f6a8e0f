//! [`Chart`]: panels above each other that share a time axis, as SVG.
//!
//! ```text
//!   Device faults per 1.3 ms                       ■ faults 508
//!   8 ┤      ▂▂   ▆
//!   0 ┼──────██───█──────
//!   To device, MiB per 1.3 ms                      ...
//!     ┼──────────────────
//!     0     50    100   150   time, ms
//! ```
//!
//! Lengths are tenths of a pixel, in whole numbers.

use std::fmt;

use gpusvm::seam::env::Ns;

use super::scale::{Quantity, Scale};
use super::text::Escaped;
use crate::timeline::Columns;

/// Left edge of the plots; the labels of the vertical axes stand left of it.
const LEFT: u64 = 600;
/// Width of the plots.
const PLOT: u64 = 8_800;
/// Width of the picture.
const WIDTH: u64 = LEFT + PLOT + 200;
/// Room above a plot, for its title.
const HEAD: u64 = 240;
/// Room below a plot.
const GAP: u64 = 160;
/// Room below the last plot, for the time axis.
const FOOT: u64 = 340;
/// Height below which a value that is not zero does not sink.
const LEAST: u64 = 10;
/// Most ticks of a vertical axis, and of the time axis.
const TICKS: (u64, u64) = (4, 10);

/// Panels over one time axis.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    /// What it shows, for readers who cannot see it.
    pub(super) about: &'a str,
    /// Columns of time.
    pub(super) columns: &'a Columns,
    /// When the run ended; the time after it is shaded.
    pub(super) ran: Ns,
    /// From top to bottom.
    pub(super) panels: Vec<Panel>,
}

/// One plot.
#[derive(Debug)]
pub(super) struct Panel {
    /// Title.
    pub(super) title: &'static str,
    /// What its numbers mean.
    pub(super) quantity: Quantity,
    /// Values are sums over a column, and not a level.
    pub(super) per_column: bool,
    /// Height of the plot.
    pub(super) height: u64,
    /// Stacked from the bottom.
    pub(super) layers: Vec<Layer>,
    /// A line across, with its name.
    pub(super) limit: Option<(&'static str, u64)>,
}

/// One series of a plot.
#[derive(Debug)]
pub(super) struct Layer {
    /// Name.
    pub(super) name: &'static str,
    /// Class of the style sheet that colours it.
    pub(super) class: &'static str,
    /// One value per column.
    pub(super) values: Vec<u64>,
}

/// A length in tenths of a pixel.
struct Px(u64);

impl fmt::Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0 / 10)?;
        match self.0 % 10 {
            0 => Ok(()),
            tenth => write!(f, ".{tenth}"),
        }
    }
}

impl fmt::Display for Chart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bottom: u64 = self.panels.iter().map(Panel::room).sum();
        let (width, height) = (Px(WIDTH), Px(bottom - GAP + FOOT));
        writeln!(
            f,
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
            Escaped(self.about)
        )?;
        let mut top = HEAD;
        for panel in &self.panels {
            self.backdrop(f, top, panel.height)?;
            panel.draw(f, top, self.columns.width)?;
            top += panel.room();
        }
        self.time_axis(f, bottom - GAP)?;
        self.tips(f, bottom - GAP)?;
        writeln!(f, "</svg>")
    }
}

impl Chart<'_> {
    fn count(&self) -> u64 {
        u64::try_from(self.columns.columns.len().max(1)).unwrap_or(1)
    }

    fn time(&self) -> Scale {
        Scale::until(Quantity::Time, self.columns.end().0, TICKS.1)
    }

    /// Where a moment lies.
    fn x(&self, ns: u64) -> u64 {
        LEFT + self.time().position(ns, PLOT)
    }

    /// What lies behind one plot: the time after the run is shaded, and ticks have lines.
    fn backdrop(&self, f: &mut fmt::Formatter<'_>, top: u64, height: u64) -> fmt::Result {
        let after = self.x(self.ran.0);
        writeln!(
            f,
            "<rect class=\"after\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>",
            Px(after),
            Px(top),
            Px(LEFT + PLOT - after),
            Px(height)
        )?;
        write!(f, "<path class=\"grid\" d=\"")?;
        for (at, _) in self.time().ticks() {
            write!(f, "M{} {}v{}", Px(self.x(at)), Px(top), Px(height))?;
        }
        writeln!(f, "\"/>")
    }

    /// Labels below the last plot, which ends at `base`.
    fn time_axis(&self, f: &mut fmt::Formatter<'_>, base: u64) -> fmt::Result {
        let time = self.time();
        for (at, label) in time.ticks() {
            let (x, y) = (Px(self.x(at)), Px(base + 150));
            writeln!(
                f,
                "<text class=\"tick mid\" x=\"{x}\" y=\"{y}\">{label}</text>"
            )?;
        }
        let (x, y) = (Px(LEFT + PLOT / 2), Px(base + 300));
        writeln!(
            f,
            "<text class=\"tick mid\" x=\"{x}\" y=\"{y}\">time since the start, {}</text>",
            time.unit.name
        )
    }

    /// Invisible columns, down to `base`, that tell their numbers to the pointer.
    fn tips(&self, f: &mut fmt::Formatter<'_>, base: u64) -> fmt::Result {
        let width = self.columns.width.0;
        for n in 0..self.count() {
            let (from, to) = (width * n, width * (n + 1));
            let (left, right) = (self.x(from), self.x(to));
            write!(
                f,
                "<rect class=\"tip\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{} to {}",
                Px(left),
                Px(HEAD),
                Px(right - left),
                Px(base - HEAD),
                Quantity::Time.show(from),
                Quantity::Time.show(to)
            )?;
            for panel in &self.panels {
                panel.tell(f, usize::try_from(n).unwrap_or(0))?;
            }
            writeln!(f, "</title></rect>")?;
        }
        Ok(())
    }
}

impl Panel {
    /// Height with title and gap.
    const fn room(&self) -> u64 {
        HEAD + self.height + GAP
    }

    /// The sums of all layers, and of all but the last, and so on, down to the first alone.
    fn stacked(&self) -> Vec<(&Layer, Vec<u64>)> {
        let mut below: Vec<u64> = Vec::new();
        let mut stack = Vec::new();
        for layer in &self.layers {
            below.resize(layer.values.len(), 0);
            below
                .iter_mut()
                .zip(&layer.values)
                .for_each(|(sum, v)| *sum += v);
            stack.push((layer, below.clone()));
        }
        stack.reverse();
        stack
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>, top: u64, column: Ns) -> fmt::Result {
        let stacked = self.stacked();
        let highest = stacked.first().and_then(|(_, sums)| sums.iter().max());
        let limit = self.limit.map_or(0, |(_, value)| value);
        let highest = highest.copied().unwrap_or(0).max(limit);
        let scale = Scale::around(self.quantity, highest, TICKS.0);
        self.head(f, top, scale, column)?;
        self.value_axis(f, top, scale)?;
        for (layer, sums) in &stacked {
            let path = self.outline(sums, top, scale);
            writeln!(f, "<path class=\"{}\" d=\"{path}\"/>", layer.class)?;
        }
        let Some((_, value)) = self.limit else {
            return Ok(());
        };
        let y = Px(top + self.height - scale.position(value, self.height));
        writeln!(
            f,
            "<path class=\"limit\" d=\"M{} {y}h{}\"/>",
            Px(LEFT),
            Px(PLOT)
        )
    }

    /// Title to the left, legend to the right.
    fn head(&self, f: &mut fmt::Formatter<'_>, top: u64, scale: Scale, column: Ns) -> fmt::Result {
        let y = Px(top - 80);
        write!(
            f,
            "<text class=\"title\" x=\"{}\" y=\"{y}\">{}",
            Px(LEFT),
            self.title
        )?;
        write!(f, "<tspan class=\"unit\">")?;
        if !scale.unit.name.is_empty() {
            write!(f, ", {}", scale.unit.name)?;
        }
        if self.per_column {
            write!(f, " per {}", Quantity::Time.show(column.0))?;
        }
        write!(
            f,
            "</tspan></text><text class=\"legend end\" x=\"{}\" y=\"{y}\">",
            Px(LEFT + PLOT)
        )?;
        for layer in &self.layers {
            let value = self.quantity.show(self.total(layer));
            let (class, name) = (layer.class, layer.name);
            write!(
                f,
                "\u{2003}<tspan class=\"key {class}\">\u{25a0}</tspan> {name} {value}"
            )?;
        }
        if let Some((name, value)) = self.limit {
            let value = self.quantity.show(value);
            write!(
                f,
                "\u{2003}<tspan class=\"key limit\">\u{2504}</tspan> {name} {value}"
            )?;
        }
        writeln!(f, "</text>")
    }

    /// What the legend says of a layer: the sum, or the peak of a level.
    fn total(&self, layer: &Layer) -> u64 {
        if self.per_column {
            layer.values.iter().sum()
        } else {
            layer.values.iter().copied().max().unwrap_or(0)
        }
    }

    fn value_axis(&self, f: &mut fmt::Formatter<'_>, top: u64, scale: Scale) -> fmt::Result {
        for (value, label) in scale.ticks() {
            let y = top + self.height - scale.position(value, self.height);
            let class = if value == 0 { "base" } else { "grid" };
            writeln!(
                f,
                "<path class=\"{class}\" d=\"M{} {}h{}\"/><text class=\"tick end\" x=\"{}\" y=\"{}\">{label}</text>",
                Px(LEFT),
                Px(y),
                Px(PLOT),
                Px(LEFT - 60),
                Px(y + 35)
            )?;
        }
        Ok(())
    }

    /// The outline of the area under `values`: steps, one per column.
    fn outline(&self, values: &[u64], top: u64, scale: Scale) -> String {
        let base = top + self.height;
        let count = u64::try_from(values.len().max(1)).unwrap_or(1);
        let mut path = format!("M{} {}", Px(LEFT), Px(base));
        let mut level = base;
        for (n, value) in (0..).zip(values) {
            let height = match *value {
                0 => 0,
                value => scale.position(value, self.height).max(LEAST),
            };
            if base - height != level {
                level = base - height;
                path += &format!("H{}V{}", Px(LEFT + PLOT * n / count), Px(level));
            }
        }
        path + &format!("H{}V{}Z", Px(LEFT + PLOT), Px(base))
    }

    fn tell(&self, f: &mut fmt::Formatter<'_>, column: usize) -> fmt::Result {
        for layer in &self.layers {
            let value = layer.values.get(column).copied().unwrap_or(0);
            write!(f, "\n{}: {}", layer.name, self.quantity.show(value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(values: &[u64]) -> Panel {
        Panel {
            title: "t",
            quantity: Quantity::Count,
            per_column: true,
            height: 1000,
            layers: vec![Layer {
                name: "n",
                class: "c",
                values: values.to_vec(),
            }],
            limit: None,
        }
    }

    #[test]
    fn an_outline_steps_where_values_change_and_keeps_small_values_visible() {
        let values = [0, 4, 4, 0];
        let scale = Scale::around(Quantity::Count, 4, 4);
        let path = panel(&values).outline(&values, 100, scale);
        assert_eq!(path, "M60 110H280V10H720V110H940V110Z");
        let values = [1];
        let scale = Scale::around(Quantity::Count, 100_000, 4);
        let path = panel(&values).outline(&values, 100, scale);
        assert_eq!(path, "M60 110H60V109H940V110Z");
    }

    #[test]
    fn layers_are_stacked_and_the_whole_is_drawn_first() {
        let mut panel = panel(&[1, 2]);
        panel.layers.push(Layer {
            name: "m",
            class: "d",
            values: vec![10, 20],
        });
        let stacked: Vec<Vec<u64>> = panel.stacked().into_iter().map(|(_, sums)| sums).collect();
        assert_eq!(stacked, [[11, 22], [1, 2]]);
    }

    #[test]
    fn panels_share_one_time_axis_with_its_unit() {
        let columns = Columns {
            width: Ns(1_000_000),
            columns: vec![Default::default(); 200],
        };
        let values = vec![1; 200];
        let chart = Chart {
            about: "a < b",
            columns: &columns,
            ran: Ns(150_000_000),
            panels: vec![panel(&values), panel(&values)],
        };
        let svg = chart.to_string();
        assert_eq!(svg.matches("time since the start, ms").count(), 1);
        assert_eq!(svg.matches("<title>").count(), 200);
        assert_eq!(svg.matches("class=\"c\"").count(), 2);
        assert!(svg.contains("aria-label=\"a &lt; b\""));
        assert!(
            svg.contains("<title>199 ms to 200 ms\nn: 1\nn: 1</title>"),
            "{svg}"
        );
        // The run ends at three quarters of the axis.
        assert!(
            svg.contains("class=\"after\" x=\"720\" y=\"24\" width=\"220\""),
            "{svg}"
        );
    }

    #[test]
    fn a_picture_of_nothing_is_drawn() {
        let columns = Columns {
            width: Ns(100_000),
            columns: Vec::new(),
        };
        let chart = Chart {
            about: "",
            columns: &columns,
            ran: Ns(0),
            panels: vec![panel(&[])],
        };
        assert!(chart.to_string().ends_with("</svg>\n"));
    }
}
