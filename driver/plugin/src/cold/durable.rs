//! What libvirt has written of a guest, made to outlive a power failure: it writes a new file and renames it, but does not
//! wait until the directory is on the disk (libvirt 11.3, `virFileRewrite`). Nothing may be deleted before.

use super::here;
use super::inventory::DEFINITIONS;
use crate::libvirt::Error;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

/// Below which libvirt keeps snapshots and checkpoints, by guest.
const METADATA: [&str; 2] = [
    "/var/lib/libvirt/qemu/snapshot",
    "/var/lib/libvirt/qemu/checkpoint",
];

/// Waits until the guest's definition, snapshots and checkpoints are on the disk.
///
/// # Errors
/// The disk's; nothing is certain then.
pub fn definitions(guest: &str) -> Result<(), Error> {
    let metadata = METADATA.map(|directory| Path::new(directory).join(guest));
    let directories = metadata.iter().map(AsRef::as_ref).chain([Path::new(DEFINITIONS)]);
    for directory in directories {
        match File::open(directory).and_then(|directory| directory.sync_all()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(here(format!(
                    "what libvirt wrote in {} cannot be brought to the disk: {error}",
                    directory.display()
                )))
            }
            // A guest need not have any.
            _ => {}
        }
    }
    Ok(())
}
