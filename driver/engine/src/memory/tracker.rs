//! Which pages of a guest's RAM were written, told by the kernel from outside of QEMU.
//!
//! ```text
//!   arm()   every page write-protected (asynchronously: the kernel lifts it by itself at the first write)
//!   scan()  the pages whose protection was lifted, protected again in the same step
//!   drop    nothing is protected or registered any more
//! ```
//!
//! A userfaultfd that belongs to QEMU's address space (made by [`crate::qemu::inject`]) carries the registration,
//! `ioctl(PAGEMAP_SCAN)` on `/proc/PID/pagemap` does the reading. Nobody has to answer a fault, so QEMU cannot
//! hang on us; when this process dies, the kernel closes the descriptor and with it ends the tracking.
//!
//! **Scan, then drain, then copy.** A page pinned for direct I/O before a scan is protected by it although the
//! device still writes to it, unseen. So block I/O must be drained ([`crate::qemu::Monitor::drain`]) between a scan
//! (or `arm`) and the copying of what it reported.
//!
//! What a scan reports is a superset: a page may turn up that was only read (a huge mapping split, a hole beside
//! a written page). What was *punched* (balloon, free page reporting) may or may not be reported: see
//! [`WriteTracker::scan`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::pages::PageSet;
use super::sys::{self, PageRegion};
use super::PAGE;
use crate::qemu::process::{Process, ProcessError, Vma};

/// Addresses scanned by one system call. The kernel holds QEMU's mmap lock (for reading) for that long, and KVM drops
/// its mappings of the rest of the range each time the vector of results is full. A scan of this much takes 0.05 ms
/// when nothing was written, 0.6 ms when every other page was.
const SCAN_CHUNK: u64 = 256 << 20;
/// Addresses registered, protected or un-registered by one system call. These touch every page table entry, 50 to 100
/// ms for a GiB of 4 KiB pages; un-registering holds the mmap lock for writing, on which page faults of vCPUs wait.
const PROTECT_CHUNK: u64 = 32 << 20;
/// On hugetlbfs, of either: never less than the largest page.
const HUGE_CHUNK: u64 = 1 << 30;
/// Entries of the vector of results. Runs of pages alternate at worst, so this many hold all of a [`SCAN_CHUNK`].
const REGIONS: usize = (SCAN_CHUNK / PAGE / 2) as usize;

/// Why writes cannot be tracked, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// QEMU ended.
    #[error("the guest's QEMU (process {pid}) is gone")]
    QemuGone {
        /// Its number.
        pid: i32,
    },
    /// The kernel lacks what is needed.
    #[error("the kernel cannot track writes to guest RAM without QEMU's help (Linux 6.7 or later can): {0}")]
    Unsupported(io::Error),
    /// Somebody else tracks the same memory.
    #[error(
        "the RAM of process {pid} at {address:#x} already is under a userfaultfd: another migration of the guest, \
         or a postcopy or background snapshot of QEMU's own"
    )]
    Busy {
        /// QEMU.
        pid: i32,
        /// Start of the RAM mapping.
        address: u64,
    },
    /// QEMU unmapped or replaced guest RAM while it was tracked.
    #[error(
        "the RAM of process {pid} at {address:#x} was unmapped or replaced while writes to it were tracked"
    )]
    Changed {
        /// QEMU.
        pid: i32,
        /// Start of the RAM mapping.
        address: u64,
    },
    /// A system call failed.
    #[error("cannot {what} the RAM of process {pid}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// QEMU.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A part of QEMU's address space that holds a part of a RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackedRange {
    /// Number of the block, as the caller counts.
    pub block: usize,
    /// Start in QEMU's address space.
    pub address: u64,
    /// Length, bytes.
    pub len: u64,
    /// Where in the block it starts, bytes.
    pub offset: u64,
    /// Where in the file it starts, bytes.
    pub file_offset: u64,
    /// Page of the file system it lies on, bytes ([`Backing::page`](super::Backing::page)).
    pub page: u64,
    /// Device and inode of the RAM file, as `/proc/PID/maps` shows them.
    pub file: (u64, u64),
}

impl TrackedRange {
    fn addresses(&self) -> Range<u64> {
        self.address..self.address + self.len
    }

    /// The first address at which the address space does not show this part of the file (any more).
    pub(crate) fn first_gap(&self, maps: &[Vma]) -> Option<u64> {
        let mut address = self.address;
        let end = self.address + self.len;
        for vma in maps.iter().filter(|vma| vma.addresses.end > self.address) {
            let offset = self.file_offset + (address - self.address);
            let same =
                vma.is_shared() && vma.file == self.file && vma.file_offset_of(address) == Some(offset);
            if address >= end || !same {
                break;
            }
            address = vma.addresses.end;
        }
        (address < end).then_some(address)
    }

