//! Which RAM a guest has, in which files, and whether all of it can be moved.
//!
//! With `x-ignore-shared`, QEMU leaves out exactly the blocks that are shared *and* a named file (8.1 and later;
//! `migrate_ram_is_ignored` of migration/ram.c). So the blocks found here must be just those: one too few, and its
//! contents are moved by nobody. Small blocks that are no memory backend (ROMs, VGA memory, flash) stay with QEMU.
//!
//! The mapping itself is the witness: QEMU names backend and address, `/proc/PID/maps` tells the file that is there.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{json, Value};

use super::commands::Version;
use super::devices;
use super::monitor::{Monitor, MonitorError};
use super::process::{Process, ProcessError, Vma};
use crate::memory::{RamFile, TrackedRange};

/// The oldest QEMU whose behaviour was looked at.
const OLDEST: Version = Version {
    major: 7,
    minor: 2,
    micro: 0,
};

/// The largest block that may be left to QEMU's stream without being a memory backend; bytes. Video memory ends at
/// half of this.
const LARGEST_STREAMED: u64 = 1 << 30;

/// A block of guest RAM that is moved file to file.
#[derive(Debug)]
pub struct RamBlock {
    /// QEMU's name of the block in the migration stream (idstr): the same on both hosts.
    pub name: String,
    /// QOM id of the memory backend.
    pub backend: String,
    /// Size, bytes.
    pub size: u64,
    /// Where QEMU maps it.
    pub address: u64,
    /// Where in the file it starts, bytes.
    pub file_offset: u64,
    /// Device and inode of the file.
    pub identity: (u64, u64),
    /// The file, opened for reading and writing; its offsets are those of the block.
    pub file: RamFile,
}

/// A reason why a guest's RAM cannot be moved by us; the text is for an administrator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ineligible {
    /// QEMU is too old.
    #[error("QEMU {version} is older than {OLDEST}")]
    OldQemu {
        /// Its version.
        version: Version,
    },
    /// RAM is not shared.
    #[error(
        "memory backend {backend} is private to QEMU: the guest needs \
         <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
    )]
    Private {
        /// QOM id.
        backend: String,
    },
    /// RAM is shared but not a named file.
    #[error(
        "memory backend {backend} is a {kind}, which QEMU does not leave out of its stream: the guest needs \
         <memoryBacking><source type='file'/>"
    )]
    NotAFile {
        /// QOM id.
        backend: String,
        /// QOM type, such as "memory-backend-memfd".
        kind: String,
    },
    /// RAM is a file that is no memory, or cannot be opened.
    #[error("memory backend {backend}: {why}")]
    Unusable {
        /// QOM id.
        backend: String,
        /// What is wrong with its file.
        why: String,
    },
    /// A block that belongs to no memory backend, and is large.
    #[error("RAM block {name} of {size} bytes belongs to no memory backend")]
    Stray {
        /// The block's name.
        name: String,
        /// Its size, bytes.
        size: u64,
    },
    /// Writes that cannot be tracked.
    #[error("{what}: {why}, which cannot be tracked")]
    OutsideWriter {
        /// The device.
        what: String,
        /// Who writes, and how.
        why: &'static str,
    },
}

/// Why [`discover`] did not return the guest's RAM.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// The guest is not eligible, for all of these reasons.
    #[error("the guest is not eligible: {}", join(.0))]
    Ineligible(Vec<Ineligible>),
    /// QEMU could not be asked.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// QEMU could not be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

