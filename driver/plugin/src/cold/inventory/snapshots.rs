//! What libvirt keeps of a guest beside its definition: snapshots and checkpoints.

use crate::libvirt::{self, Domain};
use ferry_contract::cold::{Metadata, MetadataKind};
use roxmltree::Document;
use std::path::PathBuf;

/// The guest's snapshots and checkpoints, parents before children.
///
/// # Errors
/// libvirt does not describe one.
pub fn metadata(domain: Domain) -> Result<Vec<Metadata>, String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: libvirt::Error| format!("libvirt does not describe its {what}: {error}")
    };
    let snapshots = domain.snapshots().map_err(failed("snapshots"))?;
    let checkpoints = domain.checkpoints().map_err(failed("checkpoints"))?;
    let of = |kind, list: Vec<libvirt::Metadata>| {
        list.into_iter().map(move |one| {
            Ok(Metadata {
                kind,
                name: name(&one.xml)?,
                current: one.current,
                xml: one.xml,
            })
        })
    };
    of(MetadataKind::Snapshot, snapshots)
        .chain(of(MetadataKind::Checkpoint, checkpoints))
        .collect()
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
///
/// # Errors
/// It is no XML.
pub fn external(xml: &str) -> Result<Vec<(PathBuf, String)>, String> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
