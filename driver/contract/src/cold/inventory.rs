//! What a guest owns, as XML: `xml-schemas/inventory.rng` describes it.
//!
//! It travels in the source's offer, so it is hostile: bounded in every dimension, and each path absolute and free of
//! `.`, `..` and NUL.

use crate::session::Guest;
use crate::xml::{text_of_reference, Attributes};
use quick_xml::escape::escape;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::ResolveResult;
use quick_xml::NsReader;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::PathBuf;
use uuid::Uuid;

use crate::cookie::NAMESPACE;

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
/// Bytes of a name: a disk's target, a format, a snapshot.
const MAX_NAME: usize = 255;
/// The deepest chain that QEMU opens is 200 images (libvirt's limit, VIR_STORAGE_MAX_CHAIN_DEPTH).
const MAX_LAYER: u16 = 255;

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

/// A path or name as it can stand in XML.
fn writable(path: &std::path::Path) -> Result<&str, Malformed> {
    path.to_str()
        .filter(|path| path.chars().all(is_xml))
        .ok_or_else(|| malformed(format!("{} cannot be written as XML: rename it", path.display())))
}

/// XML 1.0 has no other characters (and would read a tab or a line's end in an attribute as a space).
fn is_xml(character: char) -> bool {
    !character.is_control() && !matches!(character, '\u{fffe}' | '\u{ffff}')
}

impl Inventory {
    /// As XML.
    ///
    /// # Errors
    /// Names that no XML can carry; more than the schema allows.
    pub fn to_xml(&self) -> Result<String, Malformed> {
        let mut xml = String::new();
        // Writing to a String cannot fail.
        let _ = write!(
            xml,
            "<ferry:inventory xmlns:ferry='{NAMESPACE}' name='{}' uuid='{}' autostart='{}'>",
            escape(&self.guest.name),
            self.guest.uuid,
            yes(self.autostart),
        );
        for file in &self.files {
            let _ = write!(xml, "<ferry:file path='{}'", escape(writable(&file.path)?));
            let _ = match &file.part {
                Part::Disk {
                    target,
                    layer,
                    format,
                    relative,
                } => write!(
                    xml,
                    " part='disk' target='{}' layer='{layer}' format='{}' relative='{}'",
                    escape(target),
                    escape(format),
                    yes(*relative)
                ),
                Part::Data {
                    target,
                    layer,
                    relative,
                } => write!(
                    xml,
                    " part='data' target='{}' layer='{layer}' relative='{}'",
                    escape(target),
                    yes(*relative)
                ),
                Part::Nvram => write!(xml, " part='nvram'"),
                Part::Tpm => write!(xml, " part='tpm'"),
                Part::Log => write!(xml, " part='log'"),
                Part::Other => write!(xml, " part='other'"),
            };
            let _ = write!(
                xml,
                " kind='{}' size='{}' allocated='{}'/>",
                file.kind.name(),
                file.size,
                file.allocated
            );
        }
        for directory in &self.directories {
            let _ = write!(
                xml,
                "<ferry:directory path='{}' mode='{:o}' owner='{}' group='{}'/>",
                escape(writable(&directory.path)?),
                directory.mode,
                escape(&directory.owner),
                escape(&directory.group)
            );
        }
        for medium in &self.media {
            let _ = write!(
                xml,
                "<ferry:medium target='{}' path='{}'/>",
                escape(&medium.target),
                escape(writable(&medium.path)?)
            );
        }
        for metadata in &self.metadata {
            let _ = write!(
                xml,
                "<ferry:{kind} name='{}' current='{}'>{}</ferry:{kind}>",
                escape(&metadata.name),
                yes(metadata.current),
                escape(&metadata.xml),
                kind = metadata.kind.name(),
            );
        }
        xml.push_str("</ferry:inventory>");
        // What the other side would refuse is better refused here.
        Self::from_xml(&xml)
            .map_err(|Malformed(what)| malformed(format!("{what} (of {})", self.guest.name)))?;
        Ok(xml)
    }

