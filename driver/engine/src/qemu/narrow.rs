//! How much of its migration stream a QEMU can write before it has to wait for the reader: from outside, by the buffer
//! of its socket.
//!
//! QEMU writes device state with its big lock held, and lets go of it when the last byte is in the socket (QEMU 7.2 and
//! 10.0, `migration_completion`). A buffer of the usual 208 KiB takes the device state of many a guest whole; one of
//! 4.5 KiB takes that of none, so that QEMU stands in its write for as long as nobody reads.
//!
//! The lock alone, which it has from the event "device" on, is not enough: ending the block devices
//! (`bdrv_inactivate_all`) runs its main loop's work, and reading the vCPUs' registers lets go of the lock. After these it
//! writes a command of a few bytes at once, and then, with the lock held to the end, RAM and devices.

use super::process::{Process, ProcessError};
use nix::sys::socket::{getpeername, getsockopt, setsockopt, sockopt::SndBuf, UnixAddr};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// More bytes than QEMU writes between the event "device" and its device state.
const BEGUN: usize = 1024;

/// Whether QEMU, whose stream ends in this socket and has been read to its switch-over, is writing device state.
pub fn writes_device_state(stream: &UnixStream) -> io::Result<bool> {
    let mut queued: libc::c_int = 0;
    // SAFETY: the descriptor is open, and FIONREAD writes one integer.
    match unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut queued) } {
        0 => Ok(usize::try_from(queued).is_ok_and(|queued| queued >= BEGUN)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Why the stream of a QEMU cannot be narrowed.
#[derive(Debug, thiserror::Error)]
pub enum NarrowError {
    /// Of the process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It is not connected to where it should be.
    #[error("process {pid} has no socket that is connected to {path}", path = path.display())]
    NoSocket {
        /// QEMU's.
        pid: i32,
        /// The other end's name.
        path: PathBuf,
    },
    /// The socket refuses.
    #[error("cannot set the buffer of QEMU's socket: {0}")]
    Socket(#[from] nix::Error),
}

/// A QEMU whose stream takes next to nothing; dropping it makes it as wide as it was.
#[derive(Debug)]
pub struct Narrow<'a> {
    process: &'a Process,
    fd: RawFd,
    path: PathBuf,
    /// As the kernel counts: twice of what is set.
    usual: usize,
}

impl<'a> Narrow<'a> {
    /// Narrows the stream that QEMU writes to the socket of this name. What is in it already stays.
    ///
    /// # Errors
    /// QEMU is gone, or has no such socket.
    pub fn new(process: &'a Process, path: &Path) -> Result<Self, NarrowError> {
        let nobody = || NarrowError::NoSocket {
            pid: process.pid(),
            path: path.to_owned(),
        };
        let directory = process.proc_path("fd");
        let entries = fs::read_dir(&directory).map_err(|error| process.error("list the files of", error))?;
        let found = entries.flatten().find_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            let fd = entry.file_name().to_str()?.parse().ok()?;
            let is_socket = target.to_str()?.starts_with("socket:");
            is_socket
                .then(|| connected(process, fd, path))
                .flatten()
                .map(|socket| (fd, socket))
        });
        let (fd, socket) = found.ok_or_else(nobody)?;
        let usual = getsockopt(&socket, SndBuf)?;
        // The kernel makes it the least there is: 4608 bytes, SOCK_MIN_SNDBUF.
        setsockopt(&socket, SndBuf, &1)?;
        Ok(Self {
            process,
            fd,
            path: path.to_owned(),
            usual,
        })
    }
}

impl Drop for Narrow<'_> {
    fn drop(&mut self) {
        // It has not been kept open: QEMU's closing it is the end of the stream.
        let widened = connected(self.process, self.fd, &self.path)
            .map(|socket| setsockopt(&socket, SndBuf, &(self.usual / 2)));
        if let Some(Err(error)) = widened {
            tracing::debug!(%error, "QEMU's stream stays narrow");
        }
    }
}

/// The process's descriptor, where it is a socket connected to this name.
fn connected(process: &Process, fd: RawFd, path: &Path) -> Option<OwnedFd> {
    let socket = process.get_fd(fd).ok()?;
    let peer = getpeername::<UnixAddr>(socket.as_raw_fd()).ok()?;
    (peer.path() == Some(path)).then_some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_narrow_stream_takes_little_until_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let process = Process::open(std::process::id() as i32).unwrap();
        assert!(matches!(
            Narrow::new(&process, &path),
            Err(NarrowError::NoSocket { .. })
        ));
        let mut writer = UnixStream::connect(&path).unwrap();
        let (mut reader, _) = listener.accept().unwrap();
        // Its name is gone by then.
        std::fs::remove_file(&path).unwrap();
        writer.set_nonblocking(true).unwrap();
        let mut fill = || {
            let mut taken = 0;
            while let Ok(count) = writer.write(&[7; 8192]) {
                taken += count;
            }
            taken
        };
        let narrow = Narrow::new(&process, &path).unwrap();
        let little = fill();
        assert!((BEGUN..8192).contains(&little), "{little}");
        assert!(writes_device_state(&reader).unwrap());
        drop(narrow);
        let much = fill();
        assert!(much > 65536, "{much}");
        let mut bytes = vec![0; little + much];
        reader.read_exact(&mut bytes).unwrap();
        drop(writer);
        assert_eq!(reader.read(&mut bytes).unwrap(), 0);
    }
}
