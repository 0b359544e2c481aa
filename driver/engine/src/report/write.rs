//! Keeping timelines: one JSON file and one picture a migration and end, the newest hundred of them.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use thiserror::Error;
use uuid::Uuid;

use super::svg;
use super::timeline::{Role, Timeline};

/// Timelines kept in a directory.
const KEPT: usize = 100;
/// The longest guest name in a file name, in bytes; the rest of the name is at most 59 bytes, and file systems allow 255.
const LONGEST_NAME: usize = 100;
/// What our files end with. The last is a file that was never completed.
const ENDINGS: [&str; 4] = [".json", ".svg", ".json.part", ".svg.part"];

/// Why a timeline could not be kept.
#[derive(Debug, Error)]
#[error("cannot keep the migration's report {path}: {source}")]
pub struct SaveError {
    path: PathBuf,
    source: io::Error,
}

/// Keeps `timeline` in `dir`, as [`keep`] does.
///
/// # Errors
/// As with [`keep`].
pub fn save(timeline: &Timeline, dir: &Path) -> Result<PathBuf, SaveError> {
    let m = &timeline.migration;
    keep(
        dir,
        (&m.guest.name, m.session, m.role),
        timeline,
        &svg::render(timeline),
    )
}

/// Writes what is known of one end of a migration to `dir` (made if missing, mode 0750) as
/// `<guest>-<session>-<role>.json` with its picture, an `.svg`, beside it, both appearing complete or not at all, and
/// removes the oldest of our files beyond the newest hundred. Returns the path of the JSON file.
///
/// # Errors
/// If a file cannot be written; what could not be removed is only logged.
pub fn keep(
    dir: &Path,
    (guest, session, role): (&str, Uuid, Role),
    content: &impl Serialize,
    picture: &str,
) -> Result<PathBuf, SaveError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        |source| SaveError { path, source }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(dir)
        .map_err(error(dir))?;
    let stem = format!("{}-{session}-{}", file_safe(guest), role.name());
    let json_path = dir.join(format!("{stem}.json"));
    let mut json = serde_json::to_vec_pretty(content)
        .map_err(io::Error::from)
        .map_err(error(&json_path))?;
    json.push(b'\n');
    replace(&json_path, &json).map_err(error(&json_path))?;
    prune(dir, &stem);
    let svg_path = json_path.with_extension("svg");
    replace(&svg_path, picture.as_bytes()).map_err(error(&svg_path))?;
    Ok(json_path)
}

/// Tells a finished migration: a few lines in the log, and its files in `dir`. A full disk must not fail a migration,
/// so a report that cannot be kept is only logged.
pub fn publish(timeline: &Timeline, dir: &Path) {
    for line in super::summary::lines(timeline) {
        tracing::info!("{line}");
    }
    match save(timeline, dir) {
        Ok(path) => tracing::info!(timeline = %path.display(), "timeline kept"),
        Err(error) => tracing::warn!("{error}"),
    }
}

/// A guest's name as part of a file name: nothing but ASCII letters, digits, `.`, `_` and `-`, never hidden.
fn file_safe(name: &str) -> String {
    let safe: String = name
        .chars()
        .take(LONGEST_NAME)
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '_'
            }
        })
        .collect();
    match safe.chars().next() {
        None => "_".to_owned(),
        Some('.' | '-') => format!("_{}", &safe[1..]),
        Some(_) => safe,
    }
}

/// Writes beside the file and renames: a reader never sees half of it. Only one process has this session and role,
/// so the name of the temporary file can be fixed, and what a crash left of it is replaced.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(&part)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

