//! Memory that the engine can move, for guests whose definition leaves the choice to the host
//! (`guest_memory = "shared"`).
//!
//! libvirt gives such a guest anonymous memory, which only its own QEMU sees. Where the host's directory for guests'
//! memory files is on a tmpfs, the same memory can be in a shared file of that tmpfs, and mapped by the engine. What it
//! loses is KSM, which merges anonymous memory only, and transparent huge pages, unless the tmpfs is mounted with them
//! (huge=within_size). So what is defined, created or arrives without a choice gets
//! `<source type='file'/><access mode='shared'/>`; whoever writes any choice keeps it, `<source type='anonymous'/>`
//! among them.

use ferry_contract::config::GuestMemory;
use ferry_host as host;
use quick_xml::events::{BytesStart, Event};
use quick_xml::Reader;
use std::path::Path;
use std::sync::Once;

/// What is put into `<memoryBacking>`.
const SHARED: &str = "<source type='file'/><access mode='shared'/>";
/// The longest string libvirt's protocol carries (libvirt 11.3, REMOTE_STRING_MAX), in bytes.
const MAX_XML: usize = 4 << 20;

/// Whose room counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It starts now: what is free.
    Now,
    /// It may start later: what there is.
    Later,
}

/// The definition with memory that the engine can move; `None` where it stays as it is.
pub fn shared(xml: &str, start: Start) -> Option<String> {
    if xml.len() > MAX_XML {
        return None;
    }
    // A configuration that cannot be used is told at the next migration, with its line.
    let config = host::config().ok()?;
    if !config.enabled || config.guest_memory == GuestMemory::AsDefined {
        return None;
    }
    let open = Definition::read(xml)?;
    let directory = host::memory_directory();
    let Some(room) = host::tmpfs(&directory) else {
        tell_once(&directory);
        return None;
    };
    let room = match start {
        Start::Now => room.free,
        Start::Later => room.size,
    };
    if open.bytes > room {
        tracing::info!(
            "a guest with {} bytes of memory keeps libvirt's anonymous memory, which only libvirt's own migration moves: \
             {} has room for {room} bytes; enlarge that tmpfs",
            open.bytes,
            directory.display()
        );
        return None;
    }
    Some(open.with_shared_memory(xml))
}

fn tell_once(directory: &Path) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::info!(
            "guests that do not choose their memory keep libvirt's anonymous memory, which only libvirt's own migration \
             moves: {} is not on a tmpfs (systemctl enable --now var-lib-libvirt-qemu-ram.mount, or memory_backing_dir in \
             qemu.conf)",
            directory.display()
        );
    });
}

/// A definition that leaves the choice open.
#[derive(Debug, PartialEq, Eq)]
struct Definition {
    /// The guest's memory.
    bytes: u64,
    /// Where in the text the choice belongs.
    place: Place,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Right after `<memoryBacking>`.
    Inside(usize),
    /// In place of `<memoryBacking/>`.
    InsteadOf(usize, usize),
    /// In an element of its own, after `</memory>`.
    Alone(usize),
}

impl Definition {
    /// `None` for what is no guest of QEMU's, has made its choice, or cannot be read: that is libvirt's to judge.
    fn read(xml: &str) -> Option<Self> {
        let mut reader = Reader::from_str(xml);
        let mut path: Vec<String> = Vec::new();
        let (mut unit, mut amount) = (String::new(), String::new());
        let (mut after_memory, mut backing) = (None, None);
        loop {
            let before = usize::try_from(reader.buffer_position()).ok()?;
            let event = reader.read_event().ok()?;
            let after = usize::try_from(reader.buffer_position()).ok()?;
            let (start, empty) = match &event {
                Event::Start(start) => (start, false),
                Event::Empty(start) => (start, true),
                Event::Text(text) if path == ["domain", "memory"] => {
                    amount.push_str(&text.xml10_content());
                    continue;
                }
                Event::End(_) => {
                    if path == ["domain", "memory"] {
                        after_memory = Some(after);
                    }
                    path.pop()?;
                    continue;
                }
                Event::DocType(_) => return None,
                Event::Eof => break,
                _ => continue,
            };
            let name = start.name().into_inner().to_owned();
            let parents: Vec<&str> = path.iter().map(String::as_str).collect();
            match (parents.as_slice(), name.as_str()) {
                ([], "domain") if matches!(attribute(start, "type")?.as_str(), "kvm" | "qemu") => {}
                ([], _) => return None,
                (["domain"], "memory") => unit = attribute(start, "unit").unwrap_or_default(),
                (["domain"], "memoryBacking") if empty => backing = Some(Place::InsteadOf(before, after)),
                (["domain"], "memoryBacking") => backing = Some(Place::Inside(after)),
                (["domain", "memoryBacking"], "source" | "access" | "hugepages" | "locked") => return None,
                (["domain", "cpu", "numa"], "cell") if attribute(start, "memAccess").is_some() => {
                    return None
                }
                // Never eligible.
                (["domain"], "launchSecurity") => return None,
                (["domain", "devices"], "hostdev") if attribute(start, "type").as_deref() != Some("usb") => {
                    return None
                }
                _ => {}
            }
            if !empty {
                path.push(name);
            }
        }
        Some(Self {
            bytes: amount.trim().parse::<u64>().ok()?.checked_mul(scale(&unit)?)?,
            place: backing.or(after_memory.map(Place::Alone))?,
        })
        .filter(|_| path.is_empty())
    }

