//! Reservation: whether all of a guest's files will have a place here. Everything in the way is told at once, before a
//! byte moves.

use super::files::length;
use super::locks::is_locked;
use super::messages::Looked;
use super::{nonce, place};
use crate::report::bytes_text as bytes;
use ferry_contract::cold::journal::Fate;
use ferry_contract::cold::{File as Owned, Inventory, Kind, Part, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What is known of the source's files.
pub struct There<'a> {
    /// The session.
    pub session: Uuid,
    /// What the guest owns.
    pub inventory: &'a Inventory,
    /// Each file.
    pub looked: &'a [Looked],
    /// What the source's file beside them says.
    pub nonce: &'a str,
    /// How the operator has a file go elsewhere.
    pub elsewhere: &'a str,
}

/// What becomes of each file here, and everything that is in the way of it.
pub fn survey(there: &There<'_>, plan: &Plan, left: &BTreeSet<PathBuf>) -> (Vec<Fate>, Vec<String>) {
    let mut problems = Vec::new();
    let made = made(there.inventory, plan);
    let mut fates = Vec::new();
    let mut taken = BTreeSet::new();
    let mut room: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for ((file, looked), path) in there.inventory.files.iter().zip(there.looked).zip(&plan.places) {
        if is_shared(path, looked, there) {
            fates.push(Fate::Shared);
            continue;
        }
        if !taken.insert(path) {
            problems.push(format!(
                "{} is the place of two of the guest's files",
                path.display()
            ));
        }
        let fate = match (fs::metadata(path), is_backing(file) && plan.incremental) {
            (Ok(found), true) if found.is_file() => Fate::Present,
            _ => Fate::Moves,
        };
        if fate == Fate::Moves {
            problems.extend(trouble(file, path, &made, there.elsewhere));
            if let Some((on, directory)) = file_system(path) {
                let wanted = file.allocated.min(file.size);
                room.entry(on).or_insert_with(|| (directory, 0)).1 += wanted;
            }
        }
        fates.push(fate);
    }
    if plan.incremental {
        problems.extend(bases(there.inventory, &fates, &plan.places));
    }
    // What an interrupted attempt of the same guest left is taken up, and takes its room already.
    let kept: u64 = left
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|kept| kept.blocks() * 512)
        .sum();
    for (directory, wanted) in room.into_values() {
        let free = free(&directory).unwrap_or(u64::MAX).saturating_add(kept);
        if wanted > free {
            problems.push(format!(
                "{} has {} free, the guest's files there need {}",
                directory.display(),
                bytes(free as f64),
                bytes(wanted as f64)
            ));
        }
    }
    for medium in &plan.media {
        if !medium.path.exists() {
            problems.push(format!(
                "{} (disk {}) is not on this host: copy it here, or eject it",
                medium.path.display(),
                medium.target
            ));
        }
    }
    (fates, problems)
}

/// An image behind another one.
fn is_backing(file: &Owned) -> bool {
    matches!(
        file.part,
        Part::Disk { layer: 1.., .. } | Part::Data { layer: 1.., .. }
    )
}

/// The directories that will be made.
fn made(inventory: &Inventory, plan: &Plan) -> BTreeSet<PathBuf> {
    let all = place::directories(inventory, &plan.places);
    all.into_iter().map(|(path, _)| path).collect()
}

/// Both hosts see one directory, and in it one name.
fn is_shared(path: &Path, looked: &Looked, there: &There<'_>) -> bool {
    let real = fs::canonicalize(path).ok();
    let Some((parent, name)) = real
        .as_ref()
        .and_then(|real| Some((real.parent()?, real.file_name()?)))
    else {
        return false;
    };
    looked.has_nonce
        && name.to_string_lossy() == looked.name
        && nonce::is_seen(parent, there.session, there.nonce)
}

/// What is in the way of one file.
fn trouble(file: &Owned, path: &Path, made: &BTreeSet<PathBuf>, elsewhere: &str) -> Option<String> {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => device_trouble(file, path, &found),
        Ok(_) => Some(format!(
            "{shown} exists on this host: nothing is overwritten; remove it, or {elsewhere}"
        )),
        Err(_) if path.symlink_metadata().is_ok() => {
            Some(format!("{shown} is a symbolic link to nowhere: remove it"))
        }
        Err(_) if path.starts_with("/dev") => Some(format!(
            "{shown} is not on this host: make a volume of at least {} bytes",
            file.size
        )),
        Err(_) => directory_trouble(path, made, elsewhere),
    }
}

fn device_trouble(file: &Owned, path: &Path, found: &Metadata) -> Option<String> {
    let shown = path.display();
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    let device = match open(libc::O_EXCL | libc::O_NONBLOCK) {
        Ok(device) => device,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Some(format!(
                "{shown} is in use on this host (mounted, or part of another device)"
            ))
        }
        Err(error) => return Some(format!("cannot open {shown}: {error}")),
    };
    if is_locked(&device, 100..300) {
        return Some(format!("{shown} is in use by a guest on this host"));
    }
    match length(&device, found, Kind::Block) {
        Ok(size) if size >= file.size => None,
        Ok(size) => Some(format!("{shown} has {size} bytes, the source's {}", file.size)),
        Err(error) => Some(format!("cannot find the length of {shown}: {error}")),
    }
}

fn directory_trouble(path: &Path, made: &BTreeSet<PathBuf>, elsewhere: &str) -> Option<String> {
    let parent = path.parent()?;
    let shown = parent.display();
    match fs::metadata(parent) {
        Ok(found) if found.is_dir() => match nix::unistd::access(parent, nix::unistd::AccessFlags::W_OK) {
            Ok(()) => None,
            Err(error) => Some(format!("cannot write to {shown}: {}", error.desc())),
        },
        Ok(_) => Some(format!("{shown} is not a directory")),
        Err(_) if made.contains(parent) => None,
        Err(_) => Some(format!(
            "there is no directory {shown} on this host: make it, or {elsewhere}"
        )),
    }
}

/// With `--copy-storage-inc` the deepest image of a chain has to be here.
fn bases<'a>(inventory: &'a Inventory, fates: &[Fate], places: &'a [PathBuf]) -> Vec<String> {
    let mut deepest: BTreeMap<&str, (u16, Fate, &Path)> = BTreeMap::new();
    for ((file, fate), path) in inventory.files.iter().zip(fates).zip(places) {
        if let Part::Disk { target, layer, .. } = &file.part {
            let entry = deepest.entry(target).or_insert((*layer, *fate, path));
            if *layer > entry.0 {
                *entry = (*layer, *fate, path);
            }
        }
    }
    let missing = deepest
        .into_iter()
        .filter(|(_, (layer, fate, _))| *layer > 0 && *fate == Fate::Moves);
    missing
        .map(|(target, (_, _, path))| {
            format!(
                "the base {} of disk {target} is not on this host: copy it here, or move the whole chain with \
                 --copy-storage-all",
                path.display()
            )
        })
        .collect()
}

/// The file system that a path is on, or would be, and the directory that shows it.
fn file_system(path: &Path) -> Option<(u64, PathBuf)> {
    if fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
        return None;
    }
    let there = path.ancestors().skip(1).find(|ancestor| ancestor.is_dir())?;
    Some((fs::metadata(there).ok()?.dev(), there.to_owned()))
}

fn free(directory: &Path) -> Option<u64> {
    let found = nix::sys::statvfs::statvfs(directory).ok()?;
    Some(found.blocks_available().saturating_mul(found.fragment_size()))
}
