//! [`Folder`]: the files of `gpusvm run --report DIR`.
//!
//! | file | what it has |
//! |---|---|
//! | `report.html` | all runs, with pictures over time ([`Page`]) |
//! | `NAME.json` | the object that `--json` prints for the run |
//! | `NAME.gt0.stats` | the counters of the first GT, as text; one file per GT |
//!
//! Everything is written as soon as it is known, so that an interrupted demo set leaves what it
//! has done. Files of the same names are written over; others are left alone.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::page::Page;
use crate::report::Report;

/// Name of the page.
pub const PAGE: &str = "report.html";

/// A folder that reports are written to.
#[derive(Debug)]
pub struct Folder(PathBuf);

/// A report cannot be written.
#[derive(Debug)]
pub struct FolderError {
    /// The folder or file.
    pub path: PathBuf,
    /// The system's answer.
    pub error: io::Error,
}

impl fmt::Display for FolderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cannot write the report to {}: {}; name a folder to write to with --report DIR",
            self.path.display(),
            self.error
        )
    }
}

impl std::error::Error for FolderError {}

impl Folder {
    /// The folder at `path`, made if it is not there. A page without runs shows that it can be
    /// written to, and replaces one of earlier runs.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        fs::create_dir_all(path).map_err(|error| FolderError {
            path: path.to_owned(),
            error: clearer(error),
        })?;
        let folder = Self(path.to_owned());
        folder.write_page(&Page::default())?;
        Ok(folder)
    }

    /// Writes the files of the last of `runs`, and the page of all of them.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn add_last(&self, runs: &[Report]) -> Result<(), FolderError> {
        if let Some(run) = runs.last() {
            let json = format!("{:#}\n", run.json());
            self.write(&json_name(run.workload), &json)?;
            for (gt, text) in run.gts.iter().enumerate() {
                self.write(&stats_name(run.workload, gt), text)?;
            }
        }
        self.write_page(&Page { runs, ended: None })
    }

    /// Writes the page alone.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_page(&self, page: &Page<'_>) -> Result<(), FolderError> {
        self.write(PAGE, &page.to_string())
    }

    fn write(&self, name: &str, content: &str) -> Result<(), FolderError> {
        let path = self.0.join(name);
        fs::write(&path, content).map_err(|error| FolderError { path, error })
    }
}

/// Name of a workload's JSON file.
#[must_use]
pub fn json_name(workload: &str) -> String {
    format!("{workload}.json")
}

/// Name of the statistics file of one GT.
#[must_use]
pub fn stats_name(workload: &str, gt: usize) -> String {
    format!("{workload}.gt{gt}.stats")
}

/// Making a folder where a file is answers that it exists, which is not what is wrong.
fn clearer(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::AlreadyExists {
        io::Error::new(io::ErrorKind::NotADirectory, "this is a file")
    } else {
        error
    }
}
