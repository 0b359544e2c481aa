//! What a guest's definition says of files: disks, firmware's variables, TPM, and what it needs besides. Pure.

use roxmltree::{Document, Node};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The longest string libvirt's protocol carries (libvirt 11.3, REMOTE_STRING_MAX), in bytes.
const MAX_XML: usize = 4 << 20;
/// Layers of one disk's explicit chain; QEMU's own chains are shorter by far.
const MAX_LAYERS: usize = 200;

/// A guest's definition, as far as files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its disks, media among them.
    pub disks: Vec<Disk>,
    /// Where firmware keeps its variables.
    pub nvram: Option<PathBuf>,
    /// The state of its emulated TPM.
    pub tpm: Option<Tpm>,
    /// Files that must be there and are nobody's to move: kernel, firmware, shared directories.
    pub needed: Vec<PathBuf>,
    /// Secrets of libvirt's that it names.
    pub secrets: Vec<Uuid>,
    /// Why it cannot be moved, where that is so.
    pub unmovable: Vec<String>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The guest's name for it, `vda`: by it two definitions are compared.
    pub target: String,
    /// Where its bytes are.
    pub source: Source,
    /// The format that QEMU is told; libvirt takes raw where none is said.
    pub format: String,
    /// It is looked for at the destination, not moved: read-only, shareable, or in a drive for removable media.
    pub media: bool,
    /// The layers below, where the definition names them.
    pub layers: Vec<Source>,
    /// The definition says that nothing is below the last of these (`<backingStore/>`), whatever the headers say.
    pub ends: bool,
    /// Files that hold the data of its images, where the definition names them.
    pub data: Vec<Source>,
}

/// Where bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: an empty drive.
    None,
    /// In a file.
    File(PathBuf),
    /// On a block device.
    Block(PathBuf),
    /// In a volume of a pool.
    Volume {
        /// The pool.
        pool: String,
        /// The volume.
        volume: String,
    },
    /// On the network, where both hosts reach it.
    Network,
    /// Where this kind of disk has them, which nobody can move.
    Other(String),
}

/// An emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// Where the definition says so itself.
    pub source: Option<PathBuf>,
}

/// A definition that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest's definition cannot be read: {0}")]
pub struct Unreadable(String);

fn child<'a>(node: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text<'a>(node: Node<'a, 'a>, name: &str) -> Option<&'a str> {
    child(node, name)?
        .text()
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

impl Definition {
    /// Reads libvirt's domain XML.
    pub fn read(xml: &str) -> Result<Self, Unreadable> {
        let unreadable = |why: &dyn std::fmt::Display| Unreadable(why.to_string());
        if xml.len() > MAX_XML {
            return Err(unreadable(&"it is too long"));
        }
        let document = Document::parse(xml).map_err(|error| unreadable(&error))?;
        let domain = document.root_element();
        if !domain.has_tag_name("domain") {
            return Err(unreadable(&"it is no <domain>"));
        }
        let name = text(domain, "name").ok_or_else(|| unreadable(&"it has no <name>"))?;
        let uuid = text(domain, "uuid").and_then(|uuid| uuid.parse().ok());
        let mut definition = Self {
            name: name.to_owned(),
            uuid: uuid.ok_or_else(|| unreadable(&"it has no <uuid>"))?,
            disks: Vec::new(),
            nvram: None,
            tpm: None,
            needed: Vec::new(),
            secrets: Vec::new(),
            unmovable: Vec::new(),
        };
        if let Some(os) = child(domain, "os") {
            definition.firmware(os);
        }
        if let Some(devices) = child(domain, "devices") {
            for device in devices.children().filter(Node::is_element) {
                definition.device(device);
            }
        }
        let secrets = domain.descendants().filter(|node| node.has_tag_name("secret"));
        for uuid in secrets.filter_map(|secret| secret.attribute("uuid")?.parse().ok()) {
            if !definition.secrets.contains(&uuid) {
                definition.secrets.push(uuid);
            }
        }
        Ok(definition)
    }

