//! Progress of long work, on a terminal only.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Is told how far the work is.
pub trait Progress: Sync {
    /// `done` of `all` groups of `step` are begun.
    fn at(&self, step: &str, done: u32, all: u32);
}

/// Says nothing.
impl Progress for () {
    fn at(&self, _step: &str, _done: u32, _all: u32) {}
}

/// A bar on standard error, if that is a terminal.
#[derive(Debug)]
pub struct Bar(Option<ProgressBar>);

impl Bar {
    /// A bar for the work `name`, or none where `wanted` says so or nobody looks.
    #[must_use]
    pub fn new(name: &str, wanted: Wanted) -> Self {
        if wanted == Wanted::No || !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let template = "{prefix:>10} {bar:30} {msg} {elapsed}";
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_malformed| ProgressStyle::default_bar());
        Self(Some(
            ProgressBar::new(0)
                .with_style(style)
                .with_prefix(name.to_owned()),
        ))
    }

    /// Says what the work does now that has no groups.
    pub fn phase(&self, what: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(what.to_owned());
            bar.tick();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Whether a bar is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// If somebody looks.
    Yes,
    /// In no case.
    No,
}

impl Progress for Bar {
    fn at(&self, step: &str, done: u32, all: u32) {
        if let Some(bar) = &self.0 {
            bar.set_length(u64::from(all));
            bar.set_position(u64::from(done));
            bar.set_message(step.to_owned());
        }
    }
}

/// How many worlds have run, on standard error, once a second, if that is a terminal.
#[derive(Debug)]
pub struct Worlds(Option<ProgressBar>);

impl Worlds {
    /// Of `all` worlds called `name`, none has run.
    #[must_use]
    pub fn new(name: &str, all: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let template = "{prefix:>10} {bar:30} {pos} of {len} worlds, {per_sec}, {msg}, {elapsed}";
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_malformed| ProgressStyle::default_bar());
        let target = ProgressDrawTarget::stderr_with_hz(1);
        let bar = ProgressBar::with_draw_target(Some(all), target);
        Self(Some(
            bar.with_style(style)
                .with_prefix(name.to_owned())
                .with_message("none failed"),
        ))
    }

    /// `more` worlds have run; none of them failed, or the last one did, and there will be no others.
    pub fn ran(&self, more: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(more);
        }
    }

    /// Says what the search is for.
    pub fn say(&self, what: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(what.to_owned());
        }
    }
}

impl Drop for Worlds {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
