//! Memory that the engine can move, for guests whose definition leaves the choice to the host
//! (`guest_memory = "shared"`).
//!
//! libvirt gives such a guest anonymous memory, which only its own QEMU sees. Where the host's directory for guests'
//! memory files is on a tmpfs, the same memory can be in a shared file of that tmpfs, and mapped by the engine. What it
//! loses is KSM, which merges anonymous memory only, and transparent huge pages, unless the tmpfs is mounted with them
//! (huge=within_size). So what is defined, created or arrives without a choice gets
//! `<source type='file'/><access mode='shared'/>`; whoever writes any choice keeps it, `<source type='anonymous'/>`
//! among them.

use crate::libvirt::Domain;
use ferry_contract::config::GuestMemory;
use ferry_host as host;
use quick_xml::events::{BytesStart, Event};
use quick_xml::Reader;
use std::path::Path;
use std::sync::Once;

/// What is put into `<memoryBacking>`.
const SHARED: &str = "<source type='file'/><access mode='shared'/>";
/// Where a definition makes its choice.
const BACKING: [&str; 2] = ["domain", "memoryBacking"];
/// How deep elements may be: what is deeper, libvirt's own parser refuses (libxml2, xmlParserMaxDepth).
const MAX_DEPTH: usize = 256;
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
    // A configuration that cannot be used is told at the next migration, with its line.
    let config = host::config().ok()?;
    if !config.enabled || config.guest_memory == GuestMemory::AsDefined {
        return None;
    }
    let Memory::Unsaid(open) = Memory::of(xml)? else {
        return None;
    };
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

/// An operator's own definition of a guest that runs, with the memory that the guest was given here, where it names none:
/// libvirt takes it for another guest otherwise (libvirt 11.3, `qemuDomainDefCheckABIStability`). `None` where it stays.
pub fn as_it_runs(xml: &str, domain: Domain) -> Option<String> {
    if !domain.connection().is_qemu() || !host::config().ok()?.enabled {
        return None;
    }
    let Memory::Unsaid(open) = Memory::of(xml)? else {
        return None;
    };
    let running = domain.running().ok()?;
    (Memory::of(&running)? == Memory::SharedFile).then(|| open.with_shared_memory(xml))
}

/// Where to find a tmpfs for guests' memory.
const TMPFS: &str =
    "systemctl enable --now var-lib-libvirt-qemu-ram.mount, or memory_backing_dir in qemu.conf";

fn tell_once(directory: &Path) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::info!(
            "guests that do not choose their memory keep libvirt's anonymous memory, which only libvirt's own migration \
             moves: {} is not on a tmpfs ({TMPFS})",
            directory.display()
        );
    });
}

/// Says so of a guest that has come with its memory in a shared file, where such files are on a disk: it was given that
/// memory on a host with a tmpfs.
pub fn warn_of_disk(guest: &str, xml: &str) {
    let directory = host::memory_directory();
    if host::config().is_ok_and(|config| !config.enabled)
        || host::is_in_memory(&directory)
        || Memory::of(xml) != Some(Memory::SharedFile)
    {
        return;
    }
    tracing::warn!(
        guest,
        "its memory is a file in {}, which is on a disk here: what it writes is written there too, and where the disk is full \
         it stops. Put a tmpfs there ({TMPFS}), then move the guest away and back",
        directory.display()
    );
}

/// What a definition says of its guest's memory.
#[derive(Debug, PartialEq, Eq)]
enum Memory {
    /// Nothing: the choice is the host's.
    Unsaid(Definition),
    /// What such a guest is given.
    SharedFile,
    /// Anything else.
    Chosen,
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

impl Memory {
    /// `None` for what is no guest of QEMU's, or cannot be read: that is libvirt's to judge. Nobody else has looked at it.
    fn of(xml: &str) -> Option<Self> {
        if xml.len() > MAX_XML {
            return None;
        }
        let mut reader = Reader::from_str(xml);
        let mut path: Vec<String> = Vec::new();
        let (mut unit, mut amount) = (String::new(), String::new());
        let (mut after_memory, mut backing) = (None, None);
        let (mut file, mut access, mut other) = (false, None, false);
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
            let within = |parents: &[&str]| path == parents;
            match name.as_str() {
                "domain" if within(&[]) && matches!(attribute(start, "type")?.as_str(), "kvm" | "qemu") => {}
                _ if within(&[]) => return None,
                "memory" if within(&["domain"]) => unit = attribute(start, "unit").unwrap_or_default(),
                "memoryBacking" if within(&["domain"]) && empty => {
                    backing = Some(Place::InsteadOf(before, after))
                }
                "memoryBacking" if within(&["domain"]) => backing = Some(Place::Inside(after)),
                "source" if within(&BACKING) => match attribute(start, "type").as_deref() {
                    Some("file") => file = true,
                    _ => other = true,
                },
                "access" if within(&BACKING) => access = Some(attribute(start, "mode").unwrap_or_default()),
                "hugepages" | "locked" if within(&BACKING) => other = true,
                "cell" if within(&["domain", "cpu", "numa"]) => {
                    other |= attribute(start, "memAccess").is_some()
                }
                // Never eligible.
                "launchSecurity" if within(&["domain"]) => other = true,
                "hostdev" if within(&["domain", "devices"]) => {
                    other |= attribute(start, "type").as_deref() != Some("usb");
                }
                _ => {}
            }
            if !empty {
                if path.len() == MAX_DEPTH {
                    return None;
                }
                path.push(name);
            }
        }
        if !path.is_empty() {
            return None;
        }
        match (file, access.as_deref()) {
            (false, None) if !other => {}
            (true, Some("shared")) if !other => return Some(Self::SharedFile),
            _ => return Some(Self::Chosen),
        }
        Some(Self::Unsaid(Definition {
            bytes: amount.trim().parse::<u64>().ok()?.checked_mul(scale(&unit)?)?,
            place: backing.or(after_memory.map(Place::Alone))?,
        }))
    }
}

impl Definition {
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
        match Memory::of(xml)? {
            Memory::Unsaid(open) => Some(open.with_shared_memory(xml)),
            _ => None,
        }
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
    fn what_is_given_is_known_again() {
        let bare = "<domain type='kvm'><memory>4</memory></domain>";
        assert_eq!(Memory::of(&given(bare).unwrap()), Some(Memory::SharedFile));
        let with = |backing| format!("<domain type='kvm'><memory>4</memory>{backing}</domain>");
        for other in [
            "<memoryBacking><source type='file'/></memoryBacking>",
            "<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>",
            "<memoryBacking><hugepages/><source type='file'/><access mode='shared'/></memoryBacking>",
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        ] {
            assert_eq!(Memory::of(&with(other)), Some(Memory::Chosen), "{other}");
        }
    }

    /// It is looked at before anybody's rights are.
    #[test]
    fn what_is_deep_takes_no_time() {
        let start = "<domain type='kvm'>";
        let deep = [start, &"<a>".repeat((MAX_XML - start.len()) / 3)].concat();
        let begun = std::time::Instant::now();
        assert_eq!(Memory::of(&deep), None);
        assert!(begun.elapsed() < std::time::Duration::from_secs(5));
        let within = |depth: usize| {
            let (open, close) = ("<a>".repeat(depth), "</a>".repeat(depth));
            given(&format!("{start}<memory>4</memory>{open}{close}</domain>"))
        };
        assert!(within(MAX_DEPTH - 1).is_some() && within(MAX_DEPTH).is_none());
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