/// Removes the oldest timelines with all their files. The one just written stays, whatever the clock says.
fn prune(dir: &Path, newest: &str) {
    let mut groups: HashMap<String, (SystemTime, Vec<PathBuf>)> = HashMap::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return tracing::warn!("cannot look for old reports in {}: {error}", dir.display()),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(stem) = name.to_str().and_then(stem_of_ours) else {
            continue;
        };
        let Ok(metadata) = entry.metadata() else { continue };
        if stem == newest || !metadata.is_file() {
            continue;
        }
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let (time, files) = groups.entry(stem.to_owned()).or_insert((modified, Vec::new()));
        *time = modified.max(*time);
        files.push(entry.path());
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_unstable_by(|(a_name, (a, _)), (b_name, (b, _))| b.cmp(a).then_with(|| a_name.cmp(b_name)));
    for path in groups
        .into_iter()
        .skip(KEPT - 1)
        .flat_map(|(_, (_, files))| files)
    {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove the old report {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// The `<guest>-<session>-<role>` of a file name, if it can be one of ours.
fn stem_of_ours(name: &str) -> Option<&str> {
    let stem = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending))?;
    let rest = [Role::Source, Role::Destination]
        .iter()
        .find_map(|role| stem.strip_suffix(role.name())?.strip_suffix('-'))?;
    let (guest, session) = rest.split_at_checked(rest.len().checked_sub(36)?)?;
    Uuid::try_parse(session).ok()?;
    let guest = guest.strip_suffix('-')?;
    (file_safe(guest) == guest).then_some(stem)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report::timeline::{tests::migration, Outcome, Recorder};

    fn timeline(name: &str) -> Timeline {
        Recorder::new(migration(name)).finish(Outcome::Completed)
    }

    #[test]
    fn saves_loads_and_leaves_nothing_half_done() {
        let dir = tempfile::tempdir().unwrap();
        let nested = dir.path().join("a/b");
        let saved = timeline("web-01");
        let path = save(&saved, &nested).unwrap();
        assert_eq!(
            path.file_name().unwrap().to_str().unwrap(),
            "web-01-01234567-89ab-cdef-0123-456789abcdef-source.json"
        );
        assert_eq!(crate::report::load(&path).unwrap(), saved);
        save(&saved, &nested).unwrap();
        let mut names: Vec<_> = fs::read_dir(&nested)
            .unwrap()
            .map(|e| e.unwrap().path().extension().unwrap().to_owned())
            .collect();
        names.sort();
        assert_eq!(names, ["json", "svg"]);
    }

    #[test]
    fn hostile_names_stay_in_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "../../etc/passwd",
            "",
            ".hidden",
            "a/b\0c",
            "-rf",
            "ü\n\u{202e}",
            &"x".repeat(5000),
        ] {
            let path = save(&timeline(name), dir.path()).unwrap();
            assert_eq!(path.parent().unwrap(), dir.path(), "{name:?}");
            let file = path.file_name().unwrap().to_str().unwrap();
            assert!(!file.starts_with(['.', '-']), "{file}");
            assert!(stem_of_ours(file).is_some(), "{file}");
        }
    }

    #[test]
    fn keeps_the_newest_hundred_and_whatever_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = [
            "notes.json",
            "web-source.json",
            "web-not-a-uuid-at-all-00000000000000000000-source.json",
        ];
        for name in foreign {
            fs::write(dir.path().join(name), "mine").unwrap();
        }
        let now = SystemTime::now();
        let stem_number = |i: u32| format!("vm{i}-{}-source", Uuid::from_u128(u128::from(i)));
        for i in 0..150u32 {
            for ending in [".json", ".svg", ".json.part"] {
                let path = dir.path().join(format!("{}{ending}", stem_number(i)));
                let file = fs::File::create(&path).unwrap();
                file.set_modified(now - Duration::from_secs(1000) + Duration::from_secs(u64::from(i)))
                    .unwrap();
            }
        }
        let path = save(&timeline("web"), dir.path()).unwrap();
        assert!(path.exists());
        for i in 0..150u32 {
            let kept = i >= 51;
            for ending in [".json", ".svg", ".json.part"] {
                assert_eq!(
                    dir.path().join(format!("{}{ending}", stem_number(i))).exists(),
                    kept,
                    "{i}{ending}"
                );
            }
        }
        for name in foreign {
            assert!(dir.path().join(name).exists(), "{name}");
        }
    }

    #[test]
    fn says_which_file_could_not_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        fs::write(&blocked, "").unwrap();
        let error = save(&timeline("web"), &blocked).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    }
}