    fn firmware(&mut self, os: Node) {
        for name in ["kernel", "initrd", "dtb", "shim", "loader"] {
            self.needed.extend(text(os, name).map(PathBuf::from));
        }
        let Some(nvram) = child(os, "nvram") else {
            // libvirt's own default, for a guest that was defined by a release that did not write it down.
            let flash = child(os, "loader").is_some_and(|loader| {
                loader.attribute("type") == Some("pflash") && loader.attribute("stateless") != Some("yes")
            });
            if flash {
                self.nvram = Some(format!("/var/lib/libvirt/qemu/nvram/{}_VARS.fd", self.name).into());
            }
            return;
        };
        match nvram.attribute("type").unwrap_or("file") {
            "file" => {
                let named = child(nvram, "source").and_then(|source| source.attribute("file"));
                let named = named.or_else(|| nvram.text().map(str::trim));
                self.nvram = named.filter(|path| !path.is_empty()).map(PathBuf::from);
            }
            "network" => {}
            kind => self
                .unmovable
                .push(format!("its firmware's variables are of type '{kind}'")),
        }
    }

    fn device(&mut self, device: Node) {
        match device.tag_name().name() {
            "disk" => match Disk::read(device) {
                Ok(disk) => self.disks.push(disk),
                Err(why) => self.unmovable.push(why),
            },
            "tpm" => {
                let backend = child(device, "backend");
                if let Some(backend) = backend.filter(|backend| backend.attribute("type") == Some("emulator"))
                {
                    let source = child(backend, "source").and_then(|source| source.attribute("path"));
                    self.tpm = Some(Tpm {
                        source: source.map(PathBuf::from),
                    });
                }
            }
            "memory" if matches!(device.attribute("model"), Some("nvdimm" | "virtio-pmem")) => {
                let path = child(device, "source").and_then(|source| text(source, "path"));
                self.unmovable.push(format!(
                    "its persistent memory, {}, cannot be moved",
                    path.unwrap_or("?")
                ));
            }
            "filesystem" => {
                let directory = child(device, "source").and_then(|source| source.attribute("dir"));
                self.needed.extend(directory.map(PathBuf::from));
            }
            _ => {}
        }
    }

    /// The disk that the guest knows by this name.
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

impl Disk {
    fn read(disk: Node) -> Result<Self, String> {
        let target = child(disk, "target").and_then(|target| target.attribute("dev"));
        let target = target.ok_or("it has a disk without a name")?.to_owned();
        let removable = matches!(disk.attribute("device"), Some("cdrom" | "floppy"));
        let fixed = ["readonly", "shareable"]
            .iter()
            .any(|flag| child(disk, flag).is_some());
        let driver = child(disk, "driver").and_then(|driver| driver.attribute("type"));
        let mut layers = Vec::new();
        let mut below = child(disk, "backingStore");
        while let Some(layer) = below.filter(|layer| layer.has_attribute("type")) {
            if layers.len() == MAX_LAYERS {
                return Err(format!("its disk {target} has more than {MAX_LAYERS} layers"));
            }
            layers.push(Source::read(layer));
            below = child(layer, "backingStore");
        }
        let data = disk.descendants().filter(|node| node.has_tag_name("dataStore"));
        let disk = Self {
            ends: below.is_some(),
            data: data.map(Source::read).collect(),
            source: Source::read(disk),
            format: driver.unwrap_or("raw").to_owned(),
            media: removable || fixed,
            layers,
            target,
        };
        for source in std::iter::once(&disk.source).chain(&disk.layers) {
            if let (Source::Other(kind), false) = (source, disk.media) {
                return Err(format!(
                    "its disk {} is of type '{kind}', which cannot be moved",
                    disk.target
                ));
            }
        }
        Ok(disk)
    }
}

impl Source {
    fn read(element: Node) -> Self {
        let Some(source) = child(element, "source") else {
            return Self::None;
        };
        let attribute = |name| source.attribute(name).filter(|value| !value.is_empty());
        match element.attribute("type").unwrap_or("file") {
            "file" => attribute("file").map_or(Self::None, |path| Self::File(path.into())),
            "block" => attribute("dev").map_or(Self::None, |path| Self::Block(path.into())),
            "volume" => match (attribute("pool"), attribute("volume")) {
                (Some(pool), Some(volume)) => Self::Volume {
                    pool: pool.to_owned(),
                    volume: volume.to_owned(),
                },
                _ => Self::None,
            },
            "network" => Self::Network,
            other => Self::Other(other.to_owned()),
        }
    }