fn join(reasons: &[Ineligible]) -> String {
    reasons
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Finds the RAM of the guest behind `monitor`, whose QEMU is `process`. Nothing about the guest is changed.
///
/// # Errors
/// [`DiscoverError::Ineligible`] with every reason found; else when QEMU ends or does not answer in time.
pub fn discover(
    monitor: &mut Monitor,
    process: &Process,
    deadline: Instant,
) -> Result<Vec<RamBlock>, DiscoverError> {
    let version = monitor.version()?;
    if version < OLDEST {
        return Err(DiscoverError::Ineligible(vec![Ineligible::OldQemu { version }]));
    }
    let outside = devices::objections(monitor, deadline)?;
    let mut reasons: Vec<_> = outside
        .into_iter()
        .map(|(what, why)| Ineligible::OutsideWriter { what, why })
        .collect();

    let backends = Backend::all(monitor, deadline)?;
    let table = monitor.execute("x-query-ramblock", json!({}), deadline)?;
    let table = table["human-readable-text"].as_str().unwrap_or_default();
    let listed =
        Listed::parse_table(table).ok_or_else(|| monitor.protocol("x-query-ramblock is no table"))?;
    let maps = process.maps()?;

    let mut blocks: Vec<RamBlock> = Vec::new();
    // A block without a name belongs to a backend that no device uses: no part of the guest.
    for block in listed.iter().filter(|block| !block.name.is_empty()) {
        match backends.iter().find(|backend| backend.names(&block.name)) {
            Some(backend) => match backend.open(block, &maps, process) {
                Ok(opened) => blocks.push(opened),
                Err(reason) => reasons.push(reason),
            },
            None if block.size > LARGEST_STREAMED => {
                reasons.push(Ineligible::Stray {
                    name: block.name.clone(),
                    size: block.size,
                });
            }
            None => {}
        }
    }
    for (index, block) in blocks.iter().enumerate() {
        if blocks[..index]
            .iter()
            .any(|other| other.identity == block.identity && overlap(other, block))
        {
            let why = "its file is also that of another RAM block".into();
            reasons.push(Ineligible::Unusable {
                backend: block.backend.clone(),
                why,
            });
        }
    }
    if blocks.is_empty() && reasons.is_empty() {
        reasons.push(Ineligible::Unusable {
            backend: "(none)".into(),
            why: "the guest has no RAM".into(),
        });
    }
    match reasons.is_empty() {
        true => Ok(blocks),
        false => Err(DiscoverError::Ineligible(reasons)),
    }
}

/// The guest's RAM as [`WriteTracker::new`](crate::memory::WriteTracker::new) wants it; blocks are numbered as in
/// `blocks`.
pub fn tracked_ranges(blocks: &[RamBlock]) -> Vec<TrackedRange> {
    let range = |(index, block): (usize, &RamBlock)| TrackedRange {
        block: index,
        address: block.address,
        len: block.size,
        offset: 0,
        file_offset: block.file_offset,
        page: block.file.backing().page(),
        file: block.identity,
    };
    blocks.iter().enumerate().map(range).collect()
}

fn overlap(a: &RamBlock, b: &RamBlock) -> bool {
    a.file_offset < b.file_offset + b.size && b.file_offset < a.file_offset + a.size
}

/// A memory backend object of QEMU's.
#[derive(Debug)]
struct Backend {
    id: String,
    /// QOM type.
    kind: String,
    share: bool,
    readonly: bool,
    /// File or directory, as QEMU was told; empty where the type has none.
    path: PathBuf,
}

impl Backend {
    fn all(monitor: &mut Monitor, deadline: Instant) -> Result<Vec<Backend>, MonitorError> {
        let children = devices::children(monitor, "/objects", deadline)?;
        let mut backends = Vec::new();
        for (id, kind) in children
            .into_iter()
            .filter(|(_, kind)| kind.starts_with("memory-backend-"))
        {
            let mut get = |property: &str| {
                let question = json!({ "path": format!("/objects/{id}"), "property": property });
                match monitor.execute("qom-get", question, deadline) {
                    // The type, or the version, does not have the property.
                    Err(MonitorError::Refused { .. }) => Ok(Value::Null),
                    answer => answer,
                }
            };
            let share = get("share")?.as_bool().unwrap_or(false);
            let readonly = get("readonly")?.as_bool().unwrap_or(false);
            let path = get("mem-path")?.as_str().unwrap_or_default().into();
            backends.push(Backend {
                id,
                kind,
                share,
                readonly,
                path,
            });
        }
        Ok(backends)
    }

    /// Whether the RAM block of this name is the backend's: the id, its canonical path (old machine types), or the id
    /// behind a device's path (virtio-mem).
    fn names(&self, block: &str) -> bool {
        block
            .strip_suffix(self.id.as_str())
            .is_some_and(|before| before.is_empty() || before.ends_with('/'))
    }

    /// Opens the file behind a block of this backend, if it qualifies.
    fn open(&self, block: &Listed, maps: &[Vma], process: &Process) -> Result<RamBlock, Ineligible> {
        let backend = self.id.clone();
        if self.kind == "memory-backend-ram" || !self.share {
            return Err(Ineligible::Private { backend });
        }
        if self.kind != "memory-backend-file" {
            return Err(Ineligible::NotAFile {
                backend,
                kind: self.kind.clone(),
            });
        }
        let unusable = |why: String| Ineligible::Unusable {
            backend: self.id.clone(),
            why,
        };
        if self.readonly {
            return Err(unusable("it is read-only".into()));
        }
        let first = self
            .find(block, maps)
            .ok_or_else(|| unusable("QEMU does not map its file".into()))?;
        let address = block.address.unwrap_or(first.addresses.start);
        let (Some(file_offset), Some(end)) = (first.file_offset_of(address), address.checked_add(block.size))
        else {
            return Err(unusable(
                "QEMU's mapping of its file is not where QEMU says".into(),
            ));
        };
        let window = file_offset..file_offset.saturating_add(block.size);
        let path = PathBuf::from(first.name.trim_end_matches(" (deleted)"));
        let file = open_mapped(first, process, &path)
            .and_then(|file| RamFile::from_file(file, path, window).map_err(|e| e.to_string()))
            .map_err(unusable)?;
        let ram = RamBlock {
            name: block.name.clone(),
            backend,
            size: block.size,
            address,
            file_offset,
            identity: first.file,
            file,
        };
        // The whole block, without a gap, must be this file in this order.
        match tracked_ranges(std::slice::from_ref(&ram))[0].first_gap(maps) {
            None => Ok(ram),
            Some(gap) => Err(unusable(format!(
                "QEMU maps its file at {address:#x}..{end:#x} but for {gap:#x}"
            ))),
        }
    }

    /// The mapping in which the block starts: at the address QEMU tells; before QEMU told (7.2 does not), the one of
    /// the backend's file.
    fn find<'a>(&self, block: &Listed, maps: &'a [Vma]) -> Option<&'a Vma> {
        if let Some(address) = block.address {
            return maps
                .iter()
                .find(|vma| vma.addresses.contains(&address) && vma.is_shared());
        }
        // In a directory (hugepages), QEMU makes a file and unlinks it: `qemu_back_mem.<id>.XXXXXX (deleted)`.
        let unlinked = format!(
            "{}/qemu_back_mem.{}.",
            self.path.display(),
            self.id.replace('/', "_")
        );
        let by_name = |vma: &&Vma| Path::new(&vma.name) == self.path || vma.name.starts_with(&unlinked);
        maps.iter().filter(by_name).find(|vma| vma.is_shared())
    }
}

