//! A guest that is shut off stays on its host, and its disks go to another data store there (`virt-ferry move-storage`).
//!
//! ```text
//!   virt-ferry                 plug-in                                     engine
//!   Order ─────────────────▶   plan: what moves, where to, which headers
//!                              Relocate ─────────────────────────────────▶ fence, copy, verify, name   (pulling → placed)
//!                              libvirt defines the guest with new paths
//!                              ColdOwned, ColdDelete ────────────────────▶ delete the old files        (owned → gone)
//!   Report ◀────────────────
//! ```
//!
//! libvirt's definition decides: as long as it names the old files, they are the guest's and a crash's leftovers are the
//! new ones; once it names the new ones, the old are.

use super::{Definition, Item, Kept, Metadata};
use crate::control::Settings;
use crate::session::Guest;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The "native format" into which `virt-ferry move-storage` has libvirt convert an [`Order`]: the plug-in does what it
/// says and answers with a [`Report`]; a libvirt without the plug-in knows no such format.
pub const FORMAT: &str = "virt-ferry-move-storage";

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The guest's name.
    pub guest: String,
    /// The disks, as the guest calls them (`vda`); without any, all that are files.
    pub disks: Vec<String>,
    /// An absolute directory, or the name of a storage pool.
    pub to: String,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What has been done, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Files that move.
    pub moved: Vec<Moved>,
    /// Files of the guest's that stay where they are, and why.
    pub stays: Vec<Kept>,
    /// Files that moved and are still at their former place, and why.
    pub kept: Vec<Kept>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The disk (`vda`).
    pub disk: String,
    /// Where it was.
    pub from: PathBuf,
    /// Where it is.
    pub to: PathBuf,
    /// What it takes up, bytes.
    pub bytes: u64,
}

/// All that the engine needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relocate {
    /// The guest.
    pub guest: Guest,
    /// This host's name.
    pub host: String,
    /// The files that move.
    pub items: Vec<Item>,
    /// Where each goes, in that order.
    pub places: Vec<PathBuf>,
    /// Images whose header must name its backing file anew.
    pub renames: Vec<Rename>,
    /// Snapshots and checkpoints with the new paths, for a recovery.
    pub metadata: Vec<Metadata>,
    /// libvirt's definition file, which must be the same one when all is copied; `None` where it is not a file.
    pub definition: Option<Definition>,
    /// The old files stay (`cold.source_storage = "keep"`).
    pub keep: bool,
    /// Only look whether anything is in the way.
    pub dry_run: bool,
    /// The configuration in force.
    pub settings: Settings,
}

/// An image whose backing file is not where its header says any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rename {
    /// The image, where it will be.
    pub image: PathBuf,
    /// Its format.
    pub format: String,
    /// Its backing file, as the header is to name it.
    pub backing: String,
    /// That one's format.
    pub backing_format: String,
}