    /// Reads a document whose root is an inventory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_xml(xml: &str) -> Result<Self, Malformed> {
        let mut reader = NsReader::from_str(xml);
        loop {
            let (namespace, event) = reader
                .read_resolved_event()
                .map_err(|error| malformed(error.to_string()))?;
            let ours = is_ours(&namespace);
            match event {
                Event::Start(start) if ours && start.local_name().into_inner() == "inventory" => {
                    let start = start.into_owned();
                    return Self::read(&mut reader, &start);
                }
                Event::Start(_) | Event::Empty(_) => return Err(malformed("it is no inventory")),
                Event::Eof => return Err(malformed("it is empty")),
                _ => {}
            }
        }
    }

    /// Reads the rest of an inventory, whose start has been read, to its end.
    pub(crate) fn read(reader: &mut NsReader<&[u8]>, start: &BytesStart<'_>) -> Result<Self, Malformed> {
        let head = Attributes::read(start)?;
        let name = head.name("name")?;
        let uuid: Uuid = head.parsed("uuid")?;
        let mut inventory = Self {
            guest: Guest { name, uuid },
            autostart: head.flag("autostart")?,
            files: Vec::new(),
            directories: Vec::new(),
            media: Vec::new(),
            metadata: Vec::new(),
        };
        loop {
            let (namespace, event) = reader
                .read_resolved_event()
                .map_err(|error| malformed(error.to_string()))?;
            let ours = is_ours(&namespace);
            match event {
                Event::Start(start) => {
                    let start = start.into_owned();
                    let text = content(reader)?;
                    if ours {
                        inventory.child(&start, text)?;
                    }
                }
                Event::Empty(start) if ours => inventory.child(&start, String::new())?,
                Event::End(_) => break,
                Event::Eof => return Err(malformed("it ends in its middle")),
                _ => {}
            }
        }
        match inventory.files.is_empty() {
            true => Err(malformed("it names no file")),
            false => Ok(inventory),
        }
    }

    fn child(&mut self, start: &BytesStart<'_>, text: String) -> Result<(), Malformed> {
        let local = start.local_name();
        let attributes = Attributes::read(start)?;
        match local.into_inner() {
            "file" => bounded(&mut self.files, MAX_FILES, "files", File::read(&attributes)?),
            "directory" => bounded(
                &mut self.directories,
                MAX_FILES,
                "directories",
                Directory::read(&attributes)?,
            ),
            "medium" => {
                let medium = Medium {
                    target: attributes.name("target")?,
                    path: attributes.path("path")?,
                };
                bounded(&mut self.media, MAX_MEDIA, "media", medium)
            }
            "snapshot" => self.describe(MetadataKind::Snapshot, &attributes, text),
            "checkpoint" => self.describe(MetadataKind::Checkpoint, &attributes, text),
            // Of a later release.
            _ => Ok(()),
        }
    }

    fn describe(
        &mut self,
        kind: MetadataKind,
        attributes: &Attributes,
        xml: String,
    ) -> Result<(), Malformed> {
        let metadata = Metadata {
            kind,
            name: attributes.name("name")?,
            current: attributes.flag("current")?,
            xml,
        };
        if metadata.xml.trim().is_empty() {
            return Err(malformed(format!(
                "{} {} has no description",
                kind.name(),
                metadata.name
            )));
        }
        bounded(
            &mut self.metadata,
            MAX_METADATA,
            "snapshots and checkpoints",
            metadata,
        )
    }
}

fn bounded<T>(list: &mut Vec<T>, limit: usize, what: &str, entry: T) -> Result<(), Malformed> {
    if list.len() == limit {
        return Err(malformed(format!("it has more than {limit} {what}")));
    }
    list.push(entry);
    Ok(())
}

