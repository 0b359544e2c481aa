//! Load on a virtio disk, and a check of what the disk's DMA left in memory.
//!
//! ```text
//!   block b on the disk, stamped (b, sequence) ── O_DIRECT read ──> landing page, kept and checked again
//! ```
//!
//! The device writes a landing page behind the CPU's back. If whoever copies the guest's memory misses such a write, the page
//! arrives with what it held before: still a whole page, but another block's or an older one. So landed pages are not thrown
//! away after the read: each is compared when its turn to be read into comes again, and all of them by every `check`.

use std::fs::{self, File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ferry_guest::config::{Disk, Rate, PAGES_PER_MIB};
use ferry_guest::page::{Page, PAGE_SIZE};

use crate::load::{Pace, Random};
use crate::report::{say, Report};

/// Requests in flight at a time: each worker has one.
const WORKERS: u64 = 4;
/// Landing pages of each worker: 1 MiB.
const LANDINGS: usize = 256;
/// Blocks stamped by one request at the start.
const BATCH: u64 = 128;
/// How long a driver may take to find its device.
const PATIENCE: Duration = Duration::from_secs(10);

/// A page the disk was read into, and what lies in it.
struct Landed {
    page: Box<Page>,
    /// Block and sequence number; `None` until the first read.
    holds: Option<(u64, u64)>,
}

/// The disk and the pages it is read into.
pub struct Landing {
    file: File,
    rate: Rate,
    /// What each block on the disk must hold; its lock is held while it is read or written.
    blocks: Box<[Mutex<u64>]>,
    landed: Box<[Mutex<Landed>]>,
    sequence: AtomicU64,
    report: Arc<Report>,
}

/// Waits for a device of this name; its path.
pub fn wait_for(name: &str) -> Result<String, String> {
    let path = format!("/dev/{name}");
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(&path).is_err() {
        if Instant::now() > deadline {
            return Err(format!("there is no {path}, which the command line names"));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(path)
}

/// A thread that panicked ends the guest, so there is nobody to be protected from a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Landing {
    /// Waits for the disk and opens it past the guest's page cache.
    pub fn open(disk: &Disk, report: Arc<Report>) -> Result<Self, String> {
        let path = wait_for(&disk.name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .map_err(|error| format!("cannot open {path}: {error}"))?;
        let landed = || {
            Mutex::new(Landed {
                page: Box::new(Page::ZEROED),
                holds: None,
            })
        };
        Ok(Landing {
            file,
            rate: Rate(disk.rate.0 / WORKERS),
            blocks: (0..disk.mib.saturating_mul(PAGES_PER_MIB))
                .map(|_| Mutex::new(1))
                .collect(),
            landed: (0..LANDINGS * WORKERS as usize).map(|_| landed()).collect(),
            sequence: AtomicU64::new(1),
            report,
        })
    }

    /// Stamps the disk, then reads and writes it without end.
    pub fn run(&self) {
        if let Err(error) = self.stamp_all() {
            return say(format_args!("fatal cannot write the disk: {error}"));
        }
        thread::scope(|scope| {
            for (worker, landed) in self.landed.chunks(LANDINGS).enumerate() {
                scope.spawn(move || {
                    if let Err(error) = self.work(worker as u64, landed) {
                        say(format_args!("fatal disk: {error}"));
                    }
                });
            }
        });
    }

    fn stamp_all(&self) -> std::io::Result<()> {
        let blocks = self.blocks.len() as u64;
        for first in (0..blocks).step_by(BATCH as usize) {
            let pages: Vec<Page> = (first..blocks.min(first + BATCH))
                .map(|block| Page::stamped(block, 1))
                .collect();
            let slices: Vec<IoSlice> = pages.iter().map(|page| IoSlice::new(page.bytes())).collect();
            let wanted = pages.len() * PAGE_SIZE;
            let written = nix::sys::uio::pwritev(&self.file, &slices, (first * PAGE_SIZE as u64) as i64)?;
            if written != wanted {
                return Err(std::io::Error::other(format!(
                    "{written} of {wanted} bytes written at block {first}"
                )));
            }
        }
        Ok(())
    }

    fn work(&self, worker: u64, landed: &[Mutex<Landed>]) -> std::io::Result<()> {
        let mut pace = Pace::new();
        let mut random = Random::new(worker);
        let mut scratch = Box::new(Page::ZEROED);
        let mut due = 0;
        for landed in landed.iter().cycle() {
            while due == 0 {
                thread::sleep(Duration::from_millis(2));
                due = pace.due(self.rate);
            }
            due -= 1;
            self.write(random.below(self.blocks.len() as u64), &mut scratch)?;
            self.read(random.below(self.blocks.len() as u64), landed)?;
            self.report.blocks.fetch_add(2, Ordering::Relaxed);
        }
        Ok(())
    }

    fn write(&self, block: u64, scratch: &mut Page) -> std::io::Result<()> {
        let mut holds = lock(&self.blocks[block as usize]);
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        scratch.stamp(block, sequence);
        self.file
            .write_all_at(scratch.bytes(), block * PAGE_SIZE as u64)?;
        *holds = sequence;
        Ok(())
    }

    fn read(&self, block: u64, landed: &Mutex<Landed>) -> std::io::Result<()> {
        let mut landed = lock(landed);
        self.judge("landed", &landed);
        let holds = lock(&self.blocks[block as usize]);
        self.file
            .read_exact_at(landed.page.bytes_mut(), block * PAGE_SIZE as u64)?;
        landed.holds = Some((block, *holds));
        self.judge("disk", &landed);
        Ok(())
    }

    fn judge(&self, area: &str, landed: &Landed) {
        let Some((block, sequence)) = landed.holds else {
            return;
        };
        if let Err(damage) = landed.page.verify(block, sequence) {
            self.report.error(area, block, sequence, damage);
        }
    }

    /// Compares every landed page, now; how many there are.
    pub fn check_all(&self) -> u64 {
        self.landed
            .iter()
            .for_each(|landed| self.judge("landed", &lock(landed)));
        self.landed.len() as u64
    }
}
