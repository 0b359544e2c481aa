//! What kind of machine a guest is, and whether this host's QEMU can be one.

use crate::libvirt::{Connection, Error};
use roxmltree::Document;

/// A kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `kvm`, `qemu`.
    pub kind: String,
    /// `x86_64`.
    pub arch: String,
    /// `pc-q35-10.0`.
    pub machine: String,
    /// The program, where the definition names one.
    pub emulator: Option<String>,
}

impl Machine {
    /// Reads libvirt's domain XML; `None` where libvirt is to choose.
    pub fn read(xml: &str) -> Option<Self> {
        let document = Document::parse(xml).ok()?;
        let domain = document.root_element();
        let child = |of: roxmltree::Node<'_, '_>, name: &str| {
            of.children()
                .find(|child| child.has_tag_name(name))
                .map(|node| node.id())
        };
        let node = |id| document.get_node(id);
        let os = node(child(domain, "os")?)?;
        let kind = node(child(os, "type")?)?;
        let emulator = child(domain, "devices")
            .and_then(node)
            .and_then(|devices| child(devices, "emulator"))
            .and_then(node);
        Some(Self {
            kind: domain.attribute("type")?.to_owned(),
            arch: kind.attribute("arch")?.to_owned(),
            machine: kind.attribute("machine")?.to_owned(),
            emulator: emulator.and_then(|emulator| Some(emulator.text()?.trim().to_owned())),
        })
    }
}

impl Connection {
    /// Whether a QEMU of this host can be this machine: libvirt's own answer.
    pub fn supports(self, machine: &Machine) -> Result<(), Error> {
        self.domain_capabilities(
            machine.emulator.as_deref(),
            &machine.arch,
            &machine.machine,
            &machine.kind,
        )
        .map(drop)
    }
}
