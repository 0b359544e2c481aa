//! What libvirt has written of a guest, or removed, made to outlive a power failure: it writes a new file and renames it, but
//! does not wait until the directory is on the disk (libvirt 11.3, `virFileRewrite`; nor does it when it undefines a guest).
//! No file and no journal may go before.

use super::here;
use super::inventory::DEFINITIONS;
use crate::libvirt::Error;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Below which libvirt keeps snapshots and checkpoints, by guest.
const METADATA: [&str; 2] = [
    "/var/lib/libvirt/qemu/snapshot",
    "/var/lib/libvirt/qemu/checkpoint",
];
/// Links to the definitions of guests that start with the host.
const AUTOSTART: &str = "autostart";

/// Waits until what libvirt has of the guest is on the disk, or that it has nothing of it any more: definition, autostart,
/// snapshots and checkpoints.
///
/// # Errors
/// The disk's; nothing is certain then.
pub fn definitions(guest: &str) -> Result<(), Error> {
    let definitions = [Path::new(DEFINITIONS).join(AUTOSTART), DEFINITIONS.into()];
    // A directory of the guest's own is an entry of its parent.
    let metadata = METADATA.map(|parent| [Path::new(parent).join(guest), parent.into()]);
    metadata
        .iter()
        .flatten()
        .chain(&definitions)
        .try_for_each(|path| {
            directory(path).map_err(|error| {
                here(format!(
                    "what libvirt has done in {} cannot be brought to the disk: {error}",
                    path.display()
                ))
            })
        })
}

/// Brings a directory's entries to the disk; a guest need not have one.
fn directory(path: &PathBuf) -> io::Result<()> {
    match File::open(path) {
        Ok(directory) => directory.sync_all(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
