//! The source's files, once the guest is another host's: exactly what has moved goes.

use super::identity::is_ours;
use super::nonce;
use super::pinned::Pinned;
use super::place::is_device;
use super::{files, locks};
use ferry_contract::cold::journal::{Entry, Fate, Journal};
use ferry_contract::cold::{Deleted, Kept as KeptFile, Kind};
use ferry_host::Others;
use std::path::{Path, PathBuf};

/// Deletes what has moved: exactly that, none that somebody else needs, and nothing that has taken its place since. What
/// is gone already was deleted before a crash.
pub fn delete(journal: &Journal, keep: Option<&str>, in_use: &[KeptFile]) -> Deleted {
    let mut outcome = Deleted::default();
    let real = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let others = Others::new(in_use);
    for entry in &journal.entries {
        let real = real(&entry.path);
        let reason = match (entry.fate, entry.kind, keep, others.need(&real)) {
            (_, _, Some(why), _) => why.to_owned(),
            (Fate::Shared, ..) => "both hosts use it".to_owned(),
            (Fate::Present, ..) => "the destination had it before".to_owned(),
            _ if entry.digest.is_none() => "its copy was not verified".to_owned(),
            (_, Kind::Block, ..) => {
                "it is a volume: remove it where it was made, if nothing needs it".to_owned()
            }
            (.., Some(why)) => why.to_owned(),
            _ => match remove(entry, &real) {
                Ok(()) => {
                    outcome.deleted.push(entry.path.clone());
                    continue;
                }
                Err(reason) => reason,
            },
        };
        tracing::info!(path = %entry.path.display(), reason, "not deleted");
        let path = entry.path.clone();
        outcome.kept.push(KeptFile { path, reason });
    }
    if keep.is_none() {
        for directory in journal.inventory.directories.iter().rev() {
            // Not empty: somebody else's too.
            let _ = std::fs::remove_dir(&directory.path);
        }
    }
    for entry in &journal.entries {
        if let Some(parent) = entry.path.parent() {
            nonce::remove(parent, journal.session);
        }
    }
    outcome
}

fn is_gone(path: &Path) -> bool {
    let found = path.symlink_metadata();
    found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Whether a file that was to be deleted is still there, as it was when it was copied. What does not move is not looked at.
/// A device is never deleted: it has to be there, and its node is another one after a reboot.
pub fn is_whole(entry: &Entry) -> bool {
    let real = std::fs::canonicalize(&entry.path).unwrap_or_else(|_| entry.path.clone());
    match (entry.fate, entry.kind) {
        (Fate::Moves, Kind::File) => is_ours(&real, entry) && !is_changed(&real, entry),
        (Fate::Moves, Kind::Block) => is_device(&real) && holds(&real, entry.size),
        (Fate::Shared | Fate::Present, _) => true,
    }
}

/// Whether a device can be read, and has so many bytes.
fn holds(device: &Path, size: u64) -> bool {
    let length = std::fs::File::open(device)
        .and_then(|device| files::length(&device, &device.metadata()?, Kind::Block));
    length.is_ok_and(|length| length >= size)
}

/// Whether it has another length or time than the file that was copied.
fn is_changed(path: &Path, entry: &Entry) -> bool {
    let found = std::fs::metadata(path).ok();
    let found = found.map(|found| (found.len(), files::modified(&found)));
    found != entry.modified.map(|modified| (entry.size, modified))
}

/// Removes a file that has moved, and the symbolic link that named it; or why it stays.
fn remove(entry: &Entry, real: &Path) -> Result<(), String> {
    let there = match Pinned::at(real) {
        Ok(there) => there,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let path = there.path();
    let reason = match () {
        () if is_gone(path) => return Ok(()),
        () if !is_ours(path, entry) => "it is not the file that was moved",
        () if is_changed(path, entry) => "it was changed after it was copied",
        () if locks::is_held(path) => "another process uses it",
        () => {
            let removed = std::fs::remove_file(path).and_then(|()| remove_link(&entry.path));
            removed.map_err(|error| error.to_string())?;
            tracing::info!(path = %entry.path.display(), "deleted: it has moved");
            return Ok(());
        }
    };
    Err(reason.to_owned())
}

fn remove_link(path: &Path) -> std::io::Result<()> {
    let link = Pinned::at(path)?;
    match link.path().symlink_metadata() {
        Ok(found) if found.is_symlink() => std::fs::remove_file(link.path()),
        _ => Ok(()),
    }
}
