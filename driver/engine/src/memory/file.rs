//! A guest's RAM as an open file.
//!
//! The file is shared with a running QEMU, so its bytes change under us. They are copied by `pread` and `pwrite`, and
//! no mapping of it is ever read: `pread` leaves holes alone even if the guest makes them while we read, fails where a
//! mapping would raise SIGBUS, and is no slower than a mapping whose pages are touched for the first time, as most are
//! only once. GB/s on one core, 512 MiB of tmpfs in 4 KiB pages (benches/speed.rs):
//!
//! | | pread | mapping, cold | mapping, warm |
//! |---|---|---|---|
//! | chunks of 256 KiB | 5.4 | 4.3 | 10 |
//! | scattered 4 KiB pages | 2.3 | 0.7 | 3.9 |

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::statfs::{fstatfs, HUGETLBFS_MAGIC, TMPFS_MAGIC};

use super::presence::Presence;
use super::sys::{self, Mapping};
use super::PAGE;

/// What a RAM file lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// tmpfs (or a memfd), with or without transparent huge pages.
    Tmpfs,
    /// hugetlbfs, with the size of its pages in bytes. It has no `write(2)`, and knows no holes by `lseek(2)`: they are
    /// looked for by `UFFDIO_CONTINUE`.
    Hugetlbfs {
        /// Bytes of one huge page.
        page: u64,
    },
}

impl Backing {
    /// Size of a page of this file system, bytes: the grain of mappings and of write tracking.
    pub fn page(self) -> u64 {
        match self {
            Backing::Tmpfs => PAGE,
            Backing::Hugetlbfs { page } => page,
        }
    }
}

/// What can go wrong with a RAM file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A system call failed.
    #[error("cannot {what} guest RAM file {path}: {source}", path = path.display())]
    System {
        /// What was tried, e.g. "read".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is not on tmpfs or hugetlbfs, so its contents are not (only) memory.
    #[error(
        "guest RAM file {path} is on a file system of type {magic:#x}, not on tmpfs or hugetlbfs; \
         mount a tmpfs on libvirt's memory_backing_dir", path = path.display()
    )]
    NotMemory {
        /// The file.
        path: PathBuf,
        /// `f_type` of statfs(2).
        magic: i64,
    },
    /// A range that is not inside the block.
    #[error("range {start:#x}+{len:#x} lies outside of guest RAM file {path} of {size:#x} bytes", path = path.display())]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// Start of the range, bytes.
        start: u64,
        /// Length of the range, bytes.
        len: u64,
        /// Size of the block, bytes.
        size: u64,
    },
}

impl FileError {
    /// Whether the host ran out of room: the tmpfs is full, no huge page is left, or a memory limit was hit.
    pub fn is_no_room(&self) -> bool {
        matches!(self, FileError::System { source, .. }
            if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::ENOMEM | libc::EDQUOT)))
    }
}

/// The part of an open RAM file that is one RAM block. Offsets are bytes from the start of the block.
///
/// All methods take `&self` and may be called from several threads at once.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    path: PathBuf,
    /// The block, within the file.
    window: Range<u64>,
    backing: Backing,
    /// hugetlbfs only, made at the first write.
    mapping: OnceLock<Mapping>,
    /// hugetlbfs only, made at the first look for holes.
    presence: OnceLock<Presence>,
}