    /// The path that it names.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Block(path) => Some(path),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(os: &str, devices: &str) -> String {
        format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>g</name>\
             <uuid>00000000-0000-0000-0000-000000000007</uuid><os><type>hvm</type>{os}</os>\
             <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}</devices></domain>"
        )
    }

    fn read(os: &str, devices: &str) -> Definition {
        Definition::read(&domain(os, devices)).unwrap()
    }

    #[test]
    fn disks_are_told_apart() {
        let found = read(
            "",
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a/top.qcow2' index='1'/>\
             <backingStore type='file' index='3'><format type='raw'/><source file='/a/base'/>\
             <dataStore type='file'><format type='raw'/><source file='/a/data'/></dataStore><backingStore/></backingStore>\
             <target dev='vda' bus='virtio'/></disk>\
             <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/lv'/><target dev='vdb'/></disk>\
             <disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdc'/></disk>\
             <disk type='network' device='disk'><source protocol='rbd' name='x'/><target dev='vdd'/></disk>\
             <disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>\
             <disk type='file' device='disk'><source file='/iso'/><target dev='vde'/><shareable/></disk>\
             <disk type='vhostuser' device='disk'><source type='unix' path='/s'/><target dev='vdf'/></disk>",
        );
        let vda = found.disk("vda").unwrap();
        assert_eq!((vda.format.as_str(), vda.media), ("qcow2", false));
        assert_eq!(vda.layers, [Source::File("/a/base".into())]);
        assert_eq!(vda.data, [Source::File("/a/data".into())]);
        assert!(vda.ends && !found.disk("vdb").unwrap().ends);
        assert_eq!(
            found.disk("vdb").unwrap().source,
            Source::Block("/dev/vg/lv".into())
        );
        assert_eq!(
            found.disk("vdc").unwrap().source,
            Source::Volume {
                pool: "p".into(),
                volume: "v".into()
            }
        );
        assert_eq!(found.disk("vdd").unwrap().source, Source::Network);
        let empty = found.disk("sda").unwrap();
        assert!(empty.media && empty.source == Source::None);
        assert!(found.disk("vde").unwrap().media);
        assert!(found.disk("vdf").is_none() && found.unmovable[0].contains("vhostuser"));
    }

    #[test]
    fn variables_are_where_libvirt_says() {
        let loader = "<loader readonly='yes' type='pflash'>/fw</loader>";
        for (nvram, path) in [
            ("<nvram template='/t'>/v</nvram>", "/v"),
            (
                "<nvram type='file' template='/t'><source file='/w'/></nvram>",
                "/w",
            ),
            ("", "/var/lib/libvirt/qemu/nvram/g_VARS.fd"),
        ] {
            assert_eq!(
                read(&format!("{loader}{nvram}"), "").nvram,
                Some(path.into()),
                "{nvram}"
            );
        }
        assert_eq!(read("", "").nvram, None);
        assert_eq!(read("<loader type='rom'>/fw</loader>", "").nvram, None);
        assert_eq!(read(loader, "").needed, [PathBuf::from("/fw")]);
        assert!(!read("<nvram type='block'><source dev='/d'/></nvram>", "")
            .unmovable
            .is_empty());
    }

    #[test]
    fn a_tpm_is_its_emulators() {
        let tpm = |backend: &str| read("", &format!("<tpm model='tpm-crb'>{backend}</tpm>")).tpm;
        let own = tpm("<backend type='emulator' version='2.0'/>").unwrap();
        assert_eq!(own.source, None);
        let elsewhere =
            tpm("<backend type='emulator' version='1.2'><source type='dir' path='/t'/></backend>");
        assert_eq!(elsewhere.unwrap().source, Some("/t".into()));
        assert_eq!(
            tpm("<backend type='passthrough'><device path='/dev/tpm0'/></backend>"),
            None
        );
    }

    #[test]
    fn what_it_needs_is_found() {
        let found = read(
            "<kernel>/k</kernel><initrd>/i</initrd>",
            "<filesystem type='mount'><source dir='/shared'/><target dir='t'/></filesystem>\
             <disk type='file'><source file='/x'/><target dev='vda'/><encryption format='luks'>\
             <secret type='passphrase' uuid='00000000-0000-0000-0000-000000000009'/></encryption></disk>\
             <memory model='nvdimm'><source><path>/nv</path></source></memory>",
        );
        assert_eq!(found.needed, ["/k", "/i", "/shared"].map(PathBuf::from));
        assert_eq!(found.secrets, [Uuid::from_u128(9)]);
        assert!(found.unmovable[0].contains("/nv"));
    }

    #[test]
    fn the_rest_is_refused() {
        for xml in [
            "",
            "<domain/>",
            "<network><name>g</name></network>",
            "<domain><name>g</name></domain>",
        ] {
            assert!(Definition::read(xml).is_err(), "{xml}");
        }
        let bomb = format!("<!DOCTYPE d [<!ENTITY a 'x'>]>{}", domain("", ""));
        assert!(Definition::read(&bomb).is_err());
    }
}
