//! Reading a timeline back: `virt-ferry-engine report FILE.json [--svg OUT]`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::timeline::{Timeline, VERSION};
use super::{summary, svg};

/// The largest file read: a full timeline (4096 rounds and events) stays below it.
const LARGEST_FILE: u64 = 32 << 20;

/// Why a timeline could not be shown.
#[derive(Debug, Error)]
pub enum ReportError {
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Not a timeline.
    #[error("{path} is not a timeline written by virt-ferry: {reason}")]
    NotATimeline {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
}

/// Reads a timeline.
///
/// # Errors
/// If the file cannot be read, is larger than 32 MiB, is not a timeline, or was written by a later version.
pub fn load(path: &Path) -> Result<Timeline, ReportError> {
    let io = |source| ReportError::Io {
        path: path.to_owned(),
        source,
    };
    let not = |reason: String| ReportError::NotATimeline {
        path: path.to_owned(),
        reason,
    };
    let mut json = Vec::new();
    File::open(path)
        .map_err(io)?
        .take(LARGEST_FILE + 1)
        .read_to_end(&mut json)
        .map_err(io)?;
    if json.len() as u64 > LARGEST_FILE {
        return Err(not(format!("it is larger than {} MiB", LARGEST_FILE >> 20)));
    }
    let timeline: Timeline = serde_json::from_slice(&json).map_err(|error| not(error.to_string()))?;
    if timeline.version != VERSION {
        return Err(not(format!(
            "its version is {}, this program reads {VERSION}",
            timeline.version
        )));
    }
    Ok(timeline)
}

/// Prints the summary of the timeline in `file` to `out`, and draws it to `picture` if asked to.
///
/// # Errors
/// See [`load`]; and if `out` or `picture` cannot be written.
pub fn command(file: &Path, picture: Option<&Path>, out: &mut impl Write) -> Result<(), ReportError> {
    let timeline = load(file)?;
    for line in summary::lines(&timeline) {
        writeln!(out, "{line}").map_err(|source| ReportError::Io {
            path: "standard output".into(),
            source,
        })?;
    }
    if let Some(path) = picture {
        let io = |source| ReportError::Io {
            path: path.to_owned(),
            source,
        };
        fs::write(path, svg::render(&timeline)).map_err(io)?;
    }
    Ok(())
}
