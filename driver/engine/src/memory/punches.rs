//! Noticing that a guest gives memory back, without looking at its memory.
//!
//! A page that is given back (balloon, free page reporting, virtio-mem) is punched out of its file by fallocate(2) or
//! madvise(MADV_REMOVE), and a scan for written pages does not tell. Both end in the kernel's `vfs_fallocate`, which
//! notes a modification of the file (fs/open.c, Linux 6.12: `fsnotify_modify`); a write through a mapping does not.
//! So inotify tells exactly whether the holes of a file may have changed since it was walked, which takes about 30 ns
//! a page and would lengthen the guest's pause.

use super::RamFile;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::io;
use std::os::fd::AsFd;

/// Watches files for holes.
#[derive(Debug)]
pub struct PunchWatch(Inotify);

impl PunchWatch {
    /// Begins to watch; walk the files after this.
    ///
    /// # Errors
    /// When the user's inotify instances or watches are used up (fs.inotify.max_user_instances).
    pub fn new<'a>(files: impl IntoIterator<Item = &'a RamFile>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        for file in files {
            // By descriptor: the file may have no name any more, as huge pages' files have.
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.as_fd()));
            inotify.add_watch(path.as_str(), AddWatchFlags::IN_MODIFY)?;
        }
        Ok(Self(inotify))
    }

    /// Whether a file may have got a hole since the watch began, or since this was last asked.
    pub fn punched(&self) -> bool {
        let mut punched = false;
        loop {
            match self.0.read_events() {
                Ok(_) => punched = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return punched,
                // Not known means walk.
                Err(_) => return true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{sys, PAGE};
    use super::*;

    #[test]
    fn a_punch_is_noticed_and_a_mapped_write_is_not() {
        let temporary = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        temporary.as_file().set_len(4 * PAGE).unwrap();
        let file = RamFile::open(temporary.path()).unwrap();
        let mapping = sys::Mapping::new(temporary.as_file(), 0..4 * PAGE).unwrap();
        // QEMU opened it by another descriptor, and nobody needs its name.
        temporary.close().unwrap();
        let watch = PunchWatch::new([&file]).unwrap();
        mapping.write(0, &[1; 2 * PAGE as usize]);
        assert!(!watch.punched());
        file.punch(0..PAGE).unwrap();
        assert!(watch.punched());
        assert!(!watch.punched(), "each is told once");
        file.punch(0..PAGE).unwrap();
        assert!(watch.punched(), "a second punch of the same range");
    }

    #[test]
    fn madvise_remove_is_noticed_too() {
        let temporary = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        temporary.as_file().set_len(4 * PAGE).unwrap();
        let file = RamFile::open(temporary.path()).unwrap();
        let mapping = sys::Mapping::new(temporary.as_file(), 0..4 * PAGE).unwrap();
        mapping.write(0, &[1; PAGE as usize]);
        let watch = PunchWatch::new([&file]).unwrap();
        let address = mapping.addresses().start as *mut std::ffi::c_void;
        // SAFETY: the first page of a mapping of this test's own, which nobody reads.
        let removed = unsafe { libc::madvise(address, PAGE as usize, libc::MADV_REMOVE) };
        assert_eq!(removed, 0);
        assert!(watch.punched());
        assert_eq!(file.resident().unwrap(), 0);
    }
}
