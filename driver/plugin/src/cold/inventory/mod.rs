//! What a guest owns, found from its definition, its images' headers and libvirt's own directories.
//!
//! Nothing is guessed: a file that a header or the definition names and that is not a file of this host ends the
//! migration, before anything was touched. How large the files are and whether somebody writes to them is the engine's
//! to find out.

mod homes;
mod migrations;
mod names;
mod references;
mod snapshots;

pub use homes::{is_shared, Homes};
pub use migrations::OTHER_HOSTS;
pub use names::{all_certain, certain, is_absent, plain};
pub use references::{named, of, others, written};
pub use snapshots::{external, metadata};

use super::definition::{Definition, Disk, Source};
use super::image::{self, Layer};
use super::pools;
use crate::libvirt::{Connection, Domain};
use ferry_contract::cold::{self, Item, Medium, Metadata, MetadataKind, Part};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where libvirt keeps the state of emulated TPMs, unless a definition says otherwise.
pub const TPM: &str = "/var/lib/libvirt/swtpm";

/// Where QEMU's and swtpm's logs are.
pub const LOGS: [&str; 2] = ["/var/log/libvirt/qemu", "/var/log/swtpm/libvirt/qemu"];

/// Where libvirt keeps the definitions of QEMU's guests.
pub const DEFINITIONS: &str = "/etc/libvirt/qemu";

/// What a guest owns and needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What moves.
    pub items: Vec<Item>,
    /// What must be at the destination.
    pub media: Vec<Medium>,
    /// Snapshots and checkpoints.
    pub metadata: Vec<Metadata>,
}

/// Looks at a guest that is shut off. Where `disks` names some, the others must be at the destination already
/// (`--migrate-disks`).
///
/// # Errors
/// Why it cannot be moved, in a sentence.
pub fn take(domain: Domain, guest: &Definition, disks: &[&str]) -> Result<Found, String> {
    if let [first, ..] = guest.unmovable.as_slice() {
        return Err(first.clone());
    }
    if let Some(unknown) = disks.iter().find(|target| guest.disk(target).is_none()) {
        return Err(format!("it has no disk {unknown}"));
    }
    let mut found = Found::default();
    let homes = Homes::of(domain.connection(), guest);
    for disk in &guest.disks {
        let moves = !disk.media && (disks.is_empty() || disks.contains(&disk.target.as_str()));
        found.disk(domain.connection(), disk, moves, &homes)?;
    }
    for path in &guest.needed {
        found.media.push(Medium {
            target: needed(path),
            path: path.clone(),
        });
    }
    for path in guest.nvram.iter().filter(|path| path.exists()) {
        found.item(certain(path)?, Part::Nvram);
    }
    if let Some(tpm) = &guest.tpm {
        let own = Path::new(TPM).join(guest.uuid.to_string());
        let path = tpm.source.clone().unwrap_or(own);
        if path.exists() {
            found.item(certain(&path)?, Part::Tpm);
        }
    }
    for path in logs(&guest.name) {
        found.item(path, Part::Log);
    }
    found.metadata(domain, homes)?;
    Ok(found)
}

/// What a needed file is called in messages.
pub fn needed(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| "file".into(), |name| name.to_string_lossy().into_owned())
}

impl Found {
    /// Adds a file, once.
    fn item(&mut self, path: PathBuf, part: Part) {
        let path = plain(&path);
        if !self.items.iter().any(|item| item.path == path) {
            self.items.push(Item { path, part });
        }
    }

    fn disk(
        &mut self,
        connection: Connection,
        disk: &Disk,
        moves: bool,
        homes: &Homes,
    ) -> Result<(), String> {
        let Some(path) =
            pools::path_of(connection, &disk.source).map_err(|why| format!("disk {}: {why}", disk.target))?
        else {
            return Ok(());
        };
        if !moves {
            self.media.push(Medium {
                target: disk.target.clone(),
                path,
            });
            return Ok(());
        }
        let layers =
            image::layers(&path, &disk.format).map_err(|why| format!("disk {}: {why}", disk.target))?;
        agree(disk, &layers)?;
        all_certain(&layers)
            .and_then(|()| homes.have(&layers))
            .map_err(|why| format!("disk {}: {why}", disk.target))?;
        self.layers(&disk.target, &layers);
        Ok(())
    }

    fn layers(&mut self, target: &str, layers: &[Layer]) {
        let mut relative = false;
        for (number, layer) in layers.iter().enumerate() {
            let number = number as u16;
            let part = Part::Disk {
                target: target.to_owned(),
                layer: number,
                format: layer.format.clone(),
                relative,
            };
            self.item(layer.path.clone(), part);
            if let Some(data) = &layer.data_file {
                let part = Part::Data {
                    target: target.to_owned(),
                    layer: number,
                    relative: data.is_relative(),
                };
                self.item(Layer::beside(&layer.path, data), part);
            }
            relative = layer.backing.as_deref().is_some_and(Path::is_relative);
        }
    }

