//! What a guest owns, as XML: `xml-schemas/inventory.rng` describes it.
//!
//! It travels in the source's offer, so it is hostile: bounded in every dimension, and each path absolute and free of
//! `.`, `..` and NUL.

mod read;
#[cfg(test)]
mod tests;
mod write;

use crate::session::Guest;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Files of one guest.
pub const MAX_FILES: usize = 4096;
/// Media of one guest.
pub const MAX_MEDIA: usize = 512;
/// Snapshots and checkpoints of one guest.
pub const MAX_METADATA: usize = 4096;
/// Bytes of a path (PATH_MAX, with its NUL).
pub const MAX_PATH: usize = 4095;
/// Bytes of a file: far beyond any disk, far from overflowing a sum of [`MAX_FILES`].
pub const MAX_SIZE: u64 = 1 << 50;

/// Everything a guest owns and needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// The guest, by its name at the source.
    pub guest: Guest,
    /// libvirt starts it with the host.
    pub autostart: bool,
    /// What moves.
    pub files: Vec<File>,
    /// Directories of libvirt's own that hold some of the files, from the top down: made where they are not.
    pub directories: Vec<Directory>,
    /// What is looked for at the destination.
    pub media: Vec<Medium>,
    /// Snapshots and checkpoints, parents before children.
    pub metadata: Vec<Metadata>,
}

/// A file that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Where it is at the source.
    pub path: PathBuf,
    /// What it is to the guest.
    pub part: Part,
    /// A file or a device.
    pub kind: Kind,
    /// Its length, bytes.
    pub size: u64,
    /// What it takes up on its file system, bytes: what the destination reserves.
    pub allocated: u64,
}

/// A directory that holds files of the guest (swtpm's).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Where it is at the source.
    pub path: PathBuf,
    /// Its permissions.
    pub mode: u32,
    /// Its owner, by name where it has one.
    pub owner: String,
    /// Its group.
    pub group: String,
}

/// What a file is to its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "kebab-case")]
pub enum Part {
    /// An image of a disk's chain.
    Disk {
        /// The disk, as the definition names it (`vda`).
        target: String,
        /// 0 is what the guest writes to, 1 its backing image, and so on.
        layer: u16,
        /// What QEMU takes it for.
        format: String,
        /// The image above names it relative to its own directory.
        relative: bool,
    },
    /// The external data file of a qcow2 image.
    Data {
        /// The disk.
        target: String,
        /// The image's layer.
        layer: u16,
        /// The image names it relative to its own directory.
        relative: bool,
    },
    /// UEFI variables.
    Nvram,
    /// The state of an emulated TPM.
    Tpm,
    /// QEMU's log.
    Log,
    /// Something else the guest owns, such as the memory image of an external snapshot.
    Other,
}

/// How a file's bytes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// In a file of a file system.
    File,
    /// On a block device.
    Block,
}

/// A disk that does not move: a CD, or one that is read-only or shared with other guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// The disk (`sda`).
    pub target: String,
    /// Where it is.
    pub path: PathBuf,
}

/// A snapshot or a checkpoint: libvirt's description of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Which of both.
    pub kind: MetadataKind,
    /// Its name.
    pub name: String,
    /// It is the guest's current one.
    pub current: bool,
    /// libvirt's XML.
    pub xml: String,
}

/// Which kind of libvirt's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetadataKind {
    /// A snapshot.
    Snapshot,
    /// A checkpoint.
    Checkpoint,
}

/// A definition file, to find out whether it is still the one that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Where it is.
    pub path: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// Its length, bytes.
    pub size: u64,
    /// When it was written, nanoseconds since 1970.
    pub modified: i64,
}

/// An inventory that is not as our schema has it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub(crate) String);

fn malformed(what: impl Into<String>) -> Malformed {
    Malformed(what.into())
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Block => "block",
        }
    }
}

impl MetadataKind {
    fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// XML 1.0 has no other characters (and would read a tab or a line's end in an attribute as a space).
fn is_xml(character: char) -> bool {
    !character.is_control() && !matches!(character, '\u{fffe}' | '\u{ffff}')
}
