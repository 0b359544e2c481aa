//! How a guest stands by its journal.

use super::read;
use ferry_contract::cold::journal::{self, Journal, Role, State};
use ferry_host as host;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use uuid::Uuid;

/// Whether a migration of this guest is written down on this host, or may be.
pub fn is_pending(uuid: Uuid) -> bool {
    let state = host::state_directory();
    state.map_or(true, |state| {
        journal::path(&state, uuid).symlink_metadata().is_ok()
    })
}

/// Whether a migration of this guest keeps it from being started: it has not been given up by both hosts.
pub fn is_fenced(uuid: Uuid) -> bool {
    let Ok(state) = host::state_directory() else {
        return true;
    };
    let fence = read(&journal::path(&state, uuid)).map(|journal| journal.fence().is_some());
    fence.unwrap_or_else(|_| is_pending(uuid))
}

/// How a guest that is to leave stands by its journal, which is large, and seldom another one.
#[derive(Debug, Default)]
pub struct Departing {
    /// What tells it from the next one.
    file: Option<(u64, i64, i64, u64)>,
    /// Whether something keeps the guest from being started here.
    pub is_fenced: bool,
    /// Whether it has left, and only its end here is missing.
    pub has_left: bool,
}

impl Departing {
    /// Looks again; reads only what it has not read.
    pub fn look(&mut self, uuid: Uuid) {
        let is_leaving = |journal: &Journal| {
            let has_left = (journal.role, journal.state) == (Role::Source, State::OwnedThere);
            (journal.fence().is_some(), has_left)
        };
        match host::state_directory() {
            Ok(state) => self.look_at(&journal::path(&state, uuid), |path| {
                read(path).as_ref().map(is_leaving).ok()
            }),
            Err(_) => (self.is_fenced, self.has_left) = (true, false),
        }
    }

    fn look_at(&mut self, path: &Path, read: impl FnOnce(&Path) -> Option<(bool, bool)>) {
        let identity = |file: Metadata| (file.ino(), file.mtime(), file.mtime_nsec(), file.len());
        // Before it is read: whoever writes it puts another file in its place.
        let file = path.symlink_metadata().map(identity).ok();
        if self.file.is_some() && self.file == file {
            return;
        }
        let found = read(path);
        self.file = file.filter(|_| found.is_some());
        (self.is_fenced, self.has_left) = found.unwrap_or_else(|| (path.symlink_metadata().is_ok(), false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_read_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        let (mut departing, mut reads) = (Departing::default(), 0);
        let mut look = |found| {
            departing.look_at(&path, |_| {
                reads += 1;
                found
            });
            (departing.is_fenced, departing.has_left, reads)
        };
        assert_eq!(look(None), (false, false, 1));
        std::fs::write(&path, "1").unwrap();
        let left = Some((true, true));
        assert_eq!(
            [look(None), look(left), look(left)],
            [(true, false, 2), (true, true, 3), (true, true, 3)]
        );
        let next = path.with_extension("part");
        std::fs::write(&next, "2").unwrap();
        std::fs::rename(&next, &path).unwrap();
        let given_up = Some((false, false));
        assert_eq!([look(given_up), look(left)], [(false, false, 4); 2]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look(None), (false, false, 5));
    }
}
