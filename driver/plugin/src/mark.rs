//! A mark beside a guest's private monitor: its QEMU may have x-ignore-shared on.
//!
//! Made before an engine gets hold of the QEMU, removed once the engine has ended in order or its work has been undone.
//! It outlives both the engine and the daemon, and goes with the guest: libvirt deletes the guest's private directory
//! when its QEMU ends (libvirt 11.3, `qemuProcessStop`).

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MARK: &str = "virt-ferry-ignore-shared";

fn beside(monitor: &Path) -> PathBuf {
    monitor.with_file_name(MARK)
}

/// Marks the QEMU of this monitor.
///
/// # Errors
/// The directory cannot be written: then the QEMU must be left alone.
pub fn set(monitor: &Path) -> std::io::Result<()> {
    // The directory is QEMU's own user's: nothing that is there is followed or opened.
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(beside(monitor));
    match made {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Takes the mark away; where it cannot be, the guest is looked at once more than needed.
pub fn clear(monitor: &Path) {
    let _ = std::fs::remove_file(beside(monitor));
}

/// Whether the QEMU of this monitor is marked.
pub fn is_set(monitor: &Path) -> bool {
    beside(monitor).symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_set_once_and_for_all_until_it_is_cleared() {
        let directory = std::env::temp_dir().join(format!("ferry-mark-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let monitor = directory.join("monitor.sock");
        assert!(!is_set(&monitor));
        set(&monitor).unwrap();
        set(&monitor).unwrap();
        assert!(is_set(&monitor));
        clear(&monitor);
        assert!(!is_set(&monitor));
        // What QEMU's user may have put there is not written through.
        let elsewhere = directory.join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, beside(&monitor)).unwrap();
        set(&monitor).unwrap();
        assert!(is_set(&monitor) && !elsewhere.exists());
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(set(&monitor).is_err());
    }
}
