//! What a guest owns, found from its definition, its images' headers and libvirt's own directories.
//!
//! Nothing is guessed: a file that a header or the definition names and that is not a file of this host ends the
//! migration, before anything was touched. How large the files are and whether somebody writes to them is the engine's
//! to find out.

use super::definition::{Definition, Disk, Source};
use super::image::{self, Layer};
use super::pools;
use crate::libvirt::{self, Connection, Domain};
use ferry_contract::cold::{self, Item, Medium, Metadata, MetadataKind, Part};
use roxmltree::Document;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Where libvirt keeps the state of emulated TPMs, unless a definition says otherwise.
pub const TPM: &str = "/var/lib/libvirt/swtpm";
/// Where QEMU's and swtpm's logs are.
pub const LOGS: [&str; 2] = ["/var/log/libvirt/qemu", "/var/log/swtpm/libvirt/qemu"];
/// Definitions of QEMU's guests.
const DEFINITIONS: &str = "/etc/libvirt/qemu";
/// For looking at the images of all other guests.
const OTHERS: Duration = Duration::from_secs(120);

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
    for disk in &guest.disks {
        let moves = !disk.media && (disks.is_empty() || disks.contains(&disk.target.as_str()));
        found.disk(domain.connection(), disk, moves)?;
    }
    for path in &guest.needed {
        found.media.push(Medium {
            target: needed(path),
            path: path.clone(),
        });
    }
    for path in guest.nvram.iter().filter(|path| path.exists()) {
        found.item(path.clone(), Part::Nvram);
    }
    if let Some(tpm) = &guest.tpm {
        let own = Path::new(TPM).join(guest.uuid.to_string());
        let path = tpm.source.clone().unwrap_or(own);
        if path.exists() {
            found.item(path, Part::Tpm);
        }
    }
    for path in logs(&guest.name) {
        found.item(path, Part::Log);
    }
    found.metadata(domain)?;
    Ok(found)
}

/// What a needed file is called in messages.
pub fn needed(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| "file".into(), |name| name.to_string_lossy().into_owned())
}

/// A path without `.`, `..` and doubled slashes, as headers may have them.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

impl Found {
    /// Adds a file, once.
    fn item(&mut self, path: PathBuf, part: Part) {
        let path = plain(&path);
        if !self.items.iter().any(|item| item.path == path) {
            self.items.push(Item { path, part });
        }
    }

    fn disk(&mut self, connection: Connection, disk: &Disk, moves: bool) -> Result<(), String> {
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

    fn metadata(&mut self, domain: Domain) -> Result<(), String> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: libvirt::Error| format!("libvirt does not describe its {what}: {error}")
        };
        let snapshots = domain.snapshots().map_err(failed("snapshots"))?;
        let checkpoints = domain.checkpoints().map_err(failed("checkpoints"))?;
        for snapshot in &snapshots {
            for (path, format) in external(&snapshot.xml)? {
                if !path.exists() {
                    return Err(format!(
                        "{}, a file of one of its snapshots, does not exist: virsh snapshot-delete --metadata",
                        path.display()
                    ));
                }
                for layer in image::layers(&path, &format)? {
                    let data = layer
                        .data_file
                        .as_ref()
                        .map(|data| Layer::beside(&layer.path, data));
                    self.item(layer.path, Part::Other);
                    data.into_iter().for_each(|data| self.item(data, Part::Other));
                }
            }
        }
        for (kind, list) in [
            (MetadataKind::Snapshot, snapshots),
            (MetadataKind::Checkpoint, checkpoints),
        ] {
            for one in list {
                self.metadata.push(Metadata {
                    kind,
                    name: name(&one.xml)?,
                    current: one.current,
                    xml: one.xml,
                });
            }
        }
        Ok(())
    }
}

/// What the definition says of a disk's layers must be what the headers say: QEMU goes by the former, we by the latter.
fn agree(disk: &Disk, layers: &[Layer]) -> Result<(), String> {
    let named: Vec<_> = disk.layers.iter().map(Source::path).collect();
    let found = layers.iter().skip(1).map(|layer| layer.path.as_path());
    let same =
        |(named, found): (&Option<&Path>, &Path)| named.is_some_and(|named| plain(named) == plain(found));
    if named.is_empty() || named.len() == layers.len() - 1 && named.iter().zip(found).all(same) {
        return Ok(());
    }
    Err(format!(
        "disk {}: the layers in the guest's definition are not those in the images' headers; remove <backingStore> from \
         the definition, or correct the headers with qemu-img rebase -u",
        disk.target
    ))
}

