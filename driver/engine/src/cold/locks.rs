//! QEMU's locks on images: who reads, who writes, whom it keeps out.

use super::Error;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// QEMU's bytes (block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE): "I read", "nobody may write",
/// "nobody may resize". Whoever opens the image for writing is refused while somebody holds them.
const FENCE: [i64; 3] = [100, 201, 203];
/// "I write", "I write what is there already", "I resize".
const WRITERS: Range<i64> = 101..104;

/// All of QEMU's bytes on an image, whatever they say.
const ANY: Range<i64> = 100..300;

fn lock(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    // SAFETY: plain numbers, for which zeros are a value; l_pid must be 0 for these locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = length;
    lock
}

/// Takes QEMU's read locks on an image, and finds out whether somebody writes to it.
///
/// # Errors
/// Somebody does.
pub fn fence(file: &File, path: &Path) -> Result<(), Error> {
    let busy = || {
        Error::Other(format!(
            "{} is in use: another process has it open for writing (see \"fuser -v {}\"); end that first",
            path.display(),
            path.display()
        ))
    };
    for byte in FENCE {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte, 1))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(busy()),
            Err(error) if has_no_locks(error) => {
                tracing::warn!(path = %path.display(), "this file system has no locks: nothing keeps writers away");
                return Ok(());
            }
            Err(error) => return Err(Error::file("lock", path)(error.into())),
        }
    }
    match is_locked(file, WRITERS) {
        true => Err(busy()),
        false => Ok(()),
    }
}

/// Lets go of them.
pub fn lift(file: &File) {
    for byte in FENCE {
        // Where there are no locks there is nothing to let go of.
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_UNLCK, byte, 1)));
    }
}

/// Whether another open of the file holds a lock on any of these bytes, or that cannot be found out.
pub fn is_locked(file: &File, bytes: Range<i64>) -> bool {
    let mut probe = lock(libc::F_WRLCK, bytes.start, bytes.end - bytes.start);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
        Ok(_) => probe.l_type != libc::F_UNLCK as libc::c_short,
        Err(error) => !has_no_locks(error),
    }
}

/// Whether it is the file system that has no locks.
fn has_no_locks(error: Errno) -> bool {
    matches!(
        error,
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS
    )
}

/// Whether any process uses the image, as a disk or as another one's base, or that cannot be found out: who may not read a
/// file may delete it all the same.
pub fn is_held(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => is_locked(&file, ANY),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cold::files::open;
    use ferry_contract::cold::{Item, Part};
    use std::fs::{self, OpenOptions};

    #[test]
    fn a_writer_is_noticed_and_kept_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, b"x").unwrap();
        let item = Item {
            path: path.clone(),
            part: Part::Other,
        };
        let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let writes = lock(libc::F_RDLCK, 101, 1);
        fcntl(&writer, FcntlArg::F_OFD_SETLK(&writes)).unwrap();
        let refused = open(std::slice::from_ref(&item)).unwrap_err().to_string();
        assert!(refused.contains("open for writing"), "{refused}");
        drop(writer);
        let served = open(std::slice::from_ref(&item)).unwrap();
        // As QEMU would: "nobody else may write" is somebody's word.
        let late = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert!(is_locked(&late, 201..202));
        drop(served);
        assert!(!is_locked(&late, 201..202));
    }

    #[test]
    fn what_cannot_be_looked_at_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("image"), b"x").unwrap();
        std::os::unix::fs::symlink(at("loop"), at("loop")).unwrap();
        assert!(!is_held(&at("image")) && !is_held(&at("none")));
        assert!(is_held(&at("loop")));
    }
}
