//! What others of this host need, by whatever name it goes: one file is found by several mounts of its file system, one
//! device by several nodes.

use ferry_contract::cold::Kept;
use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Files and devices that others need, each with why.
#[derive(Debug, Clone, Default)]
pub struct Others {
    names: HashMap<PathBuf, String>,
    things: HashMap<Thing, String>,
}

/// What a name leads to, while this host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Thing {
    /// A file, by its file system's device and its inode.
    File(u64, u64),
    /// A block device, by its number.
    Device(u64),
}

impl Others {
    /// As they were found.
    pub fn new(in_use: &[Kept]) -> Self {
        let mut others = Self::default();
        for Kept { path, reason } in in_use {
            if let Some(thing) = Thing::at(path) {
                others.things.insert(thing, reason.clone());
            }
            others.names.insert(real(path), reason.clone());
        }
        others
    }

    /// Why this has to stay: who needs it. One that is not there, whoever names it.
    pub fn need(&self, path: &Path) -> Option<&str> {
        let thing = || self.things.get(&Thing::at(path)?);
        let need = self.names.get(&real(path)).or_else(thing);
        need.map(String::as_str)
    }
}

impl Thing {
    fn at(path: &Path) -> Option<Self> {
        let found = path.metadata().ok()?;
        Some(match found.file_type().is_block_device() {
            true => Self::Device(found.rdev()),
            false => Self::File(found.dev(), found.ino()),
        })
    }
}

/// Which file the kernel finds by this name; one that is yet to come, in which directory.
pub fn real(path: &Path) -> PathBuf {
    let to_come = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    let found = path.canonicalize().ok().or_else(to_come);
    found.unwrap_or_else(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::{makedev, mknod, Mode, SFlag};
    use std::fs;

    #[test]
    fn one_thing_is_known_by_each_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("images")).unwrap();
        for name in ["images/base", "images/other"] {
            fs::write(at(name), "").unwrap();
        }
        // As another mount of the file system has it: another path to one inode.
        fs::hard_link(at("images/base"), at("base")).unwrap();
        std::os::unix::fs::symlink(at("images"), at("link")).unwrap();
        let needed = |names: &[&str]| {
            let kept = |name: &&str| Kept {
                path: at(name),
                reason: format!("{name} is needed"),
            };
            Others::new(&names.iter().map(kept).collect::<Vec<_>>())
        };
        let others = needed(&["link/base", "images/to-come"]);
        for name in ["images/base", "link/base", "base"] {
            assert_eq!(others.need(&at(name)), Some("link/base is needed"), "{name}");
        }
        assert_eq!(others.need(&at("link/to-come")), Some("images/to-come is needed"));
        for name in ["images/other", "images", "images/not-there"] {
            assert_eq!(others.need(&at(name)), None, "{name}");
        }
        // Two nodes of one device, and one of another.
        let node = |name: &str, minor| {
            let made = mknod(&at(name), SFlag::S_IFBLK, Mode::S_IRUSR, makedev(7, minor));
            made.is_ok()
        };
        if !(node("one", 250) && node("again", 250) && node("two", 251)) {
            println!("SKIPPED: no device nodes can be made here");
            return;
        }
        let others = needed(&["one"]);
        assert_eq!(others.need(&at("again")), Some("one is needed"));
        assert_eq!(others.need(&at("two")), None);
    }
}
