//! A process that cannot be mistaken for another, and what `/proc` tells about it.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// A process held by a pidfd, so that its number cannot come to mean another. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Process {
    pid: i32,
    pidfd: Arc<OwnedFd>,
}

/// What can go wrong when looking at a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The process ended.
    #[error("process {pid} is gone")]
    Gone {
        /// Its number.
        pid: i32,
    },
    /// A system call failed.
    #[error("cannot {what} of process {pid}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Number of the process.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Process {
    /// Takes hold of process `pid`.
    ///
    /// The number may have been stale already: ask the process something that only it can answer (a command on
    /// its monitor) *after* this.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn open(pid: i32) -> Result<Self, ProcessError> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => {
                // SAFETY: the kernel just returned this descriptor; nobody else owns it.
                let pidfd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
                Ok(Process { pid, pidfd })
            }
            _ => Err(match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => ProcessError::Gone { pid },
                source => ProcessError::System {
                    what: "take hold",
                    pid,
                    source,
                },
            }),
        }
    }

    /// Number of the process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// `Ok` if it still runs.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] otherwise.
    pub fn check_alive(&self) -> Result<(), ProcessError> {
        if self.is_alive() {
            Ok(())
        } else {
            Err(ProcessError::Gone { pid: self.pid })
        }
    }

    /// Its memory mappings, in ascending order of address.
    ///
    /// # Errors
    /// When the process is gone or may not be looked at.
    pub fn maps(&self) -> Result<Vec<Vma>, ProcessError> {
        let text = self.read("maps", "read the memory map")?;
        Ok(String::from_utf8_lossy(&text)
            .lines()
            .filter_map(Vma::parse)
            .collect())
    }

    /// Reads `/proc/PID/<name>` of this very process; `what` is for the message.
    pub(crate) fn read(&self, name: &str, what: &'static str) -> Result<Vec<u8>, ProcessError> {
        let text = fs::read(self.proc_path(name)).map_err(|source| self.error(what, source))?;
        self.check_alive()?;
        Ok(text)
    }

    /// `/proc/PID/<name>`.
    pub fn proc_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// Duplicates descriptor `fd` of the process into this one.
    ///
    /// # Errors
    /// When the process is gone, has no such descriptor, or may not be traced by us.
    pub fn get_fd(&self, fd: RawFd) -> Result<OwnedFd, ProcessError> {
        // SAFETY: pidfd_getfd(2) takes integers and touches no memory.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0) };
        match RawFd::try_from(copy) {
            // SAFETY: the kernel just returned this descriptor; nobody else owns it.
            Ok(copy) if copy >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
            _ => Err(self.error("fetch a file descriptor", io::Error::last_os_error())),
        }
    }

    /// An error of a call on this process: "gone" if it ended, whatever the kernel said.
    pub(crate) fn error(&self, what: &'static str, source: io::Error) -> ProcessError {
        let pid = self.pid;
        if source.raw_os_error() == Some(libc::ESRCH) || !self.is_alive() {
            ProcessError::Gone { pid }
        } else {
            ProcessError::System { what, pid, source }
        }
    }
}

impl AsFd for Process {
    /// The pidfd: becomes readable when the process ends.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// Addresses in the process.
    pub addresses: Range<u64>,
    /// "rwxs" or "rwxp", as the kernel prints it.
    pub permissions: [u8; 4],
    /// Where in the file the mapping starts, bytes.
    pub offset: u64,
    /// Device and inode of the file, as stat(2) gives them on tmpfs; (0, 0) for anonymous memory.
    pub file: (u64, u64),
    /// Path, or a name such as `[vdso]`; empty for anonymous memory. Raw: the kernel escapes newlines only.
    pub name: String,
}

impl Vma {
    /// Whether writes go to the file and are seen by others who map it.
    pub fn is_shared(&self) -> bool {
        self.permissions[3] == b's'
    }

    /// Whether the process may execute.
    pub fn is_executable(&self) -> bool {
        self.permissions[2] == b'x'
    }

    /// Offset in the file of what lies at `address`, if that is in the mapping.
    pub fn file_offset_of(&self, address: u64) -> Option<u64> {
        let inside = self.addresses.contains(&address);
        inside
            .then(|| self.offset.checked_add(address - self.addresses.start))
            .flatten()
    }

    /// Parses a line such as
    /// `7f00-7f10 rw-s 00000000 00:1a 1234    /dev/shm/ram (deleted)`; `None` for what does not look like one.
    fn parse(line: &str) -> Option<Vma> {
        let mut rest = line;
        let mut field = || {
            rest = rest.trim_start_matches(' ');
            let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = tail;
            word
        };
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = field().split_once('-')?;
        let addresses = hex(start)?..hex(end)?;
        let permissions = field().as_bytes().try_into().ok()?;
        let offset = hex(field())?;
        let (major, minor) = field().split_once(':')?;
        let major = u32::from_str_radix(major, 16).ok()?;
        let minor = u32::from_str_radix(minor, 16).ok()?;
        let inode = field().parse().ok()?;
        let name = rest.trim_start_matches(' ').to_owned();
        (addresses.start < addresses.end).then(|| Vma {
            addresses,
            permissions,
            offset,
            file: (libc::makedev(major, minor), inode),
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_maps_lines_and_skips_nonsense() {
        let vma =
            Vma::parse("7f00-7f10 rw-s 00002000 00:1a 1234                       /dev/shm/a  b (deleted)");
        let vma = vma.expect("a valid line");
        assert_eq!(vma.addresses, 0x7f00..0x7f10);
        assert!(vma.is_shared() && !vma.is_executable());
        assert_eq!((vma.offset, vma.file), (0x2000, (libc::makedev(0, 0x1a), 1234)));
        assert_eq!(vma.name, "/dev/shm/a  b (deleted)");
        let anonymous = Vma::parse("7f00-7f10 ---p 00000000 00:00 0 ").expect("a valid line");
        assert_eq!((anonymous.file, anonymous.name.as_str()), ((0, 0), ""));
        for bad in [
            "",
            "7f00",
            "7f00-7f10",
            "7f10-7f00 rw-s 0 00:00 0",
            "x-y rw-s 0 0:0 0",
            "1-2 rw 0 0:0 0",
        ] {
            assert_eq!(Vma::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn own_maps_have_a_vdso_and_a_dead_child_is_gone() {
        let own = Process::open(std::process::id() as i32).expect("this process");
        let maps = own.maps().expect("own maps");
        assert!(maps.iter().any(|vma| vma.name == "[vdso]" && vma.is_executable()));
        assert!(maps
            .windows(2)
            .all(|pair| pair[0].addresses.end <= pair[1].addresses.start));

        let mut child = std::process::Command::new("true").spawn().expect("true");
        let process = Process::open(child.id() as i32).expect("the child, at least as a zombie");
        child.wait().expect("the child's end");
        assert!(matches!(process.maps(), Err(ProcessError::Gone { .. })));
        assert!(!process.is_alive());
    }
}
