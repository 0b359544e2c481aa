//! Which huge pages a file has.
//!
//! hugetlbfs knows no holes by lseek(2), mincore(2) tells only what this process has mapped, and a read of a hole costs as
//! much as one of a page. So each page is asked to be mapped here *if the file has it*: UFFDIO_CONTINUE of a mapping
//! registered for minor faults, about a microsecond each. No page is made, and one that is given back goes from this
//! mapping as from any.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use super::sys::{self, Mapping};

/// Looks for the huge pages of a part of a file.
#[derive(Debug)]
pub(super) struct Presence {
    uffd: OwnedFd,
    mapping: Mapping,
    part: Range<u64>,
    page: u64,
}

impl Presence {
    /// Prepares to look at `part` of `file`, both ends multiples of `page`.
    pub(super) fn new(file: &File, part: Range<u64>, page: u64) -> io::Result<Self> {
        let uffd = sys::userfaultfd()?;
        sys::uffd_api(uffd.as_fd(), sys::PRESENCE_FEATURES)?;
        let mapping = Mapping::new(file, part.clone())?;
        sys::uffd_register(uffd.as_fd(), mapping.addresses(), sys::UFFDIO_REGISTER_MODE_MINOR)?;
        Ok(Self {
            uffd,
            mapping,
            part,
            page,
        })
    }

    /// The first run of pages that are there, of those that begin in `wanted` (bytes of the file).
    pub(super) fn next(&self, wanted: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut run: Option<Range<u64>> = None;
        let first = wanted.start / self.page * self.page;
        for offset in (first..wanted.end.min(self.part.end)).step_by(self.page as usize) {
            let address = self.mapping.addresses().start + (offset - self.part.start);
            let there = sys::uffd_continue(self.uffd.as_fd(), address..address + self.page)?;
            match (&mut run, there) {
                (None, false) => {}
                (Some(_), false) => break,
                (None, true) => run = Some(offset..offset + self.page),
                (Some(run), true) => run.end = offset + self.page,
            }
        }
        Ok(run.map(|run| run.start.max(wanted.start)..run.end.min(wanted.end)))
    }
}