impl File {
    fn read(attributes: &Attributes) -> Result<Self, Malformed> {
        let target = || attributes.name("target");
        let layer = || match attributes.parsed("layer")? {
            layer if layer <= MAX_LAYER => Ok(layer),
            _ => Err(malformed(format!("a chain is deeper than {MAX_LAYER} images"))),
        };
        let part = match attributes.text("part")? {
            "disk" => Part::Disk {
                target: target()?,
                layer: layer()?,
                format: attributes.name("format")?,
                relative: attributes.flag("relative")?,
            },
            "data" => Part::Data {
                target: target()?,
                layer: layer()?,
                relative: attributes.flag("relative")?,
            },
            "nvram" => Part::Nvram,
            "tpm" => Part::Tpm,
            "log" => Part::Log,
            "other" => Part::Other,
            other => {
                return Err(malformed(format!(
                    "a file is a {other}, which this release does not know"
                )))
            }
        };
        let kind = match attributes.text("kind")? {
            "file" => Kind::File,
            "block" => Kind::Block,
            _ => return Err(malformed("attribute kind cannot be read")),
        };
        let size = attributes.parsed("size")?;
        let allocated = attributes.parsed("allocated")?;
        if size > MAX_SIZE || allocated > MAX_SIZE {
            return Err(malformed("a file has an impossible size"));
        }
        Ok(Self {
            path: attributes.path("path")?,
            part,
            kind,
            size,
            allocated,
        })
    }
}

impl Directory {
    fn read(attributes: &Attributes) -> Result<Self, Malformed> {
        let mode = u32::from_str_radix(attributes.text("mode")?, 8).ok();
        Ok(Self {
            path: attributes.path("path")?,
            mode: mode
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| malformed("attribute mode cannot be read"))?,
            owner: attributes.name("owner")?,
            group: attributes.name("group")?,
        })
    }
}

