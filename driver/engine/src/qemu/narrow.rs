//! How much of its migration stream a QEMU can write before it has to wait for the reader: from outside, by the buffer
//! of its socket.
//!
//! QEMU writes device state with its big lock held, and lets go of it when the last byte is in the socket (QEMU 7.2 and
//! 10.0, `migration_completion`). A buffer of the usual 208 KiB takes the device state of many a guest whole; one of
//! 4.5 KiB takes that of none, so that QEMU stands in its write for as long as nobody reads.
//!
//! The lock alone, which it has from the event "device" on, is not enough: ending the block devices
//! (`bdrv_inactivate_all`) runs its main loop's work, and reading the vCPUs' registers lets go of the lock, in QEMU 10.0
//! after what RAM is in the stream. From the first section of a device on it keeps it to the end. That section is known
//! by its head, which follows the end of RAM's.
//!
//! QEMU 7.2 to 9.2 end the block devices after the last device's section. By then most guests have stood in a write: QEMU
//! collects 32 KiB before it writes. What completes in that moment for a guest whose devices' state is shorter is as new as
//! the memory, and newer than that state.

use super::process::{Process, ProcessError};
use nix::sys::socket::{getpeername, getsockopt, setsockopt, sockopt::SndBuf, UnixAddr};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// So many bytes in a narrow stream that is not read say that QEMU waits for it to be.
const FULL: usize = 1024;

/// Whether QEMU stands in its write to the narrow stream that ends in this socket.
pub fn stands(stream: &UnixStream) -> io::Result<bool> {
    let mut queued: libc::c_int = 0;
    // SAFETY: the descriptor is open, and FIONREAD writes one integer.
    match unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut queued) } {
        0 => Ok(usize::try_from(queued).is_ok_and(|queued| queued >= FULL)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks for the first device's section in a QEMU's stream, as it is read.
#[derive(Debug, Default)]
pub struct Devices {
    /// What may be the beginning of what is looked for.
    kept: Vec<u8>,
    found: bool,
}

impl Devices {
    /// Whether it has come.
    pub fn found(&self) -> bool {
        self.found
    }

    /// Looks at what has been read next.
    pub fn look(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
        self.found |= self.kept.windows(LONGEST).any(begins_a_device)
            || (0..self.kept.len().min(LONGEST))
                .any(|left| begins_a_device(&self.kept[self.kept.len() - left..]));
        let keep = self.kept.len().min(LONGEST - 1);
        self.kept.drain(..self.kept.len() - keep);
    }

    /// It was none: QEMU has not switched over.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// The end of RAM's section and the head of a device's: a footer (0x7e and RAM's number) where there is one, else RAM's
/// own end (a page flag, `RAM_SAVE_FLAG_EOS`), both before 0x04, a number, the length of a name, and the name
/// (`migration/savevm.c`, QEMU 7.2 and 10.0).
fn begins_a_device(bytes: &[u8]) -> bool {
    let footer = |end: &[u8]| end.len() >= 5 && matches!(end[..3], [0x7e, 0, 0]);
    let flag = |end: &[u8]| end.len() >= 8 && end[..8] == [0, 0, 0, 0, 0, 0, 0, 0x10];
    let head = match bytes {
        bytes if footer(bytes) => &bytes[5..],
        bytes if flag(bytes) => &bytes[8..],
        _ => return false,
    };
    let [4, 0, 0, _, _, length @ 2..=128, name @ ..] = head else {
        return false;
    };
    let name = name.get(..usize::from(*length));
    name.is_some_and(|name| name.iter().all(u8::is_ascii_graphic))
}

/// The longest that is looked for, bytes.
const LONGEST: usize = 8 + 6 + 128;

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
pub struct Narrow {
    process: Arc<Process>,
    fd: RawFd,
    path: PathBuf,
    /// As the kernel counts: twice of what is set.
    usual: usize,
}

impl Narrow {
    /// Narrows the stream that QEMU writes to the socket of this name. What is in it already stays.
    ///
    /// # Errors
    /// QEMU is gone, or has no such socket.
    pub fn new(process: &Arc<Process>, path: &Path) -> Result<Self, NarrowError> {
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
            process: Arc::clone(process),
            fd,
            path: path.to_owned(),
            usual,
        })
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        // It has not been kept open: QEMU's closing it is the end of the stream.
        let widened = connected(&self.process, self.fd, &self.path)
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
        let process = Arc::new(Process::open(std::process::id() as i32).unwrap());
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
        assert!((FULL..8192).contains(&little), "{little}");
        assert!(stands(&reader).unwrap());
        drop(narrow);
        let much = fill();
        assert!(much > 65536, "{much}");
        let mut bytes = vec![0; little + much];
        reader.read_exact(&mut bytes).unwrap();
        drop(writer);
        assert_eq!(reader.read(&mut bytes).unwrap(), 0);
    }

    #[test]
    fn the_first_device_is_known_wherever_the_stream_is_cut() {
        let device = b"\x04\0\0\0\x05\x08cpu/0/fp\0\0\0\0\0\0\0\x01";
        let footer = [b"ram...".as_slice(), b"\x7e\0\0\0\x02", device].concat();
        let none = [b"ram...".as_slice(), b"\0\0\0\0\0\0\0\x10", device].concat();
        for stream in [footer, none] {
            for at in 0..stream.len() {
                let mut devices = Devices::default();
                devices.look(&stream[..at]);
                devices.look(&stream[at..]);
                assert!(devices.found(), "{at}");
                devices.forget();
                assert!(!devices.found());
            }
        }
        let mut devices = Devices::default();
        devices.look(b"\x7e\0\0\0\x02\x03\0\0\0\x04");
        devices.look(device);
        devices.look(&[0; 70000]);
        assert!(!devices.found());
    }
}