/// Opens the file that is mapped at `vma`: by the mapping, which works for unlinked files and across mount
/// namespaces; by its path where the kernel does not allow that. In either case it must be the very same file.
fn open_mapped(vma: &Vma, process: &Process, path: &Path) -> Result<File, String> {
    let Range { start, end } = vma.addresses;
    let by_mapping = process.proc_path(&format!("map_files/{start:x}-{end:x}"));
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let file = open(&by_mapping)
        .or_else(|_| open(path))
        .map_err(|error| format!("cannot open {}: {error}", path.display()))?;
    let stat = file
        .metadata()
        .map_err(|error| format!("cannot examine {}: {error}", path.display()))?;
    match (stat.dev(), stat.ino()) == vma.file {
        true => Ok(file),
        false => Err(format!("{} is not the file that QEMU maps", path.display())),
    }
}

/// A line of `x-query-ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    name: String,
    /// Used length, bytes.
    size: u64,
    /// Where QEMU maps it; not told by QEMU 7.2.
    address: Option<u64>,
}

impl Listed {
    /// Parses the text, which opens with a line of headings:
    /// ```text
    ///   Block Name    PSize              Offset               Used              Total                HVA  RO
    ///       pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f2c6bfff000  rw
    /// ```
    fn parse_table(text: &str) -> Option<Vec<Listed>> {
        let mut lines = text.lines();
        let headings = lines.next()?;
        if !headings.contains("Block Name") {
            return None;
        }
        let has_address = headings.contains(" HVA");
        lines
            .filter(|line| !line.trim().is_empty())
            .map(|line| Listed::parse(line, has_address))
            .collect()
    }

    /// From the right, as the name may be anything.
    fn parse(line: &str, has_address: bool) -> Option<Listed> {
        let mut words = line.split_whitespace().rev();
        let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let address = match has_address {
            true => {
                words.next().filter(|access| matches!(*access, "ro" | "rw"))?;
                Some(hex(words.next()?)?)
            }
            false => None,
        };
        let (_total, size, _offset) = (hex(words.next()?)?, hex(words.next()?)?, hex(words.next()?)?);
        let (_unit, _page) = (words.next()?, words.next()?);
        let mut name: Vec<&str> = words.collect();
        name.reverse();
        Some(Listed {
            name: name.join(" "),
            size,
            address,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramblock_tables_of_both_kinds() {
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                   \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007fa28bfff000  rw\n\
                   \x20                           4 KiB  0x0000000014000000 0x0000000001000000 0x0000000001000000 0x00007fa286c00000  rw\n\
                   0000:00:03.0/virtio-net-pci.rom    4 KiB  0x00000000160c0000 0x0000000000040000 0x0000000000040000 0x00007fa287e00000  ro\n";
        let blocks = Listed::parse_table(new).expect("the table of QEMU 10.0");
        let names: Vec<_> = blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names, ["pc.ram", "", "0000:00:03.0/virtio-net-pci.rom"]);
        assert_eq!(
            (blocks[0].size, blocks[0].address),
            (256 << 20, Some(0x7fa2_8bff_f000))
        );

        let old = "              Block Name    PSize              Offset               Used              Total\n\
                   \x20                 pc.ram    2 MiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n";
        let blocks = Listed::parse_table(old).expect("the table of QEMU 7.2");
        assert_eq!(
            blocks,
            [Listed {
                name: "pc.ram".into(),
                size: 256 << 20,
                address: None
            }]
        );

        for bad in [
            "",
            "no table",
            "Block Name HVA\n pc.ram 4 KiB 0x0 0x0 0x0",
            "Block Name\n pc.ram 4 KiB 0x0 zz 0x0",
        ] {
            assert_eq!(Listed::parse_table(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn block_names_of_a_backend() {
        let backend = |id: &str| Backend {
            id: id.into(),
            kind: "memory-backend-file".into(),
            share: true,
            readonly: false,
            path: PathBuf::new(),
        };
        for name in ["ram-node0", "/objects/ram-node0", "0000:00:04.0/ram-node0"] {
            assert!(backend("ram-node0").names(name), "{name}");
            assert!(!backend("node0").names(name), "{name}");
        }
    }
}
