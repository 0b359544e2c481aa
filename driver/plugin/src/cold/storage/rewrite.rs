//! A guest's definition, and those in its snapshots, with other paths for its disks, and nothing else changed in them: not a
//! space. Pure.

use quick_xml::escape::escape;
use roxmltree::{Document, Node};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where disks go.
pub struct Destination<'a> {
    /// Where this file goes, by the name that stands there; `None` where it stays.
    pub place: &'a dyn Fn(&Path) -> Option<PathBuf>,
    /// Where this volume of this pool goes; `None` where it stays.
    pub volume: &'a dyn Fn(&str, &str) -> Option<PathBuf>,
    /// The pool that volumes are in then; without one, they become files.
    pub pool: Option<&'a str>,
}

/// The definition, or the description of a snapshot or checkpoint, with the disks' new paths.
///
/// # Errors
/// It cannot be read, or a path cannot be written.
pub fn rewritten(xml: &str, to: &Destination) -> Result<String, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's XML: {error}"))?;
    // A snapshot of a guest that ran has two: as it ran, and as it was defined.
    let definitions = document
        .descendants()
        .filter(|node| node.has_tag_name("domain") || node.has_tag_name("inactiveDomain"));
    let devices = definitions.flat_map(|domain| domain.children());
    let devices = devices.filter(|node| node.has_tag_name("devices"));
    let disks = devices
        .flat_map(|devices| devices.children())
        .filter(|node| node.has_tag_name("disk"));
    let mut edits = Vec::new();
    for disk in disks {
        volume(disk, to, &mut edits)?;
        for source in disk.descendants().filter(|node| node.has_tag_name("source")) {
            let Some(file) = source.attribute_node("file") else {
                continue;
            };
            if let Some(place) = (to.place)(Path::new(file.value())) {
                edits.push((file.range_value(), written(&place)?));
            }
        }
    }
    // From behind, so that what is before stays where it is.
    edits.sort_by_key(|(range, _): &(Range<usize>, String)| std::cmp::Reverse(range.start));
    let mut changed = xml.to_owned();
    for (range, text) in edits {
        changed.replace_range(range, &text);
    }
    Ok(changed)
}

/// A disk that is a pool's volume: another pool's then, or a file.
fn volume(disk: Node, to: &Destination, edits: &mut Vec<(Range<usize>, String)>) -> Result<(), String> {
    let child = |name| disk.children().find(|node: &Node| node.has_tag_name(name));
    let (Some(kind), Some(source)) = (disk.attribute_node("type"), child("source")) else {
        return Ok(());
    };
    let (Some(pool), Some(volume)) = (source.attribute_node("pool"), source.attribute_node("volume")) else {
        return Ok(());
    };
    if kind.value() != "volume" {
        return Ok(());
    }
    let Some(place) = (to.volume)(pool.value(), volume.value()) else {
        return Ok(());
    };
    match to.pool {
        Some(name) => {
            let file = place.file_name().unwrap_or_default();
            edits.push((pool.range_value(), escape(name).into_owned()));
            edits.push((volume.range_value(), written(Path::new(file))?));
        }
        None => {
            edits.push((kind.range_value(), "file".into()));
            edits.push((pool.range(), format!("file=\"{}\"", written(&place)?)));
            edits.push((volume.range(), String::new()));
        }
    }
    Ok(())
}

/// A path as it stands in an attribute.
fn written(path: &Path) -> Result<String, String> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
    let text = text.ok_or_else(|| format!("{} cannot be written as XML: rename it", path.display()))?;
    Ok(escape(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm'>\n  <name>g</name>\n  <devices>\n    <disk type='file' device='disk'>\n      \
        <source file='/a/./top &amp; x' index=\"1\"/>\n      <backingStore type='file'><format type='raw'/><source file=\"/a/base\"/>\
        <backingStore/></backingStore>\n      <target dev='vda'/>\n    </disk>\n    <disk type='volume'><source pool='p' \
        volume='v' startupPolicy='optional'/><target dev='vdb'/></disk>\n    <disk type='file'><source file='/a/other'/>\
        <target dev='vdc'/></disk>\n    <filesystem><source file='/a/base'/></filesystem>\n  </devices>\n</domain>\n";

    fn moved(pool: Option<&str>) -> String {
        let place = |path: &Path| {
            let moves = [Path::new("/a/top & x"), Path::new("/a/base")].contains(&path);
            moves.then(|| Path::new("/new<").join(path.file_name().unwrap()))
        };
        let volume =
            |pool: &str, volume: &str| ((pool, volume) == ("p", "v")).then(|| PathBuf::from("/new</v'"));
        let to = Destination {
            place: &place,
            volume: &volume,
            pool,
        };
        rewritten(XML, &to).unwrap()
    }

    #[test]
    fn paths_change_and_nothing_else() {
        let expected = XML
            .replace("'/a/./top &amp; x'", "'/new&lt;/top &amp; x'")
            .replace("file=\"/a/base\"", "file=\"/new&lt;/base\"")
            .replace("type='volume'", "type='file'")
            .replace("pool='p' volume='v' ", "file=\"/new&lt;/v&apos;\"  ");
        assert_eq!(moved(None), expected);
        Document::parse(&expected).unwrap();
        let in_pool = moved(Some("q"));
        assert!(
            in_pool.contains("<source pool='q' volume='v&apos;' startupPolicy"),
            "{in_pool}"
        );
    }

    #[test]
    fn a_snapshot_holds_definitions() {
        let snapshot = |text: &str| {
            let inactive = text.replace("domain", "inactiveDomain");
            format!("<domainsnapshot><name>s</name><disks><disk name='vda'/></disks>{text}{inactive}</domainsnapshot>")
        };
        let to = Destination {
            place: &|path| (path == Path::new("/a/other")).then(|| "/b/other".into()),
            volume: &|_, _| None,
            pool: None,
        };
        let expected = XML.replace("/a/other", "/b/other");
        assert_eq!(rewritten(&snapshot(XML), &to).unwrap(), snapshot(&expected));
    }

    #[test]
    fn nothing_moves_nothing_changes() {
        let to = Destination {
            place: &|_| None,
            volume: &|_, _| None,
            pool: None,
        };
        assert_eq!(rewritten(XML, &to).unwrap(), XML);
        assert!(rewritten("<domain", &to).is_err());
    }
}