    /// Addresses in pieces of bounded length that start at multiples of it from the start of the range.
    fn chunks(&self, step: u64) -> impl Iterator<Item = Range<u64>> {
        let step = if self.page > PAGE { HUGE_CHUNK } else { step };
        let Range { start, end } = self.addresses();
        (start..end)
            .step_by(step as usize)
            .map(move |from| from..(from + step).min(end))
    }
}

/// What one scan found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanReport {
    /// Pages reported, of [`PAGE`] bytes.
    pub pages: u64,
    /// Runs of adjacent pages they came in.
    pub runs: u64,
}

/// Tracks the writes of a process (and of all that writes on its behalf in the kernel: KVM, vhost-net, buffered
/// and completed direct I/O) to its mappings of guest RAM files. What a CPU writes by host-physical address is not seen:
/// see [`nested`](crate::qemu::nested).
#[derive(Debug)]
pub struct WriteTracker {
    uffd: OwnedFd,
    process: Process,
    pagemap: File,
    ranges: Vec<TrackedRange>,
    found: Vec<PageRegion>,
}

impl WriteTracker {
    /// Registers `ranges` of `process` with `uffd`, a fresh userfaultfd that was created inside it.
    /// Nothing is protected yet, and nothing costs the guest anything: see [`arm`](Self::arm).
    ///
    /// # Errors
    /// As in [`TrackError`]; nothing stays registered then.
    pub fn new(uffd: OwnedFd, process: &Process, ranges: Vec<TrackedRange>) -> Result<Self, TrackError> {
        let pid = process.pid();
        let pagemap = File::open(process.proc_path("pagemap")).map_err(|source| TrackError::System {
            what: "open the page map of",
            pid,
            source,
        })?;
        process.check_alive()?;
        sys::uffd_api(uffd.as_fd(), sys::TRACKING_FEATURES).map_err(TrackError::Unsupported)?;
        // From here on, dropping the tracker undoes what has been registered.
        let tracker = WriteTracker {
            uffd,
            process: process.clone(),
            pagemap,
            ranges,
            found: vec![PageRegion::default(); REGIONS],
        };
        for range in &tracker.ranges {
            sys::uffd_register(
                tracker.uffd.as_fd(),
                range.addresses(),
                sys::UFFDIO_REGISTER_MODE_WP,
            )
            .map_err(|error| tracker.error("register", range, error))?;
        }
        tracker.check_mappings()?;
        Ok(tracker)
    }

    /// Protects everything: from now on, a first write to a page costs the guest one fault, and is seen.
    /// The page tables that note it take up to 1/512 of the RAM's size.
    ///
    /// What was there before is not reported by any scan: copy all of it, after a drain.
    ///
    /// # Errors
    /// As in [`TrackError`].
    pub fn arm(&mut self) -> Result<(), TrackError> {
        for range in &self.ranges {
            for chunk in range.chunks(PROTECT_CHUNK) {
                sys::uffd_write_protect(self.uffd.as_fd(), chunk)
                    .map_err(|error| self.error("write-protect", range, error))?;
            }
        }
        self.check_mappings()
    }

