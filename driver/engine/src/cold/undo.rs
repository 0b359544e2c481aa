//! What a session made on its host goes again: its own files, and none that somebody else has come to use.

use super::identity::is_ours;
use super::journal::Kept;
use super::locks;
use super::pinned::Pinned;
use super::Error;
use ferry_contract::cold::journal::{Entry, Fate, Journal, Role, State};
use ferry_contract::cold::Kind;
use ferry_host::Others;
use std::path::{Path, PathBuf};

/// Why a file with its final name stays; a guest that runs holds it, whatever is known.
fn need<'a>(path: &Path, pinned: &Pinned, others: &'a Others) -> Option<&'a str> {
    let held = || locks::is_held(pinned.path()).then_some("another process uses it");
    others.need(path).or_else(held)
}

/// Removes everything a session made on this host: temporary files, files in place, directories.
pub fn undo(journal: &Journal, others: &Others) {
    // Before it has asked the source, a session has nothing in place: a file there is of a later one that took up what
    // this one left.
    let may_be_placed = matches!(
        journal.state,
        State::Committing | State::Placed | State::Returning | State::Aborted
    );
    for entry in &journal.entries {
        if entry.fate != Fate::Moves || entry.kind == Kind::Block {
            continue;
        }
        let there = |path: &PathBuf| {
            let pinned = Pinned::at(path).ok()?;
            pinned
                .path()
                .symlink_metadata()
                .is_ok()
                .then(|| (path.clone(), pinned))
        };
        let temporary = entry.temporary.as_ref().and_then(there);
        let placed = Some(&entry.path).filter(|_| may_be_placed).and_then(there);
        let placed = placed.filter(|(_, pinned)| is_placed(pinned.path(), entry, journal.role));
        let placed = placed.filter(|(path, pinned)| match need(path, pinned, others) {
            Some(reason) => {
                tracing::warn!(path = %path.display(), reason, "not removed, though its guest does not come here");
                false
            }
            None => true,
        });
        for (path, pinned) in temporary.into_iter().chain(placed) {
            match std::fs::remove_file(pinned.path()) {
                Ok(()) => tracing::debug!(path = %path.display(), "removed"),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot be removed: remove it by hand")
                }
            }
        }
    }
    for directory in &journal.directories {
        // Not empty: somebody else's by now.
        let _ = std::fs::remove_dir(directory);
    }
}

/// Whether it is the file that was put in place. Its numbers alone may be a later file's, of another length.
fn is_placed(path: &Path, entry: &Entry, role: Role) -> bool {
    let of_its_length = || {
        path.metadata().is_ok_and(|found| match role {
            // A new name in an image's header may make it longer.
            Role::Within => found.len() >= entry.size,
            _ => found.len() == entry.size,
        })
    };
    is_ours(path, entry) && (entry.lasting.is_some() || of_its_length())
}

/// As [`undo`], of a session that is kept for its source to be told, and once: a file that comes later is never this one's.
///
/// # Errors
/// The journal cannot be written; the next attempt undoes again.
pub fn undo_for_good(kept: &mut Kept, made: &Journal, others: &Others) -> Result<(), Error> {
    undo(made, others);
    kept.note(|journal| {
        for entry in &mut journal.entries {
            (entry.temporary, entry.identity, entry.lasting) = (None, None, None);
        }
        journal.directories.clear();
    })
}