impl Attributes {
    /// A name: not empty, not long.
    fn name(&self, key: &str) -> Result<String, Malformed> {
        let name = self.text(key)?;
        match !name.is_empty() && name.len() <= MAX_NAME {
            true => Ok(name.to_owned()),
            false => Err(malformed(format!("attribute {key} is empty or too long"))),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, Malformed> {
        match self.text(key)? {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => Err(malformed(format!("attribute {key} cannot be read"))),
        }
    }

    /// An absolute path that means what it says.
    fn path(&self, key: &str) -> Result<PathBuf, Malformed> {
        let path = self.text(key)?;
        let plain = path.len() > 1
            && path.len() <= MAX_PATH
            && path.starts_with('/')
            && !path.ends_with('/')
            && path
                .split('/')
                .skip(1)
                .all(|part| !matches!(part, "" | "." | ".."))
            && path.chars().all(is_xml);
        match plain {
            true => Ok(path.into()),
            false => Err(malformed(format!("attribute {key} is no plain absolute path"))),
        }
    }
}

fn yes(flag: bool) -> &'static str {
    match flag {
        true => "yes",
        false => "no",
    }
}

fn is_ours(namespace: &ResolveResult<'_>) -> bool {
    matches!(namespace, ResolveResult::Bound(bound) if bound.into_inner() == NAMESPACE)
}

/// The text of the element whose start has been read, to its end; elements in it are skipped.
fn content(reader: &mut NsReader<&[u8]>) -> Result<String, Malformed> {
    let (mut depth, mut text) = (0usize, String::new());
    loop {
        match reader
            .read_event()
            .map_err(|error| malformed(error.to_string()))?
        {
            Event::Start(_) => depth += 1,
            Event::End(_) if depth == 0 => return Ok(text),
            Event::End(_) => depth -= 1,
            Event::Text(piece) if depth == 0 => text.push_str(&piece.xml10_content()),
            Event::CData(piece) if depth == 0 => text.push_str(&piece),
            Event::GeneralRef(reference) if depth == 0 => {
                text.push_str(&text_of_reference(&reference).map_err(malformed)?);
            }
            Event::Eof => return Err(malformed("it ends in its middle")),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn an_inventory() -> Inventory {
        let file = |path: &str, part| File {
            path: path.into(),
            part,
            kind: Kind::File,
            size: 10 << 30,
            allocated: 1 << 20,
        };
        let disk = |target: &str, layer| Part::Disk {
            target: target.into(),
            layer,
            format: "qcow2".into(),
            relative: layer > 0,
        };
        Inventory {
            guest: Guest {
                name: "odd<>&'\" name".into(),
                uuid: Uuid::from_u128(7),
            },
            autostart: true,
            files: vec![
                file("/images/top & 'more'.qcow2", disk("vda", 0)),
                file("/images/base.qcow2", disk("vda", 1)),
                file(
                    "/images/ä.raw",
                    Part::Data {
                        target: "vda".into(),
                        layer: 0,
                        relative: false,
                    },
                ),
                File {
                    kind: Kind::Block,
                    ..file("/dev/vg/lv", disk("vdb", 0))
                },
                file("/nvram/g_VARS.fd", Part::Nvram),
                file("/swtpm/u/tpm2/tpm2-00.permall", Part::Tpm),
                file("/log/g.log", Part::Log),
                file("/images/memory.1", Part::Other),
            ],
            directories: vec![Directory {
                path: "/swtpm/u".into(),
                mode: 0o711,
                owner: "tss".into(),
                group: "tss".into(),
            }],
            media: vec![Medium {
                target: "sda".into(),
                path: "/iso/install.iso".into(),
            }],
            metadata: vec![
                Metadata {
                    kind: MetadataKind::Snapshot,
                    name: "s1".into(),
                    current: true,
                    xml: "<domainsnapshot>\n\t<name>s1</name>\n  <a b='&amp;'/></domainsnapshot>\n".into(),
                },
                Metadata {
                    kind: MetadataKind::Checkpoint,
                    name: "c1".into(),
                    current: false,
                    xml: "<domaincheckpoint/>".into(),
                },
            ],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let inventory = an_inventory();
        let xml = inventory.to_xml().unwrap();
        assert_eq!(Inventory::from_xml(&xml), Ok(inventory));
    }

    #[test]
    fn malformed_inventories_are_refused() {
        let good = an_inventory().to_xml().unwrap();
        for (from, to) in [
            ("path='/images/base.qcow2'", "path='images/base.qcow2'"),
            ("path='/images/base.qcow2'", "path='/images/../base.qcow2'"),
            ("path='/images/base.qcow2'", "path='/images//base.qcow2'"),
            ("path='/images/base.qcow2'", "path='/images/base.qcow2/'"),
            ("path='/images/base.qcow2'", "path='/images/&#10;.qcow2'"),
            ("path='/images/base.qcow2'", ""),
            ("layer='1'", "layer='256'"),
            ("layer='1'", ""),
            ("part='nvram'", "part='firmware'"),
            ("relative='yes'", "relative='perhaps'"),
            ("kind='block'", "kind='char'"),
            ("size='10737418240'", "size='-1'"),
            ("size='10737418240'", "size='1125899906842625'"),
            ("allocated='1048576'", "allocated='99999999999999999999'"),
            ("mode='711'", "mode='18'"),
            ("mode='711'", "mode='10000'"),
            ("autostart='yes'", "autostart='true'"),
            ("current='no'", ""),
            ("name='s1'", "name=''"),
            ("uuid='0", "uuid='x"),
            ("&lt;domaincheckpoint/&gt;", " "),
            ("</ferry:inventory>", ""),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            assert!(Inventory::from_xml(&bad).is_err(), "{from} -> {to}");
        }
        assert!(Inventory::from_xml(&good.replace(NAMESPACE, "https://example.org/")).is_err());
    }

    #[test]
    fn names_that_xml_cannot_carry_are_refused_by_the_writer() {
        use std::os::unix::ffi::OsStringExt;
        for path in [
            PathBuf::from(std::ffi::OsString::from_vec(b"/images/\xff".to_vec())),
            "/images/a\tb".into(),
            "relative".into(),
        ] {
            let mut inventory = an_inventory();
            inventory.files[0].path = path;
            assert!(inventory.to_xml().is_err());
        }
    }

    #[test]
    fn every_cut_and_every_flip_is_survived() {
        let good = an_inventory().to_xml().unwrap();
        for index in 0..good.len() {
            if let Some(cut) = good.get(..index) {
                assert!(Inventory::from_xml(cut).is_err());
            }
            let mut bad = good.clone().into_bytes();
            bad[index] ^= 0x15;
            if let Ok(bad) = String::from_utf8(bad) {
                let _ = Inventory::from_xml(&bad);
            }
        }
    }

    #[test]
    fn bounds_hold() {
        let mut inventory = an_inventory();
        let medium = inventory.media[0].clone();
        inventory.media = vec![medium; MAX_MEDIA];
        assert!(inventory.to_xml().is_ok());
        inventory.media.push(inventory.media[0].clone());
        assert!(inventory.to_xml().is_err());
        inventory.media.clear();
        inventory.files.clear();
        assert!(inventory.to_xml().is_err());
    }
}
