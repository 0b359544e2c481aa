//! What the parts say to each other of a cold migration: a guest that is shut off moves with all of its files.
//!
//! ```text
//!   source                                                            destination
//!   Begin    items ─ColdServe▶ engine: measure, lock, listen
//!            cookie ◀ ColdOffer {inventory}  ─────────────────────▶   Prepare  plan ─ColdPull▶ engine: reserve, pull, verify
//!                                     ◀═══════ ranges of files ═════           (journal: pulling → ready)
//!            journal: prepared → committed  ◀──── commit? ────────    Finish   ColdCommit: rename  (committing → placed)
//!                                                                              libvirt defines the guest
//!            journal: owned-there  ◀────────────── owned ─────────             ColdOwned           (owned → gone)
//!   Confirm  ColdConfirm; libvirt undefines; ColdDelete
//! ```
//!
//! One host owns the guest at every instant: the source until its journal says committed, the destination from its own
//! `owned` on, and in between nobody starts it. See [`journal`].
//!
//! The destination decides every path it writes to: [`Plan`] is made by its own plug-in, from the definition that
//! libvirt will register there and from its own directories. A path in an inventory is only what the source calls a file.

mod inventory;
pub mod journal;
pub mod storage;

pub use inventory::{
    Definition, Directory, File, Inventory, Kind, Malformed, Medium, Metadata, MetadataKind, Part, MAX_FILES,
    MAX_MEDIA, MAX_METADATA, MAX_PATH, MAX_SIZE,
};
pub use journal::Journal;

use crate::control::Settings;
use crate::cookie::ColdOffer;
use crate::session::{nibble, Guest};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The unit in which files are asked for, hashed and compared, bytes.
pub const BLOCK: u64 = 1 << 20;

/// What `virt-ferry recover` gives libvirt to define: no guest, but the word at which the plug-in looks at its journals.
pub const RECOVER: &str = "<virt-ferry-recover/>";

/// What a definition has in its metadata that libvirt got only for it to be undefined: a crash in between leaves it.
pub const REMAINS: &str = "<virt-ferry:remains xmlns:virt-ferry='https://virt-ferry.org/xmlns/domain/1'/>";

/// Whether a definition has [`REMAINS`] in it, as it is or as libvirt writes it: it is no guest, and is not started.
pub fn is_remains(definition: &str) -> bool {
    // In the text of XML, "<" begins nothing but an element.
    definition.contains("<virt-ferry:remains ")
}

/// A file the source's plug-in found, before the engine has looked at it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Where it is, as the definition or the image above it names it. A directory (swtpm's) stands for all files in it.
    pub path: PathBuf,
    /// What it is to the guest.
    pub part: Part,
}

/// What the operator asked of one cold migration, beyond the configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Most bytes a second, all connections together (`--bandwidth`); 0 is no limit.
    pub bandwidth: u64,
    /// zstd's level, 1 to 19 (`--compressed`); without it nothing is compressed.
    pub compression: Option<i32>,
    /// The source's definition is removed at the end (`--undefinesource`).
    pub undefine: bool,
    /// The source's files stay even so (`cold.source_storage = "keep"`).
    pub keep: bool,
}

/// All that the source's engine needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serve {
    /// The guest, by its name on this host.
    pub guest: Guest,
    /// This host's name, for messages and the timeline.
    pub host: String,
    /// The name or address under which the destination reaches this host; part of the offer.
    pub address: String,
    /// The address to listen on; all of them where there is none.
    pub listen: Option<String>,
    /// The guest's files.
    pub items: Vec<Item>,
    /// What the guest needs that does not move.
    pub media: Vec<Medium>,
    /// Snapshots and checkpoints.
    pub metadata: Vec<Metadata>,
    /// libvirt starts the guest with the host.
    pub autostart: bool,
    /// libvirt's definition file, which must be the same one at the commitment; `None` where it is not a file.
    pub definition: Option<Definition>,
    /// What libvirt has of it, for the journal: should the destination be lost with the guest, it is defined by that again.
    pub xml: String,
    /// What the operator asked.
    pub options: Options,
    /// The configuration in force.
    pub settings: Settings,
}

/// What the destination makes of an inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Where each file goes, in the inventory's order: for a block device, an existing device.
    pub places: Vec<PathBuf>,
    /// Where the guest's media are looked for: all that are missing are problems.
    pub media: Vec<Medium>,
    /// Backing images that are here already, with the same content, are used as they are (`--copy-storage-inc`).
    pub incremental: bool,
    /// The definition that libvirt is to register, for a recovery.
    pub definition: String,
}

/// All that the destination's engine needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pull {
    /// The guest, by its name on this host.
    pub guest: Guest,
    /// This host's name.
    pub host: String,
    /// What the source offered.
    pub offer: ColdOffer,
    /// Where it goes.
    pub plan: Plan,
    /// Connections for data, 1 to 16 (`--parallel-connections`); without it, as many as fit this host.
    pub streams: Option<u16>,
    /// The configuration in force.
    pub settings: Settings,
}

/// What became of the source's files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// Gone.
    pub deleted: Vec<PathBuf>,
    /// Still there, and why.
    pub kept: Vec<Kept>,
}

/// Why a file was not deleted where that was not asked for: no `--undefinesource`, or the configuration keeps files.
pub const TO_STAY: &str = "it was to stay";

/// A file that is not deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// It.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// What the operator wants of a recovery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// That both hosts find out whose the guest is.
    #[default]
    Settle,
    /// That the guest stays at the source, also where the destination could take it.
    GiveUp,
    /// That it is this host's, wherever this host has all of it: the other one is lost for good, and is not asked.
    Own,
}

/// What a recovery found out, and what is left for libvirt to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Recovered {
    /// Source: the guest stays here and may be started; the journal is gone.
    Stays,
    /// Source: the guest is the destination's. Undefine it here where the journal says so, then [`ColdDelete`].
    ///
    /// [`ColdDelete`]: crate::control::Request::ColdDelete
    Leaves,
    /// Destination: all files are in place. Define the guest with what the journal holds, then [`ColdOwned`].
    ///
    /// [`ColdOwned`]: crate::control::Request::ColdOwned
    Define,
    /// Destination: the guest is not here and never will be by this session; what was pulled is gone, and so is the
    /// journal, unless the source is still to be told.
    Undone,
    /// Destination: the guest is here, and the source knows; the journal is gone.
    Arrived,
    /// The other host's engine has to be asked and does not answer: nobody starts the guest until it has.
    Unknown {
        /// What was tried.
        cause: String,
    },
}

/// A BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; Digest::LENGTH]);

impl Digest {
    /// Bytes of a digest.
    pub const LENGTH: usize = 32;
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A digest that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest is not {} hexadecimal digits", 2 * Digest::LENGTH)]
pub struct MalformedDigest;

impl FromStr for Digest {
    type Err = MalformedDigest;

    fn from_str(text: &str) -> Result<Self, MalformedDigest> {
        let digits = text.as_bytes();
        if digits.len() != 2 * Self::LENGTH {
            return Err(MalformedDigest);
        }
        let mut bytes = [0; Self::LENGTH];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit| nibble(digit).map_err(|_| MalformedDigest);
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = MalformedDigest;

    fn try_from(text: String) -> Result<Self, MalformedDigest> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text() {
        let digest = Digest(std::array::from_fn(|index| (index * 11) as u8));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for text in ["", "0", &"0".repeat(63), &"x".repeat(64)] {
            assert_eq!(text.parse::<Digest>(), Err(MalformedDigest), "{text}");
        }
    }
}
