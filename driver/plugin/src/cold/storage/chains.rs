//! The images of a guest's disks, and what this host knows of each file.

use super::plan::{Chain, Here};
use crate::cold::definition::{Definition, Disk};
use crate::cold::inventory::Homes;
use crate::cold::{image, inventory, pools};
use crate::libvirt::Connection;
use ferry_contract::cold::Kept;
use ferry_contract::session::Guest;
use ferry_host::{real, Others};
use std::path::{Path, PathBuf};

/// The disks of a guest.
#[derive(Debug, Default)]
pub struct Disks {
    /// Those that have files, also those that stay: what they need must stay, too.
    pub chains: Vec<Chain>,
    /// Those that nobody asked for and that are no files.
    pub stays: Vec<Kept>,
}

/// Finds the images of all disks; those that move are `wanted`, or all where nobody says which.
pub fn find(
    connection: Connection,
    guest: &Definition,
    wanted: &[String],
    problems: &mut Vec<String>,
) -> Disks {
    let unknown = wanted.iter().filter(|target| guest.disk(target).is_none());
    problems.extend(unknown.map(|target| format!("it has no disk {target} that could move")));
    let mut disks = Disks::default();
    let homes = Homes::of(connection, guest);
    for disk in &guest.disks {
        let named = wanted.contains(&disk.target);
        if let Err(why) = disks.add(connection, disk, named, wanted.is_empty(), &homes) {
            problems.push(format!("disk {}: {why}", disk.target));
        }
    }
    disks
}

impl Disks {
    fn add(
        &mut self,
        connection: Connection,
        disk: &Disk,
        named: bool,
        all: bool,
        homes: &Homes,
    ) -> Result<(), String> {
        if disk.media && named {
            return Err("it is read-only, shareable or in a drive for removable media: others may use it, so it stays".into());
        }
        let path = match pools::path_of(connection, &disk.source) {
            Ok(Some(path)) => path,
            Ok(None) if named => return Err("it has no file on this host".into()),
            Ok(None) => return Ok(()),
            Err(why) => return Err(why),
        };
        let device = path.exists() && !is_file(&path);
        let moves = named || all && !disk.media && !device;
        if all && !moves {
            self.stays.push(Kept {
                path: path.clone(),
                reason: match disk.media {
                    true => "it is read-only, shareable or in a drive for removable media".into(),
                    false => "it is no file, and only files are moved".into(),
                },
            });
        }
        let layers = match image::layers(&path, &disk.format) {
            Ok(layers) => layers,
            // One that is not there needs nothing.
            Err(_) if !moves && inventory::is_absent(&path) => return Ok(()),
            Err(why) => return Err(why),
        };
        // What stays must be told from what moves.
        inventory::all_certain(&layers)?;
        if moves {
            inventory::agree(disk, &layers)?;
            homes.have(&layers)?;
        }
        self.chains.push(Chain {
            target: disk.target.clone(),
            layers,
            moves,
        });
        Ok(())
    }
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file())
}

/// What this host knows of files.
pub struct Host {
    /// What other guests refer to, and which.
    used: Others,
}

impl Host {
    /// Looks at all other guests. Where one cannot be looked at, nothing may move.
    pub fn look(connection: Connection, guest: &Guest, problems: &mut Vec<String>) -> Self {
        let used = inventory::others(connection, guest.uuid).unwrap_or_else(|why| {
            problems.push(format!("what other guests need is not known: {why}"));
            Vec::new()
        });
        Self {
            used: Others::new(&used),
        }
    }
}

impl Here for Host {
    fn is_file(&self, path: &Path) -> bool {
        // What is not there is the engine's to name.
        is_file(path) || !path.exists()
    }

    fn is_in(&self, path: &Path, directory: &Path) -> bool {
        let parent = path.parent().unwrap_or(path);
        real(parent) == real(directory)
    }

    fn user(&self, path: &Path) -> Option<String> {
        self.used.need(path).map(str::to_owned)
    }

    fn is_shared(&self, path: &Path) -> bool {
        inventory::is_shared(path)
    }

    fn real(&self, path: &Path) -> PathBuf {
        real(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cold::storage::rewrite::{rewritten, Destination};
    use std::fs;

    #[test]
    fn a_definition_names_what_the_kernel_finds() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().canonicalize().unwrap();
        let at = |name: &str| directory.join(name);
        fs::create_dir_all(at("far/images")).unwrap();
        std::os::unix::fs::symlink(at("far/images"), at("images")).unwrap();
        for name in ["raw", "far/raw"] {
            fs::write(at(name), name).unwrap();
        }
        assert_eq!(real(&at("images/../raw")), at("far/raw"));
        assert_eq!(real(&at("images/../new")), at("far/new"));
        assert_eq!(real(Path::new("/no/such/../file")), Path::new("/no/such/../file"));
        // The second disk's name only looks like the first one's file, the third one's only like another.
        let xml = |names: [String; 3]| {
            let disk = |name| format!("<disk type='file'><source file='{name}'/></disk>");
            let disks: String = names.into_iter().map(disk).collect();
            format!("<domain><devices>{disks}</devices></domain>")
        };
        let named = |name: &str| at(name).to_str().unwrap().to_owned();
        let moves = real(&at("raw"));
        let to = Destination {
            place: &|path| (real(path) == moves).then(|| "/new/raw".into()),
            volume: &|_, _| None,
            pool: None,
        };
        let before = ["raw", "images/../raw", "images/../../raw"].map(named);
        let after = [Path::new("/new/raw"), &at("images/../raw"), Path::new("/new/raw")];
        let after = after.map(|path| path.to_str().unwrap().to_owned());
        assert_eq!(rewritten(&xml(before), &to).unwrap(), xml(after));
    }
}