    fn with_shared_memory(&self, xml: &str) -> String {
        let (from, to) = match self.place {
            Place::Inside(at) | Place::Alone(at) => (at, at),
            Place::InsteadOf(from, to) => (from, to),
        };
        let text = match self.place {
            Place::Inside(_) => SHARED.to_owned(),
            _ => format!("<memoryBacking>{SHARED}</memoryBacking>"),
        };
        [&xml[..from], &text, &xml[to..]].concat()
    }
}

fn attribute(start: &BytesStart<'_>, name: &str) -> Option<String> {
    let found = start
        .attributes()
        .flatten()
        .find(|attribute| attribute.key.into_inner() == name)?;
    let value = found.normalized_value(quick_xml::XmlVersion::Implicit1_0).ok()?;
    Some(value.into_owned())
}

/// Bytes of a unit (libvirt 11.3, `virScaleInteger`; KiB where none is said).
fn scale(unit: &str) -> Option<u64> {
    let lower = unit.to_ascii_lowercase();
    let (prefix, base) = match lower.as_str() {
        "" => return Some(1 << 10),
        "b" | "byte" | "bytes" => return Some(1),
        unit => match (unit.strip_suffix("ib"), unit.strip_suffix('b')) {
            (Some(prefix), _) => (prefix, 1024u64),
            (None, Some(prefix)) => (prefix, 1000),
            (None, None) => (unit, 1024),
        },
    };
    let power = ["k", "m", "g", "t", "p", "e"]
        .iter()
        .position(|known| *known == prefix)?;
    base.checked_pow(power as u32 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(xml: &str) -> Option<String> {
        Definition::read(xml).map(|open| open.with_shared_memory(xml))
    }

    #[test]
    fn a_guest_without_a_choice_is_given_one() {
        assert_eq!(
            given("<domain type='kvm'><memory>4</memory><vcpu>1</vcpu></domain>").unwrap(),
            "<domain type='kvm'><memory>4</memory><memoryBacking><source type='file'/><access mode='shared'/>\
             </memoryBacking><vcpu>1</vcpu></domain>"
        );
        assert_eq!(
            given("<domain type='qemu'><memoryBacking/><memory>4</memory></domain>").unwrap(),
            "<domain type='qemu'><memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>\
             <memory>4</memory></domain>"
        );
        assert_eq!(
            given("<domain type='kvm'><memory>4</memory><memoryBacking><nosharepages/></memoryBacking></domain>").unwrap(),
            "<domain type='kvm'><memory>4</memory><memoryBacking><source type='file'/><access mode='shared'/>\
             <nosharepages/></memoryBacking></domain>"
        );
        // What only looks like a choice: comments, other elements' children.
        let disk = "<domain type='kvm'><memory>4</memory><!-- <memoryBacking><locked/></memoryBacking> -->\
                    <devices><disk><source file='/x'/></disk><hostdev type='usb'/></devices></domain>";
        assert!(given(disk)
            .unwrap()
            .contains("</memory><memoryBacking><source type='file'/>"));
    }

    #[test]
    fn a_choice_is_kept() {
        for choice in [
            "<memoryBacking><source type='anonymous'/></memoryBacking>",
            "<memoryBacking><access mode='private'/></memoryBacking>",
            "<memoryBacking><hugepages/></memoryBacking>",
            "<memoryBacking><locked/></memoryBacking>",
            "<cpu><numa><cell id='0' memAccess='private'/></numa></cpu>",
            "<devices><hostdev mode='subsystem' type='pci'/></devices>",
            "<launchSecurity type='sev'/>",
        ] {
            assert_eq!(
                given(&format!("<domain type='kvm'><memory>4</memory>{choice}</domain>")),
                None,
                "{choice}"
            );
        }
    }

    #[test]
    fn what_cannot_be_read_is_libvirts_to_judge() {
        for xml in [
            "",
            "<domain type='kvm'>",
            "<domain type='kvm'><memory>4</memory>",
            "<domain type='lxc'><memory>4</memory></domain>",
            "<domain><memory>4</memory></domain>",
            "<domain type='kvm'><memory unit='bananas'>4</memory></domain>",
            "<domain type='kvm'><memory>-4</memory></domain>",
            "<domain type='kvm'><memory unit='EiB'>9999</memory></domain>",
            "<!DOCTYPE domain><domain type='kvm'><memory>4</memory></domain>",
            "<network/>",
        ] {
            assert_eq!(given(xml), None, "{xml}");
        }
    }

    #[test]
    fn units_are_libvirts() {
        for (unit, bytes) in [
            ("", 1024),
            ("KiB", 1024),
            ("k", 1024),
            ("KB", 1000),
            ("GiB", 1 << 30),
            ("G", 1 << 30),
            ("GB", 1_000_000_000),
            ("bytes", 1),
        ] {
            assert_eq!(scale(unit), Some(bytes), "{unit}");
        }
    }
}
