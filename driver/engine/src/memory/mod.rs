//! Guest RAM as files: what is in it, what changed in it, and moving bytes in and out.
//!
//! ```text
//!   RamFile ── extents ─┐                       ┌─ split_zero ── data runs ──▶ wire
//!   (tmpfs, hugetlbfs)  ├─▶ ranges ── read_at ──┤
//!   WriteTracker ─ scan ┘   (PageSet)           └─ zero runs ───────────────▶ wire
//!
//!   wire ──▶ RamFile::write_at / RamFile::punch        (destination)
//! ```
//!
//! Everything is measured in bytes, relative to the start of one RAM block, and travels as ranges; the grain
//! is [`PAGE`]. Guest memory is never borrowed: it changes while it is read, so it is copied out by `pread`
//! and no Rust reference to it exists. All `mmap` and `ioctl` calls are in `sys`.

pub mod file;
pub mod pages;
mod presence;
pub mod probe;
pub mod punches;
pub(crate) mod sys;
pub mod tracker;
pub mod zero;

pub use file::{Backing, Extents, FileError, RamFile};
pub use pages::PageSet;
pub use probe::{probe, probe_huge, Unsupported, UnsupportedPages};
pub use punches::PunchWatch;
pub use tracker::{ScanReport, TrackError, TrackedRange, WriteTracker};
pub use zero::{is_zero, split_zero, Run};

/// The grain of everything in this room, bytes. The kernel tracks writes to tmpfs by its base page, which is
/// 4 KiB on x86-64; a hugetlbfs page is simply a run of these.
pub const PAGE: u64 = 4096;
