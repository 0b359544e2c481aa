//! An inventory from XML that another host wrote.

use super::{
    is_xml, malformed, Directory, File, Inventory, Kind, Malformed, Medium, Metadata, MetadataKind, Part,
    MAX_FILES, MAX_MEDIA, MAX_METADATA, MAX_PATH, MAX_SIZE,
};
use crate::session::Guest;
use crate::xml::{is_ours, text_of_reference, Attributes};
use quick_xml::events::{BytesStart, Event};
use quick_xml::NsReader;
use std::path::PathBuf;
use uuid::Uuid;

/// Bytes of a name: a disk's target, a format, a snapshot.
const MAX_NAME: usize = 255;
/// The deepest chain that QEMU opens is 200 images (libvirt's limit, VIR_STORAGE_MAX_CHAIN_DEPTH).
const MAX_LAYER: u16 = 255;

impl Inventory {
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