impl RamFile {
    /// Opens the RAM file at `path`; the whole of it is the block.
    ///
    /// # Errors
    /// When it cannot be opened for reading and writing, or is not on tmpfs or hugetlbfs.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let wrap = |source| FileError::System {
            what: "open",
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(wrap)?;
        let len = file.metadata().map_err(wrap)?.len();
        Self::from_file(file, path.to_owned(), 0..len)
    }

    /// Takes over an open file, of which `window` is the block. `path` is for messages only.
    ///
    /// # Errors
    /// When `window` is not inside the file, or the file is not on tmpfs or hugetlbfs.
    pub fn from_file(file: File, path: PathBuf, window: Range<u64>) -> Result<Self, FileError> {
        let wrap = |source| FileError::System {
            what: "examine",
            path: path.clone(),
            source,
        };
        let size = file.metadata().map_err(wrap)?.len();
        if window.start > window.end || window.end > size {
            let len = window.end.saturating_sub(window.start);
            return Err(FileError::OutOfBounds {
                path,
                start: window.start,
                len,
                size,
            });
        }
        let stat = fstatfs(&file).map_err(|errno| wrap(errno.into()))?;
        let backing = match stat.filesystem_type() {
            TMPFS_MAGIC => Backing::Tmpfs,
            HUGETLBFS_MAGIC => Backing::Hugetlbfs {
                page: stat.optimal_transfer_size() as u64,
            },
            other => return Err(FileError::NotMemory { path, magic: other.0 }),
        };
        Ok(RamFile {
            file,
            path,
            window,
            backing,
            mapping: OnceLock::new(),
            presence: OnceLock::new(),
        })
    }

    /// Size of the block, bytes.
    pub fn len(&self) -> u64 {
        self.window.end - self.window.start
    }

    /// Whether the block has no bytes.
    pub fn is_empty(&self) -> bool {
        self.window.is_empty()
    }

    /// What the file lies on.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number, which name the file for as long as it is open.
    ///
    /// # Errors
    /// When fstat(2) fails.
    pub fn identity(&self) -> Result<(u64, u64), FileError> {
        let stat = self.file.metadata().map_err(self.wrap("examine"))?;
        Ok((stat.dev(), stat.ino()))
    }

    /// Bytes of the file that take up memory (of the whole file, where the block is only a part of it).
    ///
    /// # Errors
    /// When fstat(2) fails.
    pub fn resident(&self) -> Result<u64, FileError> {
        Ok(self.file.metadata().map_err(self.wrap("examine"))?.blocks() * 512)
    }

    /// The parts of `range` that hold data, in ascending order; what lies between reads as zeros and takes up
    /// no memory.
    ///
    /// A guest that runs changes the picture while it is read: an extent found may be gone, and one made
    /// behind the iterator is missed. The [`WriteTracker`](super::WriteTracker) covers for the latter.
    ///
    /// # Errors
    /// When `range` is not inside the block; the items, when the kernel does not tell.
    pub fn extents(&self, range: Range<u64>) -> Result<Extents<'_>, FileError> {
        let range = self.locate(range.start, range.end.saturating_sub(range.start))?;
        Ok(Extents {
            file: self,
            next: range.start,
            end: range.end,
        })
    }

    /// Copies the bytes from `offset` on into `buffer`. Holes read as zeros and stay holes.
    ///
    /// The guest may write meanwhile: a page may come out torn. Its write is then in the next scan.
    ///
    /// # Errors
    /// When the range is not inside the block, or the file was truncated.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), FileError> {
        let range = self.locate(offset, buffer.len() as u64)?;
        self.file
            .read_exact_at(buffer, range.start)
            .map_err(self.wrap("read"))
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// When the range is not inside the block; when there is no memory left ([`FileError::is_no_room`]).
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), FileError> {
        let range = self.locate(offset, bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        match self.backing {
            Backing::Tmpfs => self
                .file
                .write_all_at(bytes, range.start)
                .map_err(self.wrap("write")),
            Backing::Hugetlbfs { page } => self.store(range, page, bytes),
        }
    }

    /// Gives the memory of `range` back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// When the range is not inside the block, or fallocate(2) fails.
    pub fn punch(&self, range: Range<u64>) -> Result<(), FileError> {
        let range = self.locate(range.start, range.end.saturating_sub(range.start))?;
        if range.is_empty() {
            return Ok(());
        }
        sys::punch_hole(&self.file, range).map_err(self.wrap("punch a hole into"))
    }

    /// Makes `range` zeros that take up memory as they do where they come from: on hugetlbfs a guest's host has set its
    /// pages aside, and one it lacks later kills the guest. Elsewhere zeros are a hole.
    ///
    /// # Errors
    /// As with [`punch`](Self::punch) and [`write_at`](Self::write_at).
    pub fn clear(&self, range: Range<u64>) -> Result<(), FileError> {
        let Backing::Hugetlbfs { page } = self.backing else {
            return self.punch(range);
        };
        // Stored: a punch of less than a page clears it since Linux 5.19 (`hugetlbfs_zero_partial_page`), and before that
        // does nothing and says that all is well.
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut range = self.locate(range.start, range.end.saturating_sub(range.start))?;
        while !range.is_empty() {
            let end = range.end.min(range.start + ZEROS.len() as u64);
            let part = range.start..end;
            self.store(part.clone(), page, &ZEROS[..(part.end - part.start) as usize])?;
            range.start = end;
        }
        Ok(())
    }

    /// What [`Backing::Hugetlbfs`] has of the file's `range`, as [`Presence::next`] tells it.
    fn next_present(&self, page: u64, range: Range<u64>) -> Result<Option<Range<u64>>, FileError> {
        let presence = match self.presence.get() {
            Some(presence) => presence,
            None => {
                let part = self.window.start / page * page..self.window.end.div_ceil(page) * page;
                let made = Presence::new(&self.file, part, page).map_err(self.wrap("look for pages of"))?;
                self.presence.get_or_init(|| made)
            }
        };
        presence.next(range).map_err(self.wrap("look for pages of"))
    }

    /// hugetlbfs has no write(2): stores through a mapping, after making the pages, as a store to a huge page
    /// the host does not have would be SIGBUS instead of an error.
    fn store(&self, range: Range<u64>, page: u64, bytes: &[u8]) -> Result<(), FileError> {
        let pages = range.start / page * page..range.end.div_ceil(page) * page;
        sys::allocate(&self.file, pages).map_err(self.wrap("allocate pages of"))?;
        // Huge pages are mapped whole.
        let base = self.window.start / page * page;
        let end = self.window.end.div_ceil(page) * page;
        let mapping = match self.mapping.get() {
            Some(mapping) => mapping,
            None => {
                let made = Mapping::new(&self.file, base..end).map_err(self.wrap("map"))?;
                self.mapping.get_or_init(|| made)
            }
        };
        mapping.write((range.start - base) as usize, bytes);
        Ok(())
    }

    /// Checks a range of the block and turns it into one of the file.
    fn locate(&self, start: u64, len: u64) -> Result<Range<u64>, FileError> {
        let size = self.len();
        match start.checked_add(len) {
            Some(end) if end <= size => Ok(self.window.start + start..self.window.start + end),
            _ => Err(FileError::OutOfBounds {
                path: self.path.clone(),
                start,
                len,
                size,
            }),
        }
    }

    fn wrap(&self, what: &'static str) -> impl FnOnce(io::Error) -> FileError + '_ {
        move |source| FileError::System {
            what,
            path: self.path.clone(),
            source,
        }
    }
}

impl AsFd for RamFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Data extents of a part of a [`RamFile`].
#[derive(Debug)]
pub struct Extents<'a> {
    file: &'a RamFile,
    /// Both within the file, not the block.
    next: u64,
    end: u64,
}

impl Extents<'_> {
    fn advance(&mut self) -> Result<Option<Range<u64>>, FileError> {
        let RamFile { file, window, .. } = self.file;
        if let Backing::Hugetlbfs { page } = self.file.backing {
            let found = self.file.next_present(page, self.next..self.end)?;
            self.next = found.as_ref().map_or(self.end, |found| found.end);
            return Ok(found.map(|found| found.start - window.start..found.end - window.start));
        }
        let seek = |from, whence| sys::seek(file, from, whence).map_err(self.file.wrap("seek in"));
        while self.next < self.end {
            let Some(start) = seek(self.next, libc::SEEK_DATA)?.filter(|&start| start < self.end) else {
                break;
            };
            // The guest may have punched it since: the extent is empty then, and the search goes on behind it.
            let Some(end) = seek(start, libc::SEEK_HOLE)? else {
                break;
            };
            self.next = end.min(self.end);
            if start < self.next {
                return Ok(Some(start - window.start..self.next - window.start));
            }
        }
        self.next = self.end;
        Ok(None)
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Range<u64>, FileError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().inspect_err(|_| self.next = self.end).transpose()
    }
}