    /// Reports every page written since it was last reported (or armed), and protects it again: `sink` gets the
    /// number of the block and a range of bytes in it, in ascending order in each mapping.
    ///
    /// A page given back to the host (punched, by balloon or free page reporting) is not reported if it was protected
    /// at the time: the kernel keeps the protection for whatever comes there next. It is a hole of the file then, which
    /// [`RamFile::extents`](super::RamFile::extents) tells. So, after the last scan, what was sent and is no data any
    /// more must be punched at the destination too. What neither tells is a page punched and then only *read* by the
    /// guest: zeros here, its former contents there. The guest gave these contents up, and expects nothing in the page.
    ///
    /// # Errors
    /// As in [`TrackError`]. What `sink` got before is then lost to later scans.
    pub fn scan(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<ScanReport, TrackError> {
        let mut report = ScanReport::default();
        let mut found = std::mem::take(&mut self.found);
        let result = self.ranges.iter().try_for_each(|range| {
            range
                .chunks(SCAN_CHUNK)
                .try_for_each(|chunk| self.scan_chunk(range, chunk, &mut found, sink, &mut report))
        });
        self.found = found;
        // An address space that is gone, or has a gap where RAM was, looks as if nothing had been written.
        result.and_then(|()| self.check_mappings()).map(|()| report)
    }

    /// As [`scan`](Self::scan), adding to one set a block.
    ///
    /// # Errors
    /// As in [`TrackError`].
    ///
    /// # Panics
    /// When `sets` has no entry for a block of one of the tracked ranges.
    pub fn scan_into(&mut self, sets: &mut [PageSet]) -> Result<ScanReport, TrackError> {
        self.scan(&mut |block, range| sets[block].insert(range))
    }

    fn scan_chunk(
        &self,
        range: &TrackedRange,
        mut chunk: Range<u64>,
        found: &mut [PageRegion],
        sink: &mut dyn FnMut(usize, Range<u64>),
        report: &mut ScanReport,
    ) -> Result<(), TrackError> {
        while !chunk.is_empty() {
            let (filled, walked) = sys::scan_written(self.pagemap.as_fd(), chunk.clone(), found)
                .map_err(|error| self.error("scan", range, error))?;
            for region in &found[..filled] {
                let (start, end) = (region.start - range.address, region.end - range.address);
                sink(range.block, range.offset + start..range.offset + end);
                report.pages += (end - start) / PAGE;
                report.runs += 1;
            }
            if walked <= chunk.start {
                let stuck = io::Error::other("PAGEMAP_SCAN did not advance");
                return Err(self.error("scan", range, stuck));
            }
            chunk.start = walked;
        }
        Ok(())
    }

    /// QEMU still lives, and every tracked address still is the same part of the same file.
    fn check_mappings(&self) -> Result<(), TrackError> {
        let maps = self.process.maps()?;
        match self.ranges.iter().find_map(|range| range.first_gap(&maps)) {
            Some(address) => Err(TrackError::Changed {
                pid: self.process.pid(),
                address,
            }),
            None => Ok(()),
        }
    }

    fn error(&self, what: &'static str, range: &TrackedRange, source: io::Error) -> TrackError {
        let pid = self.process.pid();
        let address = range.address;
        match source.raw_os_error() {
            _ if !self.process.is_alive() => TrackError::QemuGone { pid },
            Some(libc::ESRCH) => TrackError::QemuGone { pid },
            Some(libc::EBUSY) => TrackError::Busy { pid, address },
            // PM_SCAN_CHECK_WPASYNC met memory that is not registered; UFFDIO_WRITEPROTECT met a gap.
            Some(libc::EPERM | libc::ENOENT) => TrackError::Changed { pid, address },
            Some(libc::ENOTTY) => TrackError::Unsupported(source),
            _ => TrackError::System { what, pid, source },
        }
    }
}

impl From<ProcessError> for TrackError {
    fn from(error: ProcessError) -> Self {
        match error {
            ProcessError::Gone { pid } => TrackError::QemuGone { pid },
            ProcessError::System { what, pid, source } => TrackError::System { what, pid, source },
        }
    }
}

impl Drop for WriteTracker {
    /// Lifts all protection, piece by piece: closing the descriptor would do, but in one go under QEMU's mmap lock, and
    /// a guest that stays here is to run on smoothly.
    fn drop(&mut self) {
        for chunk in self.ranges.iter().flat_map(|range| range.chunks(PROTECT_CHUNK)) {
            if let Err(error) = sys::uffd_unregister(self.uffd.as_fd(), chunk) {
                tracing::debug!(pid = self.process.pid(), %error, "RAM is not registered any more");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! The rest is tested on other processes (tests/tracker.rs); here, what needs a look inside.

    use nix::sys::memfd::{memfd_create, MFdFlags};

    use super::*;

    #[test]
    fn a_scan_goes_on_where_the_vector_was_full() {
        const PAGES: u64 = 1000;
        let file = File::from(memfd_create(c"ferry-test", MFdFlags::MFD_CLOEXEC).expect("a file"));
        file.set_len(PAGES * PAGE).expect("room");
        let mapping = sys::Mapping::new(&file, 0..PAGES * PAGE).expect("a mapping");
        let process = Process::open(std::process::id() as i32).expect("this process");
        let address = mapping.addresses().start;
        let maps = process.maps().expect("own mappings");
        let vma = maps
            .iter()
            .find(|vma| vma.addresses.contains(&address))
            .expect("the mapping");
        // The block's part that is tracked starts at its page 5, which is the file's page 0.
        let range = TrackedRange {
            block: 3,
            address,
            len: PAGES * PAGE,
            offset: 5 * PAGE,
            file_offset: 0,
            page: PAGE,
            file: vma.file,
        };
        let uffd = sys::userfaultfd().expect("a userfaultfd");
        let mut tracker = WriteTracker::new(uffd, &process, vec![range]).expect("registration");
        tracker.arm().expect("arming");
        tracker.found.truncate(3);
        let written: Vec<u64> = (0..PAGES).step_by(2).collect();
        written
            .iter()
            .for_each(|page| mapping.write((page * PAGE) as usize, b"x"));
        let mut seen = Vec::new();
        let report = tracker.scan(&mut |block, range| {
            assert_eq!((block, range.end - range.start), (3, PAGE));
            seen.push(range.start / PAGE - 5);
        });
        assert_eq!(
            report.expect("a scan"),
            ScanReport {
                pages: PAGES / 2,
                runs: PAGES / 2
            }
        );
        assert_eq!(seen, written);
    }
}
