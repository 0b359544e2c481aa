//! Reading a timeline back: `virt-ferry-engine report FILE.json [--svg OUT]`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::timeline::{Timeline, VERSION};
use super::{page, svg};
use crate::cold::record::Record;

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
    let not = |reason: String| ReportError::NotATimeline {
        path: path.to_owned(),
        reason,
    };
    let json = content(path)?;
    let timeline: Timeline = serde_json::from_slice(&json).map_err(|error| not(error.to_string()))?;
    if timeline.version != VERSION {
        return Err(not(format!(
            "its version is {}, this program reads {VERSION}",
            timeline.version
        )));
    }
    Ok(timeline)
}

/// The record of a cold migration, if that is what the file holds.
fn cold(path: &Path) -> Result<Option<Record>, ReportError> {
    let record = serde_json::from_slice::<Record>(&content(path)?).ok();
    Ok(record.filter(|record| record.cold && record.version == crate::cold::record::VERSION))
}

fn content(path: &Path) -> Result<Vec<u8>, ReportError> {
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
    match json.len() as u64 > LARGEST_FILE {
        true => Err(not(format!("it is larger than {} MiB", LARGEST_FILE >> 20))),
        false => Ok(json),
    }
}

/// Prints the page of the timeline in `file` to `out`, and draws it to `picture` if asked to.
///
/// # Errors
/// See [`load`]; and if `out` or `picture` cannot be written.
pub fn command(file: &Path, picture: Option<&Path>, out: &mut impl Write) -> Result<(), ReportError> {
    let mut print = |lines: Vec<String>| {
        let mut lines = lines.iter();
        let printed = lines.try_for_each(|line| writeln!(out, "{line}"));
        printed.map_err(|source| ReportError::Io {
            path: "standard output".into(),
            source,
        })
    };
    let drawn = match cold(file)? {
        Some(record) => {
            print(record.lines())?;
            picture.map(|path| (path, svg::render_cold(&record)))
        }
        None => {
            let timeline = load(file)?;
            print(page::lines(&timeline))?;
            picture.map(|path| (path, svg::render(&timeline)))
        }
    };
    if let Some((path, drawn)) = drawn {
        let io = |source| ReportError::Io {
            path: path.to_owned(),
            source,
        };
        fs::write(path, drawn).map_err(io)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ferry_contract::stage::Stage;

    use super::*;
    use crate::report::Outcome;

    /// A file of version 1 with nothing in it that may be missing. What is written today must be read for ever.
    const OLDEST: &str = r#"{
        "version": 1,
        "session": "01234567-89ab-cdef-0123-456789abcdef",
        "role": "destination",
        "guest": {"name": "web", "uuid": "00000000-0000-0000-0000-00000000feed"},
        "local_host": "kvm-b", "peer_host": "kvm-a", "streams": 2,
        "started": "2026-11-22T21:17:03.512Z", "monotonic_base_us": 1000000,
        "total_ms": 12.345,
        "outcome": {"result": "failed", "stage": "reservation", "error": "no room on tmpfs"},
        "ram": {"blocks": 1, "bytes": 536870912, "resident": 0},
        "stages": [{"stage": "reservation", "begin_ms": 0.5, "end_ms": 12.345}],
        "rounds": [{"number": 0, "begin_ms": 1, "scan_ms": 1, "drain_ms": 0, "send_ms": 2.5,
                    "pages": 10, "data_bytes": 40960, "zero_bytes": 0, "dirty_rate": 0}],
        "totals": {"frames": 1, "data_bytes": 40960, "zero_bytes": 0, "wire_bytes": 41000},
        "added_later": {"is": "ignored"}
    }"#;

    #[test]
    fn reads_the_oldest_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("timeline.json");
        fs::write(&file, OLDEST).unwrap();
        let timeline = load(&file).unwrap();
        let failed = Outcome::Failed {
            stage: Some(Stage::Reservation),
            error: "no room on tmpfs".into(),
        };
        assert_eq!(timeline.outcome, failed);
        assert_eq!(
            (timeline.rounds.len(), timeline.downtime, timeline.omitted),
            (1, None, 0)
        );

        let picture = dir.path().join("picture.svg");
        let mut out = Vec::new();
        command(&file, Some(&picture), &mut out).unwrap();
        assert!(String::from_utf8(out)
            .unwrap()
            .starts_with("web did not move from kvm-a to kvm-b"));
        assert!(fs::read_to_string(&picture).unwrap().starts_with("<svg "));
    }

    #[test]
    fn refuses_what_is_not_a_timeline_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("timeline.json");
        let later = OLDEST.replace("\"version\": 1", "\"version\": 2");
        let infinite = OLDEST.replace("12.345", "1e999");
        let deep = format!("{{\"deep\": {}", "[".repeat(1_000_000));
        for (content, reason) in [
            ("", "EOF"),
            ("{}", "missing field"),
            (&later, "version is 2"),
            (&infinite, "number"),
            (&deep, "recursion"),
        ] {
            fs::write(&file, content).unwrap();
            let error = load(&file).unwrap_err().to_string();
            assert!(
                error.contains("timeline.json is not a timeline") && error.contains(reason),
                "{error}"
            );
        }
        File::create(&file).unwrap().set_len(LARGEST_FILE + 1).unwrap();
        assert!(load(&file)
            .unwrap_err()
            .to_string()
            .contains("larger than 32 MiB"));
        assert!(matches!(load(dir.path()), Err(ReportError::Io { .. })));
        assert!(matches!(
            load(&dir.path().join("none")),
            Err(ReportError::Io { .. })
        ));
    }
}
