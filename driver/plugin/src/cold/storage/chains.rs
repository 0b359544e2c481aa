//! The images of a guest's disks, and what this host knows of each file.

use super::plan::{Chain, Here};
use crate::cold::definition::{Definition, Disk};
use crate::cold::inventory::Homes;
use crate::cold::{image, inventory, pools};
use crate::libvirt::Connection;
use ferry_contract::cold::Kept;
use ferry_contract::session::Guest;
use std::collections::HashMap;
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
        if moves {
            inventory::agree(disk, &layers)?;
            inventory::all_certain(&layers)?;
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

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// What this host knows of files.
pub struct Host {
    /// What other guests refer to, and which.
    used: HashMap<PathBuf, String>,
}

impl Host {
    /// Looks at all other guests. Where one cannot be looked at, nothing may move.
    pub fn look(connection: Connection, guest: &Guest, problems: &mut Vec<String>) -> Self {
        let used = inventory::others(connection, guest.uuid).unwrap_or_else(|why| {
            problems.push(format!("what other guests need is not known: {why}"));
            Vec::new()
        });
        Self {
            used: used
                .into_iter()
                .map(|kept| (real(&kept.path), kept.reason))
                .collect(),
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
        self.used.get(&real(path)).cloned()
    }

    fn is_shared(&self, path: &Path) -> bool {
        inventory::is_shared(path)
    }
}
