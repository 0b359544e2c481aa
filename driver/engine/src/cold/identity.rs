//! Which file it is, also after the host was started anew.
//!
//! A device's number does not last: btrfs, NFS and the device mapper may have another one with every mount. What lasts is the
//! handle by which the kernel exports a file (name_to_handle_at(2)): its inode with a number of that inode's use, so that a
//! later file in it has another one; on NFS, what the server calls it. Two btrfs may count alike and have equal ones, so the
//! time of its birth goes with it, which nobody can set. FUSE's handles are counted anew with every mount, and say nothing.

use ferry_contract::cold::journal::Entry;
use nix::sys::statfs;
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Of one file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    /// Its device and inode.
    pub number: (u64, u64),
    /// What lasts; `None` on a file system without handles that do (overlayfs, SMB, FUSE).
    pub lasting: Option<String>,
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    /// The system's.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let born = metadata.created().ok().and_then(|born| {
            let since = born.duration_since(UNIX_EPOCH).ok()?;
            Some(since.as_nanos())
        });
        let handle = handle(file).filter(|_| !is_fuse(file));
        let lasting = handle.map(|handle| match born {
            Some(born) => format!("{handle} {born}"),
            None => handle,
        });
        Ok(Self {
            number: (metadata.dev(), metadata.ino()),
            lasting,
        })
    }

    /// Writes it down.
    pub fn note(self, entry: &mut Entry) {
        (entry.identity, entry.lasting) = (Some(self.number), self.lasting);
    }
}

/// Whether the file at `path` is the one that this session wrote or served. Where nothing was written down that lasts, its
/// numbers have to do, and a mount that changes them makes it another one.
pub fn is_ours(path: &Path, entry: &Entry) -> bool {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path);
    file.is_ok_and(|file| is(&file, entry))
}

/// As [`is_ours`], of an open file.
pub fn is(file: &File, entry: &Entry) -> bool {
    let Ok(found) = Identity::of(file) else {
        return false;
    };
    match &entry.lasting {
        Some(_) => found.lasting == entry.lasting,
        None => Some(found.number) == entry.identity,
    }
}

/// Whether the numbers in its handle are the mount's own. Where that cannot be known, they are taken for it.
fn is_fuse(file: &File) -> bool {
    statfs::fstatfs(file).map_or(true, |found| found.filesystem_type() == statfs::FUSE_SUPER_MAGIC)
}

/// The kernel's handle of a file, as text.
fn handle(file: &File) -> Option<String> {
    const LONGEST: usize = libc::MAX_HANDLE_SZ as usize;
    /// `struct file_handle` and what follows it.
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        content: [u8; LONGEST],
    }
    let mut handle = Handle {
        bytes: LONGEST as libc::c_uint,
        kind: 0,
        content: [0; LONGEST],
    };
    let mut mount = 0;
    // SAFETY: the path ends with NUL; the handle has as many bytes behind its head as that says.
    let done = unsafe {
        libc::name_to_handle_at(
            file.as_raw_fd(),
            c"".as_ptr(),
            std::ptr::from_mut(&mut handle).cast(),
            &mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    let content = handle
        .content
        .get(..handle.bytes as usize)
        .filter(|_| done == 0)?;
    let mut text = format!("{:x}:", handle.kind);
    for byte in content {
        // Into a string nothing fails.
        let _ = write!(text, "{byte:02x}");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::journal::Fate;
    use ferry_contract::cold::Kind;
    use std::fs;

    #[test]
    fn a_file_is_known_again_and_another_one_is_not() {
        // Not below /tmp, which may be a file system without handles.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "content").unwrap();
        let identity = |name: &str| Identity::of(&File::open(at(name)).unwrap()).unwrap();
        let mut entry = Entry {
            source: at("file"),
            path: at("file"),
            temporary: None,
            kind: Kind::File,
            size: 7,
            fate: Fate::Moves,
            digest: None,
            identity: None,
            lasting: None,
            modified: None,
        };
        assert!(!is_ours(&at("file"), &entry));
        identity("file").note(&mut entry);
        assert!(is_ours(&at("file"), &entry) && !is_ours(&at("none"), &entry));
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        assert!(!is_ours(&at("link"), &entry));
        // Its content and its name do not matter.
        fs::write(at("file"), "other content").unwrap();
        fs::rename(at("file"), at("renamed")).unwrap();
        assert!(is_ours(&at("renamed"), &entry));
        // After a mount its device may have another number; without more than numbers it is another one then.
        let Some(lasting) = entry.lasting.clone() else {
            println!("SKIPPED: this file system has no handles");
            return;
        };
        entry.identity = entry.identity.map(|(device, inode)| (device + 1, inode));
        assert!(is_ours(&at("renamed"), &entry));
        entry.lasting = None;
        assert!(!is_ours(&at("renamed"), &entry));
        // A later file may come by the inode; its numbers are those that were written down.
        fs::remove_file(at("renamed")).unwrap();
        fs::write(at("renamed"), "other content").unwrap();
        entry.identity = Some(identity("renamed").number);
        assert!(is_ours(&at("renamed"), &entry));
        entry.lasting = Some(lasting);
        assert!(!is_ours(&at("renamed"), &entry));
    }
}
