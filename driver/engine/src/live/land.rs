//! Landing memory: what comes off the streams, written into the RAM files of the incoming QEMU.

use super::signals::{End, Signals};
use super::Error;
use crate::control::Meter;
use crate::memory::{Backing, FileError, RamFile};
use crate::wire::Apply;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

/// The RAM files of the incoming guest, in the order of the offer; each stream has a handle.
#[derive(Clone)]
pub struct Landing {
    files: Arc<[RamFile]>,
    meter: Arc<Meter>,
    signals: Arc<Signals>,
}

impl Landing {
    /// Lands in these files, which are emptied first: what the source never sends is a hole there and must be
    /// one here, whatever QEMU has put there since it started. Huge pages stay: somebody else could take them, and the
    /// source tells of all.
    pub fn new(files: Vec<RamFile>, meter: Arc<Meter>, signals: Arc<Signals>) -> Result<Self, Error> {
        for file in &files {
            if file.backing() == Backing::Tmpfs && file.resident()? > 0 {
                file.punch(0..file.len())?;
            }
        }
        Ok(Self {
            files: files.into(),
            meter,
            signals,
        })
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &RamFile> {
        self.files.iter()
    }

    /// Ends the migration with what went wrong here, before the source hears of it and ends it in its own words.
    fn failed(&self, error: FileError) -> io::Error {
        self.signals.end(End::Failed(error.to_string()));
        io::Error::other(error)
    }

    fn file(&self, block: u16) -> io::Result<&RamFile> {
        self.files
            .get(usize::from(block))
            .ok_or_else(|| io::Error::other(format!("there is no RAM block {block}")))
    }
}

impl Apply for Landing {
    /// Cold pages are written by pwrite: one copy into fresh pages, no fault a page.
    fn data(&mut self, block: u16, offset: u64, payload: &[u8]) -> io::Result<()> {
        // The plug-in counts what is not here yet as promised.
        self.meter.data.fetch_add(payload.len() as u64, Relaxed);
        self.file(block)?
            .write_at(offset, payload)
            .map_err(|error| self.failed(error))
    }

    /// Where huge pages are, whole ones are holes at the source, and less is zeros that are there.
    fn zero(&mut self, block: u16, offset: u64, span: u64) -> io::Result<()> {
        let file = self.file(block)?;
        let page = file.backing().page();
        let range = offset..offset + span;
        let landed = match offset.is_multiple_of(page) && span.is_multiple_of(page) {
            true => file.punch(range),
            false => file.clear(range),
        };
        landed.map_err(|error| self.failed(error))
    }
}