fn name(xml: &str) -> Result<String, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's snapshot XML: {error}"))?;
    let root = document.root_element();
    let name = root.children().find(|child| child.has_tag_name("name"));
    name.and_then(|name| name.text())
        .map(str::to_owned)
        .ok_or_else(|| "libvirt describes a snapshot without a name".into())
}

/// Files of an external snapshot: memory, and the images that it made.
fn external(xml: &str) -> Result<Vec<(PathBuf, String)>, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's snapshot XML: {error}"))?;
    let root = document.root_element();
    let mut files = Vec::new();
    for element in root
        .children()
        .filter(|child| child.attribute("snapshot") == Some("external"))
    {
        files.extend(element.attribute("file").map(|file| (file.into(), "raw".into())));
    }
    let disks = root.children().filter(|child| child.has_tag_name("disks"));
    let disks = disks.flat_map(|disks| disks.children());
    for disk in disks.filter(|disk| disk.attribute("snapshot") == Some("external")) {
        let of = |name| {
            disk.children()
                .find(|child: &roxmltree::Node| child.has_tag_name(name))
        };
        let format = of("driver").and_then(|driver| driver.attribute("type"));
        let source = of("source").and_then(|source| source.attribute("file").or(source.attribute("dev")));
        if let Some(path) = source {
            files.push((path.into(), format.unwrap_or("qcow2").to_owned()));
        }
    }
    Ok(files)
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

/// Every file that this host's other guests refer to, by definition, snapshot or image header.
///
/// # Errors
/// If a guest cannot be looked at: then nothing is certain.
pub fn others(connection: Connection, guest: Uuid) -> Result<Vec<PathBuf>, String> {
    let failed = |error: libvirt::Error| format!("the host's other guests cannot be looked at: {error}");
    let deadline = Instant::now() + OTHERS;
    let mut used = HashSet::new();
    for domain in connection.domains().map_err(failed)? {
        let domain = domain.get();
        if domain.guest().is_some_and(|other| other.uuid == guest) {
            continue;
        }
        let xml = match domain.definition() {
            Ok(xml) => xml,
            // Undefined since it was listed.
            Err(_) if domain.is_persistent().is_err() => continue,
            Err(error) => return Err(failed(error)),
        };
        let definition = Definition::read(&xml).map_err(|error| error.to_string())?;
        used.extend(definition.paths().map(Path::to_owned));
        for snapshot in domain.snapshots().map_err(failed)? {
            used.extend(external(&snapshot.xml)?.into_iter().map(|(path, _)| path));
        }
        for disk in &definition.disks {
            if Instant::now() > deadline {
                return Err(format!(
                    "looking at other guests' images took longer than {} s",
                    OTHERS.as_secs()
                ));
            }
            let Ok(Some(path)) = pools::path_of(connection, &disk.source) else {
                continue;
            };
            // An image that is not there or cannot be read refers to nothing that it could be started with.
            for layer in image::layers(&path, &disk.format).unwrap_or_default() {
                used.extend(
                    layer
                        .data_file
                        .iter()
                        .map(|data| plain(&Layer::beside(&layer.path, data))),
                );
                used.insert(plain(&layer.path));
            }
            used.insert(path);
        }
    }
    let mut used: Vec<_> = used.into_iter().collect();
    used.sort();
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(path: &str, backing: Option<&str>, data: Option<&str>) -> Layer {
        Layer {
            path: path.into(),
            format: "qcow2".into(),
            backing: backing.map(PathBuf::from),
            data_file: data.map(PathBuf::from),
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
        };
        let chain = [layer("/a/top", Some("base"), None), layer("/a/base", None, None)];
        assert_eq!(agree(&disk(&[]), &chain), Ok(()));
        assert_eq!(agree(&disk(&["/a/base"]), &chain), Ok(()));
        assert!(agree(&disk(&["/a/other"]), &chain).is_err());
        assert!(agree(&disk(&["/a/base", "/a/more"]), &chain).is_err());
    }

    #[test]
    fn an_external_snapshot_has_files() {
        let xml = "<domainsnapshot><name>s</name><memory snapshot='external' file='/m'/><disks>\
                   <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/a/s'/></disk>\
                   <disk name='vdb' snapshot='no'/></disks><domain><devices><disk><source file='/x'/></disk></devices></domain>\
                   </domainsnapshot>";
        assert_eq!(name(xml).as_deref(), Ok("s"));
        assert_eq!(
            external(xml).unwrap(),
            [
                ("/m".into(), "raw".to_owned()),
                ("/a/s".into(), "qcow2".to_owned())
            ]
        );
        let internal = "<domainsnapshot><name>s</name><disks><disk name='vda' snapshot='internal'/></disks></domainsnapshot>";
        assert_eq!(external(internal), Ok(Vec::new()));
    }
}
