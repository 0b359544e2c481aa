//! Names that stay what they are between a look at them and what is done: whoever owns a directory could put another one, or a
//! symbolic link, in its place meanwhile, and have this process read or remove a file that is not his.

use nix::fcntl::{openat2, OFlag, OpenHow, ResolveFlag, AT_FDCWD};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A name in a directory that is open: whatever happens to the path that led there, it is that directory's.
#[derive(Debug)]
pub struct Pinned {
    path: PathBuf,
    /// For as long as the path is used.
    _directory: File,
}

impl Pinned {
    /// What is called so now, or may be.
    ///
    /// # Errors
    /// There is no such directory, or the system refuses.
    pub fn at(path: &Path) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(parent)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
        Ok(Self {
            path,
            _directory: directory,
        })
    }

    /// A path to it, as long as this lives.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Opens a file to read it, by a path that has no symbolic link in it, and is not followed where one has come into it.
///
/// # Errors
/// The system's.
pub fn open(real: &Path, flags: libc::c_int) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::from_bits_retain(flags) | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(File::from(openat2(AT_FDCWD, real, how)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_directory_that_is_exchanged_leads_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        for name in ["own", "others"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("file"), name).unwrap();
        }
        let pinned = Pinned::at(&at("own/file")).unwrap();
        open(&at("own/file"), 0).unwrap();
        fs::rename(at("own"), at("away")).unwrap();
        symlink(at("others"), at("own")).unwrap();
        assert!(open(&at("own/file"), 0).is_err());
        assert_eq!(fs::read_to_string(pinned.path()).unwrap(), "own");
        fs::remove_file(pinned.path()).unwrap();
        assert!(!at("away/file").exists() && at("others/file").exists());
        assert!(Pinned::at(&at("none/file")).is_err());
    }
}
