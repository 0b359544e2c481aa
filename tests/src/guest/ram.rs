//! A guest's RAM file, read and damaged from outside.
//!
//! libvirt keeps it as `/var/lib/libvirt/qemu/ram/ID-NAME/pc.ram`; with less than 3 GiB, offsets in the file are the guest's
//! physical addresses. Judge a guest only while its vCPUs are stopped.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use ferry_guest::page::{Page, PAGE_SIZE};
use nix::unistd::{lseek, Whence};

use crate::host::Process;

const MIB: u64 = 1 << 20;

/// A RAM file.
#[derive(Debug)]
pub struct RamFile {
    path: PathBuf,
    file: File,
}

/// A page that our Linux guest stamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamped {
    /// Where it lies in the file, in bytes.
    pub offset: u64,
    /// Which page of the guest's area it is.
    pub place: u64,
    /// How new it is.
    pub sequence: u64,
}

impl RamFile {
    /// Opens a RAM file for reading and writing.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = File::options().read(true).write(true).open(&path);
        Ok(RamFile {
            file: file.with_context(|| format!("cannot open {}", path.display()))?,
            path,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads one page.
    ///
    /// # Errors
    /// If the offset is beyond the file.
    pub fn page(&self, offset: u64) -> Result<Page> {
        let mut page = Page::ZEROED;
        self.file
            .read_exact_at(page.bytes_mut(), offset)
            .with_context(|| format!("cannot read {} at {offset:#x}", self.path.display()))?;
        Ok(page)
    }

    /// Writes one page, behind the guest's back.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn overwrite(&self, offset: u64, page: &Page) -> Result<()> {
        self.file
            .write_all_at(page.bytes(), offset)
            .with_context(|| format!("cannot write {} at {offset:#x}", self.path.display()))
    }

    /// Writes one page as the guest's QEMU would: through its mapping of the file.
    ///
    /// # Errors
    /// If it maps no such file, or cannot be written to.
    pub fn overwrite_as(&self, qemu: &Process, offset: u64, page: &Page) -> Result<()> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let maps = fs::read_to_string(qemu.proc().join("maps")).context("cannot read QEMU's maps")?;
        let mapping = maps
            .lines()
            .find(|line| line.ends_with(&format!("/{name}")) && line.contains(" rw-s "));
        let start = mapping
            .and_then(|line| line.split('-').next())
            .context("no mapping of the RAM file")?;
        let at = u64::from_str_radix(start, 16)? + offset;
        let memory = File::options().write(true).open(qemu.proc().join("mem"));
        memory
            .and_then(|memory| memory.write_all_at(page.bytes(), at))
            .context("cannot write QEMU's memory")
    }

    /// Bytes of it that take memory.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn resident(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        // st_blocks counts 512 bytes, whatever the file system's blocks are.
        Ok(metadata
            .with_context(|| format!("cannot stat {}", self.path.display()))?
            .blocks()
            * 512)
    }

    /// The first hole from `offset` on: memory that neither guest nor QEMU has touched.
    ///
    /// # Errors
    /// If there is none before the file's end.
    pub fn hole(&self, offset: u64) -> Result<u64> {
        let size = self.file.metadata()?.len();
        let hole = lseek(&self.file, i64::try_from(offset)?, Whence::SeekHole)?;
        let hole = u64::try_from(hole)?;
        ensure!(
            hole < size,
            "{} has no hole from {offset:#x} on",
            self.path.display()
        );
        Ok(hole)
    }

    /// Every whole page of the Linux guest's that the file holds, in order of offset.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn stamped(&self) -> Result<Vec<Stamped>> {
        let size = self.file.metadata().context("cannot stat the RAM file")?.len();
        let mut found = Vec::new();
        for offset in (0..size).step_by(PAGE_SIZE) {
            let page = self.page(offset)?;
            if let Some((place, sequence)) = page
                .claim()
                .filter(|(place, sequence)| page.is(*place, *sequence))
            {
                found.push(Stamped {
                    offset,
                    place,
                    sequence,
                });
            }
        }
        Ok(found)
    }

    /// Judges the boot sector's memory up to `end_mib`: each page's byte equals its predecessor's, or is one less after the one
    /// edge where the guest stopped. Returns what it found good.
    ///
    /// # Errors
    /// If a page is stale, ahead or foreign, or if the guest never wrote.
    pub fn judge_boot(&self, end_mib: u32) -> Result<BootState> {
        let mut bytes = Vec::new();
        let mut byte = [0];
        for offset in (MIB..u64::from(end_mib) * MIB).step_by(PAGE_SIZE) {
            self.file
                .read_exact_at(&mut byte, offset)
                .with_context(|| format!("cannot read {} at {offset:#x}", self.path.display()))?;
            bytes.push(byte[0]);
        }
        judge_edges(&bytes).with_context(|| format!("{} is damaged", self.path.display()))
    }
}

/// Where the boot sector stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    /// What it has left in the first page.
    pub value: u8,
    /// First page not yet changed in its last pass, counted from 1 MiB; `None` when it stopped between two passes.
    pub edge: Option<usize>,
}

fn judge_edges(bytes: &[u8]) -> Result<BootState> {
    let value = *bytes.first().context("no pages to judge")?;
    ensure!(
        bytes.iter().any(|byte| *byte != 0),
        "all bytes are 0: the guest never wrote, or all its writes are lost"
    );
    let mut edge = None;
    let mut expected = value;
    let mut wrong = Vec::new();
    for (index, byte) in bytes.iter().enumerate() {
        if *byte == expected {
            continue;
        }
        if edge.is_none() && *byte == value.wrapping_sub(1) {
            edge = Some(index);
            expected = *byte;
        } else {
            wrong.push((index, *byte));
        }
    }
    if let Some((index, byte)) = wrong.first() {
        bail!(
            "{} of {} pages are wrong, the first at {:#x}: {byte} instead of {expected}; first page {value}, edge at {edge:?}",
            wrong.len(),
            bytes.len(),
            MIB as usize + index * PAGE_SIZE,
        );
    }
    Ok(BootState { value, edge })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_edge_is_right() {
        assert_eq!(
            judge_edges(&[5, 5, 4, 4]).expect("good"),
            BootState {
                value: 5,
                edge: Some(2)
            }
        );
        assert_eq!(
            judge_edges(&[5, 5, 5]).expect("good"),
            BootState { value: 5, edge: None }
        );
        assert_eq!(
            judge_edges(&[0, 255]).expect("good"),
            BootState {
                value: 0,
                edge: Some(1)
            }
        );
    }

    #[test]
    fn anything_else_is_wrong() {
        for bytes in [
            &[5, 4, 5, 4][..],
            &[5, 4, 3],
            &[5, 6],
            &[5, 3],
            &[5, 4, 4, 5],
            &[0, 0],
            &[],
        ] {
            assert!(judge_edges(bytes).is_err(), "{bytes:?}");
        }
    }
}