    fn metadata(&mut self, domain: Domain, mut homes: Homes) -> Result<(), String> {
        self.metadata = metadata(domain)?;
        let snapshots = self
            .metadata
            .iter()
            .filter(|one| one.kind == MetadataKind::Snapshot);
        let files: Vec<_> = snapshots.map(|one| external(&one.xml)).collect();
        for files in files {
            for (path, format) in files? {
                if !path.exists() {
                    return Err(format!(
                        "{}, a file of one of its snapshots, does not exist: virsh snapshot-delete --metadata",
                        path.display()
                    ));
                }
                let layers = image::layers(&path, &format)?;
                all_certain(&layers)?;
                homes.add(&path);
                homes.have(&layers)?;
                for layer in layers {
                    let data = layer
                        .data_file
                        .as_ref()
                        .map(|data| Layer::beside(&layer.path, data));
                    self.item(layer.path, Part::Other);
                    data.into_iter().for_each(|data| self.item(data, Part::Other));
                }
            }
        }
        Ok(())
    }
}

/// What the definition says of a disk's layers must be what the headers say: QEMU goes by the former, we by the latter.
pub fn agree(disk: &Disk, layers: &[Layer]) -> Result<(), String> {
    let named: Vec<_> = disk.layers.iter().map(Source::path).collect();
    let found = layers.iter().skip(1).map(|layer| layer.path.as_path());
    let real = |path: &Path| path.canonicalize().ok();
    let same = |(named, found): (&Option<&Path>, &Path)| {
        named.is_some_and(|named| plain(named) == plain(found) && real(named) == real(found))
    };
    if named.is_empty() && !disk.ends || named.len() == layers.len() - 1 && named.iter().zip(found).all(same)
    {
        return Ok(());
    }
    Err(format!(
        "disk {}: the layers in the guest's definition are not those in the images' headers; remove <backingStore> from \
         the definition, or correct the headers with qemu-img rebase -u",
        disk.target
    ))
}

/// The guest's logs, rotated ones among them, as libvirt 11.3 names them.
fn logs(guest: &str) -> Vec<PathBuf> {
    let [qemu, swtpm] = LOGS.map(Path::new);
    let log = format!("{guest}.log");
    let mut found: Vec<_> = std::iter::once(qemu.join(&log))
        .chain((0..10).map(|number| qemu.join(format!("{log}.{number}"))))
        .chain([swtpm.join(format!("{guest}-swtpm.log"))])
        .collect();
    found.retain(|path| path.symlink_metadata().is_ok_and(|found| found.is_file()));
    found
}

/// The file libvirt keeps the guest's definition in, to notice that it was changed.
pub fn definition_file(guest: &str) -> Option<cold::Definition> {
    let path = Path::new(DEFINITIONS).join(format!("{guest}.xml"));
    let found = std::fs::metadata(&path).ok()?;
    Some(cold::Definition {
        path,
        inode: found.ino(),
        size: found.size(),
        modified: found
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(found.mtime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn layer(path: &str, backing: Option<&str>, data: Option<&str>) -> Layer {
        Layer {
            path: path.into(),
            format: "qcow2".into(),
            backing: backing.map(PathBuf::from),
            data_file: data.map(PathBuf::from),
            encrypted: false,
        }
    }

    #[test]
    fn a_chain_becomes_items_once_each() {
        let mut found = Found::default();
        found.layers(
            "vda",
            &[
                layer("/a/./top", Some("base"), Some("../d/top.data")),
                layer("/a/base", None, None),
            ],
        );
        found.layers(
            "vdb",
            &[
                layer("/b/top", Some("/a/base"), None),
                layer("/a/base", None, None),
            ],
        );
        let paths: Vec<_> = found
            .items
            .iter()
            .map(|item| item.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a/top", "/d/top.data", "/a/base", "/b/top"]);
        let relative = |part: &Part| {
            matches!(
                part,
                Part::Disk { relative: true, .. } | Part::Data { relative: true, .. }
            )
        };
        let relative: Vec<_> = found.items.iter().map(|item| relative(&item.part)).collect();
        assert_eq!(relative, [false, true, true, false]);
    }

    #[test]
    fn definition_and_headers_must_agree() {
        let disk = |layers: &[&str]| Disk {
            target: "vda".into(),
            source: Source::File("/a/top".into()),
            format: "qcow2".into(),
            media: false,
            layers: layers.iter().map(|path| Source::File(path.into())).collect(),
            ends: false,
            data: Vec::new(),
        };
        let chain = [layer("/a/top", Some("base"), None), layer("/a/base", None, None)];
        assert_eq!(agree(&disk(&[]), &chain), Ok(()));
        assert_eq!(agree(&disk(&["/a/base"]), &chain), Ok(()));
        let ends = |layers| Disk {
            ends: true,
            ..disk(layers)
        };
        assert!(agree(&ends(&[]), &chain).is_err());
        assert_eq!(agree(&ends(&[]), &chain[1..]), Ok(()));
        assert_eq!(agree(&ends(&["/a/base"]), &chain), Ok(()));
        assert!(agree(&disk(&["/a/other"]), &chain).is_err());
        assert!(agree(&disk(&["/a/base", "/a/more"]), &chain).is_err());
    }
}
